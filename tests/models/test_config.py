"""Configs of both styles, aliases and nulls mean the same model."""

from __future__ import annotations

from typing import Any

import pytest

from mlxmodels import ModelError
from mlxmodels.open_llama import ModelArgs as OpenLlamaArgs
from mlxmodels.recurrent_gemma import ModelArgs as RecurrentGemmaArgs


def griffin(**config: Any) -> RecurrentGemmaArgs:
    return RecurrentGemmaArgs.from_dict({"model_type": "recurrent_gemma", **config})


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
    assert griffin(logits_soft_cap=0.0).logits_soft_cap == 0.0


@pytest.mark.parametrize(
    ("config", "theta", "partial"),
    [
        ({"rope_theta": 500.0, "partial_rotary_factor": 0.25}, 500.0, 0.25),
        ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25}}, 500.0, 0.25),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 500.0}}, 7.0, 0.5),
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
        ({"lru_width": 33}, "sets lru_width to 33, which 10 attention heads do not divide."),
        ({"head_dim": 128}, "sets head_dim to 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": "default"}, "expected an object"),
        ({"tie_word_embeddings": False}, "sets tie_word_embeddings to False"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor to 1.5"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor to 0.0"),
        ({"attention_window_size": 0}, "attention_window_size to 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads to 4"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
    ],
)
def test_what_would_change_the_math_is_refused_by_name(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        griffin(**config)


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
