"""docs/benchmarks.md: its tables are written from the figures that the benchmarks keep in results/.

    .venv/bin/python scripts/benchmark_page.py            # write the page again
    .venv/bin/python scripts/benchmark_page.py --check    # or only say whether it is current

A section of a results file, `results/MACHINE-engine.json`, is what one run has found: machine,
versions, commit, date, the command to run it again, and rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

Row = dict[str, Any]


def publish(section: str, command: str, rows: list[Row], *, keep: bool = True) -> str:
    """Keep what a run has found and write it into the page; its table, to print."""
    from measurement import machine, results_file

    today = datetime.date.today().isoformat()
    found = {"command": command, "date": today, "machine": machine(), "rows": rows}
    if keep:
        path = results_file("-engine").with_suffix(".json")
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rounded(kept | {section: found}), indent=1) + "\n")
        PAGE.write_text(written(PAGE.read_text()))
    return part(section, rounded(found))


def rounded(value: Any) -> Any:
    """The same with four digits of each figure."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def written(page: str) -> str:
    """The page with every section's tables between its markers.

    Raises:
        RuntimeError: a section has no place on the page.
    """
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-engine.json"))]
    for section in TABLES:
        parts = [part(section, file[section]) for file in files if section in file]
        text = "\n\n".join(parts) or "Not measured yet."
        pattern = rf"(<!-- benchmark: {section} -->\n).*?(<!-- end of benchmark -->)"
        page, count = re.subn(
            pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise RuntimeError(f"{PAGE} has {count} places for {section} instead of one.")
    return page


def part(section: str, found: dict[str, Any]) -> str:
    """What one machine has found, with where it comes from."""
    host = found["machine"]
    origin = (
        f"{host['machine']}, {host['device']}, {host['blas']}, mlx {host['mlx']}, mlx-lm "
        f"{host['mlx_lm']}, commit {host['commit']}, {found['date']}, load {host['load']} at the "
        f"end. Again: `.venv/bin/python {found['command']}`."
    )
    return f"{origin}\n\n{TABLES[section](found['rows'])}"


def single_table(rows: list[Row]) -> str:
    head = ("model", "against", "phase", "tokens", "turns", "Gryphon tok/s", "mlx-lm tok/s")
    lines = [(*head, "ratio", "least", "greatest", "goal")]
    for row in rows:
        cells = (row["model"], row["other"], row["phase"], str(row["tokens"]), str(row["pairs"]))
        cells += (speed(row["tps"]), speed(row["other_tps"]))
        lines.append((*cells, *(f"{row[key]:.2f}" for key in SPREAD), goal(row)))
    return markdown(lines, "lll>>>>>>>l")


def load_table(rows: list[Row]) -> str:
    head = ("against", "requests", "clients", "tokens each", "turns", "Gryphon tok/s")
    head += ("mlx-lm tok/s", "ratio", "least", "greatest", "goal")
    lines = [(*head, "first token p50 / p99 s", "mlx-lm's")]
    for row in rows:
        cells = (row["other"], row["kind"], str(row["clients"]), str(row["tokens"]))
        cells += (str(row["pairs"]), speed(row["tps"]), speed(row["other_tps"]))
        cells += (*(f"{row[key]:.2f}" for key in SPREAD), goal(row))
        for prefix in ("", "other_"):
            first = (row[f"{prefix}first_p50_s"], row[f"{prefix}first_p99_s"])
            cells += (f"{first[0]:.2f} / {first[1]:.2f}",)
        lines.append(cells)
    return markdown(lines, "ll>>>>>>>>l>>")


def overhead_table(rows: list[Row]) -> str:
    head = ("model", "what", "turns", "ms a token", "added µs", "added", "middle half", "goal")
    lines = [head]
    for row in rows:
        cells = (row["model"], row["contender"], str(row["turns"]), f"{row['ms']:.2f}")
        if row["contender"] == "bare":
            lines.append((*cells, "", "", "", ""))
            continue
        cells += (f"{1000 * row['added_ms']:.0f}", f"{row['share']:.1%}")
        cells += (f"{row['share_low']:.1%} to {row['share_high']:.1%}",)
        bound = f"≤ {row['goal']:.0%}" if "goal" in row else ""
        is_missed = "goal" in row and row["share"] > row["goal"]
        lines.append((*cells, bound + (" missed" if is_missed else "")))
    return markdown(lines, "ll>>>>>l")


def flat_table(rows: list[Row]) -> str:
    lines = [("model", "position", "ms a token", "over the first", "state MB", "goal")]
    for row in rows:
        cells = (row["model"], f"{row['position']:,}", f"{row['ms']:.2f}", f"{row['ratio']:.2f}")
        cells += (f"{row['state_bytes'] / 1e6:.3g}",)
        bound = f"≤ {row['goal']:.2f}" if "goal" in row else ""
        is_missed = "goal" in row and row["ratio"] > row["goal"]
        lines.append((*cells, bound + (" missed" if is_missed else "")))
    return markdown(lines, "l>>>>l")


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "single": single_table,
    "load": load_table,
    "overhead": overhead_table,
    "flat": flat_table,
}
SPREAD = ("ratio", "least", "greatest")


def goal(row: Row) -> str:
    if "goal" not in row:
        return ""
    return f"≥ {row['goal']:.2f}" + (" missed" if row["ratio"] < row["goal"] else "")


def speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(rows: Sequence[Sequence[str]], alignment: str) -> str:
    rule = ["---:" if side == ">" else "---" for side in alignment]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    before = PAGE.read_text()
    after = written(before)
    if options.check and before != after:
        print(f"{PAGE} differs: run scripts/benchmark_page.py", file=sys.stderr)
        return 1
    if before != after:
        PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
