"""What C++ lets pass and Metal's compiler does not. By tokens: no compiler but g++ is needed.

The rules are those of the Metal Shading Language specification (its list of C++ features that are
not there, and its address spaces); nobody has held them against Apple's compiler from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import address_spaces
from .capture import Launch
from .findings import LINT, Finding
from .functions import Function, functions
from .tokens import Token, matching, tokenize

MAX_BUFFERS = 31

_ABSENT = {
    "double": "Metal has no double",
    "goto": "Metal has no goto",
    "new": "Metal has no dynamic memory",
    "delete": "Metal has no dynamic memory",
    "malloc": "Metal has no dynamic memory",
    "free": "Metal has no dynamic memory",
    "throw": "Metal has no exceptions",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "noexcept": "Metal has no exceptions",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "virtual": "Metal has no virtual functions",
    "override": "Metal has no virtual functions",
    "thread_local": "Metal has no thread_local",
    "register": "Metal has no register",
    "asm": "Metal has no assembler",
    "wchar_t": "Metal has no wide characters",
    "std": "Metal has no std namespace, it has metal",
    "printf": "Metal has no printf",
    "__attribute__": "g++ understands this, Metal's compiler need not",
    "_Float16": "g++ understands this, Metal has half",
    "__builtin_expect": "g++ understands this, Metal's compiler need not",
}
# Words that are free in C++ and taken in Metal.
_TAKEN = frozenset(
    ["kernel", "vertex", "fragment", "visible", "intersection", "texture", "sampler"]
    + ["device", "constant", "thread", "threadgroup", "threadgroup_imageblock"]
    + ["ray_data", "object_data", "half", "bfloat", "uint", "ushort", "uchar", "ulong"]
)
# What begins a declaration outside of functions that declares no variable.
_NO_VARIABLE = frozenset(
    ["using", "typedef", "struct", "union", "enum", "class"]
    + ["template", "namespace", "static_assert", "inline"]
)
_NAME_ENDS = frozenset(["=", ";", "[", ",", ")"])


@dataclass(frozen=True)
class _Text:
    """The header or the body."""

    file: str
    source: str
    tokens: list[Token]
    is_header: bool

    def finding(self, token: Token, message: str) -> Finding:
        text = self.source.split("\n")[token.line - 1].strip()
        return Finding(LINT, message, self.file, token.line, 0, text)


def check(launch: Launch) -> list[Finding]:
    """Everything that is wrong with the text of a launch, in its order."""
    header = _Text(f"{launch.name}.header", launch.header, tokenize(launch.header), True)
    body = _Text(f"{launch.name}.metal", launch.body, tokenize(launch.body), False)
    helpers = functions(header.tokens)
    found = list(_buffer_count(launch))
    for text in (header, body):
        found += _absent_words(text)
        found += _types(text)
        found += _names(text)
        found += _lambdas_and_function_pointers(text)
        found += _statics(text)
    found += _directives(header) + _directives(body)
    found += [header.finding(at, message) for at, message in _helpers(header, helpers)]
    found += [header.finding(at, message) for at, message in _globals(header, helpers)]
    for text in (header, body):
        problems = address_spaces.check(launch, text.tokens, helpers, is_header=text.is_header)
        found += [text.finding(token, message) for token, message in problems]
    return found


def _buffer_count(launch: Launch) -> Iterator[Finding]:
    count = sum(1 for p in launch.parameters if p.space)
    if count > MAX_BUFFERS:
        yield Finding(LINT, f"{count} buffers, Metal has {MAX_BUFFERS} slots")


def _absent_words(text: _Text) -> list[Finding]:
    found = []
    for i, token in enumerate(text.tokens):
        is_member = i > 0 and text.tokens[i - 1].text in (".", "->")
        if token.kind == "name" and token.text in _ABSENT and not is_member:
            if token.text == "delete" and text.tokens[i - 1].text == "=":
                continue  # a deleted function
            found.append(text.finding(token, _ABSENT[token.text]))
        if token.kind == "string":
            found.append(text.finding(token, "a kernel has no use for a string or character"))
    return found


def _types(text: _Text) -> list[Finding]:
    found = []
    for before, after in zip(text.tokens, text.tokens[1:], strict=False):
        if before.text == "long" and after.text in ("long", "double"):
            found.append(text.finding(before, f"Metal has no long {after.text}"))
        if before.kind == "number" and re.search(r"[lL][lL]$", before.text):
            found.append(text.finding(before, "Metal has no long long"))
    return found


def _names(text: _Text) -> list[Finding]:
    found = []
    for i, token in enumerate(text.tokens):
        if token.kind != "name" or i == 0:
            continue
        previous = text.tokens[i - 1]
        following = text.tokens[i + 1].text if i + 1 < len(text.tokens) else ";"
        reserved = "__" in token.text or re.match(r"_[A-Z]", token.text)
        allowed = (
            "__METAL_VERSION__",
            "__METAL__",
            "__attribute__",
            "__builtin_expect",
            "_Float16",
        )
        if reserved and token.text not in allowed:
            found.append(text.finding(token, f"{token.text} is a reserved name"))
        declares = previous.kind == "name" and previous.text not in ("return", "const", "typename")
        if token.text in _TAKEN and declares and following in _NAME_ENDS:
            if previous.text in ("unsigned", "signed", "metal", "using"):
                continue
            found.append(text.finding(token, f"{token.text} is a word of Metal, not a name"))
    return found


def _lambdas_and_function_pointers(text: _Text) -> list[Finding]:
    found = []
    tokens = text.tokens
    for i, token in enumerate(tokens[:-3]):
        if token.text == "[" and i and tokens[i - 1].text in ("=", "(", ",", "return", "{", ";"):
            close = matching(tokens, i)
            if close + 1 < len(tokens) and tokens[close + 1].text in ("(", "{"):
                found.append(text.finding(token, "Metal 3 has no lambdas"))
        pointer = [t.text for t in tokens[i : i + 2]] == ["(", "*"]
        called = tokens[i + 3].text == ")" and i + 4 < len(tokens) and tokens[i + 4].text == "("
        if (
            pointer
            and called
            and tokens[i + 2].kind == "name"
            and i
            and tokens[i - 1].kind == "name"
        ):
            found.append(text.finding(token, "Metal has no function pointers here"))
    return found


def _statics(text: _Text) -> list[Finding]:
    found = []
    depth = 0 if text.is_header else 1
    for i, token in enumerate(text.tokens):
        depth += (token.text == "{") - (token.text == "}")
        if token.text == "static" and depth > 0:
            ahead = [t.text for t in text.tokens[i + 1 : i + 4]]
            if (
                "constexpr" in ahead
                and "constant" in ahead
                or "constexpr" in ahead
                and text.is_header
            ):
                continue
            found.append(text.finding(token, "Metal has no static variables in functions"))
    return found


def _directives(text: _Text) -> list[Finding]:
    found = []
    for token in text.tokens:
        if token.kind != "directive":
            continue
        included = re.match(r"\s*#\s*include\s*[<\"]([^>\"]*)", token.text)
        if included and not included[1].startswith("metal_"):
            found.append(text.finding(token, f"Metal has no <{included[1]}>"))
        if not text.is_header and re.match(r"\s*#\s*(define|include)", token.text):
            found.append(text.finding(token, "in a body; put it into the kernel's header"))
    return found


def _helpers(header: _Text, helpers: list[Function]) -> Iterator[tuple[Token, str]]:
    by_name: dict[str, set[str]] = {}
    for helper in helpers:
        by_name.setdefault(helper.name, set()).update(helper.calls)
    for helper in helpers:
        reached, waiting = set[str](), [helper.name]
        while waiting:
            new = by_name.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        if helper.name in reached and _arity_repeats(helper, helpers):
            yield helper.token, f"{helper.name} calls itself; Metal has no recursion"
        for i in range(helper.body_start, helper.body_end):
            if address_spaces.is_threadgroup_storage(header.tokens, i):
                yield header.tokens[i], "threadgroup storage can only be declared in a kernel"


def _arity_repeats(helper: Function, helpers: list[Function]) -> bool:
    """A function that calls another overload of its name does not call itself."""
    return sum(other.name == helper.name for other in helpers) == 1


def _globals(header: _Text, helpers: list[Function]) -> Iterator[tuple[Token, str]]:
    """Variables outside of functions; what is inside braces is left alone."""
    inside = {i for f in helpers for i in range(f.head_start, f.body_end + 1)}
    tokens, depth, start = header.tokens, 0, 0
    for i, token in enumerate(tokens):
        if i in inside or token.kind == "directive":
            start = i + 1
            continue
        depth += (token.text == "{") - (token.text == "}")
        if depth:
            continue
        words = [t.text for t in tokens[start:i]]
        if token.text == ";":
            if len(words) > 1 and words[0] not in _NO_VARIABLE and "constant" not in words:
                yield tokens[start], "a variable outside of functions must be `constant`"
            start = i + 1
        elif token.text == "}" and tokens[i + 1 : i + 2] and tokens[i + 1].text not in (";", ","):
            start = i + 1  # the end of a namespace
