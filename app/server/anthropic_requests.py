"""The bodies of Anthropic's messages routes; docs/rest/anthropic.md lists their fields."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from app.engine.constraint import Constraint
from app.engine.conversation import Message, ToolCallPart
from app.engine.conversation import Tool as EngineTool
from app.engine.protocol import Sampling
from app.server.validation import Fields, refuse, shown

_MAX_INT = 2**31 - 1
_MOST_NAME = 1000
_MOST_BLOCKS = 10_000

# Claude Code's, first in its system prompt; it changes with every request, and nothing after it
# could then be taken from an earlier one.
_BILLING_LINE = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*")

_BLOCK_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
}
_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, _BLOCK_SCHEMA]}


class TextBlock(Fields):
    """Words."""

    without_effect = frozenset({"cache_control", "citations"})

    type: Literal["text"]
    text: str


class ThinkingBlock(Fields):
    """What the model thought before it answered."""

    without_effect = frozenset({"signature", "cache_control"})

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Fields):
    """Thoughts that only Anthropic can read."""

    without_effect = frozenset({"data", "cache_control"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(Fields):
    """A call that the model made."""

    without_effect = frozenset({"cache_control", "caller", "toolset_name"})

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=200)]
    name: str
    input: dict[str, Any]


def _as_blocks(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_block(one: Any) -> TextBlock:
    kind = one.get("type") if isinstance(one, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise refuse(
            "unsupported_value",
            "{path} is a block of type {value}; Gryphon's models read text only",
            value=shown(kind),
        )
    return TextBlock.model_validate(one)


TextBlocks = Annotated[
    list[Annotated[TextBlock, PlainValidator(_text_block)]],
    Field(max_length=_MOST_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks),
    WithJsonSchema(_TEXT_SCHEMA),
]


def _joined(blocks: Sequence[TextBlock]) -> str:
    """The text of blocks, a paragraph each."""
    return "\n\n".join(block.text for block in blocks)


class ToolResultBlock(Fields):
    """What a tool said."""

    without_effect = frozenset({"cache_control", "toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=200)]
    content: TextBlocks = []
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """What the model is told, which has no other place for a failure than the words."""
        text = _joined(self.content)
        is_said = text.lower().startswith("error")
        return f"Error: {text}" if self.is_error and not is_said else text


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_BLOCKS: dict[str, type[Block]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}


def _block(one: Any) -> Block:
    kind = one.get("type") if isinstance(one, dict) else None
    if not isinstance(kind, str):
        raise refuse("invalid_value", "{path} should be an object with a `type`")
    if kind not in _BLOCKS:
        raise refuse(
            "unsupported_value",
            "{path} is a block of type {value}; Gryphon's models read text only",
            value=shown(kind),
        )
    return _BLOCKS[kind].model_validate(one)


Blocks = Annotated[
    list[Annotated[Block, PlainValidator(_block)]],
    Field(max_length=_MOST_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks),
    WithJsonSchema(_TEXT_SCHEMA),
]


class ChatMessage(Fields):
    """One of `messages`."""

    role: Literal["user", "assistant", "system"]
    content: Blocks

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> ChatMessage:
        allowed: dict[str, tuple[type[Fields], ...]] = {
            "user": (TextBlock, ToolResultBlock),
            "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
            "system": (TextBlock,),
        }
        for block in self.content:
            if not isinstance(block, allowed[self.role]):
                raise refuse(
                    "invalid_value",
                    "{path} has a block of type {value}, which is not for the role {role}",
                    field="content",
                    value=shown(block.type),
                    role=self.role,
                )
        return self

    @property
    def for_engine(self) -> list[Message]:
        """The turns that it stands for: each result of a tool is one of its own."""
        if self.role == "assistant":
            return [self._assistant]
        turns: list[Message] = []
        texts: list[str] = []

        def say() -> None:
            if texts:
                turns.append(Message(self.role, "\n\n".join(texts)))
                texts.clear()

        for block in self.content:
            if isinstance(block, ToolResultBlock):
                say()
                turns.append(Message("tool", block.text, tool_call_id=block.tool_use_id))
            elif isinstance(block, TextBlock):
                texts.append(block.text)
        say()
        return turns or [Message(self.role, "")]

    @property
    def _assistant(self) -> Message:
        texts = [block.text for block in self.content if isinstance(block, TextBlock)]
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        calls = [
            ToolCallPart(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        return Message("assistant", "\n\n".join(texts), "\n\n".join(thoughts), calls)


class Tool(Fields):
    """One of `tools`."""

    without_effect = frozenset({"cache_control", "eager_input_streaming", "strict"})
    only_neutral = {
        "defer_loading": (False,),
        "input_examples": ([],),
        "allowed_callers": (["direct"],),
    }

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _runs_here(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in (None, "custom"):
            raise refuse(
                "unsupported_value",
                "{path} = {value} is not supported: it runs on Anthropic's servers; give tools "
                "with an `input_schema`, which you run yourself",
                field="type",
                value=shown(kind),
            )
        return data

    @property
    def for_engine(self) -> EngineTool:
        return EngineTool(self.name, self.description or "", self.input_schema)


class ToolChoice(Fields):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> ToolChoice:
        if (self.type == "tool") != bool(self.name):
            raise refuse(
                "invalid_value", "{path} goes with the type `tool`, and only with it", field="name"
            )
        return self


class Thinking(Fields):
    """`thinking`."""

    without_effect = frozenset({"budget_tokens"})

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


def _constraint(form: Any) -> Constraint:
    if not isinstance(form, dict) or form.keys() != {"type", "schema"}:
        raise refuse("invalid_value", "{path} should be an object with a `type` and a `schema`")
    if form["type"] != "json_schema" or not isinstance(form["schema"], dict):
        raise refuse(
            "invalid_value", '{path} should have the type "json_schema" and an object as `schema`'
        )
    return Constraint("json_schema", json.dumps(form["schema"], ensure_ascii=False))


_FORM_SCHEMA = {
    "type": "object",
    "required": ["type", "schema"],
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
}


class OutputConfig(Fields):
    """`output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: (
        Annotated[Constraint, PlainValidator(_constraint), WithJsonSchema(_FORM_SCHEMA)] | None
    ) = None


class ContextEdit(Fields):
    """One of `context_management.edits`."""

    without_effect = frozenset({"keep"})

    type: str

    @model_validator(mode="after")
    def _clears_thinking(self) -> ContextEdit:
        if not self.type.startswith("clear_thinking"):
            raise refuse(
                "unsupported_value",
                "{path} = {value} is not supported and would change the prompt; leave it out",
                field="type",
                value=shown(self.type),
            )
        return self


class ContextManagement(Fields):
    """`context_management`."""

    edits: Annotated[list[ContextEdit], Field(max_length=16)] = []


class PromptFields(Fields):
    """What both routes have in common: all that becomes the prompt."""

    without_effect = frozenset(
        {
            "metadata",
            "service_tier",
            "cache_control",
            "betas",
            "speed",
            "inference_geo",
            "user_profile_id",
            "workspace_id",
            "diagnostics",
        }
    )
    only_neutral = {
        "container": (),
        "mcp_servers": ([],),
        "fallbacks": ([],),
        "compaction": (),
        "thread": (),
    }

    model: Annotated[str, Field(min_length=1, max_length=_MOST_NAME)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: TextBlocks = []
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> PromptFields:
        if self.messages[-1].role == "assistant":
            raise refuse(
                "unsupported_value",
                "{path} ends with a message of the assistant, to be continued (prefill), which is "
                "not supported; end with the user's, and ask for a form with `output_config`",
                field="messages",
            )
        return self

    @property
    def conversation(self) -> list[Message]:
        turns = [turn for message in self.messages for turn in message.for_engine]
        texts = [_BILLING_LINE.sub("", block.text) for block in self.system]
        system = "\n\n".join(filter(None, texts))
        return [Message("system", system), *turns] if system else turns

    @property
    def engine_tools(self) -> list[EngineTool]:
        return [tool.for_engine for tool in self.tools or []]

    @property
    def engine_tool_choice(self) -> str:
        choice = self.tool_choice
        if choice is None:
            return "auto"
        return {"any": "required", "tool": choice.name or ""}.get(choice.type, choice.type)

    @property
    def think(self) -> bool | None:
        return None if self.thinking is None else self.thinking.type != "disabled"

    @property
    def effort(self) -> str | None:
        return None if self.output_config is None else self.output_config.effort

    @property
    def constraint(self) -> Constraint | None:
        return None if self.output_config is None else self.output_config.format


class CountFields(PromptFields):
    """Body of `POST /v1/messages/count_tokens`."""

    without_effect = PromptFields.without_effect | {"max_tokens", "stream"}


class MessagesFields(PromptFields):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None

    @property
    def sampling(self) -> Sampling:
        """What the request says; the rest is left to the model and the house."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def one_call_only(self) -> bool:
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"
