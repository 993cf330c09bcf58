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
    shapes = {name: x.shape for name, x in tree_flatten(gradients)}
    assert shapes == {name: x.shape for name, x in tree_flatten(model.trainable_parameters())}


def slopes(loss: Any, name: str, x: mx.array, gradient: mx.array) -> tuple[float, float]:
    """Slope of the loss along a direction in one tensor: by its gradient, and by differences.

    Half of the direction is random, lest a gradient that lacks a part be asked about the rest of
    it only; half is the gradient, so that the slope is not lost in rounding.
    """
    noise = mx.random.normal(x.shape)
    direction = noise / mx.linalg.norm(noise.reshape(-1))
    size = mx.linalg.norm(gradient.reshape(-1))
    if size.item() > 0:
        direction = direction + gradient / size
    step = STEP
    ends = [loss(name, x + sign * step * direction) for sign in (1, -1, 2, -2)]
    first, second = (ends[0] - ends[1]) / (2 * step), (ends[2] - ends[3]) / (4 * step)
    return (gradient * direction).sum().item(), (4 * first - second) / 3


STEP = 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["left padding", "packed"])
def test_grad(family, case, tokens):
    import time

    global STEP
    t0 = time.time()
    model = random_model(CONFIGS[family])
    ids = mx.concatenate([tokens[:, :20], tokens[:, 20:]])
    if case == "left padding":
        mask = mx.array([[1] * 20, [0] * 6 + [1] * 14])
        kw = dict(attention_mask=mask, labels=mx.where(mask == 1, ids, -100))
    else:
        kw = dict(position_ids=mx.array([[*range(20)], [*range(8), *range(12)]]), labels=ids)
    lf = lambda m: m.forward(ids, **kw).loss
    l, g = nn.value_and_grad(model, lf)(model)
    g = dict(tree_flatten(g))
    p = flat(model)

    def loss(name, value):
        model.update(tree_unflatten([(name, value)]))
        o = lf(model).item()
        model.update(tree_unflatten([(name, p[name])]))
        return o

    for STEP in (0.003, 0.01, 0.03):
        r = []
        for name in p:
            a, b = slopes(loss, name, p[name], g[name])
            r.append((abs(a - b) / max(abs(a), 0.01), a, b, name))
        r.sort(reverse=True)
        print(
            family, case, STEP, l.item(), time.time() - t0, len(p), r[:3], min(abs(x[1]) for x in r)
        )
