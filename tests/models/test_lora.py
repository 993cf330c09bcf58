"""Fine-tuning through mlx-lm's trainer, and the gradients it stands on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from metal import reference
from mlxmodels.quantization import quantize

from .conftest import CONFIGS, flat, random_model

FAMILIES = [name for name in CONFIGS if name != "open_llama_dynamic"]
ADAPTER = {"rank": 4, "scale": 5.0, "dropout": 0.0}
TEXTS = [([5 + i * i % 11 for i in range(n)], 0) for n in (9, 12, 20, 31)]
"""Rows of ids, and how many of them are not learned."""
ITERATIONS = 16


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """MLX builds what it compiles with the C++ compiler on a CPU, which takes minutes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def base_model(family: str, bits: int | None) -> Any:
    if bits is None:
        return random_model(CONFIGS[family])
    model = random_model(CONFIGS[family] | {"hidden_size": 64, "intermediate_size": 128})
    quantize(model, bits=bits, group_size=32)
    return model


def with_adapters(model: Any) -> Any:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(1)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), ADAPTER)
    return model


class Losses:
    """mlx-lm's callback: the loss of every iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.values.append(report["train_loss"])

    def on_val_loss_report(self, report: dict[str, Any]) -> None: ...


def train(model: Any, directory: Path, grad_checkpoint: bool = False) -> list[float]:
    """Losses of a few iterations; the adapters end up in `directory` as mlx-lm's command does."""
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as run

    directory.mkdir()
    described = {"num_layers": len(model.layers), "lora_parameters": ADAPTER}
    (directory / "adapter_config.json").write_text(json.dumps(described))
    np.random.seed(0)  # the order of the batches
    losses = Losses()
    arguments = TrainingArgs(
        batch_size=2,
        iters=ITERATIONS,
        steps_per_report=1,
        adapter_file=str(directory / "adapters.safetensors"),
        grad_checkpoint=grad_checkpoint,
    )
    run(model, optim.Adam(1e-2), TEXTS, args=arguments, training_callback=losses)
    return losses.values


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("family", "bits"),
    [*((family, None) for family in FAMILIES), ("recurrent_gemma", 4), ("gemma2", 4)],
)
def test_adapters_learn_in_every_layer_and_load_again(
    tmp_path: Path,
    family: str,
    bits: int | None,
    tokens: mx.array,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    base, model = base_model(family, bits), with_adapters(base_model(family, bits))
    before = flat(model)
    losses = train(model, tmp_path / "adapters")
    assert len(losses) == ITERATIONS
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.4  # nats; measured 0.5 to 7.3

    after = flat(model)
    moved = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("lora_a", "lora_b"))}
    linears = {n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    inner = {name for name in linears if name.startswith("model.layers.")}
    assert moved == {f"{name}.lora_{part}" for name in inner for part in "ab"}
    weights = {n.replace(".linear.", "."): x for n, x in after.items() if n not in moved}
    assert all(mx.array_equal(x, weights.pop(name)) for name, x in flat(base).items())
    assert not weights

    model.eval()
    want = model(tokens)
    assert not mx.allclose(want, base(tokens), atol=1e-2)
    assert mx.array_equal(load_adapters(base, str(tmp_path / "adapters"))(tokens), want)

    again = with_adapters(base_model(family, bits))
    block = type(again.layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # mlx-lm replaces it for good
    assert np.allclose(train(again, tmp_path / "checkpointed", True), losses, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_s_compiled_step_can_be_traced(family: str) -> None:
    from mlx_lm.tuner.trainer import default_loss

    model = with_adapters(random_model(CONFIGS[family]))
    value_and_grad = nn.value_and_grad(model, default_loss)
    step = mx.compile(lambda *batch: value_and_grad(model, *batch), inputs=model.state)
    (loss, counted), gradients = step(mx.ones((2, 33), mx.int32), mx.array([[0, 20], [0, 31]]))
    assert loss.shape == counted.shape == ()  # looked at, not computed: that is what takes minutes
    assert shapes(gradients) == shapes(model.trainable_parameters())


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in dict(tree_flatten(tree)).items()}


STEP = 0.02
"""Along a direction of length 1 to 2. Rounding of the loss, 5e-7, makes 4e-5 of a slope."""

PADDED = {"attention_mask": mx.array([[0] * 6 + [1] * 14, [1] * 16 + [0] * 4])}
PACKED = {"position_ids": mx.array([[*range(20)], [*range(8), *range(12)]])}


@pytest.mark.parametrize("call", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["recurrent_gemma", "gemma2"])
def test_gradients_are_the_slopes_of_the_loss(
    family: str, call: dict[str, mx.array], tokens: mx.array
) -> None:
    """For every tensor, along a direction of which half is random and half the gradient.

    The gradient alone would hide that it lacks a part; chance alone makes slopes too small to see.
    """
    model = random_model(CONFIGS[family] | {"num_hidden_layers": 2})
    decays = [(name, x - 3.0) for name, x in flat(model).items() if "recurrent_param" in name]
    model.update(tree_unflatten(decays))  # to about 0.8: else nothing lasts five tokens
    ids = tokens.reshape(2, 20)
    labels = mx.where(call.get("attention_mask", mx.ones_like(ids)) == 1, ids, -100)

    def loss(model: Any) -> mx.array:
        value: mx.array = model.forward(ids, labels=labels, **call).loss
        return value

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    mx.random.seed(2)
    for name, x in flat(model).items():
        gradient, noise = gradients[name], mx.random.normal(x.shape)
        direction = noise / mx.sqrt(mx.square(noise).sum())
        direction = direction + gradient / mx.maximum(mx.sqrt(mx.square(gradient).sum()), 1e-9)

        def at(steps: int, name: str = name, x: Any = x, direction: Any = direction) -> float:
            model.update(tree_unflatten([(name, x + steps * STEP * direction)]))
            return float(loss(model))

        near, far = (at(1) - at(-1)) / (2 * STEP), (at(2) - at(-2)) / (4 * STEP)
        at(0)
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx((4 * near - far) / 3, rel=5e-3, abs=1e-4), name


@pytest.mark.parametrize("family", ["recurrent_gemma", "gemma2"])
def test_long_inputs_have_the_gradients_of_short_ones(
    family: str, tokens: mx.array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long attention runs in blocks of queries."""

    def gradients() -> dict[str, mx.array]:
        model = random_model(CONFIGS[family])
        loss = nn.value_and_grad(model, lambda model: model.forward(tokens, labels=tokens).loss)
        return dict(tree_flatten(loss(model)[1]))

    want = gradients()
    monkeypatch.setattr(reference, "_QUERY_BLOCK", 9)
    got = gradients()
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert mx.allclose(got[name], gradient, rtol=1e-3, atol=1e-5), name
