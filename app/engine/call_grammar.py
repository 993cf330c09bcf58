"""What an answer must be when tool_choice says that the model calls a tool: a grammar of one call,
in the model's own way of writing calls, with arguments held to the tool's schema.

A model that reasons may do so before the call. Markers that its tokenizer holds as special tokens
are these tokens and no text. The reader of the format (`app.engine.call_formats`) reads all that
the grammar allows but arguments that it refuses in any call: too deep, too long, numbers too large.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from app.engine.answer_parts import AnswerFormat
from app.engine.call_arguments import listed, object_schema, one_schema, tag_choices
from app.engine.constraint import JSON_OPTIONS, Constraint
from app.engine.conversation import ANY_TOOL, Tool
from app.errors import GryphonError

if TYPE_CHECKING:
    from mlxmodels.tokenizer import Tokenizer

# Of white space where a template may have some: between markers, and within a call's JSON.
_GAP = r"gap: /[ \n]?/"
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
USE_AUTO = "Use auto, and say in a message which tool to call."


def call_grammar(
    format: AnswerFormat, tools: Sequence[Tool], tool_choice: str, tokenizer: Tokenizer
) -> Constraint:
    """The grammar of an answer that calls one of the tools, or the one chosen.

    Args:
        format: Of the answer to the prompt; it has calls.
        tool_choice: "required" or a tool's name.
        tokenizer: What tells which markers are special tokens.

    Raises:
        GryphonError: "unsupported_constraint", when the format, or what a tool's schema says of
            its arguments, cannot be written as a grammar.
    """
    write = _WRITERS.get(format.calls)
    if write is None:
        raise GryphonError(
            "unsupported_constraint",
            f"tool_choice {tool_choice!r} cannot be enforced: this model's way of writing calls "
            f"({format.calls}) cannot be written as a grammar. {USE_AUTO}",
        )
    grammar = _Grammar(tokenizer)
    chosen = [tool for tool in tools if tool_choice in (ANY_TOOL, tool.name)]
    calls = " | ".join(grammar.rule("call", write(grammar, tool)) for tool in chosen)
    start = f"{_reasoning(grammar, format)} ({calls})"
    return Constraint("lark", "\n".join([f"start: {start}", _GAP, *grammar.rules]))


def not_enforced(tool_choice: str, error: GryphonError) -> GryphonError:
    """The error of a grammar that could not be compiled, in words about what was asked."""
    if error.code not in ("invalid_constraint", "unsupported_constraint"):
        return error
    # Without where in the grammar it is, of which nobody outside has seen a line.
    why = re.sub(r"at \d+\(\d+\): ", "", error.message.partition(": ")[2] or error.message)
    why = re.split(r" \d+ \| ", why)[0].rstrip(". ")
    return GryphonError(
        error.code, f"tool_choice {tool_choice!r} cannot be enforced: {why}. Or use auto."
    )


class _Grammar:
    """A Lark grammar as its rules are added; an expression is what may stand on a rule's right."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.rules: list[str] = []

    def rule(self, kind: str, expression: str) -> str:
        """Add a rule or, by a `kind` in capitals, a terminal; what it is called."""
        name = f"{kind}_{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if kind == 'until' else ''}: {expression}")
        return name

    def json(self, schema: dict[str, Any]) -> str:
        """JSON that is valid by a schema."""
        guided = {"x-guidance": JSON_OPTIONS} | schema
        return self.rule("json", f"%json {json.dumps(guided)}")

    def marker(self, text: str) -> str:
        """A text of which the tokenizer may hold a part, or all, as special tokens."""
        return " ".join(self._pieces(text))

    def is_special(self, text: str) -> bool:
        """Whether it is one special token."""
        pieces = self._pieces(text)
        return len(pieces) == 1 and pieces[0].startswith("<[")

    def up_to(self, end: str) -> str:
        """Any text, and the marker `end` where it comes first."""
        first, *rest = self._pieces(end)
        if first.startswith("<["):  # a special token, whose spelling would be read as it too
            body = f"/(?s:.+)/ & ~/(?s:.*{_escaped(end)}.*)/"
            return f"{self.rule('TEXT', body)}? {first} {' '.join(rest)}"
        plain = json.loads(first)
        return " ".join([self.rule("until", f"/(?s:.*){_escaped(plain)}/"), *rest])

    def _pieces(self, text: str) -> list[str]:
        pieces: list[str] = []
        for id in self._tokenizer.encode(text, add_special_tokens=False):
            spelled = self._tokenizer.token(id)
            if id in self._tokenizer.special_ids and spelled and spelled in text:
                before, _, text = text.partition(spelled)
                pieces += [literal(before)] if before else []
                pieces.append(f"<[{id}]>")
        return [*pieces, literal(text)] if text else pieces


