"""Checks of arguments; a ValueError names the op, what it expected and what it got."""

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def check_sequence(op: str, name: str, x: mx.array) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"[{op}] expected {name} [B, T, E] with T >= 1, got {x.shape}.")
    if x.dtype not in FLOATS:
        raise ValueError(f"[{op}] expected {name} float32, float16 or bfloat16, got {x.dtype}.")


def check_like(op: str, name: str, value: mx.array, x: mx.array) -> None:
    if value.shape != x.shape or value.dtype != x.dtype:
        raise ValueError(
            f"[{op}] expected {name} {x.shape} of {x.dtype}, got {value.shape} of {value.dtype}."
        )


def check_vector(op: str, name: str, value: mx.array, x: mx.array) -> None:
    if value.shape != x.shape[2:] or value.dtype not in FLOATS:
        raise ValueError(
            f"[{op}] expected {name} {x.shape[2:]} floating, got {value.shape} of {value.dtype}."
        )


def check_rows(
    op: str,
    x: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> None:
    B, T, E = x.shape
    if h0 is not None and (h0.shape != (B, E) or h0.dtype != mx.float32):
        raise ValueError(f"[{op}] expected h0 ({B}, {E}) of float32, got {h0.shape} of {h0.dtype}.")
    if lengths is not None and (
        lengths.shape != (B,) or not mx.issubdtype(lengths.dtype, mx.integer)
    ):
        raise ValueError(
            f"[{op}] expected lengths ({B},) integer, got {lengths.shape} of {lengths.dtype}."
        )
    if reset is not None and (reset.shape != (B, T) or reset.dtype != mx.bool_):
        raise ValueError(
            f"[{op}] expected reset ({B}, {T}) of bool, got {reset.shape} of {reset.dtype}."
        )
