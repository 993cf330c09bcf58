"""`gryphon doctor --kernels`: what the Metal kernels do on this machine, and how fast."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from app.cli.terminal import StatusLine, bar, table
from app.errors import GryphonError
from app.settings import Settings, child_environment

_REPORT = [sys.executable, "-P", "-m", "app.engine.kernel_report"]
# Of one op; a kernel that is wrong is often wrong in all its variants.
_FAULTS_SHOWN = 3


@dataclass
class Case:
    """One op at one size."""

    op: str
    size: str
    checked: int = 0
    variant: str = ""
    """The one checked last."""
    faults: dict[str, str] = field(default_factory=dict)
    """By variant."""
    has_crashed: bool = False
    kernel_ms: float | None = None
    reference_ms: float | None = None

    @property
    def verdict(self) -> str:
        if self.has_crashed:
            return "CRASHED"
        if self.faults:
            return f"{len(self.faults)} of {self.checked} FAILED"
        return f"{self.checked} ok" if self.checked else "-"


@dataclass
class Report:
    """What the child has said so far."""

    device: str = ""
    device_name: str = ""
    dtype: str = ""
    has_kernels: bool = False
    expected: int | None = None
    cases: list[Case] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        finished = [case for case in self.cases if case.reference_ms or case.has_crashed]
        return len(finished) == self.expected

    @property
    def failed(self) -> list[Case]:
        return [case for case in self.cases if case.faults]

    def take(self, line: dict[str, Any]) -> None:
        """Add what a line of `app.engine.kernel_report` says."""
        if "device" in line:
            self.device, self.device_name = line["device"], line["device_name"]
            self.dtype = line["dtype"]
            self.has_kernels, self.expected = line["has_kernels"], line["cases"]
        elif "op" in line:
            self.cases.append(Case(line["op"], line["size"]))
        elif "variant" in line:
            self.cases[-1].variant = line["variant"]
            self.cases[-1].checked += 1
        elif "fault" in line:
            self.cases[-1].faults[self.cases[-1].variant] = line["fault"]
        else:
            self.cases[-1].kernel_ms = line["kernel_ms"]
            self.cases[-1].reference_ms = line["reference_ms"]


def doctor(versions: dict[str, object], *, as_json: bool) -> int:
    """Check and time every kernel; 1 when one failed. `versions` go into the JSON."""
    Settings.from_environment()  # what is wrong in it is said here rather than by a child
    report = _check()
    if as_json:
        print(json.dumps({"versions": versions} | _as_json(report), indent=2))
    else:
        print(_describe(report))
    return 1 if report.failed else 0


def _check() -> Report:
    """Run the child; when a kernel ends it, run another from the next case on."""
    report, status_line = Report(), StatusLine()
    try:
        while not report.is_complete:
            begun = len(report.cases)
            with _child(begun) as (child, errors):
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith("{"):  # MLX and Metal may print what they like
                        report.take(json.loads(line))
                        status_line.show(_progress(report))
                how = _how_it_ended(child.wait(), errors)
            if report.is_complete:
                break
            if len(report.cases) == begun:
                raise GryphonError(
                    "kernels_not_checked", f"MLX cannot be started in a process of its own: {how}"
                )
            last = report.cases[-1]
            last.has_crashed = True
            last.faults[last.variant or "reference"] = how
    finally:
        status_line.clear()
    return report


@contextlib.contextmanager
def _child(first: int) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The child from a case on, and the file of its standard error; it does not outlive the block.

    Ctrl-C is for this process alone, so that the child prints no traceback.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [*_REPORT, str(first)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=child_environment(),
            start_new_session=True,
        )
        try:
            yield child, errors
        finally:
            child.kill()
            child.communicate()


def _how_it_ended(status: int, errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}: {lines[-1]}" if lines else how


def _progress(report: Report) -> str:
    if not report.cases:
        return "starting MLX"
    case = report.cases[-1]
    done = bar(len(report.cases) - 1, report.expected or 1)
    return f"{done} {case.op}, {case.size}{f': {case.variant}' if case.variant else ''}"


def _as_json(report: Report) -> dict[str, object]:
    return {
        "device": report.device,
        "device_name": report.device_name,
        "dtype": report.dtype,
        "has_kernels": report.has_kernels,
        "cases": [_case_as_json(case) for case in report.cases],
        "failed": sorted({case.op for case in report.failed}),
    }


def _case_as_json(case: Case) -> dict[str, object]:
    fields = asdict(case) | {"verdict": case.verdict}
    del fields["variant"]
    return fields


def _describe(report: Report) -> str:
    faults = [line for case in report.failed for line in _faults(case)]
    if not report.has_kernels:
        times = [(case.op, case.size, _ms(case.reference_ms)) for case in report.cases]
        lines = [
            f"Metal kernels need an Apple GPU, and MLX computes on the {report.device} here.",
            "Every op runs in plain MLX, the kernels' reference; nothing is missing but speed.",
            "",
            table(("op", "size", f"{report.dtype} ms".rjust(10)), times),
        ]
        return "\n".join([*lines, *(["", *faults] if faults else [])])
    header = ("op", "size", "checks", "kernel ms", "  plain ms", "speed-up")
    rows = [
        (case.op, case.size, case.verdict, _ms(case.kernel_ms, 9), _ms(case.reference_ms),
         _speed_up(case).rjust(8))
        for case in report.cases
    ]  # fmt: skip
    title = f"{report.device_name}: every kernel against plain MLX; times in {report.dtype}."
    return "\n".join([title, "", table(header, rows), "", *faults, _conclusion(report)])


def _ms(value: float | None, width: int = 10) -> str:
    return ("-" if value is None else f"{value:.3f}").rjust(width)


def _speed_up(case: Case) -> str:
    kernel, plain = case.kernel_ms, case.reference_ms
    return f"{plain / kernel:.1f}x" if kernel and plain else "-"


def _faults(case: Case) -> list[str]:
    lines = [f"{case.op}, {case.size}"]
    shown = list(case.faults.items())[:_FAULTS_SHOWN]
    lines += [f"  {variant}: {' '.join(fault.split())}" for variant, fault in shown]
    if len(case.faults) > len(shown):
        lines.append(f"  and {len(case.faults) - len(shown)} more: --json has them all")
    return [*lines, ""]


def _conclusion(report: Report) -> str:
    if not report.failed:
        return "Every kernel agrees with plain MLX."
    names = ", ".join(sorted({case.op for case in report.failed}))
    return (
        f"Failed: {names}. Please report it with what `gryphon doctor --kernels --json` prints.\n"
        "GRYPHON_KERNELS=reference does without kernels: the same answers, more slowly."
    )
