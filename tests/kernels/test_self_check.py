"""The list behind `gryphon doctor --kernels`: nothing is missing from it, all of it passes, and its
small cases notice a kernel that is wrong."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import metal
from metal import build, self_check
from metal.dispatch import Op

from .. import metal_host

pytestmark = pytest.mark.usefixtures("apple_gpu")


def ids(case: self_check.Case) -> str:
    return f"{case.op.name}, {case.size}"


def test_every_op_is_listed() -> None:
    names = [module.name for module in pkgutil.iter_modules(metal.__path__, "metal.")]
    ops = {
        value.name
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, Op)
    }
    assert {case.op.name for case in self_check.CASES} == ops


def test_every_kernel_is_launched_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()

    @functools.cache
    def kernel(name: str, *_: Any, **__: Any) -> build.Launch:
        def launch(**call: Any) -> list[mx.array]:
            launched.add((name, dict(call["template"])["T"]))
            return [
                mx.zeros(shape, dtype)
                for shape, dtype in zip(call["output_shapes"], call["output_dtypes"], strict=True)
            ]

        return launch

    monkeypatch.setattr(build, "kernel", kernel)
    for case in self_check.CASES:
        for words, variant in case.variants():
            assert case.op.check(variant), f"{case.op.name}, {words}: zeros passed"
    files = {path.stem for path in build.KERNELS.glob("*.metal")}
    assert launched == {(file, dtype) for file in files for dtype in self_check.DTYPES.values()}


@pytest.mark.parametrize("case", self_check.CASES, ids=ids)
def test_every_variant_passes(case: self_check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whose rounding is the coarsest; the kernels' own tests have all dtypes."""
    monkeypatch.setattr(self_check, "DTYPES", {"bfloat16": mx.bfloat16})
    with metal_host.install(check=False):
        for words, variant in case.variants():
            assert case.op.check(variant) is None, words


PROMPT, STEP = "bfloat16, B 1 T 512", "bfloat16, B 1 T 1"
TILES, RING = "bfloat16, H 10 Hkv 1 D 256 T 512 S 2559", "bfloat16, H 10 Hkv 1 D 256 W 2048"
FEW = "bfloat16, H 8 Hkv 4 D 64 T 4 S 40"

# Of a variant of an op: a file, text in it, and what a wrong kernel has there.
MUTANTS = [
    ("linear_scan", f"{PROMPT}, h0, lengths, reset", "linear_scan.metal", "is_start ? 0.0f : ", ""),
    ("linear_scan", PROMPT, "recurrence.h", "before = s == segment ? carry : before;", ""),
    ("rg_lru", f"{PROMPT}, h0", "rg_lru.metal", "carry = h0", "carry = 0.0f * h0"),
    ("rg_lru", f"{PROMPT}, h0, lengths, reset", "recurrence.h", "is_start ? gated :", ""),
    ("rg_lru", f"{STEP}, h0, lengths, reset", "rg_lru_step.metal", "[b] > 0", "[b] > 1"),
    ("rg_lru", f"{STEP}, h0", "recurrence.h", "/ (1.0f - t)", ""),
    ("rg_lru", f"{STEP}, h0", "recurrence.h", "log1p(", "("),
    ("block_rg_lru", PROMPT, "rg_lru.metal", "+ input_offset", ""),
    ("block_rg_lru", STEP, "block_rg_lru_step.metal", "p < ROWS;", "p < ROWS - 1;"),
    ("causal_conv1d", f"{PROMPT}, lengths, reset", "causal_conv1d.metal", "== length", "== tokens"),
    ("causal_conv1d", f"{STEP}, lengths, reset", "causal_conv1d.metal", "is_start ? 0.0f :", ""),
    ("rms_norm_1p", PROMPT, "rms_norm_1p.metal", "+ eps", ""),
    ("rms_norm_1p", PROMPT, "rms_norm_1p.metal", "(1.0f + static", "(0.0f + static"),
    ("local_attention", TILES, "attention.h", ": outer *", ": -outer *"),
    ("local_attention", f"{TILES}, softcap", "attention.h", "precise::tanh(inner", "abs(inner"),
    (
        "local_attention",
        TILES,
        "local_attention.metal",
        "last_seen - window + 1, start",
        "start, 0",
    ),
    ("local_attention", f"{TILES}, key_start", "local_attention.metal", "int(key_start[b])", "0"),
    ("local_attention", FEW, "local_attention_decode.metal", "last_seen - window + 1, 0", "0, 0"),
    ("local_attention_decode", RING, "attention.h", ": outer *", ": -outer *"),
    (
        "local_attention_decode",
        f"{RING}, softcap",
        "attention.h",
        "precise::tanh(inner",
        "abs(inner",
    ),
    ("local_attention_decode", RING, "local_attention_decode.metal", "[i] * factors[h]", "[i]"),
    ("local_attention_decode", RING, "local_attention_merge.metal", "? metal::exp2(", "? abs("),
]


@pytest.mark.parametrize(("op", "words", "file", "text", "wrong"), MUTANTS)
def test_the_small_case_notices(
    op: str,
    words: str,
    file: str,
    text: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(build.KERNELS, tmp_path / "kernels")
    path = tmp_path / "kernels" / file
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, wrong))
    monkeypatch.setattr(build, "KERNELS", tmp_path / "kernels")
    ((check, variant),) = (
        (case.op.check, variant)
        for case in self_check.CASES
        for description, variant in case.variants()
        if (case.op.name, description) == (op, words)
    )
    with metal_host.install(check=False, allow_findings=True):
        assert "differs" in (check(variant) or "")


def test_at_full_size_the_given_arguments_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_E", 40)
    case = next(c for c in self_check.CASES if (c.op.name, c.size) == ("rg_lru", "1 token"))
    right = case.arguments(mx.bfloat16)
    with metal_host.install(check=False) as host:
        assert case.check_at_size(right) is None
    assert [launch.name for launch in host.launches] == ["rg_lru_step"]
    assert host.launches[0].grid[:2] == (40, 1)
