"""Kernels that the tests of the Metal host dispatch, and how to dispatch them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ... import metal_host

Floats = npt.NDArray[np.float64]

CHUNKED_SCAN = (Path(__file__).parent / "chunked_scan.metal").read_text()


@dataclass
class Scan:
    """The inputs of one call of the chunked scan."""

    x: mx.array
    a: mx.array
    h0: mx.array
    segments: int = 4

    @classmethod
    def random(
        cls, B: int, N: int, E: int, dtype: mx.Dtype = mx.float32, segments: int = 4
    ) -> Scan:
        mx.random.seed(B + N + E)
        x, a = mx.random.normal((B, N, E)), mx.random.uniform(0.2, 1.0, (B, N, E))
        return cls(x.astype(dtype), a.astype(dtype), mx.random.normal((B, E)), segments)

    def dispatch(self, source: str = CHUNKED_SCAN, name: str = "chunked_scan") -> list[mx.array]:
        B, _, E = self.x.shape
        kernel = mx.fast.metal_kernel(
            name=name,
            input_names=["x", "a", "h0"],
            output_names=["y", "h_last"],
            source=source,
        )
        return kernel(
            inputs=[self.x, self.a, self.h0],
            template=[("T", self.x.dtype), ("E", E), ("SEG", self.segments)],
            grid=((E + 31) // 32 * 32, self.segments, B),
            threadgroup=(32, self.segments, 1),
            output_shapes=[self.x.shape, self.h0.shape],
            output_dtypes=[self.x.dtype, mx.float32],
        )

    def reference(self) -> tuple[Floats, Floats]:
        x, a, h = float64(self.x), float64(self.a), float64(self.h0)
        y = np.zeros_like(x)
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            y[:, t] = h
        return y, h


@dataclass
class Small:
    """A kernel of a few lines: 64 floats in, 64 floats out, unless it says otherwise."""

    source: str
    header: str = ""
    inputs: Callable[[], Sequence[Any]] = lambda: [mx.arange(64, dtype=mx.float32)]
    input_names: Sequence[str] = ("x",)
    output_shapes: Sequence[tuple[int, ...]] = ((64,),)
    output_dtypes: Sequence[mx.Dtype] = (mx.float32,)
    grid: tuple[int, int, int] = (64, 1, 1)
    threadgroup: tuple[int, int, int] = (64, 1, 1)
    template: Sequence[tuple[str, Any]] = ()
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    init_value: float | None = None
    name: str = "small"

    def dispatch(self) -> list[mx.array]:
        kernel = mx.fast.metal_kernel(
            name=self.name,
            input_names=list(self.input_names),
            output_names=[f"y{i}" if i else "y" for i in range(len(self.output_shapes))],
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.ensure_row_contiguous,
            atomic_outputs=self.atomic_outputs,
        )
        return kernel(
            inputs=list(self.inputs()),
            template=list(self.template) or None,
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=list(self.output_shapes),
            output_dtypes=list(self.output_dtypes),
            init_value=self.init_value,
        )


def run(kernel: Small | Scan, **options: Any) -> tuple[list[mx.array], metal_host.Host]:
    """The outputs, and a host whose findings nobody has raised."""
    with metal_host.install(allow_findings=True, **options) as host:
        return kernel.dispatch(), host


def float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)
