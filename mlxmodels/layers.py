"""Layers that more than one family shares exactly."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxmodels.errors import ModelError

Activation = Callable[[mx.array], mx.array]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
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


def softcap(logits: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(logits / cap), computed in float32; unchanged if there is no cap."""
    if not cap:
        return logits
    return (mx.tanh(logits.astype(mx.float32) / cap) * cap).astype(logits.dtype)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, half-split, on the first `dims` channels; the rest pass through.

    Args:
        x: Queries or keys, [B, H, T, D].
        positions: Of x[:, :, 0], one number or one per row, [B], the others following; or of every
            token, [B, T]. Negative on padding.
    """

    dims: int
    base: float
    scale: float = 1.0
    """Multiplies positions: 1 / factor for linear scaling."""

    def __call__(self, x: mx.array, positions: int | mx.array = 0) -> mx.array:
        if isinstance(positions, mx.array) and positions.ndim == 2:
            exponents = mx.arange(0, self.dims, 2) / self.dims
            frequencies = self.scale / self.base**exponents
            angles = positions.astype(mx.float32)[..., None] * frequencies  # [B, T, dims / 2]
            return rotate(x, angles[:, None])
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=self.scale, offset=positions
        )


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
        weight = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x, weight, self.eps).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, dims: int, width: int, act: Activation, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims, width, bias=bias)
        self.up_proj = nn.Linear(dims, width, bias=bias)
        self.down_proj = nn.Linear(width, dims, bias=bias)
        self._act = act

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))
