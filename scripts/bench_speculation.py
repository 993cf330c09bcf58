"""What speculation gains and costs in Gryphon's engine: acceptance, and decode speed against none.

    .venv/bin/python scripts/bench_speculation.py               # the embedded model
    .venv/bin/python scripts/bench_speculation.py --pairs 5 --decode-tokens 64

Each row takes turns with the same request without speculation, through the whole stack below a
face. Ratios are medians over the turns, above 1 speculation is faster:

    lookup, repetitive     a list to be copied, which prompt lookup finds everything in
    lookup, arbitrary      arbitrary ids and a sampled answer, in which it finds next to nothing:
                           what it costs when it is of no use
    draft, same model      the model drafts for itself: acceptance is 100 % by construction, and the
                           ratio shows what drafting costs where nothing is gained
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from app.engine.client import EngineClient
from app.engine.protocol import (
    DraftModel,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    PromptLookup,
    Sampling,
)
from app.library.installed import find_model, read_config

LINES = "".join(f"{i}. The {i * 7 % 90}th house on the street is painted.\n" for i in range(1, 13))
REPETITIVE = [Message("user", f"Repeat this list exactly, and nothing else:\n\n{LINES}")]


@dataclass
class Case:
    """A request, and the same with speculation."""

    name: str
    plain: GenerationRequest
    speculation: PromptLookup | DraftModel
    ratios: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


async def finished(client: EngineClient, request: GenerationRequest) -> Finished:
    async for event in client.stream(request):
        if isinstance(event, Failed):
            sys.exit(event.message)
        if isinstance(event, Finished):
            return event
    raise AssertionError("a stream ended without an end")


async def measure(cases: list[Case], pairs: int) -> None:
    client = EngineClient()
    for turn in range(pairs + 1):  # the first warms up
        for case in cases:
            fast = msgspec.structs.replace(case.plain, speculation=case.speculation)
            order = [(0, case.plain), (1, fast)]
            ends: dict[int, Finished] = {}
            for which, request in order if turn % 2 else reversed(order):
                request = msgspec.structs.replace(request, id=f"{case.name} {turn} {which}")
                ends[which] = await finished(client, request)
            if turn:
                speeds = [ends[i].timings.decode_tps(ends[i].usage) for i in (0, 1)]
                case.ratios.append(speeds[1] / speeds[0])
                case.drafted += ends[1].usage.drafted_tokens
                case.accepted += ends[1].usage.accepted_tokens
                print(f"turn {turn}: {case.name} {case.ratios[-1]:.2f}", file=sys.stderr)
    await client.close()


def report(cases: list[Case], arguments: argparse.Namespace) -> str:
    from importlib.metadata import version

    lines = [
        f"{arguments.decode_tokens} tokens decoded, {arguments.pairs} turns, mlx {version('mlx')}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}",
        "",
        "| | drafted | accepted | decode speed | least | greatest |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        share = f"{case.accepted / case.drafted:.0%}" if case.drafted else "-"
        figures = statistics.median(case.ratios), min(case.ratios), max(case.ratios)
        cells = " | ".join(f"{figure:.2f}×" for figure in figures)
        lines.append(f"| {case.name} | {case.drafted} | {share} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="an installed model or a directory")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--decode-tokens", type=int, default=96)
    arguments = parser.parse_args()
    ref: ModelRef = find_model(arguments.model, allow_path=True).ref
    vocab_size = read_config(Path(ref.path))["vocab_size"]
    arbitrary = [i * 7919 % vocab_size for i in range(1, 201)]
    length, greedy = arguments.decode_tokens, Sampling(temperature=0)

    def request(**fields: object) -> GenerationRequest:
        fields = {"sampling": greedy, "ignore_eos": True} | fields
        return GenerationRequest(id="", model=ref, max_tokens=length, **fields)  # type: ignore[arg-type]

    hot = Sampling(temperature=1.5, seed=1)
    cases = [
        Case("lookup, repetitive", request(messages=REPETITIVE), PromptLookup()),
        Case("lookup, arbitrary", request(prompt_tokens=arbitrary, sampling=hot), PromptLookup()),
        Case("draft, same model", request(messages=REPETITIVE), DraftModel(ref)),
    ]
    asyncio.run(measure(cases, arguments.pairs))
    print(report(cases, arguments))


if __name__ == "__main__":
    main()
