"""Contracts of causal sliding-window attention, over a sequence and over a ring of cached keys."""

import mlx.core as mx

from metal.arguments import FLOATS
from metal.attention_kernel import LOCAL_ATTENTION, LOCAL_ATTENTION_DECODE
from metal.dispatch import Backend


def local_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    window: int,
    softcap: float | None = None,
    key_start: mx.array | None = None,
    lengths: mx.array | None = None,
    backend: Backend = "auto",
) -> mx.array:
    """Causal attention in which every query sees at most `window` keys, its own included.

    Key j is visible to query i iff key_start[b] <= j and 0 <= i - j < window, both counted in the S
    keys; the last T keys are the queries' own. A query before its row's key_start sees only itself,
    so that padding stays finite.

    Args:
        q: Queries, [B, H, T, D], float32, float16 or bfloat16.
        k: Keys, [B, Hkv, S, D] with S >= T and Hkv dividing H, dtype of q.
        v: Values, shape and dtype of k.
        scale: Multiplies q.k before everything else.
        window: Keys a query sees, >= 1.
        softcap: If given, scores become softcap * tanh(score / softcap) before the mask.
        key_start: First valid key of each row (left padding), [B], integer; 0 if None.
        lengths: Valid leading queries of each row (right padding), [B], integer; T if None.
        backend: "auto" takes a Metal kernel on an Apple GPU (see `dispatch.py`), unless MLX's own
            attention does all that is asked; "metal" insists on ours, "reference" on plain MLX.

    Returns:
        [B, H, T, D] in q.dtype; rows past a length are finite and unspecified.

    Raises:
        ValueError: a shape or dtype is not as above, window or softcap is not positive, or the
            backend is "metal" and its kernels cannot take the arguments.
        RuntimeError: the backend is "metal" and there is no Apple GPU.

    Softmax in float32. The kernels hold no score matrix; plain MLX holds at most one of
    block x (window + block).
    """
    _check("local_attention", q, k, v, window, softcap)
    if k.shape[2] < q.shape[2]:
        raise ValueError(
            f"[local_attention] expected at least T = {q.shape[2]} keys, got {k.shape[2]}."
        )
    for name, value in (("key_start", key_start), ("lengths", lengths)):
        if value is not None:
            _check_row_integers("local_attention", name, value, q.shape[0])
    arguments = (q, k, v, scale, int(window), softcap, key_start, lengths)
    out: mx.array = LOCAL_ATTENTION(backend, *arguments)
    return out


def local_attention_decode(
    q: mx.array,
    k_ring: mx.array,
    v_ring: mx.array,
    *,
    position: mx.array,
    scale: float,
    window: int,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> mx.array:
    """One query per row against a ring of its last `window` keys, called after the write.

    The key of absolute position p lies in slot p % window; slots above a row's position have not
    been written yet and are not visible.

    Args:
        q: Queries, [B, H, 1, D], float32, float16 or bfloat16.
        k_ring: Keys, [B, Hkv, window, D] with Hkv dividing H, dtype of q.
        v_ring: Values, shape and dtype of k_ring.
        position: Absolute position of each row's query, [B], integer; rows may differ.
        scale: Multiplies q.k before everything else.
        window: Slots of the ring, >= 1.
        softcap: If given, scores become softcap * tanh(score / softcap) before the mask.
        backend: "auto" takes the Metal kernel on an Apple GPU; "metal" insists on it, "reference"
            on plain MLX.

    Returns:
        [B, H, 1, D] in q.dtype. A row with a negative position (padding) sees one slot, position %
        window, so that it stays finite.

    Raises:
        As `local_attention`.

    Softmax in float32. The kernel does not read slots that are not visible.
    """
    _check("local_attention_decode", q, k_ring, v_ring, window, softcap)
    if q.shape[2] != 1:
        raise ValueError(f"[local_attention_decode] expected q [B, H, 1, D], got {q.shape}.")
    if k_ring.shape[2] != window:
        raise ValueError(
            f"[local_attention_decode] expected rings of {window} slots, got {k_ring.shape[2]}."
        )
    _check_row_integers("local_attention_decode", "position", position, q.shape[0])
    arguments = (q, k_ring, v_ring, position, scale, int(window), softcap)
    out: mx.array = LOCAL_ATTENTION_DECODE(backend, *arguments)
    return out


def _check(
    op: str, q: mx.array, k: mx.array, v: mx.array, window: int, softcap: float | None
) -> None:
    if q.ndim != 4 or q.shape[2] < 1:
        raise ValueError(f"[{op}] expected q [B, H, T, D] with T >= 1, got {q.shape}.")
    if q.dtype not in FLOATS:
        raise ValueError(f"[{op}] expected q float32, float16 or bfloat16, got {q.dtype}.")
    B, H, _, D = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[3] != D or k.dtype != q.dtype:
        raise ValueError(
            f"[{op}] expected k [{B}, Hkv, S, {D}] of {q.dtype}, got {k.shape} of {k.dtype}."
        )
    if k.shape[1] < 1 or H % k.shape[1] != 0:
        raise ValueError(f"[{op}] expected key heads that divide {H}, got {k.shape[1]}.")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"[{op}] expected v {k.shape} of {k.dtype}, got {v.shape} of {v.dtype}.")
    if window < 1:
        raise ValueError(f"[{op}] expected window >= 1, got {window}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"[{op}] expected softcap > 0 or None, got {softcap}.")


def _check_row_integers(op: str, name: str, value: mx.array, rows: int) -> None:
    if value.shape != (rows,) or not mx.issubdtype(value.dtype, mx.integer):
        raise ValueError(
            f"[{op}] expected {name} ({rows},) integer, got {value.shape} of {value.dtype}."
        )
