"""How the kernels of the recurrence are launched: grids, variants, gradients, self-check cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Unsupported
from metal.sample import wave

LANES = 32  # channels a threadgroup owns: threads of a simdgroup read neighbours
TOKENS = 8  # consecutive tokens of one thread
PARTS = 8  # threads that share a column of the block-diagonal products

# A grid beyond this many threads in one direction, or this many elements in an array, is refused:
# the kernels count tokens and channels in 32 bits.
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

    def forward(x: mx.array, a: mx.array, h0: mx.array | None = None) -> Any:
        return tuple(_launch("linear_scan", variant, {"x": x, "a": a}, h0, lengths, reset))

    def backward(primals: Sequence[mx.array], cotangents: Any) -> list[mx.array]:
        return _scan_vjp(primals, cotangents, lengths, reset)

    return _result(build.differentiable(forward, backward, _given(x, a, h0)))


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

    def forward(
        x: mx.array,
        input_gate: mx.array,
        recurrent_gate: mx.array,
        recurrent_param: mx.array,
        h0: mx.array | None = None,
    ) -> Any:
        arrays = {
            "x": x,
            "input_gate": input_gate,
            "recurrent_gate": recurrent_gate,
            "recurrent_param": recurrent_param,
        }
        if variant.segments == 0:
            return tuple(_launch_step("rg_lru_step", variant, arrays, h0, lengths, reset))
        bias = build.absent(mx.float32)
        arrays |= {"input_bias": bias, "recurrent_bias": bias}
        block = [("BLOCK", 0)]
        return tuple(_launch("rg_lru", variant, arrays, h0, lengths, reset, block))

    def through_scan(
        x: mx.array,
        input_gate: mx.array,
        recurrent_gate: mx.array,
        recurrent_param: mx.array,
        h0: mx.array | None = None,
    ) -> Any:
        gates = (x, input_gate, recurrent_gate, recurrent_param)
        gated, a = reference.rg_lru_gates(*gates, reset)
        y, h_last = linear_scan(
            scan_variant(gated, a, h0, lengths, None), gated, a, h0, lengths, None
        )
        return y.astype(x.dtype), h_last

    def backward(primals: Sequence[mx.array], cotangents: Any) -> list[mx.array]:
        return mx.vjp(through_scan, list(primals), list(cotangents))[1]

    arrays = _given(x, input_gate, recurrent_gate, recurrent_param, h0)
    return _result(build.differentiable(forward, backward, arrays))


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

    def forward(
        x: mx.array,
        input_weight: mx.array,
        input_bias: mx.array,
        recurrent_weight: mx.array,
        recurrent_bias: mx.array,
        recurrent_param: mx.array,
        h0: mx.array | None = None,
    ) -> Any:
        arrays = {
            "x": x,
            "input_bias": input_bias,
            "recurrent_bias": recurrent_bias,
            "recurrent_param": recurrent_param,
        }
        if variant.segments == 0:
            arrays |= {"input_weight": input_weight, "recurrent_weight": recurrent_weight}
            return tuple(_launch_block_step(variant, arrays, h0, lengths, reset))
        blocks = reference.gate_blocks(x, input_weight.shape[0])
        arrays |= {
            "input_gate": blocks @ input_weight,
            "recurrent_gate": blocks @ recurrent_weight,
        }
        block = [("BLOCK", input_weight.shape[1])]
        return tuple(_launch("rg_lru", variant, arrays, h0, lengths, reset, block))

    def through_gates(
        x: mx.array,
        input_weight: mx.array,
        input_bias: mx.array,
        recurrent_weight: mx.array,
        recurrent_bias: mx.array,
        recurrent_param: mx.array,
        h0: mx.array | None = None,
    ) -> Any:
        arguments = (
            x,
            reference.block_gate(x, input_weight, input_bias),
            reference.block_gate(x, recurrent_weight, recurrent_bias),
            recurrent_param,
            *(h0, lengths, reset),
        )
        return rg_lru(rg_lru_variant(*arguments), *arguments)

    def backward(primals: Sequence[mx.array], cotangents: Any) -> list[mx.array]:
        return mx.vjp(through_gates, list(primals), list(cotangents))[1]

    gates = (input_weight, input_bias, recurrent_weight, recurrent_bias, recurrent_param)
    return _result(build.differentiable(forward, backward, _given(x, *gates, h0)))


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
    given = (h0 is not None, lengths is not None, reset is not None)
    if recurrent_param is None:
        return Variant(x.dtype, _segments(B, T, E), *given)
    return Variant(x.dtype, 0 if T == 1 else _segments(B, T, E), *given, recurrent_param.dtype)


def _segments(B: int, T: int, E: int) -> int:
    """Threads per channel: more where few channels would leave most of the GPU idle."""
    groups = B * -(-E // LANES)
    if T <= TOKENS:
        return 1
    return 16 if T > 8 * TOKENS and groups < 160 else 8


def _given(*arrays: mx.array | None) -> list[mx.array]:
    return [array for array in arrays if array is not None]


def _result(outputs: Any) -> tuple[mx.array, mx.array]:
    y, h_last = outputs
    return y, h_last


def _state_inputs(
    h0: mx.array | None, lengths: mx.array | None, reset: mx.array | None
) -> list[mx.array]:
    return [
        build.absent(mx.float32) if h0 is None else h0,
        build.absent(mx.int32) if lengths is None else lengths.astype(mx.int32),
        build.absent(mx.bool_) if reset is None else reset,
    ]


def _call(
    name: str,
    variant: Variant,
    arrays: dict[str, mx.array],
    state: tuple[mx.array | None, mx.array | None, mx.array | None],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]],
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    kernel = build.kernel(name, (*arrays, *_STATE), ("y", "h_last"), header="recurrence.h")
    return kernel(
        inputs=[*arrays.values(), *_state_inputs(*state)],
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
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
    template: Sequence[tuple[str, Any]] = (),
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    return _call(
        *(name, variant, arrays, (h0, lengths, reset)),
        grid=(-(-E // LANES) * LANES, variant.segments, B),
        threadgroup=(LANES, variant.segments, 1),
        template=[("SEG", variant.segments), ("L", TOKENS), *template],
    )


def _launch_step(
    name: str,
    variant: Variant,
    arrays: dict[str, mx.array],
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> list[mx.array]:
    B, _, E = arrays["x"].shape
    return _call(
        *(name, variant, arrays, (h0, lengths, reset)),
        grid=(E, B, 1),
        threadgroup=(min(256, E), 1, 1),
        template=[],
    )


def _launch_block_step(
    variant: Variant,
    arrays: dict[str, mx.array],
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> list[mx.array]:
    B = arrays["x"].shape[0]
    heads, block, _ = arrays["input_weight"].shape
    return _call(
        *("block_rg_lru_step", variant, arrays, (h0, lengths, reset)),
        grid=(-(-block // LANES) * LANES, PARTS, B * heads),
        threadgroup=(LANES, PARTS, 1),
        template=[("ROWS", PARTS)],
    )


def _scan_vjp(
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    lengths: mx.array | None,
    reset: mx.array | None,
) -> list[mx.array]:
    """With g the cotangent of h: g[t] = dy[t] + a[t+1] g[t+1], dx = g, da[t] = g[t] h[t-1]."""
    x, a, *rest = primals
    h0 = rest[0] if rest else None
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
    arguments = (dy[:, ::-1], following[:, ::-1], dh_last, None, None)
    backwards, _ = linear_scan(scan_variant(*arguments), *arguments)
    g = backwards[:, ::-1]

    state = mx.zeros((B, E)) if h0 is None else h0
    wide = (x.astype(mx.float32), a.astype(mx.float32), h0, lengths, reset)
    h, _ = linear_scan(scan_variant(*wide), *wide)
    before = mx.concatenate([state[:, None], h[:, :-1]], axis=1)
    can_decay = valid if reset is None else valid & ~reset[..., None]
    gradients = [
        mx.where(valid, g, 0.0).astype(x.dtype),
        mx.where(can_decay, g * before, 0.0).astype(a.dtype),
    ]
    if h0 is not None:
        gradients.append(decay[:, 0] * g[:, 0])
    return gradients


def _sample_input(variant: Variant) -> mx.array:
    T = 1 if variant.segments == 0 else variant.segments * TOKENS + 3
    return wave((3, T, 40), variant.dtype, 1)


def _sample_parameter(variant: Variant, x: mx.array) -> list[mx.array]:
    assert variant.recurrent_param is not None
    # Decays from almost 0 to almost 1: with the former alone no state would reach the next tile.
    return [(4 * wave(x.shape[2:], mx.float32, 4) - 2).astype(variant.recurrent_param)]


def _sample_state(variant: Variant, x: mx.array) -> tuple[Any, ...]:
    B, T, E = x.shape
    return (
        wave((B, E), mx.float32, 5) if variant.has_h0 else None,
        mx.array([T, max(T - 2, 0), T]) if variant.has_lengths else None,
        (mx.arange(B * T) % 5 == 2).reshape(B, T) if variant.has_reset else None,
    )
