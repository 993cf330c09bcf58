"""A conversation becomes the text that a model was trained to continue.

What a template can do is found out by rendering, not by guessing from its name: whether it keeps a
system message, whether it tells the model of tools, how it writes a call of an earlier turn and in
which shape it wants to be given one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from app.engine.answer_parts import PLAIN, AnswerFormat
from app.engine.call_formats import CALL_FORMATS, bare_call_format_of, call_format_of
from app.engine.conversation import Message, Tool, ToolCallPart, parsed_arguments
from app.engine.template import ChatTemplate
from app.errors import GryphonError

_REASONING = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)

BASE_MODEL = "This is a base model without a chat template: it continues the text."
# As Google says of Gemma: system instructions go directly into the initial user prompt.
# https://ai.google.dev/gemma/docs/core/prompt-structure
SYSTEM_FOLDED = (
    "The model's chat template has no place for this system message: "
    "it was put before the user message that follows it."
)
TURNS_JOINED = "The model's chat template wants turns that alternate: equal ones were joined."

_QUESTION, _RESULT, _SYSTEM = "gryphon-question", "gryphon-result", "gryphon-system"
_TOOL, _KEY, _VALUE = "gryphon_tool", "gryphon_key", "gryphon-value"
_PROBE = Tool(_TOOL, "", {"type": "object", "properties": {_KEY: {"type": "string"}}})
_MAX_KNOWN = 64

Rendered = dict[str, Any]


class ChatPrompt(NamedTuple):
    """What to give to the model, how to read its answer, and what a person should know."""

    text: str
    format: AnswerFormat
    notice: str


class _Shape(NamedTuple):
    """How a template wants calls of earlier turns, and what it makes of them.

    Attributes:
        calls: Name in `CALL_FORMATS`; None when calls are written in no way that we can read.
        writes_calls: Whether it writes them at all.
        arguments_are_text: Whether arguments are given as JSON text rather than as objects.
        empty_is_none: Whether the content beside calls is None when it is empty.
        ids_are_short: Whether ids must have nine letters and digits (Mistral).
    """

    calls: str | None
    writes_calls: bool = True
    arguments_are_text: bool = False
    empty_is_none: bool = False
    ids_are_short: bool = False


class ChatPrompts:
    """The chat templates of one model.

    Args:
        sources: By name: "default", and "tool_use" for conversations with tools. None at all is a
            base model, which gets the contents alone, separated by blank lines.
        special_tokens: As in `ChatTemplate`.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = sources
        self._special_tokens = special_tokens
        self._templates: dict[str, ChatTemplate] = {}
        self._known: dict[tuple[str, str, str], Any] = {}

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        options: Mapping[str, Any] | None = None,
        *,
        opens_turn: bool = True,
    ) -> ChatPrompt:
        """The prompt of a conversation.

        Args:
            opens_turn: Whether the assistant's turn is open at its end.

        Raises:
            GryphonError: "template_error", when a template is broken or refuses the conversation;
                "invalid_request", when it knows no tools, or none of an option's name.
        """
        options = options or {}
        uses_tools = bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
        template = self._template(uses_tools)
        if template is None:
            return self._base_prompt(messages, uses_tools, options)
        for name in options:
            if name not in template.variables:
                raise _refused(
                    f"The model's chat template has no option {name!r}. Leave it out of "
                    "template_options."
                )
        shape = None
        if uses_tools:
            shape = self._shape(template, options)
        if tools:
            self._check_tools(template, options, shape)
        if any(m.tool_calls for m in messages) and not _can_say_calls(shape):
            raise _refused(
                "The model's chat template has no tools: it cannot be told of the tool calls in "
                "messages. Leave them out, or choose a model that is made for tools."
            )
        text, notice = self._rendered(
            template, messages, tools, options, shape, opens_turn=opens_turn
        )
        calls = shape.calls or "" if shape is not None and tools else ""
        return ChatPrompt(text, _format(template, text, calls), notice)

    def _template(self, uses_tools: bool) -> ChatTemplate | None:
        if not self._sources:
            return None
        name = "tool_use" if uses_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise GryphonError(
                "template_error",
                "The model has several chat templates and none is named default: "
                f"{', '.join(sorted(self._sources))[:200]}. Use a plain completion, or another "
                "build of this model.",
            )
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._sources[name], self._special_tokens)
        return self._templates[name]

    @staticmethod
    def _base_prompt(
        messages: Sequence[Message], uses_tools: bool, options: Mapping[str, Any]
    ) -> ChatPrompt:
        if uses_tools:
            raise _refused(f"{BASE_MODEL} It knows no tools: choose a model that is made for them.")
        if options:
            raise _refused(f"{BASE_MODEL} Leave template_options out.")
        return ChatPrompt("\n\n".join(m.content for m in messages), PLAIN, BASE_MODEL)

    # What a template can do. Found out once for each set of options.

    def _learned(self, what: str, template: ChatTemplate, options: Mapping[str, Any]) -> Any:
        key = (what, template.source, json.dumps(options, sort_keys=True))
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            learn = {"shape": _shape_of, "tools": _tells_tools, "system": _keeps_system}[what]
            self._known[key] = learn(template, options)
        return self._known[key]

    def _shape(self, template: ChatTemplate, options: Mapping[str, Any]) -> _Shape:
        shape: _Shape = self._learned("shape", template, options)
        return shape

    def _check_tools(
        self, template: ChatTemplate, options: Mapping[str, Any], shape: _Shape | None
    ) -> None:
        if not self._learned("tools", template, options):
            raise _refused(
                "The model's chat template has no tools: it cannot be told of them. Leave tools "
                "out, or choose a model that is made for them."
            )
        if shape is None or shape.calls is None:
            raise _refused(
                "The model's chat template has tools, but its way of writing calls is not one that "
                "this version reads. Leave tools out, or choose another model."
            )

    # Rendering.

    def _rendered(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        options: Mapping[str, Any],
        shape: _Shape | None,
        *,
        opens_turn: bool,
    ) -> tuple[str, str]:
        """The text, in the first arrangement of the messages that the template accepts, and what
        was arranged."""
        described = [_described(tool) for tool in tools] or None
        first_error: GryphonError | None = None
        keeps_system = True
        if any(message.role == "system" for message in messages):
            keeps_system = self._learned("system", template, options)
        for arranged, notice in _arrangements(messages, keeps_system):
            try:
                spelled = _spelled(arranged, shape)
                text = template.render(spelled, described, options, opens_turn=opens_turn)
                return text, notice
            except GryphonError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error


