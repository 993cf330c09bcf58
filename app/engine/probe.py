"""`python -m app.engine.probe`: the device and BLAS that the engine would use, as JSON."""

from __future__ import annotations

import json
import time

from app.engine import blas

_SIZE = 1024


def measure() -> dict[str, object]:
    """Device name, BLAS note, and float32 matrix product speed (x @ W.T, 1024³) in GFLOP/s."""
    backend = blas.preload()
    import mlx.core as mx

    x = mx.random.normal((_SIZE, _SIZE))
    w = mx.random.normal((_SIZE, _SIZE))
    mx.eval(x, w)
    best = float("inf")
    for _ in range(3):  # the first pays for starting threads or compiling
        start = time.perf_counter()
        mx.eval(x @ w.T)
        best = min(best, time.perf_counter() - start)
    gpu = mx.default_device() == mx.Device(mx.DeviceType.gpu)
    return {
        "device": "Apple GPU" if gpu else "CPU",
        "blas": backend.note,
        "speed": f"{2 * _SIZE**3 / best / 1e9:.0f} GFLOP/s float32",
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
