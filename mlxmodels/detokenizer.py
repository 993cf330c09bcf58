"""Incremental decoding of tokens, one way per decoder that tokenizer.json files use.

Each mirrors what `tokenizers` does to a whole sequence, in O(1) per token.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    def add(self, id: int, token: str) -> str:
        """Text completed by one more token, given by id and by the vocabulary's spelling."""

    def finish(self) -> str:
        """Text still held back."""

    def bytes_of(self, token: str) -> bytes:
        """Bytes of one token, whatever was added before."""

    def keep_first_space(self) -> None:
        """Take what comes first for the middle of a text: a space there is one."""


def detokenizer_for(
    decoder: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> Detokenizer:
    """The fitting implementation; an unknown decoder falls back to decoding a short window."""
    kind = decoder.get("type")
    steps = list(decoder.get("decoders", [])) if kind == "Sequence" else [dict(decoder)]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevel()
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always")
        return Metaspace(steps[0].get("replacement", "▁"), strips_first=scheme != "never")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and len(kinds) <= 4:
        pattern = steps[0]["pattern"].get("String")
        strip: dict[str, Any] = {"type": "Strip", "content": " ", "start": 0, "stop": 0}
        strip = steps[3] if len(kinds) == 4 else strip
        if pattern and strip["type"] == "Strip" and strip["stop"] == 0:
            return ByteFallback(pattern, steps[0]["content"], strip["content"], strip["start"])
    return Window(decode)


class ByteLevel:
    """GPT-2 style: every character of a token stands for one byte."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int, token: str) -> str:
        return self._utf8.decode(self.bytes_of(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def keep_first_space(self) -> None:
        pass

    def bytes_of(self, token: str) -> bytes:
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:
            return token.encode()  # an added token spelled in plain text


class Metaspace:
    """Sentencepiece without byte fallback: a mark stands for a space, none at the very start."""

    def __init__(self, mark: str, *, strips_first: bool) -> None:
        self._mark = mark
        self._strips = strips_first

    def add(self, id: int, token: str) -> str:
        space = "" if self._strips else " "
        self._strips = False
        return token.replace(self._mark, space)

    def finish(self) -> str:
        return ""

    def keep_first_space(self) -> None:
        self._strips = False

    def bytes_of(self, token: str) -> bytes:
        return token.replace(self._mark, " ").encode()


class ByteFallback:
    """Sentencepiece with byte tokens: a run of them is UTF-8 as a whole, or one U+FFFD per byte."""

    def __init__(self, pattern: str, content: str, stripped: str, strip: int) -> None:
        self._pattern = pattern
        self._content = content
        self._stripped = stripped
        self._strip = strip
        self._run = bytearray()

    def add(self, id: int, token: str) -> str:
        if _BYTE_TOKEN.fullmatch(token):
            self._run += self.bytes_of(token)
            return ""
        text = token.replace(self._pattern, self._content)
        return self._without_start(self._end_run() + text)

    def finish(self) -> str:
        return self._without_start(self._end_run())

    def keep_first_space(self) -> None:
        self._strip = 0

    def bytes_of(self, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes([int(byte[1], 16)])
        return token.replace(self._pattern, self._content).encode()

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _without_start(self, text: str) -> str:
        while text and self._strip:
            if text[0] != self._stripped:
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text


class Window:
    """Any other decoder: decode the last tokens with and without the new one, emit the difference.

    The window slides whenever text was emitted; it may grow to `_LIMIT` tokens while text ends in
    U+FFFD, which may be the front of a character.
    """

    _LIMIT = 32

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._seen = 0  # how many of _ids have been emitted

    def add(self, id: int, token: str) -> str:
        self._ids.append(id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._seen < self._LIMIT:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        return self._emit(self._decode(self._ids)) if self._seen < len(self._ids) else ""

    def keep_first_space(self) -> None:
        pass  # what this decoder does to it is not known

    def bytes_of(self, token: str) -> bytes:
        return token.encode()

    def _emit(self, text: str) -> str:
        before = self._decode(self._ids[: self._seen]) if self._seen else ""
        self._ids = self._ids[self._seen :]
        self._seen = len(self._ids)
        return text[len(before) :]


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for 256, 257, ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    others = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_of()
