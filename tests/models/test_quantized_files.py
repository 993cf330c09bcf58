"""Files of packed models: ours, mlx-lm's, and each read by the other."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmodels import heads, load
from mlxmodels.quantization import Quantized, quantize
from mlxmodels.registry import model_classes

from ..tolerance import assert_logits_close
from .conftest import GEMMA, NEMOTRON, OPEN_LLAMA, flat, random_model, write_checkpoint
from .test_loading import LLAMA
from .test_quantization import FAMILIES, MODES, WIDTHS, name_of, packed_layers, wide


def saved(path: Path, config: dict[str, Any], model: Any, outcome: Quantized) -> Path:
    return write_checkpoint(path / "packed", outcome.describe(config), flat(model))


@pytest.mark.parametrize(
    ("family", "settings"),
    [*product(FAMILIES, MODES), *product(["gemma"], WIDTHS), ("gemma2", {"bits": 8})],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_a_packed_model_comes_back_from_disk_bit_exactly(
    tmp_path: Path, family: str, settings: dict[str, Any], tokens: mx.array
) -> None:
    from mlx_lm.utils import load_model

    model = random_model(wide(family))
    outcome = quantize(model, **settings)
    path = saved(tmp_path, wide(family), model, outcome)
    want = model(tokens)
    loaded = load(path)
    assert loaded.config["quantization"] == loaded.config["quantization_config"]
    assert packed_layers(loaded.model) == set(outcome.layers)
    assert mx.array_equal(loaded.model(tokens), want)
    theirs, _ = load_model(path, get_model_classes=model_classes)
    assert mx.array_equal(theirs(tokens), want)
    assert_logits_close("expanded", load(path, dtype=mx.float32).model(tokens), want)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("recurrent_gemma", heads.BASE),
        ("gemma2", heads.SEQUENCE_CLASSIFICATION),
        ("nemotron", heads.TOKEN_CLASSIFICATION),
        ("nemotron", heads.QUESTION_ANSWERING),
    ],
)
@pytest.mark.parametrize("by", ["us", "mlx-lm"])
def test_heads_of_labels_stay_float(
    tmp_path: Path, family: str, task: str, by: str, tokens: mx.array
) -> None:
    from mlx_lm.utils import quantize_model

    config = wide(family)
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config), task)  # type: ignore[attr-defined]
    if by == "us":
        described = quantize(model, bits=8).describe(config)
    else:
        _, described = quantize_model(model, config, group_size=64, bits=8)
    head = model.get("score") or model.get("qa_outputs")
    assert task == heads.BASE or isinstance(head, nn.Linear)
    assert "model.embed_tokens" in packed_layers(model)
    path = write_checkpoint(tmp_path / "m", described, flat(model))
    assert mx.array_equal(load(path, task).model(tokens), model(tokens))


def test_layers_can_have_settings_of_their_own(tmp_path: Path, tokens: mx.array) -> None:
    def choose(name: str, layer: nn.Module) -> bool | dict[str, Any]:
        if name.endswith("down_proj"):
            return {"bits": 8}
        if name == "model.embed_tokens":
            return {"mode": "mxfp4"}
        return not name.endswith("layers.0.mlp.up_proj")

    model = random_model(wide("open_llama"))
    outcome = quantize(model, bits=3, choose=choose)
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert outcome.settings == {
        **{"group_size": 64, "bits": 3, "mode": "affine"},
        "model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
    }
    loaded = load(saved(tmp_path, wide("open_llama"), model, outcome)).model
    first, second = loaded.layers
    assert isinstance(first.mlp.up_proj, nn.Linear) and second.mlp.up_proj.bits == 3
    assert loaded.model.embed_tokens.mode == "mxfp4" and first.mlp.down_proj.bits == 8
    assert mx.array_equal(loaded(tokens), model(tokens))


def test_mlx_lm_s_recipes_choose_too(tmp_path: Path, tokens: mx.array) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder

    model = random_model(wide("gemma2"))
    outcome = quantize(model, choose=mixed_quant_predicate_builder("mixed_2_6", model, 64))
    assert {settings["bits"] for settings in outcome.layers.values()} == {2, 6}
    path = saved(tmp_path, wide("gemma2"), model, outcome)
    assert mx.array_equal(load(path).model(tokens), model(tokens))


@pytest.mark.parametrize("settings", MODES, ids=name_of)
def test_mlx_lm_packs_the_same(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm.utils import quantize_model

    config = wide("recurrent_gemma")
    ours, theirs = random_model(config), random_model(config)
    described = quantize(ours, **settings).describe(config)
    arguments = {"group_size": None, "bits": None} | settings
    assert quantize_model(theirs, config, **arguments)[1] == described
    mine, other = flat(ours), flat(theirs)
    assert mine.keys() == other.keys()
    assert all(mx.array_equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GEMMA | {"rms_norm_eps": 1e-6}, 0.01),  # its activation is the exact GELU
        (NEMOTRON | {"hidden_act": "relu2", "norm_eps": 1e-5}, 1e-4),
    ],
    ids=["gemma", "nemotron"],
)
def test_mlx_lm_s_own_models_read_our_files(
    tmp_path: Path, config: dict[str, Any], limit: float, tokens: mx.array
) -> None:
    from mlx_lm.utils import load_model

    config = config | {"hidden_size": 64, "intermediate_size": 128}
    model = random_model(config)
    path = saved(tmp_path, config, model, quantize(model, bits=4))
    theirs, _ = load_model(path)
    assert type(theirs).__module__.startswith("mlx_lm.models.")
    mine, other = flat(model), flat(theirs)
    assert mine.keys() == other.keys()
    assert all(mx.array_equal(mine[name], other[name]) for name in mine)
    want = model(tokens)
    assert (mx.abs(theirs(tokens) - want).max() / want.std()).item() < limit


def test_rows_that_groups_do_not_divide_stay_and_are_named(
    tmp_path: Path, tokens: mx.array
) -> None:
    from mlx_lm.utils import load_model

    config = OPEN_LLAMA | {"hidden_size": 48, "intermediate_size": 64}
    model = random_model(config)
    with pytest.warns(
        UserWarning, match=r"13 layers stay.*: model\.embed_tokens, model\.layers\.0"
    ):
        outcome = quantize(model, group_size=32)
    downs = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert packed_layers(model) == downs == set(outcome.layers)
    assert len(outcome.undivided) == 13
    path = saved(tmp_path, config, model, outcome)
    entry = json.loads((path / "config.json").read_text())["quantization"]
    assert [entry[name] for name in outcome.undivided] == [False] * 13
    assert mx.array_equal(load(path).model(tokens), model(tokens))
    theirs, _ = load_model(path, get_model_classes=model_classes)
    assert mx.array_equal(theirs(tokens), model(tokens))


def test_an_entry_without_mode_is_affine_as_mlx_lm_reads_it(
    tmp_path: Path, tokens: mx.array
) -> None:
    from mlx_lm.utils import load_model

    config = wide("open_llama")
    model = random_model(config)
    eight = {"group_size": 64, "bits": 8}
    outcome = quantize(model, mode="mxfp4", choose=lambda n, _: eight if "v_proj" in n else True)
    for name in outcome.settings:
        if name.endswith("v_proj"):
            outcome.settings[name] = eight
    path = saved(tmp_path, config, model, outcome)
    assert mx.array_equal(load(path).model(tokens), model(tokens))
    theirs, _ = load_model(path, get_model_classes=model_classes)
    assert mx.array_equal(theirs(tokens), model(tokens))


@pytest.mark.parametrize("settings", MODES, ids=name_of)
def test_zoo_models_pack_and_expand_too(
    tmp_path: Path, settings: dict[str, Any], tokens: mx.array
) -> None:
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 128}
    model = random_model(config)
    path = saved(tmp_path, config, model, quantize(model, **settings))
    assert mx.array_equal(load(path).model(tokens), model(tokens))
    full = load(path, dtype=mx.float32).model
    assert {value.dtype for value in flat(full).values()} == {mx.float32}
