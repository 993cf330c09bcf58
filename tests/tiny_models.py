"""Tiny checkpoints with random weights, written to disk as real ones are.

They declare no end-of-sequence token, so an answer has exactly the length that was asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten, tree_map
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

OPEN_LLAMA: dict[str, Any] = {
    "model_type": "open-llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "use_stable_embedding": False,
    "shared_input_output_embedding": True,
    "vocab_size": 259,
}

RECURRENT_GEMMA: dict[str, Any] = {
    "model_type": "recurrent_gemma",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "attention_window_size": 8,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "block_types": ["recurrent", "recurrent", "attention"],
    "hidden_activation": "gelu_pytorch_tanh",
    "lru_width": 32,
    "vocab_size": 259,
}

GEMMA: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "vocab_size": 259,
}

GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
}

NEMOTRON = GEMMA | {"model_type": "nemotron", "num_key_value_heads": 2}

XGLM: dict[str, Any] = {
    "model_type": "xglm",
    "d_model": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "attention_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 259,
}

# A family of mlx-lm's zoo that we do not port.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 259,
}

# Hybrids of the zoo: Mamba 2 beside attention in every layer, and gated delta layers between layers
# of attention, with experts.
FALCON_H1: dict[str, Any] = {
    "model_type": "falcon_h1",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_d_conv": 4,
    "mamba_d_head": 8,
    "mamba_d_ssm": 32,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_rms_norm": True,
    "max_position_embeddings": 512,
    "vocab_size": 259,
}

QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "full_attention_interval": 2,
    "vocab_size": 259,
}


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255), then three specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<eos>"])
    return tokenizer


def write_model(path: Path, config: dict[str, Any], *, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint directory: config, weights, tokenizer, chat template."""
    from mlxmodels import registry

    config = config | changes
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(seed)

    def randomized(weight: mx.array) -> mx.array:
        return mx.random.normal(weight.shape) * (0.4 if weight.ndim > 1 else 0.2)

    weights = tree_map(randomized, model.parameters())
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"}
    )
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def write_adapter(path: Path, base: Path, *, seed: int = 0) -> Path:
    """Write a LoRA adapter for a checkpoint as mlx-lm's trainer does, with random weights."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from mlxmodels import registry

    model, _ = load_model(base, get_model_classes=registry.model_classes)
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), parameters)
    mx.random.seed(seed)
    weights = tree_map(lambda w: mx.random.normal(w.shape), model.trainable_parameters())
    path.mkdir(parents=True)
    settings = {"fine_tune_type": "lora", "num_layers": len(model.layers), "model": str(base)}
    text = json.dumps(settings | {"lora_parameters": parameters})
    (path / "adapter_config.json").write_text(text)
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(weights)))
    return path


def write_scripted_model(
    path: Path, pieces: list[str], *, specials: tuple[str, ...] = (), template: str = TEMPLATE
) -> Path:
    """A checkpoint that always answers, greedily, with these pieces, one token each, all different.

    Any other token is followed by the first of them, the last by the end of the sequence.
    """
    from mlxmodels import registry

    tokenizer = byte_tokenizer()
    for piece in pieces:
        token = tokenizers.AddedToken(piece, normalized=False, special=piece in specials)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    size = tokenizer.get_vocab_size()
    ids = [tokenizer.token_to_id(piece) for piece in pieces] + [tokenizer.token_to_id("<eos>")]
    config = LLAMA | {
        "hidden_size": -(-size // 16) * 16,
        "num_hidden_layers": 1,
        "vocab_size": size,
        "tie_word_embeddings": False,
        "eos_token_id": ids[-1],
    }
    path = write_model(path, config)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))
    # The layers add nothing, so what comes out is what went in, one of as many directions.
    weights = {name: mx.zeros_like(w) for name, w in tree_flatten(model.parameters())}
    follows = dict.fromkeys(range(size), ids[0]) | dict(zip(ids, ids[1:], strict=False))
    weights["model.embed_tokens.weight"] = mx.eye(size, config["hidden_size"])
    columns = mx.eye(size)[mx.array([follows[id] for id in range(size)])]
    padding = mx.zeros((config["hidden_size"] - size, size))
    weights["lm_head.weight"] = mx.concatenate([columns, padding]).T
    weights["model.norm.weight"] = mx.ones(config["hidden_size"])
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path
