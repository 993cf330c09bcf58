"""Configs of both styles, aliases and nulls mean the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlxmodels import ModelError, registry
from mlxmodels.config import FOREIGN_KEYS
from mlxmodels.open_llama import ModelArgs as OpenLlamaArgs
from mlxmodels.recurrent_gemma import ModelArgs as RecurrentGemmaArgs
from mlxmodels.registry import model_classes


def griffin(**config: Any) -> RecurrentGemmaArgs:
    return RecurrentGemmaArgs.from_dict({"model_type": "recurrent_gemma", **config})


def read(family: str, **config: Any) -> Any:
    _, args_class = model_classes({"model_type": family})
    return args_class.from_dict({"model_type": family, **config})  # type: ignore[attr-defined]


def test_recurrent_gemma_defaults_are_transformers() -> None:
    args = griffin()
    assert (args.vocab_size, args.hidden_size, args.intermediate_size) == (256000, 2560, 7680)
    assert (args.lru_width, args.num_key_value_heads, args.head_dim) == (2560, 10, 256)
    assert (args.window, args.conv1d_width, args.logits_soft_cap) == (2048, 4, 30.0)
    assert args.layer_types[:4] == ["recurrent", "recurrent", "attention", "recurrent"]
    assert len(args.layer_types) == 26 and not args.attention_bias


def test_open_llama_defaults_are_transformers() -> None:
    args = OpenLlamaArgs.from_dict({"model_type": "open-llama"})
    assert (args.vocab_size, args.hidden_size, args.intermediate_size) == (100000, 4096, 11008)
    assert args.use_stable_embedding and args.shared_input_output_embedding
    assert args.num_key_value_heads == 32 and args.rope_type == "default"


def test_the_2b_file_s_aliases_are_read() -> None:
    args = griffin(_block_types=["attention"], sliding_window=64)
    assert set(args.layer_types) == {"attention"} and args.window == 64


def test_null_means_the_default_and_off_for_the_softcap() -> None:
    keys = ("num_key_value_heads", "lru_width", "head_dim", "rope_scaling", "block_types")
    assert griffin(**dict.fromkeys(keys)) == griffin()
    assert griffin(logits_soft_cap=0.0).logits_soft_cap is None
    assert griffin(logits_soft_cap=None).logits_soft_cap is None
    off = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=0)
    assert (off.attn_logit_softcapping, off.final_logit_softcapping) == (None, None)
    assert (read("gemma").pad_token_id, read("gemma", pad_token_id=None).pad_token_id) == (0, None)


def test_the_new_families_defaults_are_transformers() -> None:
    gemma = read("gemma")
    assert (gemma.hidden_size, gemma.head_dim, gemma.num_hidden_layers) == (3072, 256, 28)
    gemma2 = read("gemma2")
    assert gemma2.layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (gemma2.sliding_window, gemma2.query_pre_attn_scalar) == (4096, 256)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    nemotron = read("nemotron")
    assert (nemotron.num_key_value_heads, nemotron.head_dim, nemotron.rotary_dims) == (48, 128, 64)
    assert (nemotron.hidden_act, nemotron.pad_token_id, nemotron.is_tied) == ("relu2", None, False)
    xglm = read("xglm")
    assert (xglm.hidden_size, xglm.num_hidden_layers, xglm.vocab_size) == (1024, 24, 256008)
    assert (xglm.activation_function, xglm.pad_token_id) == ("gelu", 1)


def test_published_spellings_of_a_field_are_read() -> None:
    nemotron = read("nemotron", kv_channels=64, rope_percent=0.25, layer_norm_eps=1e-3)
    assert (nemotron.head_dim, nemotron.rotary_dims, nemotron.norm_eps) == (64, 16, 1e-3)
    assert read("nemotron", rope_percentage=1.0).partial_rotary_factor == 1.0
    xglm = read("xglm", hidden_size=64, num_hidden_layers=3, num_attention_heads=8)
    assert (xglm.d_model, xglm.num_layers, xglm.attention_heads) == (64, 3, 8)
    # The first Gemma files say "gelu" and mean its tanh approximation.
    for config in ({"hidden_act": "gelu"}, {"hidden_activation": "gelu"}, {}):
        assert read("gemma", **config).hidden_act == "gelu_pytorch_tanh"
    assert read("gemma", hidden_activation="silu").hidden_act == "silu"
    assert read("gemma", hidden_act="relu", hidden_activation="silu").hidden_act == "relu"


@pytest.mark.parametrize("family", ["gemma", "gemma2", "nemotron", "open-llama"])
def test_linear_rope_scaling_divides_positions(family: str) -> None:
    nested = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    for config in ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_parameters": nested}):
        assert read(family, **config).rope_factor == 4.0
    assert read(family, rope_scaling={"rope_type": "default"}).rope_factor == 1.0
    with pytest.raises(ModelError, match="rope_scaling of type 'longrope'"):
        read(family, rope_scaling={"type": "longrope", "factor": 4.0})


def test_labels_are_counted_by_number_or_by_name() -> None:
    assert read("gemma").label_count == 2
    assert read("gemma", num_labels=7).label_count == 7
    assert read("gemma", id2label={"0": "a", "1": "b", "2": "c"}).label_count == 3
    with pytest.raises(ModelError, match="num_labels to 0"):
        read("gemma", num_labels=0)
    with pytest.raises(ModelError, match="problem_type to 'ranking', expected one of regression"):
        read("gemma", problem_type="ranking")


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma", {"head_dim": 33}, "head_dim to 33, expected an even number"),
        ("gemma", {"sliding_window": 4096}, "sets sliding_window to 4096, which gemma models"),
        ("gemma", {"partial_rotary_factor": 0.5}, "sets partial_rotary_factor to 0.5"),
        ("gemma", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gemma", {"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping to 50.0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "lists 1 layer_types"),
        ("gemma2", {"num_hidden_layers": 1, "layer_types": ["chunked"]}, "for each of 1 layers"),
        ("gemma2", {"sliding_window": 10**6}, "sliding_window to 1000000, expected at most"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping to -1.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar to 0"),
        (
            "gemma2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters of its own to 'full_attention'",
        ),
        ("nemotron", {"partial_rotary_factor": 0.26}, "does not turn an even part of 128"),
        ("nemotron", {"num_attention_heads": 7}, "num_attention_heads = 7 does not divide"),
        ("xglm", {"add_cross_attention": True}, "sets add_cross_attention to True"),
        ("xglm", {"d_model": 33}, "attention_heads = 16 does not divide"),
        ("xglm", {"d_model": 2, "attention_heads": 1}, "d_model to 2, expected 4"),
        ("open-llama", {"logits_soft_cap": 3.0}, "sets logits_soft_cap to 3.0"),
        ("open-llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("open-llama", {"pruned_heads": {"0": [1]}}, "sets pruned_heads"),
        ("xglm", {"rope_scaling": ["linear"]}, "sets rope_scaling to"),
    ],
)
def test_a_family_refuses_what_it_cannot_compute(
    family: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(family, **config)


@pytest.mark.parametrize(
    ("config", "theta", "partial"),
    [
        ({"rope_theta": 500.0, "partial_rotary_factor": 0.25}, 500.0, 0.25),
        ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25}}, 500.0, 0.25),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 500.0}}, 500.0, 0.5),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "default"}}, 7.0, 0.5),
        ({"rope_theta": 7.0, "rope_parameters": {"partial_rotary_factor": 0.25}}, 7.0, 0.25),
        ({"rope_parameters": None}, 10000.0, 0.5),
    ],
)
def test_both_rotary_styles_are_read(config: dict[str, Any], theta: float, partial: float) -> None:
    args = griffin(**config)
    assert (args.rope_theta, args.partial_rotary_factor) == (theta, partial)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 5e5}},
    ],
)
def test_rope_scaling_is_read_in_every_spelling(config: dict[str, Any]) -> None:
    args = OpenLlamaArgs.from_dict({"model_type": "open-llama", **config})
    assert (args.rope_type, args.rope_factor) == ("dynamic", 3.0)


def test_whole_floats_are_integers_and_others_are_not() -> None:
    assert griffin(hidden_size=2560.0).hidden_size == 2560
    for bad in (2560.5, float("inf"), float("nan")):
        with pytest.raises(ModelError, match="sets hidden_size to"):
            griffin(hidden_size=bad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_types": ["mamba"]}, "lists the block types"),
        ({"block_types": "recurrent"}, "sets block_types to 'recurrent', expected list."),
        ({"lru_width": 33}, "sets lru_width to 33, which num_attention_heads = 10 does not."),
        ({"head_dim": 128}, "sets head_dim to 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": "default"}, "expected an object"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor to 1.5"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor to 0.0"),
        ({"attention_window_size": 0}, "attention_window_size to 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
    ],
)
def test_what_would_change_the_math_is_refused_by_name(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        griffin(**config)


@pytest.mark.parametrize("key", FOREIGN_KEYS)
@pytest.mark.parametrize("family", registry.NATIVE)
def test_every_key_that_changes_the_math_is_known_neutral_or_refused(family: str, key: str) -> None:
    _, args_class = model_classes({"model_type": family})
    own = {field.name for field in dataclasses.fields(args_class)}  # type: ignore[arg-type]
    own |= {*args_class.aliases, *args_class.ignored}  # type: ignore[attr-defined]
    if key in own:
        return
    for neutral in FOREIGN_KEYS[key]:
        assert read(family, **{key: neutral}) == read(family)
    with pytest.raises(ModelError, match=f"sets {key} to"):
        read(family, **{key: {"type": "linear", "factor": 7.5} if key == "rope_scaling" else 7.5})


def test_two_names_of_one_field_must_agree() -> None:
    assert read("gemma2", sliding_window=8, sliding_window_size=8).sliding_window == 8
    with pytest.raises(ModelError, match="sliding_window to 8 and sliding_window_size to 9"):
        read("gemma2", sliding_window=8, sliding_window_size=9)


def test_scaling_by_a_factor_needs_a_name() -> None:
    with pytest.raises(ModelError, match="rope_scaling of type 'without a name'"):
        read("gemma", rope_scaling={"factor": 8.0})
    for factor in (0.5, "8", True, None):
        with pytest.raises(ModelError, match="factor of rope_scaling"):
            read("gemma", rope_scaling={"type": "linear", "factor": factor})
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5}}
    assert (read("gemma", **both).rope_factor, read("gemma", **both).rope_theta) == (2.0, 10000.0)


@pytest.mark.parametrize("family", registry.NATIVE)
def test_a_model_of_absurd_depth_is_refused_at_once(family: str) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers to 2000000000, expected at most"):
        read(family, **{"num_layers" if family == "xglm" else "num_hidden_layers": 2 * 10**9})


def test_harmless_keys_are_ignored() -> None:
    assert griffin(w_init_variance_scale=0.1, use_cache=True, cache_implementation="hybrid")
    args = OpenLlamaArgs.from_dict(
        {
            "model_type": "open-llama",
            "use_memorry_efficient_attention": True,
            "hidden_dropout_prob": 0.1,
            "tie_word_embeddings": False,
            "attention_bias": False,
        }
    )
    assert args.shared_input_output_embedding
