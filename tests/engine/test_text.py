"""Tokens become text: characters whole, stop strings never, everything else as soon as it can."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.text import TextStream
from mlxmodels.tokenizer import Tokenizer

from ..tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    path: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return Tokenizer.from_directory(path)


def _feed(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        piece, stopped = stream.add(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


def test_bytes_wait_until_they_are_a_character(tokenizer: Tokenizer) -> None:
    pieces, _ = _feed(tokenizer, "aé🦅b", [])
    assert pieces == ["a", "", "é", "", "", "", "🦅", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "kept", "stopped"),
    [
        ("one\n\ntwo", ["\n\n"], "one", True),
        ("one\ntwo", ["\n\n"], "one\ntwo", False),
        ("one\n", ["\n\n"], "one\n", False),
        ("xababac", ["ababac"], "x", True),
        ("xabababac", ["ababac"], "xab", True),
        ("stop", ["stop"], "", True),
        ("abc", ["bcd", "c"], "ab", True),
        ("a🦅b", ["🦅"], "a", True),
        ("plain", ["never"], "plain", False),
        ("nevernever", ["nevex"], "nevernever", False),
    ],
)
def test_text_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str], kept: str, stopped: bool
) -> None:
    pieces, reached = _feed(tokenizer, text, stop)
    assert ("".join(pieces), reached) == (kept, stopped)


def test_nothing_that_may_begin_a_stop_string_comes_out_early(tokenizer: Tokenizer) -> None:
    pieces, _ = _feed(tokenizer, "say END OF IT no", ["END OF FILE"])
    assert pieces[:4] == ["s", "a", "y", " "]
    assert pieces[4:11] == [""] * 7  # "END OF " may be the beginning
    assert pieces[11] == "END OF I"
