"""Bias, penalties and forbidden ends of sequence against their definitions in float64, and the
counts behind them as rows join and leave."""

from __future__ import annotations

import math
import random

import mlx.core as mx
import numpy as np
import pytest

from app.engine.batch import Row
from app.engine.penalties import Penalties
from app.engine.protocol import GenerationRequest, ModelRef, Sampling
from app.engine.sampling import NEVER, RowSampling

REQUEST = GenerationRequest(id="a", model=ModelRef("m", "/m"), prompt_tokens=[0])


def row_of(asked: Sampling, prompt: list[int], **more: object) -> Row:
    row = Row(REQUEST, lambda event: None, prompt)
    row.sampling = RowSampling.of(asked, **more)  # type: ignore[arg-type]
    return row


def definition(logits: np.ndarray, row: Row, answer: list[int]) -> np.ndarray:
    """Logits [V] of one row, in float64."""
    assert row.sampling is not None
    s, logits = row.sampling, logits.astype(np.float64)
    for token, value in s.logit_bias:
        logits[token] += value
    for token in {*row.prompt, *answer}:
        if logits[token] > 0:
            logits[token] /= s.repetition_penalty
        else:
            logits[token] *= s.repetition_penalty
    for token in set(answer):
        logits[token] -= s.presence_penalty + s.frequency_penalty * answer.count(token)
    if len(answer) < s.min_tokens:
        logits[list(s.eos_token_ids)] = -math.inf
    return logits


CASES = {
    "nothing": Sampling(),
    "repetition": Sampling(repetition_penalty=1.3),
    "reward": Sampling(repetition_penalty=0.5),
    "presence": Sampling(presence_penalty=0.7),
    "frequency": Sampling(frequency_penalty=-1.1),
    "bias": Sampling(logit_bias={0: -100, 3: 2.5, 4: 100}),
    "all": Sampling(
        repetition_penalty=1.2,
        presence_penalty=-2,
        frequency_penalty=0.3,
        logit_bias={1: -1.5, 2: 0.25},
    ),
}


@pytest.mark.parametrize("size", [5, 17, 300])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ends", [0, 3, NEVER])
def test_each_change_is_its_definition(case: str, size: int, ends: int) -> None:
    rng = np.random.default_rng(size)
    for kind in ("normal", "tied", "huge", "some impossible"):
        row = row_of(CASES[case], [1, 1, 2], eos_token_ids=[4, 0], min_tokens=ends)
        penalties, answer = Penalties(), list[int]()
        penalties.follow([row], size)
        for _ in range(6):
            logits = rng.normal(0, 3, size).astype(np.float32)
            if kind == "tied":
                logits = logits.round()
            elif kind == "huge":
                logits *= 1e4
            elif kind == "some impossible":
                logits[rng.random(size) < 0.3] = -math.inf
            changed = np.array(penalties.apply(mx.array(logits)[None]))[0]
            np.testing.assert_allclose(changed, definition(logits, row, answer), rtol=1e-5)
            token = int(rng.integers(size))
            answer.append(token)
            row.launched += 1
            penalties.count(mx.array([token], mx.int32))


def test_rows_that_ask_for_nothing_keep_their_very_logits() -> None:
    logits = mx.random.normal((2, 50)).astype(mx.bfloat16)
    penalties = Penalties()
    penalties.follow([row_of(Sampling(), [1]), row_of(Sampling(), [2])], 50)
    penalties.count(mx.array([3, 4]))
    assert penalties.apply(logits) is logits
    assert penalties.nbytes == 0


def test_counts_are_right_whoever_joins_and_leaves() -> None:
    """Rows of all kinds come and go at random steps; each keeps what it would have alone."""
    order, size = random.Random(7), 40
    batch: list[Row] = []
    answers: dict[int, list[int]] = {}
    penalties = Penalties()
    followed: list[Row] = []
    for step in range(200):
        stay = [row for row in batch if order.random() < 0.85]
        joins = [
            row_of(
                CASES[order.choice(list(CASES))],
                order.choices(range(size), k=order.randint(1, 30)),
                eos_token_ids=[5],
                min_tokens=order.choice([0, 4]),
            )
            for _ in range(order.choice([0, 0, 1, 2]))
        ]
        answers |= {id(row): [] for row in joins}
        batch = stay + joins
        if not batch:
            penalties = Penalties()
            continue
        if batch != followed:
            penalties.follow(batch, size)
            followed = list(batch)
        logits = mx.random.normal((len(batch), size), key=mx.random.key(step)) * 4
        before = np.array(logits)
        changed = np.array(penalties.apply(logits))
        assert (np.array(logits) == before).all(), "the model's own logits must stay: logprobs"
        for i, row in enumerate(batch):
            expected = definition(before[i], row, answers[id(row)])
            np.testing.assert_allclose(changed[i], expected, rtol=1e-5, err_msg=f"step {step}")
        tokens = [order.randrange(size) for _ in batch]
        penalties.count(mx.array(tokens, mx.int32))
        for row, token in zip(batch, tokens, strict=True):
            answers[id(row)].append(token)
            row.launched += 1
    counted = [row for row in batch if row.sampling is not None and row.sampling.has_penalty]
    assert penalties.nbytes == len(counted) * size * 5


def test_a_row_changes_by_the_same_bits_alone_and_among_others() -> None:
    size, steps = 61, 5
    rows = [
        row_of(asked, [i, 2, 2], eos_token_ids=[9], min_tokens=i % 3)
        for i, asked in enumerate(CASES.values())
    ]
    together, lone = Penalties(), [Penalties() for _ in rows]
    together.follow(rows, size)
    for penalties, row in zip(lone, rows, strict=True):
        penalties.follow([row], size)
    for step in range(steps):
        logits = mx.random.normal((len(rows), size), key=mx.random.key(step)) * 3
        changed = np.array(together.apply(logits))
        for i, penalties in enumerate(lone):
            alone = np.array(penalties.apply(logits[i : i + 1]))[0]
            assert (changed[i] == alone).all(), (step, i)
        tokens = mx.array([(step * i) % size for i in range(len(rows))], mx.int32)
        together.count(tokens)
        for i, penalties in enumerate(lone):
            penalties.count(tokens[i : i + 1])
        for row in rows:
            row.launched += 1
