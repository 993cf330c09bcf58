"""The Hugging Face Hub: what a repository holds, and the bytes of its files.

Tokens, URLs and the sense of an answer come from huggingface_hub, which also reads HF_ENDPOINT and
the other settings of its own. The requests are made here: its client starts an interrupted file
again, and reads metadata without an end in bytes or time.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import constants, get_token, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from app import __version__
from app.errors import GryphonError
from app.library import hub_client
from app.library.hub_errors import (
    Interruption,
    RepositoryChanged,
    failed_answer,
    failed_connection,
    lasting,
    offline_mode,
    renamed,
)
from app.library.patience import Patience

T = TypeVar("T")

_MAX_REDIRECTS = 8
_SHA1 = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    size: int
    etag: str
    """Of its content: sha256 for what the hub keeps in LFS, else git's sha1 of the blob."""


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    name: str
    revision: str
    """As asked for: a branch, a tag or a commit."""
    commit: str
    files: tuple[RemoteFile, ...]
    license: str | None
    gated: bool


class Body:
    """The bytes of a file as they arrive."""

    def __init__(self, response: httpx2.Response, begins_at: int, stall_s: float) -> None:
        self._response = response
        self._stall_s = stall_s
        self.begins_at = begins_at
        """Offset of the first byte in the file: 0 when the server does not do ranges."""

    def chunks(self) -> Iterator[bytes]:
        """
        Raises:
            Interruption: cut or silent.
        """
        try:
            yield from self._response.iter_raw()
        except httpx2.HTTPError as error:
            raise failed_connection(error, self._response.url.host, self._stall_s) from error


