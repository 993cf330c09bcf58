"""Answers held to JSON schemas drawn at random: each that ended by itself is valid, in a batch with
rows that are held to nothing and give what they give alone.

The models have random weights and a temperature of 1, so they try everything that they are let.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import jsonschema
import pytest

from app.engine.client import EngineClient
from app.engine.constraint import Constraint
from app.engine.protocol import (
    Finished,
    GenerationRequest,
    ModelRef,
    Sampling,
    Token,
)

from ..json_schemas import random_schema
from ..rounds import rounds
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

FAMILIES = {
    # Three tokens to end with, one of which is a letter in any other model.
    "open_llama": OPEN_LLAMA | {"eos_token_id": [258, 257, 57]},
    "recurrent_gemma": RECURRENT_GEMMA,  # none at all
}
SCHEMAS = 5


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("constrained")
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in FAMILIES.items()
    }


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


async def answer(client: EngineClient, request: GenerationRequest) -> tuple[list[int], str, str]:
    """Token ids, text and why it ended."""
    events = [event async for event in client.stream(request)]
    end = events[-1]
    assert isinstance(end, Finished), end
    tokens = [event for event in events if isinstance(event, Token)]
    text = "".join(token.text for token in tokens) + end.text
    return [token.token_id for token in tokens], text, end.reason


@pytest.mark.parametrize("number", rounds(2))
@pytest.mark.parametrize("family", FAMILIES)
async def test_an_answer_that_ends_by_itself_is_valid(
    client: EngineClient,
    checkpoints: dict[str, ModelRef],
    record_property: Callable[[str, object], None],
    family: str,
    number: int,
) -> None:
    draw = random.Random(f"{family} {number}")

    def request(id: str, **fields: Any) -> GenerationRequest:
        seed = draw.randrange(2**32)
        return GenerationRequest(
            id=id,
            model=checkpoints[family],
            prompt_tokens=[draw.randrange(256) for _ in range(draw.randint(1, 40))],
            sampling=Sampling(temperature=1, top_k=0, top_p=1, seed=seed),
            **fields,
        )

    schemas = [random_schema(draw) for _ in range(SCHEMAS)]
    held = [
        request(f"s{i}", constraint=Constraint("json_schema", json.dumps(schema)), max_tokens=400)
        for i, schema in enumerate(schemas)
    ]
    # Long enough to be there all the time: the neighbours come and go.
    free = [request(f"f{i}", max_tokens=120) for i in range(2)]
    # The same with nothing beside them.
    lone = [await answer(client, each) for each in [free[0], held[0]]]
    together = await asyncio.gather(*(answer(client, each) for each in free + held))
    assert [together[0], together[len(free)]] == lone

    counted = Counter({"schemas": 0, "ended_by_themselves": 0, "cut_by_length": 0, "tokens": 0})
    for schema, (tokens, text, reason) in zip(schemas, together[len(free) :], strict=True):
        counted["schemas"] += 1
        counted["tokens"] += len(tokens)
        if reason == "length":
            counted["cut_by_length"] += 1
            assert len(tokens) == 400
            continue
        assert reason == "stop"
        counted["ended_by_themselves"] += 1
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(
            json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker
        )
    for name, count in counted.items():
        record_property(name, count)
    assert counted["ended_by_themselves"]
