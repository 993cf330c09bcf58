"""What a model writes, told apart as it comes: its reasoning, its tool calls, and the text.

White space next to a marker belongs to the marker, as in the templates that write it. Everything
else comes out exactly once: what looked like a call and turns out to be none is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from app.engine.call_formats import CALL_FORMATS
from app.engine.call_readers import Call, NoCall, Reader
from app.engine.conversation import Tool
from app.engine.text import possible_start

MAX_CALL_CHARACTERS = 256 * 1024
# A reader looks again when one of these came, with which a call can end or be known for none.
_TELLING = "}])>"
_SHORT = 256
# A long call is read again once it has grown by this part of itself: each time costs its length.
_PATIENCE = 32


class AnswerFormat(msgspec.Struct, frozen=True):
    """How a model marks the parts of its answer to one prompt.

    Attributes:
        reasoning: The markers before and after reasoning; None for a model that has none.
        begins_reasoning: Whether the prompt ends with the first of them.
        calls: Name in `CALL_FORMATS`; empty where no tools are offered.
    """

    reasoning: tuple[str, str] | None = None
    begins_reasoning: bool = False
    calls: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether all of an answer is text."""
        return self.reasoning is None and not self.calls

    @property
    def markers(self) -> frozenset[str]:
        """All that a tokenizer may hold as special tokens, which are no text otherwise."""
        calls = CALL_FORMATS[self.calls].markers if self.calls else set()
        return frozenset({*calls, *(self.reasoning or ())})


PLAIN = AnswerFormat()


class Text(NamedTuple):
    """Part of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Part of what came before the answer."""

    text: str


Part = Text | Reasoning | Call


