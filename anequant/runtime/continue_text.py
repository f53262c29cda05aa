"""Text from a folder of packages or a checkpoint, by the backend that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anequant.checkpoints.places import CHECKPOINT_FOLDER, find_bundle, find_packages, has_packages
from anequant.checkpoints.reader import read_object
from anequant.errors import InputError, UsageError, first_line, quote
from anequant.reference.windows import load_tokenizer
from anequant.runtime.coreai_backend import AssetModel
from anequant.runtime.coreml_backend import PackageModel
from anequant.runtime.generate import Decoder, decode_pieces, encode_text, generate_tokens
from anequant.runtime.sampling import Sampling, make_chooser
from anequant.runtime.transformers_backend import TransformersModel
from anequant.targets.coreai.bundle import TOKENIZER
from anequant.targets.coreml.device import DevicePackage
from anequant.targets.coreml.interpreter.interpreter import Package

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class TextModel:
    """A decoder with its tokenizer, both from `folder`, and the tokens that end a text."""

    folder: Path
    decoder: Decoder
    tokenizer: Any
    stop: frozenset[int]

    @property
    def full(self) -> bool:
        """Whether the context holds no more tokens."""
        return self.decoder.position == self.decoder.context


def open_text_model(folder: Path, backend: str) -> TextModel:
    """Open an output of convert, or packages (interpreter, coreml), an asset (interpreter, coreai), or a
    checkpoint (transformers).

    Raises InputError for a folder that is not what the backend runs, UnsupportedError for coreml
    anywhere but on macOS.
    """
    decoder: Decoder
    bundle = find_bundle(folder)
    asked = backend == "coreai" or (backend == "interpreter" and not has_packages(folder))
    if backend == "transformers":
        part = folder / CHECKPOINT_FOLDER if (folder / CHECKPOINT_FOLDER).is_dir() else folder
        decoder = TransformersModel(part)
    elif asked and bundle is not None:
        decoder, part = AssetModel(bundle), bundle / TOKENIZER
    elif backend == "coreai":
        raise InputError(f"'{folder}' holds no asset of Core AI", remedy="lower with --target coreai")
    else:
        part = find_packages(folder)
        decoder = PackageModel(part, DevicePackage.open if backend == "coreml" else Package.open)
    return TextModel(part, decoder, load_tokenizer(part), read_stop_tokens(part))


def read_stop_tokens(folder: Path) -> frozenset[int]:
    """Read where transformers' `generate` stops: at the `eos_token_id` of generation_config.json, and only
    without that file at that of config.json.

    Raises InputError for a value that is neither null, nor a token, nor a list of tokens.
    """
    present = (folder / GENERATION_CONFIG).exists()
    name = GENERATION_CONFIG if present else "config.json"
    listed = read_object(folder / name).get("eos_token_id")
    ends = listed if isinstance(listed, list) else [listed]
    if listed is None:
        return frozenset()
    if not ends or not all(type(token) is int for token in ends):
        raise InputError(
            f"'eos_token_id' of '{name}' is {quote(listed)}",
            where=str(folder / name),
            remedy="write a token, a list of tokens, or null",
        )
    return frozenset(ends)


def continue_text(model: TextModel, prompt: str, limit: int, sampling: Sampling) -> Iterator[str]:
    """Yield `prompt`, then its continuation piece by piece.

    Stops at an end token, after `limit` tokens, or when the context is full.
    Raises UsageError for a prompt that does not fit.
    """
    tokens = encode_text(model.tokenizer, prompt)
    _check_sampling(model, sampling)
    produced = generate_tokens(model.decoder, tokens, make_chooser(sampling), limit=limit, stop=model.stop)
    pieces = decode_pieces(model.tokenizer, produced, tokens)
    first = next(pieces, "")
    yield prompt
    yield first
    yield from pieces


@dataclass
class Chat:
    """A conversation: `messages` as chat templates take them, and the tokens the decoder holds."""

    model: TextModel
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_sampling(self.model, self.sampling)
        if self.model.tokenizer.chat_template is None:
            raise UsageError("the tokenizer has no chat template", remedy="use `anequant generate`")
        self._choose = make_chooser(self.sampling)

    def reply(self, text: str, limit: int) -> Iterator[str]:
        """Yield the answer to the next turn, piece by piece; it becomes part of the conversation.

        Raises UsageError when the conversation no longer fits the context, InputError when the template does
        not take it.
        """
        decoder, tokenizer = self.model.decoder, self.model.tokenizer
        self.messages.append({"role": "user", "content": text})
        tokens = encode_text(tokenizer, self._render(), add_special_tokens=False)
        if tokens[: len(self._held)] != self._held or len(tokens) == len(self._held):
            decoder.reset()
            self._held = []
        produced: list[int] = []

        def kept(source: Iterator[int]) -> Iterator[int]:
            for token in source:
                produced.append(token)
                yield token

        fresh = tokens[len(self._held) :]
        source = generate_tokens(decoder, fresh, self._choose, limit=limit, stop=self.model.stop)
        answer = []
        for piece in decode_pieces(tokenizer, kept(source)):
            answer.append(piece)
            yield piece
        self._held = (tokens + produced)[: decoder.position]
        self.messages.append({"role": "assistant", "content": "".join(answer)})

    def _render(self) -> str:
        """Write the conversation as the template has it, up to where the answer begins."""
        try:
            text: str = self.model.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            system = self.messages[0]["role"] == "system"
            raise InputError(
                f"the chat template does not take this conversation: {first_line(error)}",
                where=str(self.model.folder),
                remedy="leave out --system" if system else "use `anequant generate`",
            ) from error
        return text


def _check_sampling(model: TextModel, sampling: Sampling) -> None:
    if sampling.temperature and not model.decoder.tells_all_logits:
        raise UsageError(
            "these packages tell their best tokens only, there is nothing to sample from",
            remedy="use temperature 0, or lower the checkpoint without --argmax",
        )
