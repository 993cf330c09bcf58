"""What a kernel may do, and the values it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .kernels import Floats, Small


@dataclass(frozen=True)
class Legal:
    name: str
    kernel: Small
    want: Callable[[Floats], Floats]  # of x, the numbers to 63


X = np.arange(64.0)
ROWS = X.reshape(2, 32)

LEGAL = [
    Legal(
        "exchange with a barrier",
        Small("""
            threadgroup float t[64];
            uint i = thread_position_in_grid.x;
            t[i] = x[i];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            y[i] = t[63 - i];
"""),
        lambda x: x[::-1],
    ),
    Legal(
        "exchange inside a simdgroup with its barrier",
        Small("""
            threadgroup float t[64];
            uint i = thread_position_in_grid.x;
            t[i] = x[i];
            simdgroup_barrier(mem_flags::mem_threadgroup);
            y[i] = t[i ^ 1];
"""),
        lambda x: x.reshape(-1, 2)[:, ::-1].reshape(-1),
    ),
    Legal(
        "two buffers and one barrier a round",
        Small("""
            threadgroup float t[2][64];
            uint i = thread_position_in_grid.x;
            float v = x[i];
            for (int r = 0; r < 4; ++r) {
              t[r & 1][i] = v;
              threadgroup_barrier(mem_flags::mem_threadgroup);
              v = t[r & 1][(i + 1) & 63];
            }
            y[i] = v;
"""),
        lambda x: np.roll(x, -4),
    ),
    Legal(
        "device memory with a barrier for it",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
            threadgroup_barrier(mem_flags::mem_device);
            float v = y[63 - i];
            threadgroup_barrier(mem_flags::mem_device);
            y[i] = v;
"""),
        lambda x: x[::-1],
    ),
    Legal(
        "barrier for both memories",
        Small("""
            threadgroup float t[64];
            uint i = thread_position_in_grid.x;
            t[i] = x[i];
            threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
            y[i] = t[63 - i];
"""),
        lambda x: x[::-1],
    ),
    Legal(
        "all store one value",
        Small("""
            threadgroup float t[1];
            uint i = thread_position_in_grid.x;
            t[0] = 2.0f;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            y[i] = x[i] * t[0];
"""),
        lambda x: 2 * x,
    ),
    Legal(
        "a simdgroup returns whole, no barrier after",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = 0.0f;
            if (simdgroup_index_in_threadgroup == 1) return;
            y[i] = simd_sum(x[i]);
"""),
        lambda x: np.concatenate([np.full(32, ROWS[0].sum()), np.zeros(32)]),
    ),
    Legal(
        "lanes return, a sum of those that stay",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = 0.0f;
            if (i % 32 >= 20) return;
            y[i] = simd_sum(x[i]);
"""),
        lambda x: np.where(X % 32 < 20, np.repeat(ROWS[:, :20].sum(1), 32), 0.0),
    ),
    Legal(
        "barrier in a branch that all take",
        Small("""
            threadgroup float t[64];
            uint i = thread_position_in_grid.x;
            t[i] = x[i];
            if (x[0] == 0.0f) { threadgroup_barrier(mem_flags::mem_threadgroup); }
            y[i] = t[63 - i];
"""),
        lambda x: x[::-1],
    ),
    Legal(
        "simdgroups take different branches",
        Small("""
            uint i = thread_position_in_grid.x;
            if (i < 32) { y[i] = simd_sum(x[i]); } else { y[i] = simd_max(x[i]); }
"""),
        lambda x: np.repeat([ROWS[0].sum(), 63.0], 32),
    ),
    Legal(
        "a grid that is no multiple of the threadgroup",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = simd_sum(x[i]) + threads_per_threadgroup.x;
""",
            grid=(40, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(40,)],
        ),
        lambda x: np.concatenate([np.full(32, x[:32].sum() + 32), np.full(8, x[32:40].sum() + 8)]),
    ),
    Legal(
        "shuffle down past the end keeps the lane's own",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = simd_shuffle_down(x[i], 4);
"""),
        lambda x: np.concatenate([ROWS[:, 4:], ROWS[:, 28:]], 1).reshape(-1),
    ),
    Legal(
        "aligned vectors",
        Small("""
            uint i = thread_position_in_grid.x;
            if (i < 16) { ((device float4*)y)[i] = ((const device float4*)x)[i].wzyx * 2.0f; }
"""),
        lambda x: 2 * x.reshape(16, 4)[:, ::-1].reshape(-1),
    ),
    Legal(
        "atomic additions to an initialised output",
        Small(
            """
            uint i = thread_position_in_grid.x;
            atomic_fetch_add_explicit(&y[i % 2], x[i], memory_order_relaxed);
""",
            atomic_outputs=True,
            init_value=0.0,
            output_shapes=[(2,)],
        ),
        lambda x: x.reshape(32, 2).sum(0),
    ),
    Legal(
        "an initialised output that is written in part",
        Small(
            """
            uint i = thread_position_in_grid.x;
            if (i < 3) y[i] = x[i];
""",
            init_value=7.0,
        ),
        lambda x: np.where(X < 3, x, 7.0),
    ),
    Legal(
        "a strided input by its strides",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)];
""",
            ensure_row_contiguous=False,
            inputs=lambda: [mx.arange(64, dtype=mx.float32).reshape(8, 8).T],
        ),
        lambda x: x.reshape(8, 8).T.reshape(-1),
    ),
    Legal(
        "a strided input that MLX copies first",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i] + x_strides[0];
""",
            inputs=lambda: [mx.arange(64, dtype=mx.float32).reshape(8, 8).T],
        ),
        lambda x: x.reshape(8, 8).T.reshape(-1) + 8,
    ),
    Legal(
        "scalars by reference and few numbers as constants",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i] * scale + table[i % 3] + count;
""",
            input_names=["x", "scale", "table", "count"],
            inputs=lambda: [mx.arange(64, dtype=mx.float32), 0.5, mx.array([1.0, 2.0, 3.0]), 4],
        ),
        lambda x: x * 0.5 + X % 3 + 1 + 4,
    ),
    Legal(
        "template integers, booleans and types",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = static_cast<float>(static_cast<K>(x[i] + N)) + (FLAG ? 0.25f : 0.0f);
""",
            template=[("K", mx.int32), ("N", 3), ("FLAG", True)],
        ),
        lambda x: x + 3.25,
    ),
    Legal(
        "division by no more than a rounded constant",
        Small("""
            uint i = thread_position_in_grid.x;
            int k = int(i) / 3;
            y[i] = x[i] + float(k << 2) + float(as_type<uint>(1.0f) >> 23);
"""),
        lambda x: x + X // 3 * 4 + 127,
    ),
]
