"""Gemma 2.

Paper: arXiv:2408.00118. Reference: transformers 5.23 `models/gemma2` (checkpoint names, defaults).

What differs from Gemma:
- layers alternate between attention to the last `sliding_window` tokens, their own included, and
  to everything; the layers at even index slide unless `layer_types` says otherwise;
- attention scores and logits are soft-capped, the scores before the mask; a cap of null is off;
- scores are scaled by query_pre_attn_scalar^-0.5, not by the head's width;
- attention and MLP are normed before and after; `post_attention_layernorm` norms what attention
  puts out, where in Gemma the same name is the norm before the MLP.

Where others err: mlx-lm 0.32 gives every layer full attention and breaks on batches with grouped
queries. `use_bidirectional_attention` lets tokens see later ones, in sliding layers those less
than `sliding_window` away: the rule of transformers' flash attention. Its other backends ignore
the option while there is a mask, and a mask there is.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config, heads
from mlxmodels.attention import Call, GroupedQueryProjections, full_attention, window_attention
from mlxmodels.cache import WindowCache
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import GatedMLP, RMSNorm1P, Rotary, activation, embed, softcap
from mlxmodels.linear import Embedding

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {"sliding_window_size": "sliding_window"}
    nullable: ClassVar = ("pad_token_id", "attn_logit_softcapping", "final_logit_softcapping")

    model_type: str = "gemma2"
    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 4096
    layer_types: list[str] | None = None
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    use_bidirectional_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rope_theta", "rms_norm_eps", "query_pre_attn_scalar", "sliding_window"),
        )
        config.require_window(self, "sliding_window")
        config.require_even(self, "head_dim")
        config.require_divisor(self, "num_key_value_heads", "num_attention_heads")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            setattr(self, name, config.softcap(self, name))
        self.rope_factor = config.rope_factor(self)[1]
        if self.layer_types is None:
            kinds = (SLIDING, FULL)
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]
        self._check_layer_types(self.layer_types)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.tie_word_embeddings

    def _check_layer_types(self, kinds: list[str]) -> None:
        if len(kinds) != self.num_hidden_layers or any(k not in (SLIDING, FULL) for k in kinds):
            raise ModelError(
                f"config.json lists {len(kinds)} layer_types, expected {SLIDING!r} or {FULL!r} "
                f"for each of {self.num_hidden_layers} layers."
            )


class Attention(GroupedQueryProjections):
    """Attention to everything before or to a window of it, grouped-query, scores soft-capped."""

    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__(
            args.hidden_size,
            args.num_attention_heads,
            args.num_key_value_heads,
            args.head_dim,
            bias=args.attention_bias,
        )
        self.window = args.sliding_window if kind == SLIDING else None
        self._terms = {
            "scale": args.query_pre_attn_scalar**-0.5,
            "softcap": args.attn_logit_softcapping,
            "bidirectional": args.use_bidirectional_attention,
        }
        self._rope = Rotary(args.head_dim, args.rope_theta, 1.0 / args.rope_factor)

    def __call__(self, x: mx.array, cache: Any, call: Call) -> mx.array:
        q, k, v = self.project(x)
        positions = call.positions(cache)
        q, k = self._rope(q, k, positions)
        if self.window is not None:
            out = window_attention(q, k, v, cache, call, window=self.window, **self._terms)
        else:
            if cache is not None:
                k, v = cache.update(k, v)
            out = full_attention(q, k, v, cache, call, **self._terms)
        return self.o_proj(out)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.self_attn = Attention(args, kind)
        self.post_attention_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        act = activation(args.hidden_activation)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, act)
        self.post_feedforward_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Any, call: Call) -> mx.array:
        mixed = self.self_attn(self.input_layernorm(x), cache, call)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind) for kind in args.layer_types or ()]
        self.norm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.embedding_scale = math.sqrt(args.hidden_size)

    def __call__(
        self, inputs: mx.array | None, cache: heads.States = None, call: Call | None = None
    ) -> mx.array:
        call = call or Call()
        x = call.inputs_embeds
        if x is None:
            x = embed(self.embed_tokens, inputs, self.norm) * self.embedding_scale
        return call.run(self.layers, self.norm, x, cache)


class Model(heads.TaskModel):
    decoder = Gemma2
    tasks = (
        heads.CAUSAL_LM,
        heads.BASE,
        heads.SEQUENCE_CLASSIFICATION,
        heads.TOKEN_CLASSIFICATION,
    )

    @property
    def bidirectional(self) -> bool:
        return bool(self.args.use_bidirectional_attention)

    def logits(self, hidden: mx.array) -> mx.array:
        return softcap(super().logits(hidden), self.args.final_logit_softcapping)

    def new_states(self) -> list[FullCache | WindowCache]:
        window = self.args.sliding_window
        return [
            WindowCache(window) if kind == SLIDING else FullCache()
            for kind in self.args.layer_types
        ]
