"""RecurrentGemma (Griffin): gated linear recurrences mixed with local attention.

Paper: Griffin, arXiv:2402.19427; RecurrentGemma, arXiv:2404.07839. References: transformers 5.23
`models/recurrent_gemma` (checkpoint names, defaults) and google-deepmind/recurrentgemma @2efa84d.

What differs from a plain pre-norm transformer:
- two of three blocks mix time with a convolution and the RG-LRU instead of attention; their state
  has a fixed size, and the attention that remains looks at a window, so memory is constant in T;
- RMSNorm multiplies by (1 + weight); embeddings are scaled by sqrt(hidden_size) rounded to
  bfloat16, in float32 too; logits are soft-capped; the head is the embedding;
- rotary embedding turns only the first half of each head; linears of the MLP and of the recurrent
  block carry biases, q, k and v do not; the MLP is `intermediate_size // 2` wide.

Where the references disagree or err:
- a query sees `attention_window_size` keys including its own, as in transformers. DeepMind's code
  keeps one more; `attention_window_includes_self: false` in the config gives its rule. They are
  the same up to that many tokens.
- transformers up to 5.23 zeroes the convolution's tail when a prompt is continued by more than one
  token, and lets left padding into the convolution. Here a chunked prompt equals a whole one and a
  padded row equals the row alone.
- transformers ignores `embeddings_scale_by_sqrt_dim`; DeepMind's false switches the scaling off,
  and so it does here.
- gates, decay and state are float32 for any weights (transformers: only the state).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from metal import causal_conv1d, local_attention, local_attention_decode, rg_lru
from mlxmodels import config
from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.errors import ModelError
from mlxmodels.layers import Rotary, activation
from mlxmodels.weights import drop_tied_head, with_model_prefix

Cache = Sequence[RecurrentState | WindowCache]


MAX_WINDOW = 2**17


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {
        "_block_types": "block_types",
        "sliding_window": "attention_window_size",
    }
    neutral: ClassVar = {
        "attn_logit_softcapping": (0, 0.0),
        "final_logit_softcapping": (0, 0.0),
        "rope_scaling": (),
        "tie_word_embeddings": (True,),
    }

    model_type: str = "recurrent_gemma"
    vocab_size: int = 256000
    hidden_size: int = 2560
    intermediate_size: int = 7680
    num_hidden_layers: int = 26
    num_attention_heads: int = 10
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    lru_width: int | None = None
    conv1d_width: int = 4
    block_types: list[str] = field(default_factory=lambda: ["recurrent", "recurrent", "attention"])
    attention_window_size: int = 2048
    attention_window_includes_self: bool = True
    attention_bias: bool = False
    hidden_activation: str = "gelu_pytorch_tanh"
    logits_soft_cap: float | None = 30.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rope_scaling: dict[str, Any] | None = None
    embeddings_scale_by_sqrt_dim: bool = True

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.lru_width = self.lru_width or self.hidden_size
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "lru_width", "conv1d_width"),
            *("attention_window_size", "rope_theta", "partial_rotary_factor", "rms_norm_eps"),
        )
        if self.attention_window_size > MAX_WINDOW:  # its state is allocated whole
            raise ModelError(
                f"config.json sets attention_window_size to {self.attention_window_size}, "
                f"expected at most {MAX_WINDOW}."
            )
        if self.rope_scaling:
            raise ModelError(
                f"config.json asks for rope_scaling {self.rope_scaling!r}, which recurrent_gemma "
                f"does not have; use a checkpoint without it."
            )
        known = ("recurrent", "attention")
        if not self.block_types or any(kind not in known for kind in self.block_types):
            raise ModelError(
                f"config.json lists the block types {self.block_types!r}, "
                f"expected some of 'recurrent' and 'attention'."
            )
        for width, name in ((self.hidden_size, "hidden_size"), (self.lru_width, "lru_width")):
            if width % self.num_attention_heads:
                raise ModelError(
                    f"config.json sets {name} to {width}, "
                    f"which {self.num_attention_heads} attention heads do not divide."
                )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim not in (None, head_dim):
            raise ModelError(
                f"config.json sets head_dim to {self.head_dim}; recurrent_gemma's is always "
                f"hidden_size / num_attention_heads = {head_dim}."
            )
        self.head_dim = head_dim
        if int(head_dim * self.partial_rotary_factor) % 2 or self.partial_rotary_factor > 1:
            raise ModelError(
                f"config.json sets partial_rotary_factor to {self.partial_rotary_factor}, which "
                f"does not turn an even part of {head_dim} channels."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"config.json sets num_key_value_heads to {self.num_key_value_heads}, "
                f"which does not divide {self.num_attention_heads} attention heads."
            )

    @property
    def window(self) -> int:
        """Keys a query sees, its own included."""
        return self.attention_window_size + (0 if self.attention_window_includes_self else 1)

    @property
    def layer_types(self) -> list[str]:
        """Block type of every layer: the pattern tiled to the model's depth."""
        pattern = self.block_types
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]


