"""Writes tensors into safetensors files, one tensor in memory at a time, and goes on where an
earlier run ended.

A journal beside the directory lists the files that are whole, with their digests. What makes the
tensors is known by a fingerprint; a journal of another one counts for nothing.

No MLX: tensors come as buffers.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

SHARD_BYTES = 1_000_000_000
"""Of tensors in a file, unless one alone has more. What a kill can cost, too."""

_READ_BYTES = 1 << 22
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor as it goes into a file."""

    name: str
    dtype: str
    """As a safetensors header calls it: "BF16"."""
    shape: tuple[int, ...]
    data: Any
    """A buffer of its bytes."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together, when it is their turn."""

    names: tuple[str, ...]
    nbytes: int
    """At most."""
    make: Callable[[], Iterable[Tensor]]


class Progress:
    """Hears how the writing goes; for callers that want no more than that it goes."""

    def kept(self, shards: int, of: int) -> None:
        """This many files are whole, from an earlier run or from this one."""

    def written(self, done: int, total: int) -> None:
        """Bytes, those of an earlier run included."""


def write(
    directory: Path,
    units: Iterator[Unit],
    fingerprint: str,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the files of a model and their index into an existing directory.

    Args:
        units: In the order of the files. Each is let go as soon as it is written; from a list they
            would not go.
        fingerprint: Of everything that decides the result.

    Raises:
        OSError: the directory cannot be written.
        Whatever a unit raises; files that are whole are kept.
    """
    groups = _groups(units, shard_bytes)
    total = sum(unit.nbytes for group in groups for unit in group)
    journal = _Journal(journal_of(directory), fingerprint)
    names = _file_names(len(groups))
    journal.keep_whole(directory, names)
    done = 0
    for number, name in enumerate(names):
        progress.kept(len(journal.shards), len(names))
        group, groups[number] = groups[number], []
        if name in journal.shards:
            done += sum(unit.nbytes for unit in group)
            progress.written(done, total)
            continue
        file = directory / f"{name}.partial"
        group.reverse()
        with _ShardFile(file, sum(len(unit.names) for unit in group), group) as shard:
            while group:
                unit = group.pop()
                for tensor in unit.make():
                    shard.add(tensor)
                    del tensor
                done += unit.nbytes
                del unit
                progress.written(done, total)
            header = shard.finish()
        file.rename(directory / name)
        journal.add(name, directory / name, header)
    progress.kept(len(names), len(names))
    _write_index(directory / _INDEX, journal.shards)


def journal_of(directory: Path) -> Path:
    """Where the journal of a directory is."""
    return directory.with_name(f"{directory.name}.journal")


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with file.open("rb") as source:
        while data := source.read(_READ_BYTES):
            sha.update(data)
    return sha.hexdigest()


def fingerprint_of(source: Sequence[Path], **settings: Any) -> str:
    """Of files, by name, size and time of change, and of what is done with them."""
    stats = [(file, file.stat()) for file in source]
    files = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    text = json.dumps({"files": files, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _ShardFile:
    """A safetensors file whose header is written last, into room that is left for it."""

    def __init__(self, path: Path, tensors: int, units: Sequence[Unit]) -> None:
        # Per tensor: quotes and punctuation, dtype, 8 dimensions and two offsets of 20 digits each.
        named = sum(len(json.dumps(name)) for unit in units for name in unit.names)
        self._room = -(-(named + 256 * tensors + 64) // 8) * 8
        self._entries: dict[str, Any] = {}
        self._at = 0
        self._path = path
        self._file: IO[bytes]

    def __enter__(self) -> "_ShardFile":
        self._file = self._path.open("wb")
        self._file.seek(8 + self._room)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tensor: Tensor) -> None:
        data = memoryview(tensor.data).cast("B") if prod(tensor.shape) else memoryview(b"")
        self._file.write(data)
        end = self._at + len(data)
        assert tensor.name not in self._entries, tensor.name
        self._entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [self._at, end],
        }
        self._at = end

    def finish(self) -> dict[str, int]:
        """Write the header; returns the bytes of each tensor."""
        header = {"__metadata__": {"format": "mlx"}, **self._entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._room, (len(text), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        spans = {name: entry["data_offsets"] for name, entry in self._entries.items()}
        return {name: end - begin for name, (begin, end) in spans.items()}


class _Journal:
    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self.shards: dict[str, dict[str, Any]] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["fingerprint"] == fingerprint:
                self.shards = dict(kept["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            self.shards = {}

    def keep_whole(self, directory: Path, names: Sequence[str]) -> None:
        """Forget what is not on the disk as it was written, and remove everything else there."""
        for name, shard in list(self.shards.items()):
            try:
                is_whole = name in names and digest(directory / name) == shard["sha256"]
            except (OSError, KeyError, TypeError):
                is_whole = False
            if not is_whole:
                del self.shards[name]
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.shards:
                path.unlink()

    def add(self, name: str, file: Path, tensors: dict[str, int]) -> None:
        self.shards[name] = {"sha256": digest(file), "tensors": tensors}
        written = self._path.with_name(f"{self._path.name}.tmp")
        with written.open("w", encoding="utf-8") as out:
            json.dump({"fingerprint": self._fingerprint, "shards": self.shards}, out)
            out.flush()
            os.fsync(out.fileno())
        written.replace(self._path)


def _groups(units: Iterable[Unit], shard_bytes: int) -> list[list[Unit]]:
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    return groups


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _write_index(path: Path, shards: dict[str, dict[str, Any]]) -> None:
    def entries() -> Iterator[tuple[str, str, int]]:
        for file, shard in shards.items():
            for name, nbytes in shard["tensors"].items():
                yield name, file, nbytes

    index = {
        "metadata": {"total_size": sum(nbytes for *_, nbytes in entries())},
        "weight_map": {name: file for name, file, _ in sorted(entries())},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
