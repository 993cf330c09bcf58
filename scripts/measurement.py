"""What the benchmarks share: the machine they ran on, turns taken in pairs, and the results' files.

Importing this preloads the BLAS, so it comes before MLX.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.engine import blas

BLAS = blas.preload()

import mlx.core as mx  # noqa: E402  (after the BLAS)

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code's arguments."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": mx.default_device().type.name,
        "blas": BLAS.note,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "load": round(os.getloadavg()[0], 1),
    }


def results_file(suffix: str = "") -> Path:
    """The file of this machine in results/: named after the chip where MLX knows it."""
    name = f"{platform.system()}-{platform.machine()}-{os.cpu_count()}"
    if mx.default_device().type == mx.DeviceType.gpu:
        name = str(mx.device_info()["device_name"])
    return RESULTS / (re.sub(r"[^a-z0-9_]+", "-", name.lower()) + suffix + ".csv")


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


@dataclass
class Comparison:
    """Two ways that took turns. A ratio is the other's time over ours: above 1 ours is faster."""

    ours_ms: float
    other_ms: float
    ratio: float
    """Median of the pairs'; `least` and `greatest` are the extremes."""
    least: float
    greatest: float


def take_turns(
    ours: Callable[[], Any], other: Callable[[], Any], pairs: int, warm_up: int = 1
) -> Comparison:
    """Time both, each first every other time; their results are evaluated."""
    times: tuple[list[float], list[float]] = ([], [])
    for count in range(pairs + warm_up):
        order = ((0, ours), (1, other)) if count % 2 else ((1, other), (0, ours))
        for which, run in order:
            mx.synchronize()
            begin = time.perf_counter()
            mx.eval(run())
            mx.synchronize()
            if count >= warm_up:
                times[which].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Comparison(
        statistics.median(times[0]) * 1000,
        statistics.median(times[1]) * 1000,
        *(statistics.median(ratios), min(ratios), max(ratios)),
    )
