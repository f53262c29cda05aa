"""A Decoder as a model of lm-evaluation-harness (Gao et al., EleutherAI), and its tasks run on it.

Likelihoods are sums of log-softmax in float32 over the continuation; a context that is too long loses its
beginning, as in the harness's own models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from anequant.errors import UnsupportedError, UsageError
from anequant.runtime.generate import Decoder, decoded, new_tokens, score
from anequant.runtime.sampling import Sampling, chooser

MOST_NEW_TOKENS = 256

Results = dict[str, dict[str, float]]
"""Metric values by task and metric name."""


def run_tasks(decoder: Decoder, tokenizer: Any, first: int, stop: frozenset[int], tasks: str) -> Results:
    """Run a comma-separated list of the harness's tasks, or of .yaml files that describe one.

    `first` is the token before a text without context. Raises UsageError when lm-eval is not installed, a
    task is unknown or needs a longer context, or the decoder tells only its best tokens;
    UnsupportedError for a task that samples.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            "lm-evaluation-harness is not installed", remedy="pip install 'anequant[eval]'"
        ) from error
    if not decoder.tells_all_logits:
        raise UsageError(
            "packages with arg-max heads tell no likelihoods", remedy="lower the checkpoint without --argmax"
        )
    names, folders = [], []
    for task in map(str.strip, tasks.split(",")):
        if task.endswith((".yaml", ".yml")):
            names.append(_task_name(Path(task)))
            folders.append(str(Path(task).parent))
        else:
            names.append(task)
    manager = TaskManager(include_path=list(dict.fromkeys(folders)) or None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(f"lm-evaluation-harness knows no task '{unknown[0]}'")
    model = _harness_model(decoder, tokenizer, first, stop)
    outcome = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)
    return {
        task: {name: value for name, value in values.items() if isinstance(value, float)}
        for task, values in outcome["results"].items()
    }


def _task_name(path: Path) -> str:
    """The `task` key of a task file; tags such as !function are the harness's business."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"task file '{path}' cannot be read: {error}") from error
    for event in text.splitlines():
        if event.startswith("task:"):
            return str(yaml.safe_load(event)["task"])
    raise UsageError(f"task file '{path}' names no task", remedy="give it a line `task: NAME`")


def _harness_model(decoder: Decoder, tokenizer: Any, first: int, stop: frozenset[int]) -> Any:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        """One request after the other: what runs here is a CPU and an interpreter."""

        eot_token_id = first
        prefix_token_id = first

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            tokens: list[int] = tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
            return tokens

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            return [likelihood(decoder, context, wanted) for _, context, wanted in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                tokens = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(tokens, first, decoder.context, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(likelihood(decoder, *pair)[0] for pair in pairs))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [complete(request.args[0], request.args[1]) for request in requests]

    def complete(context: str, options: dict[str, Any]) -> str:
        asked = normalize_gen_kwargs(options, MOST_NEW_TOKENS)
        limit, ends = asked["max_gen_toks"], asked["until"]
        if asked["do_sample"]:
            raise UnsupportedError("the task samples its answers, here they are greedy")
        if limit >= decoder.context:
            raise UsageError(
                f"the task wants {limit} new tokens, the model holds {decoder.context} with the prompt",
                remedy="packages can be lowered again with a larger --context",
            )
        tokens = tokenizer(context, add_special_tokens=False)["input_ids"] or [first]
        tokens = tokens[limit - decoder.context :]
        decoder.reset()
        text = ""
        for piece in decoded(
            tokenizer, new_tokens(decoder, tokens, chooser(Sampling()), limit=limit, stop=stop)
        ):
            text += piece
            found = [text.find(end) for end in ends if end in text]
            if found:
                return text[: min(found)]
        return text

    return HarnessModel()


def likelihood(decoder: Decoder, context: list[int], wanted: list[int]) -> tuple[float, bool]:
    """log p of `wanted` after a context of at least one token, and whether greedy decoding would say it.

    Raises UsageError when `wanted` alone is longer than the decoder's context.
    """
    if len(wanted) > decoder.context:
        raise UsageError(
            f"a continuation has {len(wanted)} tokens, the model holds {decoder.context}",
            remedy="packages can be lowered again with a larger --context",
        )
    tokens = (context + wanted)[-(decoder.context + 1) :]
    start = len(tokens) - len(wanted)
    logits = score(decoder, tokens, start)
    targets = torch.tensor(tokens[start:])
    chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
    return float(chosen.sum(dtype=torch.float64)), bool((logits.argmax(-1) == targets).all())
