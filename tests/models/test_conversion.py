"""Converting a checkpoint: what comes out is what mlx-lm makes of it, whole after any kill, in
little memory; what cannot be converted is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxmodels import ModelError, conversion, float_checkpoint, load, packing, quantization, shards
from mlxmodels.checkpoint import read_json, weight_files
from mlxmodels.conversion import Request
from mlxmodels.packing import Packing
from mlxmodels.safetensors_header import read_header

from .. import tiny_models
from ..tolerance import assert_logits_close
from .conftest import CONFIGS, flat, random_model, write_checkpoint
from .goldens import NAMES, Golden

FAMILIES = [name for name in CONFIGS if name != "open_llama_dynamic"]
# Families that mlx-lm has too: four of ours, and two of its own with experts and hybrid layers. It
# knows no defaults of what every published config.json says.
SAID = {"rms_norm_eps": 1e-6, "norm_eps": 1e-5, "attention_bias": False, "hidden_act": "relu2"}
SHARED = {
    name: SAID | CONFIGS[name] for name in ("gemma", "gemma2", "nemotron", "recurrent_gemma")
} | {
    "llama": tiny_models.LLAMA | {"vocab_size": 97},
    "qwen3_next": tiny_models.QWEN3_NEXT | {"vocab_size": 97},
}
SHARED["gemma"] = SHARED["gemma"] | {"hidden_act": "gelu"}
WIDE: dict[str, dict[str, Any]] = {
    "xglm": {"d_model": 64, "ffn_dim": 128},
    "recurrent_gemma": {"hidden_size": 64, "intermediate_size": 256, "lru_width": 64},
    "qwen3_next": {"hidden_size": 64, "moe_intermediate_size": 64,
                   "shared_expert_intermediate_size": 64, "num_experts": 4},
}  # fmt: skip
SMALL = 20_000
"""Bytes of tensors in a file, so that there are several."""


def wide(name: str) -> dict[str, Any]:
    """A tiny config whose rows groups of 32 divide."""
    config = SHARED.get(name) or CONFIGS[name]
    own = WIDE.get(name, {"hidden_size": 64, "intermediate_size": 128})
    return config | own


def source(path: Path, config: dict[str, Any], shards: int = 3, **changes: Any) -> Path:
    """A checkpoint in bfloat16 as transformers lays it out."""
    config = config | {"torch_dtype": "bfloat16"} | changes
    weights = {name: v.astype(mx.bfloat16) for name, v in flat(random_model(config)).items()}
    for name, value in list(weights.items()):
        if name.endswith("conv_1d.weight"):
            weights[name] = value.swapaxes(1, 2)  # as torch stores it
        if "switch_mlp" in name:  # experts one by one
            del weights[name]
            before, _, after = name.partition("switch_mlp")
            for number, expert in enumerate(value):
                weights[f"{before}experts.{number}{after}"] = expert
    write_checkpoint(path, config, weights, shards)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def converted(path: Path, destination: Path, shard_bytes: int = SMALL, **asked: Any) -> Path:
    destination.mkdir(exist_ok=True)
    conversion.convert(Request(path, destination, Packing(**asked), shard_bytes))
    return destination


def tensors(path: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in weight_files(path):
        found |= mx.load(str(file))  # type: ignore[arg-type]
    return found


def digests(path: Path) -> dict[str, str]:
    return {file.name: shards.digest(file) for file in path.iterdir()}


def assert_equal(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert mx.array_equal(got[name], value), name


WAYS: list[dict[str, Any]] = [
    {},
    {"dtype": "float16"},
    {"bits": 4, "group_size": 32},
    {"bits": 8},
    {"mode": "mxfp4"},
    {"recipe": "mixed_3_6", "group_size": 32},
]


def each(names: Iterable[str], ways: list[dict[str, Any]]) -> list[Any]:
    """Every family in every way, but for recipes where there is no down_proj, or where mlx-lm's
    overrule the model (below)."""
    return [
        pytest.param(name, asked, id=f"{name}-{Packing(**asked).suffix}")
        for name in names
        for asked in ways
        if not ("recipe" in asked and name in ("xglm", "qwen3_next"))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "asked"), each(SHARED, WAYS))
def test_the_result_is_what_mlx_lm_makes_of_the_same_source(
    tmp_path: Path, name: str, asked: dict[str, Any]
) -> None:
    import mlx_lm

    model = source(tmp_path / "source", wide(name), num_hidden_layers=4)
    ours = converted(model, tmp_path / "ours", **asked)
    is_packed = Packing(**asked).is_packed
    mlx_lm.convert(
        str(model), str(tmp_path / "theirs"), quantize=is_packed,
        q_bits=asked.get("bits"), q_group_size=asked.get("group_size"),
        q_mode=asked.get("mode", "affine"), dtype=asked.get("dtype"),
        quant_predicate=asked.get("recipe"),
    )  # fmt: skip
    assert_equal(tensors(ours), tensors(tmp_path / "theirs"))
    theirs = read_json(tmp_path / "theirs" / "config.json").get("quantization", {})
    mine = read_json(ours / "config.json")
    assert mine.get("quantization") == mine.get("quantization_config")
    if is_packed and "recipe" not in asked:
        defaults = Packing(**asked).defaults
        for layer, settings in theirs.items():
            own = mine["quantization"].get(layer, defaults)
            assert own == (
                {"mode": "affine"} | settings if isinstance(settings, dict) else settings
            )
    _, tokenizer = mlx_lm.load(str(ours))
    assert tokenizer.eos_token_ids == {1}


@pytest.mark.parametrize(("family", "asked"), each(FAMILIES, WAYS[2:]))
def test_converting_is_packing_in_memory(
    tmp_path: Path, family: str, asked: dict[str, Any], tokens: mx.array
) -> None:
    layers = {"num_layers" if family == "xglm" else "num_hidden_layers": 4}
    path = source(tmp_path / "source", wide(family), **layers)
    want = load(path)
    whole = Packing(**asked)
    count = len(want.model.layers)

    def choose(name: str, layer: Any) -> Any:
        if whole.recipe is None:
            return True
        return whole.defaults | {"bits": packing.recipe_bits(whole.recipe, name, count)}

    outcome = quantization.quantize(want.model, **whole.defaults, choose=choose)
    made = converted(path, tmp_path / "made", **asked)
    got = load(made)
    assert_equal(flat(got.model), flat(want.model))
    assert read_json(made / "config.json")["quantization"] == outcome.settings
    assert mx.array_equal(got.model(tokens), want.model(tokens))
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in (*kept, "chat_template.jinja"):
        assert (made / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.endswith(("_default", "_bfloat16", "_tied"))]
)
def test_a_float_result_has_the_logits_of_the_reference(tmp_path: Path, name: str) -> None:
    golden = Golden(name)
    if golden.task != "causal-lm":
        pytest.skip("no causal language model")
    path = write_checkpoint(tmp_path / "source", golden.config, dict(golden.weights), 2)
    got = load(converted(path, tmp_path / "made"))
    assert_logits_close(name, got.model(golden.tokens), golden.model(golden.tokens))


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 9, 26, 32])
def test_recipes_give_bits_as_mlx_lm_does(layers: int) -> None:
    from types import SimpleNamespace

    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(layers)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
    ]
    model = SimpleNamespace(
        named_modules=lambda: [(name, None) for name in names], layers=[None] * layers
    )
    assert set(QUANT_RECIPES) == set(packing.RECIPES)
    for recipe in QUANT_RECIPES:
        theirs = mixed_quant_predicate_builder(recipe, model)
        for name in [*names, "lm_head", "model.embed_tokens"]:
            assert packing.recipe_bits(recipe, name, layers) == theirs(name, None)["bits"], name


def test_a_recipe_leaves_routers_as_the_model_wants_them(tmp_path: Path) -> None:
    """Where mlx-lm's recipes overrule the model (docs/upstream.md)."""
    import mlx_lm

    path = source(tmp_path / "source", wide("qwen3_next"))
    made = converted(path, tmp_path / "made", recipe="mixed_2_6", group_size=32)
    mlx_lm.convert(
        str(path), str(tmp_path / "theirs"), quantize=True, q_group_size=32,
        quant_predicate="mixed_2_6",
    )  # fmt: skip

    def routers(path: Path) -> set[int]:
        entries = read_json(path / "config.json")["quantization"]
        return {value["bits"] for name, value in entries.items() if name.endswith("mlp.gate")}

    assert (routers(made), routers(tmp_path / "theirs")) == ({8}, {2})


