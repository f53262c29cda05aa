"""Tasks of lm-evaluation-harness, found by name or in files, and run on a Decoder."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anequant.errors import ResourceError, UnsupportedError, UsageError, first_line
from anequant.jobs.control import Progress, silent

if TYPE_CHECKING:
    from anequant.runtime.continue_text import TextModel

RESAMPLES = 1000
"""Of the answers, for standard errors without a formula, which are then off by about 2% of themselves."""

ONE_PROCESS = "DISABLE_MULTIPROC"
"""The harness's variable of the environment."""


@dataclass(frozen=True)
class TaskScores:
    """Values by task and by the harness's `metric,filter`, and standard errors by `metric_stderr,filter`
    where it has one; None for one that is not finite.

    `shortened` prompts lost their beginning because they were too long for the context.
    """

    scores: dict[str, dict[str, float | None]]
    shortened: int

    def to_dict(self) -> dict[str, Any]:
        return {"tasks": self.scores, "shortened_prompts": self.shortened}


def run_tasks(
    model: TextModel,
    first: int,
    tasks: str,
    *,
    apply_chat_template: bool = False,
    progress: Progress = silent,
) -> TaskScores:
    """Run a comma-separated list of the harness's tasks and groups, of .yaml files, or of folders of them.

    `first` is the token before a text without context. With `apply_chat_template` prompts are conversations,
    few-shot examples turns of them. Seeds and few-shot examples are those of the harness's own command.
    Raises UsageError when lm-eval is not installed, the tokenizer has no chat template, a task is unknown,
    cannot be loaded or needs a longer context, or the decoder tells only its best tokens; InputError when the
    template does not take a task's prompts; ResourceError when a task's data cannot be had; UnsupportedError
    for a task that samples, runs code or needs more than text.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", remedy="pip install 'anequant[eval]'")
    if not model.decoder.tells_all_logits:
        raise UsageError(
            "packages with arg-max heads tell no likelihoods", remedy="lower the checkpoint without --argmax"
        )
    if apply_chat_template and model.tokenizer.chat_template is None:
        raise UsageError(
            "the tokenizer has no chat template",
            remedy="leave --apply-chat-template out, as for a base model",
        )
    from lm_eval.evaluator import evaluate

    from anequant.evaluation.harness import HarnessModel

    with contextlib.ExitStack() as quiet:
        quiet.enter_context(_no_stderr())
        asked = HarnessModel(
            model.decoder, model.tokenizer, first, model.stop, progress, lambda: _lifted(quiet)
        )
        loaded = _load(tasks)
        with _bootstrap_here():
            outcome = evaluate(
                lm=asked,
                task_dict=loaded,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
    scores = {task: _finite(values) for task, values in outcome["results"].items()}
    return TaskScores(scores, asked.shortened)


@contextlib.contextmanager
def _bootstrap_here() -> Iterator[None]:
    """Make the harness resample in this process, which has threads and is not to be forked, without a word on
    stdout."""
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ[ONE_PROCESS]
        else:
            os.environ[ONE_PROCESS] = before


def _no_stderr() -> contextlib.AbstractContextManager[Any]:
    """Drop the progress bars and remarks of the harness and its libraries."""
    return contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def _lifted(quiet: contextlib.ExitStack) -> Iterator[None]:
    """Give stderr back while this lasts, for our own progress."""
    quiet.close()
    try:
        yield
    finally:
        quiet.enter_context(_no_stderr())


def _load(tasks: str) -> Any:
    """Load the harness's TaskDict of what the list names, seeded as `lm-eval run` seeds it."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    parts = [part.strip() for part in tasks.split(",")]
    folders = [part for part in parts if Path(part).is_dir()]
    files = [part for part in parts if part.endswith((".yaml", ".yml"))]
    named = len(folders) + len(files) < len(parts)
    manager = TaskManager(include_path=folders or None, include_defaults=named)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    wanted = []
    for part in parts:
        if part in folders:
            wanted += _tasks_in(part, TaskManager(include_path=part, include_defaults=False).all_subtasks)
        else:
            wanted += [part] if part in files else _matches(part, manager)
    try:
        loaded = manager.load(wanted)
    except OSError as error:
        raise ResourceError(
            f"the data of '{tasks}' cannot be had: {first_line(error)}",
            remedy="`datasets` loads it from the hub, its cache, or the files that the task names",
        ) from error
    except Exception as error:
        raise UsageError(
            f"'{tasks}' cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UnsupportedError(f"task '{name}' runs code that the model writes, or needs more than text")
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _tasks_in(folder: str, names: list[str]) -> list[str]:
    if not names:
        raise UsageError(
            f"folder '{folder}' holds no task", remedy="a task is a .yaml file with a `task` key"
        )
    return names


def _matches(name: str, manager: Any) -> list[str]:
    """Return the harness's tasks and groups with that name or pattern."""
    matches: list[str] = manager.match_tasks([name])
    if not matches:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        raise UsageError(
            f"lm-evaluation-harness knows no task '{name}'",
            remedy=f"did you mean '{close[0]}'?" if close else "`lm-eval ls tasks` lists what it knows",
        )
    return matches


def _finite(values: dict[str, Any]) -> dict[str, float | None]:
    return {
        key: float(value) if math.isfinite(value) else None
        for key, value in values.items()
        if "," in key and isinstance(value, Real)
    }
