"""Tool calls as Gemma 4 writes them: call:NAME{key:<|"|>text<|"|>,other:[1,true]}."""

from __future__ import annotations

import json
import re

from app.engine.call_readers import Calls, NoCall, Tools, checked_call

QUOTE = '<|"|>'

_HEADER = re.compile(r"\s*call:([\w.-]+)\s*(?=\{)")
_MAX_HEADER = 200
_TOKEN = re.compile(
    r'<\|"\|>(?P<text>.*?)<\|"\|>|(?P<mark>[{}\[\],:])|(?P<bare>[^{}\[\],:<]+)', re.DOTALL
)


def read_gemma(text: str, tools: Tools) -> Calls | None:
    """One call, None while it is incomplete.

    Raises:
        NoCall: the text is not that.
    """
    brace = text.find("{")
    if (brace if brace >= 0 else len(text)) > _MAX_HEADER:
        raise NoCall
    if brace < 0:
        return None
    header = _HEADER.match(text)
    if header is None or header.end() != brace:
        raise NoCall
    written = _as_json(text, brace)
    if written is None:
        return None
    arguments, end = written
    return Calls([checked_call(header[1], arguments, tools)], end)


def _as_json(text: str, at: int) -> tuple[str, int] | None:
    """The object that begins at `at` as JSON text, and where it ends; None while it goes on."""
    pieces: list[str] = []
    open_brackets = 0
    while True:
        token = _TOKEN.match(text, at)
        if token is None:
            rest = text[at:]
            if rest.startswith(QUOTE) or QUOTE.startswith(rest):
                return None
            raise NoCall
        at = token.end()
        if token["text"] is not None:
            pieces.append(json.dumps(token["text"]))
        elif token["bare"] is not None:
            is_key = text[at : at + 1] == ":"
            pieces.append(_bare(token["bare"].strip(), is_key=is_key))
        else:
            pieces.append(token["mark"])
            open_brackets += (token["mark"] in "{[") - (token["mark"] in "}]")
            if not open_brackets:
                return "".join(pieces), at


def _bare(word: str, *, is_key: bool) -> str:
    """What is not quoted: a key, a number, a constant, or text all the same."""
    plain = not is_key and re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?|true|false|null", word)
    return word if plain or not word else json.dumps(word)
