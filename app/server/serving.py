"""Running the endpoint: by itself for `gryphon serve`, or in a thread beside the TUI."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import signal
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, gethostname, socket
from typing import Any, cast

import uvicorn

from app import paths
from app.errors import GryphonError
from app.library import installed
from app.server import connections, log_file, tls
from app.server.announcement import announced
from app.server.application import KEEP_ALIVE_S, create_app
from app.server.errors import log_fault
from app.server.generation import Ending, Engine, Models
from app.server.listening import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    is_loopback,
    listen,
    listen_at,
    unlink,
    url_of,
)
from app.server.security import BODY_TIMEOUT_S

_DRAIN_S = 1.0
"""How long running answers may go on after the server was told to stop. After that they end as
their dialect ends a failed answer, for which clients have another second to read."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the endpoint is served; what `gryphon serve` takes on its command line."""

    host: str = DEFAULT_HOST
    """"localhost" or 127.0.0.1: both loopback addresses where there are two."""
    port: int = DEFAULT_PORT
    """0: any free one."""
    socket: Path | None = None
    """A UNIX socket to listen at instead, for this user's programs only."""
    tls_certificate: Path | None = None
    """PEM file; with it the endpoint speaks https, and http no more."""
    tls_key: Path | None = None
    """PEM file; None: the key is in the certificate's file."""
    allow_origins: Collection[str] = ()
    allow_hosts: Collection[str] = ()
    api_key: str | None = None
    """Mandatory off loopback."""
    access_log: bool = False
    """One line per request, without bodies, on standard error."""
    keep_alive_s: float = KEEP_ALIVE_S
    """Silence after which a stream carries a comment."""
    max_connections: int = connections.MAX_CONNECTIONS
    """At a time; beyond it those that rest make room, and requests get 503 where none does."""
    head_timeout_s: float = connections.HEAD_TIMEOUT_S
    """How long the head of a request may take to come."""
    body_timeout_s: float = BODY_TIMEOUT_S
    """How long its body may."""
    drain_s: float = _DRAIN_S
    """How long running answers may go on after the server was told to stop."""


class _Server(uvicorn.Server):
    """uvicorn, telling when it accepts connections and leaving signals to whoever runs it."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_ready: Callable[[], None],
        drain_s: float,
        ending: Ending,
    ) -> None:
        super().__init__(config)
        self.on_ready = on_ready
        self.drain_s = drain_s
        self.ending = ending

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        drained = loop.call_later(0 if self.force_exit else self.drain_s, self.ending.begin)
        for one in sockets or []:
            unlink(one)
        try:
            await super().shutdown(sockets)
        finally:
            drained.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # They have one owner: `serve_forever`, or the face in whose process the thread runs.
        yield


class _Endpoint:
    """Sockets, application and server of one endpoint; the sockets listen from the beginning."""

    def __init__(
        self, engine_factory: Callable[[], Engine], options: ServerOptions, models: Models
    ) -> None:
        self.options = options
        self.engine_factory = engine_factory
        self.models = models
        self.server: _Server | None = None
        self.tls = _tls(options)
        self.sockets = (
            [listen_at(options.socket)]
            if options.socket is not None
            else listen(options.host, options.port, has_key=options.api_key is not None)
        )
        try:
            log_file.configure(access_log=options.access_log)
        except BaseException:
            self.close_sockets()
            raise
        self.url = url_of(self.sockets[0], "http" if self.tls is None else "https")

    async def serve(self, on_ready: Callable[[], None]) -> None:
        """Serve until `stop`; the engine object is made and closed in this event loop."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_loop_fault)
        at_path = self.sockets[0].family == AF_UNIX
        off_loopback = not at_path and not all(
            is_loopback(one.getsockname()[0]) for one in self.sockets
        )
        own_name = gethostname().lower()
        async with contextlib.AsyncExitStack() as leaving:
            leaving.callback(self.close_sockets)
            has_key = self.options.api_key is not None
            leaving.enter_context(announced(self.url, has_key=has_key))
            engine = self.engine_factory()
            leaving.push_async_callback(engine.close)
            ending = Ending()
            app = create_app(
                engine,
                ending=ending,
                is_full=self.is_full,
                at_path=at_path,
                models=self.models,
                allow_hosts=[
                    *self.options.allow_hosts,
                    *((self.options.host, own_name, f"{own_name}.local") if off_loopback else ()),
                ],
                allow_ip_hosts=off_loopback,
                allow_origins=self.options.allow_origins,
                api_key=self.options.api_key,
                body_timeout_s=self.options.body_timeout_s,
                keep_alive_s=self.options.keep_alive_s,
            )
            connection = functools.partial(
                connections.Connection,
                most=self.options.max_connections,
                head_timeout_s=self.options.head_timeout_s,
            )
            connections.allow_open_files(self.options.max_connections)
            config = uvicorn.Config(
                app,
                # Fixed, so that a parser that happens to be installed changes nothing; there are
                # no websocket routes, and the guards know http only.
                http=cast(Any, connection),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=self.options.access_log,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=connections.REST_S,
                timeout_graceful_shutdown=math.ceil(self.options.drain_s) + 1,
                ssl_context_factory=None if self.tls is None else self._tls_context,
            )
            self.server = _Server(config, on_ready, self.options.drain_s, ending)
            await self.server.serve(self.sockets)

    def stop(self, *, force: bool = False) -> None:
        """End `serve`, from any thread; `force` does not wait for running answers."""
        if self.server is not None:
            self.server.force_exit = force or self.server.force_exit
            self.server.should_exit = True

    def is_full(self) -> bool:
        """Whether there are more connections than may be answered."""
        assert self.server is not None
        return len(self.server.server_state.connections) > self.options.max_connections

    def close_sockets(self) -> None:
        for one in self.sockets:
            unlink(one)
            one.close()

    def _tls_context(self, _config: uvicorn.Config, _default: object) -> ssl.SSLContext:
        assert self.tls is not None
        return self.tls


