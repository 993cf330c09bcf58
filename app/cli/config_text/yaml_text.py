"""YAML, changed where it must be and nowhere else: PyYAML says where each value stands."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import yaml

from app.cli.config_text import Named, NotEditable, Path, Step, Unreadable, spelled

_MAX_VALUES = 200_000


def read(text: str) -> Any:
    """The document; None when it is empty.

    Raises:
        Unreadable: it is no YAML, holds several documents, or aliases that unfold without end.
    """
    root = _compose(text)
    if root is None:
        return None
    _unfolded(root, {})
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise Unreadable(_where(error)) from None


def put(text: str, path: Path, value: Any) -> str:
    """Set one place; what is new is written in block style, or into the brackets that are there."""
    node = _compose(text)
    if node is None:
        newline = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{newline}{_block(_nested(path, value))}"
    for depth, step in enumerate(path):
        found = _child(node, step, path[: depth + 1])
        if found is None:
            return _insert(text, node, _nested(path[depth:], value))
        if _is_null(found):
            return _fill(text, node, found, _nested(path[depth + 1 :], value))
        node = found
    if not isinstance(node, yaml.ScalarNode) or isinstance(value, list):
        raise NotEditable(f"{spelled(path)} holds a list or settings; change it by hand")
    return text[: node.start_mark.index] + _scalar(value) + text[node.end_mark.index :]


def _compose(text: str) -> yaml.Node | None:
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise Unreadable(_where(error)) from None
    return root


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = "" if mark is None else f"line {mark.line + 1}: "
    return f"{line}{getattr(error, 'problem', None) or error}"


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` stands for with its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MAX_VALUES  # an alias inside of what it names
    count = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise Unreadable(f'line {key.start_mark.line + 1}: "{name}" is there twice')
            if name is not None:
                seen.add(name)
        count += sum(_unfolded(key, known) + _unfolded(one, known) for key, one in node.value)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_unfolded(one, known) for one in node.value)
    if count >= _MAX_VALUES:
        raise Unreadable(f"with its aliases it holds more than {_MAX_VALUES} values")
    known[id(node)] = count
    return count


def _child(node: yaml.Node, step: Step, here: Path) -> yaml.Node | None:
    if isinstance(step, Named):
        members = node.value if isinstance(node, yaml.SequenceNode) else []
        for one in members:
            name = _child(one, "name", here) if isinstance(one, yaml.MappingNode) else None
            if name is not None and name.value == step.name:
                return one
        return None
    if not isinstance(node, yaml.MappingNode):
        raise NotEditable(f"{spelled(here[:-1])} should hold settings by name")
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == step:
            return value
    return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _nested(path: Path, value: Any) -> Any:
    for step in reversed(path):
        value = [{"name": step.name, **value}] if isinstance(step, Named) else {step: value}
    return value


def _insert(text: str, node: yaml.Node, added: Any) -> str:
    """Put `added`, a collection of one, behind the last member of the collection `node`."""
    if node.flow_style:
        return _insert_in_brackets(text, node, added)
    assert isinstance(node, yaml.CollectionNode) and node.value  # empty ones have brackets
    if isinstance(node, yaml.MappingNode):
        indent = node.value[0][0].start_mark.column
    else:
        # Not the node's own mark, which may be that of an anchor, nor an alias's, which is that of
        # what it names.
        starts = [one.start_mark.index for one in node.value]
        known = [start for start in starts if start > node.start_mark.index]
        if not known:
            raise NotEditable("a list holds nothing but aliases")
        dash = text.rfind("-", 0, known[0])
        indent = dash - text.rfind("\n", 0, dash) - 1
    end = _end_of(node)
    if end and text[end - 1 : end] != "\n":
        line_end = text.find("\n", end)
        end = len(text) if line_end < 0 else line_end + 1
    before = text[:end]
    if before and not before.endswith("\n"):
        before += "\n"
    newline = "\r\n" if "\r\n" in text else "\n"
    block = textwrap.indent(_block(added), " " * indent).replace("\n", newline)
    return before + block + text[end:]


def _insert_in_brackets(text: str, node: yaml.Node, added: Any) -> str:
    close = node.end_mark.index - 1
    inside = json.dumps(added, ensure_ascii=False)[1:-1]
    body = text[node.start_mark.index + 1 : close].rstrip()
    comma = ", " if node.value and not body.endswith(",") else " " if node.value else ""
    return text[: node.start_mark.index + 1] + body + comma + inside + text[close:]


def _fill(text: str, parent: yaml.Node, node: yaml.Node, value: Any) -> str:
    """Give a key without a value, or with null, one."""
    head, tail = text[: node.start_mark.index], text[node.end_mark.index :]
    if not isinstance(value, dict | list):
        space = "" if head.endswith(" ") else " "
        return f"{head}{space}{_scalar(value)}{tail}"
    if parent.flow_style:
        return f"{head} {json.dumps(value, ensure_ascii=False)}{tail}"
    rest, newline, after = tail.partition("\n")
    block = textwrap.indent(_block(value), " " * (parent.start_mark.column + 2))
    if "\r\n" in text:
        block = block.replace("\n", "\r\n")
    return f"{head.rstrip(' ')}{rest}{newline or chr(10)}{block}{after}"


def _end_of(node: yaml.Node) -> int:
    """Where the last scalar in `node` ends; a block's own mark is behind the comments after it."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        before, node = last if isinstance(last, tuple) else (node, last)
        if node.start_mark.index < before.start_mark.index:
            return int(before.end_mark.index)  # an alias, whose marks are where its anchor is
    return int(node.end_mark.index)


def _block(value: Any) -> str:
    return str(
        yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4000, indent=2)
    )


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Lists stand further in than their key, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, width=4000)
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")
