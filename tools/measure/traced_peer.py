"""A decoder stack as people trace it to Core ML today, in torch: the peer of `bench_lower.py`."""

from __future__ import annotations

import torch
from random_checkpoint import (
    BIASED,
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LINEARS,
    QUERY_WIDTH,
    THETA,
)
from torch import Tensor, nn
from torch.nn import functional


def conv(name: str) -> nn.Conv2d:
    rows, columns = LINEARS[name]
    layer = nn.Conv2d(columns, rows, 1, bias=name in BIASED)
    layer.weight.data = torch.empty_like(layer.weight).normal_(std=0.02).half().float()
    return layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1, HIDDEN, 1, 1).mul(0.1).add(1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        normed = functional.layer_norm(torch.cat((rows, -rows), dim=-1), (2 * HIDDEN,), eps=EPS)
        return normed[..., :HIDDEN].permute(0, 3, 1, 2) * self.gain


class DecoderLayer(nn.Module):
    """Decoder layer `index` of `layers`; the cache holds keys at that row and values `layers` further."""

    def __init__(self, index: int, layers: int) -> None:
        super().__init__()
        self.index, self.value_index = index, layers + index
        self.attention_norm, self.mlp_norm = Norm(), Norm()
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = map(conv, LINEARS)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, start: Tensor, cache: Tensor
    ) -> Tensor:
        query = rotate(self.q(x).view(1, HEADS, 1, HEAD_DIM), cos, sin) * HEAD_DIM**-0.5
        key = rotate(self.k(x).view(1, KV_HEADS, 1, HEAD_DIM), cos, sin)
        row, value_row = self.index, self.value_index
        cache[row : row + 1, :, start : start + 1, :] = key
        cache[value_row : value_row + 1, :, start : start + 1, :] = self.v(x).view(key.shape)
        keys, values = cache[row : row + 1], cache[value_row : value_row + 1]
        grouped = query.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        weights = torch.softmax(grouped @ keys.transpose(-1, -2) + mask, dim=-1)
        attended: Tensor = self.o((weights @ values).reshape(1, QUERY_WIDTH, 1, 1))
        return attended

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), *shared)
        normed = self.mlp_norm(x)
        output: Tensor = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return output


class Stack(nn.Module):
    """All layers on (1, C, 1, 1), the cache a buffer, one new position a call."""

    cos: Tensor
    sin: Tensor
    kv_cache: Tensor

    def __init__(self, layers: int, context: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(index, layers) for index in range(layers))
        self.final_norm = Norm()
        frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.arange(context)[:, None] * frequencies.repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("kv_cache", torch.zeros(2 * layers, KV_HEADS, context, HEAD_DIM))

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, start: Tensor) -> Tensor:
        x = hidden.permute(0, 2, 1).unsqueeze(2)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, start, self.kv_cache)
        normed: Tensor = self.final_norm(x)
        return normed.squeeze(2).permute(0, 2, 1)
