"""How the kernels of the recurrence are launched: grids, variants, gradients, self-check cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Op, Unsupported
from metal.sample import lengths_and_reset, rows_and_tokens, wave

LANES = 32  # channels a threadgroup owns: threads of a simdgroup read neighbours
TOKENS = 8  # consecutive tokens of one thread
STEP_THREADS = 256  # of a threadgroup of the one-token kernel, at most
PARTS = 8  # threads that share a column of the block-diagonal products

# The kernels count tokens and channels in 32 bits.
_MOST = 1 << 31

_STATE = ("h0", "lengths", "reset")


@dataclass(frozen=True)
class Variant:
    """What the text of a recurrence kernel depends on."""

    dtype: mx.Dtype
    segments: int
    """Threads per channel, 0 in the kernels of one token."""
    has_h0: bool
    has_lengths: bool
    has_reset: bool
    has_few_rows: bool
    """Fewer than 8, where there are lengths or resets; see build.FEW_ELEMENTS."""
    has_few_tokens: bool
    """As above, of all rows together."""
    recurrent_param: mx.Dtype | None = None


def scan_variant(
    x: mx.array,
    a: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> Variant:
    return _variant("linear_scan", x, h0, lengths, reset)


def rg_lru_variant(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> Variant:
    return _variant("rg_lru", x, h0, lengths, reset, recurrent_param)


def block_rg_lru_variant(
    x: mx.array,
    input_weight: mx.array,
    input_bias: mx.array,
    recurrent_weight: mx.array,
    recurrent_bias: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> Variant:
    return _variant("block_rg_lru", x, h0, lengths, reset, recurrent_param)


def linear_scan(
    variant: Variant,
    x: mx.array,
    a: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`metal.linear_scan` by the kernel; its gradient is a scan from the end by the same kernel."""
    y, h_last = _linear_scan(variant)(x, a, h0, lengths, reset)
    return y, h_last