class Hub:
    """Connections to the hub; used from several threads. A context manager."""

    def __init__(
        self,
        patience: Patience | None = None,
        tell: Callable[[str], object] = lambda what: None,
    ) -> None:
        """
        Args:
            tell: Hears why a small request takes long, from any thread; transfers report their own.

        Raises:
            GryphonError: "offline_mode", or "token_invalid" when the stored one cannot be read.
        """
        if constants.is_offline_mode():
            raise offline_mode()
        # With it on, huggingface_hub looks up and tells which program started us.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        self.patience = patience or Patience()
        self._tell = tell
        self._has_token = False
        self._headers = self._request_headers()
        self._reader = hub_client.bounded(self._headers, self.patience.stall_s)
        self._client = httpx2.Client(
            follow_redirects=False,  # by hand: the token stays with the hub
            timeout=httpx2.Timeout(
                self.patience.stall_s, connect=self.patience.connect_s, pool=None
            ),
        )
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.closed = threading.Event()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every transfer at once, also those that wait for bytes."""
        self.interrupt()
        self._client.close()
        self._reader.close()

    def interrupt(self) -> None:
        """Cut the open transfers: their threads see an Interruption."""
        with self._lock:
            self.closed.set()
            connections = list(self._connections)
        for connection in connections:
            _cut(connection)

    def resume(self) -> None:
        """Transfers may start again after `interrupt`, once its threads have ended."""
        self.closed.clear()

    def repository(self, name: str, revision: str) -> Repository:
        """What the hub says of a model.

        Raises:
            GryphonError: no such model, no access, no network …; see `hub_errors`.
        """
        path = f"api/models/{quote(name)}/revision/{quote(revision, safe='')}"
        info = self._ask(name, lambda: _model_info(self._metadata(path, {"blobs": True})))
        if info.id != name:
            raise renamed(name, str(info.id))
        if not isinstance(info.sha, str) or not _SHA1.fullmatch(info.sha):
            raise _not_understood(name, f"its commit is {info.sha!r}")
        return Repository(
            name=name,
            revision=revision,
            commit=info.sha,
            files=tuple(_remote_file(name, sibling) for sibling in info.siblings or ()),
            license=_license(info),
            gated=bool(info.gated),
        )

    def search(self, query: str, limit: int) -> list[Any]:
        """Models whose name has the words of `query`, most downloaded first, as huggingface_hub's
        ModelInfo with `safetensors`, `config`, `downloads` and `gated`.

        Raises:
            GryphonError: no network, …
        """

        # Not HfApi.list_models: it waits without end, and follows as many pages as it is given.
        params = {
            "search": query,
            "filter": "safetensors",
            "sort": "downloads",
            "limit": limit,
            "expand": ["safetensors", "config", "downloads", "gated"],
        }

        def request() -> list[Any]:
            return [_model_info(one) for one in self._metadata("api/models", params)][:limit]

        return self._ask("the search", request)

    def config(self, name: str) -> dict[str, Any]:
        """config.json of a model's main branch, as it is now; asked for once.

        Raises:
            GryphonError, Interruption, RepositoryChanged: no access, no such file, no answer …
        """

        path = f"{quote(name)}/resolve/main/config.json"
        return self._translated(name, lambda: dict(self._metadata(path, {})))

    def _metadata(self, path: str, params: dict[str, Any]) -> Any:
        """What the hub says at an address, as JSON."""
        response = self._reader.get(f"{constants.ENDPOINT}/{path}", params=params)
        hf_raise_for_status(response)
        return response.json()

    def read(self, repository: Repository, file: RemoteFile, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file.

        Raises:
            GryphonError, RepositoryChanged: as `open`.
        """

        def request() -> bytes:
            data = bytearray()
            with self.open(repository, file, start, end) as body:
                skip = start - body.begins_at
                for chunk in body.chunks():
                    data += chunk
                    if len(data) >= skip + end - start:
                        break
            return bytes(data[skip : skip + end - start])

        return self._persist(repository.name, request)

    @contextlib.contextmanager
    def open(
        self, repository: Repository, file: RemoteFile, start: int = 0, end: int | None = None
    ) -> Iterator[Body]:
        """Ask for a file's bytes from `start` on, up to `end`.

        Raises:
            Interruption: what trying again may cure.
            RepositoryChanged: the hub has another file of that name now.
            GryphonError: no access.
        """
        headers = self._headers | {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        url = hf_hub_url(
            repository.name,
            file.name,
            revision=repository.commit,
            endpoint=constants.ENDPOINT,
        )
        for _ in range(_MAX_REDIRECTS):
            with self._send(url, headers) as response:
                at_hub = _is_hub(url)
                target = None
                if response.is_redirect:
                    target = _redirected(url, response.headers.get("Location", ""))
                if at_hub and response.status_code < 400:
                    stays = target is not None and _is_hub(target)
                    _check_pinned(response, repository, file, stays=stays)
                if target is None:
                    begins_at = self._begins_at(response, repository, file, start, at_hub)
                    yield Body(response, begins_at, self.patience.stall_s)
                    return
            url = target
            if not _is_hub(url):
                headers.pop("authorization", None)
        raise GryphonError(
            "hub_refused",
            f"{file.name} of {repository.name} leads from one address to the next without end. "
            "Try again later.",
        )

    @contextlib.contextmanager
    def _send(self, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        host = urlsplit(url).hostname or url
        try:
            response = self._client.send(
                self._client.build_request(
                    "GET", url, headers=headers, extensions={"trace": self._trace}
                ),
                stream=True,
            )
        except httpx2.HTTPError as error:
            raise failed_connection(error, host, self.patience.stall_s) from error
        try:
            if self.closed.is_set():  # `interrupt` was called before it could see this connection
                raise failed_connection(httpx2.ReadError("closed"), host, 0)
            yield response
        finally:
            response.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remember every connection from its first moment: it may never bring an answer."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"]
            with self._lock:
                self._connections.add(connection)
                closed = self.closed.is_set()
            if closed:
                _cut(connection)

    def _begins_at(
        self,
        response: httpx2.Response,
        repository: Repository,
        file: RemoteFile,
        start: int,
        at_hub: bool,
    ) -> int:
        """Offset of the answer's first byte, when it is an answer with the right file's bytes."""
        status, host = response.status_code, response.url.host
        if status not in (200, 206):
            # The storage host refuses a link that has expired; the hub gives a fresh one.
            if not at_hub and status in (400, 401, 403, 404, 410):
                raise failed_connection(httpx2.RemoteProtocolError(str(status)), host, 0)
            if response.headers.get("X-Error-Code") == "RevisionNotFound":
                raise RepositoryChanged(f"the commit {repository.commit[:8]} is gone")
            if status == 416:
                raise RepositoryChanged(f"{file.name} is shorter than announced")
            raise failed_answer(response, repository.name, has_token=self._has_token)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _not_understood(repository.name, f"{file.name} comes compressed")
        if status == 200:
            # Without a length, the count and the digest at the end must do.
            begins_at, total = 0, response.headers.get("Content-Length", str(file.size))
        else:
            found = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")
            )
            if found is None or int(found[1]) != start:
                raise _not_understood(repository.name, "it sends another range than asked for")
            begins_at, total = start, found[2]
        if total != str(file.size):
            raise RepositoryChanged(f"{file.name} has {total} bytes, {file.size} were announced")
        return begins_at

    def _request_headers(self) -> dict[str, str]:
        try:
            token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
            (token or "").encode("ascii")
        except (OSError, ValueError, HfHubHTTPError, httpx2.HTTPError) as error:
            raise GryphonError(
                "token_invalid",
                "Your Hugging Face token cannot be used: it cannot be read, or is not a token. Run "
                "`hf auth login` again, or set HF_TOKEN.",
            ) from error
        self._has_token = bool(token)
        headers = {"user-agent": f"gryphon/{__version__}"}
        return headers | ({"authorization": f"Bearer {token}"} if token else {})

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        """As `_translated`, asked again while that may help."""
        return self._persist(name, lambda: self._translated(name, request))

    def _translated(self, name: str, request: Callable[[], T]) -> T:
        """A request through huggingface_hub, its failures as ours."""
        try:
            return request()
        except HfHubHTTPError as error:
            raise failed_answer(error.response, name, has_token=self._has_token) from error
        except hub_client.UnfitAnswer as error:
            raise _not_understood(name, str(error)) from error
        except httpx2.HTTPError as error:
            host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
            raise failed_connection(error, host, self.patience.stall_s) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _not_understood(name, f"{type(error).__name__}") from error

    def _persist(self, name: str, request: Callable[[], T]) -> T:
        """The answer to a small request, asked again while that may help."""
        failures = 0
        while True:
            try:
                return request()
            except Interruption as error:
                failures += 1
                wait_s = self.patience.wait_s(failures, error)
                # Nobody waits half a minute to read that the network is off.
                if wait_s is None or (error.offline and failures > 1):
                    raise lasting(error, name) from error
                self._tell(f"{error.reason}; asking again")
                if self.closed.wait(wait_s):
                    raise lasting(error, name) from error


