"""What changes the logits of single rows before anything is drawn: bias, penalties on the tokens
that a row has had, and ends of sequence that may not come yet.

The counts of tokens stay on the device and take in each step's tokens unread, as the next step is
launched before they are read. Rows that ask for none of this take no memory and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from app.engine.sampling import RowSampling


class DecodingRow(Protocol):
    """What is asked of a row here; rows are told apart by identity."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def answer(self) -> list[int]: ...

    @property
    def launched(self) -> int: ...

    @property
    def sampling(self) -> RowSampling | None: ...


def _settings(row: DecodingRow) -> RowSampling:
    assert row.sampling is not None
    return row.sampling


class Penalties:
    """Changes of the logits of a batch of B rows, of which P have a penalty; V tokens.

    Call `follow` when rows have joined or left, then for every step `apply` and `count`.
    """

    def __init__(self) -> None:
        self._rows: list[DecodingRow] = []  # the batch
        self._counted: list[DecodingRow] = []  # the P rows
        self._in_prompt: mx.array | None = None  # [P, V] bool, None if P is 0
        self._in_answer: mx.array | None = None  # [P, V] int32, how often; None if P is 0
        self._places = mx.zeros((0,), mx.int32)  # [P], where they are in the batch
        self._bias: tuple[mx.array, mx.array, mx.array] | None = None  # places, ids and values

    @property
    def nbytes(self) -> int:
        """Bytes of the counts."""
        return sum(a.nbytes for a in (self._in_prompt, self._in_answer) if a is not None)

    def follow(self, rows: Sequence[DecodingRow], vocab_size: int) -> None:
        """Make this the state of these rows.

        Args:
            rows: The B rows. What those that stay have had is kept; a new one has had its prompt
                and what it has answered elsewhere.
            vocab_size: V, the width of the logits.
        """
        penalized = [row for row in rows if _settings(row).has_penalty]
        kept = [i for i, row in enumerate(self._counted) if row in penalized]
        new = [row for row in penalized if row not in self._counted]
        prompts = mx.zeros((len(new), vocab_size), mx.bool_)
        for i, row in enumerate(new):
            prompts[i, mx.array(row.prompt)] = True
        answers = mx.zeros((len(new), vocab_size), mx.int32)
        for i, row in enumerate(new):
            if row.answer:
                answers = answers.at[i, mx.array(row.answer)].add(1)
        if self._in_prompt is not None and self._in_answer is not None:
            indices = mx.array(kept, mx.int32)
            prompts = mx.concatenate([self._in_prompt[indices], prompts])
            answers = mx.concatenate([self._in_answer[indices], answers])
        self._in_prompt, self._in_answer = (prompts, answers) if penalized else (None, None)
        self._counted = [self._counted[i] for i in kept] + new
        self._rows = list(rows)
        self._places = mx.array([self._rows.index(row) for row in self._counted], mx.int32)

        bias = [(i, *pair) for i, row in enumerate(rows) for pair in _settings(row).logit_bias]
        if bias:
            places, ids, values = zip(*bias, strict=True)
            self._bias = mx.array(places), mx.array(ids), mx.array(values, mx.float32)
        else:
            self._bias = None

    def apply(self, logits: mx.array) -> mx.array:
        """The logits to choose from: [B, V] float32, or the same array where nothing changes."""
        places, ids = self._forbidden()
        if self._bias is None and not self._counted and not ids:
            return logits
        logits = logits.astype(mx.float32)  # another array: the model's own stays as it is
        if self._bias is not None:
            at, tokens, values = self._bias
            logits = logits.at[at, tokens].add(values)
        if len(self._counted) == len(self._rows):
            logits = self._penalized(logits)
        elif self._counted:
            logits[self._places] = self._penalized(logits[self._places])
        if ids:
            logits = logits.at[mx.array(places), mx.array(ids)].add(-mx.inf)
        return logits

    def _penalized(self, logits: mx.array) -> mx.array:
        """The logits of the P rows, [P, V] float32; a setting of no effect changes no bit."""
        assert self._in_prompt is not None and self._in_answer is not None
        settings = [_settings(row) for row in self._counted]

        def column(values: list[float]) -> mx.array:
            return mx.array(values, mx.float32)[:, None]

        penalty = column([row.repetition_penalty for row in settings])
        weaker = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(self._in_prompt | (self._in_answer > 0), weaker, logits)
        presence = column([row.presence_penalty for row in settings])
        frequency = column([row.frequency_penalty for row in settings])
        return logits - frequency * self._in_answer - presence * (self._in_answer > 0)

    def _forbidden(self) -> tuple[list[int], list[int]]:
        """Places in the batch and ids of the ends of sequence that may not be drawn now."""
        pairs = [
            (i, id)
            for i, row in enumerate(self._rows)
            if row.launched < _settings(row).min_tokens
            for id in _settings(row).eos_token_ids
        ]
        return [i for i, _ in pairs], [id for _, id in pairs]

    def count(self, tokens: mx.array) -> None:
        """Take in the tokens, [B] int32, that the rows have drawn; they need not be known yet."""
        if self._in_answer is not None:
            drawn = tokens[self._places]
            self._in_answer = self._in_answer.at[mx.arange(len(self._counted)), drawn].add(1)
