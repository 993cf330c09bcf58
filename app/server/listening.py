"""Listening sockets, bound before the server starts so that what is wrong is said clearly."""

from __future__ import annotations

import errno
import ipaddress
import socket
import urllib.request

from app.errors import GryphonError

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
    if not has_key and not all(map(is_loopback, addresses)):
        raise GryphonError(
            "api_key_required",
            f"{host} can be reached from the network, so an API key is needed: "
            "set one, or serve on localhost.",
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


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`, an IP address."""
    return ipaddress.ip_address(address).is_loopback


def url_of(listener: socket.socket) -> str:
    """http://ADDRESS:PORT"""
    address, port = listener.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


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
