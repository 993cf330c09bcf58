"""What `gryphon show` tells about a model: counted from safetensors headers, without MLX."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.library import licenses
from app.library.installed import InstalledModel, read_config, read_tensors, weight_files
from mlxmodels.checkpoint import group_size, parameter_count
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry

# One name per fact; families that came before today's Hugging Face names call it something else.
_ALIASES = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "heads": ("num_attention_heads", "attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class ModelDetails:
    """A model in numbers; None where its files do not say."""

    model: InstalledModel
    parameters: int
    """Weights as the model computes with them: a packed tensor counts what it unpacks to."""
    weight_bytes: int
    tensors: dict[str, int]
    """Weight tensors per storage, for example {"4-bit": 210, "8-bit": 1, "F16": 61}."""
    layers: int | None
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    vocab_size: int | None
    license: str | None
    chat_templates: dict[str, str]
    """By name; a lone one is "default"."""
    config: dict[str, Any]
    """config.json."""

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)


def describe(model: InstalledModel) -> ModelDetails:
    """Read the details of an installed model.

    Raises:
        GryphonError: "invalid_model" when one of its files is damaged.
    """
    config = read_config(model.path)
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(model.path):
        tensors |= read_tensors(file)
    storages: Counter[str] = Counter()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if scales is None or part not in ("weight", "scales", "biases"):
            storages[tensor.dtype] += 1
        elif part == "weight":
            values = math.prod(scales.shape) * group_size(config, module)
            storages[f"{tensor.nbytes * 8 // max(values, 1)}-bit"] += 1
    return ModelDetails(
        model=model,
        parameters=parameter_count(config, tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tensors=dict(storages.most_common()),
        license=_license(model.path) or licenses.remembered(model.base or model.name),
        chat_templates=_chat_templates(model.path),
        config=config,
        **{fact: _first_int(config, names) for fact, names in _ALIASES.items()},
    )


def mentions_tools(model: InstalledModel) -> bool:
    """Whether its chat template speaks of tools: without, it cannot be told of them."""
    texts = []
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        try:
            text = (model.path / name).read_text(encoding="utf-8", errors="replace")
            read = text if name.endswith(".jinja") else json.loads(text)
        except (OSError, ValueError, RecursionError):
            continue
        texts.append(str(read.get("chat_template") if isinstance(read, dict) else read))
    return any("tools" in text for text in texts)


def _first_int(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _license(path: Path) -> str | None:
    """`license:` in the front matter of README.md, where the Hugging Face hub keeps it."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not card.startswith("---"):
        return None
    for line in card.split("---", 2)[1].splitlines():
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip().strip("'\"")
    return None


def _chat_templates(path: Path) -> dict[str, str]:
    from mlxmodels.tokenizer import read_chat_templates  # brings the tokenizers library

    try:
        return read_chat_templates(path)
    except ModelError:
        return {}
