"""MLX's own attention kernel, from the headers of the wheel, on the host."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from ..metal_host import compiler
from ..tolerance import assert_close
from .planted.kernels import Small, float64, run

KERNELS = compiler.MLX_HEADERS / "mlx" / "backend" / "metal" / "kernels"

CALL = """
    const device bool* bools = nullptr;
    const device T* floats = nullptr;
    sdpa_vector<T, D>(
        q, k, v, y, gqa_factor, N, k_head_stride, k_seq_stride, v_head_stride, v_seq_stride,
        scale, bools, floats, N, N, N, floats, N,
        threadgroup_position_in_grid, threadgroups_per_grid,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""


def sdpa_vector_source() -> str:
    """Its text with the function constants fixed: a causal mask, nothing else."""
    text = (KERNELS / "sdpa_vector.h").read_text()
    text = text[: text.index("template <typename T, int D, int V = D, int TK")]

    def constant(match: re.Match[str]) -> str:
        value = {"do_causal": "true", "blocks": "1"}.get(match[2], "false")
        return f"constant constexpr {match[1]} {match[2]} = {value};"

    return re.sub(r"constant (bool|int) (\w+) \[\[function_constant\(\d+\)\]\];", constant, text)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_sdpa_vector(dtype: mx.Dtype) -> None:
    heads, kv_heads, queries, N, D = 4, 2, 3, 45, 64
    mx.random.seed(9)
    q = mx.random.normal((heads, queries, D)).astype(dtype)
    k, v = (mx.random.normal((kv_heads, N, D)).astype(dtype) for _ in range(2))
    names = ["q", "k", "v", "gqa_factor", "N"]
    names += ["k_head_stride", "k_seq_stride", "v_head_stride", "v_seq_stride", "scale"]
    strides = [mx.array(n, mx.uint64) for n in (N * D, D, N * D, D)]
    kernel = Small(
        CALL,
        sdpa_vector_source(),
        inputs=lambda: [q, k, v, heads // kv_heads, N, *strides, 0.125],
        input_names=names,
        output_shapes=[q.shape],
        output_dtypes=[dtype],
        grid=(heads * 1024, queries, 1),
        threadgroup=(1024, 1, 1),
        template=[("T", dtype), ("D", D)],
    )
    (y,), host = run(kernel, schedules=("forward", "random"), lint=False)
    assert not host.findings, [str(finding) for finding in host.findings]
    keys, values = (np.repeat(float64(x), heads // kv_heads, axis=0) for x in (k, v))
    scores = float64(q) @ keys.swapaxes(1, 2) * 0.125
    visible = np.arange(N)[None, :] <= N - queries + np.arange(queries)[:, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert_close("y", y, weights / weights.sum(-1, keepdims=True) @ values)