def literal(text: str) -> str:
    """A text and nothing else."""
    return json.dumps(text)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _reasoning(grammar: _Grammar, format: AnswerFormat) -> str:
    """What the model may think first; it must end where the prompt has begun it."""
    if format.reasoning is None:
        return ""
    opening, closing = format.reasoning
    thought = f"{grammar.up_to(closing)} /[ \\n]{{1,4}}/?"
    if format.begins_reasoning:
        return thought
    return f"({grammar.marker(opening)} {thought})?"


# How each format writes a call of one tool, from its first marker to its last.

_Writer = Callable[[_Grammar, Tool], str]


def _object(
    grammar: _Grammar,
    tool: Tool,
    keys: tuple[str, str] = ("name", "arguments"),
    first: str = "",
    last: str = "",
) -> str:
    """{"name": "look_up", "arguments": {"q": "x"}}; the text `first` is put before the name, the
    expression `last` behind the arguments."""
    name, arguments = keys
    head = f"{literal(f'{{{first}{literal(name)}:')} gap {literal(literal(tool.name) + ',')}"
    between = f"gap {literal(literal(arguments) + ':')} gap"
    return f'{head} {between} {_json_arguments(grammar, tool)} {last} gap "}}"'


def _json_arguments(grammar: _Grammar, tool: Tool) -> str:
    return grammar.json(object_schema(tool))


def _between(opener: str, closer: str) -> _Writer:
    def write(grammar: _Grammar, tool: Tool) -> str:
        inner = _object(grammar, tool)
        return f"{grammar.marker(opener)} gap {inner} gap {grammar.marker(closer)}"

    return write


def _command(grammar: _Grammar, tool: Tool) -> str:
    inner = _object(grammar, tool, ("tool_name", "parameters"), '"tool_call_id": "0", ')
    opener, closer = (grammar.marker(f"<|{end}_ACTION|>") for end in ("START", "END"))
    return rf'{opener} gap "[" /\n {{0,4}}/? {inner} gap "]" gap {closer}'


def _mistral(grammar: _Grammar, tool: Tool) -> str:
    """A list of JSON, or a name with arguments where the tokenizer is of those that have that."""
    id = r'("," gap "\"id\":" gap "\"" /[A-Za-z0-9]{9}/ "\"")?'
    ways = [f'gap "[" {_object(grammar, tool, last=id)} "]"']
    if grammar.is_special("[ARGS]"):
        id = ""
        if grammar.is_special("[CALL_ID]"):
            id = f"({grammar.marker('[CALL_ID]')} /[A-Za-z0-9]{{9}}/)?"
        arguments = _json_arguments(grammar, tool)
        ways.append(f"{literal(tool.name)} {id} {grammar.marker('[ARGS]')} {arguments}")
    return f"{grammar.marker('[TOOL_CALLS]')} ({' | '.join(ways)})"


def _deepseek(grammar: _Grammar, tool: Tool) -> str:
    """R1's way with a fenced block, and V3.1's."""
    before, separator, after = (
        grammar.marker(text)
        for text in (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        )
    )
    arguments, name = _json_arguments(grammar, tool), literal(tool.name)
    fenced = f'"function" {separator} {name} "\\n```json\\n" {arguments} "\\n```"'
    return f"{before} ({fenced} | {name} {separator} {arguments}) {after}"


def _llama(grammar: _Grammar, tool: Tool) -> str:
    return _object(grammar, tool, ("name", "parameters"))


