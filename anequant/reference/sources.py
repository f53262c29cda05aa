"""Files of tokens or text as they were meant: prose, or JSON rows of token ids, texts or conversations.

What is none of these is refused by what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import UsageError, first_line, quote
from anequant.strict import parse_json, read_plain

Ids = list[Any]
"""What a row says are its token ids, without padding; whether they are is not looked at."""
Message = dict[str, Any]

IDS, MASK, TEXT, MESSAGES, PROMPT, COMPLETION = (
    "input_ids",
    "attention_mask",
    "text",
    "messages",
    "prompt",
    "completion",
)
COLUMNS = (IDS, MESSAGES, TEXT, PROMPT)
"""What a row is read by; the first one that it has counts."""

ROLES = ("user", "assistant")
"""Who says a row's prompt and its completion."""

LINES = (".jsonl", ".ndjson")
JSON = (".json", *LINES)
REFUSED = {
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc"), "a table of columns"),
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx"), "a table of cells"),
    **dict.fromkeys((".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".tgz", ".7z"), "a compressed file"),
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), "a pickle, which is never opened"),
    **dict.fromkeys((".bin", ".npy", ".npz", ".safetensors", ".gguf"), "a file of arrays"),
    **dict.fromkeys((".pdf", ".docx", ".html", ".htm"), "a document with markup"),
}
REMEDY = 'name a text file, or a .json or .jsonl of rows such as {"input_ids": [...]} or {"text": "..."}'


