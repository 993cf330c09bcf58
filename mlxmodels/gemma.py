"""Gemma.

Paper: arXiv:2403.08295. Reference: transformers 5.23 `models/gemma` (checkpoint names, defaults).

What differs from a plain pre-norm transformer with rotary embedding and gated MLP:
- RMSNorm multiplies by (1 + weight); embeddings are scaled by sqrt(hidden_size), rounded to the
  weights' dtype (RecurrentGemma's is rounded to bfloat16 always); `inputs_embeds` are not scaled;
- `head_dim` is independent of hidden_size / num_attention_heads; the head is the embedding;
- the activation is GELU's tanh approximation. Files of the first release say "gelu" and mean it.

Where the references disagree: `hidden_activation`, which transformers 4.40 obeyed and 5.23 ignores,
counts here if `hidden_act` is absent. `use_bidirectional_attention` lets tokens see later ones, as
documented; transformers' code obeys it only where it builds no mask.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config, heads
from mlxmodels.attention import Call, GroupedQueryProjections, full_attention
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import GatedMLP, RMSNorm1P, Rotary, activation, embed
from mlxmodels.linear import Embedding


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {"hidden_activation": "hidden_act"}
    ignored: ClassVar = ("hidden_activation",)  # beside hidden_act, as in transformers 5

    model_type: str = "gemma"
    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    use_bidirectional_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act == "gelu":
            self.hidden_act = "gelu_pytorch_tanh"
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rope_theta", "rms_norm_eps"),
        )
        config.require_even(self, "head_dim")
        config.require_divisor(self, "num_key_value_heads", "num_attention_heads")
        self.rope_factor = config.rope_factor(self)[1]

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.tie_word_embeddings


class Attention(GroupedQueryProjections):
    """Attention to everything before, grouped-query, rotary on the whole head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(
            args.hidden_size,
            args.num_attention_heads,
            args.num_key_value_heads,
            args.head_dim,
            bias=args.attention_bias,
        )
        self.bidirectional = args.use_bidirectional_attention
        self._rope = Rotary(args.head_dim, args.rope_theta, 1.0 / args.rope_factor)

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        q, k, v = self.project(x)
        positions = call.positions(cache)
        q, k = self._rope(q, k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        out = full_attention(
            *(q, k, v, cache, call),
            scale=self.head_dim**-0.5,
            bidirectional=self.bidirectional,
        )
        return self.o_proj(out)


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, activation(args.hidden_act))

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache, call)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
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
    decoder = Gemma
    tasks = (
        heads.CAUSAL_LM,
        heads.BASE,
        heads.SEQUENCE_CLASSIFICATION,
        heads.TOKEN_CLASSIFICATION,
    )

    @property
    def bidirectional(self) -> bool:
        return bool(self.args.use_bidirectional_attention)

    def new_states(self) -> list[FullCache]:
        return [FullCache() for _ in self.layers]
