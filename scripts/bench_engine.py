"""Speed of the engine against mlx-lm and against a bare model loop, on the same weights.

    .venv/bin/python scripts/bench_engine.py                       # everything, about 20 minutes
    .venv/bin/python scripts/bench_engine.py --only load --pairs 5
    .venv/bin/python scripts/bench_engine.py --quick               # does it work at all? 3 minutes

    single      one stream, prefill and decode: the embedded model and a random one of about 100
                million parameters of each family, against mlx-lm's `stream_generate`
    load        1 to 16 clients that stream over HTTP at once: `gryphon serve` against
                `mlx_lm.server`, seeded requests and not
    overhead    what a token costs in the scheduler, and in the whole stack, above a bare loop

Contenders are processes that take turns, each first every other time, so that a machine that
drifts drifts for all; a figure is a median, a ratio the median of the turns'. mlx-lm is measured
as it installs and with Gryphon's BLAS and dtype: the second says what is ours.

Figures go to results/ and from there into docs/benchmarks.md (`benchmark_page.py`). The status is 1
where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measurement import BLAS  # isort: skip  (preloads it, and leaves its copy in the cache)

from benchmark_page import publish
from engine_load import Round, Server, Task, gryphon_server, mlx_lm_server
from engine_models import FAMILIES, link_for_mlx_lm

from app import paths
from app.library import embedded

SCRIPTS = Path(__file__).parent
CLIENTS = (1, 2, 4, 8, 16)
SEEDED_AT = 8
GOALS = {"single": 0.97, "load": 1.0, "load, seeded": 1.5, "overhead": 0.03}

Row = dict[str, Any]


class Bench:
    """Models, the environment of the contenders, and how long to measure."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.directory = directory
        self.options = options
        self.embedded = embedded.pull().path
        home = directory / "home"
        (home / "data" / "models").mkdir(parents=True)
        (home / "cache").symlink_to(paths.cache_dir())
        home.chmod(0o700)
        # An engine of its own.
        self.environment = {
            **os.environ,
            "GRYPHON_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(SCRIPTS.parent),
        }

    @contextlib.contextmanager
    def model(self, *words: str) -> Iterator[Path]:
        """A model as engine_models.py writes it, there as long as it is used."""
        target = self.directory / "-".join(Path(word).name for word in words)
        command = [sys.executable, str(SCRIPTS / "engine_models.py"), *words, str(target)]
        subprocess.run(command, env=self.environment, check=True)
        try:
            yield target
        finally:
            shutil.rmtree(target)

    @contextlib.contextmanager
    def contenders(self, names: Sequence[str], model: Path) -> Iterator[dict[str, Contender]]:
        with contextlib.ExitStack() as stack:
            # Turns ask the same again, and every prompt is to be computed.
            environment = self.environment | {"GRYPHON_PREFIX_CACHE_BYTES": "0"}
            yield {name: stack.enter_context(Contender(name, model, environment)) for name in names}


