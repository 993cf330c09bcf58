"""A hub on this machine that speaks the Hugging Face Hub's HTTP protocol, and can misbehave.

Two servers: the hub (metadata, and files kept in git) and, on another port as on the real one, the
storage host that large files redirect to. `huggingface_hub` is content with it: see
tests/library/test_hub_server.py. What the real one does was read from huggingface_hub's client and
from the errors that people report. It offers no Xet (no X-Xet-Hash, no xetHash), so the client uses
plain HTTP.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

_PIECE = 1 << 16
_SIGNATURE = "X-Signature=storage-needs-no-token"


@dataclass
class Fault:
    """What goes wrong with one file. Offsets count from the start of the whole file."""

    status: int | None = None
    """Answer this instead, with `headers`."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    """Close the connection before this byte."""
    stall_at: int | None = None
    """Send nothing from this byte on, and keep the connection open."""
    silent: bool = False
    """Accept the request for the content and never answer it."""
    wrong_byte_at: int | None = None
    etag: str | None = None
    """Say this etag, as a hub does whose file was replaced."""
    ignore_range: bool = False
    gzip_claimed: bool = False
    body: Iterator[bytes] | None = None
    """Of a metadata answer with `status`: chunks, until the client has had enough."""
    no_length: bool = False
    """Send all of it without Content-Length; it ends where the connection does."""
    where: Literal["hub", "storage", "any"] = "any"
    times: int | None = 1
    """How many answers it spoils; None is all of them."""


@dataclass
class Request:
    """One answered request."""

    host: Literal["hub", "storage"]
    method: str
    path: str
    file: str | None
    start: int
    """First byte asked for."""
    status: int
    sent: int
    """Bytes of the body that were written so far."""
    authorization: str | None


@dataclass
class Repository:
    """A model repository: commits are immutable, refs move."""

    name: str
    private: bool = False
    gated: Literal["auto", "manual"] | None = None
    license: str | None = "apache-2.0"
    moved_to: str | None = None
    disabled: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the hub claims, where they are lies."""

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make `files` the content of `ref`; returns the commit."""
        digest = hashlib.sha1(f"{self.name}{len(self.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode(errors="surrogateescape") + data)
        commit = digest.hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> str | None:
        if revision in self.refs:
            return self.refs[revision]
        return next((one for one in self.commits if one.startswith(revision)), None)


def is_lfs(name: str, data: bytes) -> bool:
    return name.endswith((".safetensors", ".bin", ".model", ".gguf")) or len(data) > 1_000_000


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag_of(name: str, data: bytes) -> str:
    """What the hub calls the content: sha256 of large files, the git blob's sha1 of others."""
    return hashlib.sha256(data).hexdigest() if is_lfs(name, data) else git_oid(data)


class HubServer:
    """The two servers and what they serve. Use `running()`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        """Token → the scopes it has: "gated" (may read gated repositories at all), and the names
        of the repositories whose licence its owner accepted or that are private to them."""
        self.requests: list[Request] = []
        self.bytes_per_s: float | None = None
        self.api_faults: list[Fault] = []
        """Spoil the next metadata requests (`status`, `headers`, `stall_at`, `body` alone)."""
        self.search_extra: dict[str, Any] = {}
        """Said of every model that a search finds, whatever is true."""
        self.silent = threading.Event()
        """Set once a request is left without an answer."""
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._on_bytes: Callable[[str, int], None] | None = None
        self._etags: dict[int, str] = {}
        self._hub = _server(self, "hub")
        self._storage = _server(self, "storage")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._storage.server_port}"

    def add(self, name: str, files: dict[str, bytes], **properties: Any) -> Repository:
        repository = Repository(name, **properties)
        repository.commit(files)
        self.repositories[name] = repository
        return repository

    def spoil(self, file: str, **fault: Any) -> None:
        """Let the next answers with this file's content go wrong."""
        with self._lock:
            self._faults.setdefault(file, []).append(Fault(**fault))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()
            self.api_faults.clear()
        self.bytes_per_s = None

    def release(self) -> None:
        """Let stalled answers end."""
        self._released.set()

    def on_bytes(self, listener: Callable[[str, int], None] | None) -> None:
        """Call `listener(file, offset)` before each piece of a body is sent."""
        self._on_bytes = listener

    def sent(self, file: str | None = None) -> int:
        """Bytes of file content that were sent so far."""
        return sum(one.sent for one in self.answers(file))

    def answers(self, file: str | None = None) -> list[Request]:
        """The GET requests that content was sent for, oldest first."""
        with self._lock:
            return [
                one
                for one in self.requests
                if one.method == "GET"
                and one.file is not None
                and file in (None, one.file)
                and one.status in (200, 206)
            ]

    def start(self) -> None:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.release()
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    def etag(self, name: str, data: bytes) -> str:
        """As `etag_of`, computed once per content."""
        if id(data) not in self._etags:
            self._etags[id(data)] = etag_of(name, data)
        return self._etags[id(data)]

    def take_fault(self, file: str, host: str) -> Fault | None:
        with self._lock:
            return _take(
                [fault for fault in self._faults.get(file, []) if fault.where in ("any", host)],
                self._faults.get(file, []),
            )

    def take_api_fault(self) -> Fault | None:
        with self._lock:
            return _take(self.api_faults, self.api_faults)


