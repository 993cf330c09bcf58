"""XGLM.

Paper: arXiv:2112.10668. Reference: transformers 5.23 `models/xglm` (checkpoint names, defaults).

What differs from a plain pre-norm transformer:
- positions are sinusoids added to the embedding, sines in the first half of the channels and
  cosines in the second, counted from 2; there is no limit to them; the one numbered pad_token_id
  is zero, which the usual 1 never meets;
- every linear has a bias; LayerNorm's eps is 1e-5, which no config key says; GELU is exact;
- embeddings are scaled by sqrt(d_model) unless `scale_embedding` is false; the head is the
  embedding; queries, keys and values have the same number of heads.

Where the references disagree: positions count each row's own tokens, padding not included, as
transformers' generate() passes them; its bare forward counts padding too. Softmax is float32 for
any weights (transformers: for float16 only). Cross-attention, which the code upstream has and no
released checkpoint uses, is refused.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config, heads
from mlxmodels.attention import Call, full_attention, split_heads
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import activation, embed
from mlxmodels.linear import Embedding, Linear

_FIRST_POSITION = 2  # fairseq keeps 0 and 1 for padding


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "attention_heads",
        "num_hidden_layers": "num_layers",
    }

    model_type: str = "xglm"
    vocab_size: int = 256008
    max_position_embeddings: int = 2048
    d_model: int = 1024
    ffn_dim: int = 4096
    num_layers: int = 24
    attention_heads: int = 16
    activation_function: str = "gelu"
    scale_embedding: bool = True
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        config.require_positive(
            self,
            *("vocab_size", "max_position_embeddings", "d_model", "ffn_dim", "num_layers"),
            "attention_heads",
        )
        config.require_divisor(self, "attention_heads", "d_model")
        # Two frequencies at least, or the sinusoids' spacing divides by zero.
        if self.d_model < 4:
            raise ModelError(f"config.json sets d_model to {self.d_model}, expected 4 or up.")

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.tie_word_embeddings


def sinusoids(positions: mx.array, dims: int) -> mx.array:
    """Position embedding [..., dims] float32 of positions [...]; an odd last channel is zero."""
    half = dims // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = positions.astype(mx.float32)[..., None] * frequencies
    embedding = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
    if dims % 2 == 0:
        return embedding
    return mx.pad(embedding, [(0, 0)] * positions.ndim + [(0, 1)])


class Attention(nn.Module):
    """Attention to everything before; the query is scaled after its bias."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.d_model // args.attention_heads
        self.q_proj = Linear(args.d_model, args.d_model)
        self.k_proj = Linear(args.d_model, args.d_model)
        self.v_proj = Linear(args.d_model, args.d_model)
        self.out_proj = Linear(args.d_model, args.d_model)

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        q = split_heads(self.q_proj(x), self.head_dim)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.out_proj(full_attention(q, k, v, cache, call, scale=self.head_dim**-0.5))


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(args.d_model)
        self.self_attn = Attention(args)
        self.final_layer_norm = nn.LayerNorm(args.d_model)
        self.fc1 = Linear(args.d_model, args.ffn_dim)
        self.fc2 = Linear(args.ffn_dim, args.d_model)
        self._act = activation(args.activation_function)

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        x = x + self.self_attn(self.self_attn_layer_norm(x), cache, call)
        return x + self.fc2(self._act(self.fc1(self.final_layer_norm(x))))


class XGLM(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.d_model)
        self.layers = [Block(args) for _ in range(args.num_layers)]
        self.layer_norm = nn.LayerNorm(args.d_model)
        self.embedding_scale = math.sqrt(args.d_model) if args.scale_embedding else 1.0
        self.padding_number = -1 if args.pad_token_id is None else args.pad_token_id

    def __call__(
        self, inputs: mx.array | None, cache: heads.States = None, call: Call | None = None
    ) -> mx.array:
        call = call or Call()
        x = call.inputs_embeds
        if x is None:
            x = embed(self.embed_tokens, inputs, self.layer_norm) * self.embedding_scale
        T, dims = x.shape[1:]
        positions = call.positions(cache[0] if cache else None)
        if not isinstance(positions, mx.array) or positions.ndim == 1:
            positions = mx.array(positions).reshape(-1, 1) + mx.arange(T)  # [B or 1, T]
        numbers = mx.maximum(positions, 0) + _FIRST_POSITION  # on padding anything will do
        embedding = sinusoids(numbers, dims)
        if self.padding_number >= _FIRST_POSITION:
            embedding = mx.where((numbers == self.padding_number)[..., None], 0.0, embedding)
        x = x + embedding.astype(x.dtype)
        return call.run(self.layers, self.layer_norm, x, cache)


class Model(heads.TaskModel):
    decoder = XGLM
    tasks = (heads.CAUSAL_LM, heads.BASE)

    def new_states(self) -> list[FullCache]:
        return [FullCache() for _ in self.layers]