def rg_lru(
    variant: Variant,
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`metal.rg_lru` by the kernel; its gradient goes through the gates and the scan's."""
    gates = (input_gate, recurrent_gate, recurrent_param)
    y, h_last = _rg_lru(variant)(x, *gates, h0, lengths, reset)
    return y, h_last


def block_rg_lru(
    variant: Variant,
    x: mx.array,
    input_weight: mx.array,
    input_bias: mx.array,
    recurrent_weight: mx.array,
    recurrent_bias: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`metal.block_rg_lru`: at one token in one kernel, else MLX's products and the rest in one."""
    gates = (input_weight, input_bias, recurrent_weight, recurrent_bias, recurrent_param)
    y, h_last = _block_rg_lru(variant)(x, *gates, h0, lengths, reset)
    return y, h_last


@cache
def _linear_scan(variant: Variant) -> Callable[..., Any]:
    def forward(x: mx.array, a: mx.array, *state: mx.array | None) -> Any:
        return _launch("linear_scan", variant, {"x": x, "a": a}, state)

    return build.differentiable(forward, _scan_vjp)


@cache
def _rg_lru(variant: Variant) -> Callable[..., Any]:
    def forward(
        x: mx.array,
        input_gate: mx.array,
        recurrent_gate: mx.array,
        recurrent_param: mx.array,
        *state: mx.array | None,
    ) -> Any:
        arrays = {
            "x": x,
            "input_gate": input_gate,
            "recurrent_gate": recurrent_gate,
            "recurrent_param": recurrent_param,
        }
        if variant.segments == 0:
            return _launch_step("rg_lru_step", variant, arrays, state)
        no_bias = build.optional(None, mx.float32)
        arrays |= {"input_bias": no_bias, "recurrent_bias": no_bias}
        return _launch("rg_lru", variant, arrays, state, [("IS_BLOCK", False)])

    def through_scan(
        x: mx.array,
        input_gate: mx.array,
        recurrent_gate: mx.array,
        recurrent_param: mx.array,
        h0: mx.array | None,
        lengths: mx.array | None,
        reset: mx.array | None,
    ) -> Any:
        gates = (x, input_gate, recurrent_gate, recurrent_param)
        gated, a = reference.rg_lru_gates(*gates, reset)
        y, h_last = LINEAR_SCAN("auto", gated, a, h0, lengths, None)
        return y.astype(x.dtype), h_last

    return build.differentiable(forward, partial(build.gradients_of, through_scan))


@cache
def _block_rg_lru(variant: Variant) -> Callable[..., Any]:
    def forward(
        x: mx.array,
        input_weight: mx.array,
        input_bias: mx.array,
        recurrent_weight: mx.array,
        recurrent_bias: mx.array,
        recurrent_param: mx.array,
        *state: mx.array | None,
    ) -> Any:
        arrays = {
            "x": x,
            "input_bias": input_bias,
            "recurrent_bias": recurrent_bias,
            "recurrent_param": recurrent_param,
        }
        if variant.segments == 0:
            arrays |= {"input_weight": input_weight, "recurrent_weight": recurrent_weight}
            return _launch_block_step(variant, arrays, state)
        blocks = reference.gate_blocks(x, input_weight.shape[0])
        arrays |= {
            "input_gate": blocks @ input_weight,
            "recurrent_gate": blocks @ recurrent_weight,
        }
        return _launch("rg_lru", variant, arrays, state, [("IS_BLOCK", True)])

    def through_gates(
        x: mx.array,
        input_weight: mx.array,
        input_bias: mx.array,
        recurrent_weight: mx.array,
        recurrent_bias: mx.array,
        recurrent_param: mx.array,
        *state: mx.array | None,
    ) -> Any:
        gates = (
            reference.block_gate(x, input_weight, input_bias),
            reference.block_gate(x, recurrent_weight, recurrent_bias),
        )
        return RG_LRU("auto", x, *gates, recurrent_param, *state)

    return build.differentiable(forward, partial(build.gradients_of, through_gates))


def scan_sample(variant: Variant) -> tuple[Any, ...]:
    x = _sample_input(variant)
    a = mx.sigmoid(3 * wave(x.shape, mx.float32, 2)).astype(variant.dtype)
    return (x, a, *_sample_state(variant, x))


def rg_lru_sample(variant: Variant) -> tuple[Any, ...]:
    x = _sample_input(variant)
    gates = (wave(x.shape, x.dtype, 2), wave(x.shape, x.dtype, 3))
    return (x, *gates, *_sample_parameter(variant, x), *_sample_state(variant, x))


def block_rg_lru_sample(variant: Variant) -> tuple[Any, ...]:
    x = _sample_input(variant)
    heads, block = 2, x.shape[2] // 2
    gates = [
        wave(shape, x.dtype, frequency)
        for frequency in (2, 3)
        for shape in ((heads, block, block), (heads, block))
    ]
    return (x, *gates, *_sample_parameter(variant, x), *_sample_state(variant, x))


def _variant(
    op: str,
    x: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
    recurrent_param: mx.array | None = None,
) -> Variant:
    B, T, E = x.shape
    if x.size == 0 or x.size >= _MOST:
        raise Unsupported(f"[{op}] the Metal kernel takes 1 to 2^31 - 1 elements, got {x.shape}.")
    has_rows = lengths is not None or reset is not None
    given = (h0 is not None, lengths is not None, reset is not None)
    few = (has_rows and B < build.FEW_ELEMENTS, has_rows and B * T < build.FEW_ELEMENTS)
    if recurrent_param is None:
        return Variant(x.dtype, _segments(B, T, E), *given, *few)
    segments = 0 if T == 1 else _segments(B, T, E)
    return Variant(x.dtype, segments, *given, *few, recurrent_param.dtype)


def _segments(B: int, T: int, E: int) -> int:
    """Threads per channel: more where few channels would leave most of the GPU idle."""
    groups = B * -(-E // LANES)
    if T <= TOKENS:
        return 1
    return 16 if T > 8 * TOKENS and groups < 160 else 8


def _call(
    name: str,
    variant: Variant,
    arrays: dict[str, mx.array],
    state: build.Arguments,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]],
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    kernel = build.kernel(name, (*arrays, *_STATE), ("y", "h_last"), header="recurrence.h")
    return kernel(
        inputs=[
            *arrays.values(),
            *map(build.optional, state, (mx.float32, mx.int32, mx.bool_)),
        ],
        template=[
            ("T", variant.dtype),
            *template,
            ("HAS_H0", variant.has_h0),
            ("HAS_LENGTHS", variant.has_lengths),
            ("HAS_RESET", variant.has_reset),
        ],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[arrays["x"].shape, (B, E)],
        output_dtypes=[variant.dtype, mx.float32],
    )


def _launch(
    name: str,
    variant: Variant,
    arrays: dict[str, mx.array],
    state: build.Arguments,
    template: Sequence[tuple[str, Any]] = (),
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    return _call(
        *(name, variant, arrays, state),
        grid=(-(-E // LANES) * LANES, variant.segments, B),
        threadgroup=(LANES, variant.segments, 1),
        template=[("SEG", variant.segments), ("L", TOKENS), *template],
    )


def _launch_step(
    name: str,
    variant: Variant,
    arrays: dict[str, mx.array],
    state: build.Arguments,
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    return _call(
        *(name, variant, arrays, state),
        grid=(E, B, 1),
        threadgroup=(min(STEP_THREADS, E), 1, 1),
        template=[],
    )


def _launch_block_step(
    variant: Variant,
    arrays: dict[str, mx.array],
    state: build.Arguments,
) -> list[mx.array]:
    B = arrays["x"].shape[0]
    heads, block, _ = arrays["input_weight"].shape
    return _call(
        *("block_rg_lru_step", variant, arrays, state),
        grid=(-(-block // LANES) * LANES, PARTS, B * heads),
        threadgroup=(LANES, PARTS, 1),
        template=[("ROWS", PARTS)],
    )


def _scan_vjp(arguments: build.Arguments, cotangents: list[mx.array]) -> build.Arguments:
    """With g the cotangent of h: g[t] = dy[t] + a[t+1] g[t+1], dx = g, da[t] = g[t] h[t-1]."""
    x, a, h0, lengths, reset = arguments
    assert x is not None and a is not None
    B, T, E = x.shape
    dy, dh_last = (cotangent.astype(mx.float32) for cotangent in cotangents)
    decay = a.astype(mx.float32)
    if reset is not None:
        decay = mx.where(reset[..., None], 0.0, decay)
    last = mx.full((B,), T, dtype=mx.int32) if lengths is None else lengths.astype(mx.int32)
    steps = mx.arange(T)
    valid = (steps < last[:, None])[..., None]
    # Past a row's length the state stands still and y says nothing: no gradient comes from there.
    decay = mx.where(valid, decay, 1.0)
    dy = mx.where(valid, dy, 0.0)
    following = mx.concatenate([decay[:, 1:], mx.ones((B, 1, E))], axis=1)
    reverse = (dy[:, ::-1], following[:, ::-1], dh_last, None, None)
    backwards, _ = LINEAR_SCAN("auto", *reverse)
    g = backwards[:, ::-1]

    state = mx.zeros((B, E)) if h0 is None else h0
    wide = (x.astype(mx.float32), a.astype(mx.float32))
    h, _ = LINEAR_SCAN("auto", *wide, h0, lengths, reset)
    before = mx.concatenate([state[:, None], h[:, :-1]], axis=1)
    can_decay = valid if reset is None else valid & ~reset[..., None]
    return (
        mx.where(valid, g, 0.0).astype(x.dtype),
        mx.where(can_decay, g * before, 0.0).astype(a.dtype),
        None if h0 is None else decay[:, 0] * g[:, 0],
        *(None, None),
    )


def _sample_input(variant: Variant) -> mx.array:
    """As small as shows every thread, tile and address space of the variant."""
    tokens = 1 if variant.segments == 0 else variant.segments * TOKENS + 3
    return wave((*rows_and_tokens(variant, tokens), STEP_THREADS + 40), variant.dtype)


def _sample_parameter(variant: Variant, x: mx.array) -> list[mx.array]:
    assert variant.recurrent_param is not None
    # Decays from almost 0 to almost 1: with the former alone no state would reach the next tile.
    return [(4 * wave(x.shape[2:], mx.float32, 4) - 2).astype(variant.recurrent_param)]


def _sample_state(variant: Variant, x: mx.array) -> tuple[Any, ...]:
    B, T, E = x.shape
    h0 = wave((B, E), mx.float32, 5) if variant.has_h0 else None
    return (h0, *lengths_and_reset(variant, B, T))


LINEAR_SCAN = Op("linear_scan", reference.linear_scan, linear_scan, scan_variant, scan_sample)
RG_LRU = Op("rg_lru", reference.rg_lru, rg_lru, rg_lru_variant, rg_lru_sample)
BLOCK_RG_LRU = Op(
    "block_rg_lru",
    *(reference.block_rg_lru, block_rg_lru, block_rg_lru_variant, block_rg_lru_sample),
)
