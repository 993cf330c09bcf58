"""The output of `POST /v1/responses`: items that grow, and the events that say how.

Each item is added, filled and done before the next is added. A streamed answer sends the events,
one that is not streamed only the items, from the same steps.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from app.engine.protocol import Finished, Token, ToolCall
from app.server.openai_answer import spelled_logprobs

Event = dict[str, Any]


class ResponseOutput:
    """Items of one response.

    Args:
        names: Namespace and name of each function by the name that the model is told.
        one_call: Only the first tool call becomes an item.
    """

    def __init__(
        self, names: Mapping[str, tuple[str | None, str]], *, one_call: bool = False
    ) -> None:
        self.items: list[dict[str, Any]] = []
        self.reasoning_tokens = 0
        """Tokens up to the last one that released reasoning."""
        self._names = names
        self._one_call = one_call
        self._calls = 0
        self._tokens = 0
        self._open: dict[str, Any] | None = None
        """The part that is being filled, reasoning or text, of the last item."""
        self._waiting: list[dict[str, Any]] = []
        """Logprobs of tokens whose text has not come out."""

    def token(self, token: Token) -> Iterator[Event]:
        """What one more token changes."""
        self._tokens += 1
        if token.reasoning:
            self.reasoning_tokens = self._tokens
            self._waiting = []
        else:
            self._waiting += spelled_logprobs([token])
        yield from self._released(token.reasoning, token.text)

    def call(self, call: ToolCall) -> Iterator[Event]:
        """What a tool call changes."""
        self._waiting = []  # those of the call's own tokens
        self._calls += 1
        if self._one_call and self._calls > 1:
            return
        yield from self._close()
        namespace, name = self._names.get(call.name, (None, call.name))
        item = {
            "id": _id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.call_id,
            "name": name,
            "arguments": "",
        }
        if namespace is not None:
            item["namespace"] = namespace
        yield self._added(item)
        place = self._place(item)
        yield {
            "type": "response.function_call_arguments.delta",
            **place,
            "delta": call.arguments,
        }
        yield {
            "type": "response.function_call_arguments.done",
            **place,
            "name": name,
            "arguments": call.arguments,
        }
        item |= {"status": "completed", "arguments": call.arguments}
        yield self._done(item)

    def end(self, finished: Finished) -> Iterator[Event]:
        """What the end changes: every item is done, and there is one at least."""
        yield from self._released(finished.reasoning, finished.text)
        if not self.items:
            yield from self._begin("message")
        yield from self._close("incomplete" if finished.reason == "length" else "completed")

    def _released(self, reasoning: str, text: str) -> Iterator[Event]:
        if reasoning:
            yield from self._begin("reasoning")
            yield self._grown("response.reasoning_text.delta", reasoning)
        if text:
            yield from self._begin("message")
            logprobs, self._waiting = self._waiting, []
            assert self._open is not None
            self._open["logprobs"] += logprobs
            yield self._grown("response.output_text.delta", text) | {"logprobs": logprobs}

    def _begin(self, kind: str) -> Iterator[Event]:
        """Make sure that an item of this kind is open."""
        if self._open is not None and self.items[-1]["type"] == kind:
            return
        yield from self._close()
        if kind == "reasoning":
            item = {"id": _id("rs"), "type": kind, "status": "in_progress", "summary": []}
            self._open = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": _id("msg"), "type": kind, "status": "in_progress", "role": "assistant"}
            self._open = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        yield self._added(item | {"content": []})
        yield {
            "type": "response.content_part.added",
            **self._part_place(),
            "part": dict(self._open),
        }

    def _grown(self, type: str, delta: str) -> Event:
        assert self._open is not None
        self._open["text"] += delta
        return {"type": type, **self._part_place(), "delta": delta}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """Finish the item that is open, if one is."""
        part, self._open = self._open, None
        if part is None:
            return
        item, place = self.items[-1], self._part_place()
        if part["type"] == "reasoning_text":
            yield {"type": "response.reasoning_text.done", **place, "text": part["text"]}
        else:
            part["logprobs"] += self._waiting
            self._waiting = []
            logprobs = {"logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **place, "text": part["text"], **logprobs}
        yield {"type": "response.content_part.done", **place, "part": part}
        item |= {"status": status, "content": [part]}
        yield self._done(item)

    def _added(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        index = len(self.items) - 1
        return {"type": "response.output_item.added", "output_index": index, "item": dict(item)}

    def _done(self, item: dict[str, Any]) -> Event:
        index = len(self.items) - 1
        return {"type": "response.output_item.done", "output_index": index, "item": item}

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return self._place(self.items[-1]) | {"content_index": 0}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
