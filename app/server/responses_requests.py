"""Body of `POST /v1/responses`.

Stateless: nothing is stored, so that what refers to something stored is refused.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from app.engine.conversation import check_messages, check_options
from app.engine.protocol import GenerationRequest, Message, ModelRef, Tool
from app.server.answer_forms import TextFormat, check_alone
from app.server.chat_requests import MAX_MESSAGES, Effort
from app.server.openai_requests import (
    WITHOUT_EFFECT,
    Alternatives,
    SamplingFields,
    StreamOptions,
    TokenLimit,
)
from app.server.openai_tools import FunctionFields, ResponsesToolChoice, ToolChoice
from app.server.responses_items import InputItem, flat_name, messages_of
from app.server.validation import Fields, checked, refuse, shown

LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = {
    LOGPROBS,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
}
_STATELESS = "nothing is stored here, so send the whole conversation in `input`"


class FunctionTool(FunctionFields):
    """A function in `tools`."""

    without_effect = frozenset({"strict", "output_schema"})
    only_neutral = {"async": (False,), "defer_loading": (False,), "allowed_callers": (["direct"],)}

    type: str


class NamespaceTool(Fields):
    """Functions under a common name, which Codex makes of an MCP server."""

    type: str
    name: str
    description: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)]

    def flat(self) -> list[Tool]:
        """Its functions under names of their own, each with what is said of all."""
        flat = []
        for one in self.tools:
            tool = one.tool()
            said = "\n\n".join(filter(None, [self.description, tool.description]))
            flat.append(Tool(flat_name(self.name, tool.name), said, tool.parameters))
        return flat


class WebSearch(Fields):
    """A search that OpenAI would do. The model is not told of it and so never searches."""

    without_effect = frozenset(
        {
            "external_web_access",
            "filters",
            "indexed_web_access",
            "return_token_budget",
            "search_content_types",
            "search_context_size",
            "user_location",
        }
    )

    type: str


_KINDS: dict[str, type[FunctionTool | NamespaceTool | WebSearch]] = {
    "function": FunctionTool,
    "namespace": NamespaceTool,
    "web_search": WebSearch,
    "web_search_preview": WebSearch,
}


def _tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise refuse(
            "unsupported_value",
            "{path} is of type {value}; Gryphon's models call functions only",
            value=shown(kind),
        )
    return _KINDS[kind].model_validate(value)


ResponsesTool = Annotated[
    FunctionTool | NamespaceTool | WebSearch,
    BeforeValidator(_tool),
    WithJsonSchema({"type": "object", "properties": {"type": {"enum": list(_KINDS)}}}),
]


class TextFields(Fields):
    """`text`."""

    only_neutral = {"verbosity": ("medium",)}

    format: TextFormat = None


class ReasoningFields(Fields):
    """`reasoning`. What the model thinks comes whole, never summarized."""

    without_effect = frozenset({"summary", "generate_summary"})
    only_neutral = {"context": ("auto",), "mode": ("standard",)}

    effort: Effort = None


# It comes back with every response: OpenAI's own limits.
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponseFields(SamplingFields):
    """Body of `POST /v1/responses`."""

    # max_tool_calls counts calls of OpenAI's own tools, image is about images; client_metadata is
    # what Codex says of itself.
    without_effect = (WITHOUT_EFFECT - {"metadata"}) | {
        "max_tool_calls",
        "image",
        "client_metadata",
    }
    only_neutral = {
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "truncation": ("disabled",),
    }
    advice = {"previous_response_id": _STATELESS, "conversation": _STATELESS}

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_as_items),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
        ),
    ]
    instructions: str | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ResponsesToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    max_output_tokens: TokenLimit | None = None
    top_logprobs: Alternatives | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _agree(self) -> ResponseFields:
        for name in self.include or []:
            if name not in _INCLUDABLE:
                raise refuse(
                    "invalid_value",
                    "{path} holds {value}, which is nothing that can be included",
                    field="include",
                    value=shown(name),
                )
        return self

    @property
    def with_logprobs(self) -> bool:
        """Whether the text comes with logprobs."""
        return LOGPROBS in (self.include or []) or bool(self.top_logprobs)

    @property
    def names(self) -> dict[str, tuple[str | None, str]]:
        """Namespace and name of each function by the name that the model is told."""
        pairs: list[tuple[str | None, str]] = []
        for tool in self.tools or []:
            if isinstance(tool, NamespaceTool):
                pairs += [(tool.name, inner.name) for inner in tool.tools]
            elif isinstance(tool, FunctionTool):
                pairs.append((None, tool.name))
        return {flat_name(*pair): pair for pair in pairs}

    def _tools(self) -> list[Tool]:
        tools = []
        for tool in self.tools or []:
            if isinstance(tool, FunctionTool):
                tools.append(tool.tool())
            elif isinstance(tool, NamespaceTool):
                tools += tool.flat()
        return tools

    def request(
        self, id: str, model: ModelRef, client: str, template_options: dict[str, Any]
    ) -> GenerationRequest:
        """It, as the engine is asked.

        Args:
            template_options: What reasoning.effort means for this model's template.

        Raises:
            ApiError: 400, with the field to blame.
        """
        chosen = self.tool_choice or ToolChoice()
        tools = chosen.of(self._tools())
        constraint = self.text.format if self.text else None
        check_alone("text.format", constraint, tools if chosen.choice != "none" else [])
        messages = messages_of(self.input)
        if self.instructions:
            messages.insert(0, Message("system", self.instructions))
        checked("input", check_messages, messages)
        checked("reasoning.effort", check_options, template_options)
        return GenerationRequest(
            id=id,
            model=model,
            messages=messages,
            tools=tools,
            tool_choice=chosen.choice,
            template_options=template_options,
            sampling=self.sampling,
            max_tokens=self.max_output_tokens,
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs or 0,
            constraint=constraint,
            client=client,
        )

    def echo(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a response says of its request.

        Args:
            body: What was parsed, as it was sent.
        """
        tools = [
            sent
            for tool, sent in zip(self.tools or [], body.get("tools") or [], strict=True)
            if not isinstance(tool, WebSearch)
        ]
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {
                "effort": self.reasoning.effort if self.reasoning else None,
                "summary": None,
            },
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}} | (body.get("text") or {}),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
        }
