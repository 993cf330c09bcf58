"""`gryphon doctor --kernels`: with an Apple GPU as the Metal host plays it, and without."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.cli import kernels, main

GRYPHON = str(Path(sys.executable).with_name("gryphon"))

# The child of the report where an Apple GPU is; the ops below at the size of a test.
APPLE_GPU = """
import runpy, sys
sys.path.append({root!r})
from app.engine import blas
blas.preload()
import mlx.core as mx
from tests import metal_host
metal_host.intercept()
from metal import build, self_check
mx.metal.is_available = lambda: True
mx.default_device = lambda: mx.Device(mx.gpu, 0)
self_check._E = 64
wanted = {ops!r}
self_check.DTYPES = {{"bfloat16": mx.bfloat16}}
self_check.CASES = [c for c in self_check.CASES if (c.op.name, c.size) in wanted]
{more}
with metal_host.install(check=False, allow_findings=True):
    runpy.run_module("app.engine.kernel_report", run_name="__main__")
"""
OPS = [("rg_lru", "1 token"), ("rms_norm_1p", "1 token")]

# What happens when a kernel is launched.
LAUNCH = """
import os
real = build.kernel
def kernel(name, *rest, **more):
    def launch(**call):
        if name == "rg_lru_step":
            {what}
        return real(name, *rest, **more)(**call)
    return launch
build.kernel = kernel
"""
WRONG = LAUNCH.format(what="return [-y for y in real(name, *rest, **more)(**call)]")
REFUSED = LAUNCH.format(what="raise RuntimeError('[metal::Device] Unable to\\nload library')")
ABORTS = LAUNCH.format(what="print('Metal is not amused', file=sys.stderr, flush=True); os.abort()")
NO_GPU = """
mx.metal.is_available = lambda: False
mx.default_device = lambda: mx.Device(mx.cpu, 0)
self_check.DTYPES = {"float32": mx.float32}
"""

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Doctor:
    """The command with that child; its status and what it printed."""

    def run(*words: str, more: str = "") -> tuple[int, str]:
        script = tmp_path / "child.py"
        root = str(Path(__file__).resolve().parents[2])
        script.write_text(APPLE_GPU.format(root=root, ops=OPS, more=more))
        monkeypatch.setattr(kernels, "_REPORT", [sys.executable, str(script)])
        status = main(["doctor", "--kernels", *words])
        captured = capsys.readouterr()
        assert captured.err == "" and "Traceback" not in captured.out
        return status, captured.out

    return run


def row(output: str, op: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.startswith(op + " ")]
    return line.split()


def test_every_kernel_is_checked_and_timed_on_an_apple_gpu(doctor: Doctor) -> None:
    status, output = doctor()
    assert status == 0, output
    assert ": every kernel against plain MLX; times in bfloat16.\n" in output
    for op, variants in (("rg_lru", 5), ("rms_norm_1p", 3)):
        *_, checked, verdict, kernel, plain, speed_up = row(output, op)
        assert (int(checked), verdict) == (variants, "ok")
        ratio = float(plain) / float(kernel)
        assert float(speed_up.removesuffix("x")) == pytest.approx(ratio, rel=0.1, abs=0.06)
    assert output.endswith("Every kernel agrees with plain MLX.\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (WRONG, "bfloat16, B 1 T 1, h0: differs from the reference by 2.0e+00 of its RMS"),
        (REFUSED, "bfloat16, B 1 T 1, h0: RuntimeError: [metal::Device] Unable to load library"),
    ],
    ids=["wrong", "refused"],
)
def test_a_kernel_that_fails_is_named_with_what_is_wrong(
    doctor: Doctor, more: str, said: str
) -> None:
    status, output = doctor(more=more)
    assert status == 1
    assert row(output, "rg_lru")[3:7] == ["5", "of", "5", "FAILED"]
    assert said in output
    assert "and 2 more: --json has them all" in output
    assert "Failed: rg_lru." in output and "GRYPHON_KERNELS=reference" in output
    assert "ok" in row(output, "rms_norm_1p")


def test_a_kernel_that_ends_the_process_is_named_and_the_others_still_run(doctor: Doctor) -> None:
    status, output = doctor(more=ABORTS)
    assert status == 1
    assert "CRASHED" in row(output, "rg_lru") and "ok" in row(output, "rms_norm_1p")
    assert "  bfloat16, B 1 T 1, h0: ended by SIGABRT: Metal is not amused" in output


def test_json_has_every_fault(doctor: Doctor) -> None:
    status, output = doctor("--json", more=WRONG)
    report = json.loads(output)
    assert (status, report["device"], report["failed"]) == (1, "Apple GPU", ["rg_lru"])
    assert {"gryphon", "mlx", "system"} < report["versions"].keys() and report["device_name"]
    broken, fine = report["cases"]
    assert len(broken["faults"]) == broken["checked"] == 5 and broken["kernel_ms"] is None
    assert fine["faults"] == {} and fine["kernel_ms"] > 0 and fine["reference_ms"] > 0


def test_a_child_that_cannot_start_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "child.py"
    script.write_text("import mlx_that_is_not_there")
    monkeypatch.setattr(kernels, "_REPORT", [sys.executable, str(script)])
    assert main(["doctor", "--kernels"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "gryphon: MLX cannot be started in a process of its own: exit status 1: "
        "ModuleNotFoundError: No module named 'mlx_that_is_not_there'\n"
    )


def test_every_op_has_a_row_whatever_this_machine_is() -> None:
    done = subprocess.run([GRYPHON, "doctor", "--kernels"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for op in ("linear_scan", "rg_lru", "block_rg_lru", "causal_conv1d", "rms_norm_1p",
               "local_attention", "local_attention_decode"):  # fmt: skip
        assert any(line.startswith(op + " ") for line in done.stdout.splitlines()), op


def test_without_an_apple_gpu_the_references_are_timed(doctor: Doctor) -> None:
    status, output = doctor(more=NO_GPU)
    assert status == 0
    assert output.startswith("Metal kernels need an Apple GPU, and MLX computes on the CPU here.")
    for op, _ in OPS:
        assert float(row(output, op)[-1]) > 0


ENDLESS = """
import sys, time
if "app.engine.kernel_report" in sys.orig_argv:
    print('{"device": "", "device_name": "", "dtype": "", "has_kernels": true, "cases": 2}')
    print('{"op": "linear_scan", "size": "512 tokens"}', flush=True)
    time.sleep(999999)
"""


def test_ctrl_c_ends_it_and_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(ENDLESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        [GRYPHON, "doctor", "--kernels"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    while b"linear_scan" not in shown:  # the child has begun
        shown += os.read(leader, 1000)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, b"")
    assert children and not any(child.is_running() for child in children)
    with open(leader, "rb") as rest, contextlib.suppress(OSError):  # nobody has its other end
        shown += rest.read()
    assert b"Traceback" not in shown