def _take(candidates: list[Fault], source: list[Fault]) -> Fault | None:
    if not candidates:
        return None
    fault = candidates[0]
    if fault.times is not None:
        fault.times -= 1
        if fault.times <= 0:
            source.remove(fault)
    return fault


@contextmanager
def running() -> Iterator[HubServer]:
    hub = HubServer()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the tests are about."""


def _server(hub: HubServer, host: Literal["hub", "storage"]) -> _Server:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.host = hub, host
    return _Server(("127.0.0.1", 0), Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    host: Literal["hub", "storage"]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self._query = urllib.parse.parse_qs(url.query)
        parts = [urllib.parse.unquote(part) for part in url.path.split("/")[1:]]
        if self.host == "storage":
            self._storage_file("/".join(parts))
        elif parts[:2] == ["api", "models"]:
            self._api(parts[2:])
        elif parts[:3] == ["api", "resolve-cache", "models"]:
            self._resolve("/".join(parts[3:5]), parts[5], "/".join(parts[6:]), cached=True)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound", "Not found")

    # Metadata.

    def _api(self, parts: list[str]) -> None:
        fault = self.hub.take_api_fault()
        if fault is not None and fault.stall_at is not None:
            self.hub._released.wait(60)
        if fault is not None and fault.body is not None:
            self._send_chunks(fault.status or 200, fault.headers, fault.body)
            return
        if fault is not None and fault.status is not None:
            self._answer(fault.status, b"{}", fault.headers)
            return
        if not parts:
            self._search()
            return
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self._readable(name, metadata=True)
        if repository is None:
            return
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree") else "main"
        commit = repository.find(revision)
        if rest == ["refs"]:
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": target}
                for ref, target in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})
        elif commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif not rest or rest[0] == "revision":
            self._json(self._info(repository, commit))
        elif rest[0] == "tree":
            self._json([self._tree_entry(*item) for item in repository.commits[commit].items()])
        else:
            self._refuse(404, "EntryNotFound", "Not found")

    def _info(self, repository: Repository, commit: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, data in repository.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": name}
            if self._query.get("blobs") in (["true"], ["True"]):
                sibling["size"] = repository.sizes.get(name, len(data))
                sibling["blobId"] = git_oid(data) if not is_lfs(name, data) else "f" * 40
                if is_lfs(name, data):
                    sibling["lfs"] = {
                        "sha256": self.hub.etag(name, data),
                        "size": sibling["size"],
                        "pointerSize": 134,
                    }
            siblings.append(sibling)
        return {
            "_id": "0",
            "id": repository.name,
            "modelId": repository.name,
            "sha": commit,
            "private": repository.private,
            "gated": repository.gated or False,
            "disabled": repository.disabled,
            "downloads": 7,
            "likes": 1,
            "tags": [f"license:{repository.license}"] if repository.license else [],
            "cardData": {"license": repository.license} if repository.license else None,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": siblings,
        }

    def _tree_entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
        entry["oid"] = git_oid(data) if not is_lfs(name, data) else "f" * 40
        if is_lfs(name, data):
            etag = self.hub.etag(name, data)
            entry["lfs"] = {"oid": etag, "size": len(data), "pointerSize": 134}
        return entry

    def _search(self) -> None:
        (query,) = self._query.get("search", [""])
        (limit,) = self._query.get("limit", ["1000"])
        found = [
            repository
            for repository in self.hub.repositories.values()
            if query.lower() in repository.name.lower()
            and not repository.private
            and not repository.moved_to
        ]
        wanted = self._query.get("expand", [])
        answers = []
        for repository in found[: int(limit)]:
            files = repository.commits[repository.refs["main"]]
            info = self._info(repository, repository.refs["main"])
            if "safetensors" in wanted and (parameters := _parameters(files)):
                info["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
            if "config" in wanted and "config.json" in files:
                info["config"] = json.loads(files["config.json"])
            if "siblings" not in wanted and wanted:
                del info["siblings"]
            answers.append(info | self.hub.search_extra)
        self._json(answers)

    # Files.

    def _resolve(self, name: str, revision: str, file: str, *, cached: bool = False) -> None:
        repository = self._readable(name, metadata=False, file=file)
        if repository is None:
            return
        commit = repository.find(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", file)
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found", file)
            return
        fault = self.hub.take_fault(file, "hub")
        etag = fault.etag if fault and fault.etag else self.hub.etag(file, data)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if fault and fault.status:
            self._answer(fault.status, b"", fault.headers, file=file)
        elif is_lfs(file, data):
            path = urllib.parse.quote(f"{name}/{commit}/{file}")
            headers |= {
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{etag[:32]}"',
                "Location": f"{self.hub.storage}/{path}?{_SIGNATURE}",
            }
            if fault and not fault.etag:
                self._pass_on(file, fault, "storage")
            self._answer(302, b"", headers, file=file)
        elif not cached:  # small files come from another address of the hub
            if fault:
                self._pass_on(file, fault, "hub")
            path = urllib.parse.quote(f"{name}/{commit}/{file}")
            headers |= {
                "ETag": 'W/"of-this-redirect"',
                "Location": f"/api/resolve-cache/models/{path}",
            }
            self._answer(307, b"", headers, file=file)
        else:
            self._send_file(file, data, headers | {"ETag": f'"{etag}"'}, fault)

    def _pass_on(self, file: str, fault: Fault, where: Literal["hub", "storage"]) -> None:
        """A fault of the content is for the address that sends it."""
        again = dataclasses.replace(fault, times=1, where=where)
        with self.hub._lock:
            self.hub._faults.setdefault(file, []).insert(0, again)

    def _storage_file(self, path: str) -> None:
        org, name, commit, file = path.split("/", 3)
        data = self.hub.repositories[f"{org}/{name}"].commits[commit][file]
        if _SIGNATURE not in self.path:
            self._refuse(403, None, "not signed", file)
        elif self.headers.get("Authorization"):  # as S3 does: two ways to authenticate
            self._refuse(400, None, "Only one auth mechanism allowed", file)
        else:
            fault = self.hub.take_fault(file, "storage")
            if fault and fault.status:
                self._answer(fault.status, b"", fault.headers, file=file)
            else:
                self._send_file(file, data, {"ETag": '"of-the-storage-host-5"'}, fault)

    def _send_file(
        self, file: str, data: bytes, headers: dict[str, str], fault: Fault | None
    ) -> None:
        fault = fault or Fault()
        if fault.silent:
            self.hub.silent.set()
            self.hub._released.wait(60)
        start, end, status = 0, len(data), 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not fault.ignore_range:
            first, _, last = wanted[6:].partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            if start >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"}, file=file)
                return
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            status = 206
        if fault.gzip_claimed:
            headers = headers | {"Content-Encoding": "gzip"}
        length = {"Content-Length": str(end - start)}
        if fault.no_length:
            length, self.close_connection = {"Connection": "close"}, True
        self.send_response(status)
        for key, value in (headers | length).items():
            self.send_header(key, value)
        self.end_headers()
        request = self._record(status, file, start)
        if self.command == "GET":
            self._send_body(file, data, start, end, fault, request)

    def _send_body(
        self, file: str, data: bytes, start: int, end: int, fault: Fault, request: Request
    ) -> None:
        view = memoryview(data)
        at = start
        stops = [stop for stop in (fault.cut_at, fault.stall_at) if stop is not None]
        stop = min([end, *(max(one, start) for one in stops)])
        while at < stop:
            if self.hub._on_bytes is not None:
                self.hub._on_bytes(file, at)
            piece = view[at : min(at + _PIECE, stop)]
            wrong = fault.wrong_byte_at
            if wrong is not None and at <= wrong < at + len(piece):
                changed = bytearray(piece)
                changed[wrong - at] ^= 1
                piece = memoryview(changed)
            at += len(piece)
            request.sent = at - start  # first: the client may be faster than this thread
            self.wfile.write(piece)
            if self.hub.bytes_per_s:
                time.sleep(len(piece) / self.hub.bytes_per_s)
        if at < end:
            self.wfile.flush()
            if fault.stall_at is not None and fault.stall_at <= at:
                self.hub._released.wait(60)
            self.close_connection = True
            self.connection.close()

    # Access.

    def _readable(self, name: str, *, metadata: bool, file: str | None = None) -> Repository | None:
        """The repository, or None after an answer that says why not."""
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ") or None
        if token is not None and token not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            return self._refuse(401, None, message, file)
        scopes = self.hub.tokens.get(token or "", set())
        repository = self.hub.repositories.get(name)
        if repository is not None and repository.moved_to:
            location = self.path.replace(name, repository.moved_to, 1)
            self._answer(307, b"", {"Location": location}, file=file)
            return None
        if repository is None or (repository.private and name not in scopes):
            if token is None:
                return self._refuse(401, None, "Invalid username or password.", file)
            return self._refuse(404, "RepoNotFound", "Repository not found", file)
        if repository.disabled:
            return self._refuse(403, None, "Access to this resource is disabled.", file)
        if repository.gated and not metadata:
            page = f"https://huggingface.co/{name}"
            if token is None:
                return self._refuse(
                    401, "GatedRepo",
                    f"Access to model {name} is restricted. You must have access to it and be "
                    "authenticated to access it. Please log in.", file,
                )  # fmt: skip
            if "gated" not in scopes:
                return self._refuse(
                    403, None,
                    "Please enable access to public gated repositories in your fine-grained token "
                    "settings to view this repository.", file,
                )  # fmt: skip
            if name not in scopes:
                return self._refuse(
                    403, "GatedRepo",
                    f"Access to model {name} is restricted and you are not in the authorized list. "
                    f"Visit {page} to ask for access.", file,
                )  # fmt: skip
        return repository

    def _refuse(self, status: int, code: str | None, message: str, file: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._answer(status, json.dumps({"error": message}).encode(), headers, file=file)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], file: str | None = None
    ) -> None:
        # Recorded first: a client may act on the answer before this thread runs again.
        self._record(status, file, 0)
        self.send_response(status, HTTPStatus(status).phrase)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _send_chunks(self, status: int, headers: dict[str, str], body: Iterator[bytes]) -> None:
        request = self._record(status, None, 0)
        self.close_connection = True
        self.send_response(status, HTTPStatus(status).phrase)
        for key, value in (headers | {"Connection": "close"}).items():
            self.send_header(key, value)
        self.end_headers()
        for chunk in body:
            request.sent += len(chunk)
            self.wfile.write(chunk)

    def _record(self, status: int, file: str | None, start: int) -> Request:
        authorization = self.headers.get("Authorization")
        request = Request(self.host, self.command, self.path, file, start, status, 0, authorization)
        with self.hub._lock:
            self.hub.requests.append(request)
        return request


def _parameters(files: dict[str, bytes]) -> dict[str, int]:
    """Values per dtype, as the hub counts them from the headers."""
    counts: dict[str, int] = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            length = int.from_bytes(data[:8], "little")
            header: dict[str, Any] = json.loads(data[8 : 8 + length])
            for entry in header.values():
                if "shape" in entry:
                    count = 1
                    for size in entry["shape"]:
                        count *= size
                    counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + count
    return counts
