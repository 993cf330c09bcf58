"""How long a running answer waits between two tokens while a long prompt is read beside it.

    .venv/bin/python scripts/bench_gaps.py                                  # some minutes
    .venv/bin/python scripts/bench_gaps.py --size small --rounds 1 --processor-time

Through the engine's own scheduler, on random weights of about 100 million parameters ("large"): one
row answers, then a newcomer comes whose prompt is read in chunks, with others waiting behind it.
Gaps are those between the tokens of the row, as it sends them; "quiet" is their median before the
newcomer comes. A chunk's time is the median of the prompt's. The status is 1 where the 99th
percentile of the gaps is more than 2.5 times that.

Figures from a machine that is busy with other things are noise, so the load is printed with them.
`--processor-time` counts what this process computes in place of what passes: only on a CPU, and
with OPENBLAS_NUM_THREADS=1, since OpenBLAS's threads wait for each other by spinning.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from measurement import machine  # isort: skip  (preloads the BLAS)

import bench_models
import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten
from tokenizers import models, pre_tokenizers

from app.engine.batch import Row
from app.engine.protocol import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Sampling,
    Token,
)
from app.engine.scheduler import Scheduler

FAMILIES = ("open_llama", "recurrent_gemma")
GOAL = 2.5
QUIET_TOKENS = 24


clock = time.perf_counter


@dataclass
class Figures:
    """Of one family, in seconds."""

    quiet: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return percentile(self.gaps, 99) / statistics.median(self.chunks)


class TimedScheduler(Scheduler):
    """The scheduler, with the time of each chunk that it prefills."""

    chunks: list[float]

    def _prefill_chunk(self) -> None:
        begin = clock()
        super()._prefill_chunk()
        self.chunks.append(clock() - begin)


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def write_model(name: str, size: str, context: int, directory: Path) -> ModelRef:
    """A checkpoint with random weights, float32, and a tokenizer for the tokens of its answers."""
    family = bench_models.FAMILIES[name]
    config = bench_models.SIZES[size] | {"model_type": family.model_type} | family.config
    config["max_position_embeddings"] = context
    if name == "recurrent_gemma":
        config["intermediate_size"] *= 2  # its MLP is half of it wide
    path = directory / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(bench_models.our_model(config, mx.float32).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"word{i}" for i in range(len(words), config["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(path / "tokenizer.json"))
    return ModelRef(name, str(path))


def measure(model: ModelRef, prompt_tokens: int, waiting: int, rounds: int) -> Figures:
    scheduler, figures = TimedScheduler(), Figures()
    events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
    thread = threading.Thread(target=scheduler.run, daemon=True)
    thread.start()

    def submit(id: str, length: int, max_tokens: int) -> Row:
        request = GenerationRequest(
            id=id,
            model=model,
            prompt_tokens=[0],
            sampling=Sampling(temperature=0),
            max_tokens=max_tokens,
        )
        vocabulary = bench_models.SIZES["small"]["vocab_size"]
        prompt = [1 + i * 7919 % (vocabulary - 1) for i in range(length)]
        row = Row(request, lambda event: events.put((clock(), event)), prompt)
        scheduler.submit(row)
        return row

    for turn in range(rounds + 1):  # the first warms up and is not counted
        scheduler.chunks = []
        running = submit(f"running {turn}", 16, prompt_tokens)
        newcomers: list[Row] = []
        times: list[float] = []
        has_ended = False
        while not has_ended:
            at, event = events.get()
            if isinstance(event, Failed):
                sys.exit(event.message)
            if isinstance(event, Token) and event.id == running.request.id:
                times.append(at)
                if len(times) == QUIET_TOKENS:
                    for i in range(1 + waiting):
                        newcomers.append(submit(f"newcomer {turn} {i}", prompt_tokens, 1))
            has_ended = bool(newcomers) and isinstance(event, Finished)
        for row in [running, *newcomers]:
            scheduler.cancel(row)
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        if turn:
            figures.quiet += gaps[1 : QUIET_TOKENS - 1]
            figures.gaps += gaps[QUIET_TOKENS - 1 :]
            figures.chunks += scheduler.chunks[1:]  # but for the running row's short prompt
    scheduler.stop()
    thread.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--size", choices=list(bench_models.SIZES), default="large")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--waiting", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.processor_time:
        global clock
        clock = time.process_time
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"{arguments.size}, a prompt of {arguments.prompt_tokens} tokens, {arguments.waiting} more "
        f"behind it, {arguments.rounds} rounds; milliseconds\n"
    )
    print("| | quiet | chunk | gap p50 | gap p99 | longest gap | gap p99 / chunk |")
    print("|---|---|---|---|---|---|---|")
    is_missed = False
    for name in arguments.family or FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            model = write_model(
                name, arguments.size, 2 * arguments.prompt_tokens + 64, Path(directory)
            )
            figures = measure(model, arguments.prompt_tokens, arguments.waiting, arguments.rounds)
        cells = [
            statistics.median(figures.quiet),
            statistics.median(figures.chunks),
            statistics.median(figures.gaps),
            percentile(figures.gaps, 99),
            max(figures.gaps),
        ]
        shown = " | ".join(f"{1000 * cell:.1f}" for cell in cells)
        print(f"| {name} | {shown} | {figures.ratio:.2f} |", flush=True)
        is_missed |= figures.ratio > GOAL
    sys.exit(is_missed)


if __name__ == "__main__":
    main()
