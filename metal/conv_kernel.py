"""How the kernel of the convolution is launched: grid, variant, gradient, self-check case."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Op, Unsupported
from metal.sample import lengths_and_reset, rows_and_tokens, wave

LANES = 32  # of a simdgroup, which shares what it reads of the resets
THREADS = 256  # of a threadgroup, at most
TOKENS = 16  # consecutive tokens of one thread; K - 1 more are read
WIDEST = 8  # K: a window and its taps live in registers


@dataclass(frozen=True)
class Variant:
    """What the text of the convolution's kernel depends on."""

    dtype: mx.Dtype
    weight: mx.Dtype
    bias: mx.Dtype
    K: int
    tokens: int
    """Of one thread: 1 in the decode step."""
    has_lengths: bool
    has_reset: bool
    has_few_rows: bool
    """Fewer than 8, where there are lengths or resets; see build.FEW_ELEMENTS."""
    has_few_tokens: bool
    """As above, of all rows together."""


def causal_conv1d_variant(
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> Variant:
    K = weight.shape[1]
    if not 2 <= K <= WIDEST:  # at K = 1 there is no state, and an empty array has no buffer
        raise Unsupported(f"[causal_conv1d] the Metal kernel takes K from 2 to {WIDEST}, got {K}.")
    if u.size == 0:
        raise Unsupported(f"[causal_conv1d] the Metal kernel takes no empty u, got {u.shape}.")
    tokens = 1 if u.shape[1] == 1 else TOKENS
    B, T, _ = u.shape
    given = (lengths is not None, reset is not None)
    few = (any(given) and B < build.FEW_ELEMENTS, any(given) and B * T < build.FEW_ELEMENTS)
    return Variant(u.dtype, weight.dtype, bias.dtype, K, tokens, *given, *few)


def causal_conv1d(
    variant: Variant,
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`metal.causal_conv1d` by the kernel; its gradient is the reference's."""
    y, tail = _function(variant)(u, weight, bias, state, lengths, reset)
    return y, tail


@cache
def _function(variant: Variant) -> Callable[..., Any]:
    return build.differentiable(
        partial(_launch, variant), partial(build.gradients_of, reference.causal_conv1d)
    )


def causal_conv1d_sample(variant: Variant) -> tuple[Any, ...]:
    tokens = 1 if variant.tokens == 1 else 2 * TOKENS + 3
    (B, T), E = rows_and_tokens(variant, tokens), THREADS + 40
    return (
        wave((B, T, E), variant.dtype, 1),
        wave((E, variant.K), variant.weight, 2),
        wave((E,), variant.bias, 3),
        wave((B, variant.K - 1, E), variant.dtype, 4),
        *lengths_and_reset(variant, B, T),
    )


def _launch(
    variant: Variant,
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> list[mx.array]:
    B, T, E = u.shape
    width = -(-E // LANES) * LANES
    kernel = build.kernel(
        "causal_conv1d",
        ("u", "weight", "bias", "state", "lengths", "reset"),
        ("y", "next_state"),
    )
    return kernel(
        inputs=[
            *(u, weight, bias, state),
            build.optional(lengths, mx.int32),
            build.optional(reset, mx.bool_),
        ],
        template=[
            ("T", variant.dtype),
            ("K", variant.K),
            ("L", variant.tokens),
            ("HAS_LENGTHS", variant.has_lengths),
            ("HAS_RESET", variant.has_reset),
        ],
        grid=(width, -(-T // variant.tokens), B),
        threadgroup=(min(THREADS, width), 1, 1),
        output_shapes=[u.shape, state.shape],
        output_dtypes=[variant.dtype, variant.dtype],
    )


CAUSAL_CONV1D = Op(
    "causal_conv1d",
    *(reference.causal_conv1d, causal_conv1d, causal_conv1d_variant, causal_conv1d_sample),
)
