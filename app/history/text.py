"""Text that can be stored: any str that a terminal, a model or a file may hand over."""

from __future__ import annotations


def sound(text: str) -> str:
    """`text` as valid Unicode: halves of surrogate pairs are joined, or become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def one_line(text: str, most: int) -> str:
    """At most `most` characters on one line, such as a title."""
    return " ".join(sound(text).split())[:most].rstrip()
