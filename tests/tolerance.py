"""How close is close: one table for every numeric test, measured and then given some room."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# RMS of the error over RMS of the truth. Floors measured on CPU: 8e-7, 2.1e-4, 1.7e-3. A state kept
# in the activation dtype fails at T = 63 already (9e-3 in bfloat16).
RMS = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 5e-3}

# Largest error over RMS of the truth, for single outliers that an RMS hides.
PEAK = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}

# Largest logit difference over the standard deviation of the logits. Floor measured: 1.2e-5.
LOGITS = 1e-4

Array = mx.array | npt.NDArray[np.floating]


def assert_close(name: str, got: mx.array, want: Array) -> None:
    """Compare with a truth in float64 or in got's dtype; the bound follows got's dtype."""
    actual, truth = _float64(got), _float64(want)
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert np.isfinite(actual).all(), f"{name}: {np.count_nonzero(~np.isfinite(actual))} not finite"
    if actual.size == 0:
        return
    scale = max(float(np.sqrt(np.mean(truth**2))), 1e-30)
    error = np.abs(actual - truth)
    rms, peak = float(np.sqrt(np.mean(error**2))) / scale, float(error.max()) / scale
    limit, peak_limit = RMS[got.dtype], PEAK[got.dtype]
    assert rms <= limit and peak <= peak_limit, (
        f"{name}: error RMS {rms:.2e} (limit {limit:.0e}), peak {peak:.2e} (limit {peak_limit:.0e})"
    )


def assert_logits_close(name: str, got: mx.array, want: mx.array) -> None:
    """Compare float32 logits with the truth's."""
    actual, truth = _float64(got), _float64(want)
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert np.isfinite(actual).all(), f"{name}: not finite"
    error = float(np.abs(actual - truth).max() / truth.std())
    assert error <= LOGITS, f"{name}: worst logit off by {error:.2e} standard deviations"


def _float64(x: Array) -> npt.NDArray[np.float64]:
    if isinstance(x, mx.array):
        x = np.array(x.astype(mx.float32))
    return x.astype(np.float64)