class RMSNorm(nn.Module):
    """Scales by (1 + weight), which is formed and applied in float32 and rounded once."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        weight = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x, weight, self.eps).astype(x.dtype)


class Conv1d(nn.Module):
    """Causal depthwise convolution; weight [E, K, 1] as mlx lays it out."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, width, 1))
        self.bias = mx.zeros((channels,))

    def __call__(
        self,
        u: mx.array,
        state: mx.array | None,
        lengths: mx.array | None,
        reset: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        if state is None:
            state = mx.zeros((u.shape[0], self.weight.shape[1] - 1, u.shape[2]), dtype=u.dtype)
        return causal_conv1d(
            u, self.weight.squeeze(-1), self.bias, state, lengths=lengths, reset=reset
        )


class RGLRU(nn.Module):
    """Real-gated linear recurrent unit; both gates are block-diagonal, one block per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        block = width // heads
        self.recurrent_param = mx.zeros((width,))
        self.input_gate_weight = mx.zeros((heads, block, block))
        self.input_gate_bias = mx.zeros((heads, block))
        self.recurrent_gate_weight = mx.zeros((heads, block, block))
        self.recurrent_gate_bias = mx.zeros((heads, block))

    def __call__(
        self,
        x: mx.array,
        h0: mx.array | None,
        lengths: mx.array | None,
        reset: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        B, T, E = x.shape
        heads, block, _ = self.input_gate_weight.shape
        blocks = x.reshape(B, T, heads, block).swapaxes(1, 2)  # [B, heads, T, block]

        def gate(weight: mx.array, bias: mx.array) -> mx.array:
            return ((blocks @ weight) + bias[:, None]).swapaxes(1, 2).reshape(B, T, E)

        return rg_lru(
            x,
            gate(self.input_gate_weight, self.input_gate_bias),
            gate(self.recurrent_gate_weight, self.recurrent_gate_bias),
            self.recurrent_param,
            h0,
            lengths=lengths,
            reset=reset,
        )


class RecurrentBlock(nn.Module):
    """Two branches: an activation, and a convolution followed by the RG-LRU; then their product."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.lru_width is not None
        self.linear_y = nn.Linear(args.hidden_size, args.lru_width)
        self.linear_x = nn.Linear(args.hidden_size, args.lru_width)
        self.linear_out = nn.Linear(args.lru_width, args.hidden_size)
        self.conv_1d = Conv1d(args.lru_width, args.conv1d_width)
        self.rg_lru = RGLRU(args.lru_width, args.num_attention_heads)
        self._act = activation(args.hidden_activation)

    def __call__(self, x: mx.array, cache: RecurrentState | None) -> mx.array:
        if cache is None:
            cache = RecurrentState()
        reset, lengths = cache.begin(x)
        y = self._act(self.linear_y(x))
        u = self.linear_x(x)
        u, cache.conv = self.conv_1d(u, cache.conv, lengths, reset)
        u, cache.hidden = self.rg_lru(u, cache.hidden, lengths, reset)
        return self.linear_out(u * y)


class Attention(nn.Module):
    """Causal attention over a sliding window, grouped-query, partially rotary."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.head_dim is not None and args.num_key_value_heads is not None
        self.head_dim = args.head_dim
        self.window = args.window
        kv_width = args.num_key_value_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.attention_bias)
        self.k_proj = nn.Linear(args.hidden_size, kv_width, bias=args.attention_bias)
        self.v_proj = nn.Linear(args.hidden_size, kv_width, bias=args.attention_bias)
        self.o_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=True)
        self._rope = Rotary(int(args.head_dim * args.partial_rotary_factor), args.rope_theta)

    def __call__(self, x: mx.array, cache: WindowCache | None) -> mx.array:
        B, T, _ = x.shape
        offset = 0 if cache is None else cache.offset
        q = self._rope(self._heads(self.q_proj(x)), offset)
        k = self._rope(self._heads(self.k_proj(x)), offset)
        v = self._heads(self.v_proj(x))
        scale = self.head_dim**-0.5
        if cache is not None and cache.is_step(T):
            k_ring, v_ring, position = cache.write_step(k, v)
            out = local_attention_decode(
                q, k_ring, v_ring, position=position, scale=scale, window=self.window
            )
        else:
            key_start = None
            if cache is not None:
                k, v, key_start = cache.write_chunk(k, v)
            out = local_attention(q, k, v, scale=scale, window=self.window, key_start=key_start)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))

    def _heads(self, x: mx.array) -> mx.array:
        B, T, _ = x.shape
        return x.reshape(B, T, -1, self.head_dim).swapaxes(1, 2)  # [B, heads, T, D]


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.intermediate_size // 2
        self.gate_proj = nn.Linear(args.hidden_size, width)
        self.up_proj = nn.Linear(args.hidden_size, width)
        self.down_proj = nn.Linear(width, args.hidden_size)
        self._act = activation(args.hidden_activation)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()
        self.is_recurrent = kind == "recurrent"
        self.temporal_pre_norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.temporal_block = RecurrentBlock(args) if self.is_recurrent else Attention(args)
        self.channel_pre_norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.mlp_block = MLP(args)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        x = x + self.temporal_block(self.temporal_pre_norm(x), cache)
        return x + self.mlp_block(self.channel_pre_norm(x))


class Griffin(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind) for kind in args.layer_types]
        self.final_norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.embedding_scale: Any = 1.0
        if args.embeddings_scale_by_sqrt_dim:
            scale = mx.array(math.sqrt(args.hidden_size), dtype=mx.bfloat16)
            self.embedding_scale = scale.item()

    def __call__(self, inputs: mx.array, cache: Cache | None = None) -> mx.array:
        x = self.embed_tokens(inputs) * self.embedding_scale
        for i, layer in enumerate(self.layers):
            x = layer(x, None if cache is None else cache[i])
        for state in cache or ():
            state.advance(inputs.shape[1])
        return self.final_norm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Griffin(args)

    def __call__(self, inputs: mx.array, cache: Cache | None = None) -> mx.array:
        """Logits of the next token at every position.

        Args:
            inputs: Token ids, [B, T], integer.
            cache: States from `make_cache`, read and advanced; None for a whole sequence.

        Returns:
            [B, T, V] in the model's dtype, soft-capped.
        """
        logits: mx.array = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        cap = self.args.logits_soft_cap
        if not cap:
            return logits
        return (mx.tanh(logits.astype(mx.float32) / cap) * cap).astype(logits.dtype)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self) -> list[RecurrentState | WindowCache]:
        """Empty state of one sequence, or of a batch: it takes the size of the first input."""
        return [
            RecurrentState() if layer.is_recurrent else WindowCache(self.args.window)
            for layer in self.layers
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoint tensors under this module's names and layouts."""
        weights = with_model_prefix(weights, "embed_tokens.weight")
        weights = drop_tied_head(weights)
        for name, value in weights.items():
            # torch stores [E, 1, K]; a converted file already has [E, K, 1].
            if name.endswith("conv_1d.weight") and value.ndim == 3 and value.shape[-1] != 1:
                weights[name] = value.swapaxes(1, 2)
        return {
            name: value
            for name, value in weights.items()
            if name != "model.normalizer" and not name.endswith("rotary_emb.inv_freq")
        }
