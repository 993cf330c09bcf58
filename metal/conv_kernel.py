"""How the kernel of the convolution is launched: grid, variant, gradient, self-check case."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Unsupported
from metal.sample import wave

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
    given = (lengths is not None, reset is not None)
    return Variant(u.dtype, weight.dtype, bias.dtype, K, tokens, *given)


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

    def forward(*arrays: mx.array) -> Any:
        return tuple(_launch(variant, arrays, lengths, reset))

    def through_reference(u: mx.array, weight: mx.array, bias: mx.array, state: mx.array) -> Any:
        return reference.causal_conv1d(u, weight, bias, state, lengths, reset)

    def backward(primals: Sequence[mx.array], cotangents: Any) -> list[mx.array]:
        return mx.vjp(through_reference, list(primals), list(cotangents))[1]

    y, tail = build.differentiable(forward, backward, (u, weight, bias, state))
    return y, tail


def causal_conv1d_sample(variant: Variant) -> tuple[Any, ...]:
    B, E = 3, 40
    T = 1 if variant.tokens == 1 else 2 * TOKENS + 3
    return (
        wave((B, T, E), variant.dtype, 1),
        wave((E, variant.K), variant.weight, 2),
        wave((E,), variant.bias, 3),
        wave((B, variant.K - 1, E), variant.dtype, 4),
        mx.array([T, 0, T - 1]) if variant.has_lengths else None,
        (mx.arange(B * T) % 5 == 2).reshape(B, T) if variant.has_reset else None,
    )


def _launch(
    variant: Variant,
    arrays: Sequence[mx.array],
    lengths: mx.array | None,
    reset: mx.array | None,
) -> list[mx.array]:
    u, state = arrays[0], arrays[3]
    B, T, E = u.shape
    width = -(-E // LANES) * LANES
    kernel = build.kernel(
        "causal_conv1d",
        ("u", "weight", "bias", "state", "lengths", "reset"),
        ("y", "next_state"),
    )
    return kernel(
        inputs=[
            *arrays,
            build.absent(mx.int32) if lengths is None else lengths.astype(mx.int32),
            build.absent(mx.bool_) if reset is None else reset,
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
