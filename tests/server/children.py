"""Starting `tests.server.child`."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Child:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, home: Path) -> None:
        self.process = process
        self.port = int(url.rpartition(":")[2]) if not url.startswith("unix:") else 0
        self.url = url
        self.home = home
        self.usage = psutil.Process(process.pid)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    @property
    def log(self) -> str:
        """What the server has logged."""
        path = self.home / "state" / "server.log"
        return path.read_text() if path.exists() else ""


@contextmanager
def child(home: Path, **options: Any) -> Iterator[Child]:
    """A running child; it ends well."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.child", json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "GRYPHON_HOME": str(home), "PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield Child(process, process.stdout.readline().decode().strip(), home)
            process.terminate()
            assert process.wait(60) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()
