"""Bytes to a server and back, without an HTTP client that would tidy them."""

from __future__ import annotations

import socket

from .conftest import Server

TIMEOUT_S = 60


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)


def rest(connection: socket.socket) -> bytes:
    """What still comes until the server closes the connection, or resets it."""
    answer = b""
    try:
        while data := connection.recv(65536):
            answer += data
    except ConnectionResetError:
        pass
    return answer


def raw(server: Server, request: bytes) -> bytes:
    """Everything the server answers to `request`, which makes it close the connection."""
    with connect(server) as connection:
        connection.sendall(request)
        return rest(connection)


def head(method: str, path: str, *lines: str, host: str = "localhost") -> bytes:
    """A request's head, after whose answer the connection is closed."""
    start = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    return "\r\n".join([*start, *lines, "", ""]).encode("latin-1")
