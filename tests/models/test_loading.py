"""A directory becomes a model, or one sentence that says what is wrong with it."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest

import mlxmodels
from mlxmodels import ModelError, load, supported
from mlxmodels.registry import model_classes

from ..tolerance import assert_logits_close
from .conftest import (
    CONFIGS,
    GEMMA2,
    OPEN_LLAMA,
    RECURRENT_GEMMA,
    build,
    flat,
    random_model,
    write_checkpoint,
)
from .goldens import NAMES, Golden, distance

LLAMA = OPEN_LLAMA | {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


@pytest.fixture(params=[name for name in CONFIGS if name != "open_llama_dynamic"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def saved(path: Path, config: dict[str, Any], **changes: Any) -> tuple[Path, Any]:
    model = random_model(config)
    return write_checkpoint(path / "model", config | changes, flat(model)), model


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_loads_as_it_was_saved(
    tmp_path: Path, config: dict[str, Any], tokens: mx.array, shards: int
) -> None:
    model = random_model(config)
    path = write_checkpoint(tmp_path / "a model", config, flat(model), shards)
    loaded = load(str(path))
    assert mx.array_equal(loaded.model(tokens), model(tokens))
    assert loaded.family == config["model_type"] and loaded.config == config
    assert loaded.nbytes == sum(value.nbytes for value in flat(model).values())
    assert loaded.eos_token_ids == {1} and loaded.chat_template is None
    assert len(loaded.make_cache()) == loaded.model.args.num_hidden_layers


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float16])
def test_dtype_casts_every_floating_tensor(
    tmp_path: Path, config: dict[str, Any], stored: mx.Dtype, tokens: mx.array
) -> None:
    model = random_model(config)
    model.set_dtype(stored)
    path = write_checkpoint(tmp_path / "m", config, flat(model))
    kept, cast = load(path), load(path, dtype=mx.float32)
    assert {value.dtype for value in flat(kept.model).values()} == {stored}
    assert {value.dtype for value in flat(cast.model).values()} == {mx.float32}
    assert cast.nbytes == 2 * kept.nbytes
    assert kept.model(tokens).dtype == stored and cast.model(tokens).dtype == mx.float32


def test_bfloat16_logits_stay_close_to_float32(
    tmp_path: Path, config: dict[str, Any], tokens: mx.array
) -> None:
    model = random_model(config)
    model.set_dtype(mx.bfloat16)
    path = write_checkpoint(tmp_path / "m", config, flat(model))
    half, full = load(path).model(tokens), load(path, dtype=mx.float32).model(tokens)
    error = mx.abs(half.astype(mx.float32) - full).mean() / full.std()
    assert error.item() < 0.03


def quantized(config: dict[str, Any], mixed: bool = True) -> tuple[Any, dict[str, Any]]:
    """A model with 4-bit layers, 8-bit ones and a float one, and the config that says so."""
    wide = {"hidden_size": 64, "intermediate_size": 128}
    config = config | ({"d_model": 64} if config["model_type"] == "xglm" else wide)
    model = random_model(config)
    settings: dict[str, Any] = {"group_size": 32, "bits": 4}
    eight = {"group_size": 64, "bits": 8}

    def choose(name: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        if mixed and name.endswith(("down_proj", "embed_tokens")):
            settings[name] = eight
            return eight
        if mixed and name.endswith("layers.0.mlp.up_proj"):
            settings[name] = False
            return False
        return {"group_size": 32, "bits": 4}

    nn.quantize(model, class_predicate=choose)
    return model, config | {"quantization": settings}


def test_mixed_quantized_layers_load_bit_exactly(
    tmp_path: Path, config: dict[str, Any], tokens: mx.array
) -> None:
    model, described = quantized(config)
    path = write_checkpoint(tmp_path / "q", described, flat(model))
    loaded = load(path)
    assert mx.array_equal(loaded.model(tokens), model(tokens))
    embedding = loaded.model.model.embed_tokens
    assert isinstance(embedding, nn.QuantizedEmbedding) and embedding.bits == 8
    kinds = {type(module) for _, module in loaded.model.named_modules()}
    assert nn.QuantizedLinear in kinds
    if config is OPEN_LLAMA:
        layers = loaded.model.layers
        assert isinstance(layers[0].mlp.up_proj, nn.Linear)
        assert layers[0].mlp.down_proj.bits == 8 and layers[1].mlp.up_proj.bits == 4


def test_quantized_layers_expand_to_a_dtype(
    tmp_path: Path, config: dict[str, Any], tokens: mx.array
) -> None:
    model, described = quantized(config)
    path = write_checkpoint(tmp_path / "q", described, flat(model))
    loaded = load(path, dtype=mx.float32)
    assert {value.dtype for value in flat(loaded.model).values()} == {mx.float32}
    assert not any(name.endswith(("scales", "biases")) for name in flat(loaded.model))
    assert_logits_close("logits", loaded.model(tokens), model(tokens))


def test_half_precision_scales_expand_in_float32(tmp_path: Path) -> None:
    model, described = quantized(OPEN_LLAMA, mixed=False)
    model.set_dtype(mx.float16)
    path = write_checkpoint(tmp_path / "q", described, flat(model))
    layer = model.layers[0].mlp.up_proj
    parts = [layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)]
    want = mx.dequantize(layer.weight, *parts, group_size=32, bits=4)
    got = load(path, dtype=mx.float32).model.layers[0].mlp.up_proj.weight
    assert mx.array_equal(got, want)


def test_float_modes_expand_too(tmp_path: Path, tokens: mx.array) -> None:
    config = OPEN_LLAMA | {"hidden_size": 64, "intermediate_size": 128}
    model = random_model(config)
    nn.quantize(model, group_size=32, bits=4, mode="mxfp4")
    described = config | {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    path = write_checkpoint(tmp_path / "q", described, flat(model))
    want = model(tokens)
    assert mx.array_equal(load(path).model(tokens), want)
    assert_logits_close("expanded", load(path, dtype=mx.float32).model(tokens), want)


def test_torch_and_mlx_layouts_of_the_convolution_both_load(
    tmp_path: Path, tokens: mx.array
) -> None:
    model = random_model(RECURRENT_GEMMA)
    torch_layout = {
        name: value.swapaxes(1, 2) if name.endswith("conv_1d.weight") else value
        for name, value in flat(model).items()
    }
    assert torch_layout["model.layers.0.temporal_block.conv_1d.weight"].shape == (32, 1, 4)
    path = write_checkpoint(tmp_path / "m", RECURRENT_GEMMA, torch_layout)
    assert mx.array_equal(load(path).model(tokens), model(tokens))


def test_leftovers_of_published_files_are_dropped(tmp_path: Path, tokens: mx.array) -> None:
    for config in (RECURRENT_GEMMA, OPEN_LLAMA):
        model = random_model(config)
        weights = flat(model)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = mx.zeros((4,))
        path = write_checkpoint(tmp_path / config["model_type"], config, weights)
        assert mx.array_equal(load(path).model(tokens), model(tokens))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    weights = flat(random_model(OPEN_LLAMA))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1.0
    path = write_checkpoint(tmp_path / "m", OPEN_LLAMA, weights)
    with pytest.raises(ModelError, match="lm_head.weight that differs from the embedding"):
        load(path)


@pytest.mark.parametrize("family", ["gemma", "nemotron", "xglm"])
def test_a_task_needs_its_own_head(tmp_path: Path, family: str, tokens: mx.array) -> None:
    config = CONFIGS[family] | {"architectures": ["SomeForCausalLM"]}
    model = random_model(config)
    path = write_checkpoint(tmp_path / "causal", config, flat(model))
    base = load(path, "base").model
    assert "lm_head" not in base and mx.array_equal(base(tokens), model.model(tokens))
    if family == "xglm":
        with pytest.raises(ModelError, match="xglm models have no 'token-classification' head"):
            load(path, "token-classification")
        return
    message = r"head \(score.weight, score.bias\); it was saved as SomeForCausalLM"
    with pytest.raises(ModelError, match=message):
        load(path, "token-classification")
    with pytest.raises(ModelError, match="unknown task 'translation'; known are causal-lm, base"):
        load(path, "translation")
    score = {"score.weight": mx.ones((3, 32)), "score.bias": mx.zeros((3,))}
    labelled = config | {"num_labels": 3}
    path = write_checkpoint(tmp_path / "labels", labelled, flat(model) | score)
    assert load(path, "token-classification").model(tokens).shape == (1, 40, 3)
    with pytest.raises(ModelError, match="has no causal-lm head"):
        load(path)


def test_zoo_families_have_one_task(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "zoo", LLAMA, flat(random_model(LLAMA)))
    with pytest.raises(ModelError, match="run through mlx-lm, which has no 'base' head"):
        load(path, "base")


@pytest.mark.parametrize(("named", "dtype"), [("float16", mx.float16), (None, mx.bfloat16)])
def test_weights_of_several_dtypes_are_brought_to_one(
    tmp_path: Path, named: str | None, dtype: mx.Dtype, tokens: mx.array
) -> None:
    model = random_model(GEMMA2)
    weights = flat(model)
    mixed = {n: w if w.ndim == 1 else w.astype(mx.bfloat16) for n, w in weights.items()}
    path = write_checkpoint(tmp_path / "m", GEMMA2 | {"torch_dtype": named}, mixed)
    loaded = load(path)
    assert {value.dtype for value in flat(loaded.model).values()} == {dtype}
    assert loaded.model(tokens, cache=loaded.make_cache()).dtype == dtype


def test_a_bare_model_file_loads(tmp_path: Path, config: dict[str, Any], tokens: mx.array) -> None:
    model = random_model(config)
    bare = {name.removeprefix("model."): value for name, value in flat(model).items()}
    path = write_checkpoint(tmp_path / "m", config, bare)
    assert mx.array_equal(load(path).model(tokens), model(tokens))


def test_lengths_and_ends_come_from_the_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, OPEN_LLAMA, rope_scaling={"type": "linear", "factor": 2.5})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "!"})
    )
    loaded = load(path)
    assert (loaded.trained_length, loaded.context_length) == (512, 1280)
    assert loaded.eos_token_ids == {1, 2, 5, 7}
    assert loaded.tokenizer.bos_token_id == 0 and loaded.tokenizer.eos_token == "!"
    griffin, _ = saved(tmp_path / "g", RECURRENT_GEMMA)
    assert (load(griffin).trained_length, load(griffin).context_length) == (None, None)


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"tokenizer_config.json": json.dumps({"chat_template": "A"})}, "A"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "tool_use", "template": "T"},
                            {"name": "default", "template": "D"},
                        ]
                    }
                )
            },
            "D",
        ),
        (
            {
                "tokenizer_config.json": json.dumps({"chat_template": "A"}),
                "chat_template.jinja": "J",
            },
            "J",
        ),
        ({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "x"}]})}, None),
    ],
)
def test_the_chat_template_is_found(
    tmp_path: Path, files: dict[str, str], want: str | None
) -> None:
    path, _ = saved(tmp_path, OPEN_LLAMA)
    for name, text in files.items():
        (path / name).write_text(text)
    assert load(path).chat_template == want


def test_other_families_run_through_mlx_lm(tmp_path: Path, tokens: mx.array) -> None:
    model = random_model(LLAMA)
    path = write_checkpoint(tmp_path / "llama", LLAMA, flat(model))
    loaded = load(path)
    assert loaded.family == "llama" and loaded.context_length == 512
    assert mx.array_equal(loaded.model(tokens), model(tokens))
    cache = loaded.make_cache()
    assert_logits_close("cached", loaded.model(tokens, cache=cache), model(tokens))

    small = LLAMA | {"hidden_size": 64, "intermediate_size": 128}
    packed = random_model(small)
    nn.quantize(packed, group_size=32, bits=4)
    described = small | {"quantization": {"group_size": 32, "bits": 4}}
    path = write_checkpoint(tmp_path / "q", described, flat(packed))
    wide = load(path, dtype=mx.float32)
    assert {value.dtype for value in flat(wide.model).values()} == {mx.float32}
    assert_logits_close("expanded", wide.model(tokens), packed(tokens))


def test_our_open_llama_is_mlx_lm_s_llama_where_they_are_the_same_model(tokens: mx.array) -> None:
    same = {"use_stable_embedding": False, "shared_input_output_embedding": False}
    ours, theirs = build(OPEN_LLAMA | same | {"rms_norm_eps": 1e-5}), random_model(LLAMA)
    ours.load_weights(list(flat(theirs).items()), strict=True)
    assert_logits_close("whole", ours(tokens), theirs(tokens))


def test_mlx_lm_s_loader_takes_our_ports(
    tmp_path: Path, config: dict[str, Any], tokens: mx.array
) -> None:
    from mlx_lm.utils import load_model

    path, model = saved(tmp_path, config)
    loaded, _ = load_model(path, get_model_classes=model_classes)
    assert type(loaded) is type(model)
    assert mx.array_equal(loaded(tokens), model(tokens))


def test_supported_tells_ours_from_the_zoo() -> None:
    assert supported("recurrent_gemma") == supported("open-llama") == "native"
    assert supported("llama") == supported("mistral") == "zoo"  # mistral is an alias there
    assert supported("nonsense") is None and supported("../llama") is None
    assert set(mlxmodels.__all__) == {"LoadedModel", "ModelError", "load", "supported"}


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def change(**changes: Any) -> Callable[[Path], None]:
    return write("config.json", json.dumps(OPEN_LLAMA | changes))


def truncate(count: int) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:count])

    return cut


def reweight(edit: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        weights = flat(random_model(OPEN_LLAMA))
        edit(weights)
        mx.save_safetensors(str(path / "model.safetensors"), weights)

    return rewrite


UP = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("config.json"), "is not a model directory: it has no config.json."),
        (write("config.json", "{"), "config.json is not valid JSON"),
        (write("config.json", "[]"), "config.json is not a JSON object"),
        (write("config.json", "{}"), "names no model_type"),
        (
            change(model_type="t5"),
            "models of the family 't5' are not supported; Gryphon's own ports are "
            "gemma, gemma2, nemotron, open-llama, recurrent_gemma, xglm; others",
        ),
        (change(auto_map={"AutoModel": "x.Y"}), "sets auto_map: this model brings code"),
        (change(model_file="x.py"), "sets model_file: this model brings code of its own"),
        (change(hidden_size="wide"), "sets hidden_size to 'wide', expected int."),
        (change(hidden_size=-32), "sets hidden_size to -32, expected a positive number."),
        (change(vocab_size=True), "sets vocab_size to True, expected int."),
        (
            change(hidden_size=33),
            "hidden_size to 33, which num_attention_heads = 4 does not",
        ),
        (change(head_dim=16), "sets head_dim to 16"),
        (
            change(num_key_value_heads=3),
            "which num_key_value_heads = 3 does not divide",
        ),
        (change(attention_bias=True), "sets attention_bias to True, which open-llama models do"),
        (change(sliding_window=128), "sets sliding_window to 128"),
        (change(hidden_act="swiglu2"), "asks for the activation 'swiglu2'; known are gelu,"),
        (
            change(rope_scaling={"type": "yarn", "factor": 2.0}),
            "rope_scaling of type 'yarn'; open-llama knows 'linear' and 'dynamic'.",
        ),
        (
            change(rope_scaling={"type": "linear", "factor": "2"}),
            "factor of rope_scaling to '2', expected a number",
        ),
        (
            change(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
            "rope_scaling of type 'llama3'",
        ),
        (change(quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
        (remove("tokenizer.json"), "has no tokenizer.json and no sentencepiece *.model"),
        (write("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
        (write("generation_config.json", "nope"), "generation_config.json is not valid JSON"),
        (remove("model.safetensors"), "has no *.safetensors weights"),
        (truncate(4), "model.safetensors is damaged: it is cut short after 4 bytes"),
        (truncate(100), "model.safetensors is damaged: it is cut short after 100 bytes"),
        (truncate(20_000), "is damaged: it is cut short: "),
        (
            write("model.safetensors", "<!DOCTYPE html><html>Sign in</html>"),
            "model.safetensors is damaged: it is cut short",
        ),
        (write(INDEX, json.dumps({"weight_map": {"a": "gone.safetensors"}})), "lacks gone.safet"),
        (write(INDEX, json.dumps({"weight_map": {"a": "../x"}})), "names '../x', expected a file"),
        (write(INDEX, "{}"), "index.json has no weight_map."),
        (
            write(INDEX, json.dumps({"weight_map": {"lost.weight": "model.safetensors"}})),
            "model.safetensors lacks lost.weight that its index promises.",
        ),
        (reweight(lambda w: w.pop(UP)), f"lacks weights of this architecture: {UP};"),
        (reweight(lambda w: w.clear()), "model.embed_tokens.weight and 19 more; download it again"),
        (
            reweight(lambda w: w.update({"extra.weight": mx.zeros((1,))})),
            "holds weights this architecture does not have: extra.weight;",
        ),
        (
            reweight(lambda w: w.update({UP: mx.zeros((2, 3))})),
            f"holds {UP} of shape (2, 3) where config.json means (64, 32);",
        ),
        (
            reweight(lambda w: w.update({UP.replace("weight", "scales"): mx.zeros((1,))})),
            "1 layers are quantized (model.layers.0.mlp.up_proj), but config.json has no",
        ),
    ],
)
def test_a_damaged_directory_is_one_clear_sentence(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    path, _ = saved(tmp_path, OPEN_LLAMA)
    damage(path)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; check the path"):
        load(tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ModelError, match="is a file; give the directory"):
        load(file)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, OPEN_LLAMA)
    shutil.copy(path / "model.safetensors", path / "model-copy.safetensors")
    with pytest.raises(ModelError, match="both hold"):
        load(path)


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        ({"group_size": 32}, "with {'group_size': 32, 'bits': None} and mode 'affine'"),
        ({"group_size": 32, "bits": 4, "mode": "q4_0"}, "mode 'q4_0'"),
        ({"group_size": 64, "bits": 4}, "of shape"),
    ],
)
def test_quantization_that_does_not_fit_is_refused(
    tmp_path: Path, quantization: dict[str, Any], sentence: str
) -> None:
    model, described = quantized(OPEN_LLAMA, mixed=False)
    path = write_checkpoint(tmp_path / "q", described | {"quantization": quantization}, flat(model))
    with pytest.raises(ModelError) as caught:
        load(path)
    assert sentence in str(caught.value)


def test_the_golden_checkpoints_load_from_disk(tmp_path: Path) -> None:
    for name in NAMES:
        g = Golden(name)
        loaded = load(write_checkpoint(tmp_path / name, g.config, g.weights), g.task)
        assert distance(loaded.model(g.tokens), g.model(g.tokens)) == 0, name


@pytest.mark.parametrize("config", [OPEN_LLAMA, RECURRENT_GEMMA], ids=["ol", "rg"])
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
        {"hidden_size": 2**40},
        {"vocab_size": 2**31},
        {"intermediate_size": 1},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"attention_window_size": 10**9},
        {"block_types": [[1]]},
        {"partial_rotary_factor": float("inf")},
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        {"rope_scaling": {"type": "dynamic", "factor": 10**400}},
        {"quantization": {"group_size": 7, "bits": 4}},
        {"quantization": {"group_size": 2**40, "bits": 4}},
    ],
    ids=lambda change: "-".join(change),
)
def test_hostile_configs_end_in_a_sentence_or_are_not_this_familys(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any]
) -> None:
    path, _ = saved(tmp_path, config)
    (path / "config.json").write_text(json.dumps(config | change))
    foreign = {"attention_window_size", "block_types", "partial_rotary_factor", "quantization"}
    try:
        load(path)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:  # a key of the other family, or of quantized layers where none is
        assert set(change) <= foreign or config is RECURRENT_GEMMA


def test_weights_of_a_dtype_mlx_does_not_have_are_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, OPEN_LLAMA)
    weights = dict(mx.load(str(path / "model.safetensors")))
    weights["model.norm.weight"] = mx.ones(weights["model.norm.weight"].shape, mx.uint8)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight as uint8"):
        load(path)


@pytest.mark.parametrize("name", ["olmo", "base", "cache", "__init__", "../secrets"])
def test_what_is_no_model_of_the_zoo_is_a_model_error(name: str) -> None:
    from mlxmodels.registry import model_classes

    with pytest.raises(ModelError):
        model_classes({"model_type": name})


def test_loading_again_and_again_leaves_nothing(tmp_path: Path) -> None:
    """MLX's generator kept the splits of its key for initial weights that nobody evaluated."""
    path, _ = saved(tmp_path, RECURRENT_GEMMA)
    process = psutil.Process()

    def resident_after(loads: int) -> int:
        for _ in range(loads):
            load(path)
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return int(process.memory_info().rss)

    before = resident_after(10)
    assert resident_after(60) - before < 2**20
