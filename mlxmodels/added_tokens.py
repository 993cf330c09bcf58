"""Tokens that are found in the text itself, before any model splits what is between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxmodels.checkpoint import read_optional_json
from mlxmodels.errors import ModelError

_SPACES = re.compile(r"\s*")


@dataclass(frozen=True)
class AddedToken:
    """A token's text and how it is found, as tokenizer_config.json has it."""

    content: str
    special: bool = False
    lstrip: bool = False
    """Takes the spaces before it along."""
    rstrip: bool = False
    """Takes the spaces after it along."""
    single_word: bool = False
    """Found only where neither neighbour is a letter, a digit or "_"."""


class AddedTokens:
    """Added tokens by id; of several that begin at one place the longest is found."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._tokens = dict(tokens)
        self.ids = {token.content: id for id, token in tokens.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __contains__(self, id: object) -> bool:
        return id in self._tokens

    def __getitem__(self, id: int) -> AddedToken:
        return self._tokens[id]

    def special_ids(self) -> frozenset[int]:
        return frozenset(id for id, token in self._tokens.items() if token.special)

    def split(self, text: str) -> list[str | int]:
        """The ids of the tokens in a text, and the stretches of text between them."""
        parts: list[str | int] = []
        start = 0
        for match in self._pattern.finditer(text):
            at, end = match.span()
            id = self.ids[match[0]]
            token = self._tokens[id]
            beside = text[max(at - 1, 0) : at] + text[end : end + 1]
            if at < start or (token.single_word and re.search(r"\w", beside)):
                continue
            before = text[start:at].rstrip() if token.lstrip else text[start:at]
            parts += [before, id] if before else [id]
            spaces = _SPACES.match(text, end) if token.rstrip else None
            start = end if spaces is None else spaces.end()
        if start < len(text):
            parts.append(text[start:])
        return parts


def declared_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Those of a directory's added_tokens.json, {text: id}, and of the later added_tokens_decoder.

    Args:
        settings: tokenizer_config.json.

    Raises:
        ModelError: an entry is none.
    """
    tokens: dict[int, AddedToken] = {}
    name = "added_tokens.json"
    for word, id in read_optional_json(path / name).items():
        tokens[_id(id, path, name)] = AddedToken(_text(word, path, name))
    entries = settings.get("added_tokens_decoder") or {}
    name = "tokenizer_config.json's added_tokens_decoder"
    if not isinstance(entries, dict):
        raise _wrong(entries, path, name)
    flags = ("special", "lstrip", "rstrip", "single_word")
    for key, entry in entries.items():
        id = _id(int(key) if re.fullmatch("[0-9]{1,10}", key) else key, path, name)
        if not isinstance(entry, dict):
            raise _wrong(entry, path, name)
        word = _text(entry, path, name)
        tokens[id] = AddedToken(word, **{flag: entry.get(flag) is True for flag in flags})
    return tokens


def token_text(value: Any) -> str | None:
    """A token's text, which files hold as such or as {"content": text}; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    # Half a surrogate pair, as a JSON escape can smuggle in, is no token's text.
    if not isinstance(value, str) or not value or re.search("[\ud800-\udfff]", value):
        return None
    return value


def _id(value: Any, path: Path, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise _wrong(value, path, name)
    return value


def _text(value: Any, path: Path, name: str) -> str:
    text = token_text(value)
    if text is None:
        raise _wrong(value, path, name)
    return text


def _wrong(value: Any, path: Path, name: str) -> ModelError:
    return ModelError(
        f"{path}: {name} holds {str(value)[:40]!r}, which is no token and no id; "
        f"download the tokenizer again."
    )
