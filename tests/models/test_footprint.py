"""What a model takes, computed without MLX, against what it then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlxmodels
from mlxmodels import footprint, registry
from mlxmodels.footprint import DEFAULTS, SCRATCH_FACTOR, Footprint, of_config, of_states

from ..tiny_models import (
    FALCON_H1,
    GEMMA,
    GEMMA2,
    LLAMA,
    NEMOTRON,
    OPEN_LLAMA,
    QWEN3_NEXT,
    RECURRENT_GEMMA,
    XGLM,
    write_model,
)

TINY = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "nemotron": NEMOTRON,
    "open-llama": OPEN_LLAMA,
    "recurrent_gemma": RECURRENT_GEMMA | {"num_hidden_layers": 5},
    "xglm": XGLM,
    "llama": LLAMA,
}


def build(config: dict[str, Any]) -> nn.Module:
    model_class, args_class = registry.model_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))  # type: ignore[attr-defined]
    mx.eval(model.parameters())
    return model


def make_states(model: nn.Module) -> list[Any]:
    if hasattr(model, "make_cache"):
        return list(model.make_cache())
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def read(model: nn.Module, states: list[Any], tokens: int) -> None:
    model(mx.zeros((1, tokens), mx.int32), cache=states)
    mx.eval([state.state for state in states])


def nbytes(states: list[Any]) -> int:
    return sum(int(state.nbytes) for state in states)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("window", [8, 300])
def test_the_state_of_a_row_is_that_of_the_formula(family: str, window: int) -> None:
    """Every family, at lengths around the window and the step in which keys and values grow."""
    config = TINY[family]
    for key in ("attention_window_size", "sliding_window"):
        if key in config:
            config = config | {key: window}
    model, expected = build(config), of_config(config)
    assert expected.basis == "formula"
    for length in (1, 7, 8, 9, 256, 257, 300, 301, 700):
        states = make_states(model)
        read(model, states, length)
        assert nbytes(states) == expected.state_bytes(length), length


@pytest.mark.parametrize("family", TINY)
def test_the_state_of_a_batch_is_that_of_its_longest_row_for_each(family: str) -> None:
    model, expected = build(TINY[family]), of_config(TINY[family])
    rows = []
    for length in (3, 300, 40):
        states = make_states(model)
        read(model, states, length)
        rows.append(states)
    batch = [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]
    model(mx.zeros((3, 1), mx.int32), cache=batch)
    mx.eval([state.state for state in batch])
    bound = expected.state_bytes(301, rows=3)
    assert 0.5 * bound <= nbytes(batch) <= bound + 1024  # mlx-lm's count their rows, too


def test_a_sliding_llama_is_known_and_an_unknown_model_is_an_estimate_until_measured() -> None:
    sliding = LLAMA | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    states = make_states(model := build(sliding))
    for _ in range(40):
        read(model, states, 1)
    assert nbytes(states) == of_config(sliding).state_bytes(40)
    for config in (FALCON_H1, QWEN3_NEXT):
        planned = of_config(config)
        assert planned.basis == "estimate"
        model = build(config)
        read(model, states := make_states(model), 1)
        measured = of_states(planned, states)
        assert measured.basis == "measured"
        read(model, states, 400)
        assert measured.state_bytes(401) == pytest.approx(nbytes(states), rel=0.02)


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_config_json_leaves_out_is_what_the_port_takes(family: str) -> None:
    args = registry.model_classes({"model_type": family})[1].from_dict({"model_type": family})  # type: ignore[attr-defined]
    assert {name: getattr(args, name) for name in DEFAULTS[family]} == dict(DEFAULTS[family])
    widths = of_config({"model_type": family}).widths
    heads = getattr(args, "num_attention_heads", None) or args.attention_heads
    assert widths.kv_heads == getattr(args, "num_key_value_heads", heads)
    assert widths.head_dim == getattr(args, "head_dim", args.hidden_size // heads)


def test_weights_are_counted_as_stored_and_as_held(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    plain = footprint.footprint(path, expand=True)
    weights = dict(tree_flatten(mlxmodels.load(path).model.parameters()))
    assert plain.parameters == sum(weight.size for weight in weights.values())
    assert plain.stored_bytes == plain.weight_bytes == sum(w.nbytes for w in weights.values())
    assert plain.loading_bytes == plain.weight_bytes

    loaded = mlxmodels.load(path).model
    loaded.set_dtype(mx.bfloat16)
    how = {"model.embed_tokens": {"group_size": 32, "bits": 8}}
    nn.quantize(loaded, 32, 4, class_predicate=lambda name, module: (
        hasattr(module, "to_quantized") and how.get(name, True)
    ))  # fmt: skip
    tensors = dict(tree_flatten(loaded.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
    config = OPEN_LLAMA | {"quantization": {"group_size": 32, "bits": 4, **how}}
    (path / "config.json").write_text(json.dumps(config))
    packed = footprint.footprint(path, expand=False)
    assert packed.parameters == plain.parameters
    assert packed.weight_bytes == packed.stored_bytes == mlxmodels.load(path).nbytes
    assert packed.item_bytes == 2
    expanded = footprint.footprint(path, expand=True)
    assert expanded.weight_bytes == mlxmodels.load(path, dtype=mx.float32).nbytes
    assert expanded.loading_bytes == expanded.weight_bytes + packed.stored_bytes
    states = make_states(mlxmodels.load(path).model)
    read(mlxmodels.load(path).model, states, 5)
    assert nbytes(states) == packed.state_bytes(5)


MIDDLE = {
    family: config
    | {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3, "head_dim": 64}
    | {"intermediate_size": 768}
    for family, config in TINY.items()
}
MIDDLE["xglm"] = XGLM | {"d_model": 256, "ffn_dim": 768, "num_layers": 3, "attention_heads": 4}
MIDDLE["recurrent_gemma"] |= {"lru_width": 256, "attention_window_size": 256}
MIDDLE["gemma2"] |= {"sliding_window": 256}


@pytest.mark.parametrize("family", MIDDLE)
def test_scratch_bounds_the_peak_of_a_call_and_is_not_far_from_it(family: str) -> None:
    model, expected = build(MIDDLE[family]), of_config(MIDDLE[family])
    states = make_states(model)
    for before in (0, 768):
        while before and (done := getattr(states[-1], "offset", 0)) < before:
            read(model, states, min(256, before - done))
        for chunk in (256, 32):
            begun = make_states(model) if not before else states
            done = before if not before else begun[-1].offset
            mx.synchronize()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            read(model, begun, chunk)
            # What is in the states before and after is counted as state.
            peak = mx.get_peak_memory() - max(held, mx.get_active_memory())
            bound = expected.scratch_bytes(chunk, done + chunk)
            assert peak <= bound <= SCRATCH_FACTOR * peak, (before, chunk, bound / peak)


def test_the_largest_context_is_the_last_that_fits() -> None:
    model = of_config(MIDDLE["gemma"])
    budget = 64 * 2**20
    most = model.largest_context(budget, 32)
    assert most is not None
    assert model.row_bytes(32, most) <= budget < model.row_bytes(32, most + 1)
    assert model.largest_context(0, 32) == 0
    assert of_config(MIDDLE["recurrent_gemma"]).largest_context(budget, 32) is None


def test_on_a_gpu_attention_holds_no_scores_where_mlx_fuses_it() -> None:
    fused = of_config(LLAMA | {"head_dim": 64}, on_gpu=True)
    assert not fused.has_scores
    assert of_config(LLAMA | {"head_dim": 64}).has_scores
    assert of_config(GEMMA2 | {"head_dim": 64}, on_gpu=True).has_scores, "soft-capped"
    assert of_config(GEMMA | {"head_dim": 256}, on_gpu=True).has_scores
    with_scores = replace(fused, has_scores=True)
    assert fused.scratch_bytes(512, 4096) < with_scores.scratch_bytes(512, 4096) / 2


@pytest.mark.parametrize("broken", [{"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_without_sizes_is_refused_by_name(broken: dict[str, Any]) -> None:
    with pytest.raises(mlxmodels.ModelError, match=next(iter(broken))):
        of_config(LLAMA | broken)


def test_it_never_imports_mlx() -> None:
    script = "import sys, mlxmodels.footprint; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_bounds_hold_for_the_models_people_run() -> None:
    """Published sizes, in bfloat16: keys and values of one token, and RecurrentGemma's whole."""
    llama_8b = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert of_config(llama_8b, item_bytes=2).bytes_per_token == 128 * 1024
    griffin: Footprint = of_config(
        {"model_type": "recurrent_gemma", "num_key_value_heads": 1}, item_bytes=2
    )
    # 8 rings of 2048 slots of 256 channels, 18 states of 2560 float32 and 3 rows of convolution.
    assert griffin.state_bytes(10**6) == 8 * 2048 * 2 * 256 * 2 + 18 * 2560 * (4 + 3 * 2)