def _functions(grammar: _Grammar, tool: Tool) -> str:
    opener, closer = grammar.marker("<function="), grammar.marker("</function>")
    inner = f"{literal(tool.name + '>')} gap {_json_arguments(grammar, tool)}"
    return f"{opener} {inner} gap {closer}"


def _qwen_xml(grammar: _Grammar, tool: Tool) -> str:
    items = [
        (f"{literal(f'<parameter={key}>')} {value} gap", is_required)
        for key, value, is_required in _tagged(grammar, tool, "\n", "</parameter>")
    ]
    opener, closer = grammar.marker("<tool_call>"), grammar.marker("</tool_call>")
    head = f"{opener} gap {grammar.marker('<function=')} {literal(tool.name + '>')} gap"
    return f"{head} {_sequence(items)} {grammar.marker('</function>')} gap {closer}"


def _glm(grammar: _Grammar, tool: Tool) -> str:
    items = [
        (f"{grammar.marker(f'<arg_key>{key}</arg_key>')} gap {value} gap", is_required)
        for key, value, is_required in _tagged(grammar, tool, "", "</arg_value>", "<arg_value>")
    ]
    head = f"{grammar.marker('<tool_call>')} {literal(tool.name)} gap"
    return f"{head} {_sequence(items)} {grammar.marker('</tool_call>')}"


def _tagged(
    grammar: _Grammar, tool: Tool, blank: str, end: str, start: str = ""
) -> list[tuple[str, str, bool]]:
    """Arguments between tags: key, expression of the value and its tags, whether it is required.

    Args:
        blank: What is between the tags and the value and is no part of it.
    """
    arguments = []
    for key, schema, is_required in listed(tool):
        choices = tag_choices(tool, key, schema, end)
        if choices is None:  # the reader drops one line's end
            value = grammar.up_to(end)
        elif isinstance(choices, dict):
            value = f"{grammar.json(choices)} {grammar.marker(blank + end)}"
        else:
            value = f"({' | '.join(map(literal, choices))}) {grammar.marker(blank + end)}"
        before = grammar.marker(start + blank)
        arguments.append((key, f"{before} {value}", is_required))
    return arguments


def _sequence(items: Sequence[tuple[str, bool]]) -> str:
    return " ".join(item if is_required else f"({item})?" for item, is_required in items)


def _pythonic(grammar: _Grammar, tool: Tool) -> str:
    """[look_up(q="x")], with values as in JSON, which are read as they are meant."""
    items = []
    for key, schema, is_required in listed(tool):
        _check_python_name(key, tool)
        is_boolean = schema.get("type") == "boolean" and not {"enum", "const"} & set(schema)
        value = '("True" | "False")' if is_boolean else grammar.json(one_schema(tool, schema))
        items.append((f"{literal(key + '=')} {value}", is_required))
    _check_python_name(tool.name, tool)
    # Whether a comma comes before one depends on whether any came before it.
    later = first = '")]"'
    for item, is_required in reversed(items):
        ways = [f'"," gap {item} {later}', f"{item} {later}"]
        if not is_required:
            ways = [f"{ways[0]} | {later}", f"{ways[1]} | {first}"]
        later, first = (grammar.rule("items", way) for way in ways)
    return f"{literal('[' + tool.name + '(')} {first}"


def _check_python_name(name: str, tool: Tool) -> None:
    if not _NAME.fullmatch(name):
        raise GryphonError(
            "unsupported_constraint",
            f"The tool {tool.name!r} cannot be enforced: {name[:64]!r} is no name in Python, which "
            f"this model writes calls as. {USE_AUTO}",
        )


_WRITERS: dict[str, _Writer] = {
    "hermes": _between("<tool_call>", "</tool_call>"),
    "nemotron": _between("<toolcall>", "</toolcall>"),
    "nemotron_nano": _between("<TOOLCALL>[", "]</TOOLCALL>"),
    "granite": _between("<|tool_call|>[", "]"),
    "lfm2": _between("<|tool_call_start|>[", "]<|tool_call_end|>"),
    "command": _command,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "llama": _llama,
    "functions": _functions,
    "qwen_xml": _qwen_xml,
    "glm": _glm,
    "pythonic": _pythonic,
}
