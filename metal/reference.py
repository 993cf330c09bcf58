"""Every op in plain mlx.core: the definition of correct, and the path off Apple GPUs.

Arguments are validated by the callers in `linear_scan.py` and `local_attention.py`; the docstrings
there are the contract. What is decided here is only how to compute it: how the scan avoids an
operation per token, and attention a T x T score matrix.
"""

from functools import partial

import mlx.core as mx

RG_LRU_C = 8.0
"""Griffin's constant c: log a = -c * sigmoid(recurrent gate) * softplus(recurrent_param)."""

_FEW_TOKENS = 8  # from there on chunks take fewer operations than steps

# Queries per block of the windowed attention: the score matrix of one block is at most
# _QUERY_BLOCK x (window + _QUERY_BLOCK - 1), and what lies after a block's last query is never
# computed. A model's prefill of 512 tokens is up to 9 % faster with 128 than with 256, no faster
# with 64 (two x86-64 cores).
_QUERY_BLOCK = 128


def linear_scan(
    x: mx.array, a: mx.array, h0: mx.array | None, lengths: mx.array | None, reset: mx.array | None
) -> tuple[mx.array, mx.array]:
    """See `metal.linear_scan`."""
    dtype = x.dtype
    x, a = x.astype(mx.float32), a.astype(mx.float32)
    if reset is not None:
        a = mx.where(reset[..., None], 0.0, a)
    if lengths is not None:
        x, a = _freeze_after(x, a, lengths)
    y, h_last = _scan_float32(x, a, h0)
    return y.astype(dtype), h_last


