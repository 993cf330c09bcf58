"""The host gives the values a text means, counts what moves, and leaves legal kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from .. import metal_host
from ..tolerance import assert_close
from .planted.kernels import CHUNKED_SCAN, Floats, Scan, Small, float64, run
from .planted.legal import LEGAL, Legal, X

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
EVERY_SCHEDULE = ("forward", "reverse", "random")
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 37, 40), (1, 64, 32), (3, 15, 65)], ids=str)
def test_the_scan_matches_a_float64_loop_under_every_schedule(
    shape: tuple[int, int, int], dtype: mx.Dtype
) -> None:
    scan = Scan.random(*shape, dtype)
    with metal_host.install(schedules=EVERY_SCHEDULE) as host:
        y, h_last = scan.dispatch()
    want, want_last = scan.reference()
    assert_close("y", y, want)
    assert_close("h_last", h_last, want_last)
    assert [report.schedule for report in host.reports] == list(EVERY_SCHEDULE)


def test_the_fast_mode_gives_the_values_of_the_checked_one() -> None:
    scan = Scan.random(2, 100, 200, mx.float32, segments=8)
    (checked, _), _ = run(scan)
    (fast, _), _ = run(scan, check=False)
    assert_close("y", fast, float64(checked))


def test_traffic_is_counted_to_the_byte() -> None:
    B, N, E, segments = 2, 37, 40, 4
    _, host = run(Scan.random(B, N, E, mx.float16, segments))
    report = host.reports[0]
    sequence, state = B * N * E * 2, B * E * 4
    groups, tiles = 2 * B, -(-N // (segments * 4))
    assert report.bytes_read | {"x_shape": 0} == {
        "x": sequence,
        "a": sequence,
        "h0": state,
        "y": 0,
        "h_last": 0,
        "x_shape": 0,
    }
    assert report.bytes_written["y"] == sequence
    assert report.bytes_written["h_last"] == state
    assert report.threadgroups == groups
    assert report.barriers == groups * (2 + 2 * tiles)
    assert report.threadgroup_bytes == (2 * segments + 1) * 32 * 4


@pytest.mark.parametrize("legal", LEGAL, ids=lambda legal: legal.name.replace(" ", "-"))
def test_what_is_legal_is_not_reported_and_has_its_values(legal: Legal) -> None:
    (y, *_), host = run(legal.kernel, schedules=EVERY_SCHEDULE)
    assert not host.findings, [str(finding) for finding in host.findings]
    np.testing.assert_allclose(float64(y), legal.want(X), rtol=1e-6)


def test_a_barrier_that_is_not_needed_is_not_missed() -> None:
    scan = Scan.random(2, 37, 40)
    source = CHUNKED_SCAN.replace(f"{BARRIER}  // for the first tile; its own barrier would do", "")
    assert source != CHUNKED_SCAN
    with metal_host.install():
        y, _ = scan.dispatch(source, "fewer_barriers")
    assert_close("y", y, scan.reference()[0])


def test_one_value_stored_by_many_is_a_note() -> None:
    _, host = run(next(legal.kernel for legal in LEGAL if legal.name == "all store one value"))
    assert {note.kind for note in host.notes} == {"same-value"}
    assert host.notes[0].text == "t[0] = 2.0f;"


def test_matrices_multiply_in_every_type() -> None:
    source = """
        const uint lane = thread_index_in_simdgroup;
        threadgroup A left[64];
        for (uint i = lane; i < 64; i += 32) { left[i] = a[i]; }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_matrix<A, 8, 8> m, n;
        simdgroup_matrix<float, 8, 8> sum = simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_load(m, left, 8);
        simdgroup_load(n, b, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, m, n, sum);
        sum.thread_elements()[0] *= 2.0f;
        sum.thread_elements()[1] *= 2.0f;
        simdgroup_store(sum, y, 8);
    """
    for dtype in DTYPES:
        mx.random.seed(0)
        a, b = mx.random.normal((8, 8)).astype(dtype), mx.random.normal((8, 8)).astype(dtype)
        kernel = Small(
            source,
            inputs=lambda a=a, b=b: [a, b],
            input_names=["a", "b"],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            template=[("A", dtype)],
        )
        (y,), host = run(kernel)
        assert not host.findings
        want = 2 * (float64(a) @ float64(b).T + np.eye(8))
        np.testing.assert_allclose(float64(y).reshape(8, 8), want, rtol=1e-5, atol=1e-5)


SIMD = [
    ("simd_sum(v)", lambda v: np.full(32, v.sum())),
    ("simd_min(v) + simd_max(v)", lambda v: np.full(32, v.min() + v.max())),
    ("simd_product(v * 0.1f)", lambda v: np.full(32, (v * 0.1).prod())),
    ("simd_prefix_inclusive_sum(v)", lambda v: v.cumsum()),
    ("simd_prefix_exclusive_sum(v)", lambda v: v.cumsum() - v),
    ("simd_broadcast(v, 7)", lambda v: np.full(32, v[7])),
    ("simd_broadcast_first(v)", lambda v: np.full(32, v[0])),
    ("simd_shuffle(v, 31 - lane)", lambda v: v[::-1]),
    ("simd_shuffle_xor(v, 5)", lambda v: v[np.arange(32) ^ 5]),
    ("simd_shuffle_up(v, 3)", lambda v: np.concatenate([v[:3], v[:-3]])),
    ("simd_shuffle_rotate_down(v, 3)", lambda v: np.roll(v, -3)),
    ("simd_shuffle_rotate_up(v, 3)", lambda v: np.roll(v, 3)),
    ("simd_shuffle_and_fill_down(v, -v, 2)", lambda v: np.concatenate([v[2:], -v[:2]])),
    ("simd_shuffle_and_fill_up(v, -v, 2)", lambda v: np.concatenate([-v[-2:], v[:-2]])),
    ("float(simd_or(1u << (lane % 4)))", lambda v: np.full(32, 15.0)),
    ("float(simd_and(lane | 8))", lambda v: np.full(32, 8.0)),
    ("float((ulong)simd_ballot(lane % 2 == 0) & 0xff)", lambda v: np.full(32, 0x55)),
    ("float(simd_any(lane == 3)) + float(simd_all(lane < 3))", lambda v: np.full(32, 1.0)),
    ("float(simd_is_first())", lambda v: np.arange(32) == 0),
    ("quad_sum(v)", lambda v: np.repeat(v.reshape(8, 4).sum(1), 4)),
    ("quad_shuffle_xor(v, 1)", lambda v: v[np.arange(32) ^ 1]),
    ("quad_broadcast(v, 2)", lambda v: np.repeat(v.reshape(8, 4)[:, 2], 4)),
    ("simd_sum(float2(v, -v)).y", lambda v: np.full(32, -v.sum())),
    ("float(simd_sum(half(v)))", lambda v: np.full(32, v.sum())),
    ("float(simd_max(bfloat(v)))", lambda v: np.full(32, v.max())),
    ("float(simd_shuffle((ulong)lane, 9))", lambda v: np.full(32, 9.0)),
]


def test_simdgroup_operations() -> None:
    lines = [f"y[{k * 32} + lane] = {expression};" for k, (expression, _) in enumerate(SIMD)]
    source = "uint lane = thread_index_in_simdgroup;\nfloat v = x[lane];\n" + "\n".join(lines)
    v = np.arange(32.0) / 8 + 1  # exact in every type
    kernel = Small(
        source,
        inputs=lambda: [mx.array(v.astype(np.float32))],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(len(SIMD), 32)],
    )
    (y,), host = run(kernel, schedules=EVERY_SCHEDULE)
    assert not host.findings, [str(finding) for finding in host.findings]
    for row, (expression, want) in zip(float64(y), SIMD, strict=True):
        np.testing.assert_allclose(row, want(v), rtol=1e-6, err_msg=expression)


MATH: list[tuple[str, Callable[[Floats], Floats]]] = [
    ("metal::exp(v)", np.exp),
    ("fast::exp2(v) + precise::log2(v)", lambda v: np.exp2(v) + np.log2(v)),
    ("rsqrt(v) * sqrt(v)", np.ones_like),
    ("precise::tanh(v) + metal::sin(v) * cos(v)", lambda v: np.tanh(v) + np.sin(v) * np.cos(v)),
    ("log1p(v)", np.log1p),
    ("pow(v, 1.5f) + atan2(v, 2.0f)", lambda v: v**1.5 + np.arctan2(v, 2)),
    ("fma(v, v, -1.0f)", lambda v: v * v - 1),
    ("clamp(v, 1.5f, 2.5f)", lambda v: np.clip(v, 1.5, 2.5)),
    ("select(v, -v, v > 2.0f)", lambda v: np.where(v > 2, -v, v)),
    (
        "floor(v) + ceil(v) * 0.5f + trunc(v) + rint(v)",
        lambda v: np.floor(v) + np.ceil(v) * 0.5 + np.trunc(v) + np.rint(v),
    ),
    ("max(v, 2.0f) - min(v, 2.0f) + abs(-v) + sign(v)", lambda v: np.abs(v - 2) + v + 1),
    ("dot(float4(v), float4(1.0f, 2.0f, 3.0f, 4.0f))", lambda v: 10 * v),
    ("(float3(v, 1.0f, 2.0f).zyx * 2.0f).z", lambda v: 2 * v),
    ("float(half(v)) + float(bfloat(v))", lambda v: 2 * v),
    ("float(half(v) * half(2.0h)) + float(bfloat(v) * bfloat(0.5f))", lambda v: 2.5 * v),
    ("as_type<float>(as_type<uint>(v) ^ 0x80000000u)", lambda v: -v),
    ("float(popcount(255u) + clz(1u) + ctz(8u))", lambda v: np.full_like(v, 8 + 31 + 3)),
    ("isinf(INFINITY) && isnan(NAN) && isfinite(v) ? v : 0.0f", lambda v: v),
    ("numeric_limits<half>::max() == 65504.0h ? v : 0.0f", lambda v: v),
    ("v * 1e-30f * 1e-12f == 0.0f ? v : 0.0f", lambda v: v),  # a denormal, flushed
    ("float(2.5) + 1 / 2 + v", lambda v: 2.5 + v),
]


def test_math_functions() -> None:
    lines = [f"y[{k * 16} + i] = {expression};" for k, (expression, _) in enumerate(MATH)]
    source = "uint i = thread_position_in_grid.x;\nfloat v = x[i];\n" + "\n".join(lines)
    v = np.arange(16.0) / 8 + 1
    kernel = Small(
        source,
        inputs=lambda: [mx.array(v.astype(np.float32))],
        grid=(16, 1, 1),
        threadgroup=(16, 1, 1),
        output_shapes=[(len(MATH), 16)],
    )
    (y,), _ = run(kernel)
    for row, (expression, want) in zip(float64(y), MATH, strict=True):
        np.testing.assert_allclose(row, want(v), rtol=2e-6, err_msg=expression)


def test_attributes_are_those_of_the_dispatch() -> None:
    names = [
        "thread_position_in_grid.y",
        "thread_position_in_threadgroup.y",
        "threadgroup_position_in_grid.y",
        "threads_per_grid.y",
        "threadgroups_per_grid.y",
        "threads_per_threadgroup.y",
        "dispatch_threads_per_threadgroup.y",
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threads_per_simdgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "thread_index_in_quadgroup",
        "quadgroup_index_in_threadgroup",
    ]
    lines = [f"y[at + {k}] = {name};" for k, name in enumerate(names)]
    source = (
        f"uint at = (thread_position_in_grid.y * 8 + thread_position_in_grid.x) * {len(names)};\n"
    )
    kernel = Small(
        source + "\n".join(lines),
        grid=(8, 10, 1),
        threadgroup=(8, 6, 1),
        output_shapes=[(10, 8, len(names))],
        output_dtypes=[mx.int32],
    )
    (y,), host = run(kernel)
    assert not host.findings
    values = np.array(y)
    # The second threadgroup has the four rows that are left.
    assert values[9, 7].tolist() == [9, 3, 1, 10, 2, 4, 6, 31, 31, 32, 0, 1, 3, 7]
    assert values[5, 7].tolist() == [5, 5, 0, 10, 2, 6, 6, 47, 15, 32, 1, 2, 3, 11]


def test_what_the_library_lacks_is_a_compile_error_with_the_kernels_line() -> None:
    with pytest.raises(metal_host.CompileError, match=r"small\.metal:2.*simd_tangle"):
        run(Small("uint i = thread_position_in_grid.x;\ny[i] = simd_tangle(x[i]);"))


def test_findings_are_raised_when_the_block_ends() -> None:
    with (
        pytest.raises(metal_host.KernelFindings, match="unwritten-output"),
        metal_host.install(),
    ):
        Small("if (thread_position_in_grid.x == 0) { y[0] = x[0]; }").dispatch()


def test_the_real_function_is_back_after_the_block() -> None:
    real = mx.fast.metal_kernel
    with metal_host.install():
        assert mx.fast.metal_kernel is not real
    assert mx.fast.metal_kernel is real


def test_a_kernel_outlives_the_host_it_was_made_under() -> None:
    with metal_host.install():
        kernel: Any = mx.fast.metal_kernel("keep", ["x"], ["y"], "y[0] = x[0] + 1.0f;")
    call: dict[str, Any] = {
        "inputs": [mx.array([1.0])],
        "grid": (1, 1, 1),
        "threadgroup": (1, 1, 1),
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
    }
    if not mx.metal.is_available():
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            kernel(**call)
    with metal_host.install() as host:
        assert kernel(**call)[0].item() == 2.0
    assert len(host.reports) == 2
