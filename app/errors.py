"""Errors a person may read: each names the thing, what was expected, what was got, what to do."""

from __future__ import annotations


class GryphonError(Exception):
    """An expected failure, shown as one clear sentence and never as a traceback.

    Attributes:
        code: Machine-readable snake_case name, the same in the CLI's JSON, REST and the protocol.
        retry_after: Seconds after which trying again makes sense, or None.
    """

    def __init__(self, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
