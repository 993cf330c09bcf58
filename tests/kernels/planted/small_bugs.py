"""Small kernels with one bug each, what must be reported, and on which line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kernels import Small


@dataclass(frozen=True)
class SmallBug:
    name: str
    kind: str
    kernel: Small
    at: str  # in the reported line


def strided() -> list[Any]:
    return [mx.arange(128, dtype=mx.float32).reshape(64, 2)[:, 0]]


def offset_view() -> list[Any]:
    x = mx.arange(65, dtype=mx.float32)
    mx.eval(x)
    return [x[1:]]


SMALL_BUGS = [
    SmallBug(
        "vector load at an odd address",
        "misaligned",
        Small("""
            uint i = thread_position_in_grid.x;
            if (i < 15) {
              float4 v = *(const device float4*)(x + 4 * i + 1);
              y[i] = v.x + v.w;
            } else { y[i] = 0.0f; }
"""),
        "const device float4*",
    ),
    SmallBug(
        "vector load from a slice that begins in the middle",
        "misaligned",
        Small(
            """
            uint i = thread_position_in_grid.x;
            float4 v = ((const device float4*)x)[i / 4];
            y[i] = v[i % 4];
""",
            inputs=offset_view,
        ),
        "const device float4*",
    ),
    SmallBug(
        "vector store at an odd address",
        "misaligned",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
            if (i == 0) { *(device float2*)(y + 1) = float2(1.0f, 2.0f); }
"""),
        "device float2*",
    ),
    SmallBug(
        "neighbouring lanes without a simdgroup barrier",
        "lane-order",
        Small(
            """
            threadgroup float t[32];
            uint i = thread_position_in_grid.x;
            t[i] = x[i];
            y[i] = t[i ^ 1];
""",
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
        ),
        "y[i] = t[i ^ 1]",
    ),
    SmallBug(
        "lanes of a simdgroup store to one place in some order",
        "lane-order",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = 0.0f;
            y[i / 32 * 32] = x[i];
"""),
        "y[i / 32 * 32] = x[i]",
    ),
    SmallBug(
        "sum inside a branch that half of the lanes take",
        "simd-divergence",
        Small("""
            uint i = thread_position_in_grid.x;
            float s = x[i];
            if (i % 2 == 0) {
              s = simd_sum(s);
            }
            y[i] = simd_max(s);
"""),
        "simd_sum",
    ),
    SmallBug(
        "shuffle from a lane outside the grid",
        "inactive-lane",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = simd_shuffle_xor(x[i], 8);
""",
            grid=(40, 1, 1),
            output_shapes=[(40,)],
        ),
        "simd_shuffle_xor",
    ),
    SmallBug(
        "broadcast from a lane that has returned",
        "inactive-lane",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
            if (i % 32 == 0) return;
            y[i] = simd_broadcast(x[i], 0);
"""),
        "simd_broadcast",
    ),
    SmallBug(
        "shuffle where some lanes are in the other branch",
        "simd-divergence",
        Small("""
            uint i = thread_position_in_grid.x;
            float s;
            if (i % 32 < 16) {
              s = simd_shuffle(x[i], 20);
            } else {
              s = simd_shuffle(x[i], 3);
            }
            y[i] = s;
"""),
        "simd_shuffle(x[i], 20)",
    ),
    SmallBug(
        "two sums on one line, each for half of the lanes",
        "simd-divergence",
        Small("""
            uint i = thread_position_in_grid.x;
            float v = x[i];
            y[i] = i % 32 < 16 ? simd_sum(v) : simd_sum(-v);
            """),
        "simd_sum(v) : simd_sum(-v)",
    ),
    SmallBug(
        "barriers in both branches",
        "barrier-divergence",
        Small(
            """
            uint i = thread_position_in_grid.x;
            if (i < 32) { meet(); } else { meet(); }
            y[i] = x[i];
            """,
            header="inline void meet() { threadgroup_barrier(mem_flags::mem_none); }",
        ),
        "threadgroup_barrier",
    ),
    SmallBug(
        "threadgroups exchange through device memory",
        "race-across-threadgroups",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
            threadgroup_barrier(mem_flags::mem_device);
            y[64 + i] = y[(i + 32) % 64];
""",
            threadgroup=(32, 1, 1),
            output_shapes=[(128,)],
            init_value=0.0,
        ),
        "y[64 + i] = y[(i + 32) % 64]",
    ),
    SmallBug(
        "device memory exchanged with a threadgroup's barrier",
        "race",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            y[64 + i] = y[63 - i];
""",
            output_shapes=[(128,)],
        ),
        "y[64 + i] = y[63 - i]",
    ),
    SmallBug(
        "plain load beside atomic additions",
        "race",
        Small(
            """
            uint i = thread_position_in_grid.x;
            atomic_fetch_add_explicit(&y[0], x[i], memory_order_relaxed);
            if (i == 32) {
              float s = *(device float*)&y[0];
              atomic_store_explicit(&y[1], s, memory_order_relaxed);
            }
""",
            atomic_outputs=True,
            init_value=0.0,
            output_shapes=[(2,)],
        ),
        "*(device float*)&y[0]",
    ),
    SmallBug(
        "atomic addition without an initial value",
        "uninitialised",
        Small(
            "atomic_fetch_add_explicit(&y[0], x[thread_position_in_grid.x], memory_order_relaxed);",
            atomic_outputs=True,
            output_shapes=[(1,)],
        ),
        "atomic_fetch_add_explicit",
    ),
    SmallBug(
        "result by the order of arrival",
        "order-dependent",
        Small("""
            threadgroup atomic_uint next;
            uint i = thread_position_in_grid.x;
            if (i == 0) { atomic_store_explicit(&next, 0u, memory_order_relaxed); }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint at = atomic_fetch_add_explicit(&next, 1u, memory_order_relaxed);
            y[at] = x[i];
"""),
        "",
    ),
    SmallBug(
        "a strided view read as if it were dense",
        "out-of-bounds",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
""",
            inputs=strided,
            ensure_row_contiguous=False,
        ),
        "y[i] = x[i]",
    ),
    SmallBug(
        "an output that is read and not written",
        "unwritten-output",
        Small("""
            uint i = thread_position_in_grid.x;
            y[i % 8 == 0 ? (i + 1) % 64 : i] = x[i] + (y[i] > 0.0f ? 1.0f : 0.0f);
            """),
        "",
    ),
    SmallBug(
        "a null pointer",
        "crash",
        Small("""
            uint i = thread_position_in_grid.x;
            const device float* p = nullptr;
            y[i] = p[i];
"""),
        "y[i] = p[i]",
    ),
    SmallBug(
        "more private memory than a thread has",
        "crash",
        Small("""
            uint i = thread_position_in_grid.x;
            float all[100000];
            for (uint k = 0; k < 100000; ++k) { all[k] = x[k % 64]; }
            y[i] = all[i * 1000];
            """),
        "",
    ),
    SmallBug(
        "too many threads",
        "threads",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
""",
            grid=(2048, 1, 1),
            threadgroup=(2048, 1, 1),
        ),
        "",
    ),
    SmallBug(
        "an input of one element, indexed",
        "out-of-bounds",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = x[i];
""",
            inputs=lambda: [mx.array([1.0])],
        ),
        "y[i] = x[i]",
    ),
    SmallBug(
        "a helper's wrong index, at the helper's line",
        "out-of-bounds",
        Small(
            """
            uint i = thread_position_in_grid.x;
            y[i] = pick(x, i);
""",
            header="""
            template <typename P>
            inline float pick(P p, uint i) {
              return p[i + 1];
            }
""",
        ),
        "return p[i + 1]",
    ),
]
