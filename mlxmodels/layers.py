"""Layers that more than one family shares exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

from metal import rms_norm_1p
from mlxmodels.errors import ModelError
from mlxmodels.linear import Linear

Activation = Callable[[mx.array], mx.array]


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU's tanh approximation, in float32 and rounded once.

    (1 + tanh(u)) / 2 is computed as sigmoid(2 u), which takes one exponential less than MLX's power
    and tanh and keeps the digits that 1 + tanh(u) loses.
    """
    wide = x.astype(mx.float32)
    double = 2 * math.sqrt(2 / math.pi)
    gate = mx.sigmoid(wide * (double + 0.044715 * double * mx.square(wide)))
    return (wide * gate).astype(x.dtype)


def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0)^2; not compiled, which on a CPU makes it 15 times slower on long inputs."""
    return mx.square(mx.maximum(x, 0))


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.relu,
    "relu2": relu_squared,
    "silu": nn.silu,
    "swish": nn.silu,
}


def activation(name: str) -> Activation:
    """The activation of a Hugging Face config value.

    Raises:
        ModelError: the name is not known.
    """
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ModelError(f"config.json asks for the activation {name!r}; known are {known}.")
    return _ACTIVATIONS[name]


@cache
def gated(act: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    """act(x) * y in one kernel."""

    def product(x: mx.array, y: mx.array) -> mx.array:
        return act(x) * y

    return mx.compile(product, shapeless=True)


def softcap(logits: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(logits / cap), computed in float32; unchanged if there is no cap."""
    return _softcapped(logits, cap) if cap else logits


@partial(mx.compile, shapeless=True)
def _softcapped(logits: mx.array, cap: float) -> mx.array:
    return (mx.tanh(logits.astype(mx.float32) / cap) * cap).astype(logits.dtype)


def embed(embedding: nn.Module, tokens: mx.array | None, norm: nn.Module) -> mx.array:
    """Embeddings of token ids, in the dtype of the model, which a norm's weight always has.

    Scales of the modes mxfp4, mxfp8 and nvfp4 have no dtype to unpack to, and MLX takes bfloat16.
    That holds their values exactly, but the whole model would run in it, or float16 and bfloat16
    meet and it would run in float32.
    """
    assert tokens is not None, "a call without embeddings has tokens"
    x: mx.array = embedding(tokens)
    is_float_mode = getattr(embedding, "mode", "affine") != "affine"
    return x.astype(norm.weight.dtype) if is_float_mode else x


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, half-split, on the first `dims` channels; the rest pass through.

    Args:
        q: Queries, [B, H, T, D].
        k: Keys, [B, Hkv, T, D].
        positions: Of the first token, one number or one per row, [B], the others following; or of
            every token, [B, T]. Negative on padding.
    """

    dims: int
    base: float
    scale: float = 1.0
    """Multiplies positions: 1 / factor for linear scaling."""

    def __call__(
        self, q: mx.array, k: mx.array, positions: int | mx.array = 0
    ) -> tuple[mx.array, mx.array]:
        # Together: off Apple GPUs mx.fast.rope is some 30 operations, whatever it turns.
        both = mx.concatenate([q, k], axis=1)
        if isinstance(positions, mx.array) and positions.ndim == 2:
            exponents = mx.arange(0, self.dims, 2) / self.dims
            frequencies = self.scale / self.base**exponents
            angles = positions.astype(mx.float32)[..., None] * frequencies  # [B, T, dims / 2]
            both = rotate(both, angles[:, None])
        else:
            both = mx.fast.rope(
                both,
                self.dims,
                traditional=False,
                base=self.base,
                scale=self.scale,
                offset=positions,
            )
        heads = q.shape[1]
        return both[:, :heads], both[:, heads:]


def rotate(x: mx.array, angles: mx.array) -> mx.array:
    """Turn the first channels of x [B, H, T, D], half-split, by angles [B, 1, T, dims / 2]."""
    half = angles.shape[-1]
    cos, sin = mx.cos(angles), mx.sin(angles)
    left, right, rest = mx.split(x, [half, 2 * half], axis=-1)
    left, right = left.astype(mx.float32), right.astype(mx.float32)
    turned = mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return mx.concatenate([turned.astype(x.dtype), rest], axis=-1)


class RMSNorm1P(nn.Module):
    """Scales by (1 + weight), which is formed and applied in float32 and rounded once."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm_1p(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, dims: int, width: int, act: Activation, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(dims, width, bias=bias)
        self.up_proj = Linear(dims, width, bias=bias)
        self.down_proj = Linear(width, dims, bias=bias)
        self._gate = gated(act)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._gate(self.gate_proj(x), self.up_proj(x)))
