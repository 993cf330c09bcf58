"""Every transformation against its definition in float64, on random, tied and extreme logits.

A token is drawn at the middle of each interval that the definition gives it on the unit line, so a
token kept or dropped wrongly moves what all the others are drawn at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from app.engine import sampling as sampling_module
from app.engine.protocol import Sampling
from app.engine.sampling import BatchSampling, RowSampling, sample

SIZES = [5, 6, 17, 64, 257, 300]
# Keys and sums closer than this are ordered by rounding, not by the definition.
CLOSE = 2e-5


class RoundingDecides(Exception):
    """The definition, computed a little differently, gives another set of tokens."""


@pytest.fixture(params=["sorting", "halving"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of finding the last token taken; which one runs depends on device and size."""
    limit = {"sorting": 2**31, "halving": 1}[request.param]
    limits = dict.fromkeys((mx.DeviceType.cpu, mx.DeviceType.gpu), limit)
    monkeypatch.setattr(sampling_module, "_SORTED_AT_ONCE", limits)


def logits_of_many_kinds(size: int) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(size)
    yield "normal", random.normal(0, 2, size)
    yield "peaked", random.normal(0, 8, size)
    yield "tied", random.integers(-3, 3, size)
    yield "all equal", np.full(size, 1.25)
    yield "two values", np.where(np.arange(size) % 3 == 0, 2.0, -1.0)
    yield "huge", random.integers(-1, 2, size) * 1e4
    yield "some impossible", np.where(random.random(size) < 0.5, -np.inf, random.normal(0, 1, size))
    one = np.full(size, -np.inf)
    one[size // 2] = 3.0
    yield "one possible", one


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def taken_until(keys: np.ndarray, probs: np.ndarray, share: float) -> set[int]:
    """Largest key first, equal ones by id, until the share is reached."""
    probs = probs / probs.sum()
    order = sorted(np.flatnonzero(probs > 0), key=lambda i: (-keys[i], i))
    sets = []
    for goal in (share - 1e-6, share, share + 1e-6):
        taken, mass = [], 0.0
        for token in order:
            if mass >= goal and taken:
                break
            taken.append(int(token))
            mass += probs[token]
        sets.append(set(taken))
    if sets[0] != sets[2]:
        raise RoundingDecides
    return sets[1]


def only(probs: np.ndarray, kept: set[int]) -> np.ndarray:
    left = np.array([p if i in kept else 0.0 for i, p in enumerate(probs)])
    return left / left.sum()


def definition(logits: np.ndarray, row: RowSampling, exclude_top: bool = False) -> np.ndarray:
    """Probabilities of the next token in float64."""
    logits = (logits.astype(np.float32) / np.float32(row.temperature)).astype(np.float64)
    probs = softmax(logits)
    ids = range(len(probs))
    if row.top_k:
        probs = only(probs, set(sorted(ids, key=lambda i: (-logits[i], i))[: row.top_k]))
    if row.typical_p < 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probs)
            expected = np.nansum(probs * surprise)
        distance = np.abs(surprise - expected)
        distance[probs == 0] = np.inf
        taken = taken_until(-distance, probs, row.typical_p)
        last = max(distance[i] for i in taken)
        beside = np.abs(distance - last) < CLOSE
        if len(np.unique(logits[beside])) > 1:  # on the two sides of what is expected
            raise RoundingDecides
        probs = only(probs, taken)
    if row.top_p < 1:
        probs = only(probs, taken_until(logits, probs, row.top_p))
    if row.min_p > 0:
        limit = logits[probs > 0].max() + math.log(row.min_p)
        if row.min_p < 1 and (np.abs(logits - limit) < CLOSE).any():
            raise RoundingDecides
        probs = only(probs, {i for i in ids if logits[i] >= limit and probs[i] > 0})
    if exclude_top:
        if (np.abs(probs - row.xtc_threshold) < 1e-6).any() and row.xtc_threshold > 0:
            raise RoundingDecides
        likely = {i for i in ids if probs[i] >= row.xtc_threshold and probs[i] > 1e-30}
        least = min((logits[i] for i in likely), default=0.0)
        excluded = {i for i in likely if logits[i] > least}
        if not excluded & {*row.eos_token_ids, *row.newline_ids}:
            probs = only(probs, set(ids) - excluded)
    return probs


