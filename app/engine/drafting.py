"""Guesses at the next tokens of a row: copied from its own text, or made by a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

from app.engine.protocol import ModelRef
from app.engine.resident import ResidentModel
from app.engine.rollback import Checkpoint
from app.engine.sampling import BatchSampling, RowSampling, sample
from app.errors import GryphonError
from mlxmodels.errors import ModelError
from mlxmodels.tokenizer import Tokenizer


class Drafter(Protocol):
    """Guesses for one row."""

    @property
    def nbytes(self) -> int:
        """Bytes of the states it keeps."""
        ...

    def read(self, known: list[int], room: int) -> bool:
        """Read on in a prompt, `room` tokens at most; whether only the last is left unread."""
        ...

    def draft(
        self, known: list[int], uniforms: Sequence[float], exclude_top: Sequence[bool]
    ) -> list[int]:
        """What may follow the known tokens: as many tokens as there are uniforms, or fewer.

        Args:
            known: Prompt and answer so far; in every call the same or longer.
            uniforms: The numbers that the row will draw its next tokens with.
            exclude_top: As in `app.engine.sampling.sample`, one for each.
        """
        ...


class LookupDrafter:
    """What came after the last tokens where they came before, the latest such place first.

    Source: Saxena, prompt-lookup-decoding (2023). A copy that reaches the end of the text goes on
    with itself, as in LZ77, so that a text that repeats a line is drafted at full length.

    Args:
        ngram: How many tokens have to be the same at first; then fewer, down to two.
    """

    nbytes = 0

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._text = ""  # one character for each token: strings are searched natively

    def read(self, known: list[int], room: int) -> bool:
        return True

    def draft(
        self, known: list[int], uniforms: Sequence[float], exclude_top: Sequence[bool]
    ) -> list[int]:
        self._text += "".join(map(chr, known[len(self._text) :]))
        for size in range(self._ngram, min(self._ngram, 2) - 1, -1):
            at = self._text.rfind(self._text[-size:], 0, len(self._text) - 1)
            if at >= 0 and size < len(self._text):
                count = len(uniforms)
                found = self._text[at + size :]
                return [ord(token) for token in (found * (count // len(found) + 1))[:count]]
        return []


class ModelDrafter:
    """Greedy or sampled tokens of a smaller model, by the row's own settings and numbers.

    With the same number at the same position two distributions that agree give the same token, so
    that drafts are as often right at any temperature as the models agree. Penalties and bias are
    left out: they only matter to what is right, which the other model decides.

    Args:
        draft: The smaller model.
        vocab_size: Tokens that the other model knows.
        sampling: The row's settings.
    """

    def __init__(self, draft: ResidentModel, vocab_size: int, sampling: RowSampling) -> None:
        self._model = draft.loaded.model
        self._limit = draft.loaded.context_length
        self._vocab_size = draft.vocab_size
        self._drafted_size = min(vocab_size, draft.vocab_size)
        self._settings = BatchSampling.of([sampling])
        self._states = draft.loaded.make_cache()
        self._read = 0

    @property
    def nbytes(self) -> int:
        return sum(int(state.nbytes) for state in self._states)

    def _has_room(self, length: int) -> bool:
        return self._limit is None or length <= self._limit

    def read(self, known: list[int], room: int) -> bool:
        stop = min(len(known) - 1, self._read + room)
        if self._read < stop and self._has_room(len(known)):
            self._forward(mx.array(known[self._read : stop], mx.int32))
            mx.eval([state.state for state in self._states])
            self._read = stop
        return self._read >= len(known) - 1 or not self._has_room(len(known))

    def draft(
        self, known: list[int], uniforms: Sequence[float], exclude_top: Sequence[bool]
    ) -> list[int]:
        if not uniforms or not self._has_room(len(known) + len(uniforms)):
            return []
        logits = self._forward(mx.array(known[self._read :], mx.int32))
        self._read = len(known)
        before = Checkpoint(self._states)
        drawn: list[mx.array] = []
        for uniform, excludes in zip(uniforms, exclude_top, strict=True):
            if drawn:
                logits = self._forward(drawn[-1])
            drawn.append(sample(logits, self._settings, [uniform], [excludes]))
        drafts = cast(list[int], mx.concatenate(drawn).tolist())
        self._states = before.back(self._states, len(drawn) - 1)
        return drafts

    def _forward(self, tokens: mx.array) -> mx.array:
        """Read tokens [T]; logits [1, V] of what follows, of the tokens both models know."""
        # Models of one vocabulary may pad it to different sizes, and MLX reads past the end of an
        # embedding without a word.
        tokens = mx.minimum(tokens, self._vocab_size - 1)
        logits: mx.array = self._model(tokens[None], cache=self._states)
        return logits[:, -1, : self._drafted_size]


def check_same_vocabulary(target: ResidentModel, ref: ModelRef) -> None:
    """Refuse a draft model whose tokens mean something else.

    Raises:
        GryphonError: "invalid_request" with both names, or "invalid_model".
    """
    try:
        draft = Tokenizer.from_directory(Path(ref.path))
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error
    own = target.loaded.tokenizer
    size = own.vocab_size
    if draft.vocab_size == size and all(
        own.token_bytes(id) == draft.token_bytes(id) for id in range(size)
    ):
        return
    raise GryphonError(
        "invalid_request",
        f"{ref.name} cannot draft for {target.ref.name}: their vocabularies differ "
        f"({draft.vocab_size} and {size} tokens). Choose a draft model of the same family.",
    )
