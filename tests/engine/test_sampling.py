"""Sampling: exact sets, exact distributions, and rows that do not disturb each other."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from app.engine.protocol import Sampling
from app.engine.sampling import (
    BatchSampling,
    RowGenerator,
    RowSampling,
    logprobs_of,
    recommended_sampling,
    sample,
    top_logprobs,
)

VOCAB = 50


def _logits(rows: int = 1, seed: int = 0) -> mx.array:
    return mx.random.normal((rows, VOCAB), key=mx.random.key(seed)) * 2


def _settings(*rows: Sampling) -> BatchSampling:
    return BatchSampling.of([RowSampling.of(row) for row in rows])


def _draw(logits: mx.array, sampling: Sampling, count: int) -> list[int]:
    """`count` draws of one row, at evenly spaced uniforms: the whole distribution, no luck."""
    rows = mx.broadcast_to(logits, (count, VOCAB))
    uniforms = [(i + 0.5) / count for i in range(count)]
    return sample(rows, _settings(*[sampling] * count), uniforms).tolist()


def _softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = _logits(3)
    settings = _settings(*[Sampling(temperature=0)] * 3)
    assert sample(logits, settings, [0.1, 0.5, 0.99]).tolist() == mx.argmax(logits, -1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_those_of_the_tempered_softmax(temperature: float) -> None:
    logits = _logits()
    drawn = _draw(logits, Sampling(temperature=temperature), 20000)
    frequencies = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    expected = _softmax(np.array(logits)[0] / temperature)
    assert np.abs(frequencies - expected).max() < 2e-4


def _kept(probs: np.ndarray, sampling: RowSampling) -> set[int]:
    """The tokens that may be drawn, by the definition: top_k, then top_p, then min_p."""
    order = sorted(range(VOCAB), key=lambda i: -probs[i])
    order = order[: sampling.top_k or VOCAB]
    total = sum(probs[i] for i in order)
    kept, before = [], 0.0
    for token in order:
        if before < sampling.top_p or not kept:
            kept.append(token)
        before += probs[token] / total
    return {token for token in kept if probs[token] >= sampling.min_p * probs[order[0]]}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=0.8, top_p=0.5),
        Sampling(temperature=1.0, top_p=0.0),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=repr,
)
def test_filters_keep_exactly_the_tokens_of_their_definition(sampling: Sampling) -> None:
    logits = _logits(seed=3)
    probs = _softmax(np.array(logits)[0] / sampling.temperature)
    kept = _kept(probs, RowSampling.of(sampling))
    drawn = _draw(logits, sampling, 20000)
    assert set(drawn) == kept
    frequencies = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    expected = np.array([probs[i] if i in kept else 0.0 for i in range(VOCAB)])
    assert np.abs(frequencies - expected / expected.sum()).max() < 3e-4


def test_a_row_draws_the_same_in_a_mixed_batch_as_alone() -> None:
    logits = _logits(8, seed=7)
    rows = [
        Sampling(temperature=0),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.5, top_k=3, min_p=0.1),
        Sampling(temperature=1.1, top_k=30, top_p=0.9),
        Sampling(temperature=1.0, typical_p=0.5),
        Sampling(temperature=1.3, xtc_threshold=0.05),
        Sampling(temperature=0.9, top_k=20, typical_p=0.9, top_p=0.8, min_p=0.05),
    ]
    generator = RowGenerator(0)
    for step in range(100):
        uniforms = [generator.uniform() for _ in rows]
        exclude_top = [i % 2 == step % 2 for i in range(len(rows))]
        together = sample(logits, _settings(*rows), uniforms, exclude_top).tolist()
        alone = [
            sample(logits[i : i + 1], _settings(row), [uniforms[i]], [exclude_top[i]]).item()
            for i, row in enumerate(rows)
        ]
        assert together == alone


def test_a_neighbours_filters_do_not_cut_a_rows_own_tail() -> None:
    """The last token has all the probability that float32 can see, the first has 1.4e-11."""
    logits = mx.array([[-25.0] * (VOCAB - 1) + [0.0]] * 3)
    plain = Sampling(temperature=1.0)
    settings = _settings(plain, Sampling(top_p=0.5), Sampling(typical_p=0.5))
    assert sample(logits, settings, [1e-11] * 3).tolist() == [0, VOCAB - 1, VOCAB - 1]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_the_ends_of_the_uniform_range_draw_a_possible_token(uniform: float) -> None:
    logits = mx.array([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    settings = _settings(Sampling(temperature=1.0))
    assert sample(logits, settings, [uniform]).item() in (1, 3)


def test_a_seed_fixes_the_sequence_and_no_seed_does_not() -> None:
    def sequence(seed: int | None) -> list[float]:
        generator = RowGenerator(seed)
        return [generator.uniform() for _ in range(8)]

    assert sequence(5) == sequence(5) != sequence(6)
    assert sequence(None) != sequence(None)
    assert all(0 <= u < 1 for u in sequence(5))


def test_a_coin_takes_one_uniform_and_falls_as_often_as_asked() -> None:
    tossed, plain = RowGenerator(3), RowGenerator(3)
    for chance in (0.0, 0.3, 1.0):
        uniforms = [plain.uniform() for _ in range(2000)]
        coins = [tossed.coin(chance) for _ in range(2000)]
        assert coins == [uniform < chance for uniform in uniforms]
        assert sum(coins) / 2000 == pytest.approx(chance, abs=0.04)


def test_greedy_rows_take_the_most_likely_token_whatever_the_filters() -> None:
    logits = _logits()
    asked = Sampling(temperature=0, typical_p=0.01, top_p=0.5, top_k=3, min_p=0.5)
    settings = _settings(asked, Sampling(temperature=1.0, typical_p=0.5))
    rows = mx.broadcast_to(logits, (2, VOCAB))
    assert sample(rows, settings, [0.9, 0.9], [True, True])[0].item() == mx.argmax(logits).item()


def test_logprobs_are_the_models_own_and_sorted() -> None:
    logits = _logits(2)
    logprobs = logprobs_of(logits)
    expected = np.log(np.stack([_softmax(row) for row in np.array(logits)]))
    assert np.abs(np.array(logprobs) - expected).max() < 1e-5
    ids, values = top_logprobs(logprobs, 4)
    for row in range(2):
        best = sorted(range(VOCAB), key=lambda i: -expected[row, i])[:4]
        assert ids[row].tolist() == best
        assert values[row].tolist() == pytest.approx([expected[row, i] for i in best], abs=1e-5)


def test_more_top_logprobs_than_tokens_gives_all_of_them() -> None:
    ids, _ = top_logprobs(logprobs_of(_logits()), VOCAB + 10)
    assert sorted(ids[0].tolist()) == list(range(VOCAB))


def test_open_settings_come_from_the_model_then_from_the_house() -> None:
    model = recommended_sampling({"temperature": 0.2, "top_p": 0.9, "do_sample": True})
    assert RowSampling.of(Sampling(), model) == RowSampling(0.2, 0.9, 0, 0.0)
    assert RowSampling.of(Sampling(temperature=0, top_k=5), model) == RowSampling(0, 0.9, 5, 0.0)
    assert RowSampling.of(Sampling()) == RowSampling(0.7, 1.0, 0, 0.0)


def test_a_generation_config_recommends_a_repetition_penalty() -> None:
    config = {"repetition_penalty": 1.1, "typical_p": 0.9, "presence_penalty": 1.0}
    model = recommended_sampling(config)
    assert model == Sampling(repetition_penalty=1.1, typical_p=0.9)
    assert RowSampling.of(Sampling(), model).has_penalty
    assert not RowSampling.of(Sampling(repetition_penalty=1.0), model).has_penalty
    assert recommended_sampling({"repetition_penalty": 0}) == Sampling()


@pytest.mark.parametrize("value", [-1, 3.5, "hot", None, True, math.nan, math.inf, [1], 10**400])
def test_nonsense_in_a_generation_config_recommends_nothing(value: object) -> None:
    assert recommended_sampling({"temperature": value}) == Sampling()
