"""Which way an op is computed, and that a kernel which fails its self-check is never believed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metal
from metal import build, dispatch, reference

from .. import metal_host
from ..tolerance import assert_close

T, E = 12, 8


@pytest.fixture
def inputs() -> list[mx.array]:
    keys = mx.random.split(mx.random.key(0), 4)
    return [
        *(mx.random.normal((2, T, E), key=key) for key in keys[:3]),
        mx.random.normal((E,), key=keys[3]),
    ]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is as true on a Mac."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))


def is_reference(result: tuple[mx.array, ...], inputs: list[mx.array]) -> bool:
    """Whether these are the reference's values, bit for bit."""
    want = reference.rg_lru(*inputs, None, None, None)
    return all(mx.array_equal(r, w).item() for r, w in zip(result, want, strict=True))


def names(host: metal_host.Host) -> list[str]:
    return [launch.name for launch in host.launches]


def scan(x: mx.array) -> tuple[mx.array, mx.array]:
    return metal.linear_scan(x, mx.sigmoid(x))


# Which way.


def test_the_kernel_runs_on_an_apple_gpu_after_one_check_of_its_variant(
    apple_gpu: None, inputs: list[mx.array]
) -> None:
    with metal_host.install() as host:
        y, h_last = metal.rg_lru(*inputs)
        assert names(host) == ["rg_lru", "rg_lru"]
        longer = [mx.concatenate([v, v], axis=1) for v in inputs[:3]]
        metal.rg_lru(*longer, inputs[3])
        assert names(host) == ["rg_lru"] * 3  # another length is no other variant
        metal.rg_lru(*(v.astype(mx.float16) for v in inputs))
        assert names(host) == ["rg_lru"] * 5  # another dtype is
    want = metal.rg_lru(*inputs, backend="reference")
    assert_close("y", y, want[0])
    assert_close("h_last", h_last, want[1])
    assert metal.faults() == {}


@pytest.mark.parametrize("has_metal", [False, True])
def test_the_reference_runs_where_mlx_s_device_is_no_apple_gpu(
    has_metal: bool, no_gpu: None, inputs: list[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: has_metal)
    with metal_host.install() as host:
        assert is_reference(metal.rg_lru(*inputs), inputs)
    assert host.launches == []


def test_a_call_s_backend_goes_before_the_process_s(
    apple_gpu: None, inputs: list[mx.array]
) -> None:
    with metal_host.install() as host:
        assert is_reference(metal.rg_lru(*inputs, backend="reference"), inputs)
        metal.set_backend("reference")
        assert is_reference(metal.rg_lru(*inputs), inputs)
        assert names(host) == []
        metal.rg_lru(*inputs, backend="metal")
        assert names(host) == ["rg_lru"]  # insisted on: unchecked
        metal.set_backend("metal")
        metal.rg_lru(*inputs)
        assert names(host) == ["rg_lru"] * 2
        assert is_reference(metal.rg_lru(*inputs, backend="reference"), inputs)
        metal.set_backend("auto")
        metal.rg_lru(*inputs)
        assert names(host) == ["rg_lru"] * 4


def test_metal_without_an_apple_gpu_is_refused_by_name(
    no_gpu: None, inputs: list[mx.array]
) -> None:
    with pytest.raises(RuntimeError, match=r"\[rg_lru\] backend 'metal' needs an Apple GPU.*cpu"):
        metal.rg_lru(*inputs, backend="metal")
    with pytest.raises(RuntimeError, match=r"\[set_backend\] 'metal' needs an Apple GPU.*cpu"):
        metal.set_backend("metal")
    assert is_reference(metal.rg_lru(*inputs), inputs)  # the refused setting left nothing behind


def test_another_backend_is_refused_by_name(apple_gpu: None, inputs: list[mx.array]) -> None:
    message = "expected the backend 'auto', 'metal' or 'reference', got 'cuda'."
    with pytest.raises(ValueError, match=re.escape(message)):
        metal.rg_lru(*inputs, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message)):
        metal.set_backend("cuda")  # type: ignore[arg-type]


