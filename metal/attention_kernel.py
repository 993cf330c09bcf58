"""How the kernels of attention are launched: grids, variants, gradients, self-check cases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Unsupported
from metal.sample import wave

LANES = 32
SPLIT = 128  # keys of one threadgroup of the decode kernel
SIMDGROUPS = 8  # of the decode kernel, which share the keys of a split
FEW = 8  # queries that the decode kernel takes: in a tile, so few would walk all keys alone

_LOG2E = math.log2(math.e)

# The kernels count rows and keys in 32 bits.
_MOST = 1 << 30

# Head dims and numbers of queries for which MLX's own attention never writes its scores to memory,
# and takes no mask but the causal one (mlx 0.32: backend/metal/scaled_dot_product_attention.cpp).
_FUSED_FEW = (64, 96, 128, 256)
_FUSED_MANY = (64, 72, 80, 96, 128)
_FUSED_FEW_ROWS = 32


@dataclass(frozen=True)
class TileVariant:
    """What the text of the prefill kernel depends on."""

    dtype: mx.Dtype
    D: int
    has_softcap: bool
    has_key_start: bool
    has_lengths: bool


@dataclass(frozen=True)
class DecodeVariant:
    """What the text of the decode kernel depends on."""

    dtype: mx.Dtype
    D: int
    heads: int
    """Query heads of one threadgroup."""
    is_split: bool
    is_ring: bool
    has_softcap: bool
    has_key_start: bool


def attention_variant(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    key_start: mx.array | None,
    lengths: mx.array | None,
) -> TileVariant | DecodeVariant:
    op, D = "local_attention", q.shape[3]
    _check_size(op, q, k)
    if D % 8 or D > 256:
        raise Unsupported(
            f"[{op}] the Metal kernel takes head dims that are multiples of 8 up to 256, got {D}."
        )
    if q.shape[2] <= FEW and D % LANES == 0:
        slots = _slots(q, k, window)
        return _decode_variant(q, k, slots, softcap, key_start is not None, is_ring=False)
    given = (softcap is not None, key_start is not None, lengths is not None)
    return TileVariant(q.dtype, D, *given)


def decode_variant(
    q: mx.array,
    k_ring: mx.array,
    v_ring: mx.array,
    position: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
) -> DecodeVariant:
    op, D = "local_attention_decode", q.shape[3]
    _check_size(op, q, k_ring)
    if D % LANES or D > 256:
        raise Unsupported(
            f"[{op}] the Metal kernel takes head dims that are multiples of 32 up to 256, got {D}."
        )
    return _decode_variant(q, k_ring, window, softcap, False, is_ring=True)


def prefers_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    key_start: mx.array | None,
    lengths: mx.array | None,
) -> bool:
    """Whether all that is asked is what MLX's own attention kernels do without a mask."""
    (_, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    if softcap is not None or key_start is not None or (T > 1 and window < S):
        return False
    if T <= FEW:
        return D in _FUSED_FEW and T * H // Hkv <= _FUSED_FEW_ROWS
    return D in _FUSED_MANY


def local_attention(
    variant: TileVariant | DecodeVariant,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    key_start: mx.array | None,
    lengths: mx.array | None,
) -> mx.array:
    """`metal.local_attention` by a kernel; its gradient is the reference's, computed anew."""

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if isinstance(variant, TileVariant):
            return _launch_tiles(variant, q, k, v, scale, window, softcap, key_start, lengths)
        return _launch_decode(variant, q, k, v, scale, window, softcap, None, key_start)

    def by_reference(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return reference.local_attention(q, k, v, scale, window, softcap, key_start, None)

    return _differentiable(forward, by_reference, (q, k, v), lengths)


def local_attention_decode(
    variant: DecodeVariant,
    q: mx.array,
    k_ring: mx.array,
    v_ring: mx.array,
    position: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
) -> mx.array:
    """`metal.local_attention_decode` by a kernel; its gradient is the reference's."""

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _launch_decode(variant, q, k, v, scale, window, softcap, position, None)

    def by_reference(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return reference.local_attention_decode(q, k, v, position, scale, window, softcap)

    return _differentiable(forward, by_reference, (q, k_ring, v_ring), None)


def attention_sample(variant: TileVariant | DecodeVariant) -> tuple[Any, ...]:
    lengths = None
    if isinstance(variant, TileVariant):
        H, Hkv, T, S = 4, 2, FEW + 13, FEW + 32
        if variant.has_lengths:
            lengths = mx.array([T, T])  # what is past a length need not be equal
    else:
        H, Hkv, T, S = variant.heads, 1, 2, _sample_slots(variant)
    q, k, v = _sample_arrays(variant, (2, H, T, variant.D), (2, Hkv, S, variant.D))
    softcap = 3.0 if variant.has_softcap else None
    key_start = mx.array([0, S - 1]) if variant.has_key_start else None
    return q, k, v, variant.D**-0.5, S - 5, softcap, key_start, lengths


def decode_sample(variant: DecodeVariant) -> tuple[Any, ...]:
    slots = _sample_slots(variant)
    queries, keys = (4, variant.heads, 1, variant.D), (4, 1, slots, variant.D)
    q, k, v = _sample_arrays(variant, queries, keys)
    position = mx.array([0, slots // 2, 3 * slots + 1, -2])
    softcap = 3.0 if variant.has_softcap else None
    return q, k, v, position, variant.D**-0.5, slots, softcap


def _check_size(op: str, q: mx.array, k: mx.array) -> None:
    rows, slots = q.shape[1] * q.shape[2], k.shape[2]
    if q.size == 0 or max(q.shape[0], rows, slots) >= _MOST:
        raise Unsupported(
            f"[{op}] the Metal kernel takes 1 to 2^30 - 1 batch rows, queries of one and keys, "
            f"got q {q.shape}, k {k.shape}."
        )


def _decode_variant(
    q: mx.array,
    k: mx.array,
    slots: int,
    softcap: float | None,
    has_key_start: bool,
    *,
    is_ring: bool,
) -> DecodeVariant:
    D, group = q.shape[3], q.shape[1] // k.shape[1]
    # A thread holds D / 32 elements of each head's query and sum: about 60 registers for all heads.
    # The heads that share keys are dealt out evenly.
    most = min(8, 2560 // (D * q.dtype.size))
    parts = -(-group // most)
    return DecodeVariant(
        q.dtype, D, -(-group // parts), slots > SPLIT, is_ring, softcap is not None, has_key_start
    )


def _slots(q: mx.array, k: mx.array, window: int) -> int:
    """Keys that any of the queries sees."""
    return min(k.shape[2], q.shape[2] + window - 1)


def _score_inputs(scale: float, softcap: float | None) -> list[Any]:
    """Of `scaled_score` in kernels/attention.h."""
    if softcap is None:
        return [0.0, scale * _LOG2E]
    return [scale / softcap, softcap * _LOG2E]


def _row_input(value: mx.array | None) -> mx.array:
    return build.absent(mx.int32) if value is None else value.astype(mx.int32)


def _launch_tiles(
    variant: TileVariant,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    key_start: mx.array | None,
    lengths: mx.array | None,
) -> mx.array:
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    rows, keys = _tile(variant)
    kernel = build.kernel(
        "local_attention",
        ("q", "k", "v", "inner", "outer", "window", "key_start", "lengths"),
        ("out",),
        header="attention.h",
        ensure_row_contiguous=False,
    )
    tiles = -(-T * (H // Hkv) // rows)
    (out,) = kernel(
        inputs=[
            *(q, k, v),
            *_score_inputs(scale, softcap),
            min(window, S),
            _row_input(key_start),
            _row_input(lengths),
        ],
        template=[
            ("T", variant.dtype),
            ("D", D),
            ("BQ", rows),
            ("BK", keys),
            ("HAS_SOFTCAP", variant.has_softcap),
            ("HAS_KEY_START", variant.has_key_start),
            ("HAS_LENGTHS", variant.has_lengths),
        ],
        grid=(LANES * tiles, rows // 8 * Hkv, B),
        threadgroup=(LANES, rows // 8, 1),
        # Heads beside each other, as the output projection wants them.
        output_shapes=[(B, T, H, D)],
        output_dtypes=[variant.dtype],
    )
    return out.swapaxes(1, 2)


def _tile(variant: TileVariant) -> tuple[int, int]:
    """Rows and keys of a tile: what 32 KiB hold of both, and registers of the scores."""
    if variant.D <= 96:
        return 32, 32
    if variant.D <= 128 or variant.dtype.size == 2:
        return 32, 16
    return 16, 8


def _launch_decode(
    variant: DecodeVariant,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    position: mx.array | None,
    key_start: mx.array | None,
) -> mx.array:
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    splits = -(-(S if variant.is_ring else _slots(q, k, window)) // SPLIT)
    parts = -(-(H // Hkv) // variant.heads)
    kernel = build.kernel(
        "local_attention_decode",
        ("q", "k", "v", "inner", "outer", "window", "position", "key_start"),
        ("out", "log_totals"),
        header="attention.h",
        ensure_row_contiguous=False,
    )
    out, log_totals = kernel(
        inputs=[
            *(q, k, v),
            *_score_inputs(scale, softcap),
            min(window, S),
            _row_input(position),
            _row_input(key_start),
        ],
        template=[
            ("T", variant.dtype),
            ("O", mx.float32 if variant.is_split else variant.dtype),
            ("D", D),
            ("HG", variant.heads),
            ("SPLIT", SPLIT),
            ("IS_RING", variant.is_ring),
            ("HAS_SOFTCAP", variant.has_softcap),
            ("HAS_KEY_START", variant.has_key_start),
        ],
        grid=(LANES * splits, SIMDGROUPS * Hkv * parts, B * T),
        threadgroup=(LANES, SIMDGROUPS, 1),
        output_shapes=[(B, T, H, splits, D), (B, T, H, splits)],
        output_dtypes=[mx.float32 if variant.is_split else variant.dtype, mx.float32],
    )
    if variant.is_split:
        merge = build.kernel("local_attention_merge", ("means", "log_totals"), ("out",))
        (out,) = merge(
            inputs=[out.reshape(B * T * H, splits, D), log_totals],
            template=[("T", variant.dtype)],
            grid=(D, B * T * H, 1),
            threadgroup=(D, 1, 1),
            output_shapes=[(B, T, H, D)],
            output_dtypes=[variant.dtype],
        )
    return out.reshape(B, T, H, D).swapaxes(1, 2)


def _differentiable(
    forward: Callable[..., mx.array],
    by_reference: Callable[..., mx.array],
    arrays: Sequence[mx.array],
    lengths: mx.array | None,
) -> mx.array:
    def backward(primals: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
        if lengths is not None:  # what lies past a length says nothing, nor does its gradient
            valid = mx.arange(cotangent.shape[2]) < lengths[:, None]
            cotangent = mx.where(valid[:, None, :, None], cotangent, 0.0).astype(cotangent.dtype)
        return mx.vjp(by_reference, list(primals), [cotangent])[1]

    out: mx.array = build.differentiable(forward, backward, arrays)
    return out


def _sample_slots(variant: DecodeVariant) -> int:
    return 2 * SPLIT + 40 if variant.is_split else 21


def _sample_arrays(
    variant: TileVariant | DecodeVariant, queries: Sequence[int], keys: Sequence[int]
) -> list[mx.array]:
    # Queries and keys have one frequency: products of different ones cancel, and with scores of 0
    # neither their sign nor a softcap would count.
    return [
        (0.8 * wave(shape, mx.float32, frequency)).astype(variant.dtype)
        for frequency, shape in ((1.0, queries), (1.0, keys), (3.0, keys))
    ]
