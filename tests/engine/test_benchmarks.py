"""scripts/bench_engine.py, bench_flat.py and what they write: that they work, on tiny models, and
that docs/benchmarks.md says what the results files say. No time is judged here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


@pytest.fixture
def tiny(script: Any, home: Path) -> Path:
    """A tiny model, installed as "bench"."""
    path = home / "data" / "models" / "bench"
    script("engine_models").write_random("tiny", path)
    return path


def run(*command: str, text: str = "") -> str:
    result = subprocess.run(
        [sys.executable, *command], input=text, capture_output=True, text=True, timeout=170
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_the_page_has_the_figures_of_the_results_files(script: Any) -> None:
    page = script("benchmark_page")
    assert page.written(page.PAGE.read_text()) == page.PAGE.read_text()


def test_a_section_is_replaced_and_the_others_stay(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = script("benchmark_page")
    places = "".join(
        f"about {name}\n<!-- benchmark: {name} -->\nold\n<!-- end of benchmark -->\n"
        for name in page.TABLES
    )
    (tmp_path / "page.md").write_text(places)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(script("measurement"), "RESULTS", tmp_path)
    flat = {"model": "M", "position": 4096, "ms": 1.23456, "ratio": 1.2, "state_bytes": 1234567}
    page.publish("flat", "scripts/one.py", [flat | {"goal": 1.1}])
    bare = {"model": "M", "contender": "bare", "turns": 3, "ms": 2.0, "share": 0.0}
    page.publish("overhead", "scripts/two.py", [bare])
    page.publish("overhead", "scripts/two.py", [bare | {"ms": 3.0}])
    text = (tmp_path / "page.md").read_text()
    assert "| M | 4,096 | 1.24 | 1.20 | 1.23 | ≤ 1.10 missed |" in text  # 1.235, four digits kept
    assert "| M | bare | 3 | 3.00 |" in text and "2.00" not in text
    assert text.count("Not measured yet.") == 2
    assert "scripts/one.py" in text and "scripts/two.py" in text
    with pytest.raises(RuntimeError, match="has 0 places for single"):
        page.written("")


def test_every_contender_generates_as_many_tokens_as_asked_for(tiny: Path) -> None:
    task = json.dumps({"prompt": [1000, 1001, 1002], "length": 5}) + "\n"
    for name in ("bare", "scheduler", "gryphon", "mlx-lm matched"):
        out = run(str(SCRIPTS / "engine_contenders.py"), name, str(tiny), text=2 * task)
        answers = [json.loads(line) for line in out.splitlines()]
        assert len(answers) == 2, name
        assert all(answer["first_s"] > 0 and answer["rest_s"] > 0 for answer in answers), name


def test_clients_under_load_count_what_both_servers_send(
    tiny: Path, script: Any, tmp_path: Path
) -> None:
    load, models = script("engine_load"), script("engine_models")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    linked = models.link_for_mlx_lm(tiny, tmp_path / "linked")
    assert json.loads((linked / "config.json").read_text())["model_type"] == "llama"
    for server in (
        load.gryphon_server("bench", environment),
        load.mlx_lm_server(linked, environment, matched=True),
    ):
        with server as running:
            for is_seeded in (False, True):
                found = running.meet(2, load.Task(words=2, tokens=6, is_seeded=is_seeded), 1)
                assert found.tokens == 12 and len(found.first_token_s) == 2
                assert 0 < max(found.first_token_s) <= found.seconds


def test_states_of_recurrent_gemma_stay_and_those_of_a_transformer_grow() -> None:
    out = run(str(SCRIPTS / "bench_flat.py"), "--quick")
    states: dict[str, list[str]] = {}
    for line in re.findall(r"^\| .+ \|$", out, re.MULTILINE)[2:]:
        model, _, _, _, state, _ = (cell.strip() for cell in line[1:-1].split("|"))
        states.setdefault(model, []).append(state)
    griffin, transformer = states.values()
    assert len(griffin) == 4 and len(set(griffin)) == 1
    assert float(transformer[-1]) > float(transformer[0])


def test_the_picture_is_svg_for_light_and_dark_pages(script: Any) -> None:
    bench = script("bench_flat")
    rows = [
        {"model": model, "position": at, "ms": 1 + at / 2**14, "ratio": 1.0, "state_bytes": at}
        for model in (bench.GRIFFIN, bench.TRANSFORMER)
        for at in (1024, 4096, 16384)
    ]
    text = bench.picture(rows)
    root = ElementTree.fromstring(text)
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert len(lines) == 4 and all(len(line.get("points", "").split()) == 3 for line in lines)
    assert "prefers-color-scheme: dark" in text
    for line in lines:
        for point in line.get("points", "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 420 and 0 <= y <= 300
