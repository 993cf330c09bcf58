"""A directory that is to be converted: checked before anything is built, without MLX."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxmodels import checkpoint, registry
from mlxmodels.checkpoint import listed
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry, read_header

SIDE_SUFFIXES = (".json", ".model", ".txt", ".jinja")
"""Of files that go with the weights: tokenizer, templates, settings of generation."""

_MAX_SIDE_BYTES = 1_000_000_000
# Of packed formats, whichever program wrote them.
_PACKED_PARTS = ("scales", "qweight", "qzeros", "weight_scale", "weight_scale_inv", "weight_packed")
_FLOATS = ("F32", "F16", "BF16")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_OTHERS = {".npz", ".npy", ".h5", ".keras", ".msgpack", ".sbs", ".task", ".tflite", ".onnx"}
_ORBAX = {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint", ".zarray"}
_ORIGINAL = re.compile(r"(recurrentgemma|gemma|griffin)[\w.-]*|\d+b(-it)?", re.ASCII)


@dataclass(frozen=True)
class FloatCheckpoint:
    """What a source holds, from checked files."""

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    side_files: tuple[Path, ...]


def read(path: Path) -> FloatCheckpoint:
    """Read a Hugging Face checkpoint with float weights.

    Raises:
        ModelError: there is none, it is damaged, it is packed already, or it holds what cannot be
            converted: each by name.
    """
    if path.is_dir():
        refuse_other_forms(path)
    config = checkpoint.read_config(path)
    registry.known(config["model_type"])
    files = checkpoint.weight_files(path)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        tensors |= read_header(file)
    refuse_packed(str(path), config, tensors)
    if (path / "hf_quant_config.json").exists():
        raise _packed(str(path), "hf_quant_config.json says so")
    return FloatCheckpoint(path, config, tuple(files), tensors, tuple(_side_files(path)))


def refuse_packed(name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """
    Raises:
        ModelError: the weights are quantized already, or of a kind that is not converted.
    """
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization", "quantization_config", "compression_config"):
            if source.get(key):
                raise _packed(name, f"its config.json has {key}")
    packed = [tensor for tensor in tensors if tensor.rpartition(".")[2] in _PACKED_PARTS]
    if packed:
        raise _packed(name, f"it holds {listed(packed)}")
    for tensor, entry in tensors.items():
        if entry.dtype.startswith("F8") or entry.dtype in ("F64", "C64"):
            raise ModelError(
                f"{name} stores {tensor} as {entry.dtype}; a conversion reads "
                f"{', '.join(_FLOATS)}. Use a build of the model in one of these."
            )


def refuse_other_forms(path: Path) -> None:
    """Say what a checkpoint is that is no safetensors checkpoint.

    Args:
        path: A directory, or a file.

    Raises:
        ModelError: it is in another form; the sentence names what to fetch instead.
    """
    entries = [path] if path.is_file() else sorted(_near(path))
    if any(entry.suffix == ".safetensors" for entry in entries):
        return
    instead = _instead(path, entries)
    for entry in entries:
        if entry.suffix in _PICKLES and "tokenizer" not in entry.name:
            raise ModelError(
                f"{entry} is a PyTorch pickle, and reading one would run whatever code is in it. "
                f"{instead}"
            )
    for entry in entries:
        if entry.name in _ORBAX:
            raise ModelError(
                f"{entry.parent} is an Orbax checkpoint of JAX, which Gryphon does not read. "
                f"{instead}"
            )
    for entry in entries:
        if entry.suffix in _OTHERS:
            raise ModelError(f"{entry} is in a form that Gryphon does not read. {instead}")
        if entry.suffix == ".gguf" and entry != path:
            raise ModelError(f"{path} holds a GGUF: give the file itself, {entry}.")
    if path.is_file():
        raise ModelError(f"{path} is no checkpoint: give a directory with config.json, or a .gguf.")


def _near(path: Path) -> Iterator[Path]:
    """What is in a directory, and in those inside it."""
    for entry in path.iterdir():
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from entry.iterdir()


def _instead(path: Path, entries: list[Path]) -> str:
    """Google publishes the same weights in several forms, of which one is safetensors."""
    names = [path.name, *(entry.stem for entry in entries)]
    found = [name for name in names if _ORIGINAL.fullmatch(name.lower())]
    if not found:
        return "Fetch the model as safetensors, in the layout of Hugging Face's transformers."
    return (
        "Google publishes the same weights as safetensors on the Hugging Face Hub: "
        "google/recurrentgemma-2b, google/recurrentgemma-2b-it, google/gemma-2b, google/gemma-2-2b "
        "and their kin. `gryphon pull google/recurrentgemma-2b-it -q 4` fetches and converts one."
    )


def _side_files(path: Path) -> Iterator[Path]:
    """Files to copy, each inside the directory or among the blobs of its repository."""
    inside = (path.resolve(), (path.parent.parent / "blobs").resolve())
    for file in sorted(path.iterdir()):
        is_weights = file.name.endswith(".safetensors.index.json")
        if file.suffix not in SIDE_SUFFIXES or file.name == "config.json" or is_weights:
            continue
        target = file.resolve()
        if target.parent not in inside:
            raise ModelError(
                f"{file} is a link to {target}, outside its directory. Put the file itself there, "
                f"or remove it."
            )
        if not target.is_file():
            raise ModelError(f"{file} is not a regular file. Remove it.")
        if target.stat().st_size > _MAX_SIDE_BYTES:
            raise ModelError(f"{file} has {target.stat().st_size:,} bytes. Remove it.")
        yield file


def _packed(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} is quantized already ({why}). Rounding it once more would add error to error: "
        f"convert the model's float weights instead."
    )
