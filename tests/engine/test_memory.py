"""What fits is decided from headers, before MLX opens a file, and the arithmetic is shown."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlxmodels
from app.engine import memory
from app.errors import GryphonError

from ..tiny_models import OPEN_LLAMA, write_model

GIB = 1024**3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", OPEN_LLAMA)


def _quantized(path: Path) -> Path:
    """The same model at 4 bits, its head at 8 with another group size."""
    loaded = mlxmodels.load(path).model
    overrides = {"model.embed_tokens": {"group_size": 32, "bits": 8}}

    def how(name: str, module: nn.Module) -> bool | dict[str, int]:
        return hasattr(module, "to_quantized") and overrides.get(name, True)

    nn.quantize(loaded, 32, 4, class_predicate=how)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(loaded.parameters())), {"format": "mlx"}
    )
    config = OPEN_LLAMA | {"quantization": {"group_size": 32, "bits": 4, **overrides}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_parameters_are_counted_as_weights_whatever_they_are_stored_as(model: Path) -> None:
    plain, plain_bytes = memory.weights_of(model)
    weights = dict(tree_flatten(mlxmodels.load(model).model.parameters()))
    assert plain == sum(weight.size for weight in weights.values())
    assert plain_bytes == sum(weight.nbytes for weight in weights.values())
    packed, packed_bytes = memory.weights_of(_quantized(model))
    assert packed == plain and packed_bytes < plain_bytes / 3


def test_the_plan_is_what_loading_then_takes(model: Path) -> None:
    plan = memory.plan_load(_quantized(model))
    assert plan.dtype == mx.float32
    assert mlxmodels.load(model, dtype=plan.dtype).nbytes == plan.weight_bytes


def test_weights_stay_as_stored_where_float32_does_not_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, file_bytes = memory.weights_of(_quantized(model))
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * parameters)
    plan = memory.plan_load(model)
    assert (plan.dtype, plan.weight_bytes) == (None, file_bytes)
    assert "slow" in plan.note and "float32" in plan.note


def test_what_does_not_fit_is_refused_with_the_arithmetic(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "weights_of", lambda path: (10 * GIB, 20 * GIB))
    monkeypatch.setattr(memory, "available_bytes", lambda: 6 * GIB)
    with pytest.raises(GryphonError) as caught:
        memory.plan_load(model)
    assert caught.value.code == "does_not_fit"
    assert "20.0 GiB" in caught.value.message and "6.0 GiB" in caught.value.message


def test_a_reserve_is_left_to_the_rest_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 100

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Memory)
    assert memory.available_bytes() == 0
    Memory.available = 4 * GIB
    assert memory.available_bytes() < 4 * GIB
