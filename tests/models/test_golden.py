"""Every port's numbers against the reference's; tests/golden/README.md says how those were made."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels import heads, registry

from ..tolerance import LOGITS
from .conftest import build
from .goldens import (
    CHUNKS,
    DIRECTORY,
    NAMES,
    Golden,
    case_errors,
    distance,
    half_precision,
    in_chunks,
)

golden = cache(Golden)

FLOAT32 = [name for name in NAMES if not golden(name).is_half]
HALF = [name for name in NAMES if golden(name).is_half]
CONTINUED = [name for name in FLOAT32 if golden(name).can_continue]
CASES = [
    (name, case)
    for name in FLOAT32
    for case in golden(name).cases
    if case not in ("decode", "prefixes")
]

# What each family's documentation lists.
TASKS = {
    "gemma": {"base", "causal-lm", "sequence-classification", "token-classification"},
    "gemma2": {"base", "causal-lm", "sequence-classification", "token-classification"},
    "nemotron": set(heads.TASKS),
    "open_llama": {"base", "causal-lm", "sequence-classification"},
    "recurrent_gemma": {"base", "causal-lm"},
    "xglm": {"base", "causal-lm"},
}

# num_labels is saved as the length of id2label; what transformers ignores is tested below.
NOT_IN_GOLDENS = {"model_type", "num_labels", "embeddings_scale_by_sqrt_dim"}
LABELS = {"id2label", "problem_type"}


@pytest.mark.parametrize("family", TASKS)
def test_every_documented_task_of_a_family_has_a_golden(family: str) -> None:
    assert {golden(name).task for name in NAMES if golden(name).family == family} == TASKS[family]
    model_class, _ = registry.model_classes({"model_type": family.replace("n_l", "n-l")})
    assert set(model_class.tasks) == TASKS[family]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", TASKS)
def test_every_config_field_has_a_golden_that_is_not_at_its_default(family: str) -> None:
    variants = [golden(name).model.args for name in NAMES if golden(name).family == family]
    defaults = type(variants[0])()
    known = {field.name for field in dataclasses.fields(defaults)} - NOT_IN_GOLDENS
    if "sequence-classification" not in TASKS[family]:
        known -= LABELS
    for name in known:
        default = getattr(defaults, name)
        assert any(getattr(args, name) != default for args in variants), name


@pytest.mark.parametrize(("name", "case"), CASES)
def test_forward_equals_the_reference(name: str, case: str) -> None:
    errors = case_errors(golden(name), case)
    assert errors and max(errors.values()) <= LOGITS, errors


@pytest.mark.parametrize("name", [n for n in FLOAT32 if golden(n).task == "causal-lm"])
def test_a_call_equals_forward(name: str) -> None:
    g = golden(name)
    assert distance(g.model(g.tokens), g.logits) <= LOGITS


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("name", CONTINUED)
def test_any_chunking_equals_the_reference(name: str, size: int) -> None:
    g = golden(name)
    assert distance(in_chunks(g.model, g.tokens, size), g.logits) <= LOGITS


@pytest.mark.parametrize("name", [n for n in FLOAT32 if "decode" in golden(n).cases])
def test_prefill_and_decoding_equal_the_reference_s_own(name: str) -> None:
    case = golden(name).cases["decode"]
    got = in_chunks(golden(name).model, case.inputs["input_ids"], 1)
    assert distance(got, case.outputs["logits"]) <= LOGITS


@pytest.mark.parametrize("name", HALF)
def test_half_precision_rounds_no_worse_than_the_reference(name: str) -> None:
    result = half_precision(golden(name))
    assert result.clear > 0 and result.agreeing == result.clear, result
    # MLX's layer norm on a CPU rounds between its steps, torch's does not: 1.22 for XGLM.
    assert result.ours <= 1.3 * result.reference, result


@pytest.mark.parametrize("family", TASKS)
def test_there_are_goldens_in_both_half_precisions(family: str) -> None:
    dtypes = {golden(name).metadata["dtype"] for name in HALF if golden(name).family == family}
    assert dtypes == {"float16", "bfloat16"}


@pytest.mark.parametrize("family", TASKS)
def test_both_styles_of_config_are_covered(family: str) -> None:
    configs = [golden(name).config for name in NAMES if golden(name).family == family]
    if family not in ("xglm", "open_llama"):  # no rotary embedding; older than the nested style
        assert any("rope_parameters" in config for config in configs)
        assert any("rope_theta" in config for config in configs)


def test_prompts_are_longer_than_many_windows_in_the_goldens() -> None:
    for name in ("recurrent_gemma_default", "gemma2_default"):
        args = golden(name).model.args
        window = getattr(args, "window", None) or args.sliding_window
        assert golden(name).tokens.shape[1] >= 10 * window


def test_the_goldens_stay_small() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.rglob("*")) < 15_000_000


def test_dynamic_base_follows_the_length_read_so_far() -> None:
    # One layer: nothing cached depends on the base, so decoding equals a forward call per prefix.
    g = golden("open_llama_dynamic_one_layer")
    case = g.cases["prefixes"]
    got = in_chunks(g.model, case.inputs["input_ids"], 1)
    assert distance(got, case.outputs["logits"]) <= LOGITS


@pytest.mark.parametrize("size", [1, 7, 16])
def test_dynamic_chunks_of_an_announced_length_equal_one_call(size: int) -> None:
    g = golden("open_llama_dynamic")
    T = g.tokens.shape[1]
    cache = g.model.make_cache()
    for state in cache:
        state.prepare(lengths=[T])
    pieces = [g.model(g.tokens[:, i : i + size], cache=cache) for i in range(0, T, size)]
    assert distance(mx.concatenate(pieces, axis=1), g.logits) <= LOGITS


def test_a_long_prompt_does_not_change_a_later_short_one() -> None:
    g = golden("open_llama_dynamic")
    short = g.tokens[:, :8]
    before = g.model(short)
    mx.eval(g.model(g.tokens))
    assert mx.array_equal(g.model(short), before)


def test_the_window_rule_of_deepmind_keeps_one_key_more() -> None:
    g = golden("recurrent_gemma_window_plus_self")
    args = g.model.args
    assert (args.attention_window_size, args.window) == (args.window - 1, args.window)
    narrower: Any = build(g.config | {"attention_window_includes_self": True})
    narrower.update(g.model.parameters())
    W, other = args.attention_window_size, narrower(g.tokens)
    assert distance(other[:, :W], g.logits[:, :W]) <= LOGITS
    assert distance(other[:, W:], g.logits[:, W:]) > 1e-2


def test_embeddings_are_not_scaled_where_deepmind_s_file_says_so() -> None:
    g = golden("recurrent_gemma_default")
    scaled, plain = g.model, build(g.config | {"embeddings_scale_by_sqrt_dim": False})
    plain.update(scaled.parameters())
    embeds = scaled.model.embed_tokens(g.tokens)
    by_hand = plain.forward(inputs_embeds=embeds * scaled.model.embedding_scale)
    assert plain.model.embedding_scale == 1.0 and scaled.model.embedding_scale > 5
    assert distance(by_hand.logits, g.logits) <= LOGITS
    assert distance(plain(g.tokens), g.logits) > 1e-2
