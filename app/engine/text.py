"""Generated tokens become text: whole characters only, and never any of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mlxmodels.tokenizer import StreamingDetokenizer, Tokenizer


class TextStream:
    """The readable text of one row, released as early as it can be.

    Bytes wait until they form characters. Text that may be the beginning of a stop string waits
    until it cannot be one any more; the stop string itself and what follows never come out.
    With `exact`, the text is the tokens' bytes and nothing is dropped from its start.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, exact: bool = False) -> None:
        self._detokenizer = StreamingDetokenizer(tokenizer, keep_first_space=exact)
        self._stop = StopStrings(stop)

    @property
    def stop_string(self) -> str:
        """The stop string that was reached; empty when none was."""
        return self._stop.reached

    def add(self, token_id: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text released by one more token, and whether a stop string was reached.

        While `may_stop` is false, a stop string that is complete is text like any other.
        """
        return self._stop.add(self._detokenizer.add(token_id), may_stop=may_stop)

    def finish(self) -> str:
        """What was still waiting when generation ended by itself."""
        return self._stop.finish(self._detokenizer.finish())


class StopStrings:
    """Holds back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.reached = ""
        """The one that ended the text."""
        self._stop = tuple(stop)
        self._held = ""
        self._passed = 0  # how much of what is held came while no stop string could end

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """What is released with some more text, and whether a stop string was reached."""
        released = self._release(text, more_follows=True, may_stop=may_stop)
        if not may_stop:
            self._passed = len(self._held)
        return released

    def finish(self, text: str = "") -> str:
        """What is left with the last of the text."""
        return self._release(text, more_follows=False, may_stop=True)[0]

    def _release(self, new: str, *, more_follows: bool, may_stop: bool) -> tuple[str, bool]:
        if not self._stop:
            return new, False
        text = self._held + new
        found = [(at, stop) for stop in self._stop if (at := self._find(stop, text)) >= 0]
        if found and may_stop:
            self._held = ""
            at, self.reached = min(found, key=lambda one: one[0])
            return text[:at], True
        keep = possible_start(text, self._stop) if more_follows else 0
        self._held = text[len(text) - keep :]
        self._passed = max(0, self._passed - (len(text) - keep))
        return text[: len(text) - keep], False

    def _find(self, stop: str, text: str) -> int:
        """Where a stop string begins that ends in the part that may stop; -1 if none does."""
        return text.find(stop, max(0, self._passed - len(stop) + 1))


def possible_start(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of the markers begins with, without being it."""
    longest = min(len(text), max(map(len, markers)) - 1)
    for size in range(longest, 0, -1):
        end = text[-size:]
        if any(marker.startswith(end) for marker in markers):
            return size
    return 0
