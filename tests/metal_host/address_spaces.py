"""Metal's address spaces: every pointer and reference has one, and none turns into another."""

from __future__ import annotations

from collections.abc import Iterator

from .capture import Launch
from .functions import Function, split
from .tokens import Token, matching

SPACES = ("device", "constant", "threadgroup", "thread")
Problem = tuple[Token, str]
Spaces = dict[str, str]  # of what a pointer or array of this name holds

_INTEGERS = ["bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong"]
_SCALARS = [*_INTEGERS, "half", "bfloat", "float"]
_OTHER_NAMES = [f"{u}int{bits}_t" for u in ("", "u") for bits in (8, 16, 32, 64)]
_OTHER_NAMES += ["void", "size_t", "ptrdiff_t", "unsigned", "signed", "bfloat16_t", "float16_t"]
_OTHER_NAMES += ["atomic_int", "atomic_uint", "atomic_float", "atomic_bool", "complex64_t"]
_TYPES = frozenset(_SCALARS + _OTHER_NAMES) | {
    f"{prefix}{scalar}{n}" for prefix in ("", "packed_") for scalar in _SCALARS for n in (2, 3, 4)
}
_TYPE_TEMPLATES = frozenset(["vec", "atomic", "simdgroup_matrix", "packed_vec", "array"])
_SPECIFIERS = frozenset(["const", "volatile", "static", "constexpr", "inline", "typename", *SPACES])
# Library functions, by the position of a pointer: the spaces it may have.
_LIBRARY: dict[str, dict[int, tuple[str, ...]]] = {
    "simdgroup_load": {1: ("device", "threadgroup")},
    "simdgroup_store": {1: ("device", "threadgroup")},
    "elem_to_loc": {1: ("constant",), 2: ("constant",)},
}


def check(
    launch: Launch, tokens: list[Token], helpers: list[Function], *, is_header: bool
) -> Iterator[Problem]:
    types = _TYPES | _type_names(launch, tokens)
    yield from _without_space(tokens, types)
    if is_header:
        for helper in helpers:
            own = {a.name: a.space for a in helper.arguments if a.is_pointer and a.space}
            body = tokens[helper.body_start : helper.body_end]
            yield from _mixed(body, own, helpers)
    else:
        pointers = {p.name: p.space for p in launch.parameters if p.space and not p.is_reference}
        yield from _mixed(tokens, pointers, helpers)


def is_threadgroup_storage(tokens: list[Token], at: int) -> bool:
    """`threadgroup T x` and not `threadgroup T* x`, `(threadgroup T*)`, nor a qualifier."""
    if tokens[at].text != "threadgroup" or tokens[at + 1].kind != "name":
        return False
    i = _after_type(tokens, at)
    return i < len(tokens) and tokens[i].kind == "name"


def _type_names(launch: Launch, tokens: list[Token]) -> frozenset[str]:
    """Template parameters, and what the text itself declares to be a type."""
    words = launch.template.replace("<", " ").replace(">", " ").replace(",", " ").split()
    names = {after for before, after in zip(words, words[1:], strict=False) if before == "typename"}
    for before, after in zip(tokens, tokens[1:], strict=False):
        if before.text in ("struct", "typename", "class", "using", "enum") and after.kind == "name":
            names.add(after.text)
    for i, token in enumerate(tokens):
        if token.text == "typedef":
            end = next((j for j in range(i, len(tokens)) if tokens[j].text == ";"), i)
            names.add(tokens[end - 1].text)
    return frozenset(names - {"namespace", "metal"})


def _without_space(tokens: list[Token], types: frozenset[str]) -> Iterator[Problem]:
    for i, token in enumerate(tokens):
        if token.text not in ("*", "&") or i == 0:
            continue
        at = i - 1
        while at and tokens[at].text == "const":
            at -= 1
        if tokens[at].text == ">":
            opening = _opening(tokens, at)
            if not opening or tokens[opening - 1].text not in _TYPE_TEMPLATES:
                continue
            at = opening - 1
        elif tokens[at].text not in types:
            continue
        words = {tokens[at].text}
        while at and _is_specifier(tokens[at - 1], tokens[at], types):
            at -= 1
            words.add(tokens[at].text)
        after = {t.text for t in tokens[i + 1 : i + 2]} & set(SPACES)  # float* device p
        if not words & set(SPACES) and not after:
            kind = "pointer" if token.text == "*" else "reference"
            yield token, f"a {kind} without an address space"


def _is_specifier(token: Token, following: Token, types: frozenset[str]) -> bool:
    return (
        token.text in _SPECIFIERS
        or token.text in ("metal", "::")
        or (token.text in types and following.text in types)
    )