def _refused(message: str) -> GryphonError:
    return GryphonError("invalid_request", message)


def _format(template: ChatTemplate, text: str, calls: str) -> AnswerFormat:
    """How answers to a prompt are marked: only as the template itself says."""
    markers = next((pair for pair in _REASONING if any(m in template.source for m in pair)), None)
    begins = markers is not None and text.rstrip().endswith(markers[0])
    return AnswerFormat(markers, begins, calls)


def _can_say_calls(shape: _Shape | None) -> bool:
    if shape is None or shape.writes_calls:
        return shape is not None
    return shape.calls is not None and CALL_FORMATS[shape.calls].written is not None


def _described(tool: Tool) -> Rendered:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {"type": "function", "function": function}


def _spelled(messages: Sequence[Message], shape: _Shape | None) -> list[Rendered]:
    """Messages in OpenAI's shape, with the departures from it that the template wants."""
    shape = shape or _Shape(None)
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    spelled = []
    for message in messages:
        one: Rendered = {"role": message.role, "content": message.content}
        if message.reasoning:
            one["reasoning_content"] = message.reasoning
        if message.role == "tool":
            one["tool_call_id"] = _call_id(message.tool_call_id, shape)
            name = message.name or names.get(message.tool_call_id, "")
            one |= {"name": name} if name else {}
        elif message.name:
            one["name"] = message.name
        if message.tool_calls and shape.writes_calls:
            one["tool_calls"] = [
                {
                    "id": _call_id(call.id, shape),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments
                        if shape.arguments_are_text
                        else parsed_arguments(call.arguments),
                    },
                }
                for call in message.tool_calls
            ]
            if shape.empty_is_none and not message.content:
                one["content"] = None
        elif message.tool_calls:
            one["content"] = _written(message, shape)
        spelled.append(one)
    return spelled


def _written(message: Message, shape: _Shape) -> str:
    """Content and calls as the model itself wrote them, for templates that leave that to us."""
    assert shape.calls is not None
    opener, closer = CALL_FORMATS[shape.calls].written or ("", "")
    calls = [
        f'{opener} {{"name": "{call.name}", "arguments": {call.arguments}}} {closer}'
        for call in message.tool_calls
    ]
    return "\n".join([message.content, *calls] if message.content else calls)