def rg_lru(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    h0: mx.array | None,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """See `metal.rg_lru`."""
    dtype = x.dtype
    if x.shape[1] == 1 and h0 is not None and lengths is None:
        starts = None if reset is None else reset[..., None]
        y = _gated_step(x, input_gate, recurrent_gate, recurrent_param, starts, h0[:, None])
        return y.astype(dtype), y[:, 0]
    gated, a = rg_lru_gates(x, input_gate, recurrent_gate, recurrent_param, reset)
    if lengths is not None:
        gated, a = _freeze_after(gated, a, lengths)
    y, h_last = _scan_float32(gated, a, h0)
    return y.astype(dtype), h_last


def rg_lru_gates(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """What remains of the RG-LRU is a scan: its input and its decay, [B, T, E] float32."""
    starts = None if reset is None else reset[..., None]
    return _gates(x, input_gate, recurrent_gate, _softplus(recurrent_param), starts)


def block_rg_lru(
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
    """See `metal.block_rg_lru`."""
    gates = (
        block_gate(x, input_weight, input_bias),
        block_gate(x, recurrent_weight, recurrent_bias),
    )
    return rg_lru(x, *gates, recurrent_param, h0, lengths, reset)


def gate_blocks(x: mx.array, heads: int) -> mx.array:
    """x [B, T, E] as [B, heads, T, E / heads]."""
    B, T, E = x.shape
    return x.reshape(B, T, heads, E // heads).swapaxes(1, 2)


def block_gate(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Pre-activation of a block-diagonal gate, [B, T, E]."""
    gate = gate_blocks(x, weight.shape[0]) @ weight + bias[:, None]
    return gate.swapaxes(1, 2).reshape(x.shape)


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x.astype(mx.float32), 0.0)


def _gated(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    softplus: mx.array,
    starts: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """The gated input, scaled, and the decay, both float32."""
    log_a = mx.sigmoid(recurrent_gate.astype(mx.float32)) * (-RG_LRU_C * softplus)
    # a - 1 keeps the digits that a loses when it is close to 1, and 1 - a^2 needs them.
    below = mx.expm1(log_a)
    a = 1.0 + below
    # At a = 1 the root's slope is infinite, and times the zero slope of what is below it the
    # gradient would be NaN.
    multiplier = mx.sqrt(mx.maximum(below * (-2.0 - below), 1e-30))
    if starts is not None:
        a = mx.where(starts, 0.0, a)
        multiplier = mx.where(starts, 1.0, multiplier)
    gated = x.astype(mx.float32) * mx.sigmoid(input_gate.astype(mx.float32)) * multiplier
    return gated, a


_gates = mx.compile(_gated, shapeless=True)


@mx.compile
def _gated_step(
    x: mx.array,
    input_gate: mx.array,
    recurrent_gate: mx.array,
    recurrent_param: mx.array,
    starts: mx.array | None,
    h: mx.array,
) -> mx.array:
    gated, a = _gated(x, input_gate, recurrent_gate, _softplus(recurrent_param), starts)
    return a * h + gated


def causal_conv1d(
    u: mx.array,
    weight: mx.array,
    bias: mx.array,
    state: mx.array,
    lengths: mx.array | None,
    reset: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """See `metal.causal_conv1d`."""
    T, K = u.shape[1], weight.shape[1]
    padded = mx.concatenate([state, u], axis=1)  # [B, K-1+T, E]
    w = weight.astype(mx.float32)
    if T == 1 and lengths is None and reset is None:
        y = (padded.astype(mx.float32) * w.T).sum(axis=1, keepdims=True) + bias.astype(mx.float32)
        return y.astype(u.dtype), padded[:, 1:]
    segment = None
    if reset is not None:
        # Two positions belong to one sequence iff no reset lies between them.
        counts = mx.cumsum(reset.astype(mx.int32), axis=1)
        segment = mx.pad(counts, [(0, 0), (K - 1, 0)])  # [B, K-1+T]

    y = bias.astype(mx.float32)
    for tap in range(K):
        values = padded[:, tap : tap + T].astype(mx.float32)
        if segment is not None and tap < K - 1:
            same = segment[:, tap : tap + T] == segment[:, K - 1 :]
            values = mx.where(same[..., None], values, 0.0)
        y = y + w[:, tap] * values

    if K == 1:
        return y.astype(u.dtype), state
    if lengths is None:
        tail = padded[:, T:]
        inside = None if segment is None else segment[:, T:] == segment[:, -1:]
    else:
        ends = mx.clip(lengths.astype(mx.int32), 0, T)
        index = ends[:, None] + mx.arange(K - 1)  # [B, K-1]
        tail = mx.take_along_axis(padded, index[..., None], axis=1)
        inside = None
        if segment is not None:
            # One more gather for the segment the next token continues: that of the last valid one.
            last = mx.take_along_axis(segment, index[:, :1] + (K - 2), axis=1)
            inside = mx.take_along_axis(segment, index, axis=1) == last
    if inside is not None:
        tail = mx.where(inside[..., None], tail, mx.zeros_like(tail))
    return y.astype(u.dtype), tail


def rms_norm_1p(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """See `metal.rms_norm_1p`."""
    # Off Apple GPUs the norm is a dozen operations. Fused they are faster for one token, whose
    # time goes into starting them, and slower for many: compiled code there is not vectorised.
    is_step = x.ndim == 1 or x.shape[-2] == 1
    return (_rms_norm_1p_step if is_step else _rms_norm_1p)(x, weight, eps)


def _rms_norm_1p(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, 1.0 + weight.astype(mx.float32), eps).astype(x.dtype)


_rms_norm_1p_step = mx.compile(_rms_norm_1p)


def local_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
    key_start: mx.array | None,
    lengths: mx.array | None,
) -> mx.array:
    """See `metal.local_attention`; causality keeps a padded tail harmless without `lengths`."""
    T, S = q.shape[2], k.shape[2]
    is_plain = softcap is None and key_start is None and window >= S and q.shape[3] <= 128
    if is_plain and mx.default_device().type == mx.DeviceType.gpu:
        # There MLX's own attention, up to that head dim, holds no scores and skips what is after a
        # query.
        return _attention(q, k, v, scale, None, "causal" if T > 1 else None)
    blocks = []
    for begin in range(0, T, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, T)
        first_query, last_query = S - T + begin, S - T + end - 1
        first_key = max(0, first_query - window + 1)
        keys = slice(first_key, last_query + 1)
        mask: mx.array | str | None
        if key_start is None and last_query - first_key < window:
            mask = "causal" if end - begin > 1 else None
        else:
            mask = _window_mask(first_query, last_query, first_key, window, key_start)
        block = _attention(q[:, :, begin:end], k[:, :, keys], v[:, :, keys], scale, softcap, mask)
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def local_attention_decode(
    q: mx.array,
    k_ring: mx.array,
    v_ring: mx.array,
    position: mx.array,
    scale: float,
    window: int,
    softcap: float | None,
) -> mx.array:
    """See `metal.local_attention_decode`."""
    slots = mx.arange(window)
    here = position.astype(mx.int32)[:, None]
    # The query's own slot is always visible, so that a padding row (position < 0) stays finite.
    visible = (slots <= here) | (slots == here % window)  # [B, W]
    return _attention(q, k_ring, v_ring, scale, softcap, visible[:, None, None, :])


def _freeze_after(x: mx.array, a: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """Make every step at or past a row's length the identity, so that the state stays as it was."""
    valid = (mx.arange(x.shape[1]) < lengths[:, None])[..., None]
    return mx.where(valid, x, 0.0), mx.where(valid, a, 1.0)


def _scan_float32(x: mx.array, a: mx.array, h0: mx.array | None) -> tuple[mx.array, mx.array]:
    """Scan in two levels, about sqrt(T) chunks side by side.

    First what each chunk does to a state, then, by a scan over the chunks, the state that each one
    starts from, then the chunks again from there: some 6 sqrt(T) operations, and no copy but of the
    result. Only products of decays are formed, never quotients, so a decay of 0 cuts the history
    and a decay of 1 keeps it, both exactly.
    """
    B, T, E = x.shape
    h = mx.zeros((B, 1, E), dtype=mx.float32) if h0 is None else h0[:, None]
    if T <= _FEW_TOKENS:
        return _scan_steps(x, a, h)
    length = 1 << (T.bit_length() - 1) // 2
    chunks = T // length
    whole = chunks * length

    def steps(values: mx.array) -> list[mx.array]:
        """Token i of every chunk, [B, chunks, 1, E], for each i."""
        return list(mx.split(values[:, :whole].reshape(B, chunks, length, E), length, axis=2))

    xs, decays = steps(x), steps(a)
    end, decay = xs[0], decays[0]
    for x_t, a_t in zip(xs[1:], decays[1:], strict=True):
        end, decay = a_t * end + x_t, a_t * decay

    after, _ = _scan_float32(end.squeeze(2), decay.squeeze(2), h0)
    state = mx.concatenate([h, after[:, :-1]], axis=1)[:, :, None]
    ys = []
    for x_t, a_t in zip(xs, decays, strict=True):
        state = a_t * state + x_t
        ys.append(state)
    y = mx.concatenate(ys, axis=2).reshape(B, whole, E)
    if whole == T:
        return y, after[:, -1]
    rest, h_last = _scan_float32(x[:, whole:], a[:, whole:], after[:, -1])
    return mx.concatenate([y, rest], axis=1), h_last


def _scan_steps(x: mx.array, a: mx.array, h: mx.array) -> tuple[mx.array, mx.array]:
    """The same token by token, from a state h [B, 1, E]."""
    T = x.shape[1]
    ys = []
    for x_t, a_t in zip(mx.split(x, T, axis=1), mx.split(a, T, axis=1), strict=True):
        h = a_t * h + x_t
        ys.append(h)
    return (ys[0] if T == 1 else mx.concatenate(ys, axis=1)), h[:, 0]


def _window_mask(
    first_query: int, last_query: int, first_key: int, window: int, key_start: mx.array | None
) -> mx.array:
    query = mx.arange(first_query, last_query + 1)[:, None]
    key = mx.arange(first_key, last_query + 1)
    mask = (key <= query) & (key > query - window)  # [T, S]
    if key_start is None:
        return mask
    # A padding query sees only itself: softmax over nothing would be NaN and spread from there.
    return (mask & (key >= key_start[:, None, None, None])) | (key == query)


@partial(mx.compile, shapeless=True)
def _softcapped(scores: mx.array, cap: float) -> mx.array:
    return mx.tanh(scores / cap) * cap


def _attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    softcap: float | None,
    mask: mx.array | str | None,
) -> mx.array:
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    B, H, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    if isinstance(mask, str):
        mask = _window_mask(S - T, S - 1, 0, S, None)
    grouped = (q * scale).reshape(B, Hkv, H // Hkv, T, D)
    scores = (grouped @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = _softcapped(scores, softcap)
    if mask is not None:
        # The mask is [T, S] or [B, 1, T, S]; the second needs an axis for the query groups.
        mask = mask if mask.ndim == 2 else mask[:, None]
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    weights = mx.softmax(scores, axis=-1).astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(B, H, T, v.shape[-1])