def _mixed(tokens: list[Token], known: Spaces, helpers: list[Function]) -> Iterator[Problem]:
    spaces = dict(known)
    for i, token in enumerate(tokens):
        if token.text in SPACES and i + 1 < len(tokens):
            if is_threadgroup_storage(tokens, i):
                spaces[tokens[_after_type(tokens, i)].text] = "threadgroup"
                continue
            star = _after_type(tokens, i)
            if star + 2 >= len(tokens) or tokens[star].text not in ("*", "&"):
                continue
            name = tokens[star + 1]
            if name.kind == "name" and tokens[star + 2].text in ("=", ";", ","):
                spaces[name.text] = token.text
                if tokens[star + 2].text == "=":
                    yield from _compare(
                        tokens, star + 3, spaces, (token.text,), tokens[star].text == "&"
                    )
            elif tokens[star + 1].text in (")", ">"):
                yield from _cast(tokens, star + 2, spaces, token.text)
        elif token.text == "auto" and i + 2 < len(tokens) and tokens[i + 1].kind == "name":
            space = _root(tokens, i + 3, spaces, is_reference=False)
            if tokens[i + 2].text == "=" and space:
                spaces[tokens[i + 1].text] = space
        elif token.kind == "name" and i + 1 < len(tokens) and tokens[i + 1].text in ("(", "<"):
            yield from _call(tokens, i, spaces, helpers)


def _call(
    tokens: list[Token], at: int, spaces: Spaces, helpers: list[Function]
) -> Iterator[Problem]:
    opening = at + 1
    if tokens[opening].text == "<":
        opening = matching(tokens, opening) + 1
        if opening >= len(tokens) or tokens[opening].text != "(":
            return
    overloads = [f for f in helpers if f.name == tokens[at].text]
    library = _LIBRARY.get(tokens[at].text, {})
    if not overloads and not library:
        return
    given = split(tokens[opening + 1 : matching(tokens, opening)])
    for position, part in enumerate(given):
        if overloads:
            taken = [f.arguments[position] for f in overloads if position < len(f.arguments)]
            if not all(a.space and (a.is_pointer or a.is_reference) for a in taken):
                continue
            allowed = tuple({a.space for a in taken})
            is_reference = all(a.is_reference for a in taken)
        elif position in library:
            allowed, is_reference = library[position], False
        else:
            continue
        if allowed:
            yield from _compare(part, 0, spaces, allowed, is_reference)


def _compare(
    tokens: list[Token], at: int, spaces: Spaces, allowed: tuple[str, ...], is_reference: bool
) -> Iterator[Problem]:
    space = _root(tokens, at, spaces, is_reference=is_reference)
    if space and space not in allowed:
        yield tokens[at], f"{space} memory where {' or '.join(sorted(allowed))} memory is expected"


def _cast(tokens: list[Token], at: int, spaces: Spaces, space: str) -> Iterator[Problem]:
    """`(device T*)p` and `reinterpret_cast<device T*>(p)` change the type, never the space."""
    actual = _root(tokens, at, spaces, is_reference=False)
    if actual and actual != space:
        yield tokens[at], f"a cast of {actual} memory to {space} memory"


def _root(tokens: list[Token], at: int, spaces: Spaces, *, is_reference: bool) -> str:
    """The space an expression points into, as far as its first name tells; "" if it does not."""
    i, address_of = at, is_reference
    while i < len(tokens) and tokens[i].text in ("(", "&"):
        address_of |= tokens[i].text == "&"
        i += 1
    if i >= len(tokens):
        return ""
    if tokens[i].text in SPACES:  # a cast
        return tokens[i].text
    if tokens[i].text in ("reinterpret_cast", "static_cast") and i + 2 < len(tokens):
        return tokens[i + 2].text if tokens[i + 2].text in SPACES else ""
    following = tokens[i + 1].text if i + 1 < len(tokens) else ""
    if following in (".", "->", "(", "::", "<"):
        return ""
    if following == "[" and not address_of:
        return ""  # a value
    if is_reference and following != "[":
        return ""  # a pointer's own storage, or a scalar
    return spaces.get(tokens[i].text, "")


def _after_type(tokens: list[Token], at: int) -> int:
    """The index after the type that this specifier begins."""
    i = at + 1
    while i < len(tokens) and tokens[i].text in _SPECIFIERS:
        i += 1
    seen = False
    while i < len(tokens):
        if tokens[i].kind == "name" and (not seen or tokens[i - 1].text == "::"):
            seen = True
            i += 1
        elif tokens[i].text == "::":
            i += 1
        elif tokens[i].text == "<" and seen:
            i = matching(tokens, i) + 1
        elif tokens[i].text in ("const", "volatile"):
            i += 1
        else:
            break
    return i


def _opening(tokens: list[Token], at: int) -> int:
    """The index of the < that this > closes; 0 if there is none."""
    depth = 0
    for i in range(at, 0, -1):
        depth += (tokens[i].text == ">") - (tokens[i].text == "<")
        if depth == 0:
            return i
        if tokens[i].text in (";", "{", "}"):
            return 0
    return 0
