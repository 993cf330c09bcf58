"""Whole models whose every op goes to a Metal kernel give the logits of plain MLX."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from metal import dispatch
from mlxmodels import registry

from .. import metal_host
from ..tiny_models import GEMMA, GEMMA2, RECURRENT_GEMMA
from ..tolerance import assert_logits_close

# Head dims that the attention kernels take, windows shorter and longer than the prompts.
CONFIGS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": RECURRENT_GEMMA
    | {"hidden_size": 128, "lru_width": 128}
    | {"num_attention_heads": 2},
    "gemma2": GEMMA2 | {"head_dim": 32, "sliding_window": 9},
    "gemma": GEMMA | {"head_dim": 32},
}
LEFT_PADDING = [0, 3]
T, STEPS = 21, 4


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    model_class, args_class = registry.model_classes(CONFIGS[request.param])
    model = model_class(args_class.from_dict(CONFIGS[request.param]))
    mx.random.seed(0)
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.2, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def run(model: Any, tokens: mx.array, chunks: list[int], padding: list[int]) -> mx.array:
    """Logits of a prompt read in chunks, of the last ones token by token."""
    states = model.make_cache()
    for state in states:
        state.prepare(left_padding=padding)
    logits, begin = [], 0
    for size in [*chunks, *[1] * (tokens.shape[1] - sum(chunks))]:
        logits.append(model(tokens[:, begin : begin + size], cache=states))
        mx.eval(logits[-1])
        begin += size
    return mx.concatenate(logits, axis=1)


@pytest.mark.parametrize("chunks", [[T], [1, 8, 12]], ids=str)
@pytest.mark.parametrize("padding", [[0, 0], LEFT_PADDING], ids=str)
def test_logits_equal_those_of_the_reference(
    model: Any, chunks: list[int], padding: list[int], apple_gpu: None
) -> None:
    tokens = mx.random.randint(0, 259, (2, T + STEPS), key=mx.random.key(3))
    dispatch.set_backend("reference")
    want = run(model, tokens, chunks, padding)
    dispatch.set_backend("auto")
    with metal_host.install(check=False) as host:
        got = run(model, tokens, chunks, padding)
    assert not dispatch.faults()
    names = Counter(launch.name for launch in host.launches)
    expected = {"rms_norm_1p"}
    if model.model_type == "recurrent_gemma":
        expected |= {"causal_conv1d", "rg_lru", "block_rg_lru_step", "local_attention"}
    if model.model_type == "gemma2":
        expected |= {"local_attention", "local_attention_decode"}
    assert expected <= set(names), names
    for b, padded in enumerate(padding):
        assert_logits_close(f"row {b}", got[b, padded:], want[b, padded:])


def test_a_checked_run_has_no_findings(apple_gpu: None) -> None:
    config = CONFIGS["recurrent_gemma"] | {"attention_window_size": 5}
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))
    tokens = mx.random.randint(0, 259, (2, 11), key=mx.random.key(4))
    with metal_host.install():
        run(model, tokens, [7], LEFT_PADDING)
