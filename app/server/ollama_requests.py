"""The bodies of Ollama's chat and generate routes; docs/rest/ollama.md lists their fields."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from app.engine.constraint import Constraint
from app.engine.conversation import Message, ToolCallPart
from app.engine.conversation import Tool as EngineTool
from app.engine.protocol import Sampling
from app.server.validation import Fields, refuse, shown

_MAX_INT = 2**31 - 1
_MOST_NAME = 1000
_ROLES = ("system", "user", "assistant", "tool")
MAX_CONTEXT = 1024 * 1024
"""Numbers in a `context`; an answer whose own would have more has none."""

# As Go writes durations.
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)(0|(?:{_PART.pattern})+)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_UNIT_S["h"] = 3600.0


def _seconds(value: Any) -> float:
    """A keep_alive in seconds, infinite for a negative one."""
    seconds: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and len(value) <= 64 and (found := _DURATION.fullmatch(value)):
        parts = _PART.findall(found[2])
        seconds = sum(float(number) * _UNIT_S[unit] for number, unit in parts)
        seconds = -seconds if found[1] == "-" else seconds
    if seconds is None or math.isnan(seconds):
        raise refuse(
            "invalid_value",
            '{path} should be seconds or a duration such as "5m" or "1h30m", got {value}',
            value=shown(value),
        )
    return math.inf if seconds < 0 else seconds


def _whole(value: Any) -> Any:
    # Some clients know only one kind of number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _constraint(value: Any) -> Constraint | None:
    if value == "":
        return None
    if value == "json":
        return Constraint("json_object")
    if isinstance(value, dict):
        return Constraint("json_schema", json.dumps(value, ensure_ascii=False))
    raise refuse(
        "invalid_value", '{path} should be "json" or a JSON schema, got {value}', value=shown(value)
    )


def _role(role: str) -> str:
    if role.lower() not in _ROLES:
        raise refuse(
            "invalid_value",
            "{path} should be system, user, assistant or tool, got {value}",
            value=shown(role),
        )
    return role.lower()


def _think(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("low", "medium", "high", "max"):
        return value
    raise refuse(
        "invalid_value",
        '{path} should be true, false, "low", "medium", "high" or "max", got {value}',
        value=shown(value),
    )


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _empty_if_null(value: Any) -> Any:
    return "" if value is None else value


def _none_if_null(value: Any) -> Any:
    return [] if value is None else value


Name = Annotated[str, Field(min_length=1, max_length=_MOST_NAME)]
Text = Annotated[str, BeforeValidator(_empty_if_null)]
KeepAlive = Annotated[
    float,
    PlainValidator(_seconds),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]}),
]
Format = Annotated[
    Constraint | None,
    PlainValidator(_constraint),
    WithJsonSchema({"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]}),
]
Think = Annotated[
    bool | str,
    PlainValidator(_think),
    WithJsonSchema({"enum": [True, False, "low", "medium", "high", "max"]}),
]
Number = Annotated[int, BeforeValidator(_whole)]


class Options(Fields):
    """`options`."""

    without_effect = frozenset(
        {
            "num_keep",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "num_gqa",
            "numa",
            "low_vram",
            "f16_kv",
            "use_mmap",
            "use_mlock",
            "draft_num_predict",
            "mirostat_tau",
            "mirostat_eta",
        }
    )
    only_neutral = {
        "mirostat": (0,),
        "tfs_z": (1, 1.0),
        "penalize_newline": (True,),
        "rope_frequency_base": (0, 0.0),
        "rope_frequency_scale": (1, 1.0, 0, 0.0),
        "logits_all": (False,),
        "vocab_only": (False,),
        "embedding_only": (False,),
    }

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[Number, Field(ge=-1, le=_MAX_INT)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    repeat_last_n: Annotated[Number, Field(ge=-1, le=_MAX_INT)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Number, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(max_length=16),
            BeforeValidator(_as_list),
        ]
        | None
    ) = None
    num_predict: Annotated[Number, Field(ge=-2, le=_MAX_INT)] | None = None
    num_ctx: Annotated[Number, Field(ge=1, le=_MAX_INT)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Options:
        if self.num_predict == 0:
            raise refuse(
                "invalid_value",
                "{path} should be 1 or more, or -1 for what is left of the context, got 0",
                field="num_predict",
            )
        penalties = (self.repeat_penalty or 1, self.presence_penalty, self.frequency_penalty)
        is_penalized = penalties[0] != 1 or any(penalties[1:])
        if is_penalized and self.repeat_last_n not in (None, -1, 0):
            raise refuse(
                "unsupported_value",
                "{path} = {value} is not supported beside a penalty: penalties count the whole "
                "prompt and answer here; give -1 or leave it out",
                field="repeat_last_n",
                value=str(self.repeat_last_n),
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """What the options say; the rest is left to the model and the house."""
        names = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given["top_k"] = None if self.top_k is None else max(0, self.top_k)
        given["frequency_penalty"] = self.frequency_penalty
        given["repetition_penalty"] = self.repeat_penalty
        given["seed"] = None if self.seed == -1 else self.seed
        if self.repeat_last_n == 0:
            off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
            given |= off
        return Sampling(**given)

    @property
    def max_tokens(self) -> int | None:
        """num_predict; None for what is left of the context."""
        limited = self.num_predict is not None and self.num_predict > 0
        return self.num_predict if limited else None


class CalledFunction(Fields):
    """What a tool call calls."""

    without_effect = frozenset({"index"})

    name: str
    arguments: dict[str, Any] | None = None


class ToolCall(Fields):
    """One of a message's `tool_calls`."""

    without_effect = frozenset({"type"})

    id: str | None = None
    function: CalledFunction


