"""A Decoder as a model of lm-evaluation-harness (Gao et al., EleutherAI).

Texts become tokens as the tokenizer makes them, its BOS included, as in the harness's own `hf` model;
likelihoods are sums of log-softmax in float32 over the continuation. A prompt that is too long loses its
beginning, which `shortened` counts. Importing this module takes lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from anequant.errors import InputError, UnsupportedError, UsageError, first_line
from anequant.jobs.control import Progress, silent
from anequant.runtime.generate import Decoder, decode_pieces, encode_text, generate_tokens, score
from anequant.runtime.sampling import Sampling, make_chooser

MOST_NEW_TOKENS = 256
LONGEST_WINDOW = 2048
"""Tokens of a rolling window where the context is longer: its logits are in memory at once."""

Answer = TypeVar("Answer")
Likelihood = tuple[float, bool]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A Decoder that answers one request after the other: what runs here is a CPU and an interpreter.

    `first` is the token before a text without context, `stop` ends a completion. `at_work` is entered while
    the decoder runs.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        first: int,
        stop: frozenset[int],
        progress: Progress = silent,
        at_work: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.shortened = 0
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._first = first
        self._stop = stop
        self._progress = progress
        self._at_work = at_work

    @property
    def eot_token_id(self) -> int:
        return self._first

    @property
    def tokenizer_name(self) -> str:
        """Name what the harness tells caches of prompts apart by; none is kept here."""
        return str(self._tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's template, for the harness's record."""
        return str(self._tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation: up to where the answer begins, or else up to the end of the last
        message, which the answer continues.

        Raises InputError when the template does not take it; the harness's `hf` model then leaves out the
        system message.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise InputError(
                f"the chat template does not take a prompt ({roles}): {first_line(error)}",
                remedy="leave out --apply-chat-template",
            ) from error
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the tokens of a text; without `add_special_tokens`, BOS goes before it unless the text names
        it."""
        if add_special_tokens is None:
            bos = self._tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return encode_text(self._tokenizer, string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts after `first`, each token predicted once."""

        def rolled(text: str) -> float:
            tokens = self.tok_encode(text, add_special_tokens=False)
            length = min(self._decoder.context, LONGEST_WINDOW)
            windows = get_rolling_token_windows(tokens, self._first, length, 1)
            return sum(likelihood(self._decoder, *make_disjoint_window(window))[0] for window in windows)

        return self._answers("text", [request.args for request in requests], rolled)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy completions, each up to the first of its `until` texts."""
        return self._answers("completion", [request.args for request in requests], self._completion)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[Likelihood]:
        def scored(context: list[int], wanted: list[int]) -> Likelihood:
            self.shortened += len(context) + len(wanted) > self._decoder.context + 1
            return likelihood(self._decoder, context, wanted)

        return self._answers("likelihood", [request[1:] for request in requests], scored)

    def _completion(self, context: str, options: dict[str, Any]) -> str:
        asked = normalize_gen_kwargs(options, MOST_NEW_TOKENS)
        limit, ends = asked["max_gen_toks"], asked["until"]
        if asked["do_sample"]:
            raise UnsupportedError("the task samples its answers, here they are greedy")
        room = self._decoder.context - limit
        if room < 1:
            raise UsageError(
                f"the task wants {limit} new tokens, the model holds {self._decoder.context} with the prompt",
                remedy="packages can be lowered again with a larger --context",
            )
        tokens = self.tok_encode(context) or [self._first]
        self.shortened += len(tokens) > room
        self._decoder.reset()
        produced = generate_tokens(
            self._decoder, tokens[-room:], make_chooser(Sampling()), limit=limit, stop=self._stop
        )
        text = ""
        for piece in decode_pieces(self._tokenizer, produced):
            text += piece
            found = [text.find(end) for end in ends if end in text]
            if found:
                return text[: min(found)]
        return text

    def _answers(
        self, what: str, requests: Sequence[tuple[Any, ...]], answer: Callable[..., Answer]
    ) -> list[Answer]:
        answers = []
        with self._at_work():
            for number, request in enumerate(requests):
                self._progress(f"{what} {number + 1} of {len(requests)}", number / len(requests))
                answers.append(answer(*request))
        return answers


def likelihood(decoder: Decoder, context: list[int], wanted: list[int]) -> Likelihood:
    """Return log p of `wanted` after a context of at least one token, and whether greedy decoding would say
    it.

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
