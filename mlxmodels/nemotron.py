"""Nemotron (Nemotron-3, Nemotron-4, Minitron; not the Llama-based models of that name).

Paper: arXiv:2402.16819. Reference: transformers 5.23 `models/nemotron` (checkpoint names,
defaults).

What differs from a plain pre-norm transformer with rotary embedding:
- LayerNorm, with mean and bias, multiplies by (1 + weight);
- the MLP has no gate: down(relu(up(x))^2);
- rotary embedding turns only the first half of each head (`partial_rotary_factor`);
- `head_dim` is independent of hidden_size / num_attention_heads; the head is its own matrix.

Published files spell some keys as NVIDIA's trainer does: kv_channels, rope_percent. Question
answering checkpoints carry their decoder as `transformer.`, all others as `model.`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config, heads
from mlxmodels.attention import Call, GroupedQueryProjections, full_attention
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import Rotary, activation, embed
from mlxmodels.linear import Embedding, Linear


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {
        "kv_channels": "head_dim",
        "layer_norm_eps": "norm_eps",
        "rope_percent": "partial_rotary_factor",
        "rope_percentage": "partial_rotary_factor",
    }

    model_type: str = "nemotron"
    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rope_theta", "norm_eps"),
        )
        config.require_divisor(self, "num_key_value_heads", "num_attention_heads")
        if self.head_dim is None:
            config.require_divisor(self, "num_attention_heads", "hidden_size")
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rotary_dims = config.rotary_dims(self)
        self.rope_factor = config.rope_factor(self)[1]

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.tie_word_embeddings


def _layer_norm_1p(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    weight, bias = 1.0 + weight.astype(mx.float32), bias.astype(mx.float32)
    return mx.fast.layer_norm(x, weight, bias, eps).astype(x.dtype)


_layer_norm_1p_step = mx.compile(_layer_norm_1p)


class LayerNorm1P(nn.Module):
    """LayerNorm that scales by (1 + weight); computed in float32 and rounded once."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.bias = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        norm = _layer_norm_1p_step if x.shape[-2] == 1 else _layer_norm_1p  # as in metal.reference
        return norm(x, self.weight, self.bias, self.eps)


class Attention(GroupedQueryProjections):
    """Attention to everything before, grouped-query, partially rotary."""

    def __init__(self, args: ModelArgs) -> None:
        assert args.head_dim is not None and args.num_key_value_heads is not None
        super().__init__(
            args.hidden_size,
            args.num_attention_heads,
            args.num_key_value_heads,
            args.head_dim,
            bias=args.attention_bias,
        )
        self._rope = Rotary(args.rotary_dims, args.rope_theta, 1.0 / args.rope_factor)

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        q, k, v = self.project(x)
        positions = call.positions(cache)
        q, k = self._rope(q, k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o_proj(full_attention(q, k, v, cache, call, scale=self.head_dim**-0.5))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.up_proj = Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)
        self._act = activation(args.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._act(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm1P(args.hidden_size, args.norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = LayerNorm1P(args.hidden_size, args.norm_eps)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache, call)
        return x + self.mlp(self.post_attention_layernorm(x))


class Nemotron(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = LayerNorm1P(args.hidden_size, args.norm_eps)

    def __call__(
        self, inputs: mx.array | None, cache: heads.States = None, call: Call | None = None
    ) -> mx.array:
        call = call or Call()
        x = call.inputs_embeds
        if x is None:
            x = embed(self.embed_tokens, inputs, self.norm)
        return call.run(self.layers, self.norm, x, cache)


class Model(heads.TaskModel):
    decoder = Nemotron
    tasks = (
        heads.CAUSAL_LM,
        heads.BASE,
        heads.SEQUENCE_CLASSIFICATION,
        heads.QUESTION_ANSWERING,
        heads.TOKEN_CLASSIFICATION,
    )

    def new_states(self) -> list[FullCache]:
        return [FullCache() for _ in self.layers]