class ChatMessage(Fields):
    """One of `messages`."""

    without_effect = frozenset({"name"})
    only_neutral = {"images": ([],)}

    role: Annotated[
        str, AfterValidator(_role), WithJsonSchema({"type": "string", "enum": list(_ROLES)})
    ]
    content: Text = ""
    thinking: Text = ""
    tool_calls: Annotated[list[ToolCall], BeforeValidator(_none_if_null)] = []
    tool_name: Text = ""
    tool_call_id: Text = ""


class ToolFunction(Fields):
    """What a tool is."""

    without_effect = frozenset({"strict"})

    name: str
    description: Text = ""
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    """One of `tools`."""

    without_effect = frozenset({"items"})

    type: Literal["function"] | None = None
    function: ToolFunction

    @property
    def for_engine(self) -> EngineTool:
        function = self.function
        if function.parameters is None:
            return EngineTool(function.name, function.description)
        return EngineTool(function.name, function.description, function.parameters)


class ModelFields(Fields):
    """What every route has that makes a model work."""

    model: Name
    keep_alive: KeepAlive | None = None
    options: Options | None = None

    @property
    def given_options(self) -> Options:
        return self.options or Options()


class AnswerFields(ModelFields):
    """What chat and generate have in common."""

    without_effect = frozenset({"truncate", "shift"})

    stream: bool | None = None
    format: Format | None = None
    think: Think | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def streams(self) -> bool:
        return self.stream is not False


class ChatFields(AnswerFields):
    """Body of `POST /api/chat`."""

    only_neutral = {"_debug_render_only": (False,)}

    messages: Annotated[
        list[ChatMessage],
        Field(max_length=10_000, fail_fast=True),
        BeforeValidator(_none_if_null),
    ] = []
    tools: Annotated[list[Tool], Field(max_length=128), BeforeValidator(_none_if_null)] = []

    @property
    def conversation(self) -> list[Message]:
        """The messages, results of tools named after the calls that they answer."""
        messages: list[Message] = []
        waiting: list[ToolCallPart] = []
        for place, one in enumerate(self.messages):
            calls = [
                ToolCallPart(
                    call.id or f"call_{place}_{index}",
                    call.function.name,
                    json.dumps(call.function.arguments or {}, ensure_ascii=False),
                )
                for index, call in enumerate(one.tool_calls)
            ]
            call_id, name = one.tool_call_id, ""
            if one.role == "tool":
                name = one.tool_name
                answered = _answered(one, waiting)
                if answered is not None:
                    waiting.remove(answered)
                    call_id, name = answered.id, name or answered.name
            elif calls:
                waiting = [*calls]
            messages.append(Message(one.role, one.content, one.thinking, calls, call_id, name))
        return messages


def _answered(message: ChatMessage, waiting: list[ToolCallPart]) -> ToolCallPart | None:
    """The call whose result a message is; Ollama's older clients give no id, and may give no name.

    None where it is none of those that wait.
    """
    if message.tool_call_id:
        fitting = [call for call in waiting if call.id == message.tool_call_id]
    elif message.tool_name:
        fitting = [call for call in waiting if call.name == message.tool_name]
    else:
        fitting = waiting
    return fitting[0] if fitting else None


class GenerateFields(AnswerFields):
    """Body of `POST /api/generate`."""

    only_neutral = {
        "_debug_render_only": (False,),
        "images": ([],),
        "template": ("",),
    }

    prompt: Text = ""
    suffix: Text = ""
    system: Text = ""
    raw: bool | None = None
    context: Annotated[
        list[Annotated[int, Field(ge=0, le=_MAX_INT)]],
        Field(max_length=MAX_CONTEXT, fail_fast=True),
        BeforeValidator(_none_if_null),
    ] = []

    @model_validator(mode="after")
    def _agree(self) -> GenerateFields:
        beside = {"system": self.system, "context": self.context, "think": self.think}
        for name, value in beside.items():
            if (self.raw or self.suffix) and value:
                raise refuse(
                    "invalid_value",
                    "{path} is for the chat template, which a prompt with `raw` or `suffix` does "
                    "not go through; leave one of them out",
                    field=name,
                )
        return self
