"""Errors a person may read: each names the thing, what was expected, what was got, what to do."""

from __future__ import annotations

from app.printable import printable

_MAX_CHARACTERS = 4000


def readable(message: str) -> str:
    """What can be sent and shown of a message. It may quote what others wrote, such as a file's
    name, which need be neither short nor text nor harmless to a terminal."""
    if len(message) > _MAX_CHARACTERS:
        message = f"{message[:_MAX_CHARACTERS]} ..."
    return printable(message.encode("utf-8", "backslashreplace").decode())


class GryphonError(Exception):
    """An expected failure, shown as one clear sentence and never as a traceback.

    Attributes:
        code: Machine-readable snake_case name, the same in the CLI's JSON, REST and the protocol.
        retry_after: Seconds after which trying again makes sense, or None.
    """

    def __init__(self, code: str, message: str, *, retry_after: float | None = None) -> None:
        message = readable(message)
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
