"""A text with a gap becomes the prompt that a model was trained to fill gaps from.

The text is never searched for special tokens: code that spells `<|fim_suffix|>` is code. Runs in
the preparation process (`app.engine.preparation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.engine.requests import ContextFile, Infill
from app.errors import GryphonError
from mlxmodels.infill import CONVENTIONS, InfillTokens, infill_tokens
from mlxmodels.tokenizer import Tokenizer

# Stand for names that nobody gives us.
_REPOSITORY = "repository\n"
_FILE = "file\n"
_ANCHOR = "☺"


class InfillPrompt(NamedTuple):
    """Token ids, where the part ends that stays while somebody types, and what ends the answer."""

    tokens: list[int]
    boundaries: list[int]
    ends: list[int]


def infill_prompt(
    tokenizer: Tokenizer, opening: Sequence[int], prefix: str, suffix: str, infill: Infill
) -> InfillPrompt:
    """The prompt of a gap.

    Args:
        opening: Ids that open a sequence.
        prefix: What comes before the gap.
        suffix: What follows it.

    Raises:
        GryphonError: "no_infill", the tokenizer has no tokens for it.
    """
    found = infill_tokens(lambda token: tokenizer.token_id(token) is not None)
    if found is None:
        raise GryphonError(
            "no_infill",
            "This model cannot fill a gap in a text: its tokenizer has none of the tokens for it "
            f"({', '.join(one.prefix for one in CONVENTIONS)}). Leave suffix out, or choose a "
            "model made for code completion.",
        )
    text = _Texts(tokenizer)
    before = [*_id(tokenizer, found.prefix), *text.first(prefix)]
    after = [*_id(tokenizer, found.suffix), *text.continued(suffix)]
    gap = [*after, *before] if found.suffix_first else [*before, *after]
    files = _files(tokenizer, found, text, infill.files)
    tokens = [*opening, *files, *gap, *_id(tokenizer, found.middle)]
    ends = [id for spelling in found.all_ends for id in _id(tokenizer, spelling)]
    boundaries = [len(opening) + len(files)] if files else []
    return InfillPrompt([*tokens, *text.continued(infill.middle)], boundaries, ends)


def _files(
    tokenizer: Tokenizer, found: InfillTokens, text: _Texts, files: Sequence[ContextFile]
) -> list[int]:
    """The other files, and where the one with the gap begins."""
    repository, file = _id(tokenizer, found.repository), _id(tokenizer, found.file)
    if not files:
        return []
    if not repository or not file:
        plain = "".join(f"--- {one.name} ---\n{one.text}\n" for one in files)
        return text.first(plain)
    ids = [*repository, *text.continued(_REPOSITORY)]
    for one in files:
        ids += [*file, *text.continued(f"{one.name}\n{one.text}\n")]
    return [*ids, *file, *text.continued(_FILE)]


def _id(tokenizer: Tokenizer, spelling: str) -> list[int]:
    id = tokenizer.token_id(spelling) if spelling else None
    return [] if id is None else [id]


class _Texts:
    """Plain text to ids, with or without the space that some tokenizers put before a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        first = self.first("a")
        self._adds_space = bool(first) and tokenizer.token_bytes(first[0]).startswith(b" ")

    def first(self, text: str) -> list[int]:
        """Ids of a text as of one that begins a sequence."""
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def continued(self, text: str) -> list[int]:
        """Ids of a text that goes on from something: no space before it that is not its own."""
        if not self._adds_space or not text:
            return self.first(text)
        anchor, anchored = self.first(_ANCHOR), self.first(_ANCHOR + text)
        is_apart = anchored[: len(anchor)] == anchor
        return anchored[len(anchor) :] if is_apart else self.first(text)
