"""The files of a model with random weights, as bytes: what a hub would hold."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "open-llama",
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
    "hidden_size": 32,
}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """`tensors`: name → dtype, shape, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [position, position + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values())


def model_files(
    shards: int = 1, size: int = 20_000, seed: float = 0, config: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """A repository with `size` bytes of weights in each of `shards` safetensors files."""
    source = random.Random(seed)
    files = {
        "config.json": json.dumps(CONFIG if config is None else config).encode(),
        "tokenizer.json": json.dumps({"seed": seed}).encode(),
        "tokenizer.model": source.randbytes(2_000),
        "chat_template.jinja": b"{{ messages }}",
    }
    weight_map = {}
    for shard in range(1, shards + 1):
        name = f"model-{shard:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        weight_map[f"layers.{shard}.weight"] = name
        tensor = ("F16", [size // 2], source.randbytes(size // 2 * 2))
        files[name] = safetensors({f"layers.{shard}.weight": tensor})
    if shards > 1:
        files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files
