"""Addresses, threads, signals, logs."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from app.errors import GryphonError
from app.server import listening
from app.server.serving import ServerOptions, ServerThread, serve_forever

from .conftest import FakeModels, Server, Switchboard, chat, running

ROOT = Path(__file__).parents[2]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def refused(**options: object) -> GryphonError:
    """The error with which both ways of serving refuse `options`."""
    with pytest.raises(GryphonError) as caught:
        serve_forever(Switchboard, ServerOptions(**options), models=FakeModels())  # type: ignore[arg-type]
    with pytest.raises(GryphonError) as again:
        ServerThread(Switchboard, ServerOptions(**options), models=FakeModels()).start()  # type: ignore[arg-type]
    assert again.value.message == caught.value.message
    return caught.value


def test_port_in_use_by_another_program() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The probe's connection is never accepted: it must not be waited for long.
        error = refused(port=port)
    assert error.code == "port_in_use"
    assert f"Port {port} is already in use by another program" in error.message
    assert f"`--port {port + 1}`" in error.message


def test_port_in_use_by_gryphon(server: Server) -> None:
    assert "by another Gryphon" in refused(port=server.port).message


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
def test_port_in_use_on_the_other_loopback() -> None:
    """`localhost` may mean ::1 to a client: answering on one address only would be a trap."""
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        assert refused(port=taken.getsockname()[1]).code == "port_in_use"


def test_a_refused_start_leaves_no_socket() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(GryphonError):
        ServerThread(
            Switchboard, ServerOptions(port=port, allow_origins=["*"]), models=FakeModels()
        ).start()
    with running() as server, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        assert server


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_off_loopback_needs_a_key(host: str) -> None:
    if host == "::" and not has_ipv6():
        pytest.skip("no IPv6")
    error = refused(host=host, port=0)
    assert error.code == "api_key_required"
    assert host in error.message


def test_off_loopback_with_a_key() -> None:
    with running(host="0.0.0.0", api_key="k", allow_hosts=["mac.lan"]) as server:
        for host, status in [
            ("192.168.1.2:11500", 200),
            ("mac.lan", 200),
            (socket.gethostname(), 200),
            ("evil.example", 403),
        ]:
            headers = {"Host": host, "X-Api-Key": "k"}
            assert server.call("GET", "/health", headers=headers).status == status
        assert server.call("GET", "/health").status == 401


@pytest.mark.parametrize("port", [-1, 65536])
def test_impossible_port(port: int) -> None:
    assert refused(port=port).code == "invalid_port"


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "", "a" * 300])
def test_impossible_host(host: str) -> None:
    error = refused(host=host, port=0, api_key="k")
    assert error.code == "invalid_host"
    assert "try --host localhost" in error.message


def test_port_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listening.socket.socket, "bind", forbidden, raising=False)
    error = refused(port=80)
    assert error.code == "port_forbidden"
    assert "port 80" in error.message and "--port 11500" in error.message


def test_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = listening._bind

    def only_ipv4(address: str, port: int) -> socket.socket:
        if ":" in address:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return bind(address, port)

    monkeypatch.setattr(listening, "_bind", only_ipv4)
    with running() as server:
        assert server.call("GET", "/health").status == 200


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
def test_both_loopbacks_answer_on_one_port(server: Server) -> None:
    for address in ("127.0.0.1", "::1"):
        with socket.create_connection((address, server.port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_unwritable_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "file"))
    assert refused(port=0).code == "no_write_permission"


def test_engine_factory_that_fails() -> None:
    def refuse() -> Switchboard:
        raise GryphonError("engine_missing", "There is no engine.")

    def break_() -> Switchboard:
        raise RuntimeError("secret")

    with pytest.raises(GryphonError, match="There is no engine"):
        ServerThread(refuse, ServerOptions(port=0), models=FakeModels()).start()
    with pytest.raises(GryphonError, match=r"server\.log says why") as caught:
        ServerThread(break_, ServerOptions(port=0), models=FakeModels()).start()
    assert "secret" not in caught.value.message


def test_engine_lives_in_the_server_thread_and_is_closed_there() -> None:
    threads: dict[str, str] = {}

    class Noting(Switchboard):
        def __init__(self) -> None:
            super().__init__()
            threads["made"] = threading.current_thread().name

        async def close(self) -> None:
            threads["closed"] = threading.current_thread().name

    thread = ServerThread(Noting, ServerOptions(port=0), models=FakeModels())
    thread.start()
    thread.stop()
    thread.stop()
    assert threads == {"made": "gryphon-server", "closed": "gryphon-server"}


def test_server_answers_while_the_main_thread_is_busy(server: Server) -> None:
    """The main thread computes without a pause until an answer has come."""
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        try:
            statuses.extend(
                server.post("/v1/chat/completions", chat(stream=stream)).status
                for stream in (True, False)
            )
        finally:
            done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    spins = 0
    while not done.is_set():
        spins += 1
    asking.join()
    assert statuses == [200, 200]
    assert spins > 0


def test_stop_ends_a_running_stream() -> None:
    with running() as server:
        engine = server.board.current
        engine.answers = [["a", asyncio.Event()]]
        with server.streaming(
            "/v1/completions", {"model": "smollm2-135m", "prompt": "x", "stream": True}
        ) as response:
            response.readline()
            server.thread.stop()
            assert engine.ended.is_set()
            assert engine.cancelled == [engine.requests[0].id]


SERVE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from app.server.serving import ServerOptions, serve_forever

class Engine:
    async def start(self): ...
    async def close(self): print("closed", flush=True)
    async def status(self): return None
    def stream(self, request): raise RuntimeError("secret")

class Models:
    def installed_models(self): raise RuntimeError("secret")

serve_forever(Engine, ServerOptions(port=0, access_log={access_log}), models=Models(),
              on_ready=lambda url: print(url, flush=True))
print("over", flush=True)
"""


def serve_process(home: Path, *, access_log: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE.format(root=str(ROOT), access_log=access_log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**os.environ, "GRYPHON_HOME": str(home)},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_serve_forever_cleanly_and_faults_stay_off_the_terminal(
    home: Path, number: signal.Signals
) -> None:
    process = serve_process(home)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
        assert b'"engine":"stopped"' in response.read()
    with pytest.raises(urllib.error.HTTPError, match="500") as caught:
        urllib.request.urlopen(f"{url}/v1/models", timeout=30)
    caught.value.close()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "closed\nover\n"
    assert err == ""


def test_access_log_holds_no_bodies_and_no_line_ends(home: Path) -> None:
    process = serve_process(home, access_log=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    request = urllib.request.Request(
        f"{url}/v1/models%0d%0aforged",
        data=b'{"prompt": "secret"}',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    caught.value.close()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert '"POST /v1/models%0D%0Aforged HTTP/1.1" 404' in err
    assert len(err.splitlines()) == 1
    assert "secret" not in err


def test_importing_the_server_leaves_mlx_out() -> None:
    code = (
        "import sys, pkgutil, importlib, app.server\n"
        "for one in pkgutil.iter_modules(app.server.__path__, 'app.server.'):\n"
        "    importlib.import_module(one.name)\n"
        "print(sorted({'mlx', 'mlx_lm', 'metal', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout == "[]\n"
