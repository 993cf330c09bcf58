"""The other ways in: a UNIX socket, and https."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from app.errors import GryphonError
from app.server.serving import ServerOptions, ServerThread

from .conftest import FakeModels, Reply, Server, Switchboard, chat, running


def refused(**options: object) -> GryphonError:
    thread = ServerThread(Switchboard, ServerOptions(**{"port": 0} | options), models=FakeModels())  # type: ignore[arg-type]
    with pytest.raises(GryphonError) as caught:
        thread.start()
    return caught.value


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self.path))


def ask(
    connection: http.client.HTTPConnection,
    path: str = "/health",
    headers: dict[str, str] | None = None,
) -> Reply:
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        lower = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, lower, response.read())
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, as UNIX sockets want it."""
    return tmp_path_factory.mktemp("s") / "g.sock"


def test_the_socket_answers_its_owner_only(path: Path) -> None:
    with running(socket=path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.thread.url == f"unix:{path}"
        assert ask(SocketConnection(path)).json["status"] == "ok"
        assert ask(SocketConnection(path), "/v1/models").status == 200
    assert not path.exists()


def test_the_socket_is_never_open_to_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    listen = socket.socket.listen

    def spy(self: socket.socket, *backlog: int) -> None:
        if self.family == socket.AF_UNIX:
            modes.append(stat.S_IMODE(path.stat().st_mode))
        listen(self, *backlog)

    monkeypatch.setattr("app.server.listening.socket.socket.listen", spy)
    with running(socket=path):
        assert modes and set(modes) == {0o600}


def test_a_path_has_no_host_and_no_origin_of_its_own(path: Path) -> None:
    with running(socket=path, allow_origins=["http://localhost:3000"]) as server:
        assert ask(SocketConnection(path), headers={"Host": "anything.example"}).status == 200
        for origin in ("http://anything.example", "http://localhost", "null"):
            headers = {"Host": "anything.example", "Origin": origin}
            assert ask(SocketConnection(path), headers=headers).status == 403
        headers = {"Origin": "http://localhost:3000"}
        assert ask(SocketConnection(path), headers=headers).status == 200
        assert server.board.current.requests == []


def test_a_key_holds_on_a_socket_too(path: Path) -> None:
    with running(socket=path, api_key="k"):
        assert ask(SocketConnection(path)).status == 401
        assert ask(SocketConnection(path), headers={"X-Api-Key": "k"}).status == 200


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with running(socket=path):
        assert ask(SocketConnection(path)).status == 200


def test_a_socket_in_use_is_left_alone(path: Path) -> None:
    with running(socket=path):
        error = refused(socket=path)
        assert error.code == "socket_in_use" and str(path) in error.message
        assert ask(SocketConnection(path)).status == 200


@pytest.mark.parametrize("what", ["file", "directory", "link", "link to a socket", "broken link"])
def test_what_is_no_socket_is_left_alone(path: Path, what: str) -> None:
    target = path.with_name("t")
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    elif what == "broken link":
        path.symlink_to(target)
    elif what == "link":
        target.write_text("precious")
        path.symlink_to(target)
    else:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(target))
        path.symlink_to(target)
    before = path.lstat()
    error = refused(socket=path)
    assert error.code == "invalid_socket" and str(path) in error.message
    assert path.lstat() == before
    if what in ("file", "link"):
        assert path.read_text() == "precious"


def test_a_socket_that_cannot_be(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    assert "too long" in refused(socket=long).message
    missing = Path("/tmp/gryphon-no-such-directory/g.sock")
    assert "No such file or directory" in refused(socket=missing).message


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with cert.pem for localhost and key.pem, and what is wrong with others."""
    place = tmp_path_factory.mktemp("tls")
    for name in ("", "other-"):
        key, certificate = str(place / f"{name}key.pem"), str(place / f"{name}cert.pem")
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        )
    locked = str(place / "locked.pem")
    openssl(
        *("rsa", "-aes256", "-passout", "pass:x", "-in", str(place / "key.pem"), "-out", locked)
    )
    (place / "both.pem").write_bytes(
        (place / "cert.pem").read_bytes() + (place / "key.pem").read_bytes()
    )
    (place / "text.pem").write_text("hello")
    return place


def https(server: Server, pem: Path) -> http.client.HTTPSConnection:
    trusting = ssl.create_default_context(cafile=str(pem / "cert.pem"))
    return http.client.HTTPSConnection("localhost", server.port, timeout=60, context=trusting)


def test_https(pem: Path) -> None:
    options = {"tls_certificate": pem / "cert.pem", "tls_key": pem / "key.pem"}
    with running(**options) as server:
        assert server.thread.url.startswith("https://")
        assert ask(https(server, pem)).status == 200
        own = f"https://localhost:{server.port}"
        assert ask(https(server, pem), headers={"Origin": own}).status == 200
        foreign = f"http://localhost:{server.port}"
        assert ask(https(server, pem), headers={"Origin": foreign}).status == 403
        # http is not answered there, and nothing breaks.
        with pytest.raises((http.client.HTTPException, OSError)):
            server.call("GET", "/health")
        assert ask(https(server, pem)).status == 200


def test_old_tls_is_refused(pem: Path) -> None:
    with running(tls_certificate=pem / "both.pem") as server:
        old = ssl.create_default_context(cafile=str(pem / "cert.pem"))
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            pytest.raises((ssl.SSLError, ConnectionResetError)),
            socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
        ):
            old.wrap_socket(connection, server_hostname="localhost")
        assert ask(https(server, pem)).status == 200


def test_a_stream_over_https(pem: Path) -> None:
    with running(tls_certificate=pem / "both.pem") as server:
        connection = https(server, pem)
        body = str(chat(stream=True)).replace("'", '"').replace("True", "true")
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        assert connection.getresponse().read().endswith(b"[DONE]\n\n")
        connection.close()


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("missing.pem", "key.pem", "cannot be read: No such file"),
        ("cert.pem", "missing.pem", "cannot be read: No such file"),
        (".", "key.pem", "cannot be read: Is a directory"),
        ("cert.pem", "other-key.pem", "does not belong to the certificate"),
        ("cert.pem", "locked.pem", "is encrypted"),
        ("text.pem", "key.pem", "expected PEM files"),
        ("cert.pem", "text.pem", "expected PEM files"),
        ("cert.pem", None, "expected PEM files"),
        ("key.pem", "cert.pem", "expected PEM files"),
        (None, "key.pem", "needs its certificate"),
    ],
)
def test_files_that_are_no_certificate(
    pem: Path, certificate: str | None, key: str | None, says: str
) -> None:
    """One sentence that names the file, before anything listens."""
    error = refused(
        tls_certificate=None if certificate is None else pem / certificate,
        tls_key=None if key is None else pem / key,
    )
    assert error.code == "invalid_tls"
    assert says in error.message and "\n" not in error.message
    assert certificate is None or str(pem) in error.message


def test_an_unreadable_key(pem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes((pem / "key.pem").read_bytes())
    key.chmod(0)
    if os.access(key, os.R_OK):  # root reads everything

        def forbidden(self: Path, *_: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("app.server.tls.Path.open", forbidden)
    error = refused(tls_certificate=pem / "cert.pem", tls_key=key)
    assert "cannot be read: Permission denied" in error.message


def test_stopping_while_a_handshake_hangs(pem: Path) -> None:
    """A client that connects and says nothing does not keep the server from ending."""
    with (
        running(tls_certificate=pem / "both.pem", drain_s=0.05) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60),
    ):
        stopping = threading.Thread(target=server.thread.stop)
        stopping.start()
        stopping.join(60)
        assert not stopping.is_alive()