def test_the_expected_size_is_the_size(tmp_path: Path) -> None:
    for asked in WAYS:
        path = source(tmp_path / f"source-{Packing(**asked).suffix}", wide("gemma2"))
        held = float_checkpoint.read(path)
        made = converted(path, tmp_path / f"made-{Packing(**asked).suffix}", **asked)
        config, entries = packing.expected(held.config, held.tensors, Packing(**asked))
        got = {n: e for file in weight_files(made) for n, e in read_header(file).items()}
        assert {name: entry.nbytes for name, entry in entries.items()} == {
            name: entry.nbytes for name, entry in got.items()
        }
        if asked and "recipe" not in asked:
            assert config.get("quantization") == read_json(made / "config.json").get("quantization")


def test_a_file_that_rotted_meanwhile_and_other_settings_are_written_again(tmp_path: Path) -> None:
    path = source(tmp_path / "source", wide("gemma"))
    made = converted(path, tmp_path / "made", bits=4, group_size=32)
    want = digests(made)
    rotten = sorted(made.glob("*.safetensors"))[1]
    data = bytearray(rotten.read_bytes())
    data[-1] ^= 1
    rotten.write_bytes(data)
    assert digests(converted(path, made, bits=4, group_size=32)) == want
    # The files of these two have the same names and sizes.
    floats = converted(path, tmp_path / "floats", dtype="bfloat16")
    again = digests(converted(path, floats, dtype="float16"))
    assert again == digests(converted(path, tmp_path / "fresh", dtype="float16"))