def assert_drawn_as_defined(
    logits: np.ndarray, row: RowSampling, *, exclude_top: bool = False
) -> None:
    probs = definition(logits, row, exclude_top)
    ends = np.cumsum(probs)
    tokens = np.flatnonzero(probs > 4e-5)  # narrower than that float32 sums do not resolve
    uniforms = [float(ends[i] - probs[i] / 2) for i in tokens]
    rows = mx.broadcast_to(mx.array(logits.astype(np.float32)), (len(tokens), len(logits)))
    settings = BatchSampling.of([row] * len(tokens))
    drawn = sample(rows, settings, uniforms, [exclude_top] * len(tokens))
    assert drawn.tolist() == tokens.tolist()


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=4),
    Sampling(temperature=1.3, top_k=50),
    Sampling(temperature=1.0, top_k=2**31 - 1),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=1.0, top_p=0.31),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.9999),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, typical_p=0.0),
    Sampling(temperature=1.0, typical_p=0.23),
    Sampling(temperature=1.0, typical_p=0.9),
    Sampling(temperature=1.0, typical_p=0.3, min_p=0.8),
    Sampling(temperature=0.8, top_k=12, typical_p=0.9, top_p=0.8, min_p=0.02),
]


def named(asked: Sampling) -> str:
    given = {name: getattr(asked, name) for name in asked.__struct_fields__}
    return ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)


@pytest.mark.parametrize("asked", CASES, ids=named)
def test_filters_are_their_definitions(asked: Sampling) -> None:
    skipped = tried = 0
    for size in SIZES:
        for name, logits in logits_of_many_kinds(size):
            tried += 1
            try:
                assert_drawn_as_defined(logits, RowSampling.of(asked))
            except RoundingDecides:
                skipped += 1
            except AssertionError as error:
                raise AssertionError(f"{name}, {size} tokens") from error
    assert skipped < tried * 0.2, f"{skipped} of {tried} are decided by rounding"


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.34])
@pytest.mark.parametrize("top_k", [0, 9])
def test_xtc_leaves_the_least_likely_of_the_top_choices(top_k: int, threshold: float) -> None:
    asked = Sampling(temperature=1.1, top_k=top_k, xtc_threshold=threshold)
    tried = skipped = 0
    for size in SIZES:
        for name, logits in logits_of_many_kinds(size):
            best = int(np.argmax(logits))
            for protected, newlines in (([], []), ([best], []), ([], [best]), ([0], [1])):
                tried += 1
                row = RowSampling.of(asked, eos_token_ids=protected, newline_ids=newlines)
                try:
                    assert_drawn_as_defined(logits, row, exclude_top=True)
                except RoundingDecides:
                    skipped += 1
                except AssertionError as error:
                    raise AssertionError(
                        f"{name}, {size} tokens, {protected}, {newlines}"
                    ) from error
    assert skipped < tried * 0.2, f"{skipped} of {tried} are decided by rounding"


def test_equally_likely_tokens_are_taken_in_the_order_of_their_ids() -> None:
    """Eight tokens of 1/8 each: shares that end on a token and shares that end inside one."""
    logits = np.zeros(8)
    for asked, kept in (
        (Sampling(temperature=1.0, top_p=0.5), 4),
        (Sampling(temperature=1.0, top_p=0.51), 5),
        (Sampling(temperature=1.0, typical_p=0.25), 2),
        (Sampling(temperature=1.0, typical_p=0.26), 3),
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_k=6, top_p=0.5), 3),
    ):
        draws = 64
        rows = mx.broadcast_to(mx.array(logits, mx.float32), (draws, 8))
        uniforms = [(i + 0.5) / draws for i in range(draws)]
        settings = BatchSampling.of([RowSampling.of(asked)] * draws)
        assert set(sample(rows, settings, uniforms).tolist()) == set(range(kept)), asked


def test_a_whole_vocabulary_is_filtered_as_defined() -> None:
    """49152 tokens, so that a dozen halvings happen; 200 of them can be told apart."""
    random = np.random.default_rng(5)
    logits = random.normal(0, 1, 49152)
    for asked in (
        Sampling(temperature=0.25, top_p=0.7),
        Sampling(temperature=0.2, top_p=0.97),
        Sampling(temperature=0.25, top_k=64, top_p=0.95),
    ):
        assert_drawn_as_defined(logits, RowSampling.of(asked))