def test_what_the_kernel_cannot_take_is_the_reference_s_unless_it_is_insisted_on(
    apple_gpu: None,
) -> None:
    empty = mx.zeros((0, T, E))
    with metal_host.install() as host:
        assert scan(empty)[0].shape == empty.shape
        with pytest.raises(ValueError, match=re.escape("[linear_scan] the Metal kernel takes")):
            metal.linear_scan(empty, empty, backend="metal")
        metal.set_backend("metal")
        with pytest.raises(ValueError, match=re.escape("[linear_scan] the Metal kernel takes")):
            scan(empty)
    assert host.launches == [] and metal.faults() == {}


# Kernels that are wrong.

Sabotage = Callable[[pytest.MonkeyPatch, Path], None]


def edited(file: str, old: str, new: str) -> Sabotage:
    """A kernel with other text, as a compiler or a GPU that disagrees with ours would have it."""

    def sabotage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        shutil.copytree(build.KERNELS, folder / "kernels")
        path = folder / "kernels" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        monkeypatch.setattr(build, "KERNELS", folder / "kernels")

    return sabotage


def launched(change: Callable[[list[mx.array]], list[mx.array]]) -> Sabotage:
    """A launch of rg_lru whose outputs are changed."""

    def sabotage(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        real = build.kernel

        @functools.cache
        def kernel(name: str, *rest: Any, **more: Any) -> build.Launch:
            launch = real(name, *rest, **more)
            return (lambda **call: change(launch(**call))) if name == "rg_lru" else launch

        monkeypatch.setattr(build, "kernel", kernel)

    return sabotage


def refuse(_: list[mx.array]) -> list[mx.array]:
    raise RuntimeError("[metal::Device] Unable to load function")


SABOTAGES = {
    "text that no compiler takes": (
        edited("rg_lru.metal", "const uint lane", "const unit lane"),
        "unit",
    ),
    "a sign": (edited("rg_lru.metal", "h[i] = step.x;", "h[i] = -step.x;"), "differs"),
    "not a number": (
        edited("rg_lru.metal", "h[i] = step.x;", "h[i] = step.x * (0.0f / 0.0f);"),
        "differs from the reference by nan",
    ),
    "only the state": (
        edited("rg_lru.metal", "+ e] = carry;", "+ e] = carry * 1.01f;"),
        "differs from the reference by 1.0e-02",
    ),
    "another dtype": (
        launched(lambda outputs: [outputs[0].astype(mx.float16), outputs[1]]),
        "expected .*float32, got .*float16",
    ),
    "another shape": (
        launched(lambda outputs: [outputs[0][:, :-1], outputs[1]]),
        r"expected \(3, 67, 296\).*, got \(3, 66, 296\)",
    ),
    "too few outputs": (launched(lambda outputs: outputs[:1]), "ValueError"),
    "refused launch": (launched(refuse), "RuntimeError.*Unable to load function"),
}


@pytest.mark.parametrize("what", SABOTAGES)
def test_a_wrong_kernel_is_left_for_the_reference_with_one_warning(
    what: str,
    apple_gpu: None,
    inputs: list[mx.array],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sabotage, fault = SABOTAGES[what]
    sabotage(monkeypatch, tmp_path)
    one_token = [v[:, :1] for v in inputs[:3]] + inputs[3:]
    with metal_host.install(check=False, allow_findings=True) as host:
        for _ in range(2):
            assert is_reference(metal.rg_lru(*inputs), inputs)
        checked = names(host)
        # Its other kernels have the same author, and the op one answer for the whole process.
        assert is_reference(metal.rg_lru(*one_token), one_token)
        assert names(host) == checked and set(checked) <= {"rg_lru"}

        y, _ = scan(inputs[0])
        assert names(host)[len(checked) :] == ["linear_scan"] * 2
    assert_close("another op", y, reference.linear_scan(
        inputs[0], mx.sigmoid(inputs[0]), None, None, None)[0])  # fmt: skip

    assert list(metal.faults()) == ["rg_lru"]
    assert re.search(fault, metal.faults()["rg_lru"], re.DOTALL)
    (warning,) = caplog.records
    assert (warning.name, warning.levelname) == ("metal.dispatch", "WARNING")
    assert "rg_lru" in warning.getMessage() and metal.faults()["rg_lru"] in warning.getMessage()


def test_every_op_has_its_own_fault_and_warning(
    apple_gpu: None,
    inputs: list[mx.array],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edited("recurrence.h", "x[i] = before;", "x[i] = before + 1.0f;")(monkeypatch, tmp_path)
    with metal_host.install(check=False, allow_findings=True):
        for _ in range(2):
            assert is_reference(metal.rg_lru(*inputs), inputs)
            scan(inputs[0])
    assert set(metal.faults()) == {"rg_lru", "linear_scan"}
    assert [("rg_lru" in r.getMessage()) for r in caplog.records] == [True, False]


def test_a_kernel_is_held_against_float32_where_plain_mlx_rounds_more() -> None:
    def plain(x: mx.array) -> mx.array:
        return (x + 300) - 300

    def kernel(_: object, x: mx.array) -> mx.array:
        return plain(x.astype(mx.float32)).astype(x.dtype)

    op = dispatch.Op("op", plain, kernel, lambda x: x.dtype, lambda d: (mx.ones((9,), d) * 0.3,))
    assert op.check(mx.bfloat16) is None
    assert op.check(mx.float32) is None
    assert dataclasses.replace(op, kernel=lambda _, x: plain(x)).check(mx.bfloat16)


def test_forget_begins_as_a_new_process_does(
    apple_gpu: None, inputs: list[mx.array], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as broken:
        edited("rg_lru.metal", "h[i] = step.x;", "h[i] = -step.x;")(broken, tmp_path)
        with metal_host.install(check=False):
            metal.rg_lru(*inputs)
    assert metal.faults()
    dispatch.forget()
    assert metal.faults() == {}
    build.kernel.cache_clear()
    with metal_host.install(check=False) as host:
        for _ in range(2):
            metal.rg_lru(*inputs)
    assert names(host) == ["rg_lru"] * 3 and metal.faults() == {}


def test_the_list_of_faults_is_the_caller_s_own(apple_gpu: None) -> None:
    metal.faults()["rg_lru"] = "a stranger's"
    assert metal.faults() == {}


def test_a_check_moves_nobody_s_seed(apple_gpu: None, inputs: list[mx.array]) -> None:
    mx.random.seed(7)
    with metal_host.install(check=False) as host:
        metal.rg_lru(*inputs)
    assert host.launches
    after = mx.random.normal((3,))
    mx.random.seed(7)
    assert mx.array_equal(after, mx.random.normal((3,)))


# When an op is first met inside a transformation. The host runs kernels on values only, so where
# MLX traces with placeholders the kernel is plain MLX; the check is what it is.


@pytest.fixture
def plain_kernel(apple_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """rg_lru with a kernel in plain MLX; the variants that it was called with."""
    module = importlib.import_module("metal.linear_scan")
    calls: list[Any] = []

    def kernel(variant: Any, *arguments: Any) -> Any:
        calls.append(variant)
        return reference.rg_lru(*arguments)

    monkeypatch.setattr(module, "RG_LRU", dataclasses.replace(module.RG_LRU, kernel=kernel))
    return calls


def test_an_op_first_met_in_a_compiled_function_is_checked_there(
    plain_kernel: list[Any], inputs: list[mx.array]
) -> None:
    compiled = mx.compile(lambda *arrays: metal.rg_lru(*arrays))
    for _ in range(2):
        assert_close("y", compiled(*inputs)[0], metal.rg_lru(*inputs, backend="reference")[0])
    assert len(plain_kernel) == 2 and metal.faults() == {}  # the check and the trace


def test_an_op_first_met_in_a_gradient_is_checked_there(
    apple_gpu: None, inputs: list[mx.array]
) -> None:
    def loss(backend: metal.Backend, *arrays: mx.array) -> mx.array:
        y, h_last = metal.rg_lru(*arrays, backend=backend)
        return (y * y).sum() + h_last.sum()

    every = tuple(range(1, 5))
    with metal_host.install(check=False) as host:
        got = mx.grad(loss, argnums=every)("auto", *inputs)
    assert names(host)[:2] == ["rg_lru"] * 2 and metal.faults() == {}
    # The gradient's own kernel, in two variants, each checked before it is used.
    assert Counter(names(host)) == {"rg_lru": 2, "linear_scan": 5}
    want = mx.grad(loss, argnums=every)("reference", *inputs)
    for g, w in zip(got, want, strict=True):
        assert_close("gradient", g, w)


@pytest.mark.parametrize(
    ("broken", "file", "value", "T"),
    [
        ("linear_scan", "linear_scan.metal", "static_cast<T>(h[i])", 12),
        ("rg_lru", "rg_lru_step.metal", "step.a * h + step.x", 1),
    ],
)
def test_a_wrong_kernel_is_not_used_for_another_op_s_gradient_either(
    broken: str,
    file: str,
    value: str,
    T: int,
    apple_gpu: None,
    inputs: list[mx.array],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    x, param = inputs[0][:, :T], inputs[3]
    heads, D = 2, x.shape[2] // 2
    gates = [mx.random.normal(shape) * 0.2 for shape in ((heads, D, D), (heads, D)) * 2]
    edited(file, value, f"-({value})")(monkeypatch, tmp_path)

    def loss(backend: metal.Backend, x: mx.array) -> mx.array:
        return metal.block_rg_lru(x, *gates, param, backend=backend)[0].sum()

    with metal_host.install(check=False):
        got = mx.grad(loss, argnums=1)("auto", x)
    assert list(metal.faults()) == [broken]
    assert_close("gradient", got, mx.grad(loss, argnums=1)("reference", x))


@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("T", [1, 5, 30])
def test_the_check_compiles_the_text_and_asks_for_the_threads_that_are_used(
    B: int, T: int, apple_gpu: None
) -> None:
    x = mx.random.normal((B, T, 300))
    lengths, reset = mx.full((B,), T), mx.arange(B * T).reshape(B, T) == 0
    weight, state = mx.random.normal((300, 4)), mx.zeros((B, 3, 300))
    q = mx.random.normal((B, 2, T, 64))
    rows = {"lengths": lengths, "reset": reset}
    calls: list[Callable[[], Any]] = [
        lambda: metal.linear_scan(x, mx.sigmoid(x), **rows),
        lambda: metal.rg_lru(x, x, x, x[0, 0], **rows),
        lambda: metal.causal_conv1d(x, weight, x[0, 0], state, **rows),
        lambda: metal.local_attention(
            q, q, q, scale=0.1, window=3, key_start=lengths - 1, lengths=lengths
        ),
        lambda: metal.local_attention_decode(
            q[:, :, :1], q, q, position=lengths, scale=0.1, window=T
        ),
    ]
    for call in calls:
        with metal_host.install(check=False) as host:
            call()
        assert not metal.faults()
        assert len(host.launches) % 2 == 0
        half = len(host.launches) // 2
        for check, use in zip(host.launches[:half], host.launches[half:], strict=True):
            assert check.function == use.function
            assert math.prod(check.threadgroup) >= math.prod(use.threadgroup), check.name


def test_what_fails_only_when_it_is_evaluated_is_caught(
    apple_gpu: None,
    inputs: list[mx.array],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As what Apple's compiler refuses does."""
    path = tmp_path / "outputs.npy"
    np.save(path, np.zeros((3, 67, 40), np.float32))

    def unreadable(outputs: list[mx.array]) -> list[mx.array]:
        lazy = mx.load(str(path))
        assert isinstance(lazy, mx.array)
        os.truncate(path, 200)
        return [lazy, outputs[1]]

    launched(unreadable)(monkeypatch, tmp_path)
    with metal_host.install(check=False):
        assert is_reference(metal.rg_lru(*inputs), inputs)
    assert "RuntimeError" in metal.faults()["rg_lru"]


def test_importing_makes_no_kernel_and_asks_for_no_device() -> None:
    code = (
        "import mlx.core as mx\n"
        "called = []\n"
        "names = ((mx.fast, 'metal_kernel'), (mx, 'eval'), (mx.metal, 'is_available'))\n"
        "for owner, name in names:\n"
        "    setattr(owner, name, lambda *rest, _name=name, **more: called.append(_name))\n"
        "import metal, metal.self_check\n"
        "print(called)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
