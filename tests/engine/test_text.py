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


@pytest.mark.parametrize(
    ("text", "stop", "from_token", "kept", "stopped"),
    [
        ("one.two.", ["."], 4, "one", True),
        ("one.two.", ["."], 5, "one.two", True),
        ("one.two.", ["."], 9, "one.two.", False),
        ("xENDyENDz", ["END"], 5, "xENDy", True),
        ("xENDz", ["END"], 4, "x", True),  # complete with the first token that may stop
        ("xENDz", ["END"], 5, "xENDz", False),
        ("xabq", ["ab", "xabz"], 4, "xabq", False),  # held for the longer, complete before
        ("xabzq", ["ab", "xabz"], 4, "", True),
        ("aaaa", ["aa"], 4, "aa", True),
        ("xaqE", ["E", "xabz"], 3, "xaq", True),
    ],
)
def test_stop_strings_complete_before_one_may_stop_are_text(
    tokenizer: Tokenizer, text: str, stop: list[str], from_token: int, kept: str, stopped: bool
) -> None:
    """One token a byte; the first `from_token` - 1 of them may not stop."""
    stream, pieces, reached = TextStream(tokenizer, stop), [], False
    for count, token in enumerate(tokenizer.encode(text, add_special_tokens=False), 1):
        piece, reached = stream.add(token, may_stop=count >= from_token)
        pieces.append(piece)
        if reached:
            break
    else:
        pieces.append(stream.finish())
    assert ("".join(pieces), reached) == (kept, stopped)
    assert bool(stream.stop_string) == stopped
    assert not stopped or stream.stop_string in stop


@pytest.mark.parametrize(
    ("text", "stop", "reached"),
    [
        ("abcd", ["d", "bc"], "bc"),  # the one that begins first
        ("abcd", ["x", "y"], ""),
        ("abcd", ["cx", "cd"], "cd"),
    ],
)
def test_the_stop_string_that_ended_the_text_is_known(
    tokenizer: Tokenizer, text: str, stop: list[str], reached: str
) -> None:
    stream = TextStream(tokenizer, stop)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if stream.add(token)[1]:
            break
    else:
        stream.finish()
    assert stream.stop_string == reached
