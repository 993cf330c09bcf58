"""Pull a model from the hub: look at it first, then fetch, check and install it.

Looked at before anything large moves: the list of files, config.json, the index of the weights and
the headers of the weight files, all small requests. What could do harm or could not run is refused
there, by name, and once more from the files themselves before they are installed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.errors import GryphonError
from app.library import disk, licenses
from app.library.hub import Hub, RemoteFile, Repository
from app.library.hub_cache import RepositoryCache
from app.library.hub_errors import RepositoryChanged, one_line
from app.library.installed import (
    InstalledModel,
    context_length,
    installed_name,
    quantization,
    read_model,
)
from app.library.transfer import Status, Transfer, content_digest
from mlxmodels import checkpoint, registry
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import PREFIX_BYTES, TensorEntry, header_bytes, parse_header

SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Everything a model needs and nothing that Python would run."""

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]{0,199}", re.ASCII)
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
_MAX_JSON_BYTES = 64_000_000
_MAX_REMOTE_HEADER_BYTES = 25_000_000
"""The limit of huggingface_hub; real ones have a megabyte at most."""
_MAX_TENSORS = 2_000_000
"""The largest model known has a seventh of a million."""
_SPARE_BYTES = 100_000_000
_HEADERS_AT_ONCE = 8
ATTEMPTS = 3
"""At a repository that changes while it is fetched."""


class Report(Protocol):
    """Hears how a pull is doing. May raise to cancel it."""

    def waiting(self) -> None:
        """Another pull of the same model is running; called again and again."""

    def progress(self, status: Status) -> None:
        """Called some times a second."""


@dataclass(frozen=True)
class PullPlan:
    """What a pull would bring."""

    repository: Repository
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...]
    """Names of the repository's files that a model does not need, or that could be run."""
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    quantization: str
    here_bytes: int
    """Of `total_bytes`, on this disk already."""
    free_bytes: int
    installed: bool

    @property
    def name(self) -> str:
        """What the installed model is called."""
        return installed_name(self.repository.name, self.repository.revision)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        return self.total_bytes - self.here_bytes

    @property
    def parameters(self) -> int:
        return checkpoint.parameter_count(self.config, self.tensors)

    @property
    def context_length(self) -> int | None:
        return context_length(self.config)


def parse_name(name: str, revision: str | None = None) -> tuple[str, str]:
    """ORG/NAME and the revision of "ORG/NAME@REVISION"; the main branch when none is given.

    Raises:
        GryphonError: "usage".
    """
    repository, at, written = name.partition("@")
    if at and revision is not None and revision != written:
        raise GryphonError("usage", f"Two revisions are given: {written!r} and {revision!r}.")
    revision = written if at else ("main" if revision is None else revision)
    unsafe = any(part in repository for part in ("--", "..")) or ".." in revision
    if unsafe or not _NAME.fullmatch(repository):
        raise GryphonError(
            "usage",
            f"{name!r} is not the name of a model on the hub: expected ORG/NAME. `gryphon search` "
            "finds them by words.",
        )
    parts = revision.split("/")
    if not _REVISION.fullmatch(revision) or any(part.strip(".") == "" for part in parts):
        raise GryphonError("usage", f"{revision!r} is not a branch, a tag or a commit.")
    return repository, revision


def make_plan(hub: Hub, name: str, revision: str = "main") -> PullPlan:
    """Look at a repository.

    Raises:
        GryphonError: no access, no network (see `hub_errors`); "unsafe_model" for names that leave
            the directory or code in it; "unsupported_model" without config.json or safetensors;
            "invalid_model" when a file contradicts itself.
    """
    for _ in range(ATTEMPTS):
        repository = hub.repository(name, revision)
        try:
            return _plan(hub, repository)
        except RepositoryChanged as error:
            change = error
        except OSError as error:
            raise disk.file_error(RepositoryCache(name).path, name, error) from error
    raise unsteady(name, change)


def pull(hub: Hub, plan: PullPlan, report: Report) -> InstalledModel:
    """Fetch and install what the plan lists, or return it when it is installed.

    A pull that ends early, however, leaves nothing that is listed as a model; the next one goes on
    where it ended. A second pull of the same repository waits for the first.

    Raises:
        GryphonError: as `make_plan` and `Transfer.run`; "disk_full" before anything is fetched.
    """
    name, revision = plan.repository.name, plan.repository.revision
    cache = RepositoryCache(name)
    try:
        with cache.locked(report.waiting):
            for _ in range(ATTEMPTS):
                try:
                    return _pull(hub, plan, cache, report)
                except RepositoryChanged as error:
                    change = error
                plan = make_plan(hub, name, revision)
    except OSError as error:
        raise disk.file_error(cache.path, name, error) from error
    raise unsteady(name, change)


