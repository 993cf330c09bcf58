"""What a LoRA adapter's directory says about itself, checked before MLX opens it. No MLX here.

mlx-lm's trainer (`mlx_lm.lora`) writes two files: adapter_config.json, the settings of the
training, and adapters.safetensors, the trained tensors by the names they have in the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mlxmodels.checkpoint import listed, read_json
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry, read_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapters.safetensors"

FineTuneType = Literal["lora", "dora", "full"]
"""Low-rank products beside linear layers; those with a magnitude; whole tensors of the model."""

_MAX_RANK = 4096
_MAX_SCALE = 10_000.0
_MAX_KEYS = 256
_BELOW_ONE = 1 - 2.0**-53
_FLOATING = {"F32", "F16", "BF16"}
_ADVICE = "Copy or train the adapter again."


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files describe it.

    Attributes:
        num_layers: How many of the model's last layers it changes; 0 or less is all.
        parameters: mlx-lm's `lora_parameters`: rank, scale, dropout, and keys if they are given.
        base: What its training called the model: a repository, a path, or nothing.
        tensors: From the checked header of its safetensors file, by name.
    """

    path: Path
    fine_tune_type: FineTuneType
    num_layers: int
    parameters: dict[str, Any]
    base: str
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(path: Path) -> Adapter:
    """Read an adapter's directory.

    Raises:
        ModelError: a file is missing or damaged, or a setting is unknown or out of range, by name.
    """
    if not path.is_dir():
        raise ModelError(
            f"{path} is not a directory; an adapter is one with {CONFIG_FILE} and {TENSORS_FILE}."
        )
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (path / name).is_file():
            raise _missing(path, name)
    config = read_json(path / CONFIG_FILE)
    if "peft_type" in config:
        raise ModelError(f"{path} is an adapter made by PEFT; Gryphon loads those made by mlx-lm.")
    kind = config.get("fine_tune_type", "lora")
    if kind not in get_args(FineTuneType):
        raise _wrong(path, "fine_tune_type", " or ".join(get_args(FineTuneType)), kind)
    num_layers = config.get("num_layers")
    if kind != "full" and type(num_layers) is not int:
        raise _wrong(path, "num_layers", "a whole number", num_layers)
    tensors, _ = read_file(path / TENSORS_FILE, _ADVICE)
    if not tensors:
        raise ModelError(f"{path / TENSORS_FILE} holds no tensor. {_ADVICE}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ModelError(
                f"{path / TENSORS_FILE} stores {name} as {tensor.dtype}, and an adapter's tensors "
                f"are {', '.join(sorted(_FLOATING))}. {_ADVICE}"
            )
    base = config.get("model")
    return Adapter(
        path=path,
        fine_tune_type=kind,
        num_layers=num_layers if type(num_layers) is int else 0,
        parameters={} if kind == "full" else _parameters(path, config.get("lora_parameters")),
        base=base if isinstance(base, str) else "",
        tensors=tensors,
    )


def _missing(path: Path, name: str) -> ModelError:
    others = sorted(
        file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".npz", ".pkl")
    )
    if name == TENSORS_FILE and others:
        return ModelError(
            f"{path} has {listed(others)} and no {name}: only safetensors files are read, because "
            "the others may run code."
        )
    return ModelError(f"{path} is not an adapter made by mlx-lm: it has no {name}.")


def _parameters(path: Path, given: object) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise _wrong(path, "lora_parameters", "an object with rank, scale and dropout", given)
    unknown = sorted(set(given) - {"rank", "scale", "dropout", "keys"})
    if unknown:
        known = "rank, scale, dropout and keys"
        raise _wrong(path, f"lora_parameters.{unknown[0]}", f"one of {known}", given[unknown[0]])
    rank, scale, dropout = given.get("rank"), given.get("scale"), given.get("dropout")
    if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
        raise _wrong(path, "lora_parameters.rank", f"1 to {_MAX_RANK}", rank)
    if not _is_number(scale, -_MAX_SCALE, _MAX_SCALE):
        raise _wrong(path, "lora_parameters.scale", f"a number up to {_MAX_SCALE:g}", scale)
    if not _is_number(dropout, 0.0, _BELOW_ONE):
        raise _wrong(path, "lora_parameters.dropout", "0 up to 1, 1 excluded", dropout)
    keys = given.get("keys")
    if keys is not None and not (
        isinstance(keys, list)
        and 0 < len(keys) <= _MAX_KEYS
        and all(isinstance(key, str) and key for key in keys)
    ):
        raise _wrong(path, "lora_parameters.keys", f"a list of 1 to {_MAX_KEYS} names", keys)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    return parameters if keys is None else parameters | {"keys": keys}


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # NaN is not


def _wrong(path: Path, name: str, expected: str, got: object) -> ModelError:
    shown = repr(got)
    shown = shown if len(shown) < 80 else f"{shown[:77]}..."
    return ModelError(f"{path / CONFIG_FILE}: {name} must be {expected}, got {shown}.")