def _tls(options: ServerOptions) -> ssl.SSLContext | None:
    if options.tls_certificate is not None:
        return tls.context(options.tls_certificate, options.tls_key)
    if options.tls_key is not None:
        raise GryphonError("invalid_tls", "A TLS key needs its certificate: --tls-cert FILE.")
    return None


def serve_forever(
    engine_factory: Callable[[], Engine],
    options: ServerOptions | None = None,
    *,
    models: Models = installed,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; the second one does not wait for running answers.

    Args:
        engine_factory: Makes the engine client, in the serving event loop.
        on_ready: Called once with the URL when connections are accepted.

    Raises:
        GryphonError: the address cannot be had, or is open to the network without an API key.
    """
    endpoint = _Endpoint(engine_factory, options or ServerOptions(), models)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            endpoint.stop(force=endpoint.server is not None and endpoint.server.should_exit)

        for one in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(one, on_signal)
        await endpoint.serve(lambda: on_ready(endpoint.url))

    asyncio.run(main())


class ServerThread:
    """The endpoint in a thread with its own event loop and engine client, beside a busy face."""

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        options: ServerOptions | None = None,
        *,
        models: Models = installed,
    ) -> None:
        self.engine_factory = engine_factory
        self.options = options or ServerOptions()
        self.models = models
        self._endpoint: _Endpoint | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._fault: BaseException | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end; only after `start`."""
        assert self._endpoint is not None, "not started"
        return self._endpoint.url

    def start(self) -> None:
        """Return when connections are accepted.

        Raises:
            GryphonError: the address cannot be had, or is open to the network without an API key.
        """
        self._endpoint = _Endpoint(self.engine_factory, self.options, self.models)
        self._thread = threading.Thread(
            target=self._run, args=(self._endpoint,), name="gryphon-server", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._fault is not None:
            self._thread.join()
            if isinstance(self._fault, GryphonError):
                raise self._fault
            raise GryphonError(
                "server_failed",
                f"The REST endpoint did not start; {paths.state_dir() / 'server.log'} says why.",
            ) from self._fault

    def stop(self) -> None:
        """End it, giving running answers a few seconds. Idempotent."""
        if self._endpoint is not None and self._thread is not None:
            self._endpoint.stop()
            self._thread.join()

    def _run(self, endpoint: _Endpoint) -> None:
        try:
            asyncio.run(endpoint.serve(self._ready.set))
        except BaseException as error:
            if not isinstance(error, GryphonError):
                log_fault("server thread failed", error)
            self._fault = error
        finally:
            self._ready.set()


def _log_loop_fault(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    error = context.get("exception")
    if isinstance(error, BaseException):
        log_fault("event loop", error)
