"""What a decode step costs far into a text: RecurrentGemma, and a transformer of the same size.

    .venv/bin/python scripts/bench_flat.py             # about 3 minutes
    .venv/bin/python scripts/bench_flat.py --quick     # does it work at all? seconds

Small random models in float32. Every token up to a position is really read; there a copy of the
states is kept alive. Then a model's copies take turns at a few decode steps, so that a machine that
drifts drifts for all of them, and a step's time is compared with that at position 2·W in the same
turn. The transformer stops earlier: reading a text takes it time that grows with the square.

Figures go to results/ and docs/benchmarks.md (`benchmark_page.py`), the curves to
docs/flat-cost.svg. The status is 1 where the last position costs more than 1.1 times the first, or
the states have grown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from typing import Any

import measurement  # isort: skip  # noqa: F401  (preloads the BLAS)

import mlx.core as mx
from bench_models import FAMILIES, SIZES, config_of, decode, empty_states, our_model
from benchmark_page import PAGE, publish
from curve_svg import Chart, Line, svg
from engine_models import TINY

PICTURE = PAGE.with_name("flat-cost.svg")
GOAL = 1.1
CHUNK = 512
STEPS = 4
GRIFFIN, TRANSFORMER = "RecurrentGemma", "transformer (Open-Llama)"

Row = dict[str, Any]


def models(window: int, size: dict[str, Any]) -> dict[str, Any]:
    griffin = config_of(FAMILIES["recurrent_gemma"], size)
    griffin["attention_window_size"] = window
    transformer = config_of(FAMILIES["open_llama"], size)
    return {
        GRIFFIN: our_model(griffin, mx.float32),
        TRANSFORMER: our_model(transformer, mx.float32),
    }


def read(model: Any, positions: list[int], label: str) -> dict[int, list[Any]]:
    """States at each of the positions, in one pass over the same text."""
    states = empty_states(model)
    kept: dict[int, list[Any]] = {}
    done = 0
    for position in positions:
        while done < position:
            count = min(CHUNK, position - done)
            key = mx.random.key(done)
            model(mx.random.randint(0, 2000, (1, count), key=key), cache=states)
            mx.eval([state.state for state in states])
            done += count
        kept[position] = copy.deepcopy(states)
        print(f"{label}: has read {done} tokens", file=sys.stderr, flush=True)
    return kept


def measure(made: dict[str, Any], kept: dict[str, dict[int, list[Any]]], rounds: int) -> list[Row]:
    """A row for each model and position, after `rounds` turns of them all."""
    token = mx.array([7], mx.int32)
    places = [(label, position) for label, states in kept.items() for position in states]
    times: dict[tuple[str, int], list[float]] = {place: [] for place in places}
    for count in range(rounds + 1):
        for label, position in places if count % 2 else places[::-1]:
            # The other model, or other states, had the processor's caches.
            decode(made[label], kept[label][position], token, 1)
            mx.synchronize()
            begin = time.perf_counter()
            decode(made[label], kept[label][position], token, STEPS)
            if count > 0:  # the first steps may make room for those that follow
                seconds = time.perf_counter() - begin
                times[label, position].append(seconds * 1000 / STEPS)
    rows = []
    for (label, position), each in times.items():
        first = times[label, min(kept[label])]
        row: Row = {"model": label, "position": position, "ms": statistics.median(each)}
        row["ratio"] = statistics.median(b / a for a, b in zip(first, each, strict=True))
        row["state_bytes"] = sum(int(state.nbytes) for state in kept[label][position])
        rows.append(row)
    return rows


def picture(rows: list[Row]) -> str:
    """docs/flat-cost.svg."""

    def lines(key: str, unit: float) -> list[Line]:
        names = dict.fromkeys(row["model"] for row in rows)
        return [
            Line(n, [(r["position"], r[key] / unit) for r in rows if r["model"] == n])
            for n in names
        ]

    x_label = "position in the text, tokens"
    last = [row for row in rows if row["model"] == GRIFFIN][-1]
    return svg(
        [
            Chart("milliseconds a token", x_label, lines("ms", 1)),
            Chart("state, MB", x_label, lines("state_bytes", 1e6)),
        ],
        f"A decode step of RecurrentGemma takes {last['ratio']:.2f} times as long at position "
        f"{last['position']:,} as near the beginning; the transformer's time and state grow.",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--window", type=int, default=512, help="W, in tokens")
    parser.add_argument("--far", type=int, default=65536, help="RecurrentGemma's last position")
    parser.add_argument("--transformer", type=int, default=8192, help="the transformer's")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="little of it, and nothing is kept")
    options = parser.parse_args()
    size = SIZES["small"]
    if options.quick:
        size = TINY
        options.window, options.far, options.transformer, options.rounds = 32, 512, 256, 5
    made = models(options.window, size)
    kept = {}
    for label, end in ((GRIFFIN, options.far), (TRANSFORMER, options.transformer)):
        positions = [2 * options.window]
        while positions[-1] < end:
            positions.append(min(2 * positions[-1], end))
        kept[label] = read(made[label], positions, label)
    # Not in one round: whoever follows the transformer finds the processor's caches full of it.
    rows = [row for label in kept for row in measure(made, {label: kept[label]}, options.rounds)]
    flat = [row for row in rows if row["model"] == GRIFFIN]
    if not options.quick:
        flat[-1]["goal"] = GOAL
    command = "scripts/bench_flat.py " + " ".join(
        f"--{name} {getattr(options, name)}" for name in ("window", "far", "transformer", "rounds")
    )
    print(publish("flat", command, rows, keep=not options.quick))
    if not options.quick:
        PICTURE.write_text(picture(rows))
    grows = len({row["state_bytes"] for row in flat}) > 1
    if grows:
        print("missed: RecurrentGemma's states have grown", file=sys.stderr)
    is_slower = not options.quick and flat[-1]["ratio"] > GOAL
    return 1 if grows or is_slower else 0


if __name__ == "__main__":
    sys.exit(main())
