"""What following a constraint costs a decode step, through the whole engine.

    .venv/bin/python scripts/bench_constraints.py                  # the embedded model
    .venv/bin/python scripts/bench_constraints.py --vocabulary     # a random Gemma, 256k tokens
    .venv/bin/python scripts/bench_constraints.py --rows 4 --record

The same requests with and without a JSON schema take turns, each first every other time, so that a
machine that drifts drifts for both. The schema is one that an answer never comes to the end of, so
both decode as many tokens. Figures are medians; the ratio is that of the pairs: time per token with
the schema over without. Prints a Markdown table; --record appends to results/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from itertools import islice, product
from pathlib import Path
from typing import Any

import measurement
import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten, tree_map
from tokenizers import decoders, models, pre_tokenizers

from app.engine.client import EngineClient
from app.engine.constraint import Constraint
from app.engine.protocol import Failed, Finished, GenerationRequest, ModelRef, Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "naïve", "free"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["street"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 10_000}
GEMMA: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "vocab_size": 256_000,
}


def write_random_gemma(path: Path) -> Path:
    """A checkpoint of GEMMA with a byte-level vocabulary of as many made-up words."""
    from mlxmodels import registry

    model_class, args_class = registry.model_classes(GEMMA)
    model = model_class(args_class.from_dict(GEMMA))
    mx.random.seed(0)
    weights = tree_map(lambda w: mx.random.normal(w.shape) * 0.02, model.parameters())
    path.mkdir()
    (path / "config.json").write_text(json.dumps(GEMMA))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(weights)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(word) for n in (2, 3, 4, 5) for word in product("etaoinshrdlcu", repeat=n))
    spelled = [*alphabet, *(f"Ġ{word}" for word in islice(words, GEMMA["vocab_size"] - 256))]
    vocabulary = {word: id for id, word in enumerate(spelled)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Bench:
    """An engine, and requests that decode `tokens` each."""

    def __init__(self, model: ModelRef, rows: int, tokens: int) -> None:
        self.client = EngineClient()
        self._model = model
        self._rows = rows
        self._tokens = tokens
        self._turn = 0

    async def decode_ms(self, constraint: Constraint | None) -> float:
        """Milliseconds per token of `rows` requests at once."""
        self._turn += 1
        seconds = await asyncio.gather(*(self._one(i, constraint) for i in range(self._rows)))
        return statistics.mean(seconds) / (self._tokens - 1) * 1000

    async def _one(self, index: int, constraint: Constraint | None) -> float:
        request = GenerationRequest(
            id=f"{self._turn} {index}",
            model=self._model,
            prompt_tokens=[1000 + (i * 7919 + index) % 20_000 for i in range(16)],
            sampling=Sampling(temperature=1, top_p=1, seed=index),
            max_tokens=self._tokens,
            ignore_eos=True,
            constraint=constraint,
        )
        async for event in self.client.stream(request):
            if isinstance(event, Failed):
                raise SystemExit(event.message)
            if isinstance(event, Finished):
                assert event.usage.completion_tokens == self._tokens, event
                seconds = event.timings.decode_s
        return seconds


async def measure(model: ModelRef, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of both, their ratio, and what the first constrained request waits for."""
    bench = Bench(model, arguments.rows, arguments.tokens)
    schema = Constraint("json_schema", json.dumps(SCHEMA))
    await bench.decode_ms(None)
    began = time.perf_counter()
    await bench.decode_ms(schema)
    first = time.perf_counter() - began
    began = time.perf_counter()
    await bench.decode_ms(schema)
    again = time.perf_counter() - began
    pairs: list[tuple[float, float]] = []
    for turn in range(arguments.pairs):
        both: dict[Constraint | None, float] = {}
        for constraint in (None, schema) if turn % 2 else (schema, None):
            both[constraint] = await bench.decode_ms(constraint)
        pairs.append((both[None], both[schema]))
    await bench.client.close()
    ratios = [held / free for free, held in pairs]
    return {
        "model": model.name,
        "rows": arguments.rows,
        "free_ms": round(statistics.median(free for free, _ in pairs), 3),
        "held_ms": round(statistics.median(held for _, held in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
        "vocabulary_s": round(first - again, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="an installed model or a directory")
    parser.add_argument("--vocabulary", action="store_true", help="a random Gemma, 256k tokens")
    parser.add_argument("--rows", type=int, default=1, help="requests at once, all constrained")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = _model(arguments, Path(directory) / "random gemma, 256k tokens")
        row = measurement.machine() | asyncio.run(measure(model, arguments))
    print("| model | rows | ms a token | with a schema | ratio | the vocabulary takes |")
    print("|---|---|---|---|---|---|")
    print(
        "| {model} | {rows} | {free_ms} | {held_ms} | {ratio} ({least} to {greatest}) "
        "| {vocabulary_s} s |".format(**row)
    )
    if arguments.record:
        measurement.append_csv(measurement.results_file("-constraints"), [row])


def _model(arguments: argparse.Namespace, place: Path) -> ModelRef:
    if arguments.vocabulary:
        return ModelRef(place.name, str(write_random_gemma(place)))
    from app.library.installed import find_model

    return find_model(arguments.model, allow_path=True).ref


if __name__ == "__main__":
    main()
