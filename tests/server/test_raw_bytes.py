"""Bytes that no client would send: each is answered or ends, without a fault or a trace."""

from __future__ import annotations

import random
import re
import select
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..rounds import SCALE, rounds
from .children import Child, child
from .routes import ROUTES

CASES = len(rounds(400))
AT_A_TIME = 8
PATIENCE_S = 60  # of the test; the server's is a tenth of a second
MAX_GROWTH_BYTES = 16 * 2**20

ODD_BYTES = [b"\r", b"\n", b"\r\n", b"\0", b"\xff", b" ", b"\t", b":", b"\x0b", b"\x80", b"%00"]
ODD_LINES = [
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 1e3",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Expect: 100-continue",
    b"Expect: nothing",
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: websocket",
    b"Host: localhost",
    b"Host:",
    b": empty",
    b"no colon",
    b" folded",
    b"Origin: null",
    b"Range: bytes=0-18446744073709551615",
    b"Accept-Encoding: " + b"gzip, " * 200,
    b"X-Long: " + b"x" * 20_000,
    b"Cookie: " + bytes(range(128, 256)),
]
ODD_VALUES = [
    b"NaN",
    b"-0",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b'"\xed\xa0\x80"',
    b'"\\u0000"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[null]",
    b"{1:2}",
    b"\xef\xbb\xbf{}",
    b'"' + b"\\u" * 50,
]
TARGETS = [b"*", b"//", b"/%", b"/%ff%fe", b"/..%2f..", b"http://evil.example/", b"/" + b"a" * 9000]
METHODS = [
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"OPTIONS",
    b"CONNECT",
    b"TRACE",
    b"PRI",
    b"get",
    b"\xff",
]


def valid(draw: random.Random) -> bytes:
    """A request for one of the routes, whole or in chunks."""
    route = draw.choice(ROUTES)
    body = route.encoded(**({"stream": True} if route.is_streamed and draw.random() < 0.5 else {}))
    lines = [f"{route.method} {route.url} HTTP/1.1".encode(), b"Host: localhost"]
    if draw.random() < 0.8:
        lines.append(b"Connection: close")
    if body:
        lines.append(b"Content-Type: application/json")
        if draw.random() < 0.5:
            lines.append(b"Content-Length: %d" % len(body))
        else:
            lines.append(b"Transfer-Encoding: chunked")
            cut = draw.randrange(1, len(body)) if len(body) > 1 else 1
            body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:cut], body[cut:]) if p)
            body += b"0\r\n\r\n"
    return b"\r\n".join([*lines, b"", body])


def _at(draw: random.Random, data: bytes) -> int:
    return draw.randrange(len(data) + 1)


def cut_off(draw: random.Random, data: bytes) -> bytes:
    return data[: _at(draw, data)]


def flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def drop(draw: random.Random, data: bytes) -> bytes:
    start = _at(draw, data)
    return data[:start] + data[start + draw.randint(1, 20) :]


def insert(draw: random.Random, data: bytes) -> bytes:
    at = _at(draw, data)
    return data[:at] + draw.choice(ODD_BYTES) * draw.randint(1, 3) + data[at:]


def repeat(draw: random.Random, data: bytes) -> bytes:
    start, end = sorted((_at(draw, data), _at(draw, data)))
    return data[:end] + data[start:end] * draw.randint(1, 5) + data[end:]


def add_lines(draw: random.Random, data: bytes) -> bytes:
    first, _, others = data.partition(b"\r\n")
    lines = b"\r\n".join(draw.choices(ODD_LINES, k=draw.randint(1, 3)))
    return first + b"\r\n" + lines + b"\r\n" + others


def other_target(draw: random.Random, data: bytes) -> bytes:
    method, _, others = data.partition(b" ")
    return b" ".join([method, draw.choice(TARGETS), others.partition(b" ")[2]])


