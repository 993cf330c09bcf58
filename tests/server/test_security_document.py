"""docs/security.md says which test shows what: they exist, and stay where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "security.md").read_text()


def test_the_tests_it_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 40
    there = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert named <= there, sorted(named - there)


def test_what_holds_for_every_route_is_tested_for_every_route() -> None:
    claimed = set(re.findall(r"`(test_\w+)` \(every route\)", DOCUMENT))
    assert len(claimed) >= 10
    shown = set()
    for path in (ROOT / "tests" / "server").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "route" in [
                argument.arg for argument in node.args.args
            ]:
                shown.add(node.name)
    assert claimed <= shown, sorted(claimed - shown)


def test_its_numbers_are_the_code_s() -> None:
    from app.server import connections, generation, security

    text = " ".join(DOCUMENT.split())
    for number in (
        f"{connections.HEAD_TIMEOUT_S:g} s from its first byte",
        f"{security.MAX_BODY_BYTES // 2**20} MiB and {security.BODY_TIMEOUT_S:g} s",
        f"rest for {connections.REST_S} s",
        f"Beyond {connections.MAX_CONNECTIONS} connections",
        f"Up to {generation.MAX_UNREAD_BYTES // 2**20} MiB of an answer",
    ):
        assert number in text, number
