"""The host finds what is wrong, at its line: every check has at least one planted bug."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import pytest

from ..metal_host import findings
from .planted.kernels import CHUNKED_SCAN, Scan, run
from .planted.scan_bugs import SCAN_BUGS, Bug
from .planted.small_bugs import SMALL_BUGS, SmallBug


@dataclass
class Mutant(Scan):
    source: str = ""

    def dispatch(self, *_: object) -> list[mx.array]:
        return super().dispatch(self.source, "mutant")


@pytest.mark.parametrize("bug", SCAN_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_in_the_scan_is_reported_at_its_line(bug: Bug) -> None:
    assert CHUNKED_SCAN.count(bug.old) == 1
    source = CHUNKED_SCAN.replace(bug.old, bug.new)
    scan = Scan.random(2, 37, 40)

    _, host = run(Mutant(scan.x, scan.a, scan.h0, scan.segments, source), **bug.options)

    found = [finding for finding in host.findings if finding.kind == bug.kind]
    assert found, [str(finding) for finding in host.findings]
    assert any(bug.at in finding.text for finding in found), [str(finding) for finding in found]
    lines = source.split("\n")
    assert all(lines[f.line - 1].strip() == f.text for f in found if f.line)


@pytest.mark.parametrize("bug", SMALL_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_in_a_small_kernel_is_reported_at_its_line(bug: SmallBug) -> None:
    _, host = run(bug.kernel)

    found = [finding for finding in host.findings if finding.kind == bug.kind]
    assert found, [str(finding) for finding in host.findings]
    assert any(bug.at in finding.text for finding in found), [str(finding) for finding in found]


def test_every_check_has_a_planted_bug() -> None:
    planted = {bug.kind for bug in SCAN_BUGS} | {bug.kind for bug in SMALL_BUGS}
    others = {
        findings.UNWRITTEN,
        findings.ORDER_DEPENDENT,
        findings.THREADGROUP_MEMORY,
        findings.THREADS,
        findings.CRASH,
        findings.RUNAWAY,
    }
    assert planted == (set(findings.KINDS) | others) - findings.NOTES
