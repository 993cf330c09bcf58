"""A LoRA adapter made by mlx-lm is put on a loaded model, every tensor of it or none.

The products stay beside the layers they belong to and are not added into their weights: an answer
then has the numbers that the adapter was trained with, a quantized base stays as it is, and the
base of two adapters is the same to the last bit. It costs two thin products per layer.
"""

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmodels.adapter_files import TENSORS_FILE, Adapter, read_adapter
from mlxmodels.checkpoint import listed
from mlxmodels.errors import ModelError
from mlxmodels.loading import LoadedModel

_LEAVES = ("lora_a", "lora_b", "m")


def with_adapter(loaded: LoadedModel, path: str | Path) -> LoadedModel:
    """A loaded model with an adapter on it; the model given is changed and of no more use alone.

    Args:
        loaded: The base.
        path: A directory as `mlx_lm.lora` writes it.

    Raises:
        ModelError: the adapter's files are wrong, or it belongs to another model.
    """
    adapter = read_adapter(Path(path))
    model = loaded.model
    if adapter.fine_tune_type != "full":
        _make_room(model, adapter)
    expected = _expected(model, adapter)
    _check(adapter, expected)
    tensors = mx.load(str(adapter.path / TENSORS_FILE))
    assert isinstance(tensors, dict)
    # What the model computes in: tensors of another dtype would widen every product after them.
    if adapter.fine_tune_type == "full":
        tensors = {name: value.astype(expected[name].dtype) for name, value in tensors.items()}
    elif _is_float32(model):
        tensors = {name: value.astype(mx.float32) for name, value in tensors.items()}
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return dataclasses.replace(
        loaded, nbytes=sum(value.nbytes for value in _parameters(model).values())
    )


def _make_room(model: nn.Module, adapter: Adapter) -> None:
    """Replace the layers that the adapter changes by mlx-lm's, with nothing learned yet."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = len(model.layers)
    if adapter.num_layers > layers:
        raise _another_base(adapter, f"it changes {adapter.num_layers} layers of {layers}")
    names = {name for layer in model.layers for name, _ in layer.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    unknown = sorted(set(adapter.parameters.get("keys") or []) - names)
    if unknown:
        raise _another_base(adapter, f"no layer has {listed(unknown)}")
    try:
        linear_to_lora_layers(
            model,
            adapter.num_layers,
            adapter.parameters,
            use_dora=adapter.fine_tune_type == "dora",
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{adapter.path} cannot be put on this model: {error}.") from error


def _expected(model: nn.Module, adapter: Adapter) -> dict[str, mx.array]:
    """The model's tensors that the adapter may hold."""
    parameters = _parameters(model)
    if adapter.fine_tune_type == "full":
        # Not the packed weights of a quantized base.
        return {n: v for n, v in parameters.items() if mx.issubdtype(v.dtype, mx.floating)}
    return {n: value for n, value in parameters.items() if n.rpartition(".")[2] in _LEAVES}


def _check(adapter: Adapter, expected: dict[str, mx.array]) -> None:
    extra = sorted(set(adapter.tensors) - set(expected))
    if extra:
        raise _another_base(adapter, f"it has no place for {listed(extra)}")
    missing = sorted(set(expected) - set(adapter.tensors))
    if missing and adapter.fine_tune_type != "full":
        raise _another_base(adapter, f"the adapter lacks {listed(missing)}")
    for name, tensor in adapter.tensors.items():
        if tensor.shape != expected[name].shape:
            raise _another_base(
                adapter, f"{name} is of shape {tensor.shape} and would be {expected[name].shape}"
            )


def _another_base(adapter: Adapter, why: str) -> ModelError:
    base = f" ({adapter.base})" if adapter.base else ""
    return ModelError(
        f"{adapter.path} does not belong to this model: {why}. Use it with the model it was "
        f"trained on{base}."
    )


def _is_float32(model: nn.Module) -> bool:
    """Whether all of the model's weights are, as on a CPU."""
    return all(
        value.dtype == mx.float32
        for name, value in _parameters(model).items()
        if name.rpartition(".")[2] not in _LEAVES
    )


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})  # type: ignore[return-value]