def other_method(draw: random.Random, data: bytes) -> bytes:
    return draw.choice(METHODS) + b" " + data.partition(b" ")[2]


def other_value(draw: random.Random, data: bytes) -> bytes:
    """One value in the JSON; the length is what it was or right."""
    values = list(re.finditer(rb'"[a-zA-Z0-9-]*"|\btrue\b|\d+', data.partition(b"\r\n\r\n")[2]))
    if not values:
        return data
    head, _, body = data.partition(b"\r\n\r\n")
    chosen = draw.choice(values)
    body = body[: chosen.start()] + draw.choice(ODD_VALUES) + body[chosen.end() :]
    if draw.random() < 0.8:
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
    return head + b"\r\n\r\n" + body


def pipeline(draw: random.Random, data: bytes) -> bytes:
    return b"".join(draw.choice([data, valid(draw)]) for _ in range(draw.randint(2, 6)))


def noise(draw: random.Random, data: bytes) -> bytes:
    return draw.randbytes(draw.randint(1, 5000))


CHANGES: list[Callable[[random.Random, bytes], bytes]] = [
    cut_off, flip, drop, insert, repeat, add_lines, other_target, other_method, other_value,
    other_value, pipeline, noise,
]  # fmt: skip


def request_of(seed: int) -> bytes:
    """A spoiled request, always the same for a seed."""
    draw = random.Random(seed)
    data = valid(draw)
    for _ in range(draw.randint(1, 3)):
        data = draw.choice(CHANGES)(draw, data) or b" "
    return data


def send(server: Child, seed: int) -> tuple[bytes, str]:
    """What came back, and how it went: "answered" or "closed"."""
    draw = random.Random(-seed - 1)
    data = request_of(seed)
    with server.connect() as connection:
        try:
            while data:
                size = draw.choice([len(data), len(data), draw.randint(1, len(data))])
                connection.sendall(data[:size])
                data = data[size:]
                if data and _is_readable(connection, 0.002):
                    break  # answered before its end
            if draw.random() < 0.2:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was answered, and closed, before its end
        answer = b""
        try:
            while _is_readable(connection, PATIENCE_S if not answer else 0.05):
                got = connection.recv(65536)
                answer += got
                if not got:
                    return answer, "answered" if answer else "closed"
        except ConnectionResetError:
            return answer, "answered" if answer else "closed"
        return answer, "answered" if answer else "HUNG"


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([connection], [], [], timeout_s)[0])


@pytest.mark.timeout(150 * SCALE)
def test_bytes_that_no_client_would_send(
    home: Path, record_property: Callable[[str, object], None]
) -> None:
    counted: Counter[str] = Counter()
    bad: list[tuple[int, str, bytes]] = []
    with child(home / "fuzz", head_timeout_s=0.1, body_timeout_s=0.1) as server:

        def attack(seed: int) -> None:
            answer, how = send(server, seed)
            # Bodies hold no status lines: they are JSON or what the scripted engine says.
            statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)
            counted.update([how, *(f"status_{one.decode()}" for one in statuses)])
            if how == "HUNG" or any(one >= b"500" for one in statuses):
                bad.append((seed, how, answer[:500]))

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(attack, range(CASES // 2)))
            middle = server.usage.memory_info().rss
            list(pool.map(attack, range(CASES // 2, CASES)))
        assert bad == [], [(seed, request_of(seed)[:500]) for seed, _, _ in bad[:5]]
        status, body = server.get("/health")
        assert status == 200 and b'"ok"' in body
        growth = server.usage.memory_info().rss - middle
        assert growth < MAX_GROWTH_BYTES, f"{growth} bytes over {CASES // 2} requests"
        assert "Traceback" not in server.log and "failed" not in server.log, server.log[-4000:]
    assert counted["answered"] > CASES / 2 and counted["status_200"] > 0
    for name, value in sorted(counted.items()):
        record_property(name, value)
    record_property("growth_KiB", max(0, growth) // 1024)
