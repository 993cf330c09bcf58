"""Listening sockets, bound before the server starts so that what is wrong is said clearly."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import urllib.request
from pathlib import Path

from app.errors import GryphonError
from app.paths import MAX_SOCKET_PATH

DEFAULT_HOST = "localhost"
DEFAULT_PORT = 11500

_BACKLOG = 256
_BOTH_LOOPBACKS = ("127.0.0.1", "::1")


def listen(host: str, port: int, *, has_key: bool) -> list[socket.socket]:
    """Sockets that listen at `host`: both loopback addresses for "localhost" and 127.0.0.1.

    Raises:
        GryphonError: the port is taken, forbidden or no port; the host is not this machine's; or
            it can be reached from the network and there is no API key.
    """
    if not 0 <= port <= 65535:
        raise GryphonError("invalid_port", f"The port should be 0 to 65535, got {port}.")
    addresses = _addresses(host)
    if not has_key and is_open(host):
        raise GryphonError(
            "api_key_required",
            f"{host} can be reached from the network, so an API key is needed: "
            "set GRYPHON_API_KEY, let `gryphon serve --generate-key` make one, or serve on "
            "localhost.",
        )
    # With port 0 the second address may find the first one's port taken: then another one is drawn.
    for _ in range(1 if port else 20):
        sockets: list[socket.socket] = []
        try:
            for address in addresses:
                chosen = sockets[0].getsockname()[1] if sockets else port
                try:
                    sockets.append(_bind(address, chosen))
                except OSError as error:
                    # A machine without IPv6.
                    missing = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                    if not (missing and sockets):
                        raise
            return sockets
        except OSError as error:
            for one in sockets:
                one.close()
            if port == 0 and error.errno == errno.EADDRINUSE:
                continue
            raise _explained(error, host, port) from error
    raise GryphonError("port_in_use", f"No free port was found on {host}.")


def listen_at(path: Path) -> socket.socket:
    """A UNIX socket that listens at `path`, for its owner only; one that nobody uses any more is
    replaced.

    Raises:
        GryphonError: "socket_in_use", or "invalid_socket": the path is too long, its directory is
            missing or not writable, or something else has the name.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise GryphonError(
            "invalid_socket",
            f"{path} is too long for a UNIX socket: {len(os.fsencode(path))} bytes, where "
            f"{MAX_SOCKET_PATH} fit. Choose a shorter one.",
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(os.fspath(path))
        # Nobody can connect before `listen`, so there is no moment at which others could.
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise GryphonError(
            "invalid_socket", f"Cannot listen at {path}: {error.strerror or error}."
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Make way for a socket: remove one that nobody listens at, refuse to touch anything else."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.getuid():
        raise GryphonError(
            "invalid_socket",
            f"{path} is there already and is not a socket of yours, so it is left alone. "
            "Choose another name, or remove it.",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass  # somebody is there, and busy
    raise GryphonError(
        "socket_in_use", f"Another program listens at {path}. Use that one, or choose another name."
    )


def unlink(listener: socket.socket) -> None:
    """Remove the name of a UNIX socket; others have none. To be called while it still listens:
    until then no other Gryphon takes the name."""
    if listener.family != socket.AF_UNIX:
        return
    with contextlib.suppress(OSError):
        path = Path(listener.getsockname())
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


def is_open(host: str) -> bool:
    """Whether other machines may reach `host`.

    Raises:
        GryphonError: "invalid_host".
    """
    return not all(map(is_loopback, _addresses(host)))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`, an IP address."""
    return ipaddress.ip_address(address).is_loopback


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """SCHEME://ADDRESS:PORT, or unix:PATH"""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    address, port = listener.getsockname()[:2]
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def _addresses(host: str) -> list[str]:
    if host in ("localhost", "127.0.0.1"):
        return list(_BOTH_LOOPBACKS)
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    if not host or not found:
        raise GryphonError(
            "invalid_host", f'"{host}" is not an address of this machine; try --host localhost.'
        )
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last connections are closing is free; one that somebody listens on is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        # With SO_REUSEADDR a taken port may only show here.
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _explained(error: OSError, host: str, port: int) -> GryphonError:
    match error.errno:
        case errno.EADDRINUSE:
            by = "by another Gryphon" if _is_gryphon(port) else "by another program"
            return GryphonError(
                "port_in_use",
                f"Port {port} is already in use {by}. "
                f"Use that one, or choose another port with `--port {_other(port)}`.",
            )
        case errno.EACCES | errno.EPERM:
            return GryphonError(
                "port_forbidden",
                f"This user may not listen on port {port}; ports from 1024 on need no rights: "
                f"gryphon serve --port {DEFAULT_PORT}.",
            )
        case errno.EADDRNOTAVAIL:
            return GryphonError(
                "invalid_host", f'"{host}" is not an address of this machine; try --host localhost.'
            )
    return GryphonError(
        "cannot_listen", f"Cannot listen on {host}, port {port}: {error.strerror or error}."
    )


def _other(port: int) -> int:
    return port + 1 if port < 65535 else DEFAULT_PORT


def _is_gryphon(port: int) -> bool:
    """Whether the server on `port` says that it is Gryphon."""
    # No proxy, and no wait to speak of: it only makes a sentence better.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/", timeout=0.5) as response:
            return bool(response.headers.get("server") == "gryphon")
    except (OSError, ValueError):
        return False
