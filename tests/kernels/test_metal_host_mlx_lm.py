"""mlx-lm's kernels, known to work on Macs, run without a finding; the one known not to has some."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from .. import metal_host
from ..tolerance import assert_close
from .planted.kernels import float64

Fresh = Callable[[str], Any]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fresh]:
    """Imports a module of mlx-lm anew, as on a Mac: many make their kernels on import."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    replaced: list[tuple[ModuleType, str, object]] = []

    def load(name: str) -> ModuleType:
        importlib.import_module(name)
        parent, _, child = name.rpartition(".")
        package = sys.modules[parent]
        replaced.append((package, child, getattr(package, child)))
        monkeypatch.delitem(sys.modules, name)
        importlib.import_module(name)
        return sys.modules[name]

    with metal_host.install(allow_findings=True):
        yield load
    for package, child, value in replaced:
        setattr(package, child, value)


def normal(*shape: int, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal(shape) * scale).astype(dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("vector_gate", [False, True], ids=["scalar", "vector"])
def test_gated_delta(fresh: Fresh, vector_gate: bool, masked: bool) -> None:
    gated_delta = fresh("mlx_lm.models.gated_delta")
    B, T, Hk, Hv, Dk, Dv = 1, 5, 2, 4, 64, 8
    mx.random.seed(0)
    q, k, v = normal(B, T, Hk, Dk), normal(B, T, Hk, Dk, scale=0.1), normal(B, T, Hv, Dv)
    g = mx.sigmoid(normal(B, T, Hv, Dk) if vector_gate else normal(B, T, Hv))
    beta, state = mx.sigmoid(normal(B, T, Hv)), normal(B, Hv, Dv, Dk)
    mask = mx.array([[True, True, False, True, False]]) if masked else None
    with metal_host.install() as host:
        y, last = gated_delta.gated_delta_kernel(q, k, v, g, beta, state, mask)
    want_y, want_last = gated_delta.gated_delta_ops(q, k, v, g, beta, state, mask)
    kept = mask[..., None, None] if mask is not None else 1.0  # the kernel has zeros elsewhere
    assert_close("y", y, want_y * kept)
    assert_close("state", last, want_last)
    # Where the mask is false, the 32 lanes of a row store the same zero.
    assert {note.kind for note in host.notes} == ({"same-value"} if masked else set())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_gated_delta_packed(fresh: Fresh, dtype: mx.Dtype) -> None:
    gated_delta = fresh("mlx_lm.models.gated_delta")
    B, T, Hk, Hv, Dk, Dv = 2, 3, 1, 2, 128, 32
    mx.random.seed(1)
    q, k = normal(B, T, Hk, Dk, dtype=dtype), normal(B, T, Hk, Dk, scale=0.1, dtype=dtype)
    v, g = normal(B, T, Hv, Dv, dtype=dtype), mx.sigmoid(normal(B, T, Hv))
    beta, state = mx.sigmoid(normal(B, T, Hv)).astype(dtype), normal(B, Hv, Dv, Dk)
    with metal_host.install():
        y, last = gated_delta.gated_delta_kernel(q, k, v, g, beta, state, None)
    inputs = [x.astype(mx.float32) for x in (q, k, v, g, beta)]
    want_y, want_last = gated_delta.gated_delta_ops(*inputs, state, None)
    assert_close("y", y, want_y)
    assert_close("state", last, want_last)


def test_ssm(fresh: Fresh) -> None:
    ssm = fresh("mlx_lm.models.ssm")
    n, H, D, S = 2, 4, 8, 64
    mx.random.seed(2)
    x, A_log, B, C = normal(n, 1, H, D), normal(H), normal(n, 1, 2, S), normal(n, 1, 2, S)
    rest = (normal(H), normal(n, 1, H), normal(H), normal(n, H, D, S), (0.001, 100.0))
    with metal_host.install():
        y, state = ssm.ssm_update_kernel(x, A_log, B, C, *rest)
    want_y, want_state = ssm.ssm_attn(x, A_log, B, C, *rest)
    assert_close("y", y, want_y)
    assert_close("state", state, want_state)


def test_bitlinear(fresh: Fresh) -> None:
    layers = fresh("mlx_lm.models.bitlinear_layers")
    mx.random.seed(3)
    layer = layers.BitLinear(64, 32, bias=False)
    layer.weight = mx.random.randint(0, 256, (8, 64)).astype(mx.uint8)
    layer.weight_scale = mx.array([2.0])
    x = normal(3, 64)
    with metal_host.install():
        y = layer.execute_matmul_kernel(x, layer.weight)
    packed = np.array(layer.weight)
    weight = np.concatenate([(packed >> shift & 3) - 1.0 for shift in (0, 2, 4, 6)])
    assert_close("y", y, float64(x) @ weight.T * 2)


def test_wkv7(fresh: Fresh) -> None:
    rwkv7 = fresh("mlx_lm.models.rwkv7")
    B, T, H, D = 1, 4, 2, 64
    mx.random.seed(4)
    r, w, k, v, a, b = (normal(B, T, H, D, scale=0.3) for _ in range(6))
    state = normal(B, H, D, D)
    with metal_host.install():
        y, last = rwkv7.wkv7_kernel(r, w, k, v, a, b, state)
    R, W, K, V, A, Bv = map(float64, (r, w, k, v, a, b))
    S, want = float64(state), np.zeros((B, T, H, D))
    for t in range(T):
        SA = np.einsum("bhvk,bhk->bhv", S, A[:, t])
        S = (
            S * W[:, t, :, None]
            + SA[..., None] * Bv[:, t, :, None]
            + np.einsum("bhv,bhk->bhvk", V[:, t], K[:, t])
        )
        want[:, t] = np.einsum("bhvk,bhk->bhv", S, R[:, t])
    assert_close("y", y, want)
    assert_close("state", last, S)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_qk_norm(fresh: Fresh, dtype: mx.Dtype) -> None:
    kernels = fresh("mlx_lm.kernels.qk_norm")
    HQ, HK, D = 4, 2, 48
    mx.random.seed(5)
    qkvg = normal(3, 2 * (HQ + HK) * D, dtype=dtype)
    with metal_host.install():
        q, k = kernels.qk_norm(
            qkvg, n_heads=HQ, n_kv_heads=HK, head_dim=D, eps=1e-6, query_scale=0.5
        )
    heads = float64(qkvg).reshape(3, -1, D)
    norm = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6)
    assert_close("q", q, norm[:, :HQ] * 0.5)
    assert_close("k", k, norm[:, HQ : HQ + HK])


