"""What the decoders share: the terms of one forward call, and attention under them.

The plain case runs through MLX's fused attention or `metal.local_attention`. A call that asks for
the attention weights, packs several documents in a row or lets tokens look ahead is computed with
an explicit mask instead; in float32 both give the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal import local_attention, local_attention_decode
from mlxmodels.cache import LayerState, WindowCache
from mlxmodels.full_cache import FullCache
from mlxmodels.linear import Linear


@dataclass
class Call:
    """What one forward call says to every layer, and what it collects from them."""

    inputs_embeds: mx.array | None = None
    """[B, T, hidden_size], in place of token ids."""
    position_ids: mx.array | None = None
    """[B, T] integer; None: every row goes on from its state's offset."""
    documents: mx.array | None = None
    """[B, T] integer, the packed document each token belongs to; documents do not see each other.
    Only without states."""
    valid: mx.array | None = None
    """[B, T] bool, false on padding; for attention in both directions, which has no states."""
    hidden_states: list[mx.array] | None = None
    """If a list, the input of every layer and the normed output of the last are appended to it."""
    attentions: list[mx.array] | None = None
    """If a list, the weights [B, H, T, S] of every attention layer are appended to it."""
    _mask: mx.array | str | None = field(default=None, init=False)
    _has_mask: bool = field(default=False, init=False)

    def positions(self, state: LayerState | None) -> int | mx.array:
        """Position of the first token, one number or one per row [B], or of all tokens [B, T]."""
        if self.position_ids is not None:
            return self.position_ids
        return 0 if state is None else state.offset

    @property
    def is_explicit(self) -> bool:
        """Whether attention must be computed with a mask of its own and its weights seen."""
        return self.attentions is not None or self.documents is not None

    def mask(self, cache: FullCache, T: int) -> mx.array | str | None:
        """The growing caches' mask, made once: they move together."""
        if not self._has_mask:
            self._mask, self._has_mask = cache.make_mask(T), True
        return self._mask

    def run(
        self, layers: Sequence[nn.Module], norm: nn.Module, x: mx.array, cache: Any
    ) -> mx.array:
        """x [B, T, hidden_size] through every layer and the last norm; advances the states."""
        for i, layer in enumerate(layers):
            self._see(x)
            x = layer(x, None if cache is None else cache[i], self)
        for state in cache or ():
            state.advance(x.shape[1])
        x = norm(x)
        self._see(x)
        return x

    def _see(self, x: mx.array) -> None:
        if self.hidden_states is not None:
            self.hidden_states.append(x)


class GroupedQueryProjections(nn.Module):
    """Linears of grouped-query attention under the names that most families give them."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        output_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, key_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, key_heads * head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = Linear(heads * head_dim, hidden_size, bias=output_bias)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, H, T, D], keys and values [B, Hkv, T, D] of x [B, T, hidden_size]."""
        return (
            split_heads(self.q_proj(x), self.head_dim),
            split_heads(self.k_proj(x), self.head_dim),
            split_heads(self.v_proj(x), self.head_dim),
        )


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """[B, T, heads * D] to [B, heads, T, D]."""
    B, T, _ = x.shape
    return x.reshape(B, T, -1, head_dim).swapaxes(1, 2)


def full_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cache: FullCache | None,
    call: Call,
    *,
    scale: float,
    softcap: float | None = None,
    bidirectional: bool = False,
) -> mx.array:
    """Attention to everything before, or around if bidirectional.

    Args:
        q: [B, H, T, D].
        k, v: All keys and values of the sequence, as `cache.update` returned them, [B, Hkv, S, D].
        cache: The state they come from; None for a whole sequence.

    Returns:
        [B, T, H * D].
    """
    T, S = q.shape[2], k.shape[2]
    key_start = None
    if cache is not None and any(cache.starts):
        key_start = mx.array(cache.starts)
    if bidirectional or call.is_explicit:
        mask = _explicit_mask(T, S, None, key_start, call, bidirectional)
        out = _explicit_attention(q, k, v, scale, softcap, mask, call)
    elif softcap is not None or (T > 1 and mx.default_device().type == mx.DeviceType.cpu):
        # MLX's own is no kernel on a CPU: it computes every score and masks half of them.
        out = local_attention(q, k, v, scale=scale, window=S, softcap=softcap, key_start=key_start)
    else:
        plain = "causal" if T > 1 else None
        fused_mask = plain if cache is None else call.mask(cache, T)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=fused_mask)
    return _merge_heads(out)


