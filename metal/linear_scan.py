"""Contracts of the recurrent block: diagonal scan, its gated form, the convolution before it."""

import mlx.core as mx

from metal import reference

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def linear_scan(
    x: mx.array,
    a: mx.array,
    h0: mx.array | None = None,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Diagonal linear recurrence h[t] = a[t] * h[t-1] + x[t], y = h.

    Args:
        x: Input, [B, T, E], float32, float16 or bfloat16; T >= 1.
        a: Decay in [0, 1], same shape and dtype as x.
        h0: State before x[:, 0], [B, E], float32; zeros if None.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; where true the state is dropped before that token (a counts as 0).

    Returns:
        y [B, T, E] in x.dtype, finite and unspecified past a row's length; h_last [B, E], float32,
        the state after the last valid token. Feeding h_last back as h0 continues the sequence.

    Raises:
        ValueError: a shape or dtype is not as above.

    Accumulates in float32 whatever the input. Source: Griffin, arXiv:2402.19427, equation 4.
    """
    _check_sequence("linear_scan", "x", x)
    _check_like("linear_scan", "a", a, x)
    _check_rows("linear_scan", x, h0, lengths, reset)
    return reference.linear_scan(x, a, h0, lengths, reset)


def rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None = None,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
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

    Returns:
        y [B, T, E] in x.dtype, finite and unspecified past a row's length; h_last [B, E], float32.

    Raises:
        ValueError: a shape or dtype is not as above.

    Gates, decay, multiplier and state are float32. The multiplier is sqrt(-expm1(2 log a)).
    Source: Griffin, arXiv:2402.19427, equations 1 to 4.
    """
    _check_sequence("rg_lru", "x", x)
    _check_like("rg_lru", "input_gate", input_gate, x)
    _check_like("rg_lru", "recurrent_gate", recurrent_gate, x)
    _check_vector("rg_lru", "recurrent_param", recurrent_param, x)
    _check_rows("rg_lru", x, h0, lengths, reset)
    return reference.rg_lru(x, input_gate, recurrent_gate, recurrent_param, h0, lengths, reset)


def causal_conv1d(
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution y[t] = bias + sum over k of weight[:, k] * u[t - K + 1 + k].

    Args:
        u: Input, [B, T, E], float32, float16 or bfloat16; T = 1 is the decode step.
        weight: [E, K]; the last tap multiplies the current token.
        bias: [E].
        state: The K - 1 inputs before u, oldest first, [B, K-1, E], dtype of u; zeros at a start.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; a token at or after a reset sees zeros in place of what came before it.

    Returns:
        y [B, T, E] in u.dtype, finite and unspecified past a row's length; the state that continues
        each row after its last valid token, [B, K-1, E].

    Raises:
        ValueError: a shape or dtype is not as above.

    Accumulates in float32.
    """
    _check_sequence("causal_conv1d", "u", u)
    B, _, E = u.shape
    if weight.ndim != 2 or weight.shape[0] != E or weight.shape[1] < 1:
        raise ValueError(f"[causal_conv1d] expected weight [{E}, K], got {weight.shape}.")
    _check_vector("causal_conv1d", "bias", bias, u)
    expected = (B, weight.shape[1] - 1, E)
    if state.shape != expected or state.dtype != u.dtype:
        raise ValueError(
            f"[causal_conv1d] expected state {expected} of {u.dtype}, "
            f"got {state.shape} of {state.dtype}."
        )
    _check_rows("causal_conv1d", u, None, lengths, reset)
    return reference.causal_conv1d(u, weight, bias, state, lengths, reset)


def _check_sequence(op: str, name: str, x: mx.array) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"[{op}] expected {name} [B, T, E] with T >= 1, got {x.shape}.")
    if x.dtype not in _FLOATS:
        raise ValueError(f"[{op}] expected {name} float32, float16 or bfloat16, got {x.dtype}.")


def _check_like(op: str, name: str, value: mx.array, x: mx.array) -> None:
    if value.shape != x.shape or value.dtype != x.dtype:
        raise ValueError(
            f"[{op}] expected {name} {x.shape} of {x.dtype}, got {value.shape} of {value.dtype}."
        )


def _check_vector(op: str, name: str, value: mx.array, x: mx.array) -> None:
    if value.shape != x.shape[2:] or value.dtype not in _FLOATS:
        raise ValueError(
            f"[{op}] expected {name} {x.shape[2:]} floating, got {value.shape} of {value.dtype}."
        )


def _check_rows(
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
