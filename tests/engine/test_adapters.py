"""LoRA adapters in the engine: made by mlx-lm's own trainer and saved as its command does, put on a
model with nothing lost, and told apart from every other model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxmodels
from app.engine.protocol import Accepted, Failed, GenerationRequest, ModelRef, PromptLookup
from mlxmodels.adapters import with_adapter
from mlxmodels.errors import ModelError
from mlxmodels.quantization import quantize

from ..tiny_models import GEMMA2, LLAMA, OPEN_LLAMA, QWEN3_NEXT, RECURRENT_GEMMA, write_model
from .test_speculation import GREEDY, SEEDED, Run, repetitive, request

LORA = {"rank": 4, "scale": 8.0, "dropout": 0.1}
FAMILIES = {"gemma2": GEMMA2, "recurrent_gemma": RECURRENT_GEMMA, "zoo llama": LLAMA}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """MLX builds what it compiles with the C++ compiler on a CPU, which takes minutes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def trained(base: Path, directory: Path, kind: str = "lora", seed: int = 1, **more: Any) -> Path:
    """What `mlx_lm.lora` does with a model: its trainer and its files."""
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    from mlxmodels import registry

    model, _ = load_model(base, get_model_classes=registry.model_classes)
    settings = {"model": str(base), "fine_tune_type": kind, "num_layers": 2, "seed": seed}
    settings |= {"lora_parameters": None if kind == "full" else LORA} | more
    mx.random.seed(seed)
    np.random.seed(seed)
    model.freeze()
    if kind == "full":
        for layer in model.layers[-2:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(
            model, settings["num_layers"], settings["lora_parameters"], use_dora=kind == "dora"
        )
    directory.mkdir(parents=True)
    save_config(settings, directory / "adapter_config.json")
    texts = [([5 + i * (seed + i) % 90 for i in range(n)], 0) for n in (9, 12, 20, 31)]
    arguments = TrainingArgs(
        batch_size=2, iters=6, adapter_file=str(directory / "adapters.safetensors")
    )

    class Quiet:
        def on_train_loss_report(self, report: dict[str, Any]) -> None: ...
        def on_val_loss_report(self, report: dict[str, Any]) -> None: ...

    train(model, optim.Adam(2e-2), texts, args=arguments, training_callback=Quiet())
    for file in directory.glob("0*_adapters.safetensors"):
        file.unlink()
    return directory


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_model(root / name.replace(" ", "_"), config)
        for name, config in {**FAMILIES, "open_llama": OPEN_LLAMA, "moe": QWEN3_NEXT}.items()
    }


@pytest.fixture(scope="session")
def adapter_of(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    root, made = tmp_path_factory.mktemp("adapters"), dict[tuple[str, str, int], Path]()

    def adapter_of(family: str, kind: str = "lora", seed: int = 1) -> Path:
        key = family, kind, seed
        if key not in made:
            directory = root / f"{family.replace(' ', '_')}-{kind}-{seed}"
            made[key] = trained(bases[family], directory, kind, seed)
        return made[key]

    return adapter_of


def mlx_lm_s_tokens(base: Path, adapter: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of mlx-lm's own loading and its own loop over a cache."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_adapters, load_model

    from mlxmodels import registry

    model, _ = load_model(base, get_model_classes=registry.model_classes)
    model = load_adapters(model, str(adapter))
    model.eval()
    states, tokens, fed = make_prompt_cache(model), list[int](), prompt
    for _ in range(count):
        logits = model(mx.array([fed]), cache=states)[0, -1]
        tokens.append(int(mx.argmax(logits).item()))
        fed = tokens[-1:]
    return tokens


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "lora") for family in FAMILIES), ("gemma2", "dora"), ("recurrent_gemma", "full")],
)
def test_the_engine_answers_as_mlx_lm_does_with_the_adapter(
    bases: dict[str, Path], adapter_of: Callable[..., Path], family: str, kind: str
) -> None:
    base, adapter = bases[family], adapter_of(family, kind)
    prompt = repetitive(30)
    expected = mlx_lm_s_tokens(base, adapter, prompt, 16)
    plain = ModelRef("plain", str(base))
    adapted = ModelRef("plain+a", str(base), str(adapter))
    run = Run(prefix_cache_bytes=2**24).play_in_turn(
        request(plain, "plain", prompt_tokens=prompt, max_tokens=16),
        request(adapted, prompt_tokens=prompt, max_tokens=16),
    )
    assert run.tokens("a") == expected
    assert run.tokens("plain") != expected


def test_a_batch_with_an_adapter_is_its_rows_alone(
    bases: dict[str, Path], adapter_of: Callable[..., Path]
) -> None:
    base = bases["recurrent_gemma"]
    model = ModelRef("a", str(base), str(adapter_of("recurrent_gemma")))
    rows = [
        request(model, "one"),
        request(model, "two", sampling=SEEDED, prompt_tokens=repetitive(140, 1)),
        request(model, "three", speculation=PromptLookup(), prompt_tokens=repetitive(7, 2)),
    ]
    together = Run().play(*rows)
    for row in rows:
        assert together.tokens(row.id) == Run().play(row).tokens(row.id)


