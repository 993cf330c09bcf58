"""A host for Metal kernels: compiles what MLX would compile and runs it on the CPU, with checks.

    with metal_host.install() as host:
        y = op_that_dispatches_a_kernel(x)
    # findings have raised KernelFindings by here

See README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from . import lint
from .buffers import Buffer, input_buffer, metadata_buffers, output_buffer, to_mlx
from .capture import Kernel, Launch, trace
from .compiler import CompileError
from .executor import Options, execute
from .findings import ORDER_DEPENDENT, Finding, KernelFindings, Report
from .translate import TranslationError, translate

__all__ = [
    "CompileError",
    "Finding",
    "Host",
    "KernelFindings",
    "Options",
    "Report",
    "TranslationError",
    "install",
    "intercept",
]


@dataclass
class Host:
    """What ran while the host was installed."""

    options: Options
    lint: bool = True
    reports: list[Report] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Of all reports; of each kind at a line, or pair of lines, the first."""
        return _distinct(f for report in self.reports for f in report.findings)

    @property
    def notes(self) -> list[Finding]:
        return _distinct(f for report in self.reports for f in report.notes)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def run(
        self, name: str, kernel: Kernel, output_names: Sequence[str], call: dict[str, Any]
    ) -> list[mx.array]:
        """One call of a kernel, under every schedule; the first one's outputs."""
        options = dict(call)
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in options.pop("inputs")]
        mx.eval(inputs)
        launch = trace(name, kernel, inputs, options)
        self.launches.append(launch)
        unit = translate(launch)
        shapes = [tuple(shape) for shape in options["output_shapes"]]
        first: list[Buffer] = []
        for schedule in self.options.schedules if self.options.check else ["forward"]:
            buffers = _buffers(launch, inputs, output_names, options)
            report = execute(launch, unit, buffers, schedule, self.options)
            outputs = [buffer for buffer in buffers if buffer.is_output]
            if not first:
                first = outputs
                self._static_checks(launch, report)
            for before, after in zip(first, outputs, strict=True):
                if not np.array_equal(before.data, after.data):
                    message = f"{after.name} has other values under the {schedule} schedule"
                    report.add(Finding(ORDER_DEPENDENT, message))
            self.reports.append(report)
        return [to_mlx(buffer, shape) for buffer, shape in zip(first, shapes, strict=True)]

    def _static_checks(self, launch: Launch, report: Report) -> None:
        for finding in lint.check(launch) if self.lint else []:
            report.add(finding)


class OnGpu(Host):
    """In place of a host where there is a GPU."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            pytest.skip("only the Metal host sees what a kernel does")
        return super().__getattribute__(name)


@contextmanager
def install(
    *,
    check: bool = True,
    schedules: Sequence[str] = ("forward", "reverse"),
    allow_findings: bool = False,
    lint: bool = True,
    **options: Any,
) -> Iterator[Host]:
    """Replaces mx.fast.metal_kernel: kernels made in the block run on the host.

    Args:
        check: With checks, under every schedule; without, as fast as it gets, values only.
        schedules: Of "forward", "reverse", "random".
        allow_findings: Leave them in Host.findings; otherwise leaving the block raises them.
        lint: Also hold the text against what Metal's compiler refuses.
        options: More fields of Options.

    Raises:
        KernelFindings: On leaving the block, of whatever was found in it.

    On a Mac the kernels run on its GPU instead, without checks; a test that looks at what only the
    host sees is skipped there.
    """
    if sys.platform == "darwin":
        yield OnGpu(Options())
        return
    host = Host(Options(check=check, schedules=schedules, **options), lint)
    real = mx.fast.metal_kernel
    intercept()
    mx.disable_compile()  # the host runs a kernel when it is called: with values, not with tracers
    _installed.append(host)
    try:
        yield host
    finally:
        _installed.remove(host)
        mx.fast.metal_kernel = real
        if not _installed:
            mx.enable_compile()
    if host.findings and not allow_findings:
        raise KernelFindings(host.findings)


_installed: list[Host] = []


def intercept() -> None:
    """Replaces mx.fast.metal_kernel for good.

    A kernel made from here on runs on whatever host is installed when it is called, and as before
    when none is. For kernels that are made on import, or once and cached.
    """
    real: Any = mx.fast.metal_kernel
    if sys.platform == "darwin" or getattr(real, "is_metal_host", False):
        return

    def metal_kernel(
        name: str, input_names: Any, output_names: Any, *rest: Any, **more: Any
    ) -> Any:
        kernel: Kernel = real(name, input_names, output_names, *rest, **more)

        def call(**arguments: Any) -> list[mx.array]:
            if not _installed:
                return kernel(**arguments)
            return _installed[-1].run(name, kernel, list(output_names), arguments)

        return call

    metal_kernel.is_metal_host = True  # type: ignore[attr-defined]
    mx.fast.metal_kernel = metal_kernel


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    first: dict[object, Finding] = {}
    for f in findings:
        place = (f.file, f.line, f.other_line) if f.line else (f.message,)
        first.setdefault((f.kind, *place), f)
    return list(first.values())


def _buffers(
    launch: Launch, inputs: list[mx.array], output_names: Sequence[str], options: dict[str, Any]
) -> list[Buffer]:
    """In the order of the kernel's parameters."""
    named: dict[str, Buffer] = {}
    parameters = [p for p in launch.parameters if p.space]
    count = len(parameters) - len(output_names)
    waiting = list(inputs)
    for parameter in parameters[:count]:
        if parameter.name in named:
            continue
        array = waiting.pop(0)
        buffer = input_buffer(parameter.name, array, contiguous=launch.ensure_row_contiguous)
        named[parameter.name] = buffer
        named |= {
            name: extra
            for name, extra in metadata_buffers(parameter.name, array, buffer.strides).items()
            if any(p.name == name for p in parameters[:count])
        }
    for name, shape, dtype in zip(
        output_names, options["output_shapes"], options["output_dtypes"], strict=True
    ):
        named[name] = output_buffer(name, tuple(shape), dtype, options.get("init_value"))
    return [named[p.name] for p in parameters]