@dataclass(frozen=True)
class Texts:
    """One text after the other: prose, or conversations that a chat template has yet to write out."""

    path: Path
    parts: tuple[str | list[Message], ...]

    def write_out(self, tokenizer: Any) -> str:
        """Return all of them as one text. Texts have an empty line between them, conversations what the
        template has.

        Raises UsageError for conversations that the tokenizer has no template for, or that it refuses.
        """
        texts = [part if isinstance(part, str) else self._render(tokenizer, part) for part in self.parts]
        return ("" if any(isinstance(part, list) for part in self.parts) else "\n\n").join(texts)

    @property
    def conversations(self) -> list[list[Message]]:
        """Those of the parts that are conversations."""
        return [part for part in self.parts if not isinstance(part, str)]

    def write_conversations(self, tokenizer: Any) -> list[str]:
        """Return the text of every conversation; raises as `write_out`."""
        return [self._render(tokenizer, messages) for messages in self.conversations]

    def _render(self, tokenizer: Any, messages: list[Message]) -> str:
        remedy = 'write the conversations out, as {"text": "..."}'
        if tokenizer.chat_template is None:
            problem = f"'{self.path}' holds conversations, and the tokenizer has no chat template"
            raise UsageError(problem, remedy=remedy)
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            reason = first_line(error)
            number = self.parts.index(messages)
            raise UsageError(
                f"the chat template refuses entry {number} of '{self.path}': {reason}", remedy=remedy
            ) from error
        return text


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises UsageError for anything else."""
    try:
        text = read_plain(path)
        if "\0" in text:
            raise ValueError("it holds NUL, as binary files do")
    except UnicodeDecodeError as error:
        reason = f"byte {error.object[error.start]:#04x} at {error.start} is no UTF-8"
        raise UsageError(f"text file '{path}' cannot be read: {reason}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"text file '{path}' cannot be read: {error}") from error
    return text


def has_rows(path: Path) -> bool:
    """Return whether the name is one of a JSON file."""
    return path.suffix.lower() in JSON


def read_source(path: Path, *, chat: bool = False) -> Texts | list[Ids]:
    """Read what a file holds; with `chat`, prompt and completion of a row are a user's and the answer to it.

    Raises UsageError for what cannot be read or is not understood.
    """
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder", remedy=REMEDY)
    kind = REFUSED.get(path.suffix.lower())
    if kind is not None:
        raise UsageError(f"'{path}' is {kind} by its name", remedy=REMEDY)
    content = read_text(path)
    if has_rows(path):
        return _read_rows(path, content, chat)
    if _is_json(content):
        raise UsageError(f"'{path}' holds JSON", remedy="end its name in .json or .jsonl")
    return Texts(path, (content,))


def read_source_text(path: Path, tokenizer: Any) -> str:
    """Return the text of a file of prose, texts or conversations.

    Raises UsageError as `read_source`, and for token ids.
    """
    source = read_source(path)
    if isinstance(source, list):
        raise UsageError(
            f"'{path}' holds token ids where a text is due", remedy='write rows of {"text": "..."}'
        )
    return source.write_out(tokenizer)


def _read_rows(path: Path, content: str, chat: bool) -> Texts | list[Ids]:
    rows = _parse_rows(path, content)
    entries = [_entry(row, f"entry {number} of '{path}'", chat) for number, row in enumerate(rows)]
    ids = [entry.content for entry in entries if entry.kind == IDS]
    if len({entry.kind for entry in entries}) > 1:
        first = next(number for number, entry in enumerate(entries) if entry.kind != entries[0].kind)
        raise UsageError(
            f"entry {first} of '{path}' is of another kind than entry 0",
            remedy=f"keep {entries[0].kind} and {entries[first].kind} in files of their own",
        )
    return ids if len(ids) == len(entries) else Texts(path, tuple(entry.content for entry in entries))


@dataclass(frozen=True)
class _Entry:
    kind: str
    content: Any


def _entry(row: Any, where: str, chat: bool) -> _Entry:
    """Return what a row is read as; raises UsageError for a row that is nothing known."""
    if isinstance(row, list):
        conversation = bool(row) and all(isinstance(part, dict) for part in row)
        row = {MESSAGES if conversation else IDS: row}
    elif isinstance(row, str):
        row = {TEXT: row}
    key = next((key for key in COLUMNS if key in row), None) if isinstance(row, dict) else None
    if key == IDS and isinstance(row[IDS], list):
        return _Entry(IDS, row[IDS] if row.get(MASK) is None else _strip_padding(row[IDS], row[MASK], where))
    if key == MESSAGES and _is_conversation(row[MESSAGES]):
        return _Entry(MESSAGES, row[MESSAGES])
    if key == TEXT and isinstance(row[TEXT], str):
        return _Entry(TEXT, row[TEXT])
    if key == PROMPT:
        parts = [row[PROMPT]] if row.get(COMPLETION) is None else [row[PROMPT], row[COMPLETION]]
        if all(isinstance(part, str) for part in parts):
            said = [{"role": role, "content": part} for role, part in zip(ROLES, parts, strict=False)]
            return _Entry(MESSAGES, said) if chat else _Entry(TEXT, "".join(parts))
        if all(_is_conversation(part) for part in parts):
            return _Entry(MESSAGES, [message for part in parts for message in part])
    keys = f": it has the keys {quote(', '.join(map(str, row)))}" if isinstance(row, dict) else ""
    raise UsageError(f"{where} is no list of token ids, no text and no conversation{keys}", remedy=REMEDY)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict) and all(isinstance(part.get(key), str) for key in ("role", "content"))
            for part in value
        )
    )


def _strip_padding(ids: Ids, mask: Any, where: str) -> Ids:
    """Return the ids that the mask keeps: all from the first 1 to the last."""
    bits = mask if isinstance(mask, list) else []
    if len(bits) != len(ids) or not all(type(bit) is int and bit in (0, 1) for bit in bits):
        raise UsageError(f"the {MASK} of {where} is no list of {len(ids)} zeros and ones")
    if 1 not in mask:
        return []
    begin, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[begin:end]:
        raise UsageError(
            f"the {MASK} of {where} leaves out tokens between others",
            remedy="give each stretch a row of its own; only padding before or after a row is left out",
        )
    return ids[begin:end]


def _parse_rows(path: Path, content: str) -> Sequence[Any]:
    """Return the rows of a JSON file: a list of them, columns, or one row in each line, whatever its name
    says."""
    by_lines = path.suffix.lower() in LINES
    first, second = (_lines, parse_json) if by_lines else (parse_json, _lines)
    try:
        return _rows(path, first(content), by_lines)
    except ValueError as error:
        problem = error
    try:
        return _rows(path, second(content), not by_lines)
    except ValueError:
        raise UsageError(f"'{path}' is not JSON: {problem}") from problem


def _lines(content: str) -> list[Any]:
    rows = []
    for number, line in enumerate(content.split("\n")):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number + 1}: {error}") from error
    if not rows:
        raise ValueError("it is empty")
    return rows


def _rows(path: Path, value: Any, by_lines: bool) -> Sequence[Any]:
    rows = value if by_lines or not isinstance(value, dict) else _columns(path, value)
    if not isinstance(rows, list):
        raise UsageError(f"'{path}' holds no list of {IDS}, texts or conversations", remedy=REMEDY)
    return rows


def _columns(path: Path, table: dict[str, Any]) -> Sequence[Any] | None:
    """Return the rows of an object that holds columns, or is the only row; None when it is neither."""
    key = next((key for key in COLUMNS if key in table), None)
    if key is None:
        return None
    if not isinstance(table[key], list) or not all(isinstance(part, list | str) for part in table[key]):
        return [table]
    used = {name: table[name] for name in (*COLUMNS, MASK, COMPLETION) if table.get(name) is not None}
    for name, column in used.items():
        if not isinstance(column, list) or len(column) != len(table[key]):
            raise UsageError(f"'{path}' has {len(table[key])} rows of {key}, and not as many of {name}")
    return [dict(zip(used, row, strict=True)) for row in zip(*used.values(), strict=True)]


def _is_json(content: str) -> bool:
    """Return whether a file without such a name holds a list of lists or objects, or an object, or one in its
    first line."""
    begin = content.lstrip()
    if begin[:1] not in ("[", "{"):
        return False
    for part in (begin.split("\n", 1)[0], begin):
        try:
            value = parse_json(part)
        except ValueError:
            continue
        if isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(x, list | dict) for x in value)
        ):
            return True
    return False
