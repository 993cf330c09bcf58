"""Which installed models can fill a gap in a text, as their tokenizers' files show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from app.library.installed import InstalledModel
from mlxmodels.infill import infill_tokens

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")


def infill_models(models: Iterable[InstalledModel]) -> list[str]:
    """Names of those that have the tokens for it."""
    return [model.name for model in models if can_infill(model.path)]


def can_infill(path: Path) -> bool:
    """Whether the tokenizer in a model's directory has the tokens for it.

    The files are searched for their spellings, not read: a vocabulary takes a tenth of a second.
    """
    contents = [_bytes(path / name) for name in _FILES]

    def has(token: str) -> bool:
        spellings = {json.dumps(token)[1:-1].encode(), token.encode()}
        return any(spelling in content for spelling in spellings for content in contents)

    return infill_tokens(has) is not None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # none, or not ours to read
        return b""
