"""What a run reports: findings with the kernel's line, and what it counted."""

from __future__ import annotations

from dataclasses import dataclass, field

# The runtime's kinds by number; the order is that of mh::Kind.
KINDS = (
    "out-of-bounds",
    "uninitialised",
    "write-to-input",
    "race",
    "race-across-threadgroups",
    "lane-order",
    "same-value",
    "barrier-divergence",
    "return-before-barrier",
    "simd-divergence",
    "inactive-lane",
    "misaligned",
    "local-bounds",
    "shift",
    "integer-overflow",
    "division-by-zero",
)
# Found by Python, before or after the run.
UNWRITTEN = "unwritten-output"
ORDER_DEPENDENT = "order-dependent"
THREADGROUP_MEMORY = "threadgroup-memory"
THREADS = "threads"
CRASH = "crash"
DIVISION = "division-by-zero"
RUNAWAY = "runaway"
LINT = "lint"

# True, and harmless on every GPU: threads that store one value to one place.
NOTES = frozenset({"same-value"})


@dataclass(frozen=True)
class Finding:
    """One defect, or one of NOTES."""

    kind: str
    message: str
    file: str = ""  # <kernel>.metal for the body, <kernel>.header
    line: int = 0  # in that file, from 1; 0 if no line is to blame
    other_line: int = 0  # of the earlier access or the other branch
    text: str = ""  # the line itself

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else ""
        source = f"\n    {self.text}" if self.text else ""
        return f"{where}{self.kind}: {self.message}{source}"


@dataclass
class Report:
    """One launch under one schedule."""

    kernel: str
    schedule: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)
    threadgroups: int = 0
    barriers: int = 0  # summed over threadgroups
    collectives: int = 0  # simdgroup operations, summed over simdgroups
    threadgroup_bytes: int = 0

    def add(self, finding: Finding) -> None:
        (self.notes if finding.kind in NOTES else self.findings).append(finding)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}


class KernelFindings(AssertionError):
    """Raised when a host that allows no findings has some."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("\n".join(["the Metal host found:", *dict.fromkeys(map(str, findings))]))
