"""Tiny checkpoints: the goldens, and directories as people download them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tokenizers
from mlx.utils import tree_flatten, tree_map
from tokenizers import decoders, models, pre_tokenizers

from mlxmodels import registry

from .. import tiny_models

_OWN = {"vocab_size": 97, "eos_token_id": 1}
GEMMA = tiny_models.GEMMA | _OWN
GEMMA2 = tiny_models.GEMMA2 | _OWN | {"sliding_window": 7, "attn_logit_softcapping": 5.0}
NEMOTRON = tiny_models.NEMOTRON | _OWN
XGLM = tiny_models.XGLM | _OWN
OPEN_LLAMA = tiny_models.OPEN_LLAMA | _OWN | {"use_stable_embedding": True}
OPEN_LLAMA_DYNAMIC = OPEN_LLAMA | {
    "max_position_embeddings": 12,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}
RECURRENT_GEMMA = tiny_models.RECURRENT_GEMMA | {
    **_OWN,
    "attention_window_size": 7,
    "num_hidden_layers": 4,
    "block_types": ["recurrent", "attention"],
}

CONFIGS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "nemotron": NEMOTRON,
    "xglm": XGLM,
    "recurrent_gemma": RECURRENT_GEMMA,
    "open_llama": OPEN_LLAMA,
    "open_llama_dynamic": OPEN_LLAMA_DYNAMIC,
}


def build(config: dict[str, Any]) -> Any:
    """A port with its initial weights."""
    model_class, args_class = registry.model_classes(config)
    return model_class(args_class.from_dict(config))  # type: ignore[attr-defined]


def random_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A port with random weights under which every part matters."""
    model = build(config)
    mx.random.seed(seed)
    weights = tree_map(lambda w: mx.random.normal(w.shape) * 0.25, model.parameters())
    model.update(weights)
    mx.eval(model.parameters())
    return model


def byte_tokenizer(vocab_size: int = 97) -> tokenizers.Tokenizer:
    """Single characters from "!" up; ids 0 and 1 are <s> and </s>."""
    vocab = {"<s>": 0, "</s>": 1} | {chr(31 + i): i for i in range(2, vocab_size)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_checkpoint(
    path: Path, config: dict[str, Any], weights: dict[str, mx.array], shards: int = 1
) -> Path:
    """A model directory; with several shards also their index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        mx.save_safetensors(str(path / file), part)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def flat(model: Any) -> dict[str, mx.array]:
    """A model's parameters by checkpoint name."""
    return dict(tree_flatten(model.parameters()))


@pytest.fixture
def tokens() -> mx.array:
    """40 random ids, [1, 40]."""
    return mx.random.randint(2, 97, (1, 40), key=mx.random.key(5))