def _pull(hub: Hub, plan: PullPlan, cache: RepositoryCache, report: Report) -> InstalledModel:
    commit = plan.repository.commit
    if not cache.is_installed(commit, plan.files):
        cache.install(fetch(hub, plan, cache, report), commit)
    cache.set_ref(plan.repository.revision, commit)
    licenses.remember(plan.name, plan.repository.license)
    return read_model(cache.snapshot(commit), plan.name, "hub")


def fetch(hub: Hub, plan: PullPlan, cache: RepositoryCache, report: Report) -> Path:
    """Fetch and check what the plan lists, under the cache's lock; returns the staged directory.

    Raises:
        GryphonError: as `pull`.
        RepositoryChanged: the hub has other files now.
        OSError: the disk.
    """
    _check_room(plan, cache)
    Transfer(hub, plan.repository, plan.files, cache).run(report.progress)
    staged = cache.stage(plan.repository.commit, plan.files)
    _check_staged(plan.repository.name, staged)
    return staged


def _plan(hub: Hub, repository: Repository) -> PullPlan:
    cache = RepositoryCache(repository.name)
    files = {file.name: file for file in safe_files(repository)}
    if "config.json" not in files:
        raise _unsupported(repository, "it has no config.json")
    config = _read_json(hub, cache, repository, files["config.json"])
    _check_config(repository.name, config)
    weights = _weights(hub, cache, repository, files)
    chosen = tuple(
        file for file in files.values() if file in weights or not file.name.endswith(SUFFIXES[0])
    )
    tensors = _headers(hub, cache, repository, weights)
    here = sum(cache.bytes_here(file) for file in chosen)
    return PullPlan(
        repository=repository,
        files=chosen,
        left_out=tuple(file.name for file in repository.files if file not in chosen),
        config=config,
        tensors=tensors,
        quantization=quantization(config, lambda: tensors),
        here_bytes=here,
        free_bytes=disk.free_bytes(cache.path),
        installed=cache.is_installed(repository.commit, chosen),
    )


def safe_files(repository: Repository) -> list[RemoteFile]:
    """The files of a repository that a model may consist of: those in its top directory with a
    suffix of `SUFFIXES`, and chat templates in a directory of theirs.

    Raises:
        GryphonError: "unsafe_model" when any name would leave the directory, or two would be one
            on a disk that ignores case.
    """
    seen: dict[str, str] = {}
    files = []
    for file in repository.files:
        parts = file.name.split("/")
        if any(part.strip(". ") == "" for part in parts) or not _is_plain(file.name):
            raise GryphonError(
                "unsafe_model",
                f"{repository.name} has a file with the name {one_line(repr(file.name))}, which "
                "could be written outside its directory, so nothing of it was fetched.",
            )
        is_template = parts[:-1] == [_TEMPLATES] and file.name.endswith(".jinja")
        if not is_template and (len(parts) > 1 or not file.name.endswith(SUFFIXES)):
            continue
        other = seen.setdefault(file.name.casefold(), file.name)
        if other != file.name:
            raise GryphonError(
                "unsafe_model",
                f"{repository.name} has both {other} and {file.name}, which are one file where "
                "upper and lower case are the same, so nothing of it was fetched.",
            )
        files.append(file)
    return files


def _is_plain(name: str) -> bool:
    return name.isprintable() and "\\" not in name and all(len(p) < 240 for p in name.split("/"))


