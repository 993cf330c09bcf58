"""Values and sizes for the self-checks."""

from collections.abc import Sequence
from math import prod
from typing import Protocol

import mlx.core as mx

from metal.build import FEW_ELEMENTS


class RowVariant(Protocol):
    """A variant of a kernel that may be told of its rows' lengths and resets."""

    @property
    def has_lengths(self) -> bool: ...

    @property
    def has_reset(self) -> bool: ...

    @property
    def has_few_rows(self) -> bool: ...

    @property
    def has_few_tokens(self) -> bool: ...


def rows_and_tokens(variant: RowVariant, tokens: int) -> tuple[int, int]:
    """B and T of a sample: these tokens, or as few as the variant says, and so the rows.

    See build.FEW_ELEMENTS for what hangs on their number.
    """
    has_rows = variant.has_lengths or variant.has_reset
    if variant.has_few_tokens and tokens > 1:
        return 1, FEW_ELEMENTS - 1
    return (FEW_ELEMENTS + 1 if has_rows and not variant.has_few_rows else 3), tokens


def lengths_and_reset(
    variant: RowVariant, B: int, T: int
) -> tuple[mx.array | None, mx.array | None]:
    """Lengths [B] of T and a little less, resets [B, T] now and then; None where it has none."""
    lengths = T - mx.arange(B) % 3 if variant.has_lengths else None
    reset = (mx.arange(B * T) % 5 == 2).reshape(B, T) if variant.has_reset else None
    return lengths, reset


def wave(shape: Sequence[int], dtype: mx.Dtype, frequency: float = 1.0) -> mx.array:
    """Values between -1 and 1, without randomness, so that nobody's seed moves."""
    return mx.sin(frequency * mx.arange(prod(shape))).reshape(shape).astype(dtype)