def window_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cache: WindowCache | None,
    call: Call,
    *,
    scale: float,
    window: int,
    softcap: float | None = None,
    bidirectional: bool = False,
) -> mx.array:
    """Attention to the `window` last keys, a token's own included; writes the new ones.

    Bidirectional, a token sees that many to either side, its own counted on both.

    Args:
        q: [B, H, T, D].
        k, v: Keys and values of these T tokens, [B, Hkv, T, D].
        cache: The ring they are written to; None for a whole sequence.

    Returns:
        [B, T, H * D].
    """
    T = q.shape[2]
    explicit = bidirectional or call.is_explicit
    if cache is not None and cache.is_step(T) and not explicit:
        k, v, position = cache.write_step(k, v)
        # Fewer than the window while no row is past it; behind the longest row they hold nothing.
        slots = min(max(cache.offsets) + 1, k.shape[2])
        k, v = k[:, :, :slots], v[:, :, :slots]
        if min(cache.offsets) + 1 >= slots:  # every row sees all of them
            out = local_attention(q, k, v, scale=scale, window=slots, softcap=softcap)
        else:
            out = local_attention_decode(
                q, k, v, position=position, scale=scale, window=slots, softcap=softcap
            )
        return _merge_heads(out)
    key_start = None
    if cache is not None:
        k, v, key_start = cache.write_chunk(k, v)
    if explicit:
        mask = _explicit_mask(T, k.shape[2], window, key_start, call, bidirectional)
        out = _explicit_attention(q, k, v, scale, softcap, mask, call)
    else:
        out = local_attention(
            q, k, v, scale=scale, window=window, softcap=softcap, key_start=key_start
        )
    return _merge_heads(out)


def _merge_heads(x: mx.array) -> mx.array:
    B, _, T, _ = x.shape
    return x.swapaxes(1, 2).reshape(B, T, -1)


def _explicit_mask(
    T: int,
    S: int,
    window: int | None,
    key_start: mx.array | None,
    call: Call,
    bidirectional: bool,
) -> mx.array:
    """Which of S keys the last T tokens see, [B or 1, 1, T, S] bool; a token always sees itself."""
    query = mx.arange(S - T, S)[:, None]
    key = mx.arange(S)
    mask = mx.full((T, S), True) if bidirectional else key <= query
    if window is not None:
        mask = mask & (mx.abs(query - key) < window)
    mask = mask[None, None]
    if key_start is not None:
        mask = mask & (key >= key_start[:, None, None, None])
    if call.valid is not None:
        mask = mask & call.valid[:, None, None, :]
    if call.documents is not None:
        same = call.documents[:, :, None] == call.documents[:, None, :]
        mask = mask & same[:, None]
    return mask | (key == query)


def _explicit_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    softcap: float | None,
    mask: mx.array,
    call: Call,
) -> mx.array:
    B, H, T, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(B, Hkv, H // Hkv, T, D)
    scores = (grouped @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap
    scores = mx.where(mask[:, None], scores, mx.finfo(mx.float32).min)
    weights = mx.softmax(scores, axis=-1).astype(v.dtype)  # [B, Hkv, H / Hkv, T, S]
    if call.attentions is not None:
        call.attentions.append(weights.reshape(B, H, T, S))
    return (weights @ v[:, :, None]).reshape(B, H, T, D)
