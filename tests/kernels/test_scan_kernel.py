"""The recurrence's kernels on the Metal host: against float64 loops, and what must hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal import block_rg_lru, linear_scan, rg_lru, scan_kernel

from .. import metal_host
from ..tolerance import assert_close
from .test_linear_scan import (
    float64,
    gate_inputs,
    name_of,
    reset_mask,
    rg_lru_loop,
    scan_inputs,
    scan_loop,
)

pytestmark = pytest.mark.usefixtures("apple_gpu")

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16

# Pairwise over B, T, E, dtype, initial state, resets. Fewer than 8 elements arrive in Metal's
# constant memory, T <= 8 has one segment per channel, T > 64 with few channels sixteen.
CASES = [
    ((1, 1, 5), F32, False, False),
    ((1, 1, 100), F16, True, True),
    ((3, 1, 32), BF16, True, False),
    ((2, 1, 100), F32, True, True),
    ((1, 2, 3), F16, True, False),
    ((2, 2, 32), F32, False, True),
    ((3, 2, 100), BF16, True, True),
    ((1, 8, 33), F32, True, True),
    ((2, 9, 31), F16, False, True),
    ((1, 63, 32), BF16, False, True),
    ((2, 63, 100), F32, True, False),
    ((3, 64, 32), F32, True, True),
    ((1, 64, 100), F16, False, False),
    ((1, 65, 32), F32, False, True),
    ((2, 65, 100), BF16, True, False),
    ((3, 65, 5), F16, True, True),
    ((1, 300, 40), F32, True, True),
]


def state_of(shape: tuple[int, ...], has_h0: bool, has_reset: bool) -> tuple[Any, Any]:
    B, T, E = shape
    return (
        mx.random.normal((B, E)) if has_h0 else None,
        reset_mask(B, T) if has_reset else None,
    )


def or_zeros(shape: tuple[int, ...], h0: Any, reset: Any) -> tuple[Any, Any]:
    B, T, E = shape
    return (
        np.zeros((B, E)) if h0 is None else float64(h0),
        np.zeros((B, T), dtype=bool) if reset is None else np.array(reset),
    )


def block_inputs(E: int, heads: int, dtype: mx.Dtype = F32) -> list[mx.array]:
    D = E // heads
    spread = D**-0.5
    return [
        (mx.random.normal(shape) * spread).astype(dtype)
        for _ in range(2)
        for shape in ((heads, D, D), (heads, D))
    ]


def block_gate(x: mx.array, weight: mx.array, bias: mx.array) -> np.ndarray[Any, Any]:
    wide, w = float64(x), float64(weight)
    heads, D, _ = w.shape
    gate = np.einsum("bthi,hij->bthj", wide.reshape(*wide.shape[:2], heads, D), w)
    return (gate + float64(bias)).reshape(wide.shape)


@pytest.mark.parametrize(("shape", "dtype", "has_h0", "has_reset"), CASES, ids=name_of)
def test_linear_scan_matches_float64(
    shape: tuple[int, ...], dtype: mx.Dtype, has_h0: bool, has_reset: bool
) -> None:
    x, a, _ = scan_inputs(shape, dtype)
    h0, reset = state_of(shape, has_h0, has_reset)
    with metal_host.install():
        y, h_last = linear_scan(x, a, h0, reset=reset, backend="metal")
    start, starts = or_zeros(shape, h0, reset)
    want_y, want_h = scan_loop(float64(x), float64(a), start, reset=starts)
    assert y.dtype == dtype and h_last.dtype == F32
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


@pytest.mark.parametrize(("shape", "dtype", "has_h0", "has_reset"), CASES, ids=name_of)
def test_rg_lru_matches_float64(
    shape: tuple[int, ...], dtype: mx.Dtype, has_h0: bool, has_reset: bool
) -> None:
    x, gx, ga, param = gate_inputs(shape, dtype)
    param = param.astype(dtype)
    h0, reset = state_of(shape, has_h0, has_reset)
    with metal_host.install():
        y, h_last = rg_lru(x, gx, ga, param, h0, reset=reset, backend="metal")
    start, starts = or_zeros(shape, h0, reset)
    want_y, want_h = rg_lru_loop(*(float64(v) for v in (x, gx, ga, param)), start, starts)
    assert y.dtype == dtype and h_last.dtype == F32
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


@pytest.mark.parametrize(("shape", "dtype", "has_h0", "has_reset"), CASES, ids=name_of)
def test_block_rg_lru_matches_float64(
    shape: tuple[int, ...], dtype: mx.Dtype, has_h0: bool, has_reset: bool
) -> None:
    x, _, _, param = gate_inputs(shape, dtype)
    heads = 4 if shape[2] % 4 == 0 else 1
    weights = block_inputs(shape[2], heads, dtype)
    h0, reset = state_of(shape, has_h0, has_reset)
    with metal_host.install():
        y, h_last = block_rg_lru(x, *weights, param, h0, reset=reset, backend="metal")
    start, starts = or_zeros(shape, h0, reset)
    gates = block_gate(x, *weights[:2]), block_gate(x, *weights[2:])
    want_y, want_h = rg_lru_loop(float64(x), *gates, float64(param), start, starts)
    assert y.dtype == dtype and h_last.dtype == F32
    assert_close("y", y, want_y)
    # Of many tokens the products are MLX's, in the dtype of x.
    assert_close("h_last", h_last if shape[1] == 1 else h_last.astype(dtype), want_h)


@pytest.mark.parametrize("shape", [(1, 500, 2560), (3, 1000, 96), (1, 1, 2560)], ids=name_of)
def test_large_shapes_match_float64(shape: tuple[int, ...]) -> None:
    x, gx, ga, param = gate_inputs(shape, BF16)
    a = mx.sigmoid(ga * 3 + 3)
    h0, reset = state_of(shape, has_h0=True, has_reset=True)
    weights = block_inputs(shape[2], 10 if shape[2] == 2560 else 4, BF16)
    with metal_host.install(check=False):
        scanned, _ = linear_scan(x, a, h0, reset=reset, backend="metal")
        y, _ = rg_lru(x, gx, ga, param, h0, reset=reset, backend="metal")
        blocked, _ = block_rg_lru(x, *weights, param, h0, reset=reset, backend="metal")
    start, starts = or_zeros(shape, h0, reset)
    want, _ = scan_loop(float64(x), float64(a), start, reset=starts)
    assert_close("scan", scanned, want)
    want, _ = rg_lru_loop(*(float64(v) for v in (x, gx, ga, param)), start, starts)
    assert_close("rg_lru", y, want)
    gates = block_gate(x, *weights[:2]), block_gate(x, *weights[2:])
    want, _ = rg_lru_loop(float64(x), *gates, float64(param), start, starts)
    assert_close("block_rg_lru", blocked, want)


Recurrence = Callable[..., tuple[mx.array, mx.array]]


def ops(E: int) -> list[tuple[Recurrence, int]]:
    """Each op as a function of sequences and a state, and how many sequences it takes."""
    mx.random.seed(E)
    param, weights = mx.random.uniform(-5.0, 0.5, (E,)), block_inputs(E, 2)

    def scan(x: mx.array, a: mx.array, h0: Any = None, **rows: Any) -> Any:
        return linear_scan(x, mx.sigmoid(a * 3), h0, backend="metal", **rows)

    def gated(x: mx.array, gx: mx.array, ga: mx.array, h0: Any = None, **rows: Any) -> Any:
        return rg_lru(x, gx, ga, param, h0, backend="metal", **rows)

    def blocked(x: mx.array, h0: Any = None, **rows: Any) -> Any:
        return block_rg_lru(x, *weights, param, h0, backend="metal", **rows)

    return [(scan, 2), (gated, 3), (blocked, 1)]


def sequences(count: int, *shape: int) -> list[mx.array]:
    mx.random.seed(count + sum(shape))
    return [mx.random.normal(shape) for _ in range(count)]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
@pytest.mark.parametrize("lengths", [[0, 1, 70, 140], [140, 139, 8, 9]], ids=str)
def test_the_state_stops_at_each_row_s_length(which: int, lengths: list[int]) -> None:
    op, count = ops(20)[which]
    x = sequences(count, 4, 140, 20)
    h0, reset = mx.random.normal((4, 20)), reset_mask(4, 140)
    with metal_host.install():
        y, h_last = op(*x, h0, lengths=mx.array(lengths), reset=reset)
        assert mx.isfinite(y).all()
        for b, n in enumerate(lengths):
            row = slice(b, b + 1)
            want_y, want_h = y[row, :0], h0[row]
            if n > 0:
                want_y, want_h = op(*(v[row, :n] for v in x), h0[row], reset=reset[row, :n])
            assert_close(f"row {b}", y[row, :n], want_y)
            assert_close(f"row {b} state", h_last[row], want_h)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
@pytest.mark.parametrize("T", [1, 30])
def test_lengths_beyond_the_tokens_are_all_of_them_or_none(which: int, T: int) -> None:
    op, count = ops(20)[which]
    x, h0 = sequences(count, 2, T, 20), mx.random.normal((2, 20))
    with metal_host.install(schedules=("forward",)):
        _, got = op(*x, h0, lengths=mx.array([T + 4, -4]))
        _, want = op(*x, h0, lengths=mx.array([T, 0]))
    assert mx.array_equal(got, want)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
def test_one_token_of_a_row_without_any_leaves_its_state_alone(which: int) -> None:
    op, count = ops(20)[which]
    h0 = mx.random.normal((2, 20))
    with metal_host.install():
        y, h_last = op(*sequences(count, 2, 1, 20), h0, lengths=mx.array([0, 1]))
    assert mx.array_equal(h_last[0], h0[0]) and not mx.array_equal(h_last[1], h0[1])
    assert mx.isfinite(y).all()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
@pytest.mark.parametrize("cut", [1, 8, 64, 99])
def test_a_sequence_split_anywhere_equals_the_whole(which: int, cut: int) -> None:
    op, count = ops(20)[which]
    x = sequences(count, 2, 100, 20)
    with metal_host.install(schedules=("forward",)):
        whole, h_whole = op(*x)
        first, h = op(*(v[:, :cut] for v in x))
        second, h_last = op(*(v[:, cut:] for v in x), h)
    assert_close("y", mx.concatenate([first, second], axis=1), whole)
    assert_close("h_last", h_last, h_whole)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
@pytest.mark.parametrize("T", [1, 40])
def test_a_row_of_a_batch_is_the_row_alone_bit_for_bit(which: int, T: int) -> None:
    op, count = ops(20)[which]
    x = sequences(count, 3, T, 20)
    with metal_host.install(schedules=("forward",)):
        y, h_last = op(*x)
        for b in range(3):
            alone_y, alone_h = op(*(v[b : b + 1] for v in x))
            assert mx.array_equal(y[b : b + 1], alone_y)
            assert mx.array_equal(h_last[b : b + 1], alone_h)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
def test_a_second_run_is_the_first_bit_for_bit(which: int) -> None:
    op, count = ops(20)[which]
    x = sequences(count, 2, 100, 20)
    with metal_host.install(check=False):
        first, second = op(*x), op(*x)
    assert all(mx.array_equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("decay", [0.0, 1e-38, 1.0])
def test_extreme_decays_stay_exact_and_finite(decay: float) -> None:
    x, _, h0 = scan_inputs((2, 200, 32))
    a = mx.full(x.shape, decay)
    with metal_host.install(schedules=("forward",)):
        y, h_last = linear_scan(x, a, h0, backend="metal")
    want_y, want_h = scan_loop(float64(x), float64(a), float64(h0))
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)
    if decay == 0.0:
        assert mx.array_equal(y, x)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("gate", [-200.0, 200.0])
@pytest.mark.parametrize("param", [-60.0, 100.0])
def test_rg_lru_matches_float64_at_saturated_gates(gate: float, param: float, T: int) -> None:
    x, gx, _, _ = gate_inputs((2, T, 32))
    ga, params = mx.full(x.shape, gate), mx.full((32,), param)
    h0, reset = mx.random.normal((2, 32)), np.zeros((2, T), dtype=bool)
    with metal_host.install(schedules=("forward",)):
        y, h_last = rg_lru(x, gx, ga, params, h0, backend="metal")
    inputs = [float64(v) for v in (x, gx, ga, params, h0)]
    want_y, want_h = rg_lru_loop(*inputs, reset)
    assert_close("y", y, want_y)
    assert_close("h_last", h_last, want_h)


def test_the_multiplier_keeps_its_digits_when_the_decay_is_close_to_one() -> None:
    x = mx.ones((1, 1, 8))
    param = mx.full((8,), -20.0)
    with metal_host.install(schedules=("forward",)):
        y, _ = rg_lru(x, x, x, param, backend="metal")
    zeros, never = np.zeros((1, 8)), np.zeros((1, 1), dtype=bool)
    want, _ = rg_lru_loop(float64(x), float64(x), float64(x), float64(param), zeros, never)
    assert_close("y", y, want)


def test_inputs_that_are_not_contiguous_are_read_as_they_look() -> None:
    x, a, h0 = (v.transpose(2, 1, 0) if v.ndim == 3 else v.T for v in scan_inputs((32, 65, 2)))
    with metal_host.install(schedules=("forward",)):
        y, _ = linear_scan(x, a, h0, reset=reset_mask(65, 2).T, backend="metal")
    want, _ = scan_loop(float64(x), float64(a), float64(h0), reset=np.array(reset_mask(65, 2)).T)
    assert_close("y", y, want)


@pytest.mark.parametrize("has_reset", [False, True])
def test_every_byte_is_moved_once(has_reset: bool) -> None:
    B, T, E = 2, 256, 64
    x, gx, ga, param = gate_inputs((B, T, E), BF16)
    h0, reset = state_of((B, T, E), has_h0=True, has_reset=has_reset)
    with metal_host.install(schedules=("forward",)) as host:
        linear_scan(x, mx.sigmoid(ga), h0, reset=reset, backend="metal")
        rg_lru(x, gx, ga, param, h0, reset=reset, backend="metal")
    scan, gated = host.reports
    for report, names in ((scan, ("x", "a")), (gated, ("x", "input_gate", "recurrent_gate"))):
        read, written = report.bytes_read, report.bytes_written
        # Where the state is dropped the decay is not looked at.
        assert all(0.9 * x.nbytes < read[name] <= x.nbytes for name in names)
        assert written["y"] == x.nbytes and written["h_last"] == h0.nbytes
        inputs = [name for name in read if not name.endswith("_shape")]
        moved = sum(read[name] for name in inputs) + sum(written.values())
        least = (len(names) + 1) * x.nbytes + 2 * h0.nbytes + (reset.nbytes if has_reset else 0)
        assert moved <= 1.1 * least


def test_the_weights_of_the_gates_are_read_once_a_step() -> None:
    x, _, _, param = gate_inputs((1, 1, 128))
    weights = block_inputs(128, 2)
    with metal_host.install(schedules=("forward",)) as host:
        block_rg_lru(x, *weights, param, backend="metal")
    (report,) = host.reports
    assert report.bytes_read["input_weight"] == weights[0].nbytes
    assert report.bytes_read["recurrent_weight"] == weights[2].nbytes


def test_nothing_but_dtypes_and_what_is_there_makes_another_kernel() -> None:
    x, a, _ = scan_inputs((2, 300, 200))
    variants = {
        scan_kernel.scan_variant(x[:, :T, :E], a[:, :T, :E], None, None, None)
        for T in range(1, 301)
        for E in (1, 32, 100, 200)
    }
    assert {variant.segments for variant in variants} == {1, 8, 16}
    assert len(variants) == 3


GRADIENTS = {
    "plain": {},
    "lengths": {"lengths": mx.array([9, 0])},
    "reset": {"reset": reset_mask(2, 12)},
    "both": {"lengths": mx.array([5, 12]), "reset": reset_mask(2, 12)},
}


@pytest.mark.parametrize("rows", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear_scan", "rg_lru", "block_rg_lru"])
def test_gradients_match_differences_in_float64(which: int, rows: dict[str, mx.array]) -> None:
    """By the sum of y and h_last with fixed weights, along a few random directions."""
    B, T, E = 2, 12, 6
    mx.random.seed(which)
    h0, param = mx.random.normal((B, E)), mx.random.uniform(-4.0, 0.0, (E,))
    inputs = sequences((2, 3, 1)[which], B, T, E)
    if which == 0:
        inputs = [inputs[0], mx.sigmoid(inputs[1]), h0]
    elif which == 1:
        inputs = [*inputs, param, h0]
    else:
        inputs = [*inputs, *block_inputs(E, 2), param, h0]
    op: Recurrence = (linear_scan, rg_lru, block_rg_lru)[which]
    lengths = rows.get("lengths", mx.array([T, T]))
    valid = np.arange(T) < np.array(lengths)[:, None]
    of_y = np.random.default_rng(0).normal(size=(B, T, E)) * valid[..., None]
    of_h = np.random.default_rng(1).normal(size=(B, E))

    def loss(*inputs: mx.array) -> mx.array:
        y, h_last = op(*inputs, backend="metal", **rows)
        return (y * mx.array(of_y, dtype=F32)).sum() + (h_last * mx.array(of_h, dtype=F32)).sum()

    with metal_host.install(check=False):
        gradients = mx.grad(loss, argnums=list(range(len(inputs))))(*inputs)
        mx.eval(gradients)

    starts = np.array(rows["reset"]) if "reset" in rows else np.zeros((B, T), dtype=bool)

    def truth(*inputs: Any) -> float:
        sequence, *parameters, start = inputs
        if which == 0:
            y, h = scan_loop(sequence, *parameters, start, list(np.array(lengths)), starts)
        else:
            gates = parameters[:2]
            if which == 2:
                gates = [
                    (np.einsum("bthi,hij->bthj", sequence.reshape(B, T, 2, E // 2), w) + bias)
                    for w, bias in (parameters[:2], parameters[2:4])
                ]
                gates = [gate.reshape(B, T, E) for gate in gates]
            log_a = -8.0 / (1.0 + np.exp(-gates[1])) * np.log1p(np.exp(parameters[-1]))
            a = np.where(starts[..., None], 0.0, np.exp(log_a))
            m = np.where(starts[..., None], 1.0, np.sqrt(-np.expm1(2.0 * log_a)))
            gated = sequence / (1.0 + np.exp(-gates[0])) * m
            y, h = scan_loop(gated, a, start, list(np.array(lengths)))
        return float((y * of_y).sum() + (h * of_h).sum())

    wide = [float64(v) for v in inputs]
    generator = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction = generator.normal(size=wide[i].shape)
        step = 1e-5
        ahead, behind = list(wide), list(wide)
        ahead[i], behind[i] = wide[i] + step * direction, wide[i] - step * direction
        want = (truth(*ahead) - truth(*behind)) / (2 * step)
        got = float((float64(gradient) * direction).sum())
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4), f"argument {i}"