def test_nothing_is_reused_across_adapters(
    bases: dict[str, Path], adapter_of: Callable[..., Path]
) -> None:
    base = str(bases["gemma2"])
    first, second = (str(adapter_of("gemma2", seed=seed)) for seed in (1, 2))
    order = [ModelRef("m", base, a) for a in (first, second, "", first)]
    asked = [request(m, f"{i}", max_tokens=8, logprobs=True) for i, m in enumerate(order)]
    run = Run(prefix_cache_bytes=2**24).play_in_turn(*asked)
    accepted = [e for e in run.events if isinstance(e, Accepted)]
    assert [e.cached_tokens for e in accepted] == [0, 0, 0, 0]
    answers = [[token.logprob for token in run.given(each.id)] for each in asked]
    assert answers[0] == answers[3]
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_a_quantized_base_stays_as_it_is_and_the_adapter_counts_as_memory(
    tmp_path: Path,
) -> None:
    """As on an Apple GPU, where weights are not expanded."""
    path = write_model(tmp_path / "wide", GEMMA2, hidden_size=64, intermediate_size=128)
    loaded = mlxmodels.load(path)
    settings = quantize(loaded.model, bits=4, group_size=32)
    config = json.loads((path / "config.json").read_text()) | {"quantization": settings.settings}
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(loaded.model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    adapter = trained(path, tmp_path / "adapter")

    from mlx_lm.utils import load_adapters, load_model

    from mlxmodels import registry

    reference, _ = load_model(path, get_model_classes=registry.model_classes)
    base = mlxmodels.load(path)
    bytes_before = base.nbytes
    mine = with_adapter(base, adapter)
    tokens = mx.array([repetitive(20)])
    want = load_adapters(reference, str(adapter))
    want.eval()
    assert mx.array_equal(mine.model(tokens), want(tokens))
    kinds = {type(m) for name, m in mine.model.named_modules() if name.endswith("proj.linear")}
    assert kinds == {nn.QuantizedLinear}
    assert mine.nbytes > bytes_before


def test_experts_and_named_layers_take_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    keys = ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"]
    adapter = trained(bases["moe"], tmp_path / "experts", lora_parameters=LORA | {"keys": keys})
    loaded = with_adapter(mlxmodels.load(bases["moe"], dtype=mx.float32), adapter)
    changed = {n for n, m in loaded.model.named_modules() if type(m).__name__ == "LoRASwitchLinear"}
    assert len(changed) == 4


# What is refused, by name, through the engine.


def refusal(base: Path, adapter: Path) -> str:
    run = Run().play(request(ModelRef("m", str(base), str(adapter))))
    failed = run.ended["a"]
    assert isinstance(failed, Failed) and failed.code == "invalid_model"
    return failed.message


@pytest.fixture
def copy(adapter_of: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_of("open_llama"), tmp_path / "copy"))


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fine_tune_type": "ia3"}, "fine_tune_type must be lora or dora or full, got 'ia3'"),
        ({"num_layers": 3}, "it changes 3 layers of 2"),
        ({"num_layers": 1}, "has no place for model.layers.0"),
        ({"num_layers": "all"}, "num_layers must be a whole number"),
        ({"lora_parameters": None}, "lora_parameters must be an object"),
        ({"lora_parameters": LORA | {"rank": 0}}, "rank must be 1 to 4096, got 0"),
        ({"lora_parameters": LORA | {"rank": 5}}, r"is of shape \(\d+, 4\) and would be"),
        ({"lora_parameters": LORA | {"scale": 1e9}}, "scale must be a number up to 10000"),
        ({"lora_parameters": LORA | {"scale": float("nan")}}, "scale must be"),
        ({"lora_parameters": LORA | {"dropout": 1}}, "dropout must be"),
        ({"lora_parameters": LORA | {"alpha": 1}}, "lora_parameters.alpha"),
        ({"lora_parameters": LORA | {"keys": ["mlp.nothing"]}}, "no layer has mlp.nothing"),
        ({"lora_parameters": LORA | {"keys": ["self_attn.q_proj"]}}, "has no place for"),
        ({"peft_type": "LORA"}, "made by PEFT"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    bases: dict[str, Path], copy: Path, fields: dict[str, Any], said: str
) -> None:
    change(copy, **fields)
    with pytest.raises(ModelError, match=said):
        with_adapter(mlxmodels.load(bases["open_llama"]), copy)


def test_files_that_do_not_fit_are_refused_by_name(
    bases: dict[str, Path], copy: Path, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, file = bases["open_llama"], copy / "adapters.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    name = "model.layers.1.mlp.up_proj.lora_b"
    mx.save_safetensors(str(file), {n: x for n, x in tensors.items() if n != name})
    assert f"lacks {name}" in refusal(base, copy)
    mx.save_safetensors(str(file), tensors | {"model.norm.weight": mx.zeros((32,))})
    assert "no place for model.norm.weight" in refusal(base, copy)
    mx.save_safetensors(str(file), tensors | {name: mx.zeros((4, 64), mx.int32)})
    assert f"stores {name} as I32" in refusal(base, copy)
    file.write_bytes(file.read_bytes()[:-5])
    assert "damaged" in refusal(base, copy)
    file.rename(copy / "adapters.npz")
    assert "may run code" in refusal(base, copy)
    (copy / "adapters.npz").unlink()
    assert "no adapters.safetensors" in refusal(base, copy)
    other = adapter_of("gemma2")
    message = refusal(base, other)
    assert "does not belong to this model" in message and str(bases["gemma2"]) in message
    assert "not a directory" in refusal(base, tmp_path / "nowhere")


def test_another_model_runs_after_a_refusal(bases: dict[str, Path], tmp_path: Path) -> None:
    base = str(bases["open_llama"])
    asked: list[GenerationRequest] = [
        request(ModelRef("m", base, str(tmp_path)), sampling=GREEDY),
        request(ModelRef("m", base), "b"),
    ]
    run = Run().play(*asked)
    assert isinstance(run.ended["a"], Failed) and len(run.tokens("b")) == 40
