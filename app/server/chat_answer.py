"""Answers of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from app.engine.protocol import Accepted, Token, ToolCall
from app.server.generation import Choice
from app.server.openai_answer import OpenAIAnswer, spelled_logprobs


class ChatAnswer(OpenAIAnswer):
    """Choices of one conversation.

    Args:
        choices: How many.
        one_call: Only the first tool call of each is sent.
    """

    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        choices: int = 1,
        one_call: bool = False,
        with_usage: bool = False,
    ) -> None:
        super().__init__(request_id, model, per_prompt=choices, with_usage=with_usage)
        self.one_call = one_call
        self.calls = [0] * choices
        """How many tool calls of each choice were sent."""

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        content = spelled_logprobs(tokens)
        return {"content": content, "refusal": None} if content else None

    def _thought(self, index: int, reasoning: str) -> bytes:
        # OpenAI keeps reasoning to itself; clients know this name from DeepSeek's API.
        choice = self._choice(index, None, None, None) | {"delta": {"reasoning_content": reasoning}}
        return self._chunk(choice) if reasoning else b""

    def _call(self, index: int, call: ToolCall) -> bytes:
        place = self.calls[index]
        if self.one_call and place:
            return b""
        self.calls[index] += 1
        delta = {"tool_calls": [{"index": place} | _spelled_call(call)]}
        return self._chunk(self._choice(index, None, None, None) | {"delta": delta})

    def opening(self, accepted: Accepted | None) -> bytes:
        opened = b""
        for index in range(len(self.calls)):
            choice = self._choice(index, "", None, None)
            choice["delta"] = {"role": "assistant", "content": ""}
            opened += self._chunk(choice)
        return opened

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        calls = [_spelled_call(call) for call in choice.tool_calls]
        # OpenAI's answers have no content where there are calls alone.
        text = choice.text or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if calls:
            message["tool_calls"] = calls[:1] if self.one_call else calls
        return {"message": message, "logprobs": self._logprobs(choice.tokens, index)}


def _spelled_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
