"""lm-evaluation-harness on our decoders, against likelihoods taken from stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantized
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from anequant.errors import UnsupportedError, UsageError
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.runtime.continue_text import TextModel, open_text_model
from anequant.runtime.transformers_backend import TransformersModel

harness = pytest.importorskip(
    "anequant.evaluation.harness", reason="needs lm-eval: pip install 'anequant[eval]'"
)
likelihood = harness.likelihood

CONTEXT = 48
STORY = "the old man walked slowly down the road to the sea and looked at the boats. " * 7
PAIRS = [
    ("The man went to the", " door"),
    ("She was", " not at all surprised by it"),
    ("In the", " morning "),
    ("", "Once upon a time"),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> Path:
    return quantize_model(tiny_qwen2, "w4-nearest").folder


@pytest.fixture(scope="module", params=["transformers", "interpreter"])
def model(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> TextModel:
    """Both hold CONTEXT tokens; the bundled model itself would hold 2048."""
    if request.param == "transformers":
        opened = open_text_model(checkpoint, "transformers")
        assert isinstance(opened.decoder, TransformersModel)
        opened.decoder.context = CONTEXT
        return opened
    folder = tmp_path_factory.mktemp("packages") / "out"
    lower(LowerRequest(checkpoint, LowerOptions(context=CONTEXT, batch=8)), folder)
    return open_text_model(folder, "interpreter")


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def log_probabilities(stock: Any, before: list[int], wanted: list[int]) -> tuple[Tensor, bool]:
    """log p of each wanted token, and whether all are the best: one pass of stock transformers."""
    log_p = stock(torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    chosen = log_p[torch.arange(len(wanted)), wanted]
    return chosen, bool((log_p.argmax(-1) == torch.tensor(wanted)).all())


def tolerance(model: TextModel) -> float:
    """Packages compute in float16."""
    return 1e-5 if isinstance(model.decoder, TransformersModel) else 5e-3


def adapter_of(model: TextModel) -> Any:
    return harness.HarnessModel(model.decoder, model.tokenizer, 8189, model.stop)


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_likelihoods_are_transformers(model: TextModel, stock: Any) -> None:
    ours = adapter_of(model).loglikelihood([Request(*pair) for pair in PAIRS])
    for (total, greedy), (context, continuation) in zip(ours, PAIRS, strict=True):
        before = model.tokenizer(context.rstrip())["input_ids"] if context else [8189]
        whole = model.tokenizer(context + continuation)["input_ids"]
        expected, expected_greedy = log_probabilities(
            stock, before, whole[len(before) :] if context else whole
        )
        assert total == pytest.approx(float(expected.sum()), rel=tolerance(model))
        assert greedy == expected_greedy


def test_a_context_too_long_loses_its_beginning(model: TextModel, stock: Any) -> None:
    tokens = model.tokenizer(STORY)["input_ids"][: CONTEXT + 20]
    expected, _ = log_probabilities(stock, tokens[-CONTEXT - 1 : -5], tokens[-5:])
    total, _ = likelihood(model.decoder, tokens[:-5], tokens[-5:])
    assert total == pytest.approx(float(expected.sum()), rel=tolerance(model))


def test_a_continuation_longer_than_the_context_is_refused(model: TextModel) -> None:
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens, the model holds {CONTEXT}"):
        likelihood(model.decoder, [8189], list(range(CONTEXT + 1)))


def test_greedy_continuations_are_recognised(model: TextModel) -> None:
    context = model.tokenizer("In the morning they")["input_ids"]
    model.decoder.reset()
    best = int(model.decoder.feed(context).argmax())
    assert likelihood(model.decoder, context, [best])[1] is True
    assert likelihood(model.decoder, context, [best + 1])[1] is False


def test_a_long_text_rolls_through_the_context(model: TextModel, stock: Any) -> None:
    """Every token is predicted once; the last window reaches back to fill the context."""
    tokens = model.tokenizer(STORY)["input_ids"]
    whole, rest = divmod(len(tokens), CONTEXT)
    assert whole >= 2 and rest > 0
    expected = 0.0
    for start in range(0, whole * CONTEXT, CONTEXT):
        before = tokens[start - 1] if start else 8189
        expected += float(log_probabilities(stock, [before], tokens[start : start + CONTEXT])[0].sum())
    window = tokens[-CONTEXT - 1 :]
    expected += float(log_probabilities(stock, window[:-rest], window[-rest:])[0].sum())
    (total,) = adapter_of(model).loglikelihood_rolling([Request(STORY)])
    assert total == pytest.approx(expected, rel=tolerance(model))


def test_rolling_windows_are_no_longer_than_memory_allows(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = model.tokenizer(STORY)["input_ids"][:24]
    parts = [([8189], tokens[:16]), (tokens[7:16], tokens[16:])]
    expected = sum(likelihood(model.decoder, *part)[0] for part in parts)
    monkeypatch.setattr(harness, "LONGEST_WINDOW", 16)
    (total,) = adapter_of(model).loglikelihood_rolling([Request(model.tokenizer.decode(tokens))])
    assert total == pytest.approx(expected, rel=1e-6)


class Beginning:
    """The model's tokenizer, which begins every text with a BOS as Llama's does."""

    bos_token, eos_token_id = "<|endoftext|>", 8189

    def __init__(self, tokenizer: Any) -> None:
        single = f"{self.bos_token} $A"
        backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
        backend.post_processor = TemplateProcessing(single=single, special_tokens=[(self.bos_token, 8189)])
        self.whole = PreTrainedTokenizerFast(tokenizer_object=backend)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.whole(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def test_a_bos_that_the_tokenizer_gives_is_before_every_text_once(model: TextModel, stock: Any) -> None:
    plain = model.tokenizer
    adapter = harness.HarnessModel(model.decoder, Beginning(plain), 8189, model.stop)
    context, wanted = plain("The man went to the")["input_ids"], plain(" door")["input_ids"]
    expected, _ = log_probabilities(stock, [8189, *context], wanted)
    for text in ("The man went to the", "<|endoftext|>The man went to the"):
        ((total, _),) = adapter.loglikelihood([Request(text, " door")])
        assert total == pytest.approx(float(expected.sum()), rel=tolerance(model))
    whole, _ = log_probabilities(stock, [8189], context + wanted)
    (total,) = adapter.loglikelihood_rolling([Request("The man went to the door")])
    assert total == pytest.approx(float(whole.sum()), rel=tolerance(model))
    model.decoder.reset()
    best = int(model.decoder.feed([8189, *context]).argmax())
    (text,) = adapter.generate_until([Request("The man went to the", {"until": [], "max_gen_toks": 1})])
    assert text == plain.decode([best])


def completion(model: TextModel, prompt: str, **options: Any) -> str:
    (text,) = adapter_of(model).generate_until([Request(prompt, options)])
    return str(text)


def test_generation_is_greedy_and_stops_at_the_asked_for_text(model: TextModel, stock: Any) -> None:
    prompt = model.tokenizer("In the morning", return_tensors="pt")
    tokens = stock.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    whole = completion(model, "In the morning", max_gen_toks=10, until=[])
    assert whole == model.tokenizer.decode(tokens)
    first, second = whole.split()[2:4]
    cut = completion(model, "In the morning", max_gen_toks=10, until=[second, first])
    assert cut == whole[: whole.find(first)] and len(cut) < len(whole)
    assert completion(model, "In the morning", max_gen_toks=10, until=first) == cut


def test_generation_is_as_long_as_asked(model: TextModel) -> None:
    three = completion(model, "In the morning", until=[], max_tokens=3)
    assert three == completion(model, "In the morning", until=[], max_gen_toks=3)
    assert 0 < len(three) < len(completion(model, "In the morning", until=[], max_gen_toks=6))


def test_a_prompt_too_long_loses_its_beginning(model: TextModel) -> None:
    tokens = model.tokenizer(STORY)["input_ids"]
    kept = model.tokenizer.decode(tokens[8 - CONTEXT :])
    assert model.tokenizer(kept)["input_ids"] == tokens[8 - CONTEXT :]
    options = {"max_gen_toks": 8, "until": []}
    assert completion(model, STORY, **options) == completion(model, kept, **options)


def test_prompts_that_lose_their_beginning_are_counted(model: TextModel) -> None:
    adapter = adapter_of(model)
    adapter.loglikelihood([Request("The man", " went"), Request(STORY, " went")])
    assert adapter.shortened == 1
    options = {"max_gen_toks": 2, "until": []}
    adapter.generate_until([Request(STORY, options), Request("The man", options)])
    assert adapter.shortened == 2
    tokens = model.tokenizer(STORY)["input_ids"]
    fits = model.tokenizer.decode(tokens[:CONTEXT])
    adapter.loglikelihood([Request(fits, model.tokenizer.decode(tokens[CONTEXT : CONTEXT + 1]))])
    assert adapter.shortened == 2


def test_generation_that_cannot_be_had_is_refused(model: TextModel) -> None:
    with pytest.raises(UsageError, match=f"wants {CONTEXT} new tokens, the model holds {CONTEXT}"):
        completion(model, "In the morning", until=[], max_gen_toks=CONTEXT)
    with pytest.raises(UnsupportedError, match="samples"):
        completion(model, "In the morning", until=[], max_gen_toks=4, do_sample=True, temperature=0.7)
