"""Embeddings: the hidden states of a text's tokens, pooled to one vector of length 1.

A request is read between decode steps as prompts are, one forward call of at most a chunk's tokens
at a time, and takes turns with them and with other such requests. Inputs that fit into one call
share it, longest with longest; padding comes after a row's tokens, where a causal model cannot see
it, and is left out of the pooling. Longer ones are read in chunks, each alone. Nothing of them is
kept for other requests.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from app.engine.batch import Row
from app.engine.embed_request import MAX_VECTOR_BYTES, Embedded, Pooling
from app.engine.protocol import Accepted, Progress
from app.engine.resident import ResidentModel
from app.errors import GryphonError


class Embedding:
    """The inputs of one request, and the vectors of those that have been read.

    Args:
        inputs: Token ids of each, at least one.
    """

    def __init__(self, inputs: list[list[int]], pooling: Pooling) -> None:
        self.inputs = inputs
        self.longest = max(inputs, key=len)
        self.total = sum(map(len, inputs))
        self.caches: list[Any] = []
        """States of the input that is read in chunks; empty between inputs."""
        self.read = 0
        """Tokens that they have read."""
        self.done = 0
        """Tokens of inputs read in all."""
        self._pooling = pooling
        self._waiting = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
        self._index = 0
        self._sum: mx.array | None = None
        self._vectors: NDArray[np.float32] | None = None

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self.caches

    def check(self, model: ResidentModel) -> None:
        """Refuse inputs that the model cannot read.

        Raises:
            GryphonError: "no_embeddings", "context_length_exceeded", "invalid_request",
                "request_too_large".
        """
        name, limit = model.ref.name, model.loaded.context_length
        if limit is not None and len(self.longest) > limit:
            raise GryphonError(
                "context_length_exceeded",
                f"Input {self.inputs.index(self.longest)} has {len(self.longest)} tokens and "
                f"{name} reads {limit} at most. Divide it.",
            )
        low, high = min(map(min, self.inputs)), max(map(max, self.inputs))
        if not 0 <= low <= high < model.vocab_size:
            raise GryphonError(
                "invalid_request",
                f"Token ids must be 0 to {model.vocab_size - 1} for {name}, got {low} to {high}.",
            )
        needed = 4 * len(self.inputs) * model.hidden_states.size
        if needed > MAX_VECTOR_BYTES:
            raise GryphonError(
                "request_too_large",
                f"{len(self.inputs)} vectors of {name} take {needed} bytes and one answer holds "
                f"{MAX_VECTOR_BYTES}. Ask for fewer at once.",
            )

    def step(self, model: ResidentModel, size: int) -> None:
        """Read at most so many tokens in one forward call.

        Raises:
            GryphonError: "invalid_numbers".
        """
        if not self.caches:
            group = self._group(model, size)
            if group:
                self._read_together(model, group)
                return
            self._index, self.read = self._waiting.pop(), 0
            self.caches = model.loaded.make_cache()
            model.loaded.begin_prompt(self.caches, len(self.inputs[self._index]))
        self._read_chunk(model, size)

    def answer(self, request_id: str) -> Embedded:
        """The vectors, when all have been made."""
        assert self.is_over and self._vectors is not None
        vectors = self._vectors.astype("<f4")
        lengths = [len(tokens) for tokens in self.inputs]
        return Embedded(request_id, vectors.tobytes(), vectors.shape[1], lengths)

    def _group(self, model: ResidentModel, size: int) -> list[int]:
        """Take those of the longest inputs that wait that one call can read; maybe none."""
        group: list[int] = []
        if not model.hidden_states.can_batch:
            return group
        longest = len(self.inputs[self._waiting[-1]])
        # A rotary base that depends on the length is that of the longest row: no padding then.
        same_length = bool(getattr(model.loaded.model, "rotates_by_length", False))
        while self._waiting and (len(group) + 1) * longest <= size:
            if same_length and len(self.inputs[self._waiting[-1]]) < longest:
                break
            group.append(self._waiting.pop())
        return group

    def _read_together(self, model: ResidentModel, group: list[int]) -> None:
        rows = [self.inputs[index] for index in group]
        longest = max(map(len, rows))
        padded = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in rows]
        hidden = model.hidden_states(mx.array(padded, mx.int32)).astype(mx.float32)
        lengths = mx.array([len(tokens) for tokens in rows])
        if self._pooling == "last":
            pooled = hidden[mx.arange(len(rows)), lengths - 1]
        else:
            is_token = mx.arange(longest) < lengths[:, None]
            # Not a product: what was computed on padding may be no number.
            pooled = mx.where(is_token[..., None], hidden, 0).sum(axis=1) / lengths[:, None]
        self.done += sum(map(len, rows))
        self._put(model, group, pooled)

    def _read_chunk(self, model: ResidentModel, size: int) -> None:
        tokens = self.inputs[self._index]
        chunk = tokens[self.read : self.read + size]
        hidden = model.hidden_states(mx.array([chunk], mx.int32), self.caches).astype(mx.float32)
        total = hidden.sum(axis=1) if self._sum is None else self._sum + hidden.sum(axis=1)
        self._sum = hidden[:, -1] if self._pooling == "last" else total
        mx.eval(self._sum, [cache.state for cache in self.caches])
        self.read += len(chunk)
        self.done += len(chunk)
        if self.read == len(tokens):
            pooled = self._sum if self._pooling == "last" else self._sum / len(tokens)
            self.caches, self.read, self._sum = [], 0, None
            self._put(model, [self._index], pooled)

    def _put(self, model: ResidentModel, group: list[int], pooled: mx.array) -> None:
        """Keep the vectors of some inputs, [B, size]."""
        vectors = np.array(pooled)
        with np.errstate(all="ignore"):
            vectors = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(vectors).all():
            raise GryphonError(
                "invalid_numbers",
                f"{model.ref.name} computed what is no number (NaN), so its embeddings mean "
                "nothing: its weights may be damaged (`gryphon verify` finds that) or may not work "
                "in their dtype. Use another build of the model.",
            )
        if self._vectors is None:
            self._vectors = np.zeros((len(self.inputs), vectors.shape[1]), np.float32)
        self._vectors[group] = vectors


class Embeddings:
    """The requests for embeddings that run, which take turns."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of inputs that are read in chunks."""
        return sum(int(cache.nbytes) for row in self._rows for cache in row.caches)

    def begin(self, row: Row, context_length: int | None) -> None:
        """Let a request run."""
        assert row.embedding is not None
        row.admitted_s = time.monotonic()
        self._rows.append(row)
        row.emit(Accepted(row.request.id, row.embedding.total, 0, context_length))

    def next(self) -> Row:
        """The request whose turn it is."""
        self._rows.rotate(-1)
        return self._rows[-1]

    def step(self, model: ResidentModel, size: int) -> None:
        """Read at most so many tokens of the request whose turn it is."""
        row = self._rows[-1]
        job = row.embedding
        assert job is not None
        try:
            job.step(model, size)
        except GryphonError as error:
            row.fail(error.code, error.message, error.retry_after)
        else:
            row.caches, row.processed = job.caches, job.read
            if job.is_over:
                row.emit(job.answer(row.request.id))
                row.finish("stop")
            else:
                row.emit(Progress(row.request.id, "prefill", job.done, job.total))
        self.leave()

    def leave(self) -> None:
        """Take out the requests that have ended."""
        gone = [row for row in self._rows if row.done]
        for row in gone:
            self._rows.remove(row)
            row.caches, row.embedding = [], None
        if gone:
            mx.clear_cache()  # what a chunk computes in fits nothing that decoding does
