"""Reads what a model directory says about itself, without building the model.

Everything here fails with a ModelError that names the file, so that no later step meets a missing
key or half a tensor.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry, read_header


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, with a `model_type`.

    Raises:
        ModelError: the directory, the file or the key is missing, or the model brings code.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist; check the path or download the model first.")
    if not path.is_dir():
        raise ModelError(f"{path} is a file; give the directory that holds config.json.")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json.")
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f"{path / 'config.json'} names no model_type, so its family is unknown.")
    for key in ("model_file", "auto_map"):
        if config.get(key):
            raise ModelError(
                f"{path / 'config.json'} sets {key}: this model brings code of its own, "
                f"which Gryphon does not run; use a checkpoint without it."
            )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; download it again.")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but a file that is not there is an empty object."""
    return read_json(path) if path.is_file() else {}


def weight_files(path: Path) -> list[Path]:
    """The checked safetensors files of a model directory, each tensor in exactly one of them.

    Raises:
        ModelError: none is there, a listed one is missing, or one is damaged.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(path, read_json(index))
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{path} has no *.safetensors weights; download the model again, "
            f"or convert it if it came as .bin, .pt or .gguf."
        )
    owner: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):
            if name in owner:
                raise ModelError(
                    f"{file.name} and {owner[name].name} in {path} both hold {name}; "
                    f"remove the file that does not belong to this model."
                )
            owner[name] = file
    return files


def _indexed_files(path: Path, index: Mapping[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}/model.safetensors.index.json has no weight_map.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not 0 < len(name) < 256:
            raise ModelError(
                f"{path}/model.safetensors.index.json names {name!r}, expected a file beside it."
            )
    files = [path / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{path} lacks {listed(missing)} that its index lists; download the model again."
        )
    for file in files:
        lost = {name for name, shard in weight_map.items() if shard == file.name} - set(
            read_header(file)
        )
        if lost:
            raise ModelError(f"{file} lacks {listed(sorted(lost))} that its index promises.")
    return files


def parameter_count(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> int:
    """Weights as the model computes with them: a packed tensor counts what it unpacks to.

    Args:
        config: config.json.
        tensors: Of all the model's files together: a layer's parts may lie in different ones.
    """
    count = 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if scales is None or part not in ("weight", "scales", "biases"):
            count += prod(tensor.shape)
        elif part == "weight":
            count += prod(scales.shape) * group_size(config, module)
    return count


def group_size(config: Mapping[str, Any], module: str) -> int:
    """Weights per scale of a quantized layer; MLX's default where config.json does not say."""
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, dict):
            for source in (settings.get(module), settings):
                size = source.get("group_size") if isinstance(source, dict) else None
                if type(size) is int and 0 < size < 2**31:
                    return size
    return 64


def eos_token_ids(*sources: Mapping[str, Any]) -> frozenset[int]:
    """Every end-of-sequence id the given config files declare, as a number or as a list."""
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids.update(v for v in values if type(v) is int and v >= 0)
    return frozenset(ids)


def listed(names: list[str], shown: int = 3) -> str:
    """The first few names and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
