#!/usr/bin/env python3
"""Writes docs/parity.md: how far every port is from its reference, as the tests measure it.

.venv/bin/python scripts/parity.py            # prints and writes
.venv/bin/python scripts/parity.py --check    # fails if a figure is over the tests' limit
"""

import argparse
import platform
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.engine import blas  # noqa: E402  (before MLX, as in the engine process)

blas.preload()

import mlx.core as mx  # noqa: E402

from tests.models import goldens  # noqa: E402
from tests.tolerance import LOGITS  # noqa: E402

TARGET = ROOT / "docs" / "parity.md"

# Conditions as they are told: the cases of the goldens, gathered.
CONDITIONS = {
    "whole": ("whole",),
    "chunks of 1, 7, 16, 64": tuple(f"chunks of {size}" for size in goldens.CHUNKS),
    "prefill and decode": ("decode",),
    "left padding": ("left_padded",),
    "right padding": ("right_padded",),
    "both": ("both_padded",),
    "hidden states": ("hidden",),
    "attentions": ("attentions",),
    "inputs_embeds": ("embeds",),
    "position_ids": ("positions", "packed"),
    "losses": ("loss", "single_label", "multi_label", "regression"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    half: list[tuple[str, str, goldens.HalfPrecision]] = []
    for name in goldens.NAMES:
        golden = goldens.Golden(name)
        if golden.is_half:
            half.append((golden.family, golden.metadata["dtype"], goldens.half_precision(golden)))
        row = worst[golden.family, golden.task]
        for condition, error in goldens.conditions(golden):
            row[condition] = max(error, row.get(condition, 0.0))
    text = document(worst, half)
    print(text)
    if not arguments.check:
        TARGET.write_text(text, encoding="utf-8")
    errors = [error for row in worst.values() for error in row.values()]
    return int(max(errors) > LOGITS)


def document(
    worst: dict[tuple[str, str], dict[str, float]],
    half: list[tuple[str, str, goldens.HalfPrecision]],
) -> str:
    made_by = {goldens.Golden(name).metadata["reference"] for name in goldens.NAMES}
    references = " and ".join(sorted({" ".join(text.split()[:2]) for text in made_by}))
    lines = [
        "# Parity with the reference implementations",
        "",
        f"Written by `scripts/parity.py` on {date.today()}: MLX {mx.__version__}, "
        f"{platform.system()} {platform.machine()}, {mx.default_device()}. "
        f"{len(goldens.NAMES)} tiny random models of {references}; `tests/golden/README.md` says "
        "how they and the references' numbers were made. CI checks every one of these figures.",
        "",
        "## float32",
        "",
        "Largest error of any number the reference returned, over the standard deviation of all of "
        f"them (a loss: over the loss). Allowed: {LOGITS:.0e}. Padded rows are compared with each "
        "row alone. A blank cell has no reference or does not apply.",
        "",
        "| family | task | " + " | ".join(CONDITIONS) + " |",
        "|---" * (len(CONDITIONS) + 2) + "|",
    ]
    for (family, task), row in sorted(worst.items()):
        cells = []
        for cases in CONDITIONS.values():
            errors = [row[case] for case in cases if case in row]
            cells.append(f"{max(errors):.1e}" if errors else "")
        unknown = set(row) - {case for cases in CONDITIONS.values() for case in cases}
        assert not unknown, f"no column for {unknown}"
        lines.append(f"| {family} | {task} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## float16 and bfloat16",
        "",
        "Both sides run the same half-precision weights; the truth is the reference on those "
        "weights in float32. Errors are RMS over the standard deviation of the logits. A position "
        "counts as clear where the best logit leads by more than the reference's own rounding "
        "noise; there, ours must have the same best logit.",
        "",
        "| family | dtype | our error | reference's error | clear positions | same best logit |",
        "|---|---|---|---|---|---|",
    ]
    for family, dtype, result in half:
        lines.append(
            f"| {family} | {dtype} | {result.ours:.1e} | {result.reference:.1e} "
            f"| {result.clear} | {result.agreeing} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
