"""What answers of OpenAI's chat completions and completions have in common.

A stream that fails midway ends with a frame `data: {"error": …}` and no `[DONE]`: the openai
client raises at the former, and a client that only looks for the latter must not take a broken
answer for a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from app import __version__
from app.engine.protocol import Accepted, Finished, Token, TokenLogprob, ToolCall, Usage
from app.server.errors import ApiError, openai_body
from app.server.generation import Choice
from app.server.sse import EVENT_STREAM, KEEP_ALIVE, frame

_DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0


class OpenAIAnswer:
    """Subclasses name the objects and fill the choices.

    Args:
        per_prompt: How many choices share a prompt; the first so many are the first prompt's.
        with_usage: Whether a stream ends with a chunk of its usage.
    """

    stream_media_type = EVENT_STREAM
    keep_alive = KEEP_ALIVE
    stream_object: str
    whole_object: str

    def __init__(
        self, request_id: str, model: str, *, per_prompt: int = 1, with_usage: bool = False
    ) -> None:
        self.per_prompt = per_prompt
        self.with_usage = with_usage
        self.head: dict[str, Any] = {
            "id": request_id,
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"gryphon-{__version__}",
        }

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = self.head | {"object": self.stream_object, "choices": [choice]}
        if self.with_usage:
            chunk["usage"] = None
        return frame(chunk)

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        """One streamed choice; `text` is None in the last one."""
        raise NotImplementedError

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        """Logprobs of consecutive tokens of a choice, None when they were not asked for."""
        raise NotImplementedError

    def _thought(self, index: int, reasoning: str) -> bytes:
        """A streamed piece of reasoning; empty when there is none."""
        return b""

    def _call(self, index: int, call: ToolCall) -> bytes:
        """A streamed tool call; empty when it is one too many."""
        raise NotImplementedError

    def opening(self, accepted: Accepted | None) -> bytes:
        return b""

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):
            return self._call(choice, event)
        logprobs = self._logprobs([event], choice)
        thought = self._thought(choice, event.reasoning)
        if not event.text and logprobs is None:
            return thought
        return thought + self._chunk(self._choice(choice, event.text, logprobs, None))

    def ended(self, finished: Finished, choice: int) -> bytes:
        last = self._thought(choice, finished.reasoning)
        if finished.text:
            last += self._chunk(self._choice(choice, finished.text, None, None))
        return last + self._chunk(self._choice(choice, None, None, finished.reason))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        if not self.with_usage:
            return _DONE
        usage = {"choices": [], "usage": self._usage([end.usage for end in ends])}
        return frame(self.head | {"object": self.stream_object} | usage) + _DONE

    def broken(self, error: ApiError) -> bytes:
        return frame(openai_body(error))

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        """What a choice that was not streamed holds besides its index and finish_reason."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Choice]) -> bytes:
        spelled = [
            self._whole_choice(one, index) | {"index": index, "finish_reason": one.end.reason}
            for index, one in enumerate(choices)
        ]
        rest = {"choices": spelled, "usage": self._usage([one.end.usage for one in choices])}
        return msgspec.json.encode(self.head | {"object": self.whole_object} | rest)

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The usage of all choices; a prompt that several share counts once, as at OpenAI."""
        prompts = usages[:: self.per_prompt]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in prompts)
            },
        }


def finite(logprob: float) -> float:
    """OpenAI's stand-in for minus infinity, which JSON has no word for."""
    return max(logprob, _LEAST_LOGPROB)


def spelled_logprob(one: TokenLogprob) -> dict[str, Any]:
    """A token and its logprob, as chat completions and responses say it."""
    return {"token": one.text, "logprob": finite(one.logprob), "bytes": list(one.raw)}


def spelled_logprobs(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """The logprobs of some tokens with their alternatives; empty when they were not asked for."""
    return [
        spelled_logprob(token.logprob)
        | {"top_logprobs": [spelled_logprob(other) for other in token.top]}
        for token in tokens
        if token.logprob is not None
    ]