def test_a_source_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    path = source(tmp_path / "source", wide("gemma"))

    class Touch(shards.Progress):
        def kept(self, shards: int, of: int) -> None:
            os.utime(first_shard(path), ns=(shards, shards))

    (tmp_path / "made").mkdir()
    request = Request(path, tmp_path / "made", Packing(bits=8, group_size=32), SMALL)
    with pytest.raises(ModelError, match="changed while it was converted"):
        conversion.convert(request, Touch())
    assert not (tmp_path / "made" / "config.json").exists()


# What is refused -------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    values = json.loads((path / name).read_text())
    change(values)
    (path / name).write_text(json.dumps(values))


def first_shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[0]


def escaping_index(path: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        name = next(iter(index["weight_map"]))
        index["weight_map"][name] = "../outside.safetensors"

    rewrite(path, change, "model.safetensors.index.json")


def lying_header(path: Path) -> None:
    file = first_shard(path)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 10**12]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def not_finite(path: Path) -> None:
    file = first_shard(path)
    weights: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    name = next(name for name, value in weights.items() if value.ndim == 2)
    poison = mx.zeros_like(weights[name])
    poison[-1, -1] = float("nan")
    mx.save_safetensors(str(file), weights | {name: weights[name] + poison})


def integers(path: Path) -> None:
    file = first_shard(path)
    weights: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    name = next(name for name, value in weights.items() if value.ndim == 2)
    mx.save_safetensors(str(file), weights | {name: weights[name].astype(mx.int32)})