@pytest.mark.parametrize("D", [24, 200, 2048])
def test_norm_add_norm(fresh: Fresh, D: int) -> None:
    kernels = fresh("mlx_lm.kernels.norm_add_norm")
    mx.random.seed(6)
    branch, stream, alpha, beta, weight = (normal(*s) for s in [(3, D), (3, D), (D,), (D,), (D,)])
    following = nn.RMSNorm(D)
    following.weight = normal(D)
    with metal_host.install():
        total, normed = kernels.norm_add_norm(
            branch,
            stream,
            alpha=alpha,
            beta=beta,
            post_weight=weight,
            post_eps=1e-6,
            next_norm=following,
        )
    scaled = float64(branch) * float64(weight)
    post = scaled / np.sqrt((scaled**2).mean(-1, keepdims=True) + 1e-6)
    want = float64(alpha) * float64(stream) + float64(beta) * post
    assert_close("stream", total, want)
    rms = np.sqrt((want**2).mean(-1, keepdims=True) + following.eps)
    assert_close("normed", normed, want / rms * float64(following.weight))


def test_expert_routing(fresh: Fresh) -> None:
    kernels = fresh("mlx_lm.kernels.expert_routing")
    mx.random.seed(7)
    logits, bias = normal(5, 40), normal(40)
    with metal_host.install():
        chosen, weights = kernels.expert_routing(
            logits, bias, top_k=4, multiplier=1.0, score_eps=1e-6, route_scale=2.0
        )
    score = 1 / (1 + np.exp(-float64(logits)))
    want = np.argsort(-(score + float64(bias)), axis=-1)[:, :4]
    assert np.array_equal(np.array(chosen), want)
    top = np.take_along_axis(score, want, -1)
    assert_close("weights", weights, top / (top.sum(-1, keepdims=True) + 1e-6) * 2)


