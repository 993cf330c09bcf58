"""The norm's kernel on the Metal host, and its reference, against float64."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal import faults, norm_kernel, rms_norm_1p

from .. import metal_host
from ..tolerance import assert_close
from .test_linear_scan import Floats, float64, name_of

pytestmark = pytest.mark.usefixtures("apple_gpu")

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
EPS = 1e-6
PAST_KEPT = norm_kernel.THREADS * norm_kernel.KEPT + 300


def inputs(
    shape: tuple[int, ...], dtype: mx.Dtype = F32, weight: mx.Dtype = F32
) -> tuple[mx.array, mx.array]:
    mx.random.seed(sum(shape))
    x = mx.random.normal(shape) * 3
    return x.astype(dtype), (mx.random.normal(shape[-1:]) * 0.3).astype(weight)


def truth(x: mx.array, weight: mx.array, eps: float = EPS) -> Floats:
    wide = float64(x)
    mean = (wide**2).mean(-1, keepdims=True)
    normed: Floats = wide / np.sqrt(mean + eps) * (1 + float64(weight))
    return normed


@pytest.mark.parametrize("backend", ["metal", "reference"])
@pytest.mark.parametrize(
    ("shape", "dtype", "weight"),
    [
        ((1,), F32, F32),
        ((7, 1), F16, BF16),
        ((1, 3), BF16, BF16),
        ((7, 3), F32, F16),
        ((1, 40), F16, F16),
        ((7, 40), BF16, F32),
        ((1, 1, 256), BF16, F16),
        ((7, 1, 256), F32, BF16),
        ((2, 3, 257), F16, F32),
        ((3, 1, 2, 1000), BF16, BF16),
    ],
    ids=str,
)
def test_matches_float64(
    shape: tuple[int, ...], dtype: mx.Dtype, weight: mx.Dtype, backend: Any
) -> None:
    x, w = inputs(shape, dtype, weight)
    with metal_host.install():
        y = rms_norm_1p(x, w, EPS, backend=backend)
    assert y.dtype == dtype
    assert_close("y", y, truth(x, w))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=name_of)
@pytest.mark.parametrize("D", [2560, PAST_KEPT])
@pytest.mark.parametrize("rows", [1, 7])
def test_long_rows_match_float64(rows: int, D: int, dtype: mx.Dtype) -> None:
    x, w = inputs((rows, D), dtype, BF16)
    with metal_host.install(check=False):
        y = rms_norm_1p(x, w, EPS, backend="metal")
    assert_close("y", y, truth(x, w))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=name_of)
def test_it_rounds_once(dtype: mx.Dtype) -> None:
    x, w = inputs((50, 64), dtype, dtype)
    with metal_host.install(check=False):
        y = rms_norm_1p(x, w, EPS, backend="metal")
    rounded = mx.array(truth(x, w).astype(np.float32)).astype(dtype)
    assert (y == rounded).mean().item() > 0.999


def test_a_row_past_what_threads_keep_is_checked_too() -> None:
    x, w = inputs((2, PAST_KEPT), F16, F16)
    with metal_host.install():
        y = rms_norm_1p(x, w, EPS, backend="metal")
    assert_close("y", y, truth(x, w))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=name_of)
def test_zeros_stay_zero(dtype: mx.Dtype) -> None:
    with metal_host.install(schedules=("forward",)):
        y = rms_norm_1p(mx.zeros((2, 40), dtype=dtype), mx.ones((40,)), EPS, backend="metal")
    assert mx.array_equal(y, mx.zeros((2, 40), dtype=dtype))


def test_squares_that_overflow_float16_do_not() -> None:
    x = inputs((3, 300), F32)[0].astype(F16) * 5000
    w = mx.full((300,), 0.5, dtype=F16)
    with metal_host.install(schedules=("forward",)):
        y = rms_norm_1p(x, w, EPS, backend="metal")
    assert_close("y", y, truth(x, w))


def test_eps_counts_where_the_input_is_small() -> None:
    x, w = inputs((2, 40))
    x = x * 1e-3
    with metal_host.install(schedules=("forward",)):
        for eps in (1e-6, 1e-2):
            assert_close(f"eps {eps}", rms_norm_1p(x, w, eps, backend="metal"), truth(x, w, eps))


def test_a_row_is_the_row_alone_bit_for_bit() -> None:
    x, w = inputs((7, 300), BF16, BF16)
    with metal_host.install(check=False):
        y = rms_norm_1p(x, w, EPS, backend="metal")
        again = rms_norm_1p(x, w, EPS, backend="metal")
        alone = [rms_norm_1p(x[b], w, EPS, backend="metal") for b in range(7)]
    assert mx.array_equal(y, again)
    assert mx.array_equal(y, mx.stack(alone))


def test_inputs_that_are_not_contiguous_are_read_as_they_look() -> None:
    x, w = inputs((6, 5, 40))
    strided = mx.contiguous(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    with metal_host.install(schedules=("forward",)):
        y = rms_norm_1p(strided, mx.repeat(w, 2)[::2], EPS, backend="metal")
    assert_close("y", y, truth(x, w))


def test_auto_checks_itself_and_takes_the_kernel() -> None:
    x, w = inputs((2, 1, 40), BF16, F32)
    with metal_host.install(schedules=("forward",)) as host:
        y = rms_norm_1p(x, w, EPS)
        rms_norm_1p(x[..., :30], w[:30], EPS)
    assert len(host.reports) == 3 and not faults()  # its sample, and these two
    assert_close("y", y, rms_norm_1p(x, w, EPS, backend="reference"))


def test_an_empty_input_is_refused_by_name_or_left_to_the_reference() -> None:
    x, w = mx.zeros((0, 4, 40)), mx.zeros((40,))
    with metal_host.install() as host:
        message = "[rms_norm_1p] the Metal kernel takes no empty x, got (0, 4, 40)."
        with pytest.raises(ValueError, match=re.escape(message)):
            rms_norm_1p(x, w, EPS, backend="metal")
        assert rms_norm_1p(x, w, EPS).shape == (0, 4, 40)
    assert not host.reports


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (mx.array(1.0), mx.zeros((1,)), "expected x [..., D] with D >= 1 of float32"),
        (mx.zeros((2, 0)), mx.zeros((0,)), "expected x [..., D] with D >= 1 of float32"),
        (mx.zeros((2, 4), dtype=mx.int32), mx.zeros((4,)), "got (2, 4) of mlx.core.int32."),
        (mx.zeros((2, 4)), mx.zeros((3,)), "expected weight (4,) floating, got (3,)"),
        (
            mx.zeros((2, 4)),
            mx.zeros((4,), dtype=mx.int32),
            "expected weight (4,) floating, got (4,) of mlx.core.int32.",
        ),
    ],
)
def test_refuses_by_name(x: mx.array, weight: mx.array, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("[rms_norm_1p] ") + ".*" + re.escape(message)):
        rms_norm_1p(x, weight, EPS)


@pytest.mark.parametrize("shape", [(2, 1, 40), (2, 5, 40)], ids=str)
def test_gradients_are_the_reference_s(shape: tuple[int, ...]) -> None:
    arguments = inputs(shape)
    of_y = mx.random.normal(shape, key=mx.random.key(1))

    def gradients(backend: Any) -> tuple[mx.array, ...]:
        def loss(x: mx.array, weight: mx.array) -> mx.array:
            return (rms_norm_1p(x, weight, EPS, backend=backend) * of_y).sum()

        result: tuple[mx.array, ...] = mx.grad(loss, argnums=[0, 1])(*arguments)
        mx.eval(result)
        return result

    with metal_host.install(check=False) as host:
        got = gradients("metal")
    assert len(host.reports) == 1
    for name, g, want in zip(("x", "weight"), got, gradients("reference"), strict=True):
        assert mx.abs(want).max().item() > 0
        assert_close(name, g, want)


@pytest.mark.parametrize("D", [40, 2560, norm_kernel.THREADS * norm_kernel.KEPT])
def test_x_and_y_are_moved_once(D: int) -> None:
    x, w = inputs((3, D), BF16, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        rms_norm_1p(x, w, EPS, backend="metal")
    (report,) = host.reports
    assert report.bytes_read["x"] == x.nbytes
    assert report.bytes_written["y"] == x.nbytes
    assert report.bytes_read["weight"] == 3 * w.nbytes  # once a row
    assert report.barriers == report.threadgroups == 3


def test_only_what_is_past_the_kept_values_is_read_again() -> None:
    x, w = inputs((1, PAST_KEPT), F16)
    with metal_host.install(schedules=("forward",)) as host:
        rms_norm_1p(x, w, EPS, backend="metal")
    assert host.reports[0].bytes_read["x"] == x.nbytes + 300 * x.itemsize


def test_no_shape_makes_another_kernel() -> None:
    shapes = [(1,), (3, 40), (2, 1, 2560), (1, PAST_KEPT)]
    assert len({norm_kernel.rms_norm_1p_variant(*inputs(shape), EPS) for shape in shapes}) == 1
