"""Text from every backend that runs here, against transformers' own generate."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from running import invoke, succeed
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.errors import InputError, UnsupportedError, UsageError
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.runtime.continue_text import Chat, TextModel, continue_text, open_text_model, read_stop_tokens
from anequant.runtime.generate import decode_pieces, generate_tokens, score
from anequant.runtime.sampling import Sampling
from anequant.targets.coreml.meta import read_meta

PROMPT = "In the morning they went down to the"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
GREEDY = Sampling()


def best(logits: torch.Tensor) -> int:
    return int(logits.argmax())


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> Path:
    return quantize_model(tiny_qwen2, "w4-nearest").folder


@pytest.fixture(scope="module", params=[(1, False), (3, False), (1, True), (3, True)], ids=str)
def packages(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One and three chunks, with logits and with arg-max heads; the context is no power of two."""
    chunks, argmax = request.param
    folder = tmp_path_factory.mktemp("packages") / "out"
    lower(LowerRequest(checkpoint, LowerOptions(context=48, batch=8, chunks=chunks, argmax=argmax)), folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    """What transformers' generate says."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(ids, do_sample=False, max_new_tokens=16)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def test_the_interpreter_says_what_transformers_says(packages: Path, expected: str) -> None:
    model = open_text_model(packages, "interpreter")
    assert "".join(continue_text(model, PROMPT, 16, GREEDY)) == expected


def test_the_transformers_backend_says_so_too(checkpoint: Path, expected: str) -> None:
    model = open_text_model(checkpoint, "transformers")
    pieces = list(continue_text(model, PROMPT, 16, GREEDY))
    assert pieces[0] == PROMPT and len(pieces) > 8
    assert "".join(pieces) == expected


CONTRADICTIONS: list[tuple[str, str, str]] = [
    ("context_length", "48", "64"),
    ("context_length", "48", "'48'"),
    ("batch_size", "8", "16"),
    ("batch_size", "8", "8.5"),
    ("batch_size", "8", "true"),
    ("split_lm_head", "16", "8"),
    ("split_lm_head", "16", "32"),
    ("num_chunks", "[13]", "2"),
    ("model_prefix", "qwen25", "qwen"),
    ("lut_embeddings", "none", "4"),
    ("lut_embeddings", "none", "no"),
    ("lut_ffn", "4", "none"),
    ("lut_ffn", "4", "four"),
    ("lut_lmhead", "none", "8"),
    ("argmax_in_model", "true", "false"),
    ("argmax_in_model", "true", "'false'"),
    ("vocab_size", "8192", "8208"),
    ("vocab_size", "8192", "-1"),
    ("lm_head_chunk_sizes", r"\[512.*\]", "[4096, 4096]"),
    ("lm_head_chunk_sizes", r"\[512.*\]", "512"),
]


@pytest.mark.parametrize(("key", "written", "edited"), CONTRADICTIONS)
def test_what_meta_yaml_says_is_what_the_packages_are(
    packages: Path, tmp_path: Path, key: str, written: str, edited: str
) -> None:
    """No text and no other error: the key and the file are named."""
    content = (packages / "meta.yaml").read_text()
    changed, count = re.subn(f"(?m)^    {key}: {written}$", f"    {key}: {edited}", content)
    if "argmax" not in content and key in ("argmax_in_model", "vocab_size", "lm_head_chunk_sizes"):
        value = {"argmax_in_model": "true" if edited == "false" else edited}.get(key, edited)
        changed, count = f"{content}    {key}: {value}\n", 1
    assert count == 1
    for path in packages.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "meta.yaml").unlink()
    (tmp_path / "meta.yaml").write_text(changed)
    with pytest.raises(InputError, match=key) as caught:
        open_text_model(tmp_path, "interpreter")
    assert "meta.yaml" in str(caught.value) and caught.value.exit_code == 3


def test_parts_of_a_head_need_not_be_equal(packages: Path) -> None:
    """What lm_head_chunk_sizes lists counts, and where it lists nothing, equal parts of vocab_size."""
    read = read_meta(packages)
    assert (read.part_sizes == (512,) * 16) is read.argmax
    assert replace(read, part_sizes=(1000, 24)).head_sizes == [1000, 24]
    assert replace(read, part_sizes=None, vocab_size=8192).head_sizes == [512] * 16


def test_a_full_context_ends_the_text(packages: Path) -> None:
    model = open_text_model(packages, "interpreter")
    prompt = model.tokenizer(PROMPT)["input_ids"]
    produced = list(generate_tokens(model.decoder, prompt, best, limit=500, stop=()))
    assert model.full and len(prompt) + len(produced) == 48 + 1
    with pytest.raises(UsageError, match="49 tokens, the model holds 1 to 48"):
        next(generate_tokens(model.decoder, [1], lambda values: 0, limit=1, stop=()))


def test_arg_max_heads_refuse_to_sample(packages: Path) -> None:
    model = open_text_model(packages, "interpreter")
    if model.decoder.tells_all_logits:
        sampled = ["".join(continue_text(model, PROMPT, 6, Sampling(1.0, seed=seed))) for seed in (1,)]
        model.decoder.reset()
        assert sampled[0] == "".join(continue_text(model, PROMPT, 6, Sampling(1.0, seed=1)))
        return
    with pytest.raises(UsageError, match="best tokens only"):
        next(continue_text(model, PROMPT, 6, Sampling(1.0)))


def test_core_ml_is_refused_elsewhere(packages: Path) -> None:
    with pytest.raises(UnsupportedError, match="macOS only"):
        open_text_model(packages, "coreml")
    result = invoke("generate", packages, "--prompt", "a", "--backend", "coreml")
    assert result.exit_code == 4 and "macOS" in result.stderr


def test_scores_are_the_models_own(checkpoint: Path) -> None:
    model = open_text_model(checkpoint, "transformers")
    tokens = model.tokenizer(PROMPT)["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = whole(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(score(model.decoder, tokens, 3), logits[2:-1], rtol=1e-4, atol=1e-3)


# --- streaming and stopping ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["It cost 5 € – “naïve” 日本語 🙂 and more.", " leading space", "\n\n"])
def test_pieces_make_up_the_text(tiny_qwen2: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokens = tokenizer(text)["input_ids"]
    pieces = list(decode_pieces(tokenizer, iter(tokens)))
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


WORDS = [
    "\u2581",
    "\u2581a",
    "\u2581the",
    "house",
    "'",
    "\u2581'",
    ".",
    "\u2581.",
    "\u2581n",
    "n",
    "'t",
    "t",
    "s",
    "ve",
]
WORDS += ["\u2581\u2581", "\u65e5", "\u2581\u00e9", ",", "!", "\ufffd"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def sentencepiece_bpe() -> Any:
    """Llama 2's: the first word's space is stripped, and what is no piece is a run of bytes."""
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, *WORDS])}
    return LlamaTokenizer(vocab=vocabulary, merges=[])


def unigram() -> Any:
    """Pieces with cleaned up spaces, which takes back a space that came before."""
    pieces = [(piece, -1.0) for piece in [*SPECIAL, *WORDS]]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, **names)


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_bpe, unigram])
def test_pieces_are_what_decoding_everything_says(kind: Callable[[], Any]) -> None:
    """Random tokens: broken characters, special tokens, runs of bytes, spaces before punctuation."""
    tokenizer = kind()
    some = range(len(tokenizer)) if len(tokenizer) < 1000 else [*range(256), *range(256, len(tokenizer), 37)]
    choose = random.Random(0)
    for _ in range(600):
        tokens = choose.choices(some, k=choose.randrange(1, 10))
        pieces = list(decode_pieces(tokenizer, iter(tokens)))
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert "" not in pieces


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_bpe, unigram])
def test_pieces_come_one_by_one_and_go_on_from_the_prompt(kind: Callable[[], Any]) -> None:
    tokenizer = kind()
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the", " the house"))
    whole = tokenizer.decode([*before, *after, *after])
    assert whole == "the the house the house"
    pieces = list(decode_pieces(tokenizer, iter([*after, *after]), before))
    assert "".join(pieces) == " the house the house" and len(pieces) > 2


def test_a_word_after_the_prompt_keeps_its_space(tmp_path: Path) -> None:
    """`generate` with a tokenizer that strips the first word's space when it stands alone."""
    tokenizer = sentencepiece_bpe()
    counter: Any = Counter()
    the = tokenizer.convert_tokens_to_ids("\u2581the")
    counter.feed = lambda tokens: torch.nn.functional.one_hot(torch.tensor(the), len(tokenizer)).float()
    model = TextModel(tmp_path, counter, tokenizer, frozenset())
    assert "".join(continue_text(model, "the house", 2, GREEDY)) == "the house the the"


class Counter:
    """A decoder whose next token is always one more than the last."""

    context, tells_all_logits = 10, True

    def __init__(self) -> None:
        self.fed: list[int] = []

    @property
    def position(self) -> int:
        return len(self.fed)

    def reset(self) -> None:
        self.fed.clear()

    def feed(self, tokens: Any) -> torch.Tensor:
        self.fed += tokens
        return torch.nn.functional.one_hot(torch.tensor(self.fed[-1] + 1), 100).float()


@pytest.mark.parametrize(
    ("limit", "stop", "produced"),
    [(3, (), [6, 7, 8]), (50, (9,), [6, 7, 8]), (50, (), list(range(6, 15))), (1, (6,), [])],
)
def test_where_a_text_ends(limit: int, stop: tuple[int, ...], produced: list[int]) -> None:
    counter: Any = Counter()
    assert list(generate_tokens(counter, [4, 5], best, limit=limit, stop=stop)) == produced
    assert counter.fed == [4, 5, *produced[:8]][: 2 + min(len(produced), limit - 1, 8)]


ABSENT = "absent"


@pytest.mark.parametrize("of_config", [ABSENT, None, 5, [5, 6]], ids=repr)
@pytest.mark.parametrize("of_generation", ["no file", ABSENT, None, 7, [7, 8]], ids=repr)
def test_end_tokens_are_transformers_own(
    tiny_qwen2: Path, tmp_path: Path, of_generation: Any, of_config: Any
) -> None:
    for path in tiny_qwen2.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").unlink()
    ends = {} if of_config is ABSENT else {"eos_token_id": of_config}
    (tmp_path / "config.json").write_text(json.dumps({**config, **ends}))
    if of_generation != "no file":
        ends = {} if of_generation is ABSENT else {"eos_token_id": of_generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert read_stop_tokens(tmp_path) == set(stock if isinstance(stock, list) else [stock]) - {None}


def test_packages_end_where_their_checkpoint_does(checkpoint: Path, packages: Path) -> None:
    assert not (packages / "generation_config.json").exists()
    assert open_text_model(packages, "interpreter").stop == read_stop_tokens(checkpoint) == {8189}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["5", 5.0, True, [], [5, None], {"a": 5}], ids=repr)
def test_end_tokens_that_are_none(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match=f"'eos_token_id' of '{name}' is") as caught:
        read_stop_tokens(tmp_path)
    assert caught.value.exit_code == 3 and caught.value.where == str(tmp_path / name)


# --- chat ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_conversation_is_what_the_template_makes_of_it(chatty: Path) -> None:
    talk = Chat(open_text_model(chatty, "transformers"), GREEDY, [{"role": "system", "content": "Be brief."}])
    first = "".join(talk.reply("Who are you?", 8))
    second = "".join(talk.reply("And then?", 8))

    tokenizer = AutoTokenizer.from_pretrained(chatty)
    model = AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32)
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in (("Who are you?", first), ("And then?", second)):
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text.startswith("[system] Be brief.\n[user] Who are you?\n")
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(output, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    assert talk.messages == messages


def test_chat_needs_a_template(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        Chat(open_text_model(checkpoint, "transformers"), GREEDY)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('Only user and assistant, please') }}", "Only user and assistant, please"),
        ("{% for %}", "Expected"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ ''.__class__.__mro__[1]() }}", "unsafe"),
    ],
)
def test_a_template_that_does_not_take_the_conversation(
    chatty: Path, tmp_path: Path, template: str, told: str
) -> None:
    folder = shutil.copytree(chatty, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    arguments = ["chat", str(folder), "--backend", "transformers", "--max-tokens", "4"]
    for words, remedy in (([], "use `anequant generate`"), (["--system", "Be brief."], "leave out --system")):
        result = invoke(*arguments, *words, typed="Hello there.\n")
        assert result.exit_code == InputError.exit_code, result.stderr
        what, where, do = result.stderr.splitlines()
        assert what.startswith("error: the chat template does not take this conversation: ") and told in what
        assert str(folder) in where and do == f"  do: {remedy}"


def test_input_that_is_no_utf8_is_no_turn(chatty: Path) -> None:
    arguments = ["chat", str(chatty), "--backend", "transformers", "--max-tokens", "4"]
    result = invoke(*arguments, typed=b"\xff\n")
    assert result.exit_code == UsageError.exit_code, result.stderr
    assert result.stderr.startswith("error: the input is not UTF-8")
    talk = Chat(open_text_model(chatty, "transformers"), GREEDY)
    with pytest.raises(UsageError, match="is not UTF-8"):
        next(talk.reply("bad \udcff byte", 4))


def test_an_empty_prompt_is_told_to_say_something(checkpoint: Path) -> None:
    arguments = ["generate", str(checkpoint), "--backend", "transformers", "--prompt", ""]
    result = invoke(*arguments)
    assert result.exit_code == UsageError.exit_code
    assert result.stderr == "error: there is no token to go on from\n  do: write at least a word\n"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", ".", "--prompt", "x", "--temperature", "nan"),
        ("generate", ".", "--prompt", "x", "--top-p", "nan"),
        ("generate", ".", "--prompt", "x", "--seed", str(2**63)),
        ("quantize", ".", "-o", "out", "--calib-seed", str(2**63)),
        ("plan", "--max-memory", "9" * 400 + "GB"),
    ],
)
def test_numbers_without_bounds_are_refused(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == UsageError.exit_code, result.stderr
    assert "rror: " in result.stderr and "Traceback" not in result.stderr


def test_tokens_without_an_embedding_are_refused(checkpoint: Path, packages: Path) -> None:
    """Core ML would take any number, and say nothing."""
    rows = 8192
    for model in (open_text_model(checkpoint, "transformers"), open_text_model(packages, "interpreter")):
        model.decoder.feed([rows - 1])
        for token in (rows, -1):
            with pytest.raises(InputError, match=f"gives token {token}, the model knows {rows}"):
                model.decoder.feed([token])


def test_chat_reads_turns_until_the_input_ends(chatty: Path) -> None:
    arguments = ["chat", str(chatty), "--backend", "transformers", "--max-tokens", "4"]
    result = succeed(*arguments, typed="Hello there.\n\nAnd you?\n")
    assert result.stdout.count("\n") >= 2 and result.stderr == ""
    talk = Chat(open_text_model(chatty, "transformers"), GREEDY)
    answers = ["".join(talk.reply(turn, 4)) for turn in ("Hello there.", "And you?")]
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