def test_qk_norm_rope(fresh: Fresh) -> None:
    kernels = fresh("mlx_lm.kernels.qk_norm_rope")
    mx.random.seed(10)
    HQ, HK, D, T = 2, 1, 32, 5
    qkvg = normal(1, T, 2 * (HQ + HK) * D)
    with metal_host.install():
        q, k = kernels.qk_norm_rope(
            qkvg, n_heads=HQ, n_kv_heads=HK, head_dim=D,
            eps=1e-6, query_scale=0.5, rope_base=10000.0, offset=3,
        )  # fmt: skip
    heads = mx.fast.rms_norm(qkvg.reshape(1, T, -1, D)[:, :, : HQ + HK], None, 1e-6)
    rotated = mx.fast.rope(
        heads.swapaxes(1, 2), D, traditional=True, base=10000.0, scale=1.0, offset=3
    ).swapaxes(1, 2)
    assert_close("q", q, rotated[:, :, :HQ] * 0.5)
    assert_close("k", k, rotated[:, :, HQ:])


def test_rms_norm_sigmoid_gate(fresh: Fresh) -> None:
    kernels = fresh("mlx_lm.kernels.rms_norm_sigmoid_gate")
    mx.random.seed(11)
    B, H, L, D = 2, 3, 4, 48
    x, gate = normal(B, H, L, D), normal(B, L, H * D)
    with metal_host.install():
        y = kernels.rms_norm_sigmoid_gate(x, gate, eps=1e-6)
    norm = mx.fast.rms_norm(x, None, 1e-6).swapaxes(1, 2).reshape(B, L, H * D)
    assert_close("y", y, norm * mx.sigmoid(gate))


def test_post_expert_norm_combine(fresh: Fresh) -> None:
    kernels = fresh("mlx_lm.kernels.post_expert_norm_combine")
    mx.random.seed(12)
    experts, weights, scale = normal(3, 4, 96), normal(3, 4), normal(96)
    with metal_host.install():
        y = kernels.post_expert_norm_combine(experts, weights, norm_weight=scale, eps=1e-6)
    scaled = mx.fast.rms_norm(experts * scale, None, 1e-6)
    assert_close("y", y, (weights[..., None] * scaled).sum(-2))


def test_sinkhorn(fresh: Fresh) -> None:
    model = fresh("mlx_lm.models.deepseek_v41")
    mx.random.seed(13)
    comb, eps = mx.random.uniform(0.1, 1.0, (70, 4, 4)), mx.array([1e-6])
    with metal_host.install():
        y = model._sinkhorn(comb, iters=3, eps=eps)
    model._sinkhorn_kernel = None
    assert_close("y", y, model._sinkhorn(comb, iters=3, eps=eps))


@pytest.mark.parametrize("loss", ["kl", "js"])
def test_the_race_that_shipped_in_the_divergence_losses_is_found(fresh: Fresh, loss: str) -> None:
    """ml-explore/mlx-lm#1700: no barrier between reading the maxima and storing the sums over them,
    and a barrier that orders no memory before the last exchange."""
    losses = fresh("mlx_lm.tuner.losses")
    mx.random.seed(8)
    q, p = normal(2, 4500), normal(2, 4500)
    with metal_host.install(allow_findings=True, schedules=("forward", "random")) as host:
        y = getattr(losses, f"{loss}_div_loss")(q, p)
        mx.eval(y)
    races = [f for f in host.findings if f.kind == "race"]
    lines = host.launches[0].body.split("\n")

    def pairs(first: str, second: str) -> bool:
        return any(
            {first, second} == {f.text, lines[f.other_line - 1].strip()}
            for f in races
            if f.other_line
        )

    assert pairs(
        "max_q = shared[simd_lane_id * 2 + 0];", "shared[simd_group_id * 2 + 0] = sum_exp_q;"
    )
    assert "order-dependent" in host.kinds
    if loss == "kl":
        assert pairs("shared[simd_group_id] = kl;", "kl = shared[simd_lane_id];")
        assert {line for f in races for line in (f.line, f.other_line)} == {
            83,
            84,
            94,
            95,
            98,
            99,
            145,
            148,
        }
