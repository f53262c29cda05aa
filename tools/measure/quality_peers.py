"""The peers of the quality tables by name: those of anequant, and those that need text to calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.comparison import peers


@dataclass(frozen=True)
class TextPeer:
    """`run` takes a float model folder, the folder to write and token windows [n, length] to calibrate on;
    `count_bits` counts those of all projections, codes with their codebooks and scales."""

    run: Callable[[Path, Path, Tensor], None]
    count_bits: Callable[[ModelSpec], int]


def _without_windows(peer: peers.Peer) -> TextPeer:
    return TextPeer(
        lambda model, output, windows: peer.run(model, output),
        lambda spec: peers.projection_bits(peer, spec),
    )


def _sensitive(run: Callable[[Path, Path, Tensor], None], plain: Callable[..., None]) -> TextPeer:
    """K-means that is weighted, which stores what the plain one does."""
    unweighted = next(peer for peer in peers.PEERS if peer.run is plain)
    return TextPeer(run, lambda spec: peers.projection_bits(unweighted, spec))


PEERS: dict[str, TextPeer] = {
    **{peer.name: _without_windows(peer) for peer in peers.PEERS},
    "coremltools sensitive k-means": _sensitive(peers.coremltools_sensitive_kmeans, peers.coremltools_kmeans),
    "coreai-opt sensitive k-means": _sensitive(peers.coreai_sensitive_kmeans, peers.coreai_kmeans_tables),
}


def count_bits_per_weight(peer: TextPeer, spec: ModelSpec) -> float:
    return peer.count_bits(spec) / (spec.num_layers * spec.layer_weights)
