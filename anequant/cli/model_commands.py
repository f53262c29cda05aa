"""Commands that run a model: eval, generate, chat, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anequant.cli.console import Console
from anequant.cli.options import backend_option, command, generation_options, window_options
from anequant.errors import UsageError

FOLDER = click.Path(path_type=Path)


@click.command(name="eval")
@click.argument("checkpoint")
@click.option("--text", metavar="FILE|wikitext2", help="Text to evaluate on.")
@click.option(
    "--base", metavar="MODEL", help="Float model to compare with: extra NLL, KL, top-1, noise floor, layers."
)
@window_options
@click.option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, .yaml files or folders.")
@click.option("--apply-chat-template", is_flag=True, help="Ask the tasks of --lm-eval as conversations.")
@backend_option("transformers", help="What runs the tasks of --lm-eval.")
@command
def evaluate(
    console: Console,
    checkpoint: str,
    text: str | None,
    base: str | None,
    windows: int,
    length: int,
    lm_eval: str | None,
    apply_chat_template: bool,
    backend: str,
) -> None:
    """Perplexity of CHECKPOINT on a text, its divergence from a base model, and its score in tasks.

    \b
    anequant eval CHECKPOINT --text wikitext2 --base org/name
    anequant eval CHECKPOINT --lm-eval arc_easy
    anequant eval CHECKPOINT --lm-eval gsm8k --apply-chat-template
    """
    if text is None and lm_eval is None:
        raise UsageError("nothing to evaluate on", remedy="name a text with --text or tasks with --lm-eval")
    if text is None and base is not None:
        raise UsageError("--base compares on a text", remedy="name one with --text")
    if apply_chat_template and lm_eval is None:
        raise UsageError("--apply-chat-template is for tasks", remedy="name some with --lm-eval")
    from anequant.evaluation.evaluate import evaluate_checkpoint, evaluate_tasks
    from anequant.report.terminal import quality_rows as rows

    values: dict[str, Any] = {"checkpoint": checkpoint}
    printed: list[tuple[str, str]] = []
    if text is not None:
        with console.progress("eval") as progress:
            result = evaluate_checkpoint(
                checkpoint, text, base, windows=windows, length=length, progress=progress
            )
        values |= result.to_dict()
        printed += rows.describe_evaluation(result)
    if lm_eval is not None:
        with console.progress("lm-eval") as progress:
            scores = evaluate_tasks(
                checkpoint, lm_eval, backend, apply_chat_template=apply_chat_template, progress=progress
            )
        values |= scores.to_dict()
        printed += rows.describe_tasks(scores)
    console.result(values, printed)


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--prompt", required=True, help="Text to continue.")
@generation_options
@command
def generate(
    console: Console, folder: Path, prompt: str, max_tokens: int, backend: str, **sampling: Any
) -> None:
    """Continue a text with the packages or the checkpoint in FOLDER.

    \b
    anequant generate OUT/packages --prompt 'The old house'
    """
    from anequant.runtime.continue_text import continue_text, open_text_model
    from anequant.runtime.sampling import Sampling

    options = Sampling(**sampling)
    model = open_text_model(folder, backend)
    pieces = []
    for piece in continue_text(model, prompt, max_tokens, options):
        pieces.append(piece)
        console.text(piece)
    console.text("\n")
    if model.full:
        console.note(f"the context of {model.decoder.context} tokens is full")
    console.result({"text": "".join(pieces)}, [])


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--system", metavar="TEXT", help="A first message that says how to answer.")
@generation_options
@command
def chat(
    console: Console, folder: Path, system: str | None, max_tokens: int, backend: str, **sampling: Any
) -> None:
    """Talk with the model in FOLDER: one turn a line, until the input ends.

    \b
    anequant chat OUT/packages
    anequant chat CHECKPOINT --backend transformers --temperature 0.7 --top-p 0.9
    """
    from anequant.runtime.continue_text import Chat, open_text_model
    from anequant.runtime.sampling import Sampling

    options = Sampling(**sampling)
    messages = [] if system is None else [{"role": "system", "content": system}]
    talk = Chat(open_text_model(folder, backend), options, messages)
    for turn in console.turns():
        for piece in talk.reply(turn, max_tokens):
            console.text(piece)
        console.text("\n")
        if talk.model.full:
            console.note(f"the context of {talk.model.decoder.context} tokens is full")
    console.result({"messages": talk.messages}, [])


@click.command()
@click.argument("packages", type=FOLDER)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode.")
@command
def profile(console: Console, packages: Path, tokens: int) -> None:
    """Where and how fast PACKAGES run, and whether they compute what the interpreter does; on a Mac.

    \b
    anequant profile OUT/packages --tokens 128
    """
    from anequant.inspection.device_profile import profile as run
    from anequant.report.terminal import results as text

    with console.progress("profile") as progress:
        result = run(packages, tokens, progress=progress)
    console.result({"folder": str(packages), **result.to_dict()}, text.describe_profile(result))
