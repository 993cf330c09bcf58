"""The endpoint keeps to its own OpenAPI document, as schemathesis tries it with every check on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..rounds import SCALE
from .children import child

KEY = "the-key"
SETTINGS = f"""
[auth.openapi.bearer]
bearer = "{KEY}"

[checks.positive_data_acceptance]
# 400 is how all dialects say what a schema cannot: fields that must agree, prompts that are too
# long, what this model cannot do. 415, 422 and the like remain failures.
expected-statuses = ["2xx", "400", "403", "404", "503"]
"""
EXAMPLES = 6
"""Per operation and run of CI. The phases that are the same each time are left to scripts/prove."""


@pytest.mark.timeout(150 * SCALE)
def test_no_answer_but_those_described(
    home: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """No 5xx, no status and no shape that the document lacks, nothing without the key, no method
    that it does not list."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    report = tmp_path / "report.json"
    phases = "fuzzing" if SCALE == 1 else "examples,coverage,fuzzing,stateful"
    with child(home / "server", api_key=KEY) as server:
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("schemathesis"), "run"),
                *(f"{server.url}/openapi.json", "--checks", "all", "--phases", phases),
                *("--max-examples", str(EXAMPLES * SCALE), "--seed", str(SCALE)),
                *("-H", f"Authorization: Bearer {KEY}", "--warnings", "off"),
                *("--report", "json", "--report-json-path", str(report)),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert "Traceback" not in server.log, server.log[-4000:]
    cases = json.loads(report.read_text())["test_cases"]
    assert cases["generated"] >= 5 * EXAMPLES and cases["errored"] == cases["with_failures"] == 0
    record_property("cases", cases["generated"])
