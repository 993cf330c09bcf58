"""What a file of states on disk says of itself, in its header: tokens, and what it leaves out."""

from __future__ import annotations

import array
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.engine.prefix_files import STATES
from mlxmodels.saved_state import saved_metadata


@dataclass(eq=False)
class StatesFile:
    """A file of the states after some tokens.

    Attributes:
        lacks: Leaves that it leaves out; longer files of its branch hold them.
        trimmable: Leaves that serve every shorter prefix as well; those it lacks are among them.
        chats: Which chats go on from it, and after how many of the tokens.
    """

    path: Path
    nbytes: int
    lacks: frozenset[int]
    trimmable: frozenset[int]
    chats: dict[str, int] = field(default_factory=dict)

    def metadata(self, key: str, tokens: Sequence[int]) -> dict[str, str]:
        """What `read_description` reads."""
        return {
            "key": key,
            "tokens": base64.b64encode(_as_bytes(tokens)).decode(),
            "lacks": json.dumps(sorted(self.lacks)),
            "trimmable": json.dumps(sorted(self.trimmable)),
        }


def file_name(tokens: Sequence[int]) -> str:
    """The name of the file for these tokens."""
    return hashlib.sha256(_as_bytes(tokens)).hexdigest()[:32] + STATES


def read_description(path: Path, key: str, leaves: int) -> tuple[list[int], StatesFile]:
    """Tokens and description of a file, from its header; whose it is stands elsewhere.

    Args:
        key: Of the model that it must belong to.
        leaves: How many states that model has.

    Raises:
        ModelError, ValueError, OSError: it is no file of this model's states.
    """
    if path.is_symlink():
        raise ValueError("it is a link")
    metadata = saved_metadata(path)
    if metadata.keys() != {"key", "tokens", "lacks", "trimmable"}:
        raise ValueError("its metadata is not ours")
    if metadata["key"] != key:
        raise ValueError("it belongs to another model")
    tokens = _from_text(metadata["tokens"])
    if not tokens or path.name != file_name(tokens):
        raise ValueError("its name is not that of its tokens")
    lacks, trimmable = (_numbers(metadata[name], leaves) for name in ("lacks", "trimmable"))
    if not lacks <= trimmable:
        raise ValueError("it lacks what cannot be trimmed")
    return tokens, StatesFile(path, path.stat().st_size, lacks, trimmable)


def _numbers(text: str, bound: int) -> frozenset[int]:
    try:
        numbers = json.loads(text)
    except RecursionError as error:
        raise ValueError("lists in lists") from error
    if not isinstance(numbers, list) or any(
        type(number) is not int or not 0 <= number < bound for number in numbers
    ):
        raise ValueError(f"expected numbers of layer states, got {numbers!r:.80}")
    return frozenset(numbers)


def _as_bytes(tokens: Sequence[int]) -> bytes:
    """Little-endian int32."""
    values = array.array("i", tokens)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _from_text(text: str) -> list[int]:
    """The tokens of `_as_bytes` in base 64; ValueError if it is something else."""
    values = array.array("i", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
