"""Contract of the norm of Gemma, Gemma 2 and RecurrentGemma."""

import mlx.core as mx

from metal.arguments import FLOATS
from metal.dispatch import Backend
from metal.norm_kernel import RMS_NORM_1P


def rms_norm_1p(
    x: mx.array, weight: mx.array, eps: float, *, backend: Backend = "auto"
) -> mx.array:
    """Root mean square norm y = x * rsqrt(mean(x^2) + eps) * (1 + weight) over the last axis.

    Args:
        x: Input, [..., D], float32, float16 or bfloat16; D >= 1.
        weight: [D], any floating dtype; the scale is 1 + weight.
        eps: Added to the mean square.
        backend: As in `linear_scan`.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a shape or dtype is not as above, or the backend is "metal" and x is empty.
        RuntimeError: as `linear_scan`.

    Formed and applied in float32, rounded once. Source: RMSNorm, arXiv:1910.07467, with the scale
    as in Gemma's reference implementation.
    """
    if x.ndim < 1 or x.shape[-1] < 1 or x.dtype not in FLOATS:
        raise ValueError(
            f"[rms_norm_1p] expected x [..., D] with D >= 1 of float32, float16 or bfloat16, "
            f"got {x.shape} of {x.dtype}."
        )
    if weight.shape != x.shape[-1:] or weight.dtype not in FLOATS:
        raise ValueError(
            f"[rms_norm_1p] expected weight {x.shape[-1:]} floating, "
            f"got {weight.shape} of {weight.dtype}."
        )
    y: mx.array = RMS_NORM_1P(backend, x, weight, eps)
    return y
