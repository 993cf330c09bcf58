"""Open-Llama (s-JoL/Open-Llama-V1; not openlm-research's open_llama, which is plain Llama).

Reference: transformers 4.40.2 `models/deprecated/open_llama` (checkpoint names, defaults).

What differs from a plain pre-norm transformer with rotary embedding and SwiGLU:
- `use_stable_embedding`: a LayerNorm with bias right after the embedding, which `inputs_embeds`
  do not pass through;
- `shared_input_output_embedding` makes the embedding the head whatever `tie_word_embeddings` says;
- `rope_scaling`: linear (positions divided by the factor) or dynamic (the base grows with length).

Ours: `num_key_value_heads` makes attention grouped-query; absent, every head has its own keys.

Dynamic scaling upstream keeps its largest base on the module: one long prompt changes every later
short one, and keys cached under an old base are never turned again. Here the base is a function of
the row's length alone, and keys are cached unturned and turned at use. A forward call therefore
turns queries and keys as one call over the whole sequence would: exact for the first layer, and
exact altogether for a prompt read in one call, or in chunks whose total `prepare(lengths=...)`
announced. Past max_position_embeddings what deeper layers cached at an earlier, shorter length
stays as it was computed then; only recomputing the whole sequence for every token could change it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config, heads
from mlxmodels.attention import Call, GroupedQueryProjections, full_attention
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import GatedMLP, Rotary, activation, embed, rotate
from mlxmodels.linear import Embedding


@dataclass
class ModelArgs(config.ModelArgs):
    model_type: str = "open-llama"
    vocab_size: int = 100000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rope_theta", "rms_norm_eps"),
        )
        config.require_divisor(self, "num_attention_heads", "hidden_size")
        config.require_divisor(self, "num_key_value_heads", "num_attention_heads")
        head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim not in (None, head_dim) or head_dim % 2:
            raise ModelError(
                f"config.json sets head_dim to {self.head_dim or head_dim}; open-llama needs "
                f"hidden_size / num_attention_heads = {head_dim}, and that even."
            )
        self.head_dim = head_dim
        self.rope_type, self.rope_factor = config.rope_factor(self, ("linear", "dynamic"))
        if self.rope_type == "dynamic" and head_dim == 2:
            raise ModelError("dynamic rope_scaling needs heads wider than 2, as config.json sets.")

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.shared_input_output_embedding or self.tie_word_embeddings


class DynamicRotary:
    """Rotary embedding whose base grows once a row is longer than the model was trained for."""

    def __init__(self, dims: int, base: float, factor: float, max_position: int) -> None:
        self.dims = dims
        self.base = base
        self.factor = factor
        self.max_position = max_position

    def angles(self, lengths: Sequence[int], positions: mx.array) -> mx.array:
        """Angles of positions [B, n], [B, 1, n, D/2] float32.

        Args:
            lengths: Tokens of each row, which decide its base.
        """
        exponents = mx.arange(0, self.dims, 2) / self.dims
        frequencies = mx.stack([1.0 / self._base_at(length) ** exponents for length in lengths])
        angles = positions.astype(mx.float32)[..., None] * frequencies[:, None]  # [B, n, D/2]
        return angles[:, None]

    def _base_at(self, length: int) -> float:
        if length <= self.max_position:
            return self.base
        growth = self.factor * length / self.max_position - (self.factor - 1.0)
        return float(self.base * growth ** (self.dims / (self.dims - 2)))


class Attention(GroupedQueryProjections):
    """Causal attention over everything, grouped-query, rotary on the whole head."""

    def __init__(self, args: ModelArgs) -> None:
        assert args.head_dim is not None and args.num_key_value_heads is not None
        super().__init__(
            args.hidden_size, args.num_attention_heads, args.num_key_value_heads, args.head_dim
        )
        self._rope: Rotary | DynamicRotary = Rotary(
            args.head_dim, args.rope_theta, 1.0 / args.rope_factor
        )
        if args.rope_type == "dynamic":
            self._rope = DynamicRotary(
                args.head_dim, args.rope_theta, args.rope_factor, args.max_position_embeddings
            )

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        q, k, v = self.project(x)
        if isinstance(self._rope, DynamicRotary):
            q, k, v = self._turned_at_use(q, k, v, cache, call, self._rope)
        else:
            positions = call.positions(cache)
            q, k = self._rope(q, k, positions)
            if cache is not None:
                k, v = cache.update(k, v)
        return self.o_proj(full_attention(q, k, v, cache, call, scale=self.head_dim**-0.5))

    def _turned_at_use(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        cache: FullCache | None,
        call: Call,
        rope: DynamicRotary,
    ) -> tuple[mx.array, mx.array, mx.array]:
        if call.documents is not None:
            raise ValueError(
                "[forward] dynamic rope_scaling gives packed documents no length of their own; "
                "pass them one by one."
            )
        B, _, T, _ = q.shape
        lengths, starts = [T] * B, [0] * B
        if cache is not None:
            k, v = cache.update(k, v)
            lengths, starts = cache.known_lengths(T), list(cache.starts)
        positions = mx.arange(k.shape[2]) - mx.array(starts)[:, None]
        if call.position_ids is not None:
            if k.shape[2] > T:
                raise ValueError(
                    "[forward] position_ids cannot continue a state under dynamic rope_scaling."
                )
            positions = call.position_ids
        angles = rope.angles(lengths, positions)
        return rotate(q, angles[:, :, -T:]), rotate(k, angles), v


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = GatedMLP(args.hidden_size, args.intermediate_size, activation(args.hidden_act))

    def __call__(self, x: mx.array, cache: FullCache | None, call: Call) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache, call)
        return x + self.mlp(self.post_attention_layernorm(x))


class OpenLlama(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        if args.use_stable_embedding:
            self.embed_layer_norm = nn.LayerNorm(args.hidden_size, eps=1e-5)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, inputs: mx.array | None, cache: heads.States = None, call: Call | None = None
    ) -> mx.array:
        call = call or Call()
        x = call.inputs_embeds
        if x is None:
            x = embed(self.embed_tokens, inputs, self.norm)
            if "embed_layer_norm" in self:
                x = self.embed_layer_norm(x)
        return call.run(self.layers, self.norm, x, cache)


class Model(heads.TaskModel):
    decoder = OpenLlama
    tasks = (heads.CAUSAL_LM, heads.BASE, heads.SEQUENCE_CLASSIFICATION)

    @property
    def rotates_by_length(self) -> bool:
        """Whether the rotary base depends on the length, which `prepare` may announce."""
        return bool(self.args.rope_type == "dynamic")

    def new_states(self) -> list[FullCache]:
        return [FullCache() for _ in self.layers]