def _call_id(id: str, shape: _Shape) -> str:
    return hashlib.sha256(id.encode()).hexdigest()[:9] if shape.ids_are_short else id


def _arrangements(
    messages: Sequence[Message], keeps_system: bool
) -> Iterator[tuple[Sequence[Message], str]]:
    """The messages as they are, and what else a template may accept, with a notice of it."""
    arranged: list[tuple[Sequence[Message], str]] = []
    if keeps_system:
        arranged.append((messages, ""))
        arranged.append(([*messages[:1], *_folded(messages[1:])], SYSTEM_FOLDED))
    arranged.append((_folded(messages), SYSTEM_FOLDED))
    seen: list[Sequence[Message]] = []
    for joined in (False, True):
        for given, notice in arranged:
            turns = _joined(given) if joined else given
            if turns in seen:
                continue
            seen.append(turns)
            joins = TURNS_JOINED if len(turns) < len(given) else ""
            yield turns, " ".join(filter(None, [notice, joins]))


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System messages become the beginning of the user message that follows."""
    turns: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif message.role == "user" and waiting:
            content = "\n\n".join([*waiting, message.content])
            turns.append(msgspec.structs.replace(message, content=content))
            waiting = []
        else:
            turns.append(message)
    return [*turns, Message("user", "\n\n".join(waiting))] if waiting else turns


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Messages of the same role in a row become one."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        plain = last is not None and not last.tool_calls and not message.tool_calls
        if last is not None and plain and last.role == message.role in ("user", "assistant"):
            reasoning = "\n\n".join(filter(None, [last.reasoning, message.reasoning]))
            content = f"{last.content}\n\n{message.content}"
            turns[-1] = msgspec.structs.replace(last, content=content, reasoning=reasoning)
        else:
            turns.append(message)
    return turns


# What is learned of templates.


def _try(
    template: ChatTemplate,
    messages: Sequence[Rendered],
    options: Mapping[str, Any],
    tools: Sequence[Tool] = (),
) -> str:
    """The text; empty when the template refuses."""
    try:
        return template.render(messages, [_described(tool) for tool in tools] or None, options)
    except GryphonError:
        return ""


def _keeps_system(template: ChatTemplate, options: Mapping[str, Any]) -> bool:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _QUESTION}]
    return _SYSTEM in _try(template, messages, options)


def _tells_tools(template: ChatTemplate, options: Mapping[str, Any]) -> bool:
    question = [{"role": "user", "content": _QUESTION}]
    # Some have a place for tools in a system message alone.
    system = [{"role": "system", "content": _SYSTEM}, *question]
    return any(
        _TOOL in _try(template, messages, options, [_PROBE]) for messages in (question, system)
    )


def _shape_of(template: ChatTemplate, options: Mapping[str, Any]) -> _Shape:
    call = ToolCallPart("call_0123456789", _TOOL, json.dumps({_KEY: _VALUE}))
    conversation = [
        Message("user", _QUESTION),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", _RESULT, tool_call_id=call.id),
    ]
    for ids_are_short in (False, True):
        for empty_is_none in (True, False):
            for arguments_are_text in (False, True):
                shape = _Shape("", True, arguments_are_text, empty_is_none, ids_are_short)
                text = _try(template, _spelled(conversation, shape), options, [_PROBE])
                _, _, after = text.partition(_QUESTION)
                written, result, _ = after.partition(_RESULT)
                if result and _is_sound(written):
                    name = call_format_of(written) or bare_call_format_of(written, _TOOL)
                    return shape._replace(calls=name)
    return _Shape(_said_format(template), writes_calls=False)


def _is_sound(written: str) -> bool:
    """Whether a call was written whole, and not as Python or as a string in a string."""
    wrong = (f"'{_KEY}'", f'\\"{_KEY}', "None")
    return _TOOL in written and _VALUE in written and not any(w in written for w in wrong)


def _said_format(template: ChatTemplate) -> str | None:
    """The format that a template which writes no calls tells of, in itself or to the model."""
    if "<|python_tag|>" in template.source:
        return "llama"
    # Nemotron mini's names the tools and leaves the rest to the content.
    if "<extra_id_1>" in template.source and "<tool>" in template.source:
        return "nemotron"
    return call_format_of(template.source)
