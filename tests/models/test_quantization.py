"""Packing a model: what is packed, what it costs, what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmodels import ModelError, load, packing, quantization
from mlxmodels.quantization import quantize

from ..embedded_model import embedded_home
from ..tolerance import assert_logits_close
from .conftest import CONFIGS, OPEN_LLAMA, build, flat, random_model

__all__ = ["embedded_home"]  # a fixture

FAMILIES = [name for name in CONFIGS if name != "open_llama_dynamic"]
MODES: list[dict[str, Any]] = [
    {"mode": "affine", "group_size": 32},
    *({"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")),
]
WIDTHS = [MODES[0] | {"bits": bits} for bits in (2, 3, 4, 5, 6, 8)]


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def wide(family: str) -> dict[str, Any]:
    """A tiny config whose rows the groups of every mode divide."""
    own: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    if family == "recurrent_gemma":
        own["lru_width"] = 128
    return CONFIGS[family] | ({"d_model": 64} if family == "xglm" else own)


def packed_layers(model: Any) -> set[str]:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def divergence(truth: mx.array, other: mx.array) -> float:
    """Mean KL(truth || other) of logits, in nats per token."""
    log_p, log_q = (nn.log_softmax(x.astype(mx.float32), axis=-1) for x in (truth, other))
    return float((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


@pytest.mark.parametrize("settings", MODES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_linears_and_embeddings_are_packed_and_nothing_else_changes(
    family: str, settings: dict[str, Any]
) -> None:
    model = random_model(wide(family))
    before = flat(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    want = {name for name, kind in kinds.items() if issubclass(kind, nn.Linear | nn.Embedding)}
    outcome = quantize(model, **settings)
    assert packed_layers(model) == want == set(outcome.layers) and not outcome.undivided
    after = flat(model)
    kept = {name for name in before if name.removesuffix(".weight") not in want}
    assert all(mx.array_equal(after[name], before[name]) for name in kept)
    assert {name.rpartition(".")[0] for name in set(after) - kept} == want
    if family == "recurrent_gemma":
        block = "model.layers.0.temporal_block."
        gates = [f"rg_lru.{g}_gate_{p}" for g in ("input", "recurrent") for p in ("weight", "bias")]
        convolution = ["conv_1d.weight", "conv_1d.bias"]
        biases = [f"linear_{name}.bias" for name in ("x", "y", "out")]
        own = [*gates, "rg_lru.recurrent_param", *convolution, *biases]
        assert {name for name in kept if name.startswith(block)} == {block + name for name in own}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("settings", MODES[:2], ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_in_the_dtype_of_the_rest_and_keeps_a_float32_state(
    family: str, settings: dict[str, Any], dtype: mx.Dtype, tokens: mx.array
) -> None:
    model = random_model(wide(family))
    model.set_dtype(dtype)
    quantize(model, **settings)
    states = model.make_cache()
    out = model.forward(tokens[:, :10], cache=states, output_hidden_states=True)
    assert {x.dtype for x in (out.logits, *out.hidden_states)} == {dtype}
    for state in states:
        kept = {name: x.dtype for name, x in vars(state).items() if isinstance(x, mx.array)}
        assert kept and kept == {n: mx.float32 if n == "hidden" else dtype for n in kept}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_are_nearer_to_the_float_model(family: str, tokens: mx.array) -> None:
    want = random_model(wide(family))(tokens)

    def off(**settings: Any) -> float:
        model = random_model(wide(family))
        quantize(model, **settings)
        return divergence(want, model(tokens))

    by_width = [off(**settings) for settings in WIDTHS]
    assert by_width == sorted(by_width, reverse=True)
    assert by_width[-1] < 0.005  # measured 1e-5 to 2.4e-3
    assert by_width[-1] < by_width[0] / 500  # measured 1/1180 and less
    assert off(mode="mxfp8") < min(off(mode="mxfp4"), off(mode="nvfp4")) / 4


def test_trained_weights_stay_close_on_real_text(embedded_home: Path) -> None:
    """The first words of what docs/quantization.md measures on more."""
    loaded = load(embedded_home / "data/models/smollm2-135m", dtype=mx.float32)
    ids = mx.array([loaded.tokenizer.encode(topics["execmodel"], True)[:32]])
    want = loaded.model(ids)
    outcome = quantize(loaded.model, bits=8)
    full = quantization.expanded(flat(loaded.model), outcome.layers, mx.float32)
    model = build(loaded.config)
    model.load_weights(list(full.items()))
    assert 0 < divergence(want, model(ids)) < 0.01  # measured 0.0024


@pytest.mark.parametrize("settings", MODES[:2], ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_in_a_batch_and_in_pieces_is_the_row_alone(
    family: str, settings: dict[str, Any], tokens: mx.array
) -> None:
    model = random_model(wide(family))
    quantize(model, **settings)
    want = model(tokens[:, 10:])
    padding = mx.concatenate([mx.zeros((1, 10), mx.int32), tokens[:, 10:]], axis=1)
    mask = mx.array([[1] * 40, [0] * 10 + [1] * 30])
    out = model.forward(mx.concatenate([tokens, padding]), attention_mask=mask)
    assert_logits_close("batch", out.logits[1:, 10:], want)
    states = model.make_cache()
    pieces = [model(tokens[:, a:b], cache=states) for a, b in ((10, 24), (24, 25), (25, 40))]
    assert_logits_close("pieces", mx.concatenate(pieces, axis=1), want)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 7}, "the model cannot be packed with bits 7: affine has 2, 3, 4, 5, 6, 8."),
        ({"bits": 1}, "bits 1: affine has"),
        ({"bits": 4.0}, "bits 4.0: affine has"),
        ({"group_size": 16}, "group_size 16: affine has 32, 64, 128."),
        ({"mode": "mxfp4", "group_size": 64}, "group_size 64: mxfp4 has 32."),
        ({"mode": "mxfp8", "bits": 4}, "bits 4: mxfp8 has 8."),
        ({"mode": "nvfp4", "group_size": 32}, "group_size 32: nvfp4 has 16."),
        ({"mode": "q4_0"}, "in mode 'q4_0'; known are affine, mxfp4, mxfp8, nvfp4."),
        (
            {"choose": lambda name, _: {"bits": 9} if name.endswith("layers.1.mlp.up_proj") else 1},
            "model.layers.1.mlp.up_proj cannot be packed with bits 9: affine has",
        ),
        ({"group_size": 128}, "groups of 128: they do not divide the rows of model.embed_tokens,"),
        ({"choose": lambda *_: False}, "no layer can be packed in groups of 64."),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_changes(
    settings: dict[str, Any], sentence: str
) -> None:
    model = random_model(OPEN_LLAMA | {"hidden_size": 64})
    before = flat(model)
    with pytest.raises(ModelError) as caught:
        quantize(model, **settings)
    assert sentence in str(caught.value)
    after = flat(model)
    assert not packed_layers(model) and before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_a_packed_model_is_not_packed_again() -> None:
    model = random_model(wide("xglm"))
    quantize(model, choose=lambda name, _: name.endswith("fc2"))
    with pytest.raises(ModelError, match=r"2 layers .* already \(model\.layers\.0\.fc2, model"):
        quantize(model)


def test_the_known_settings_are_mlx_s_but_for_one_bit() -> None:
    weight = mx.random.normal((2, 256))
    for mode, group_size, bits in product(packing.MODES, (8, 16, 32, 64, 128, 256), range(9)):
        group_sizes, widths = packing.MODES[mode]
        try:
            mx.eval(mx.quantize(weight, group_size, bits, mode=mode))
        except ValueError:
            assert group_size not in group_sizes or bits not in widths
        else:
            assert group_size in group_sizes and (bits in widths or bits == 1)
    for mode, (group_sizes, widths) in packing.MODES.items():
        got = mx.quantize(weight, mode=mode)
        want = mx.quantize(weight, group_sizes[0], widths[0], mode=mode)
        assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))
