"""What a model does while it runs, beside its weights: online rotations, rounded activations and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from anequant.architectures.spec import ModelSpec, layer_prefix
from anequant.errors import UsageError
from anequant.quantization.activations import ActivationFormat
from anequant.recipe import Recipe
from anequant.rotation.orthogonal import Rotation
from anequant.rotation.rotation_plan import make_online_rotation


@dataclass(frozen=True)
class Online:
    """R3 rotates q and k after RoPE, R4 rotates down's input; None where nothing does.

    activations  how inputs are rounded, by the linear's full name; the others stay float
    prefix       first positions that stay in float throughout: activations, keys and values
    kv_bits      of the cache; 16 keeps it float
    """

    r3: Rotation | None = None
    r4: Rotation | None = None
    activations: Mapping[str, ActivationFormat] = field(default_factory=dict)
    prefix: int = 0
    kv_bits: int = 16

    @property
    def active(self) -> bool:
        """Whether the model differs from its weights in stock transformers."""
        return bool(self.r3 or self.r4 or self.activations or self.kv_bits < 16)

    @property
    def rotations(self) -> Online:
        """The rotations alone: the float model that rounding starts from."""
        return Online(self.r3, self.r4)

    def with_scales(self, scales: Mapping[str, float]) -> Online:
        """Return the same with static scales by the linear's full name; what is not named stays dynamic."""
        formats = self.activations.items()
        return replace(
            self, activations={name: replace(own, scale=scales.get(name)) for name, own in formats}
        )


NOTHING = Online()


def plan_online(spec: ModelSpec, recipe: Recipe) -> Online:
    """Plan what a recipe makes the model do while it runs, static scales still missing.

    Raises UsageError for an override of an unknown projection, and what `make_online_rotation` raises.
    """
    bits = {linear.name: recipe.activation_bits for linear in spec.architecture.linears}
    short = {name.rpartition(".")[2]: name for name in bits}
    for name, width in recipe.activation_exceptions.items():
        if name not in short:
            raise UsageError(
                f"activation_overrides names '{name}'", remedy=f"the projections are {', '.join(short)}"
            )
        bits[short[name]] = width
    formats = {
        name: ActivationFormat(width, recipe.activation_symmetric, recipe.activation_clip)
        for name, width in bits.items()
        if width < 16
    }
    return Online(
        r3=make_online_rotation(spec.head_dim, recipe.r3, spec.head_dim),
        r4=make_online_rotation(spec.intermediate_size, recipe.r4, recipe.r4_block),
        activations={
            layer_prefix(layer) + name: format_
            for layer in range(spec.num_layers)
            for name, format_ in formats.items()
        },
        prefix=recipe.activation_prefix,
        kv_bits=recipe.kv_bits,
    )
