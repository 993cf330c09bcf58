"""Layers against float64: activations, norms that round once, caps, rotary embeddings."""

from __future__ import annotations

from math import erf

import mlx.core as mx
import numpy as np
import pytest

from mlxmodels import ModelError, losses
from mlxmodels.layers import RMSNorm1P, Rotary, activation, softcap
from mlxmodels.nemotron import LayerNorm1P

POINTS = np.linspace(-10, 10, 4001)
TANH = 0.5 * POINTS * (1 + np.tanh(np.sqrt(2 / np.pi) * (POINTS + 0.044715 * POINTS**3)))
TRUTH = {
    "gelu": 0.5 * POINTS * (1 + np.vectorize(erf)(POINTS / np.sqrt(2))),
    "gelu_new": TANH,
    "gelu_pytorch_tanh": TANH,
    "relu": np.maximum(POINTS, 0),
    "relu2": np.maximum(POINTS, 0) ** 2,
    "silu": POINTS / (1 + np.exp(-POINTS)),
    "swish": POINTS / (1 + np.exp(-POINTS)),
}
HALVES = [mx.bfloat16, mx.float16]


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rounded(truth: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(truth.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("name", TRUTH)
def test_activations_are_what_their_names_mean(name: str) -> None:
    got = float64(activation(name)(mx.array(POINTS.astype(np.float32))))
    assert np.abs(got - TRUTH[name]).max() <= 2e-6 * max(1, np.abs(TRUTH[name]).max())


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ModelError, match="activation 'mish'; known are gelu"):
        activation("mish")


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_rounds_once(dtype: mx.Dtype) -> None:
    norm = RMSNorm1P(64, 1e-6)
    norm.weight = (mx.random.normal((64,), key=mx.random.key(1)) * 0.1).astype(dtype)
    x = (mx.random.normal((50, 64), key=mx.random.key(2)) * 3).astype(dtype)
    wide = float64(x)
    truth = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + float64(norm.weight))
    assert norm(x).dtype == dtype
    assert (norm(x) == rounded(truth, dtype)).mean().item() > 0.999


@pytest.mark.parametrize("dtype", HALVES)
def test_layer_norm_rounds_once(dtype: mx.Dtype) -> None:
    norm = LayerNorm1P(64, 1e-5)
    norm.weight = (mx.random.normal((64,), key=mx.random.key(1)) * 0.1).astype(dtype)
    norm.bias = mx.random.normal((64,), key=mx.random.key(3)).astype(dtype)
    x = (mx.random.normal((50, 64), key=mx.random.key(2)) * 3).astype(dtype)
    wide = float64(x)
    centred = wide - wide.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    truth = scaled * (1 + float64(norm.weight)) + float64(norm.bias)
    assert norm(x).dtype == dtype
    assert (norm(x) == rounded(truth, dtype)).mean().item() > 0.995


@pytest.mark.parametrize("dtype", HALVES)
def test_softcap_rounds_once(dtype: mx.Dtype) -> None:
    x = mx.array(POINTS.astype(np.float32) * 10).astype(dtype)
    truth = 30 * np.tanh(float64(x) / 30)
    assert (softcap(x, 30.0) == rounded(truth, dtype)).mean().item() > 0.999
    assert softcap(x, None) is x


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_are_computed_in_float32(dtype: mx.Dtype) -> None:
    logits = (mx.random.normal((3, 20, 11), key=mx.random.key(0)) * 4).astype(dtype)
    labels = mx.random.randint(0, 11, (3, 20), key=mx.random.key(1))
    wide, index = float64(logits), np.array(labels)
    each = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, index[..., None], -1)[..., 0]
    loss = losses.cross_entropy(logits, labels)
    assert loss.dtype == mx.float32 and abs(loss.item() - each.mean()) < 1e-5
    targets = mx.random.normal((3, 11), key=mx.random.key(2))
    square = losses.sequence(logits[:, 0], targets, "regression")
    assert abs(square.item() - ((wide[:, 0] - float64(targets)) ** 2).mean()) < 1e-5


@pytest.mark.parametrize("dims", [8, 16])
def test_rotary_by_offset_and_by_position_turn_alike(dims: int) -> None:
    rope = Rotary(dims, 10000.0, 0.5)
    q = mx.random.normal((2, 4, 6, 16), key=mx.random.key(0))
    k = mx.random.normal((2, 2, 6, 16), key=mx.random.key(1))
    offsets = mx.array([3, 40])
    by_offset = rope(q, k, offsets)
    by_position = rope(q, k, offsets[:, None] + mx.arange(6))
    frequencies = 10000.0 ** (-np.arange(0, dims, 2) / dims)
    angles = (np.array([[3], [40]]) + np.arange(6))[..., None] * 0.5 * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    for x, one, other in zip((q, k), by_offset, by_position, strict=True):
        wide, half = float64(x), dims // 2
        left, right = wide[..., :half], wide[..., half:dims]
        turned = [left * cos - right * sin, right * cos + left * sin, wide[..., dims:]]
        truth = np.concatenate(turned, axis=-1)
        assert np.abs(float64(one) - truth).max() < 2e-5
        assert np.abs(float64(other) - truth).max() < 2e-5
