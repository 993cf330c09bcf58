"""Generated tokens become what is sent: text, reasoning and tool calls."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.engine.answer_parts import PLAIN, AnswerFormat, AnswerParts, Part, Reasoning
from app.engine.call_readers import Call
from app.engine.conversation import Tool
from app.engine.text import StopStrings, TextStream
from mlxmodels.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Released:
    """What became certain with a token: reasoning, then text, then calls.

    Attributes:
        has_stopped: A stop string was reached.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    has_stopped: bool = False


NOTHING = Released()


class AnswerStream:
    """The answer of one row. Where all of it is text, this is its `TextStream` and nothing more;
    `exact` is for that. With `only_calls`, what is neither reasoning nor a call that can be read is
    part of one that cannot, and does not come out.

    Stop strings end the text: they are looked for neither in reasoning nor in calls, where they
    would leave half a thought or half a call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        format: AnswerFormat = PLAIN,
        tools: Sequence[Tool] = (),
        *,
        exact: bool = False,
        only_calls: bool = False,
    ) -> None:
        self._only_calls = only_calls
        self.calls = 0
        """How many were released."""
        self._parts: AnswerParts | None = None
        self._later: list[Part] = []
        if format.is_plain:
            self._text = TextStream(tokenizer, stop, exact=exact)
            return
        self._text = TextStream(tokenizer, ())
        self._stop = StopStrings(stop)
        markers = format.markers  # of which one may consist of a token and more
        spelled = {id: tokenizer.token(id) for id in tokenizer.special_ids}
        self._special = {
            id: text for id, text in spelled.items() if text and any(text in m for m in markers)
        }
        self._parts = AnswerParts(format, tools, frozenset(self._special.values()))

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty when none did."""
        return self._text.stop_string if self._parts is None else self._stop.reached

    def add(self, token_id: int, *, may_stop: bool = True) -> Released:
        """What one more token releases; `may_stop` as in `TextStream.add`."""
        if self._parts is None:
            text, has_stopped = self._text.add(token_id, may_stop=may_stop)
            return Released(text, has_stopped=has_stopped)
        if (marker := self._special.get(token_id)) is not None:
            new = self._text.finish() + marker  # characters do not reach across a marker
        else:
            new, _ = self._text.add(token_id)
        return self._released([*self._later, *self._parts.add(new)], may_stop=may_stop)

    def finish(self) -> Released:
        """What was still waiting when generation ended by itself."""
        if self._parts is None:
            return Released(self._text.finish())
        parts = self._parts.add(self._text.finish())
        released = self._released([*self._later, *parts, *self._parts.finish()], is_last=True)
        if released.has_stopped:
            return released
        return Released(released.text + self._stop.finish(), released.reasoning, released.calls)

    def _released(
        self, parts: Iterable[Part], *, may_stop: bool = True, is_last: bool = False
    ) -> Released:
        """Parts in their order; what comes behind a call waits for the next token."""
        text, reasoning, calls = "", "", list[Call]()
        self._later = []
        for part in parts:
            is_behind_call = bool(calls) and not isinstance(part, Call) and not is_last
            if self._later or is_behind_call:
                self._later.append(part)
            elif isinstance(part, Call):
                text += self._stop.finish()
                calls.append(part)
                self.calls += 1
            elif isinstance(part, Reasoning):
                reasoning += part.text
            elif not self._only_calls:
                new, has_stopped = self._stop.add(part.text, may_stop=may_stop)
                text += new
                if has_stopped:
                    return Released(text, reasoning, calls, has_stopped=True)
        return Released(text, reasoning, calls)


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{secrets.token_hex(12)}"
