"""Time to the first token of a long chat: cold, and where the prefix cache has read most of it.

    .venv/bin/python scripts/bench_prefix.py                       # 4096 tokens, 100M-class models
    .venv/bin/python scripts/bench_prefix.py --size small --rounds 3

Through the whole stack below a face, with random weights. Every round has a chat of its own, so
that its first request is cold, and then continues it, each time after the five seconds in which a
person reads the answer:

    turn 2     the answer and another question
    retry      the first request again
    edit       the first request with another last message
    restart    turn 3 as the first request of a new engine, what was read before is on disk

A ratio is a warm time over the cold one of the same round; figures are medians. The status is 1
where a ratio misses the goal of 5 %. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measurement import machine  # isort: skip  (preloads the BLAS)

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from app.engine.client import EngineClient
from app.engine.protocol import (
    Accepted,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
    Token,
)
from mlxmodels import registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.tiny_models import GEMMA2, OPEN_LLAMA, RECURRENT_GEMMA, TEMPLATE, byte_tokenizer

GOAL = 0.05
# A person reads the answer, and what was read for it goes to the disk meanwhile.
READING_S = 5.0
KINDS = ("turn 2", "retry", "edit", "restart")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
    "large": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "recurrent_gemma": RECURRENT_GEMMA | {"attention_window_size": 2048},
    "open_llama": OPEN_LLAMA | {"max_position_embeddings": 16384},
    "gemma2": GEMMA2 | {"max_position_embeddings": 16384, "sliding_window": 1024, "head_dim": 64},
}


def write_random_model(path: Path, config: dict[str, Any]) -> int:
    """A checkpoint whose answers stay finite; returns its number of weights."""
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(0)

    def randomized(weight: mx.array) -> mx.array:
        return mx.random.normal(weight.shape) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0)

    weights = dict(tree_flatten(tree_map(randomized, model.parameters())))
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return sum(weight.size for weight in weights.values())


def chat(draw: random.Random, tokens: int) -> list[Message]:
    """Six messages before a question, one token a letter."""

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghij ", k=length))

    roles = ("user", "assistant") * 3
    return [*(Message(role, text(tokens // 6 - 14)) for role in roles), Message("user", text(40))]


async def answer(
    client: EngineClient, model: ModelRef, messages: Sequence[Message], tokens: int = 16
) -> tuple[float, int, str]:
    """Seconds to the first token, tokens of the prompt that were not computed, and the text."""
    request = GenerationRequest(
        id=f"{time.monotonic_ns()}",
        model=model,
        messages=list(messages),
        sampling=Sampling(temperature=0),
        max_tokens=tokens,
        ignore_eos=True,
    )
    begun = time.perf_counter()
    first, cached, text = 0.0, 0, ""
    async for event in client.stream(request):
        if isinstance(event, Token):
            first = first or time.perf_counter() - begun
            text += event.text
        elif isinstance(event, Accepted):
            cached = event.cached_tokens
        elif isinstance(event, Finished):
            text += event.text
        elif isinstance(event, Failed):
            sys.exit(event.message)
    return first, cached, text


async def started(model: ModelRef) -> EngineClient:
    client = EngineClient()
    async for event in client.load(model):
        if isinstance(event, Failed):
            sys.exit(event.message)
    await answer(client, model, [Message("user", "?")], 2)  # what only a first request does
    return client


async def measure(model: ModelRef, tokens: int, rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """For every kind of request and round: seconds, seconds over those of cold, cached tokens."""
    found: dict[str, list[tuple[float, ...]]] = {"cold": [], **{kind: [] for kind in KINDS}}
    client = await started(model)
    for round in range(rounds):
        draw = random.Random(round)
        first = chat(draw, tokens)
        cold, cached, text = await answer(client, model, first)
        assert cached < tokens / 20, "not cold"
        second = [*first, Message("assistant", text), Message("user", "And another question?")]
        edited = [*first[:-1], Message("user", "Something else, about as long as before it was.")]
        found["cold"].append((cold, 1.0, cached))
        warm = {"turn 2": second, "retry": first, "edit": edited}
        for kind in draw.sample(list(warm), 3):
            await asyncio.sleep(READING_S)
            seconds, cached, text = await answer(client, model, warm[kind])
            found[kind].append((seconds, seconds / cold, cached))
            if kind == "turn 2":
                third = [*second, Message("assistant", text), Message("user", "And a third one?")]
        await asyncio.sleep(READING_S)
        await client.close()
        client = await started(model)
        seconds, cached, _ = await answer(client, model, third)
        found["restart"].append((seconds, seconds / cold, cached))
        print(f"round {round}: cold {cold:.2f} s", file=sys.stderr)
    await client.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--tokens", type=int, default=4096, help="of the chat (default: 4096)")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    missed = False
    facts = machine()
    print(f"{arguments.tokens} tokens, {arguments.rounds} rounds; {facts}\n")
    print("| family | weights | request | ms | of cold | greatest | cached |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GRYPHON_HOME"] = str(Path(directory) / "home")
        for family in arguments.family:
            path = Path(directory) / family
            weights = write_random_model(path, FAMILIES[family] | SIZES[arguments.size])
            model = ModelRef(family, str(path))
            found = asyncio.run(measure(model, arguments.tokens, arguments.rounds))
            for kind, turns in found.items():
                seconds, ratio, cached = (
                    statistics.median(column) for column in zip(*turns, strict=True)
                )
                missed |= kind != "cold" and ratio > GOAL
                greatest = max(turn[1] for turn in turns)
                print(
                    f"| {family} | {weights / 1e6:.0f}M | {kind} | {seconds * 1000:.0f} "
                    f"| {ratio:.1%} | {greatest:.1%} | {cached:.0f} |"
                )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
