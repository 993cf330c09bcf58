"""How the kernels of attention are launched: grids, variants, gradients, self-check cases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from metal import build, reference
from metal.dispatch import Op, Unsupported
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
    has_few_rows: bool
    """Fewer than 8, where the text reads something per row; see build.FEW_ELEMENTS."""


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
    has_few_rows: bool
    """As of a tile."""


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
    return TileVariant(q.dtype, D, *given, any(given[1:]) and q.shape[0] < build.FEW_ELEMENTS)


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
    out: mx.array = _attention(variant, scale, window, softcap)(q, k, v, key_start, lengths)
    return out


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
    out: mx.array = _decode(variant, scale, window, softcap)(q, k_ring, v_ring, position)
    return out


@lru_cache(64)  # not for ever: attention to everything has another window for every token
def _attention(
    variant: TileVariant | DecodeVariant, scale: float, window: int, softcap: float | None
) -> Callable[..., Any]:
    def forward(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        key_start: mx.array | None,
        lengths: mx.array | None,
    ) -> mx.array:
        if isinstance(variant, TileVariant):
            return _launch_tiles(variant, q, k, v, scale, window, softcap, key_start, lengths)
        return _launch_decode(variant, q, k, v, scale, window, softcap, None, key_start)

    def by_reference(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        key_start: mx.array | None,
        lengths: mx.array | None,
    ) -> mx.array:
        return reference.local_attention(q, k, v, scale, window, softcap, key_start, lengths)

    def backward(arguments: build.Arguments, cotangents: list[mx.array]) -> build.Arguments:
        lengths = arguments[4]
        if lengths is not None:  # what lies past a length says nothing, nor does its gradient
            (cotangent,) = cotangents
            valid = (mx.arange(cotangent.shape[2]) < lengths[:, None])[:, None, :, None]
            cotangents = [mx.where(valid, cotangent, mx.zeros_like(cotangent))]
        return build.gradients_of(by_reference, arguments, cotangents)

    return build.differentiable(forward, backward)


@lru_cache(64)
def _decode(
    variant: DecodeVariant, scale: float, window: int, softcap: float | None
) -> Callable[..., Any]:
    def forward(q: mx.array, k: mx.array, v: mx.array, position: mx.array) -> mx.array:
        return _launch_decode(variant, q, k, v, scale, window, softcap, position, None)

    def by_reference(q: mx.array, k: mx.array, v: mx.array, position: mx.array) -> mx.array:
        return reference.local_attention_decode(q, k, v, position, scale, window, softcap)

    return build.differentiable(forward, partial(build.gradients_of, by_reference))


def attention_sample(variant: TileVariant | DecodeVariant) -> tuple[Any, ...]:
    lengths = None
    B = 2 if variant.has_few_rows else build.FEW_ELEMENTS
    if isinstance(variant, TileVariant):
        H, Hkv, T, S = 4, 2, FEW + 13, FEW + 32
        if variant.has_lengths:
            lengths = mx.full((B,), T)  # what is past a length need not be equal
    else:
        H, Hkv, T, S = variant.heads, 1, 2, _sample_slots(variant)
    q, k, v = _sample_arrays(variant, (B, H, T, variant.D), (B, Hkv, S, variant.D))
    softcap = 3.0 if variant.has_softcap else None
    key_start = mx.arange(B) % 2 * (S - 1) if variant.has_key_start else None
    return q, k, v, variant.D**-0.5, S - 5, softcap, key_start, lengths


def decode_sample(variant: DecodeVariant) -> tuple[Any, ...]:
    slots = _sample_slots(variant)
    position = mx.array([0, slots // 2, 3 * slots + 1, -2] * (1 if variant.has_few_rows else 2))
    B = position.size
    queries, keys = (B, variant.heads, 1, variant.D), (B, 1, slots, variant.D)
    q, k, v = _sample_arrays(variant, queries, keys)
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
        *(q.dtype, D, -(-group // parts), slots > SPLIT, is_ring, softcap is not None),
        has_key_start,
        (is_ring or has_key_start) and q.shape[0] < build.FEW_ELEMENTS,
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
    """What is said of rows is indexed as it lies in memory, unlike q, k and v."""
    return build.optional(None if value is None else mx.contiguous(value), mx.int32)


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


LOCAL_ATTENTION = Op(
    "local_attention",
    *(reference.local_attention, local_attention, attention_variant, attention_sample),
    prefers_reference=prefers_reference,
)
LOCAL_ATTENTION_DECODE = Op(
    "local_attention_decode",
    *(reference.local_attention_decode, local_attention_decode, decode_variant, decode_sample),
)
