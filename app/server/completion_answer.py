"""Answers of `POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.engine.protocol import Accepted, Token, TokenLogprob
from app.server.generation import Choice
from app.server.openai_answer import OpenAIAnswer, finite


class CompletionAnswer(OpenAIAnswer):
    """Choices of one prompt or several.

    Args:
        choices: How many in all.
        per_prompt: How many of them are of one prompt.
        alternatives: Logprobs asked for besides each token's own.
        echo: What each choice's text begins with; empty is nothing.
    """

    stream_object = whole_object = "text_completion"

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        choices: int = 1,
        per_prompt: int = 1,
        alternatives: int = 0,
        echo: Sequence[str] = (),
        with_usage: bool = False,
    ) -> None:
        super().__init__(request_id, model, per_prompt=per_prompt, with_usage=with_usage)
        self.alternatives = alternatives
        self.echo = list(echo)
        self.offsets = [0] * choices
        """Characters of each choice's text so far."""

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text or "",
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def opening(self, accepted: Accepted | None) -> bytes:
        chunks = [
            self._chunk(self._choice(index, text, None, None))
            for index, text in enumerate(self.echo)
            if text
        ]
        return b"".join(chunks)

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        names: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for token in tokens:
            # Where the text so far ends: exact unless text waits for a character or a stop
            # string to be decided, then the place it waits at.
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token.text)
            if token.logprob is not None:
                names.append(_name(token.logprob))
                values.append(finite(token.logprob.logprob))
                # Two ids may spell the same text; the likelier one keeps the key.
                tops.append({_name(one): finite(one.logprob) for one in reversed(token.top)})
        if not names:
            return None
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops if self.alternatives else None,
            "text_offset": offsets,
        }

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        text = (self.echo[index] if self.echo else "") + choice.text
        return {"text": text, "logprobs": self._logprobs(choice.tokens, index)}


def _name(one: TokenLogprob) -> str:
    """The token's text; `bytes:\\xe2\\x80`, as OpenAI writes it, when it is part of a character."""
    try:
        return one.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)
