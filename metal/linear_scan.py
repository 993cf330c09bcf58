"""Contracts of the recurrence: diagonal scan, its gated form, and that with its gates."""

import mlx.core as mx

from metal.arguments import check_like, check_rows, check_sequence, check_vector
from metal.dispatch import Backend
from metal.scan_kernel import BLOCK_RG_LRU, LINEAR_SCAN, RG_LRU


def linear_scan(
    x: mx.array,
    a: mx.array,
    h0: mx.array | None = None,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array, mx.array]:
    """Diagonal linear recurrence h[t] = a[t] * h[t-1] + x[t], y = h.

    Args:
        x: Input, [B, T, E], float32, float16 or bfloat16; T >= 1.
        a: Decay in [0, 1], same shape and dtype as x.
        h0: State before x[:, 0], [B, E], float32; zeros if None.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; where true the state is dropped before that token (a counts as 0).
        backend: "auto" takes the Metal kernel on an Apple GPU (see `dispatch.py`); "metal" insists
            on it, "reference" on plain MLX.

    Returns:
        y [B, T, E] in x.dtype, finite and unspecified past a row's length; h_last [B, E], float32,
        the state after the last valid token. Feeding h_last back as h0 continues the sequence.

    Raises:
        ValueError: a shape or dtype is not as above, or the backend is "metal" and its kernel
            cannot take the arguments.
        RuntimeError: the backend is "metal" and there is no Apple GPU.

    Accumulates in float32 whatever the input. Source: Griffin, arXiv:2402.19427, equation 4.
    """
    check_sequence("linear_scan", "x", x)
    check_like("linear_scan", "a", a, x)
    check_rows("linear_scan", x, h0, lengths, reset)
    y, h_last = LINEAR_SCAN(backend, x, a, h0, lengths, reset)
    return y, h_last


def rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None = None,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array, mx.array]:
    """Real-gated linear recurrent unit, gates and recurrence in one.

    With r = sigmoid(recurrent_gate) and i = sigmoid(input_gate), all per channel:
    log a = -8 * r * softplus(recurrent_param),
    h[t] = a * h[t-1] + sqrt(1 - a^2) * (i * x[t]), y = h.
    At a reset the history is dropped and the input is not scaled down: h[t] = i * x[t].

    Args:
        x: Input, [B, T, E], float32, float16 or bfloat16; T >= 1.
        input_gate: Pre-activation of i, same shape and dtype as x.
        recurrent_gate: Pre-activation of r, same shape and dtype as x.
        recurrent_param: [E], any floating dtype.
        h0: State before x[:, 0], [B, E], float32; zeros if None.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; true at the first token of a sequence.
        backend: As in `linear_scan`.

    Returns:
        y [B, T, E] in x.dtype, finite and unspecified past a row's length; h_last [B, E], float32.

    Raises:
        ValueError: a shape or dtype is not as above.
        RuntimeError: as `linear_scan`.

    Gates, decay, multiplier and state are float32. The multiplier is sqrt(-expm1(2 log a)).
    Source: Griffin, arXiv:2402.19427, equations 1 to 4.
    """
    check_sequence("rg_lru", "x", x)
    check_like("rg_lru", "input_gate", input_gate, x)
    check_like("rg_lru", "recurrent_gate", recurrent_gate, x)
    check_vector("rg_lru", "recurrent_param", recurrent_param, x)
    check_rows("rg_lru", x, h0, lengths, reset)
    gates = (input_gate, recurrent_gate, recurrent_param)
    y, h_last = RG_LRU(backend, x, *gates, h0, lengths, reset)
    return y, h_last


def block_rg_lru(
    x: mx.array,
    input_weight: mx.array,
    input_bias: mx.array,
    recurrent_weight: mx.array,
    recurrent_bias: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None = None,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array, mx.array]:
    """`rg_lru` with its gates, which are block-diagonal linears of x, one block per head.

    With D = E / heads, the pre-activation of a gate is x, [B, T, heads, D], times weight
    [heads, D, D], a row per input, plus bias [heads, D].

    Args:
        x: Input, [B, T, E], float32, float16 or bfloat16; T >= 1.
        input_weight: Of the input gate, [heads, D, D], dtype of x.
        input_bias: [heads, D], dtype of x.
        recurrent_weight: Of the recurrent gate, [heads, D, D], dtype of x.
        recurrent_bias: [heads, D], dtype of x.
        recurrent_param: [E], any floating dtype.
        h0: State before x[:, 0], [B, E], float32; zeros if None.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; true at the first token of a sequence.
        backend: As in `linear_scan`.

    Returns:
        As `rg_lru`.

    Raises:
        ValueError: a shape or dtype is not as above.
        RuntimeError: as `linear_scan`.

    The Metal kernel of one token adds the products up in float32; else they are rounded to the
    dtype of x. Source: Griffin, arXiv:2402.19427, equations 1 to 4.
    """
    check_sequence("block_rg_lru", "x", x)
    E = x.shape[2]
    heads = input_weight.shape[0] if input_weight.ndim == 3 else 0
    if heads < 1 or E % heads:
        raise ValueError(
            f"[block_rg_lru] expected input_weight [heads, D, D] with heads x D = {E}, "
            f"got {input_weight.shape}."
        )
    shapes = {"weight": (heads, E // heads, E // heads), "bias": (heads, E // heads)}
    gates = {
        "input_weight": input_weight,
        "input_bias": input_bias,
        "recurrent_weight": recurrent_weight,
        "recurrent_bias": recurrent_bias,
    }
    for name, value in gates.items():
        shape = shapes[name.rpartition("_")[2]]
        if value.shape != shape or value.dtype != x.dtype:
            raise ValueError(
                f"[block_rg_lru] expected {name} {shape} of {x.dtype}, "
                f"got {value.shape} of {value.dtype}."
            )
    check_vector("block_rg_lru", "recurrent_param", recurrent_param, x)
    check_rows("block_rg_lru", x, h0, lengths, reset)
    arguments = (x, *gates.values(), recurrent_param, h0, lengths, reset)
    y, h_last = BLOCK_RG_LRU(backend, *arguments)
    return y, h_last