def linked_side_file(path: Path) -> None:
    secret = path.parent / "secret.txt"
    secret.write_text("words")
    (path / "merges.txt").symlink_to(secret)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "escaping index": (escaping_index, "names '../outside.safetensors', expected a file beside it"),
    "lying header": (lying_header, "is damaged"),
    "missing shard": (lambda path: first_shard(path).unlink(), "that its index lists"),
    "cut short": (lambda path: os.truncate(first_shard(path), 2000), "is damaged"),
    "NaN": (not_finite, "holds numbers that are not finite"),
    "integers": (integers, "as int32"),
    "link": (linked_side_file, "is a link to"),
    "code": (
        lambda path: rewrite(path, lambda config: config.update(auto_map={"a": "b"})),
        "brings code of its own",
    ),
    "packed": (
        lambda path: rewrite(path, lambda config: config.update(quantization={"bits": 4})),
        "is quantized already (its config.json has quantization)",
    ),
    "other family": (
        lambda path: rewrite(path, lambda config: config.update(model_type="unheard_of")),
        "'unheard_of' are not supported",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_or_damaged_source_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    path = source(tmp_path / "source", wide("gemma"))
    spoil, sentence = FAULTS[fault]
    spoil(path)
    with pytest.raises(ModelError) as caught:
        converted(path, tmp_path / "made", bits=4, group_size=32)
    assert sentence in str(caught.value)
    assert not (tmp_path / "made" / "config.json").exists()


def test_a_result_is_no_source(tmp_path: Path) -> None:
    made = converted(source(tmp_path / "source", wide("gemma")), tmp_path / "made", bits=8)
    with pytest.raises(ModelError, match="quantized already"):
        converted(made, tmp_path / "again", bits=4)
    rewrite(made, lambda config: [config.pop(k) for k in ("quantization", "quantization_config")])
    with pytest.raises(ModelError, match=r"quantized already \(it holds .*\.scales"):
        converted(made, tmp_path / "again", bits=4)


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "source", wide("gemma"), shards=1)
    weights: dict[str, mx.array] = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e6
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight .* not finite as float16"):
        converted(path, tmp_path / "made", dtype="float16")
    converted(path, tmp_path / "other", dtype="float32")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"bits": 7}, "bits 7: affine has"),
        ({"bits": 4, "recipe": "mixed_3_6"}, "give one of the two"),
        ({"mode": "mxfp4", "recipe": "mixed_3_6"}, "is for mode affine"),
        ({"recipe": "mixed_1_2"}, "known are mixed_2_6, mixed_3_4"),
        ({"dtype": "float8"}, "known are bfloat16, float16, float32"),
        ({"mode": "q4_0"}, "known are affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_settings_without_sense_are_refused(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        Packing(**asked)
    assert sentence in str(caught.value)


def test_a_model_without_down_projections_has_no_recipe(tmp_path: Path) -> None:
    path = source(tmp_path / "source", wide("xglm"))
    with pytest.raises(ModelError, match="named down_proj, and this model has none"):
        converted(path, tmp_path / "made", recipe="mixed_4_6", group_size=32)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["2b-it.pt", "tokenizer.model"], "is a PyTorch pickle"),
        (["gemma-2b.ckpt", "config.json"], "is a PyTorch pickle"),
        (["2b-it/_METADATA", "2b-it/checkpoint", "tokenizer.model"], "is an Orbax checkpoint"),
        (["2b-it/manifest.ocdbt"], "is an Orbax checkpoint"),
        (["gemma.h5"], "in a form that Gryphon does not read"),
        (["gemma-2b.gguf"], "give the file itself"),
    ],
)
def test_googles_other_forms_are_refused_and_the_right_one_named(
    tmp_path: Path, files: list[str], sentence: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError) as caught:
        float_checkpoint.read(tmp_path)
    assert sentence in str(caught.value)
    if "gguf" not in files[0]:
        assert "google/recurrentgemma-2b-it -q 4" in str(caught.value)


def test_shards_are_read_by_safetensors_itself_whatever_the_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f'layer "{i}" é\n': rng.random((3, i), dtype=np.float32) for i in range(4)}
    units = [
        shards.Unit(
            (name,), value.nbytes, lambda n=name, v=value: [shards.Tensor(n, "F32", v.shape, v)]
        )
        for name, value in weights.items()
    ]
    shards.write(tmp_path, iter(units), "one", shards.Progress(), 40)
    got = {n: v for file in tmp_path.glob("*.safetensors") for n, v in load_file(file).items()}
    assert got.keys() == weights.keys()
    assert all(np.array_equal(got[name], value) for name, value in weights.items())
    save_file(weights, tmp_path / "other.safetensors")
    shutil.rmtree(tmp_path)


def test_the_tokenizer_may_be_a_sentencepiece_model(tmp_path: Path) -> None:
    path = source(tmp_path / "source", wide("gemma"))
    (path / "tokenizer.json").unlink()
    models = sorted((Path(__file__).parents[1] / "golden" / "tokenizers").rglob("*.model"))
    (path / "tokenizer.model").write_bytes(models[0].read_bytes())
    made = converted(path, tmp_path / "made", bits=4, group_size=32)
    text = "Hello there"
    assert load(made).tokenizer.encode(text, True) == load(path).tokenizer.encode(text, True)
