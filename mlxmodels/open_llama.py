"""Open-Llama (s-JoL/Open-Llama-V1; not openlm-research's open_llama, which is plain Llama).

Reference: transformers 4.40.2 `models/deprecated/open_llama` (checkpoint names, defaults).

What differs from a plain pre-norm transformer with rotary embedding and SwiGLU:
- `use_stable_embedding`: a LayerNorm with bias right after the embedding;
- `shared_input_output_embedding`, not `tie_word_embeddings`, makes the embedding the head;
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

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxmodels import config
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.layers import Rotary, activation
from mlxmodels.weights import drop_tied_head, with_model_prefix


@dataclass
class ModelArgs(config.ModelArgs):
    neutral: ClassVar = {
        "attention_bias": (False,),
        "attn_logit_softcapping": (0, 0.0),
        "final_logit_softcapping": (0, 0.0),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1, 1.0),
        "sliding_window": (),
    }

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
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rope_theta", "rms_norm_eps"),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"config.json sets hidden_size to {self.hidden_size}, "
                f"which {self.num_attention_heads} attention heads do not divide."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim not in (None, head_dim) or head_dim % 2:
            raise ModelError(
                f"config.json sets head_dim to {self.head_dim or head_dim}; open-llama needs "
                f"hidden_size / num_attention_heads = {head_dim}, and that even."
            )
        self.head_dim = head_dim
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"config.json sets num_key_value_heads to {self.num_key_value_heads}, "
                f"which does not divide {self.num_attention_heads} attention heads."
            )
        self._check_rope_scaling()

    @property
    def rope_type(self) -> str:
        """ "default", "linear" or "dynamic"."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("type", scaling.get("rope_type", "default")))

    @property
    def rope_factor(self) -> float:
        return 1.0 if self.rope_type == "default" else float((self.rope_scaling or {})["factor"])

    def _check_rope_scaling(self) -> None:
        if self.rope_type not in ("default", "linear", "dynamic"):
            raise ModelError(
                f"config.json asks for rope_scaling of type {self.rope_type!r}; "
                f"open-llama knows 'linear' and 'dynamic'."
            )
        factor = (self.rope_scaling or {}).get("factor")
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if self.rope_type != "default" and (not is_number or not 1 <= float(str(factor)) <= 1e6):
            raise ModelError(
                f"config.json sets the factor of rope_scaling to {reprlib.repr(factor)}, "
                f"expected a number from 1 to a million."
            )
        if self.rope_type == "dynamic" and self.hidden_size // self.num_attention_heads == 2:
            raise ModelError("dynamic rope_scaling needs heads wider than 2, as config.json sets.")


class DynamicRotary:
    """Rotary embedding whose base grows once a row is longer than the model was trained for."""

    def __init__(self, dims: int, base: float, factor: float, max_position: int) -> None:
        self.dims = dims
        self.base = base
        self.factor = factor
        self.max_position = max_position

    def angles(self, lengths: Sequence[int], first: Sequence[int], n: int) -> mx.array:
        """Angles of n consecutive positions per row, [B, 1, n, D/2] float32.

        Args:
            lengths: Tokens of each row, which decide its base.
            first: Position of the first of the n.
        """
        exponents = mx.arange(0, self.dims, 2) / self.dims
        frequencies = mx.stack([1.0 / self._base_at(length) ** exponents for length in lengths])
        positions = mx.array(list(first))[:, None] + mx.arange(n)
        angles = positions.astype(mx.float32)[..., None] * frequencies[:, None]  # [B, n, D/2]
        return angles[:, None]

    def _base_at(self, length: int) -> float:
        if length <= self.max_position:
            return self.base
        growth = self.factor * length / self.max_position - (self.factor - 1.0)
        return float(self.base * growth ** (self.dims / (self.dims - 2)))


def turn(x: mx.array, angles: mx.array) -> mx.array:
    """Rotate the two halves of x [B, H, n, D] by angles [B, 1, n, D/2]."""
    cos, sin = mx.cos(angles), mx.sin(angles)
    left, right = mx.split(x.astype(mx.float32), 2, axis=-1)
    turned = mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Causal attention over everything, grouped-query, rotary on the whole head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.head_dim is not None and args.num_key_value_heads is not None
        self.head_dim = args.head_dim
        kv_width = args.num_key_value_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self._rope: Rotary | DynamicRotary = Rotary(
            args.head_dim, args.rope_theta, 1.0 / args.rope_factor
        )
        if args.rope_type == "dynamic":
            self._rope = DynamicRotary(
                args.head_dim, args.rope_theta, args.rope_factor, args.max_position_embeddings
            )

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: FullCache | None) -> mx.array:
        B, T, _ = x.shape
        q, k, v = (
            self._heads(self.q_proj(x)),
            self._heads(self.k_proj(x)),
            self._heads(self.v_proj(x)),
        )
        if isinstance(self._rope, DynamicRotary):
            q, k, v = self._turned_at_use(q, k, v, cache, self._rope)
        else:
            offset = 0 if cache is None else cache.offset
            q, k = self._rope(q, offset), self._rope(k, offset)
            if cache is not None:
                k, v = cache.update(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))

    def _turned_at_use(
        self, q: mx.array, k: mx.array, v: mx.array, cache: FullCache | None, rope: DynamicRotary
    ) -> tuple[mx.array, mx.array, mx.array]:
        B, _, T, _ = q.shape
        if cache is None:
            angles = rope.angles([T] * B, [0] * B, T)
            return turn(q, angles), turn(k, angles), v
        k, v = cache.update(k, v)
        first = [-start for start in cache.starts]
        angles = rope.angles(cache.known_lengths(T), first, k.shape[2])
        return turn(q, angles[:, :, -T:]), turn(k, angles), v

    def _heads(self, x: mx.array) -> mx.array:
        B, T, _ = x.shape
        return x.reshape(B, T, -1, self.head_dim).swapaxes(1, 2)  # [B, heads, T, D]


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self._act = activation(args.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: FullCache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class OpenLlama(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.use_stable_embedding:
            self.embed_layer_norm = nn.LayerNorm(args.hidden_size, eps=1e-5)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Sequence[FullCache] | None = None) -> mx.array:
        x = self.embed_tokens(inputs)
        if "embed_layer_norm" in self:
            x = self.embed_layer_norm(x)
        T = inputs.shape[1]
        mask: mx.array | str | None = "causal" if T > 1 else None
        if cache is not None:
            mask = cache[0].make_mask(T)  # the layers' states move together
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if cache is None else cache[i])
        for state in cache or ():
            state.advance(T)
        normed: mx.array = self.norm(x)
        return normed


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.rotates_by_length = args.rope_type == "dynamic"
        self.model = OpenLlama(args)
        if not args.shared_input_output_embedding:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[FullCache] | None = None) -> mx.array:
        """Logits of the next token at every position.

        Args:
            inputs: Token ids, [B, T], integer.
            cache: States from `make_cache`, read and advanced; None for a whole sequence.

        Returns:
            [B, T, V] in the model's dtype.
        """
        x = self.model(inputs, cache)
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        logits: mx.array = head(x)
        return logits

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self) -> list[FullCache]:
        """Empty state of one sequence, or of a batch: it takes the size of the first input."""
        return [FullCache() for _ in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoint tensors under this module's names."""
        weights = with_model_prefix(weights, "embed_tokens.weight")
        if self.args.shared_input_output_embedding:
            weights = drop_tied_head(weights)
        # transformers <= 4.31 saved this buffer.
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