class Contender:
    """A process of engine_contenders.py."""

    def __init__(self, name: str, model: Path, environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "engine_contenders.py"), name, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def generate(self, prompt: list[int], length: int) -> tuple[float, float]:
        """Seconds until the first token, and from there to the last one."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        stdin.write(json.dumps({"prompt": prompt, "length": length}) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer: {stderr.read()[-2000:]}")
        times = json.loads(line)
        return times["first_s"], times["rest_s"]


def turns(
    measures: dict[str, Callable[[], Any]], count: int, say: str, *, warm_up: bool = True
) -> dict[str, list[Any]]:
    """What each measured in turn `count` times, after one that is not counted."""
    results: dict[str, list[Any]] = {name: [] for name in measures}
    for turn in range(0 if warm_up else 1, count + 1):
        for name in list(measures) if turn % 2 else list(measures)[::-1]:
            value = measures[name]()
            if turn > 0:
                results[name].append(value)
        print(f"{say}: turn {turn} of {count}", file=sys.stderr, flush=True)
    return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Theirs over ours, turn by turn: more than 1 where less is ours."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(each), "least": min(each), "greatest": max(each)}


def prompt_tokens(count: int, vocabulary: int) -> list[int]:
    """The same arbitrary ids for every contender; none of them is a special token."""
    return [1000 + (i * 7919) % (vocabulary - 2000) for i in range(count)]


def vocabulary_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


# One stream.


def single(bench: Bench) -> list[Row]:
    rows = compare(bench, "SmolLM2-135M", bench.embedded, ("mlx-lm", "mlx-lm float32"))
    for family in FAMILIES[:1] if bench.options.quick else FAMILIES:
        with bench.model("random", family) as model:
            rows += compare(bench, family, model, ("mlx-lm",))
    return rows


def compare(bench: Bench, label: str, model: Path, as_installed: Sequence[str]) -> list[Row]:
    options = bench.options
    rows = []
    with bench.contenders(("gryphon", "mlx-lm matched", *as_installed), model) as contenders:
        for name in ("mlx-lm matched", *as_installed):
            # Without a BLAS, or with 16-bit arithmetic emulated, little is all one waits for.
            task, count = (24, 9), min(2, options.pairs)
            if name == "mlx-lm matched":
                task, count = (192, 21), options.pairs
            elif name == "mlx-lm" and len(as_installed) > 1:
                task, count = (4, 3), 1
            prompt = prompt_tokens(task[0], vocabulary_of(model))
            pair = (contenders["gryphon"], contenders[name])
            got = turns(
                {who.name: functools.partial(who.generate, prompt, task[1]) for who in pair},
                count,
                f"single, {label}, {name}",
                warm_up=task[0] > 4,
            )
            for phase, tokens in (("prefill", task[0]), ("decode", task[1] - 1)):
                which = ("prefill", "decode").index(phase)
                ours, theirs = ([one[which] for one in got[who.name]] for who in pair)
                row = {"model": label, "other": name, "phase": phase, "tokens": tokens}
                row |= {"pairs": count, "tps": tokens / statistics.median(ours)}
                row |= {"other_tps": tokens / statistics.median(theirs)} | ratios(ours, theirs)
                if name == "mlx-lm matched":
                    row["goal"] = GOALS["single"]
                rows.append(row)
    return rows


# Many streams.


def load(bench: Bench) -> list[Row]:
    options = bench.options
    clients = (1, 8) if options.quick else CLIENTS
    rows = []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(bench.model("float32", str(bench.embedded)))
        (bench.directory / "home" / "data" / "models" / "bench").symlink_to(model)
        linked = link_for_mlx_lm(model, bench.directory / "for-mlx-lm")
        ours = stack.enter_context(gryphon_server("bench", bench.environment))
        for name, matched in (("mlx_lm.server matched", True), ("mlx_lm.server", False)):
            with mlx_lm_server(linked, bench.environment, matched=matched) as theirs:
                # Without a fast BLAS, short tasks and few turns are all one waits for.
                task = Task() if matched else Task(words=12, tokens=8)
                count = min(options.pairs, 3) if matched else 1
                for n in clients:
                    rows.append(meet(ours, theirs, n, task, count, name))
                seeded = Task(task.words, task.tokens, is_seeded=True)
                rows.append(meet(ours, theirs, SEEDED_AT, seeded, count, name))
    return rows


def _round(server: Server, clients: int, task: Task, numbers: Iterator[int]) -> Round:
    return server.meet(clients, task, next(numbers))


def meet(ours: Server, theirs: Server, clients: int, task: Task, count: int, name: str) -> Row:
    """A row of the load's table: both servers in turns."""
    numbers = iter(range(1, 1000))
    kind = "seeded" if task.is_seeded else "unseeded"
    got: dict[str, list[Round]] = turns(
        {
            who: functools.partial(_round, server, clients, task, numbers)
            for who, server in (("ours", ours), ("theirs", theirs))
        },
        count,
        f"load, {name}, {kind}, {clients}",
    )
    row: Row = {"other": name, "kind": kind, "clients": clients, "pairs": count}
    row["tokens"] = task.tokens
    for who, prefix in (("ours", ""), ("theirs", "other_")):
        first = sorted(second for one in got[who] for second in one.first_token_s)
        row[f"{prefix}tps"] = statistics.median(one.tps for one in got[who])
        row[f"{prefix}first_p50_s"] = statistics.median(first)
        row[f"{prefix}first_p99_s"] = first[min(len(first) - 1, round(0.99 * len(first)))]
    seconds = ([one.seconds for one in got[who]] for who in ("ours", "theirs"))
    row |= ratios(*seconds)
    if name == "mlx_lm.server matched":
        row["goal"] = GOALS["load, seeded" if task.is_seeded else "load"]
    return row


# What the engine adds.


def overhead(bench: Bench) -> list[Row]:
    rows = steps(bench, "SmolLM2-135M", bench.embedded, tokens=25)
    with bench.model("random", "tiny") as model:
        return rows + steps(bench, "tiny", model, tokens=400)


def steps(bench: Bench, label: str, model: Path, tokens: int) -> list[Row]:
    names = ("bare", "scheduler", "gryphon")
    prompt = prompt_tokens(8, vocabulary_of(model))
    count = 3 * bench.options.pairs
    with bench.contenders(names, model) as contenders:

        def seconds(name: str) -> float:
            return contenders[name].generate(prompt, tokens)[1]

        measures = {name: functools.partial(seconds, name) for name in names}
        got = turns(measures, count, f"overhead, {label}")
    rows = []
    for name in names:
        ms = [1000 * seconds / (tokens - 1) for seconds in got[name]]
        bare = [1000 * seconds / (tokens - 1) for seconds in got["bare"]]
        added = sorted(a - b for a, b in zip(ms, bare, strict=True))
        share = sorted(a / b - 1 for a, b in zip(ms, bare, strict=True))
        row: Row = {"model": label, "contender": name, "turns": count, "tokens": tokens}
        row |= {"ms": statistics.median(ms), "added_ms": statistics.median(added)}
        row["share"] = statistics.median(share)
        row["share_low"], row["share_high"] = share[len(share) // 4], share[-1 - len(share) // 4]
        if name != "bare" and label != "tiny":
            row["goal"] = GOALS["overhead"]
        rows.append(row)
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "single": single,
    "load": load,
    "overhead": overhead,
}


def missed(section: str, row: Row) -> bool:
    if "goal" not in row:
        return False
    return bool(row["share"] > row["goal"] if "share" in row else row["ratio"] < row["goal"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", choices=SECTIONS, action="append", help="default: all")
    parser.add_argument("--pairs", type=int, default=10, help="turns of each pair (10)")
    parser.add_argument("--quick", action="store_true", help="little of it, and nothing is kept")
    options = parser.parse_args()
    if options.quick:
        options.pairs = min(options.pairs, 2)
    print(BLAS.note, file=sys.stderr)
    failed = False
    for name in options.only or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="gryphon-bench-") as directory:
            rows = SECTIONS[name](Bench(Path(directory), options))
        command = f"scripts/bench_engine.py --only {name} --pairs {options.pairs}"
        print(publish(name, command, rows, keep=not options.quick))
        for row in rows:
            if missed(name, row):
                print(f"missed: {name} {row}", file=sys.stderr)
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
