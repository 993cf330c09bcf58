"""A block of lines in a script (vimrc, init.lua) between two marks; what is around it is kept."""

from __future__ import annotations

from app.cli.config_text import NotEditable

_BEGIN = "gryphon: begin (written by `gryphon editor`)"
_END = "gryphon: end"


def with_block(text: str, lines: list[str], *, comment: str, guards: str) -> str:
    """`text` with the block in its place, or at the top where there is none yet.

    Args:
        comment: What begins a comment line.
        guards: A name that nothing outside of the block may set.

    Raises:
        NotEditable: something does, or one of the two marks is missing.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    begin, end = f"{comment} {_BEGIN}", f"{comment} {_END}"
    known = text.split(newline)
    block = [begin, *lines, end]
    if (known.count(begin), known.count(end)) not in ((0, 0), (1, 1)):
        raise NotEditable(f'the lines "{begin}" and "{end}" should be there once each')
    first = last = 0
    if begin in known:
        first, last = known.index(begin), known.index(end) + 1
        if last <= first:
            raise NotEditable(f'"{end}" comes before "{begin}"')
    for number, line in enumerate(known, 1):
        outside = not first < number <= last
        if outside and guards in line and not line.lstrip().startswith(comment):
            raise NotEditable(f"line {number} sets {guards} already; put the addresses there")
    return newline.join([*known[:first], *block, *known[last:]])