class AnswerParts:
    """Splits one answer. Its result does not depend on where the text was cut into pieces.

    Args:
        format: What to look for.
        tools: Those that may be called.
        special: Those of the format's markers that are special tokens: they are never text.
    """

    def __init__(
        self,
        format: AnswerFormat,
        tools: Sequence[Tool] = (),
        special: frozenset[str] = frozenset(),
    ) -> None:
        self._opening, self._closing = format.reasoning or ("", "")
        self._calls = CALL_FORMATS[format.calls] if format.calls else None
        self._tools = {tool.name: tool for tool in tools}
        self._special = special
        self._readers = dict(self._calls.readers) if self._calls is not None else {}
        dropped = {*special, *(self._calls.dropped if self._calls is not None else ())}
        # Reasoning begins only where nothing was said yet: what a model writes of the marker later
        # is text, unless the tokenizer holds it for something that is never text.
        self._dropped = dropped - {*self._readers}
        self._markers = sorted({*self._readers, *self._dropped}, key=len, reverse=True)
        self._held = ""
        self._reader: Reader | None = None
        self._before = ""
        """White space and marker before what may be a call: text if it is none."""
        self._looked = 0
        self._is_reasoning = format.begins_reasoning
        self._is_fresh = True
        """Nothing but white space came since the answer, or this part of it, began."""
        self._has_spoken = False
        """Whether text came since then."""
        self._is_after_marker = format.begins_reasoning
        self._is_after_call = False

    def add(self, text: str) -> list[Part]:
        """What is certain with some more text."""
        self._held += text
        return self._taken(more_follows=True)

    def finish(self) -> list[Part]:
        """The rest, when the answer has ended."""
        return self._taken(more_follows=False)

    def _taken(self, *, more_follows: bool) -> list[Part]:
        parts: list[Part] = []
        step = True
        while step:
            if self._reader is not None:
                step = self._take_call(parts, more_follows)
            elif self._is_reasoning:
                step = self._take_reasoning(parts, more_follows)
            elif self._is_fresh:
                step = self._take_beginning(parts, more_follows)
            else:
                step = self._take_text(parts, more_follows)
        return parts

    # Each takes what it can from what is held and tells whether another look may take more.

    def _take_reasoning(self, parts: list[Part], more_follows: bool) -> bool:
        if self._is_fresh:
            body = self._held.lstrip()
            if more_follows and (not body or _begins(self._opening, body)):
                return False
            if body.startswith(self._opening):  # a few models open again what the prompt opened
                self._held = body[len(self._opening) :]
                return True
            self._held = body
            self._is_fresh = False
        at = self._held.find(self._closing)
        if at >= 0:
            if thought := self._held[:at].rstrip():
                parts.append(Reasoning(thought))
            self._held = self._held[at + len(self._closing) :]
            self._is_reasoning = self._has_spoken = self._is_after_call = False
            self._is_fresh = self._is_after_marker = True
            return True
        certain = self._held
        if more_follows:
            certain = certain[: len(certain) - possible_start(certain, [self._closing])].rstrip()
        if certain:
            parts.append(Reasoning(certain))
        self._held = self._held[len(certain) :]
        return False

    def _take_beginning(self, parts: list[Part], more_follows: bool) -> bool:
        body = self._held.lstrip()
        if not body:
            if not more_follows and not self._is_after_marker and self._held:
                parts.append(Text(self._held))
                self._held = ""
            return False
        blank = "" if self._is_after_marker else self._held[: len(self._held) - len(body)]
        if self._opening and body.startswith(self._opening):
            self._held = body[len(self._opening) :]
            self._is_reasoning = self._is_after_marker = True
            return True
        closers = self._calls.closers if self._calls is not None and self._is_after_call else ()
        for closer in closers:
            if body.startswith(closer):
                self._held = body[len(closer) :]
                return True
        if more_follows and any(_begins(marker, body) for marker in (self._opening, *closers)):
            return False
        if self._calls is not None and self._calls.bare and body[0] == self._calls.bare_start:
            self._open(self._calls.bare, before=blank, rest=body)
            return True
        self._held = blank + body
        self._is_fresh = False
        return True

    def _take_text(self, parts: list[Part], more_follows: bool) -> bool:
        found = [(at, -len(m), m) for m in self._markers if (at := self._held.find(m)) >= 0]
        if found:
            at, _, marker = min(found)
            text = self._held[:at].rstrip()
            rest = self._held[at + len(marker) :]
            self._say(parts, text)
            if marker in self._dropped:
                self._held = rest
                self._is_fresh = self._is_after_marker = not self._has_spoken
            else:
                before = self._held[len(text) : at]
                before += "" if marker in self._special else marker
                self._open(self._readers[marker], before=before, rest=rest)
            return True
        certain = self._held
        if more_follows and self._markers:
            certain = certain[: len(certain) - possible_start(certain, self._markers)].rstrip()
        self._say(parts, certain)
        self._held = self._held[len(certain) :]
        return False

    def _take_call(self, parts: list[Part], more_follows: bool) -> bool:
        assert self._reader is not None
        size = len(self._held)
        looks = not more_follows or size <= _SHORT or size > MAX_CALL_CHARACTERS
        if not looks and size - self._looked >= self._looked // _PATIENCE:
            new = self._held[self._looked :]
            looks = any(character in new for character in _TELLING)
        if looks:
            self._looked = size
        try:
            found = self._reader(self._held, self._tools) if looks else None
            if (len(self._held) if found is None else found.end) > MAX_CALL_CHARACTERS:
                raise NoCall
        except NoCall:
            # Only the marker is text for certain: another one may follow.
            self._reader = None
            self._is_fresh = self._is_after_marker = False
            self._is_after_call = False
            self._say(parts, self._before)
            return True
        if found is None:
            if not more_follows:
                self._reader = None
                self._say(parts, self._before + self._held)
                self._held = ""
            return False
        parts += found.calls
        self._held = self._held[found.end :]
        self._reader = None
        self._has_spoken = False
        self._is_fresh = self._is_after_marker = self._is_after_call = True
        return True

    def _open(self, reader: Reader, *, before: str, rest: str) -> None:
        self._reader = reader
        self._before = before
        self._held = rest
        self._looked = 0

    def _say(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(Text(text))
            self._has_spoken = True
            self._is_after_marker = self._is_after_call = False


def _begins(marker: str, text: str) -> bool:
    """Whether `text` is a beginning of the marker, and not the whole of it."""
    return len(text) < len(marker) and marker.startswith(text)
