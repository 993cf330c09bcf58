"""The convolution's kernel on the Metal host: against a float64 loop, and what holds exactly."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal import causal_conv1d, conv_kernel, faults

from .. import metal_host
from ..tolerance import assert_close
from .test_linear_scan import Floats, conv_loop, float64, name_of

pytestmark = pytest.mark.usefixtures("apple_gpu")

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16

# B-T-E, K, dtype of u, of the weight, a state, lengths, resets: pairwise. Fewer than 8 elements
# arrive in Metal's constant memory; a thread owns 16 tokens, or the only one.
CASES = [
    ((1, 1, 5), 2, F32, F32, True, False, False),
    ((1, 1, 100), 4, BF16, BF16, True, False, False),
    ((3, 1, 32), 5, F16, F32, True, True, True),
    ((2, 1, 100), 4, F32, BF16, False, True, False),
    ((1, 2, 3), 4, F16, F16, True, False, True),
    ((2, 2, 32), 5, BF16, BF16, True, True, False),
    ((3, 3, 100), 2, F32, F16, False, True, True),
    ((1, 3, 5), 5, F32, F32, True, False, False),
    ((2, 16, 100), 4, BF16, F32, True, True, True),
    ((3, 16, 5), 2, F16, F16, False, False, False),
    ((1, 17, 32), 2, BF16, BF16, True, False, True),
    ((3, 17, 100), 8, F32, F32, True, True, False),
    ((2, 64, 5), 5, F16, BF16, False, True, True),
    ((1, 64, 32), 4, F32, F32, True, False, False),
    ((3, 65, 32), 4, BF16, BF16, True, True, True),
    ((2, 65, 100), 5, F32, F16, False, False, True),
]


def inputs(
    shape: tuple[int, ...], K: int, dtype: mx.Dtype = F32, weight: mx.Dtype = F32
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """u, weight, bias and state."""
    B, _, E = shape
    mx.random.seed(sum(shape) + K)
    return (
        mx.random.normal(shape).astype(dtype),
        mx.random.normal((E, K)).astype(weight),
        mx.random.normal((E,)).astype(weight),
        mx.random.normal((B, K - 1, E)).astype(dtype),
    )


def resets(B: int, T: int) -> mx.array:
    """At the first token and close after it; in the middle; around where a thread's tokens end."""
    mask = np.zeros((B, T), dtype=bool)
    for b, at in zip(
        range(B), ([0, 1, 3], [T // 2, T // 2 + 1], [13, 15, 16, 18, 31]), strict=False
    ):
        mask[b, [t for t in at if t < T]] = True
    return mx.array(mask)


def truth(
    u: mx.array, weight: mx.array, bias: mx.array, state: mx.array, lengths: Any, reset: Any
) -> tuple[list[Floats], Floats]:
    """Rows of y, each as long as it is valid, and the states after them."""
    B, T, _ = u.shape
    starts = np.zeros((B, T), dtype=bool) if reset is None else np.array(reset)
    wide, taps, offset, before = (float64(v) for v in (u, weight, bias, state))
    rows, tails = [], []
    for b, n in enumerate([T] * B if lengths is None else lengths.tolist()):
        row = slice(b, b + 1)
        y, tail = conv_loop(wide[row, :n], taps, offset, before[row], starts[row, :n])
        rows.append(y[0])
        tails.append(tail[0])
    return rows, np.stack(tails)


@pytest.mark.parametrize(
    ("shape", "K", "dtype", "weight", "has_state", "has_lengths", "has_reset"), CASES, ids=name_of
)
def test_matches_float64(
    shape: tuple[int, ...],
    K: int,
    dtype: mx.Dtype,
    weight: mx.Dtype,
    has_state: bool,
    has_lengths: bool,
    has_reset: bool,
) -> None:
    B, T, _ = shape
    u, w, bias, state = inputs(shape, K, dtype, weight)
    if not has_state:
        state = mx.zeros_like(state)
    lengths = mx.array([T // 2, 0, T][:B]) if has_lengths else None
    reset = resets(B, T) if has_reset else None
    with metal_host.install():
        y, tail = causal_conv1d(u, w, bias, state, lengths=lengths, reset=reset, backend="metal")
    assert y.dtype == dtype and tail.dtype == dtype and y.shape == shape
    assert mx.isfinite(y).all()
    rows, tails = truth(u, w, bias, state, lengths, reset)
    for b, row in enumerate(rows):
        assert_close(f"row {b}", y[b, : len(row)], row)
    assert np.array_equal(float64(tail), tails), "the state is what was read, not rounded again"


@pytest.mark.parametrize("K", [2, 4, 8])
def test_the_state_stops_at_every_length(K: int) -> None:
    T = 20
    u, w, bias, state = inputs((T + 1, T, 6), K)
    lengths = mx.arange(T + 1)
    reset = mx.random.uniform(shape=(T + 1, T), key=mx.random.key(K)) < 0.2
    with metal_host.install():
        y, tail = causal_conv1d(u, w, bias, state, lengths=lengths, reset=reset, backend="metal")
        whole, _ = causal_conv1d(u, w, bias, state, reset=reset, backend="metal")
    rows, tails = truth(u, w, bias, state, lengths, reset)
    for b, row in enumerate(rows):
        assert_close(f"row {b}", y[b, :b], row)
    assert np.array_equal(float64(tail), tails)
    assert mx.array_equal(y, whole), "past a length y is the convolution of what u holds there"


def test_nothing_from_before_a_reset_or_past_a_length_is_seen() -> None:
    u, w, bias, state = inputs((2, 40, 6), 4)
    at = mx.arange(40)[None, :, None]
    u = mx.where((at < 17) | (at >= 33), mx.nan, u)
    state = mx.full(state.shape, mx.nan)
    reset, lengths = mx.arange(80).reshape(2, 40) % 40 == 17, mx.array([33, 33])
    with metal_host.install():
        y, tail = causal_conv1d(u, w, bias, state, lengths=lengths, reset=reset, backend="metal")
        alone, alone_tail = causal_conv1d(
            u[:, 17:33], w, bias, mx.zeros_like(state), backend="metal"
        )
    assert mx.array_equal(y[:, 17:33], alone)
    assert mx.array_equal(tail, alone_tail)


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("cut", [1, 2, 15, 16, 17, 39])
def test_a_sequence_split_anywhere_is_the_whole_bit_for_bit(cut: int, K: int) -> None:
    u, w, bias, state = inputs((2, 40, 20), K, BF16, BF16)
    reset = mx.arange(80).reshape(2, 40) % 17 == 14
    with metal_host.install(schedules=("forward",)):
        whole = causal_conv1d(u, w, bias, state, reset=reset, backend="metal")
        first, tail = causal_conv1d(
            u[:, :cut], w, bias, state, reset=reset[:, :cut], backend="metal"
        )
        second, tail = causal_conv1d(
            u[:, cut:], w, bias, tail, reset=reset[:, cut:], backend="metal"
        )
    assert mx.array_equal(mx.concatenate([first, second], axis=1), whole[0])
    assert mx.array_equal(tail, whole[1])


def test_token_by_token_is_the_whole_bit_for_bit() -> None:
    u, w, bias, tail = inputs((2, 20, 20), 4, F16)
    with metal_host.install(check=False):
        whole = causal_conv1d(u, w, bias, tail, backend="metal")
        steps = []
        for t in range(20):
            y, tail = causal_conv1d(u[:, t : t + 1], w, bias, tail, backend="metal")
            steps.append(y)
    assert mx.array_equal(mx.concatenate(steps, axis=1), whole[0])
    assert mx.array_equal(tail, whole[1])


@pytest.mark.parametrize("T", [1, 40])
def test_a_row_of_a_batch_is_the_row_alone_bit_for_bit(T: int) -> None:
    u, w, bias, state = inputs((3, T, 20), 4)
    reset, lengths = resets(3, T), mx.array([T, 0, T // 2])
    with metal_host.install(schedules=("forward",)):
        y, tail = causal_conv1d(u, w, bias, state, lengths=lengths, reset=reset, backend="metal")
        for b in range(3):
            row = slice(b, b + 1)
            alone = causal_conv1d(
                *(u[row], w, bias, state[row]),
                lengths=lengths[row],
                reset=reset[row],
                backend="metal",
            )
            assert mx.array_equal(y[row], alone[0]) and mx.array_equal(tail[row], alone[1])


def test_a_second_run_is_the_first_bit_for_bit() -> None:
    arguments = inputs((2, 100, 40), 4, BF16)
    with metal_host.install(check=False):
        first = causal_conv1d(*arguments, backend="metal")
        second = causal_conv1d(*arguments, backend="metal")
    assert all(mx.array_equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("T", [1, 500])
def test_large_shapes_match_float64(T: int) -> None:
    u, w, bias, state = inputs((2, T, 2560), 4, BF16, BF16)
    reset = resets(2, T)
    with metal_host.install(check=False):
        y, tail = causal_conv1d(u, w, bias, state, reset=reset, backend="metal")
    rows, tails = truth(u, w, bias, state, None, reset)
    assert_close("y", y, np.stack(rows))
    assert np.array_equal(float64(tail), tails)


def test_inputs_that_are_not_contiguous_are_read_as_they_look() -> None:
    u, w, bias, state = inputs((2, 33, 20), 4)
    reset, lengths = resets(2, 33), mx.array([33, 18])
    strided = (
        mx.contiguous(u.transpose(2, 1, 0)).transpose(2, 1, 0),
        mx.contiguous(w.T).T,
        mx.repeat(bias, 2)[::2],
        mx.repeat(state, 3, axis=2)[..., ::3],
    )
    with metal_host.install(schedules=("forward",)):
        want = causal_conv1d(u, w, bias, state, lengths=lengths, reset=reset, backend="metal")
        got = causal_conv1d(
            *strided,
            lengths=mx.repeat(lengths, 2)[::2],
            reset=mx.contiguous(reset.T).T,
            backend="metal",
        )
    assert all(mx.array_equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("T", [1, 19])
@pytest.mark.parametrize("rows", [False, True], ids=["plain", "lengths and resets"])
def test_auto_checks_itself_and_takes_the_kernel(T: int, rows: bool) -> None:
    u, w, bias, state = inputs((2, T, 20), 4, BF16, F32)
    keywords = {"lengths": mx.array([T, 0]), "reset": resets(2, T)} if rows else {}
    with metal_host.install(schedules=("forward",)) as host:
        got = causal_conv1d(u, w, bias, state, **keywords)
    assert len(host.reports) == 2 and not faults()  # its sample, and this
    want = causal_conv1d(u, w, bias, state, backend="reference", **keywords)
    assert_close("y", got[0], want[0])
    assert mx.array_equal(got[1], want[1])


@pytest.mark.parametrize(
    ("shape", "K", "message"),
    [
        ((2, 5, 8), 1, "takes K from 2 to 8, got 1."),
        ((2, 5, 8), 9, "takes K from 2 to 8, got 9."),
        ((0, 5, 8), 4, "takes no empty u, got (0, 5, 8)."),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_by_name_or_left_to_the_reference(
    shape: tuple[int, ...], K: int, message: str
) -> None:
    arguments = inputs(shape, K)
    with metal_host.install() as host:
        with pytest.raises(
            ValueError, match=re.escape(f"[causal_conv1d] the Metal kernel {message}")
        ):
            causal_conv1d(*arguments, backend="metal")
        y, tail = causal_conv1d(*arguments)
    assert not host.reports
    rows, tails = truth(*arguments, None, None) if shape[0] else ([], np.zeros(tail.shape))
    assert_close("y", y, np.stack(rows) if rows else np.zeros(shape))
    assert_close("state", tail, tails)


@pytest.mark.parametrize("T", [1, 21])
@pytest.mark.parametrize("rows", [False, True], ids=["plain", "lengths and resets"])
def test_gradients_are_the_reference_s(T: int, rows: bool) -> None:
    arguments = inputs((2, T, 6), 4)
    keywords: dict[str, Any] = {}
    if rows:
        keywords = {"lengths": mx.array([T, T // 2]), "reset": resets(2, T)}
    of_y = mx.random.normal((2, T, 6), key=mx.random.key(1))
    of_tail = mx.random.normal((2, 3, 6), key=mx.random.key(2))

    def gradients(backend: Any) -> tuple[mx.array, ...]:
        def loss(*arrays: mx.array) -> mx.array:
            y, tail = causal_conv1d(*arrays, backend=backend, **keywords)
            return (y * of_y).sum() + (tail * of_tail).sum()

        result: tuple[mx.array, ...] = mx.grad(loss, argnums=[0, 1, 2, 3])(*arguments)
        mx.eval(result)
        return result

    with metal_host.install(check=False) as host:
        got = gradients("metal")
    assert len(host.reports) == 1
    for name, g, want in zip(("u", "w", "bias", "state"), got, gradients("reference"), strict=True):
        assert mx.abs(want).max().item() > 0
        assert_close(name, g, want)


def test_a_thread_reads_the_tokens_before_its_own_and_nothing_else_twice() -> None:
    B, T, E, K, L = 2, 256, 64, 4, conv_kernel.TOKENS
    u, w, bias, state = inputs((B, T, E), K, BF16, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        causal_conv1d(u, w, bias, state, reset=resets(B, T), backend="metal")
    (report,) = host.reports
    read, threads = report.bytes_read, T // L
    assert read["u"] == u.nbytes + B * (threads - 1) * (K - 1) * E * u.itemsize
    assert read["u"] <= u.nbytes * (L + K - 1) / L
    assert read["state"] == state.nbytes
    assert read["weight"] == B * threads * w.nbytes and read["bias"] == B * threads * bias.nbytes
    # One byte a token and simdgroup of 32 channels, not one a token and channel.
    assert read["reset"] == E // 32 * B * (T + (threads - 1) * (K - 1))
    assert report.bytes_written["y"] == u.nbytes
    assert report.bytes_written["next_state"] == state.nbytes


def test_a_step_moves_every_byte_once() -> None:
    u, w, bias, state = inputs((1, 1, 64), 4, BF16, BF16)
    with metal_host.install(schedules=("forward",)) as host:
        causal_conv1d(u, w, bias, state, backend="metal")
    (report,) = host.reports
    for name, array in (("u", u), ("weight", w), ("bias", bias), ("state", state)):
        assert report.bytes_read[name] == array.nbytes
    assert report.bytes_written["y"] == u.nbytes
    assert report.bytes_written["next_state"] == state.nbytes


def test_nothing_but_dtypes_the_width_and_what_is_there_makes_another_kernel() -> None:
    u, w, bias, state = inputs((2, 300, 200), 4)
    shapes = [(T, E) for T in range(1, 301) for E in (1, 32, 200)]
    variants = {
        conv_kernel.causal_conv1d_variant(u[:, :T, :E], w[:E], bias[:E], state[..., :E], None, None)
        for T, E in shapes
    }
    assert {variant.tokens for variant in variants} == {1, conv_kernel.TOKENS}
    assert len(variants) == 2
    other = conv_kernel.causal_conv1d_variant(u, w.astype(F16), bias, state, None, None)
    assert other not in variants


@pytest.mark.parametrize("backend", ["metal", "reference"])
@pytest.mark.parametrize("T", [1, 5, 30])
def test_lengths_beyond_the_tokens_are_all_of_them_or_none(T: int, backend: Any) -> None:
    u, state = mx.random.normal((2, T, 20)), mx.random.normal((2, 3, 20))
    weight, bias = mx.random.normal((20, 4)), mx.zeros((20,))
    tails = []
    with metal_host.install(schedules=("forward",)):
        for lengths in ([T + 4, -4], [T, 0]):
            rows = mx.array(lengths)
            tails.append(causal_conv1d(u, weight, bias, state, lengths=rows, backend=backend)[1])
    assert mx.array_equal(*tails)
