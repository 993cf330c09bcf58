"""Contract of the convolution before the recurrence."""

import mlx.core as mx

from metal.arguments import FLOATS, check_rows, check_sequence, check_vector
from metal.conv_kernel import CAUSAL_CONV1D
from metal.dispatch import Backend


def causal_conv1d(
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    *,
    lengths: mx.array | None = None,
    reset: mx.array | None = None,
    backend: Backend = "auto",
) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution y[t] = bias + sum over k of weight[:, k] * u[t - K + 1 + k].

    Args:
        u: Input, [B, T, E], float32, float16 or bfloat16; T = 1 is the decode step.
        weight: [E, K], any floating dtype; the last tap multiplies the current token.
        bias: [E], any floating dtype.
        state: The K - 1 inputs before u, oldest first, [B, K-1, E], dtype of u; zeros at a start.
        lengths: Valid leading tokens of each row (right padding), [B], integer; T if None.
        reset: [B, T] bool; a token at or after a reset sees zeros in place of what came before it.
        backend: As in `linear_scan`.

    Returns:
        y [B, T, E] in u.dtype, unspecified past a row's length and finite if u is; the state that
        continues each row after its last valid token, [B, K-1, E].

    Raises:
        ValueError: a shape or dtype is not as above, or the backend is "metal" and its kernel
            cannot take the arguments: K = 1, K > 8 or an empty u.
        RuntimeError: as `linear_scan`.

    Accumulates in float32.
    """
    check_sequence("causal_conv1d", "u", u)
    B, _, E = u.shape
    is_matrix = weight.ndim == 2 and weight.shape[0] == E and weight.shape[1] >= 1
    if not is_matrix or weight.dtype not in FLOATS:
        raise ValueError(
            f"[causal_conv1d] expected weight [{E}, K] floating, "
            f"got {weight.shape} of {weight.dtype}."
        )
    check_vector("causal_conv1d", "bias", bias, u)
    expected = (B, weight.shape[1] - 1, E)
    if state.shape != expected or state.dtype != u.dtype:
        raise ValueError(
            f"[causal_conv1d] expected state {expected} of {u.dtype}, "
            f"got {state.shape} of {state.dtype}."
        )
    check_rows("causal_conv1d", u, None, lengths, reset)
    y, tail = CAUSAL_CONV1D(backend, u, weight, bias, state, lengths, reset)
    return y, tail
