"""Body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from app.engine.constraint import Constraint
from app.engine.conversation import check_messages, check_options
from app.engine.protocol import GenerationRequest, ModelRef
from app.server.answer_forms import ResponseFormat, check_alone
from app.server.chat_messages import ChatMessage
from app.server.openai_requests import (
    WITHOUT_EFFECT,
    Alternatives,
    GenerationFields,
    TokenLimit,
    spread,
)
from app.server.openai_tools import ChatTool, ChatToolChoice, ToolChoice
from app.server.reasoning_effort import EFFORTS
from app.server.validation import checked, refuse, shown

MAX_MESSAGES = 10_000


def effort(value: Any) -> str | None:
    """`reasoning_effort`, one of `EFFORTS`."""
    if value is None or value in EFFORTS:
        return value if value is None else str(value)
    raise refuse(
        "invalid_value",
        "{path} should be one of {efforts}, got {value}",
        efforts=", ".join(EFFORTS),
        value=shown(value),
    )


Effort = Annotated[str | None, PlainValidator(effort), WithJsonSchema({"enum": [*EFFORTS, None]})]


class ChatFields(GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    # The answer is the same whatever is predicted of it.
    without_effect = WITHOUT_EFFECT | {"prediction"}
    only_neutral = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "audio": (),
        "moderation": (),
        "web_search_options": (),
    }
    advice = {"functions": "send `tools` instead", "function_call": "send `tool_choice` instead"}

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[ChatTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ChatToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat = None
    reasoning_effort: Effort = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatFields:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse(
                "invalid_value", "{path} needs `logprobs` to be true", field="top_logprobs"
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refuse(
                "invalid_value",
                "{path} and `max_completion_tokens` differ; send one of them",
                field="max_tokens",
            )
        if self.response_format is not None and self.structured_outputs is not None:
            raise refuse(
                "invalid_value",
                "{path} and `response_format` both say what the answer is held to; send one",
                field="structured_outputs",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens, or max_tokens by its older name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def constraint(self) -> Constraint | None:
        """What the answer is held to."""
        return self.response_format or self.structured_outputs

    def requests(
        self, id: str, model: ModelRef, client: str, template_options: dict[str, Any]
    ) -> list[GenerationRequest]:
        """One request for each choice.

        Args:
            template_options: What reasoning_effort means for this model's template;
                chat_template_kwargs come before.

        Raises:
            ApiError: 400, with the field to blame.
        """
        chosen = self.tool_choice or ToolChoice()
        tools = chosen.of([tool.function.tool() for tool in self.tools or []])
        form = "response_format" if self.response_format else "structured_outputs"
        check_alone(form, self.constraint, tools if chosen.choice != "none" else [])
        messages = [one.message for one in self.messages]
        options = template_options | (self.chat_template_kwargs or {})
        checked("messages", check_messages, messages)
        checked("chat_template_kwargs", check_options, options)
        one = GenerationRequest(
            id=id,
            model=model,
            messages=messages,
            tools=tools,
            tool_choice=chosen.choice,
            template_options=options,
            sampling=self.sampling,
            max_tokens=self.token_limit,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop=self.stop or [],
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            constraint=self.constraint,
            client=client,
        )
        return spread([one], self.n or 1)
