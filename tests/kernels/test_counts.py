"""scripts/count_kernels.py: what it counts, goals by count, and that docs/kernels.md is current.

It replaces functions of MLX before anything imports them, so it runs in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="only the Metal host sees what a kernel does"
)

ROOT = Path(__file__).resolve().parent.parent.parent

# Of x [4, 8], square [8, 8], weight [8], blocks [4, 8, 8], one [1, 1, 4, 8] and many [1, 3, 4, 8].
LAUNCHES = {
    "x + 1": 1,
    "x.T": 0,
    "x.reshape(8, 4)": 0,
    "x.T.reshape(8, 4)": 0,
    "x.T.reshape(32)": 1,
    "x[1:3].reshape(16)": 0,
    "x[:, 1:3].reshape(8)": 1,
    "x.astype(mx.float16)": 1,
    "x.astype(mx.float32)": 0,
    "mx.concatenate([x, x, x])": 3,
    "mx.pad(x, 1)": 2,
    "mx.zeros((3,)) + mx.arange(3.0)": 3,
    "mx.array([1.0, 2.0])[None]": 0,
    "x @ square": 1,
    "x @ square.T": 1,
    "mx.addmm(weight, x, square.T)": 1,
    "many.swapaxes(1, 2) @ blocks": 1,
    "many.swapaxes(1, 2) @ blocks.swapaxes(1, 2)": 1,
    "many.swapaxes(1, 2) @ square": 2,
    "many.swapaxes(1, 2)[..., ::2] @ blocks[:, :4]": 2,
    "one.swapaxes(1, 2) @ blocks": 2,
    "mx.fast.rms_norm(x, weight, 1e-6)": 1,
    "mx.fast.rms_norm(x.T, weight[:4], 1e-6)": 2,
    "mx.fast.rms_norm(x.astype(mx.float16), weight, 1e-6)": 3,
    "metal.rms_norm_1p(x, weight, 1e-6)": 1,
    "metal.rms_norm_1p(x.T, weight[:4], 1e-6)": 2,
    "nn.gelu_approx(x)": 1,
    "mx.compile(lambda x: mx.tanh(x + 1) * 2)(x)": 1,
    "mx.compile(lambda x: mx.tanh(x @ square) * 2)(x)": 3,
    "updated(x + 1)": 2,
    "updated((x + 1).reshape(8, 4))": 2,
    "(lambda y: [updated(y.reshape(8, 4)), y])(x + 1)": 3,
    "updated(x)": 2,
}
REFUSED = {
    "mx.sort(x)": "no rule covers Sort",
    "(x + 1) * (x + 1)": "merged in the trace",
    "mx.exp(x.T)": "of transposed arrays",
    "x.T + 1": "of transposed arrays",
}

EVALUATE = """
import json, sys
sys.path.insert(0, "scripts")
import count_kernels
import mlx.core as mx, mlx.nn as nn
import metal

count_kernels.pretend_apple_gpu()
ARRAYS = {"x": (4, 8), "square": (8, 8), "weight": (8,)}
ARRAYS |= {"blocks": (4, 8, 8), "one": (1, 1, 4, 8), "many": (1, 3, 4, 8)}

def updated(y):
    y[0] = 1.0
    return y

def total(text):
    def function(*arrays):
        return eval(text, globals() | dict(zip(ARRAYS, arrays)))
    try:
        return count_kernels.count(function, *map(mx.zeros, ARRAYS.values())).total
    except RuntimeError as error:
        return str(error)

print(json.dumps({text: total(text) for text in json.load(sys.stdin)}))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, int | str]:
    child = subprocess.run(
        [sys.executable, "-c", EVALUATE],
        cwd=ROOT,
        input=json.dumps([*LAUNCHES, *REFUSED]),
        text=True,
        check=True,
        stdout=subprocess.PIPE,
    )
    result: dict[str, int | str] = json.loads(child.stdout)
    return result


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("counts") / "figures.json"
    command = [sys.executable, "scripts/count_kernels.py", "--check", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.parametrize("text", LAUNCHES)
def test_launches_of_an_expression(counted: dict[str, int | str], text: str) -> None:
    assert counted[text] == LAUNCHES[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_rules_do_not_cover_is_refused(counted: dict[str, int | str], text: str) -> None:
    assert REFUSED[text] in str(counted[text])


def test_launches_of_a_recurrent_layer(figures: dict[str, Any]) -> None:
    launches = figures["launches"]
    for dtype in ("float32", "bfloat16"):
        assert launches["decode"][dtype] <= 14
        assert launches["prefill, first chunk"][dtype] <= 18
        assert launches["prefill, later chunk"][dtype] <= 18


def test_bytes(figures: dict[str, Any]) -> None:
    goals = {"linear_scan": 1.1, "rg_lru": 1.1, "local_attention": 1.3}
    assert goals.keys() <= {kernel for kernel, *_ in figures["ratios"]}
    over = [t for t in figures["ratios"] if t[2] > goals.get(t[0], float("inf"))]
    assert not over


def test_the_document_has_these_figures(figures: dict[str, Any]) -> None:
    assert figures["is_current"], "run scripts/count_kernels.py"
