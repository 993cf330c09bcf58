"""How the kernel of the norm is launched: grid, variant, gradient, self-check case."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Op, Unsupported
from metal.sample import wave

LANES = 32  # of a simdgroup; a threadgroup is whole ones
THREADS = 256  # of a threadgroup, at most
# Values a thread keeps between the sum and the scaling: rows of up to THREADS * KEPT = 5120 are
# read once. Of the models with this norm, Gemma 2 27B has the longest, 4608.
KEPT = 20


@dataclass(frozen=True)
class Variant:
    """What the text of the norm's kernel depends on: not the length of a row."""

    dtype: mx.Dtype
    weight: mx.Dtype


def rms_norm_1p_variant(x: mx.array, weight: mx.array, eps: float) -> Variant:
    if x.size == 0:
        raise Unsupported(f"[rms_norm_1p] the Metal kernel takes no empty x, got {x.shape}.")
    return Variant(x.dtype, weight.dtype)


def rms_norm_1p(variant: Variant, x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`metal.rms_norm_1p` by the kernel; its gradient is the reference's."""

    y: mx.array = _function(variant, eps)(x, weight)
    return y


@cache
def _function(variant: Variant, eps: float) -> Callable[..., Any]:
    def by_reference(x: mx.array, weight: mx.array) -> mx.array:
        return reference.rms_norm_1p(x, weight, eps)

    return build.differentiable(
        partial(_launch, variant, eps), partial(build.gradients_of, by_reference)
    )


def rms_norm_1p_sample(variant: Variant) -> tuple[Any, ...]:
    D = THREADS * KEPT + 40  # past the kept values
    eps = 0.1  # large enough to count
    return wave((2, D), variant.dtype), wave((D,), variant.weight, 3), eps


def _launch(variant: Variant, eps: float, x: mx.array, weight: mx.array) -> mx.array:
    D = x.shape[-1]
    threads = min(THREADS, -(-D // LANES) * LANES)
    kernel = build.kernel("rms_norm_1p", ("x", "weight", "eps"), ("y",))
    outputs = kernel(
        inputs=[x, weight, eps],
        template=[("T", variant.dtype), ("KEPT", KEPT)],
        grid=(threads, x.size // D, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[variant.dtype],
    )
    return outputs[0]


RMS_NORM_1P = Op(
    "rms_norm_1p", reference.rms_norm_1p, rms_norm_1p, rms_norm_1p_variant, rms_norm_1p_sample
)
