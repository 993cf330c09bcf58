"""RecurrentGemma (Griffin): gated linear recurrences mixed with local attention.

Paper: Griffin, arXiv:2402.19427; RecurrentGemma, arXiv:2404.07839. References: transformers 5.23
`models/recurrent_gemma` (checkpoint names, defaults) and google-deepmind/recurrentgemma @2efa84d.

What differs from a plain pre-norm transformer:
- two of three blocks mix time with a convolution and the RG-LRU instead of attention; their state
  has a fixed size, and the attention that remains looks at a window, so memory is constant in T;
- RMSNorm multiplies by (1 + weight); embeddings are scaled by sqrt(hidden_size) rounded to
  bfloat16, in float32 too; logits are soft-capped; the head is the embedding;
- rotary embedding turns only the first half of each head (`partial_rotary_factor`); linears of the
  MLP and of the recurrent block carry biases, q, k and v do not; the MLP is
  `intermediate_size // 2` wide; `inputs_embeds` are scaled like embeddings.

Where the references disagree or err:
- a query sees `attention_window_size` keys including its own, as in transformers. DeepMind's code
  keeps one more; `attention_window_includes_self: false` in the config gives its rule. They are
  the same up to that many tokens.
- transformers up to 5.23 zeroes the convolution's tail when a prompt is continued by more than one
  token, and lets left padding into the convolution. Here a chunked prompt equals a whole one and a
  padded row equals the row alone.
- a position 0 drops the recurrent state, as in transformers, and here the convolution's tail too.
- transformers ignores `embeddings_scale_by_sqrt_dim`; DeepMind's false switches the scaling off,
  and so it does here.
- gates, decay and state are float32 for any weights (transformers: only the state).
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from metal import block_rg_lru, causal_conv1d
from mlxmodels import config, heads
from mlxmodels.attention import Call, GroupedQueryProjections, window_attention
from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.errors import ModelError
from mlxmodels.layers import GatedMLP, RMSNorm1P, Rotary, activation, embed, gated, softcap
from mlxmodels.linear import Embedding, Linear


@dataclass
class ModelArgs(config.ModelArgs):
    aliases: ClassVar = {
        "_block_types": "block_types",
        "sliding_window": "attention_window_size",
    }
    ignored: ClassVar = ("layer_types",)  # says what block_types says
    nullable: ClassVar = ("pad_token_id", "logits_soft_cap")

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
    pad_token_id: int | None = 0
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    embeddings_scale_by_sqrt_dim: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.lru_width = self.lru_width or self.hidden_size
        config.require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "lru_width", "conv1d_width"),
            *("attention_window_size", "rope_theta", "rms_norm_eps"),
        )
        config.require_window(self, "attention_window_size")
        if self.conv1d_width > 1024:  # its taps are added one by one
            raise ModelError(
                f"config.json sets conv1d_width to {self.conv1d_width}, expected at most 1024."
            )
        config.require_divisor(self, "num_attention_heads", "hidden_size")
        config.require_divisor(self, "num_attention_heads", "lru_width")
        config.require_divisor(self, "num_key_value_heads", "num_attention_heads")
        self.logits_soft_cap = config.softcap(self, "logits_soft_cap")
        known = ("recurrent", "attention")
        if not self.block_types or any(kind not in known for kind in self.block_types):
            raise ModelError(
                f"config.json lists the block types {self.block_types!r}, "
                f"expected some of 'recurrent' and 'attention'."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim not in (None, head_dim):
            raise ModelError(
                f"config.json sets head_dim to {self.head_dim}; recurrent_gemma's is always "
                f"hidden_size / num_attention_heads = {head_dim}."
            )
        self.head_dim = head_dim
        self.rotary_dims = config.rotary_dims(self)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.tie_word_embeddings

    @property
    def window(self) -> int:
        """Keys a query sees, its own included."""
        return self.attention_window_size + (0 if self.attention_window_includes_self else 1)

    @property
    def layer_types(self) -> list[str]:
        """Block type of every layer: the pattern tiled to the model's depth."""
        pattern = self.block_types
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]


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
        return block_rg_lru(
            x,
            self.input_gate_weight,
            self.input_gate_bias,
            self.recurrent_gate_weight,
            self.recurrent_gate_bias,
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
        self.linear_y = Linear(args.hidden_size, args.lru_width)
        self.linear_x = Linear(args.hidden_size, args.lru_width)
        self.linear_out = Linear(args.lru_width, args.hidden_size)
        self.conv_1d = Conv1d(args.lru_width, args.conv1d_width)
        self.rg_lru = RGLRU(args.lru_width, args.num_attention_heads)
        self._gate = gated(activation(args.hidden_activation))

    def __call__(self, x: mx.array, cache: RecurrentState | None, call: Call) -> mx.array:
        if cache is None:
            cache = RecurrentState()
        reset, lengths = cache.begin(x)
        padding = None
        if call.position_ids is not None:
            # Only position 0 is computed as a beginning, wherever a row's tokens begin; so padding
            # before them must have left nothing behind.
            reset = call.position_ids == 0
            padding = cache.make_mask(x.shape[1])
        u = _blanked(self.linear_x(x), padding)
        u, cache.conv = self.conv_1d(u, cache.conv, lengths, reset)
        u = _blanked(u, padding)
        u, cache.hidden = self.rg_lru(u, cache.hidden, lengths, reset)
        return self.linear_out(self._gate(self.linear_y(x), u))


def _blanked(x: mx.array, mask: mx.array | None) -> mx.array:
    """x [B, T, E], zero where a mask [B, T] is false."""
    return x if mask is None else mx.where(mask[..., None], x, mx.zeros_like(x))


class Attention(GroupedQueryProjections):
    """Causal attention over a sliding window, grouped-query, partially rotary."""

    def __init__(self, args: ModelArgs) -> None:
        assert args.head_dim is not None and args.num_key_value_heads is not None
        super().__init__(
            args.hidden_size,
            args.num_attention_heads,
            args.num_key_value_heads,
            args.head_dim,
            bias=args.attention_bias,
            output_bias=True,
        )
        self.window = args.window
        self._rope = Rotary(args.rotary_dims, args.rope_theta)

    def __call__(self, x: mx.array, cache: WindowCache | None, call: Call) -> mx.array:
        q, k, v = self.project(x)
        positions = call.positions(cache)
        q, k = self._rope(q, k, positions)
        scale = self.head_dim**-0.5
        return self.o_proj(window_attention(q, k, v, cache, call, scale=scale, window=self.window))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()
        self.is_recurrent = kind == "recurrent"
        self.temporal_pre_norm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.temporal_block = RecurrentBlock(args) if self.is_recurrent else Attention(args)
        self.channel_pre_norm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        act = activation(args.hidden_activation)
        self.mlp_block = GatedMLP(args.hidden_size, args.intermediate_size // 2, act, bias=True)

    def __call__(self, x: mx.array, cache: Any, call: Call) -> mx.array:
        x = x + self.temporal_block(self.temporal_pre_norm(x), cache, call)
        return x + self.mlp_block(self.channel_pre_norm(x))


class Griffin(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind) for kind in args.layer_types]
        self.final_norm = RMSNorm1P(args.hidden_size, args.rms_norm_eps)
        self.embedding_scale: Any = 1.0
        if args.embeddings_scale_by_sqrt_dim:
            self.embedding_scale = mx.array(sqrt(args.hidden_size), dtype=mx.bfloat16).item()

    def __call__(
        self, inputs: mx.array | None, cache: heads.States = None, call: Call | None = None
    ) -> mx.array:
        call = call or Call()
        x = call.inputs_embeds
        if x is None:
            x = embed(self.embed_tokens, inputs, self.final_norm)
        return call.run(self.layers, self.final_norm, x * self.embedding_scale, cache)


class Model(heads.TaskModel):
    decoder = Griffin
    tasks = (heads.CAUSAL_LM, heads.BASE)

    def logits(self, hidden: mx.array) -> mx.array:
        return softcap(super().logits(hidden), self.args.logits_soft_cap)

    def new_states(self) -> list[RecurrentState | WindowCache]:
        return [
            RecurrentState() if layer.is_recurrent else WindowCache(self.args.window)
            for layer in self.layers
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = super().sanitize(weights)
        for name, value in weights.items():
            # torch stores [E, 1, K]; a converted file already has [E, K, 1].
            if name.endswith("conv_1d.weight") and value.ndim == 3 and value.shape[-1] != 1:
                weights[name] = value.swapaxes(1, 2)
        return weights
