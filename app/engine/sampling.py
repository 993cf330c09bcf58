"""Choosing the next token of every row at once, each row by its own rules and its own generator.

A row is sampled by inverting its cumulative distribution at one uniform number that comes from the
row's own generator on the host. So a seeded row draws the same tokens whatever else is in the
batch, and rows with different settings need no loop.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from app.engine.protocol import HOUSE_SAMPLING, Sampling, check_sampling
from app.errors import GryphonError

NEVER = 2**31 - 1

# The largest float32 below 1: a uniform that rounds up to 1 would select past the last token.
_BELOW_ONE = 1.0 - 2.0**-24


class RowGenerator:
    """Uniform numbers of one row, in order; the same seed gives the same sequence."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)
        self._returned: list[float] = []  # the next one last

    def uniform(self) -> float:
        return self._returned.pop() if self._returned else min(self._random.random(), _BELOW_ONE)

    def take_back(self, numbers: Sequence[float]) -> None:
        """These were drawn last, in this order, and not used: they come next again."""
        self._returned.extend(reversed(numbers))

    def coin(self, probability: float) -> bool:
        """True this often; takes one uniform whatever comes out."""
        return self.uniform() < probability


@dataclass(frozen=True)
class RowSampling:
    """The settings of one row, with nothing left open; as in `app.engine.protocol.Sampling`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    """What ends a sequence; XTC does not take these away."""
    newline_ids: tuple[int, ...] = ()
    """Nor these."""
    min_tokens: int = 0
    """How many tokens are drawn before one of `eos_token_ids` may be; `NEVER` is for ever."""

    @classmethod
    def of(
        cls,
        asked: Sampling,
        recommended: Sampling = HOUSE_SAMPLING,
        *,
        eos_token_ids: Iterable[int] = (),
        newline_ids: Iterable[int] = (),
        min_tokens: int = 0,
    ) -> RowSampling:
        """What a request asks for, then what the model recommends, then the house's settings."""

        def first(name: str) -> Any:
            choices = (getattr(source, name) for source in (asked, recommended, HOUSE_SAMPLING))
            return next(choice for choice in choices if choice is not None)

        return cls(
            **{name: first(name) for name in (*_RECOMMENDED, *_ASKED_ONLY)},
            logit_bias=tuple(first("logit_bias").items()),
            eos_token_ids=tuple(sorted(eos_token_ids)),
            newline_ids=tuple(newline_ids),
            min_tokens=min_tokens,
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5  # below it logits / temperature may overflow

    @property
    def has_penalty(self) -> bool:
        """Whether the row's tokens so far change what comes next."""
        none = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return not none


# Settings that a generation_config.json may hold, by the same names, and those that it may not.
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
_ASKED_ONLY = ("xtc_probability", "xtc_threshold", "presence_penalty", "frequency_penalty")


def recommended_sampling(generation_config: Mapping[str, Any]) -> Sampling:
    """What a model's generation_config.json recommends; values out of range are left open.

    `do_sample: false` is not taken for greedy decoding: it is what the file says by default.
    """
    known: dict[str, Any] = {}
    for name in _RECOMMENDED:
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
        temperature, typical_p, top_p, xtc_threshold: [B, 1] float32; temperature is 1 and the
            filters are off where a row is greedy.
        log_min_p: [B, 1] float32, -inf where off.
        top_k: [B, 1] int32; larger than any vocabulary where off.
        greedy: [B] bool.
        most_top_k: The largest top_k that is on; 0 if none is.
        protected: What XTC does not take away; the same for all rows, as their model is.
    """

    temperature: mx.array
    top_k: mx.array
    typical_p: mx.array
    top_p: mx.array
    log_min_p: mx.array
    xtc_threshold: mx.array
    greedy: mx.array
    all_greedy: bool
    most_top_k: int
    any_typical_p: bool
    any_top_p: bool
    any_min_p: bool
    protected: list[int]

    @classmethod
    def of(cls, rows: Sequence[RowSampling]) -> BatchSampling:
        def column(values: list[float], dtype: mx.Dtype = mx.float32) -> mx.array:
            return mx.array(values, dtype=dtype)[:, None]

        top_k = [0 if row.is_greedy else row.top_k for row in rows]
        typical_p = [1.0 if row.is_greedy else row.typical_p for row in rows]
        top_p = [1.0 if row.is_greedy else row.top_p for row in rows]
        min_p = [0.0 if row.is_greedy else row.min_p for row in rows]
        return cls(
            temperature=column([1.0 if row.is_greedy else row.temperature for row in rows]),
            top_k=column([k or 2**31 - 1 for k in top_k], mx.int32),
            typical_p=column(typical_p),
            top_p=column(top_p),
            log_min_p=column([math.log(p) if p > 0 else -math.inf for p in min_p]),
            xtc_threshold=column([row.xtc_threshold for row in rows]),
            greedy=mx.array([row.is_greedy for row in rows]),
            all_greedy=all(row.is_greedy for row in rows),
            most_top_k=max(top_k, default=0),
            any_typical_p=min(typical_p, default=1.0) < 1,
            any_top_p=min(top_p, default=1.0) < 1,
            any_min_p=max(min_p, default=0.0) > 0,
            protected=sorted({id for row in rows for id in row.eos_token_ids + row.newline_ids}),
        )


def sample(
    logits: mx.array,
    settings: BatchSampling,
    uniforms: list[float],
    exclude_top: Sequence[bool] = (),
) -> mx.array:
    """Next token of each row: temperature, then the filters, then one draw.

    Args:
        logits: [B, V], any float dtype; the arithmetic is float32. Bias and penalties are in them.
        settings: The rows' settings, B of them.
        uniforms: One number in [0, 1) per row; unused for greedy rows.
        exclude_top: Per row, whether XTC applies in this step; empty is nowhere.

    Returns:
        Token ids, [B] int32. A greedy row takes the first of its most likely tokens.
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    if settings.all_greedy:
        return best
    logits = logits.astype(mx.float32) / settings.temperature
    probs = _filter(logits, mx.softmax(logits, axis=-1), settings)
    if any(exclude_top):
        probs = _exclude_top(logits, probs, settings, mx.array(list(exclude_top))[:, None])
    # In the order of the vocabulary, so that what a row draws does not depend on its neighbours.
    cumulative = mx.cumsum(probs, axis=-1)
    threshold = mx.array(uniforms, dtype=mx.float32)[:, None] * cumulative[:, -1:]
    index = (cumulative <= threshold).sum(axis=-1)
    index = mx.minimum(index, logits.shape[-1] - 1).astype(mx.int32)
    # A GPU sums in parallel, so sums over the same numbers and some zeros may differ in their last
    # bits: what was dropped must not be drawn for that.
    chance = mx.take_along_axis(probs, index[:, None], axis=-1)[:, 0]
    index = mx.where(chance > 0, index, best)
    return mx.where(settings.greedy, best, index)


def _filter(logits: mx.array, probs: mx.array, settings: BatchSampling) -> mx.array:
    """Probabilities [B, V] with what the filters drop set to zero; not normalized.

    Each step works on rows alone, whatever other rows ask for, and leaves those as they are that
    did not ask for it: so a row's probabilities are the same bits in any batch.
    """
    if settings.most_top_k:
        probs = mx.where(_top_k(logits, settings), probs, 0.0)
    if settings.any_typical_p:
        typical = _until(_typicality(logits, probs), probs, settings.typical_p)
        probs = mx.where(typical | (settings.typical_p >= 1), probs, 0.0)
    if settings.any_top_p:
        nucleus = _until(logits, probs, settings.top_p)
        probs = mx.where(nucleus | (settings.top_p >= 1), probs, 0.0)
    if settings.any_min_p:
        best = mx.where(probs > 0, logits, -mx.inf).max(axis=-1, keepdims=True)
        probs = mx.where(logits >= best + settings.log_min_p, probs, 0.0)
    return probs


def _top_k(logits: mx.array, settings: BatchSampling) -> mx.array:
    """Which tokens top_k keeps: [B, V] bool."""
    count = min(settings.most_top_k, logits.shape[-1])
    largest = mx.sort(mx.partition(-logits, kth=count - 1, axis=-1)[:, :count], axis=-1)
    kth = -mx.take_along_axis(largest, mx.minimum(settings.top_k, count) - 1, axis=-1)
    above, equal = logits > kth, logits == kth
    rank = above.sum(axis=-1, keepdims=True) + mx.cumsum(equal.astype(mx.int32), axis=-1)
    return above | (equal & (rank <= settings.top_k)) | (settings.top_k >= logits.shape[-1])


def _typicality(logits: mx.array, probs: mx.array) -> mx.array:
    """How close each token's surprise is to the expected one: [B, V], 0 at best.

    Surprise is -log p, a constant less the logit: so it is as far off as the logit is.

    Args:
        logits: [B, V] float32.
        probs: Their softmax with dropped tokens at zero, not normalized.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)  # small numbers where it matters
    expected = mx.where(probs > 0, probs * logits, 0.0).sum(axis=-1, keepdims=True)
    return -mx.abs(logits - expected / probs.sum(axis=-1, keepdims=True))


# Until how many tokens sorting is as fast as halving. MLX's Metal `argpartition` is a sort.
_SORTED_AT_ONCE = {mx.DeviceType.cpu: 1024, mx.DeviceType.gpu: 2**31}
# Smallest positive normal float32.
_TINY = 2.0**-126


def _until(keys: mx.array, weights: mx.array, share: mx.array) -> mx.array:
    """Which tokens are taken, largest key first and equal ones by id, until `share` is reached.

    Args:
        keys: [B, V].
        weights: [B, V], not negative.
        share: [B, 1], of the row's sum of weights.

    Returns:
        [B, V] bool. The token that reaches the share is taken, so at least one always is.
    """
    goal = mx.maximum(share * weights.sum(axis=-1, keepdims=True), _TINY)
    last = _last_key(keys, weights, goal)
    above, equal = keys > last, keys == last
    before = mx.where(above, weights, 0.0).sum(axis=-1, keepdims=True)
    before = before + mx.cumsum(mx.where(equal, weights, 0.0), axis=-1, inclusive=False)
    return above | (equal & (before < goal))


def _last_key(keys: mx.array, weights: mx.array, goal: mx.array) -> mx.array:
    """The key of the last token that `_until` takes: [B, 1].

    A weighted quickselect: the half that holds the token is kept until few enough are left to sort.
    """
    before = mx.zeros_like(goal)  # weight of the tokens with larger keys than those left
    while (count := keys.shape[-1]) > _SORTED_AT_ONCE[mx.default_device().type]:
        if count % 2:
            keys = mx.pad(keys, [(0, 0), (0, 1)], constant_values=-mx.inf)
            weights = mx.pad(weights, [(0, 0), (0, 1)])
        half = keys.shape[-1] // 2
        order = mx.argpartition(-keys, kth=half - 1, axis=-1)
        upper = mx.take_along_axis(weights, order[:, :half], axis=-1)
        beyond = before + upper.sum(axis=-1, keepdims=True)
        is_lower = beyond < goal
        chosen = mx.where(is_lower, order[:, half:], order[:, :half])
        keys = mx.take_along_axis(keys, chosen, axis=-1)
        weights = mx.take_along_axis(weights, chosen, axis=-1)
        before = mx.where(is_lower, beyond, before)
    order = mx.argsort(-keys, axis=-1)
    ranked = mx.take_along_axis(weights, order, axis=-1)
    before = before + mx.cumsum(ranked, axis=-1, inclusive=False)
    last = mx.maximum((before < goal).sum(axis=-1, keepdims=True), 1) - 1
    return mx.take_along_axis(keys, mx.take_along_axis(order, last, axis=-1), axis=-1)


# Tokens less likely than this are never drawn, so XTC must not leave one of them alone.
_IMPOSSIBLE = 1e-30


def _exclude_top(
    logits: mx.array, probs: mx.array, settings: BatchSampling, applies: mx.array
) -> mx.array:
    """XTC on probabilities [B, V] in the rows where it `applies`, [B, 1] bool."""
    total = probs.sum(axis=-1, keepdims=True)
    likely = probs >= mx.maximum(settings.xtc_threshold * total, _IMPOSSIBLE)
    least = mx.where(likely, logits, mx.inf).min(axis=-1, keepdims=True)
    excluded = likely & (logits > least) & applies
    if settings.protected:
        spared = excluded[:, mx.array(settings.protected)].any(axis=-1, keepdims=True)
        excluded = excluded & ~spared
    return mx.where(excluded, 0.0, probs)


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