def _cut(connection: Any) -> None:
    # Closing a socket does not wake the thread that reads from it; shutting it down does.
    # Not SSLSocket's own shutdown, which takes the TLS state from under that thread.
    with contextlib.suppress(OSError, TypeError):  # closed, or no socket of its own (TLS in TLS)
        socket.socket.shutdown(connection.get_extra_info("socket"), socket.SHUT_RDWR)


def _check_pinned(
    response: httpx2.Response, repository: Repository, file: RemoteFile, *, stays: bool
) -> None:
    """The hub's answer is about the commit and the content that the metadata named.

    Args:
        stays: It leads to another address of the hub; then a plain ETag is of the answer itself.
    """
    commit = response.headers.get("X-Repo-Commit", repository.commit)
    etag = response.headers.get("X-Linked-Etag")
    if etag is None and not stays:
        etag = response.headers.get("ETag")
    etag = (etag or file.etag).removeprefix("W/").strip('"')
    if commit != repository.commit or etag != file.etag:
        raise RepositoryChanged(f"the hub has another {file.name} of {repository.name} now")


def _redirected(url: str, location: str) -> str:
    secure = urlsplit(url).scheme == "https"
    try:
        target = str(httpx2.URL(urljoin(url, location)))
        allowed = urlsplit(target).scheme in (("https",) if secure else ("http", "https"))
    except (httpx2.InvalidURL, ValueError):
        allowed = False
    if not allowed:
        raise GryphonError(
            "hub_refused",
            f"{urlsplit(url).hostname} sends the download to an address that is not valid or not "
            "secure, so it was not followed.",
        )
    return target


def _is_hub(url: str) -> bool:
    return _origin(url) == _origin(constants.ENDPOINT)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def _remote_file(name: str, sibling: Any) -> RemoteFile:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if type(size) is not int or not 0 <= size < 2**53:
        raise _not_understood(name, f"{sibling.rfilename!r} has the size {size!r}")
    if not isinstance(etag, str) or not _ETAG.fullmatch(etag):
        raise _not_understood(name, f"{sibling.rfilename!r} has the content name {etag!r}")
    return RemoteFile(str(sibling.rfilename), size, etag)


def _model_info(fields: dict[str, Any]) -> Any:
    return huggingface_hub.ModelInfo(**fields)  # type: ignore[no-untyped-call]


def _license(info: Any) -> str | None:
    value = getattr(info.card_data, "license", None)
    if isinstance(value, str):
        named = getattr(info.card_data, "license_name", None)
        return named if value == "other" and isinstance(named, str) else value
    for tag in info.tags or ():
        if isinstance(tag, str) and tag.startswith("license:"):
            return tag.removeprefix("license:")
    return None


def _not_understood(name: str, what: str) -> GryphonError:
    return GryphonError(
        "hub_not_understood",
        f"The answer of {urlsplit(constants.ENDPOINT).hostname} about {name} is not what a hub "
        f"says: {what}. Check HF_ENDPOINT and any proxy on the way.",
    )
