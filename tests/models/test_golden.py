"""Logits equal the reference implementation's; tests/golden/README.md says how those were made."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlxmodels.safetensors_header import read_header

from ..tolerance import assert_logits_close
from .conftest import GOLDEN, Golden, build

NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
# Past its trained length a dynamic rotary base depends on how much was read at once.
STEPWISE = [name for name in NAMES if "dynamic" not in name]
DECODED = [
    name for name in STEPWISE if "decode_logits" in read_header(GOLDEN / f"{name}.safetensors")
]

Read = Callable[[str], Golden]


def in_chunks(model: object, tokens: mx.array, size: int) -> mx.array:
    cache = model.make_cache()  # type: ignore[attr-defined]
    pieces = [
        model(tokens[:, i : i + size], cache=cache)  # type: ignore[operator]
        for i in range(0, tokens.shape[1], size)
    ]
    assert {state.offset for state in cache} == {tokens.shape[1]}
    return mx.concatenate(pieces, axis=1)


def test_there_are_goldens_of_both_families() -> None:
    assert sum(name.startswith("recurrent_gemma") for name in NAMES) == 7
    assert sum(name.startswith("open_llama") for name in NAMES) == 6
    assert len(DECODED) == 8


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_call_equals_the_reference(golden: Read, name: str) -> None:
    g = golden(name)
    assert_logits_close("no cache", g.model(g["tokens"]), g["logits"])
    assert_logits_close("cache", g.model(g["tokens"], cache=g.model.make_cache()), g["logits"])


@pytest.mark.parametrize("size", [1, 7, 16, 32])
@pytest.mark.parametrize("name", STEPWISE)
def test_any_chunking_equals_the_reference(golden: Read, name: str, size: int) -> None:
    g = golden(name)
    assert_logits_close("chunks", in_chunks(g.model, g["tokens"], size), g["logits"])


@pytest.mark.parametrize("name", DECODED)
def test_prefill_and_decoding_equal_the_reference_s_own(golden: Read, name: str) -> None:
    g = golden(name)
    assert_logits_close("steps", in_chunks(g.model, g["tokens"], 1), g["decode_logits"])


def test_a_prompt_is_longer_than_four_windows_in_the_goldens(golden: Read) -> None:
    g = golden("recurrent_gemma_default")
    assert g["tokens"].shape[1] > 4 * g.model.args.window


def test_dynamic_base_follows_the_length_read_so_far(golden: Read) -> None:
    # One layer: nothing cached depends on the base, so decoding equals a forward call per prefix.
    g = golden("open_llama_dynamic_one_layer")
    assert_logits_close("steps", in_chunks(g.model, g["tokens"], 1), g["prefix_logits"])


@pytest.mark.parametrize("size", [1, 7, 16])
def test_dynamic_chunks_of_an_announced_length_equal_one_call(golden: Read, size: int) -> None:
    g = golden("open_llama_dynamic")
    tokens, cache = g["tokens"], g.model.make_cache()
    for state in cache:
        state.prepare(lengths=[tokens.shape[1]])
    pieces = [g.model(tokens[:, i : i + size], cache=cache) for i in range(0, 40, size)]
    assert_logits_close("chunks", mx.concatenate(pieces, axis=1), g["logits"])


def test_a_long_prompt_does_not_change_a_later_short_one(golden: Read) -> None:
    g = golden("open_llama_dynamic")
    short = g["tokens"][:, :8]
    before = g.model(short)
    mx.eval(g.model(g["tokens"]))
    assert mx.array_equal(g.model(short), before)


def test_the_window_rule_of_deepmind_keeps_one_key_more(golden: Read) -> None:
    g = golden("recurrent_gemma_window_plus_self")
    assert g.config["attention_window_size"] == 7 and g.model.args.window == 8
    narrower = g.config | {"attention_window_includes_self": True}
    other = build(narrower)
    other.update(g.model.parameters())
    same, differs = other(g["tokens"])[:, :7], other(g["tokens"])[:, 7:]
    assert_logits_close("up to the window", same, g["logits"][:, :7])
    with pytest.raises(AssertionError, match="worst logit"):
        assert_logits_close("past the window", differs, g["logits"][:, 7:])
