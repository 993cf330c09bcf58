"""Turns a launch's Metal text into one C++ translation unit for the shim.

Two things are rewritten, in place so that every line keeps its number: attributes in [[ ]] go, and
`threadgroup` storage becomes a reference to memory that the runtime gives the threadgroup.
"""

from __future__ import annotations

from dataclasses import dataclass

from .capture import Launch, Parameter
from .tokens import Token, matching, tokenize

# The 20 attributes that MLX can add, as expressions over mh::Thread.
_VECTOR_ATTRIBUTES = {
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position_in_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threads_per_threadgroup": "threads_per_threadgroup",
}
_SCALAR_ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "mh::quads(t.dispatch_threads_per_threadgroup)",
    "dispatch_simdgroups_per_threadgroup": "t.dispatch_simdgroups_per_threadgroup",
    "quadgroup_index_in_threadgroup": "t.index_in_threadgroup / 4",
    "quadgroups_per_threadgroup": "mh::quads(t.threads_per_threadgroup)",
    "simdgroup_index_in_threadgroup": "t.simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "t.simdgroups_per_threadgroup",
    "thread_execution_width": "mh::kLanes",
    "thread_index_in_quadgroup": "t.index_in_simdgroup % 4",
    "thread_index_in_simdgroup": "t.index_in_simdgroup",
    "thread_index_in_threadgroup": "t.index_in_threadgroup",
    "threads_per_simdgroup": "mh::kLanes",
}
_MAX_DECLARATIONS = 32


class TranslationError(Exception):
    """Text that the host does not understand; never a guess."""


@dataclass(frozen=True)
class ThreadgroupArray:
    name: str
    line: int
    is_in_header: bool


@dataclass(frozen=True)
class Unit:
    """A translation unit and what its lines and ids stand for."""

    source: str
    body_file: str
    header_file: str
    arrays: tuple[ThreadgroupArray, ...]


def translate(launch: Launch) -> Unit:
    arrays: list[ThreadgroupArray] = []
    header = _rewrite(launch.header, arrays, is_header=True)
    body = _rewrite(launch.body, arrays, is_header=False)
    body_file, header_file = f"{launch.name}.metal", f"{launch.name}.header"
    lines = [
        '#include "mh_prelude.h"',
        f'#line 1 "{header_file}"',
        header,
        f'#line 1 "{launch.name}.signature"',
        launch.template,
        f"static {launch.signature} {{",
        f'#line 1 "{body_file}"',
        body,
        "}",
        f'#line 1 "{launch.name}.entry"',
        'extern "C" __attribute__((visibility("default")))',
        "void mh_entry(void* const* b, const mh::Thread& t) {",
        f"  {launch.function}{launch.arguments}({', '.join(_arguments(launch.parameters))});",
        "}",
        'extern "C" __attribute__((visibility("default")))',
        "const mh::Declaration* mh_declarations() { return mh::declarations; }",
        "",
    ]
    return Unit("\n".join(lines), body_file, header_file, tuple(arrays))


def _arguments(parameters: tuple[Parameter, ...]) -> list[str]:
    arguments, buffer = [], 0
    for p in parameters:
        if p.space:
            pointer = f"static_cast<{'const ' * p.is_const}{p.type}*>(b[{buffer}])"
            arguments.append("*" * p.is_reference + pointer)
            buffer += 1
        elif p.name in _VECTOR_ATTRIBUTES:
            field = f"t.{_VECTOR_ATTRIBUTES[p.name]}"
            arguments.append(f"uint3({field}.x, {field}.y, {field}.z)")
        elif p.name in _SCALAR_ATTRIBUTES:
            arguments.append(_SCALAR_ATTRIBUTES[p.name])
        elif p.name == "grid_origin":
            arguments.append("uint3(0)")
        else:
            raise TranslationError(f"thread attribute {p.name} is not known to the host")
    return arguments


def _rewrite(source: str, arrays: list[ThreadgroupArray], *, is_header: bool) -> str:
    tokens = tokenize(source)
    edits: list[tuple[int, int, str]] = []
    depth, i = 0, 0
    while i < len(tokens):
        token = tokens[i]
        if token.kind == "directive" and "threadgroup " in token.text:
            raise TranslationError(f"line {token.line}: a macro with `threadgroup` storage in it")
        if token.text == "[[":
            close = _attribute_end(tokens, i)
            edits.append((token.start, tokens[close].end, ""))
            i = close
        depth += (token.text == "(") - (token.text == ")")
        if token.text == "threadgroup" and depth == 0:
            end = _declaration(tokens, i, source, arrays, edits, is_header)
            i = max(i, end)
        i += 1
    for start, end, text in reversed(edits):
        newlines = "\n" * source.count("\n", start, end)
        source = source[:start] + text + newlines + source[end:]
    return source


def _attribute_end(tokens: list[Token], at: int) -> int:
    for i in range(at + 1, len(tokens) - 1):
        if tokens[i].text == "]" and tokens[i + 1].text == "]":
            return i + 1
    raise TranslationError(f"line {tokens[at].line}: `[[` without `]]`")


def _declaration(
    tokens: list[Token],
    at: int,
    source: str,
    arrays: list[ThreadgroupArray],
    edits: list[tuple[int, int, str]],
    is_header: bool,
) -> int:
    """Rewrites the declaration at this `threadgroup`, if it is one of storage; where it ends."""
    line = tokens[at].line
    problem = TranslationError(
        f"line {line}: a `threadgroup` declaration that the host cannot read"
    )

    i = at + 1
    if i < len(tokens) and tokens[i].text in ("{", ":", ";", "const"):
        return at  # qualifies a member function, or points to const
    start_of_type = i
    while i < len(tokens) and (tokens[i].kind == "name" or tokens[i].text == "::"):
        i += 1
        if i < len(tokens) and tokens[i].text == "<":
            i = matching(tokens, i) + 1
    if i >= len(tokens):
        raise problem
    if tokens[i].text in ("*", "&", "&&", ">", ")"):
        return at  # a pointer to threadgroup memory, not threadgroup memory
    if tokens[i].text == "(" and tokens[i + 1].text in ("*", "&"):
        return at  # to an array of it
    if at and tokens[at - 1].text in ("static", "constexpr", "const"):
        raise problem
    name_at = i - 1
    if name_at <= start_of_type or tokens[name_at].kind != "name":
        raise problem
    kind = source[tokens[start_of_type].start : tokens[name_at - 1].end]
    pieces = []
    i = name_at
    while True:
        name = tokens[i]
        if name.kind != "name":
            raise problem
        i += 1
        bounds = ""
        while tokens[i].text == "[":
            close = matching(tokens, i)
            if close >= len(tokens):
                raise problem
            bounds += source[tokens[i].start : tokens[close].end]
            i = close + 1
        declarator = f"(&{name.text}){bounds}" if bounds else f"&{name.text}"
        id = len(arrays)
        pieces.append(f"{kind} {declarator} = mh::threadgroup_memory<{kind} {bounds}, {id}>();")
        arrays.append(ThreadgroupArray(name.text, name.line, is_header))
        if tokens[i].text == ";":
            break
        if tokens[i].text != ",":
            raise problem
        i += 1
    if len(arrays) > _MAX_DECLARATIONS:
        raise TranslationError(f"more than {_MAX_DECLARATIONS} threadgroup arrays")
    edits.append((tokens[at].start, tokens[i].end, " ".join(pieces).replace("\n", " ")))
    return i
