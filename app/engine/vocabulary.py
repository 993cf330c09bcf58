"""A model's tokens as llguidance wants them: by their bytes, with one end of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llguidance

from app.errors import GryphonError
from mlxmodels.checkpoint import read_optional_json
from mlxmodels.tokenizer import Tokenizer

# What no vocabulary exceeds; a broken config.json may.
_MOST_TOKENS = 2**22
# Bytes of the longest tokens that are looked for.
_LONGEST = 32


class Vocabulary:
    """The tokens with ids 0 to `size` - 1, and the end of the answer, which has the id `size`.

    Models have one end of sequence, several or none, and declare any of their tokens to be one: so
    llguidance is given an end that no model has, and where it may come any of the model's may.

    Raises:
        GryphonError: "unsupported_constraint": bytes cannot be told of this model's tokens.
        ModelError: the tokenizer cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        tokenizer = Tokenizer.from_directory(directory)
        if not tokenizer.tokens_are_bytes:
            raise GryphonError(
                "unsupported_constraint",
                f"Answers of {directory.name} cannot be constrained: its tokenizer joins tokens "
                "by rules of its own. Leave the constraint out, or take another model.",
            )
        declared = read_optional_json(directory / "config.json").get("vocab_size")
        ends = [id for id in tokenizer.eos_token_ids if 0 <= id < _MOST_TOKENS]
        known = declared if isinstance(declared, int) else 0
        self.size = min(max([known, tokenizer.vocab_size, *(id + 1 for id in ends)]), _MOST_TOKENS)
        tokens: Any = _Tokens(tokenizer, self.size, ends)
        self.tokenizer = llguidance.LLTokenizer(tokens)


class _Tokens:
    """What `llguidance.TokenizerWrapper` would make of a tokenizer, without its guesses."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, ends: list[int]) -> None:
        special = {*tokenizer.special_ids, *ends}
        self.tokens = [tokenizer.token_bytes(id) for id in range(size)]
        for id, token in enumerate(self.tokens):
            if id not in special and token[:1] == b"\xff":  # llguidance's mark of special tokens
                self.tokens[id] = b""
        self.tokens.append(b"<end of the answer>")
        self.eos_token_id = size
        self.special_token_ids = [*sorted(id for id in special if id < size), size]
        self._encode = tokenizer.encode
        self._special = special
        self._id_of = {token: id for id, token in enumerate(self.tokens) if id not in special}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that the grammar leaves no choice about, as the model would write it."""
        raw = text.encode()
        for before in ("", "\n"):  # sentencepiece puts a space before a text, or does not
            ids = self._encode(before + text, add_special_tokens=False)
            while before and ids and self._bytes_of(ids[:1]).strip(b" \n") == b"":
                del ids[0]
            if self._bytes_of(ids) == raw and self._special.isdisjoint(ids):
                return ids
        return self._longest_first(raw)

    def _bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[id] for id in ids if id < len(self.tokens))

    def _longest_first(self, raw: bytes) -> list[int]:
        """Ids whose tokens make up the text, or as much of it as there are tokens for."""
        ids: list[int] = []
        while raw:
            sizes = range(min(len(raw), _LONGEST), 0, -1)
            found = next((self._id_of[raw[:n]] for n in sizes if raw[:n] in self._id_of), None)
            if found is None:
                break
            ids.append(found)
            raw = raw[len(self.tokens[found]) :]
        return ids
