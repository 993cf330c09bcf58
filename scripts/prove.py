#!/usr/bin/env python3
"""Runs the tests that draw at random, many times over, and tells what they found.

scripts/prove                        # four times as many rounds as in CI
scripts/prove --full                 # 25 times as many, and appends the result to docs/proofs.md
scripts/prove --scale 6 --record     # another number, and appends it
scripts/prove --only crash           # some of the proofs

A proof is a test file in PROOFS whose tests repeat by `tests.rounds.rounds` and say what they
counted with pytest's `record_property`: numbers are added up over a file's tests. "clients" does
not repeat: it is here because its programs take long to install.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "proofs.md"

PROOFS = {
    "batch": ("a row in a batch is that row alone", "tests/engine/test_batch_equals_single.py"),
    "prefix": ("what was read before, continued, is a replay", "tests/engine/test_prefix_cache.py"),
    "spill": ("the same, read back from disk after restarts", "tests/engine/test_spill.py"),
    "constraints": (
        "an answer held to a JSON schema that ends by itself is valid",
        "tests/engine/test_constrained_json.py",
    ),
    "soak": ("random load on a small machine leaves nothing", "tests/engine/test_soak.py"),
    "convert": (
        "a conversion killed at random, and one of 2 GB in memory (from scale 25 on)",
        "tests/models/test_conversion_limits.py",
    ),
    "history": ("kill -9 of a chat being saved, under load", "tests/history/test_saving.py"),
    "tree": (
        "random operations on a chat's tree do what they do to a model of it",
        "tests/history/test_tree.py",
    ),
    "crash": ("kill -9 of the engine at every stage", "tests/engine/test_crash.py"),
    "conformance": (
        "the endpoint keeps to its OpenAPI document: schemathesis, all checks",
        "tests/server/test_conformance.py",
    ),
    "fuzz": ("bytes that no client would send harm nothing", "tests/server/test_raw_bytes.py"),
    "disconnects": (
        "clients that leave at any byte free their rows",
        "tests/server/test_disconnects.py",
    ),
    "pull": (
        "pulls killed, stalled, corrupted, replaced, refused or out of disk end byte-identical",
        "tests/library/test_pull_faults.py",
    ),
    "clients": ("aider edits a repository, oterm chats", "tests/clients/agents.py"),
}
"""What each shows, and the tests that show it."""

HEADING = """# Proofs

What the random tests found when they ran long. Appended by `scripts/prove --record`, newest last;
CI runs the same tests at scale 1, `scripts/prove --full` at 25. The figures are what the tests
counted. Tiny models with random weights on the CPU in float32, unless a line says otherwise.
"""


@dataclass
class Outcome:
    """One proof's run."""

    shows: str
    passed: int
    failed: list[str]
    seconds: float
    figures: Counter[str]

    @property
    def line(self) -> str:
        verdict = f"{self.passed} passed"
        if self.failed:
            verdict += f", **{len(self.failed)} FAILED**: {', '.join(self.failed)}"
        figures = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in self.figures.items())
        return f"| {self.shows} | {verdict} | {figures} | {self.seconds:.0f} s |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="--scale 25 --record")
    parser.add_argument("--scale", type=int, help="rounds as a multiple of CI's")
    parser.add_argument("--record", action="store_true", help="append to docs/proofs.md")
    parser.add_argument("--only", nargs="+", choices=PROOFS, default=list(PROOFS))
    arguments = parser.parse_args()
    scale = arguments.scale or (25 if arguments.full else 4)
    if scale < 1:
        parser.error(f"--scale must be 1 or more, got {scale}")
    outcomes = [run(*PROOFS[name], scale) for name in arguments.only]
    text = document(outcomes, scale)
    print(text)
    if arguments.record or arguments.full:
        known = TARGET.read_text() if TARGET.exists() else HEADING
        TARGET.write_text(f"{known}\n{text}")
        print(f"appended to {TARGET.relative_to(ROOT)}")
    return any(outcome.failed for outcome in outcomes)


def run(shows: str, tests: str, scale: int) -> Outcome:
    """Run a proof's tests; pytest's own output goes to the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        started = time.monotonic()
        subprocess.run(
            [Path(sys.executable).parent / "pytest", "-q", "--timeout=3600"]
            + ["-o", "junit_family=xunit1"]  # the one with properties
            + [f"--junitxml={report}", f"--basetemp={directory}/tmp", tests],
            cwd=ROOT,
            env={**os.environ, "GRYPHON_PROVE_SCALE": str(scale)},
            check=False,
        )
        seconds = time.monotonic() - started
        if not report.exists():
            sys.exit(f"pytest made no report of {tests}; its output above says why.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    # Anything but a pass is told as a failure: a proof that was skipped proves nothing.
    not_passed = ("failure", "error", "skipped")
    bad = [case for case in cases if any(case.find(tag) is not None for tag in not_passed)]
    figures: Counter[str] = Counter()
    for case in cases:
        for item in case.iter("property"):
            figures[item.attrib["name"]] += int(item.attrib["value"])
    if not cases:
        sys.exit(f"{tests} holds no test.")
    names = [case.attrib["name"] for case in bad]
    return Outcome(shows, len(cases) - len(bad), names, seconds, figures)


def document(outcomes: list[Outcome], scale: int) -> str:
    """A dated section for docs/proofs.md."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    rows = "\n".join(outcome.line for outcome in outcomes)
    return f"""## {datetime.now(UTC):%Y-%m-%d}, scale {scale}

{platform.system()} {platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), \
Python {platform.python_version()}, {packages}, commit {commit or "unknown"}.

| what | tests | counted | took |
|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
