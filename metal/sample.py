"""Values for the self-checks."""

from collections.abc import Sequence
from math import prod

import mlx.core as mx


def wave(shape: Sequence[int], dtype: mx.Dtype, frequency: float = 1.0) -> mx.array:
    """Values between -1 and 1, without randomness, so that nobody's seed moves."""
    return mx.sin(frequency * mx.arange(prod(shape))).reshape(shape).astype(dtype)
