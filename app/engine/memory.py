"""Does a model fit? Answered from its files' headers before MLX opens them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import psutil

from app.errors import GryphonError
from mlxmodels.checkpoint import parameter_count, read_config, weight_files
from mlxmodels.safetensors_header import TensorEntry, read_header

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


def weights_of(path: Path) -> tuple[int, int]:
    """Weights of a model directory, quantized ones counted as weights, and their bytes as stored.

    Raises:
        ModelError: its config or one of its files cannot be read.
    """
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(path):
        tensors |= read_header(file)
    count = parameter_count(read_config(path), tensors)
    return count, sum(tensor.nbytes for tensor in tensors.values())


def plan_load(path: Path) -> LoadPlan:
    """Choose how to hold a model, or refuse it.

    On Apple GPUs weights stay as stored. On a CPU everything is expanded to float32 where memory
    allows: 16-bit and quantized products run up to a hundred times slower there.

    Raises:
        GryphonError: "does_not_fit", with the arithmetic.
        ModelError: the weights' headers cannot be read.
    """
    parameters, file_bytes = weights_of(path)
    available = available_bytes()
    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        # While weights are expanded both forms exist; what is float32 already is taken as it is.
        needed = 4 * parameters if file_bytes == 4 * parameters else 4 * parameters + file_bytes
        if needed <= available:
            return LoadPlan(file_bytes, 4 * parameters, mx.float32, "float32")
        if file_bytes <= available:
            note = (
                f"slow: weights as stored, because float32 needs {_gib(needed)} and "
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
