"""Pulls that random faults befall: killed, stalled, corrupted, replaced, refused, out of disk.

Whatever happens, nothing is listed before it is whole, every file ends with the digest that the hub
gave it, and what was fetched again is counted: that of `scripts/prove --only pull` is a table of
faults. Bytes fetched again are those that the hub sent beyond the model's size: the headers of the
weights, which are looked at first, what sockets held when a process died, and damaged files.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from app.library.hub import Hub
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_model, installed_models
from app.library.pull import make_plan, pull
from app.library.verification import verify

from ..hub_server import Fault, HubServer, etag_of
from ..rounds import rounds
from .model_files import model_files
from .pulling import HASTY, Watch, refusal

GRYPHON = str(Path(sys.executable).with_name("gryphon"))

Record = Callable[[str, object], None]


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Different in every test and round, the same in every run."""
    return random.Random(request.node.name)


@pytest.fixture
def files(hub: HubServer, chance: random.Random) -> dict[str, bytes]:
    """The content of org/model: one to four shards of up to 2 MB."""
    files = model_files(
        shards=chance.randint(1, 4), size=chance.randrange(100_000, 2_000_000), seed=chance.random()
    )
    hub.add("org/model", files)
    return files


def pulled() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [GRYPHON, "pull", "org/model"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def shards(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def total(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def assert_as_the_hub_has_it(files: dict[str, bytes]) -> None:
    """Whole, listed, every digest right, and nothing left beside it."""
    model = find_model("org/model")
    assert {path.name for path in model.path.iterdir()} == set(files)
    for path in model.path.iterdir():
        assert path.resolve().name == etag_of(path.name, path.read_bytes())
        assert etag_of(path.name, files[path.name]) == path.resolve().name
    assert not [one for one in verify(model.path, lambda done, all: None) if one.problem]
    cache = RepositoryCache("org/model")
    unfinished = {path.name.split(".")[0] for path in cache.blobs.glob("*.incomplete")}
    assert not unfinished & {etag_of(*item) for item in files.items()}
    assert not cache.staging.exists()


def tell(record: Record, faults: str, number: int, hub: HubServer, files: dict[str, bytes]) -> None:
    """What a round has shown: the faults of a kind, and what they made the hub send again."""
    record(faults, number)
    record(f"bytes_again_after_{faults}", hub.sent() - total(files))
    record("bytes_pulled", total(files))


def looked_at(files: dict[str, bytes]) -> int:
    """Bytes that a plan reads and does not keep: headers of weights, config.json, the index."""
    headers = sum(8 + int.from_bytes(files[name][:8], "little") for name in shards(files))
    return headers + sum(len(data) for name, data in files.items() if name.endswith(".json"))


@pytest.mark.parametrize("round", rounds(1))
def test_killed_at_random_offsets_it_goes_on_where_it_was(
    hub: HubServer,
    files: dict[str, bytes],
    chance: random.Random,
    record_property: Record,
    round: int,
) -> None:
    """Killed five times in a row, then left alone."""
    hub.bytes_per_s = 60e6  # or loopback holds whole files in its buffers
    cache, kills = RepositoryCache("org/model"), 0
    for _ in range(5):
        on_disk, answered = sizes(cache), len(hub.answers())
        left = [chance.randrange(1, total(files) // 5)]
        process = subprocess.Popen(
            [GRYPHON, "pull", "org/model"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def count(
            file: str,
            offset: int,
            process: subprocess.Popen[bytes] = process,
            left: list[int] = left,
        ) -> None:
            left[0] -= 1 << 16
            if left[0] < 0:
                process.kill()

        hub.on_bytes(count)
        process.wait(timeout=60)
        hub.on_bytes(None)
        assert process.returncode == -signal.SIGKILL
        assert installed_models() == []
        assert_continued(hub, answered, on_disk, files)
        kills += 1
    on_disk, answered = sizes(cache), len(hub.answers())
    done = pulled()
    assert done.returncode == 0, done.stderr
    assert_continued(hub, answered, on_disk, files)
    assert_as_the_hub_has_it(files)
    tell(record_property, "kills", kills, hub, files)


def sizes(cache: RepositoryCache) -> dict[str, int]:
    """Bytes of each content that are on the disk."""
    return {path.name.split(".")[0]: path.stat().st_size for path in cache.blobs.glob("*")}


def assert_continued(
    hub: HubServer, answered: int, on_disk: dict[str, int], files: dict[str, bytes]
) -> None:
    """The weights were asked for from the first byte that was missing, or not at all."""
    for name, data in files.items():
        if name.endswith(".safetensors"):
            there = on_disk.get(hub.etag(name, data), 0)
            asked = [one.start for one in hub.answers()[answered:] if one.file == name]
            starts = [start for start in asked if start not in (0, 8)]  # those are the header's
            # An earlier one may be of the process that was killed, answered late.
            assert starts[-1:] in ([], [there]), (name, there, starts)
            assert there < len(data) or not starts


@pytest.mark.parametrize("round", rounds(2))
def test_stalled_at_a_random_offset(
    hub: HubServer, files: dict[str, bytes], chance: random.Random, record_property: Record,
    round: int,
) -> None:  # fmt: skip
    name = chance.choice(shards(files))
    at = chance.randrange(len(files[name]))
    with Hub(HASTY) as hasty:
        plan = make_plan(hasty, "org/model")
        hub.spoil(name, stall_at=at)
        pull(hasty, plan, Watch())
    assert hub.answers(name)[-1].start <= at
    assert_as_the_hub_has_it(files)
    tell(record_property, "stalls", 1, hub, files)


@pytest.mark.parametrize("round", rounds(2))
def test_a_random_byte_is_wrong(
    hub: HubServer, client: Hub, files: dict[str, bytes], chance: random.Random,
    record_property: Record, round: int,
) -> None:  # fmt: skip
    plan, before = make_plan(client, "org/model"), hub.sent()
    name = chance.choice([name for name in files if files[name]])
    hub.spoil(name, wrong_byte_at=chance.randrange(len(files[name])))
    pull(client, plan, Watch())
    assert hub.sent() - before == total(files) + len(files[name])  # that file alone
    assert_as_the_hub_has_it(files)
    tell(record_property, "corruptions", 1, hub, files)


@pytest.mark.parametrize("round", rounds(2))
def test_the_etag_changes_at_a_random_offset(
    hub: HubServer, client: Hub, files: dict[str, bytes], chance: random.Random,
    record_property: Record, round: int,
) -> None:  # fmt: skip
    """Once a file's etag is another for a moment; once a forced push replaces every weight."""
    plan = make_plan(client, "org/model")
    name = chance.choice(shards(files))
    at = chance.randrange(len(files[name]))
    hub.spoil(name, cut_at=at)
    expected = files
    if round % 2:
        other = model_files(
            shards=len(shards(files)),
            size=chance.randrange(100_000, 2_000_000),
            seed=chance.random(),
        )
        expected = files | {one: other[one] for one in shards(other)}
        repository, reached = hub.repositories["org/model"], threading.Event()

        def replace(file: str, offset: int) -> None:
            if file == name and offset + (1 << 16) >= at and not reached.is_set():
                reached.set()
                repository.commits.clear()
                repository.commit(expected)

        hub.on_bytes(replace)
    else:
        hub.spoil(name, etag="e" * 64, where="hub")
    pull(client, plan, Watch())
    assert_as_the_hub_has_it(expected)
    tell(record_property, "etag_changes", 1, hub, expected)


@pytest.mark.parametrize("round", rounds(2))
def test_refused_for_a_while(
    hub: HubServer, client: Hub, files: dict[str, bytes], chance: random.Random,
    record_property: Record, round: int,
) -> None:  # fmt: skip
    refusals = 0
    hub.api_faults.append(Fault(status=429, headers={"Retry-After": "0"}, times=2))
    for name in files:
        for _ in range(chance.randint(0, 3)):
            where = chance.choice(["hub", "storage"]) if name in shards(files) else "hub"
            headers = chance.choice([{}, {"Retry-After": "0"}, {"RateLimit": '"api";r=0;t=0'}])
            hub.spoil(name, status=429, headers=headers, where=where)
            refusals += 1
    pull(client, make_plan(client, "org/model"), Watch())
    assert_as_the_hub_has_it(files)
    answered = sum(one.status == 429 for one in hub.requests)
    assert answered >= refusals // 2
    assert hub.sent() - total(files) <= looked_at(files)
    tell(record_property, "answers_of_429", answered, hub, files)


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[bool]:
    """A file system of that size at `directory`, where this process may make one; True if so."""
    directory.mkdir()
    mounted = sys.platform == "linux" and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory],
        capture_output=True,
        check=False,
    ).returncode  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("round", rounds(1))
def test_the_disk_runs_full_at_a_random_offset(
    hub: HubServer, client: Hub, files: dict[str, bytes], chance: random.Random, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, record_property: Record, round: int,
) -> None:  # fmt: skip
    """On a small file system that another program fills meanwhile; where none can be made, below
    in a process that may not write large files."""
    left, one_at_a_time = [chance.randrange(1, total(files) // 2)], threading.Lock()
    disk = tmp_path / "disk"
    with small_disk(disk, total(files) + 110_000_000) as mounted:
        if mounted:
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk / "hub"))
            plan = make_plan(client, "org/model")

            def fill(file: str, offset: int) -> None:
                with one_at_a_time:
                    left[0] -= 1 << 16
                    is_early = len(files[file]) - offset > 1 << 16
                    if left[0] < 0 and is_early and not (disk / "filler").exists():
                        with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
                            while True:
                                filler.write(bytes(1 << 20))

            hub.on_bytes(fill)
            error = refusal(lambda: pull(client, plan, Watch()))
            assert error.code == "disk_full" and "gryphon pull org/model" in error.message
            assert installed_models() == []
            hub.on_bytes(None)
            (disk / "filler").unlink()
            kept = sum(one.stat().st_size for one in RepositoryCache("org/model").blobs.glob("*"))
            before = hub.sent()
            pull(client, make_plan(client, "org/model"), Watch())
            assert hub.sent() - before <= total(files) - kept + looked_at(files)
            assert_as_the_hub_has_it(files)
            tell(record_property, "disks_full", 1, hub, files)


@pytest.mark.parametrize("round", rounds(1))
def test_a_disk_that_takes_no_large_files(
    hub: HubServer,
    files: dict[str, bytes],
    chance: random.Random,
    record_property: Record,
    round: int,
) -> None:
    """As FAT32 takes none of 4 GB; here by a limit of the process."""
    limit = chance.randrange(10_000, len(files[shards(files)[0]]) - 1)
    done = subprocess.run(
        [GRYPHON, "pull", "org/model"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "takes no file this large" in done.stderr.splitlines()[-1]
    assert installed_models() == []
    done = pulled()
    assert done.returncode == 0, done.stderr
    assert_as_the_hub_has_it(files)
    tell(record_property, "files_too_large", 1, hub, files)
