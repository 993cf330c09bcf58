"""Choosing the next token of every row at once, each row by its own rules and its own generator.

A row is sampled by inverting its cumulative distribution at one uniform number that comes from the
row's own generator on the host. So a seeded row draws the same tokens whatever else is in the
batch, and rows with different settings need no loop.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from app.engine.protocol import HOUSE_SAMPLING, Sampling, check_sampling
from app.errors import GryphonError

# The largest float32 below 1: a uniform that rounds up to 1 would select past the last token.
_BELOW_ONE = 1.0 - 2.0**-24


class RowGenerator:
    """Uniform numbers of one row, in order; the same seed gives the same sequence."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)

    def uniform(self) -> float:
        return min(self._random.random(), _BELOW_ONE)


@dataclass(frozen=True)
class RowSampling:
    """The settings of one row, with nothing left open; as in `app.engine.protocol.Sampling`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float

    @classmethod
    def of(cls, asked: Sampling, recommended: Sampling = HOUSE_SAMPLING) -> RowSampling:
        """What a request asks for, then what the model recommends, then the house's settings."""

        def first(name: str) -> Any:
            choices = (getattr(source, name) for source in (asked, recommended, HOUSE_SAMPLING))
            return next(choice for choice in choices if choice is not None)

        return cls(first("temperature"), first("top_p"), first("top_k"), first("min_p"))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5  # below it logits / temperature may overflow

    @property
    def has_filter(self) -> bool:
        return not self.is_greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def recommended_sampling(generation_config: Mapping[str, Any]) -> Sampling:
    """What a model's generation_config.json recommends; values out of range are left open.

    `do_sample: false` is not taken for greedy decoding: it is what the file says by default.
    """
    known: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value: Any = generation_config.get(name)
        if type(value) in (int, float) and 0 <= value < 2**31:
            candidate: dict[str, Any] = {name: int(value) if name == "top_k" else float(value)}
            with contextlib.suppress(GryphonError):
                check_sampling(Sampling(**candidate))
                known |= candidate
    return Sampling(**known)


@dataclass(frozen=True)
class BatchSampling:
    """The settings of a batch of B rows as columns, built when rows join or leave.

    Attributes:
        temperature, top_p, min_p: [B, 1] float32; temperature is 1 where a row is greedy.
        top_k: [B, 1] int32; larger than any vocabulary where off.
        greedy: [B] bool.
        filtered: [B, 1] bool, rows that top_k, top_p or min_p apply to.
    """

    temperature: mx.array
    top_p: mx.array
    top_k: mx.array
    min_p: mx.array
    greedy: mx.array
    filtered: mx.array
    all_greedy: bool
    any_filter: bool

    @classmethod
    def of(cls, rows: Sequence[RowSampling]) -> BatchSampling:
        def column(values: list[float], dtype: mx.Dtype = mx.float32) -> mx.array:
            return mx.array(values, dtype=dtype)[:, None]

        return cls(
            temperature=column([row.temperature or 1.0 for row in rows]),
            top_p=column([row.top_p for row in rows]),
            top_k=column([row.top_k or 2**31 - 1 for row in rows], mx.int32),
            min_p=column([row.min_p for row in rows]),
            greedy=mx.array([row.is_greedy for row in rows]),
            filtered=mx.array([row.has_filter for row in rows])[:, None],
            all_greedy=all(row.is_greedy for row in rows),
            any_filter=any(row.has_filter for row in rows),
        )


def sample(logits: mx.array, settings: BatchSampling, uniforms: list[float]) -> mx.array:
    """Next token of each row: temperature, then top_k, top_p and min_p on what is left.

    Args:
        logits: [B, V], any float dtype; the arithmetic is float32.
        settings: The rows' settings, B of them.
        uniforms: One number in [0, 1) per row; unused for greedy rows.

    Returns:
        Token ids, [B] int32. A greedy row takes the first of its most likely tokens.
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    if settings.all_greedy:
        return best
    probs = mx.softmax(logits.astype(mx.float32) / settings.temperature, axis=-1)
    if settings.any_filter:
        probs = mx.where(settings.filtered, _filter(probs, settings), probs)
    # In the order of the vocabulary, so that what a row draws does not depend on its neighbours.
    cumulative = mx.cumsum(probs, axis=-1)
    threshold = mx.array(uniforms, dtype=mx.float32)[:, None] * cumulative[:, -1:]
    index = (cumulative <= threshold).sum(axis=-1)
    index = mx.minimum(index, logits.shape[-1] - 1).astype(mx.int32)
    return mx.where(settings.greedy, best, index)


def _filter(probs: mx.array, settings: BatchSampling) -> mx.array:
    """Probabilities [B, V] with what top_k, top_p and min_p drop set to zero; not normalized."""
    order = mx.argsort(-probs, axis=-1)
    ranked = mx.take_along_axis(probs, order, axis=-1)
    rank = mx.arange(probs.shape[-1])[None]
    ranked = mx.where(rank < settings.top_k, ranked, 0.0)
    ranked = ranked / ranked.sum(axis=-1, keepdims=True)
    # A token stays while those before it have not reached top_p yet, so the first always stays.
    before = mx.cumsum(ranked, axis=-1, inclusive=False)
    keep = (before < settings.top_p) | (rank == 0)
    keep = keep & (ranked >= settings.min_p * ranked[:, :1])
    return mx.put_along_axis(mx.zeros_like(probs), order, mx.where(keep, ranked, 0.0), axis=-1)


def logprobs_of(logits: mx.array) -> mx.array:
    """Log-probabilities of the model itself, before temperature and filters: [B, V] float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def top_logprobs(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` most likely tokens of each row, most likely first: ids, logprobs [B, count]."""
    count = min(count, logprobs.shape[-1])
    ids = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
