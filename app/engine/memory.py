"""Does a model fit? Answered from its files' headers before MLX opens them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import psutil

from app.errors import GryphonError
from mlxmodels.safetensors_header import read_header

# Left to the rest of the machine, on top of what the model needs.
_RESERVE_BYTES = 768 * 1024**2


@dataclass(frozen=True)
class LoadPlan:
    """How a model will be held in memory.

    Attributes:
        file_bytes: Size of its weights as stored.
        weight_bytes: Size of its weights as they will be held.
        dtype: The dtype everything is expanded to; None keeps what is stored.
        note: What a person should know about the choice.
    """

    file_bytes: int
    weight_bytes: int
    dtype: mx.Dtype | None
    note: str


def available_bytes() -> int:
    """Bytes a model may take on the default device right now, the reserve already left out."""
    free = int(psutil.virtual_memory().available)
    if mx.default_device() == mx.Device(mx.DeviceType.gpu):
        working_set = mx.device_info().get("max_recommended_working_set_size")
        if working_set:
            free = min(free, int(working_set) - mx.get_active_memory())
    return max(0, free - _RESERVE_BYTES)


def parameter_count(path: Path) -> tuple[int, int]:
    """Number of weights in a model directory, quantized ones counted as weights, and their bytes.

    Raises:
        ModelError: a file is not a whole safetensors file.
    """
    config = json.loads((path / "config.json").read_text())
    quantization = config.get("quantization") or {}
    parameters = file_bytes = 0
    for file in sorted(path.glob("*.safetensors")):
        tensors = read_header(file)
        for name, tensor in tensors.items():
            file_bytes += tensor.nbytes
            stem, _, kind = name.rpartition(".")
            if f"{stem}.scales" not in tensors or kind not in ("weight", "scales", "biases"):
                parameters += math.prod(tensor.shape)
            elif kind == "scales":
                layer = quantization.get(stem)
                settings = layer if isinstance(layer, dict) else quantization
                parameters += math.prod(tensor.shape) * int(settings.get("group_size", 64))
    return parameters, file_bytes


def plan_load(path: Path) -> LoadPlan:
    """Choose how to hold a model, or refuse it.

    On Apple GPUs weights stay as stored. On a CPU everything is expanded to float32 where memory
    allows: 16-bit and quantized products run up to a hundred times slower there.

    Raises:
        GryphonError: "does_not_fit", with the arithmetic.
        ModelError: the weights' headers cannot be read.
    """
    parameters, file_bytes = parameter_count(path)
    available = available_bytes()
    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        # While a layer is expanded both forms of it exist; the files stay mapped until the end.
        if 4 * parameters + file_bytes <= available:
            return LoadPlan(file_bytes, 4 * parameters, mx.float32, "float32")
        if file_bytes <= available:
            note = (
                f"slow: weights as stored, because float32 needs {_gib(4 * parameters)} and "
                f"{_gib(available)} is available"
            )
            return LoadPlan(file_bytes, file_bytes, None, note)
    elif file_bytes <= available:
        return LoadPlan(file_bytes, file_bytes, None, "weights as stored")
    raise GryphonError(
        "does_not_fit",
        f"{path.name} does not fit: its weights take {_gib(file_bytes)} and this machine has "
        f"{_gib(available)} available for a model ({_gib(_RESERVE_BYTES)} is left to everything "
        "else). Close other programs, or use a smaller or more quantized build.",
    )


def _gib(count: int) -> str:
    return f"{count / 1024**3:.1f} GiB"
