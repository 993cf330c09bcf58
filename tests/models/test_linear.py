"""Products that are multiplied in blocks equal those that are not."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmodels import linear
from tests.tolerance import assert_close


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_PACKED", 100)
    monkeypatch.setattr(linear, "_BLOCK", 64)
    mx.random.seed(0)


@pytest.mark.parametrize("shape", [(1, 1), (8,), (3, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("outputs", [1, 7, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_equals_mlxs(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    layer = linear.Linear(16, outputs, bias=bias)
    x = mx.random.normal((*shape, 16))
    assert_close("y", layer(x), nn.Linear.__call__(layer, x))


def test_a_weight_wider_than_a_block() -> None:
    layer = linear.Linear(200, 5)
    x = mx.random.normal((1, 1, 200))
    assert_close("y", layer(x), nn.Linear.__call__(layer, x))


def test_a_head_equals_mlxs() -> None:
    embedding = linear.Embedding(41, 16)
    x = mx.random.normal((2, 1, 16))
    assert_close("y", embedding.as_linear(x), x @ embedding.weight.T)


def test_gradients_pass() -> None:
    layer = linear.Linear(16, 33)
    x, y = mx.random.normal((2, 1, 16)), mx.random.normal((2, 1, 33))

    def loss(x: mx.array, weight: mx.array, in_blocks: bool) -> mx.array:
        out = linear._in_blocks(x, weight) if in_blocks else x @ weight.T
        return (out * y).sum()

    got = mx.grad(loss, argnums=(0, 1))(x, layer.weight, True)
    want = mx.grad(loss, argnums=(0, 1))(x, layer.weight, False)
    for name, a, b in zip(("x", "weight"), got, want, strict=True):
        assert_close(name, a, b)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_products_are_left_to_mlx(dtype: mx.Dtype) -> None:
    assert not linear._would_pack(mx.zeros((1, 64), dtype=dtype), mx.zeros((64, 64), dtype=dtype))
