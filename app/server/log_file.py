"""The server's log: what goes into it, who may read it, and what stays out."""

from __future__ import annotations

import logging
import os
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from app import paths


class _PrivateLogFile(RotatingFileHandler):
    """A log that only its owner reads, 1 MiB and one older file of the same size."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=2**20, backupCount=1, encoding="utf-8", delay=True)

    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", encoding=self.encoding, opener=private)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: a full disk must not print tracebacks over the chat."""


def configure(*, access_log: bool) -> None:
    """Warnings to the state directory's server.log, and nothing of them to the terminal."""
    log_file = _PrivateLogFile(paths.state_dir() / "server.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("app.server", "uvicorn"):
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(log_file)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    if access_log:
        access = logging.getLogger("uvicorn.access")
        access.handlers = [logging.StreamHandler()]
        access.setLevel(logging.INFO)
        access.propagate = False
        access.filters = [_without_query]


def _without_query(record: logging.LogRecord) -> bool:
    """Cut the query from uvicorn's line: no route of ours takes one, but some clients put their
    key there."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, version, status = record.args
        record.args = (client, method, str(path).partition("?")[0], version, status)
    return True
