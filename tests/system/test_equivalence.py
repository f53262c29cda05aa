"""Folding and rotation do not change the model: the transformed weights, loaded into a stock transformers
model with an untied head, give the logits of the untouched stock model.

The float64 runs stay below 1e-6 although transformers' RMSNorm rounds to float32 inside (about 2e-7).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anequant.architectures.spec import HEAD_LINEAR, Space
from anequant.calibration.equivalence import EquivalenceProbe
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import VerificationError
from anequant.recipe import Recipe
from anequant.rotation.fold import fold_and_rotate_layer, fold_and_rotate_linear, rotate_embedding
from anequant.rotation.orthogonal import Rotation
from anequant.rotation.rotation_plan import RotationPlan, plan_rotations

State = dict[str, Tensor]
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
LAYER = 1
WRONG = 1e-3

each_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
each_tied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def transformed(checkpoint: Checkpoint, plan: RotationPlan) -> State:
    """What anequant makes of the checkpoint, as the state of a stock model: float64."""
    head, _ = fold_and_rotate_linear(
        HEAD_LINEAR, checkpoint.read(checkpoint.head_name), None, checkpoint.final_gain(), plan, None
    )
    state = {
        EMBEDDING: rotate_embedding(checkpoint.read(EMBEDDING), plan),
        NORM: torch.ones(checkpoint.spec.hidden_size, dtype=torch.float64),
        HEAD: head,
    }
    for layer in range(checkpoint.spec.num_layers):
        turned = fold_and_rotate_layer(checkpoint.spec, checkpoint.layer(layer), plan, layer)
        state.update({f"model.layers.{layer}.{name}": tensor for name, tensor in turned.items()})
    return state


@torch.no_grad()
def logits_of_state(folder: Path, state: State, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.load_state_dict(state, strict=True)
    return torch.cat([model(input_ids=window[None], use_cache=False).logits for window in tokens])


@lru_cache(maxsize=32)
@torch.no_grad()
def stock_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return torch.cat([model(input_ids=window[None], use_cache=False).logits for window in tokens])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


TOKENS = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))


def error_of(folder: Path, state: State) -> float:
    expected = stock_logits(folder, TOKENS, torch.float64)
    return relative_error(logits_of_state(folder, state, TOKENS, torch.float64), expected)


@pytest.fixture(scope="module")
def model(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Path]:
    @cache
    def build(model_type: str, tied: bool) -> Path:
        return make_model(tmp_path_factory.mktemp("model"), model_type, tied)

    return build


@pytest.fixture
def llama(model: Callable[[str, bool], Path]) -> Path:
    """The architecture with a bias on all seven projections, tied."""
    return model("llama", True)


def plan_of(checkpoint: Checkpoint, r1: str = "block-hadamard", r2: str = "hadamard") -> RotationPlan:
    return plan_rotations(checkpoint.spec, Recipe(r1=r1, r2=r2, seed=3))


@each_type
@each_tied
@pytest.mark.parametrize("r1", ["none", "hadamard", "block-hadamard", "random"])
@pytest.mark.parametrize("r2", ["none", "hadamard"])
def test_logits_stay_in_float64(
    model: Callable[[str, bool], Path], model_type: str, tied: bool, r1: str, r2: str
) -> None:
    folder = model(model_type, tied)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.tied is tied
    assert error_of(folder, transformed(checkpoint, plan_of(checkpoint, r1, r2))) <= 1e-6


def test_the_rotations_do_turn_the_weights(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plain = transformed(checkpoint, plan_of(checkpoint, "none", "none"))
    for r1, r2, turned in (
        ("hadamard", "none", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("none", "hadamard", {"v", "o"}),
    ):
        state = transformed(checkpoint, plan_of(checkpoint, r1, r2))
        changed = {
            name.split(".")[-2].removesuffix("_proj")
            for name in state
            if "_proj.weight" in name and relative_error(state[name], plain[name]) > 0.1
        }
        assert changed == turned
        outer = {name for name in (EMBEDDING, HEAD) if relative_error(state[name], plain[name]) > 0.1}
        assert outer == ({EMBEDDING, HEAD} if r1 != "none" else set())


def test_folded_gains_are_ones(model: Callable[[str, bool], Path]) -> None:
    checkpoint = open_checkpoint(model("qwen3", False))
    state = transformed(checkpoint, plan_of(checkpoint))
    folded = [name for name in state if "norm" in name and "q_norm" not in name and "k_norm" not in name]
    assert len(folded) == 2 * 3 + 1
    assert all(torch.equal(state[name], torch.ones_like(state[name])) for name in folded)
    kept = f"model.layers.{LAYER}.self_attn.q_norm.weight"
    assert torch.equal(state[kept], checkpoint.read(kept).double())


# --- what must not go unnoticed -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_bias_that_is_not_turned_shows(llama: Path, name: str) -> None:
    checkpoint = open_checkpoint(llama)
    state = transformed(checkpoint, plan_of(checkpoint))
    bias = f"model.layers.{LAYER}.{name}.bias"
    state[bias] = checkpoint.read(bias).double()
    assert error_of(llama, state) > WRONG


@pytest.mark.parametrize("name", ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"])
def test_a_bias_that_is_dropped_shows(llama: Path, name: str) -> None:
    checkpoint = open_checkpoint(llama)
    state = transformed(checkpoint, plan_of(checkpoint))
    bias = f"model.layers.{LAYER}.{name.replace('attn', 'self_attn')}_proj.bias"
    state[bias] = torch.zeros_like(state[bias])
    assert error_of(llama, state) > WRONG


@pytest.mark.parametrize("r1", ["hadamard", "block-hadamard", "random"])
def test_a_tied_head_rotated_twice_shows(llama: Path, r1: str) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_of(checkpoint, r1)
    state = transformed(checkpoint, plan)
    state[HEAD] = rotate_embedding(state[HEAD], plan)
    assert error_of(llama, state) > WRONG


def test_a_head_folded_from_the_rotated_embedding_shows(llama: Path) -> None:
    """The final gain belongs to the unrotated axis: E R diag(g) is not E diag(g) R."""
    checkpoint = open_checkpoint(llama)
    state = transformed(checkpoint, plan_of(checkpoint))
    state[HEAD] = state[EMBEDDING] * checkpoint.final_gain().double()
    assert error_of(llama, state) > WRONG


def test_a_head_left_tied_to_the_rotated_embedding_shows(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    state = transformed(checkpoint, plan_of(checkpoint))
    state[HEAD] = state[EMBEDDING]
    assert error_of(llama, state) > WRONG


def test_a_forgotten_final_gain_shows(model: Callable[[str, bool], Path]) -> None:
    folder = model("qwen2", False)
    checkpoint = open_checkpoint(folder)
    plan = plan_of(checkpoint)
    state = transformed(checkpoint, plan)
    state[HEAD] = rotate_embedding(checkpoint.read(HEAD), plan)
    assert error_of(folder, state) > WRONG


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_gain_applied_twice_shows(llama: Path, norm: str) -> None:
    checkpoint = open_checkpoint(llama)
    state = transformed(checkpoint, plan_of(checkpoint))
    name = f"model.layers.{LAYER}.{norm}.weight"
    state[name] = checkpoint.read(name).double()
    assert error_of(llama, state) > WRONG


def test_a_centred_embedding_shows(llama: Path) -> None:
    """RMSNorm does not subtract the mean, so nothing else may."""
    checkpoint = open_checkpoint(llama)
    plan = plan_of(checkpoint)
    state = transformed(checkpoint, plan)
    table = checkpoint.read(EMBEDDING).double()
    state[EMBEDDING] = rotate_embedding(table - table.mean(dim=1, keepdim=True), plan)
    assert error_of(llama, state) > WRONG


@pytest.mark.parametrize("space", [Space.RESIDUAL, Space.VALUE])
def test_a_matrix_in_place_of_its_transpose_shows(llama: Path, space: Space) -> None:
    """Writers of the space (embedding, o, down; v) turned by R^T in place of R, readers left as they are."""
    checkpoint = open_checkpoint(llama)
    plan = plan_of(checkpoint, "random")
    state = transformed(checkpoint, plan)
    if space is Space.RESIDUAL:
        assert plan.r1 is not None
        state[EMBEDDING] = plan.r1.apply_transposed(checkpoint.read(EMBEDDING).double())
    else:
        name = f"model.layers.{LAYER}.self_attn.v_proj.weight"
        rotation = plan.r2[LAYER]
        gain = checkpoint.read(f"model.layers.{LAYER}.input_layernorm.weight").double()
        weight = plan_r1(plan).apply(checkpoint.read(name).double() * gain)
        heads = weight.T.unflatten(-1, (-1, rotation.size))
        assert torch.allclose(rotation.apply(heads).flatten(-2).T, state[name])
        state[name] = rotation.apply_transposed(heads).flatten(-2).T
    assert error_of(llama, state) > WRONG


def plan_r1(plan: RotationPlan) -> Rotation:
    assert plan.r1 is not None
    return plan.r1


# --- trained models in float32 ------------------------------------------------------------------------

PARAGRAPH = (
    "The keeper of the lighthouse had counted ships for thirty years, and in all that time he had never "
    "once been asked how many there were. He kept the numbers in a row of brown notebooks, a page for each "
    "week, with the weather at the top and the wind beneath it. When the storm took the roof off the store "
    "in the spring, he carried the notebooks down to the kitchen before he thought of the flour, and his "
    'sister, who had come to stay until the baby was born, laughed at him and said, "You would save the '
    'ships that have gone by and let the bread drown." '
)


def windows(folder: Path, text: str, count: int = 8, length: int = 512) -> Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    step = (len(ids) - length) // (count - 1)
    return torch.tensor([ids[i * step : i * step + length] for i in range(count)])


def check_float32(folder: Path, tokens: Tensor, r1: str) -> None:
    checkpoint = open_checkpoint(folder)
    state = {
        name: tensor.float() for name, tensor in transformed(checkpoint, plan_of(checkpoint, r1)).items()
    }
    expected = stock_logits(folder, tokens, torch.float32)
    actual = logits_of_state(folder, state, tokens, torch.float32)
    assert expected.shape == (8, 512, checkpoint.spec.vocab_size)
    assert relative_error(actual, expected) <= 1e-5
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def tiny_windows(tiny_qwen2: Path) -> Tensor:
    return windows(tiny_qwen2, PARAGRAPH * 30)


@pytest.fixture(scope="module")
def large_windows(qwen2_29m: Path, eval_text: Path) -> Tensor:
    return windows(qwen2_29m, eval_text.read_text(encoding="utf-8")[:100_000])


@pytest.mark.parametrize("r1", ["hadamard", "block-hadamard", "random"])
def test_tiny_qwen2_keeps_every_token_in_float32(tiny_qwen2: Path, tiny_windows: Tensor, r1: str) -> None:
    check_float32(tiny_qwen2, tiny_windows, r1)


@pytest.mark.parametrize("r1", ["hadamard", "block-hadamard"])
def test_qwen2_29m_keeps_every_token_in_float32(qwen2_29m: Path, large_windows: Tensor, r1: str) -> None:
    check_float32(qwen2_29m, large_windows, r1)


# --- the check that every run makes -------------------------------------------------------------------


def probe(checkpoint: Checkpoint, plan: RotationPlan, spoil: Callable[[int, State], None]) -> float:
    """Walk the probe through the model as the pipeline does; `spoil` may change a turned layer."""
    state = EquivalenceProbe(checkpoint, plan)
    for layer in range(checkpoint.spec.num_layers):
        original = checkpoint.layer(layer)
        turned = fold_and_rotate_layer(checkpoint.spec, original, plan, layer)
        spoil(layer, turned)
        state.layer(layer, original, turned)
    gain = checkpoint.final_gain()
    state.final_norm(gain)
    for rows in checkpoint.read(checkpoint.head_name).split(40):
        turned_rows, _ = fold_and_rotate_linear(HEAD_LINEAR, rows, None, gain, plan, None)
        state.head(rows, turned_rows)
    return state.relative_error()


@each_type
@each_tied
def test_the_probe_agrees(model: Callable[[str, bool], Path], model_type: str, tied: bool) -> None:
    checkpoint = open_checkpoint(model(model_type, tied))
    error = probe(checkpoint, plan_of(checkpoint), lambda layer, turned: None)
    assert 0 < error <= 1e-6


SPOILED = [
    (model_type, f"{part}.{kind}")
    for model_type in ("llama", "qwen3")
    for part, kinds in {
        "input_layernorm": ("weight",),
        "post_attention_layernorm": ("weight",),
        "self_attn.q_norm": ("weight",) if model_type == "qwen3" else (),
        "self_attn.k_norm": ("weight",) if model_type == "qwen3" else (),
        "self_attn.q_proj": ("weight", "bias"),
        "self_attn.k_proj": ("weight", "bias"),
        "self_attn.v_proj": ("weight", "bias"),
        "self_attn.o_proj": ("weight", "bias"),
        "mlp.gate_proj": ("weight", "bias") if model_type == "llama" else ("weight",),
        "mlp.up_proj": ("weight", "bias") if model_type == "llama" else ("weight",),
        "mlp.down_proj": ("weight", "bias") if model_type == "llama" else ("weight",),
    }.items()
    for kind in kinds
]


@pytest.mark.parametrize(("model_type", "name"), SPOILED)
def test_the_probe_notices_one_spoiled_tensor(
    model: Callable[[str, bool], Path], model_type: str, name: str
) -> None:
    checkpoint = open_checkpoint(model(model_type, False))
    assert {tensor for kind, tensor in SPOILED if kind == model_type} == set(checkpoint.spec.layer_tensors())

    def spoil(layer: int, turned: State) -> None:
        if layer == LAYER:
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(turned[name].shape, generator=generator, dtype=torch.float64)
            turned[name] = turned[name] * (1 + 0.01 * noise)

    with pytest.raises(VerificationError, match="changed the logits") as caught:
        probe(checkpoint, plan_of(checkpoint), spoil)
    assert caught.value.exit_code == 6


def test_the_probe_notices_a_wrong_head(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_of(checkpoint)
    state = EquivalenceProbe(checkpoint, plan)
    for layer in range(checkpoint.spec.num_layers):
        original = checkpoint.layer(layer)
        state.layer(layer, original, fold_and_rotate_layer(checkpoint.spec, original, plan, layer))
    state.final_norm(checkpoint.final_gain())
    table = checkpoint.read(EMBEDDING)
    state.head(table, rotate_embedding(table, plan))
    with pytest.raises(VerificationError, match="changed the logits"):
        state.relative_error()