def _weights(
    hub: Hub, cache: RepositoryCache, repository: Repository, files: dict[str, RemoteFile]
) -> list[RemoteFile]:
    """The safetensors files that the model is loaded from; a repository may have others."""
    if _INDEX in files:
        weight_map = _read_json(hub, cache, repository, files[_INDEX]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _invalid(repository.name, f"its {_INDEX} has no weight_map")
        names = {str(name) for name in weight_map.values()}
        if missing := sorted(names - files.keys()):
            what = one_line(repr(missing[0]))
            raise _invalid(repository.name, f"its {_INDEX} lists {what}, which is not there")
    else:
        every = [name for name in files if name.endswith(".safetensors")]
        names = {name for name in every if name.startswith("model")} or set(every)
    weights = [files[name] for name in sorted(names) if name.endswith(".safetensors")]
    if not weights:
        raise _unsupported(repository, "it has no *.safetensors weights")
    return weights


def _headers(
    hub: Hub, cache: RepositoryCache, repository: Repository, weights: Iterable[RemoteFile]
) -> dict[str, TensorEntry]:
    """Tensors of all the weight files, from their checked headers."""

    def header(file: RemoteFile) -> dict[str, TensorEntry]:
        here = cache.has(file)
        try:
            return _header(hub, cache if here else None, repository, file)
        except ModelError as error:
            problem = error
        if here:
            with contextlib.suppress(ModelError):
                entries = _header(hub, None, repository, file)
                # The hub's is sound, so the one here is damaged; it comes again with the others.
                cache.blob(file).unlink(missing_ok=True)
                return entries
        raise _invalid(repository.name, f"{file.name}: {one_line(str(problem))}") from problem

    tensors: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        try:
            for entries in pool.map(header, weights):
                if twice := tensors.keys() & entries.keys():
                    name = one_line(min(twice))
                    raise _invalid(repository.name, f"two of its files hold the tensor {name}")
                tensors |= entries
                if len(tensors) > _MAX_TENSORS:
                    raise _invalid(repository.name, f"it has more than {_MAX_TENSORS:,} tensors")
        except BaseException:
            hub.interrupt()
            pool.shutdown(cancel_futures=True)
            hub.resume()
            raise
    return tensors


def _header(
    hub: Hub, cache: RepositoryCache | None, repository: Repository, file: RemoteFile
) -> dict[str, TensorEntry]:
    """
    Raises:
        ModelError: its header is not that of a safetensors file of this size.
    """
    prefix = _read(hub, cache, repository, file, 0, min(PREFIX_BYTES, file.size))
    length = header_bytes(prefix, file.size)
    if length > _MAX_REMOTE_HEADER_BYTES:
        raise ModelError(f"its header claims {length:,} bytes")
    end = PREFIX_BYTES + length
    return parse_header(_read(hub, cache, repository, file, PREFIX_BYTES, end), file.size)


def _read(
    hub: Hub,
    cache: RepositoryCache | None,
    repository: Repository,
    file: RemoteFile,
    start: int,
    end: int,
) -> bytes:
    """Bytes of a file, from the cache if one is given and they are there."""
    if start == end:
        return b""
    if cache is not None and cache.has(file):
        with cache.blob(file).open("rb") as blob:
            blob.seek(start)
            return blob.read(end - start)
    return hub.read(repository, file, start, end)


def _read_json(
    hub: Hub, cache: RepositoryCache, repository: Repository, file: RemoteFile
) -> dict[str, Any]:
    """The object in a small JSON file, checked to be the file that the hub announced."""
    if file.size > _MAX_JSON_BYTES:
        raise _invalid(repository.name, f"its {file.name} has {file.size:,} bytes")
    for _ in range(ATTEMPTS):
        data = _read(hub, cache, repository, file, 0, file.size)
        digest = content_digest(file)
        digest.update(data)
        if digest.hexdigest() == file.etag:
            break
        if cache.has(file):  # a bad disk, perhaps; the right one comes with the others
            cache.blob(file).unlink()
    else:
        raise _invalid(repository.name, f"its {file.name} arrives damaged")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(repository.name, f"its {file.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise _invalid(repository.name, f"its {file.name} is not a JSON object")
    return value


def _check_config(name: str, config: dict[str, Any]) -> None:
    for key in ("auto_map", "model_file"):
        if config.get(key):
            raise GryphonError(
                "unsafe_model",
                f"{name} brings code of its own ({key} in its config.json), which Gryphon does not "
                "run, so nothing of it was fetched. Look for a conversion of it without code.",
            )
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise _invalid(name, "its config.json has no model_type")
    if registry.supported(family) is None:
        raise GryphonError(
            "unsupported_model",
            f"{name} is of the family {one_line(repr(family), 60)}, which neither Gryphon nor "
            "mlx-lm runs, so nothing of it was fetched. `gryphon search` shows models that run.",
        )


def _check_staged(name: str, staged: Path) -> None:
    """The files themselves, before they are a model: what the hub showed might not be them."""
    try:
        _check_config(name, checkpoint.read_config(staged))
        checkpoint.weight_files(staged)
    except ModelError as error:
        what = one_line(str(error), 500)
        raise GryphonError(
            "invalid_model", f"{name} was fetched but not installed: {what}"
        ) from error


def _check_room(plan: PullPlan, cache: RepositoryCache) -> None:
    missing = sum(file.size - cache.bytes_here(file) for file in plan.files)
    disk.check_room(cache.path, missing + _SPARE_BYTES, plan.repository.name, disk.HUB)


def _unsupported(repository: Repository, why: str) -> GryphonError:
    suffixes = {Path(file.name).suffix for file in repository.files}
    other = sorted(suffixes & {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".npz"})
    has = f" It has {', '.join(other)} files, which Gryphon does not read." if other else ""
    return GryphonError(
        "unsupported_model",
        f"{repository.name} is not a model that Gryphon can run: {why}.{has} Look for a repository "
        "with safetensors, as those of mlx-community.",
    )


def _invalid(name: str, why: str) -> GryphonError:
    return GryphonError(
        "invalid_model", f"{name} is not a whole model: {why}. Nothing of it was installed."
    )


def unsteady(name: str, change: RepositoryChanged) -> GryphonError:
    return GryphonError(
        "repository_changed",
        f"{name} keeps changing while it is fetched ({change}). Pull again later; what has arrived "
        "is kept.",
        retry_after=60,
    )
