"""What more than one family shares exactly: activations and rotary embeddings."""

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


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, half-split, on the first `dims` channels; the rest pass through.

    Args:
        x: Queries or keys, [B, H, T, D].
        offset: Position of x[:, :, 0], one number or one per row, [B]; negative on padding.
    """

    dims: int
    base: float
    scale: float = 1.0
    """Multiplies positions: 1 / factor for linear scaling."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=self.scale, offset=offset
        )
