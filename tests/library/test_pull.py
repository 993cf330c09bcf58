"""Pulling from a hub that misbehaves: whatever goes wrong, the files end up byte-identical, only
what was missing is fetched again, and nothing is listed before it is whole."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download

from app.errors import GryphonError
from app.library import hub_client, transfer
from app.library.file_lock import locked
from app.library.hub import Hub
from app.library.hub_cache import RepositoryCache
from app.library.hub_errors import Interruption
from app.library.installed import InstalledModel, find_model, installed_models
from app.library.patience import Patience
from app.library.pull import make_plan, parse_name, pull
from app.library.transfer import Status

from ..hub_server import Fault, HubServer, etag_of
from ..tiny_models import LLAMA, write_model
from .model_files import CONFIG, model_files, safetensors

QUICK = Patience(connect_s=2, stall_s=0.4, first_wait_s=0.01, longest_wait_s=0.02)
PIECE = 1 << 16
SIZE = 300_000
WEIGHTS = "model.safetensors"


class Watch:
    """A report that checks at every call that nothing is listed yet."""

    def __init__(self, then: Callable[[Status], None] | None = lambda status: None) -> None:
        """`then` sees each status, too; None for where a model is listed already."""
        self._then = then

    def waiting(self) -> None:
        pass

    def progress(self, status: Status) -> None:
        if self._then is not None:
            assert installed_models() == []
            self._then(status)


@pytest.fixture
def client(hub: HubServer) -> Iterator[Hub]:
    with Hub(QUICK) as client:
        yield client


@pytest.fixture
def files(hub: HubServer) -> dict[str, bytes]:
    """The content of org/model."""
    files = model_files(size=SIZE)
    hub.add("org/model", files)
    return files


def assert_whole(model: InstalledModel, files: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == files
    assert [one.name for one in installed_models()] == [model.name]
    cache = RepositoryCache("org/model")
    assert not list(cache.blobs.glob("*.incomplete"))
    assert not (cache.path / ".gryphon-staging").exists()
    for path in model.path.iterdir():
        assert path.resolve().name == etag_of(path.name, files[path.name])


def refusal(call: Callable[[], Any]) -> GryphonError:
    with pytest.raises(GryphonError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value


def sent_since(hub: HubServer, before: int, file: str = WEIGHTS) -> int:
    return hub.sent(file) - before


def test_a_pull_installs_what_a_model_needs(hub: HubServer, client: Hub) -> None:
    files = model_files(shards=3) | {"vocab.txt": b"a\n"}
    others = {"README.md": b"#", "model.py": b"!", "pytorch_model.bin": b"!", "x.pt": b"!"}
    unused = {"other.safetensors": safetensors({}), "sub/config.json": b"{}"}
    repository = hub.add("org/model", files | others | unused, license="mit")
    plan = make_plan(client, "org/model")
    assert (plan.name, plan.family, plan.quantization) == ("org/model", "open-llama", "float16")
    assert (plan.parameters, plan.context_length) == (30_000, 512)
    assert (plan.repository.license, plan.repository.commit) == ("mit", repository.refs["main"])
    assert set(plan.left_out) == {*others, *unused}
    assert (plan.total_bytes, plan.here_bytes) == (sum(map(len, files.values())), 0)
    model = pull(client, plan, Watch())
    assert_whole(model, files)
    assert (model.name, model.path.name) == ("org/model", repository.refs["main"])
    assert hub.sent("README.md") == hub.sent("model.py") == hub.sent("other.safetensors") == 0
    assert make_plan(client, "org/model").installed


def test_looking_at_a_model_fetches_almost_nothing(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    make_plan(client, "org/model")
    header = int.from_bytes(files[WEIGHTS][:8], "little")
    assert hub.sent(WEIGHTS) == 8 + header
    assert hub.sent() == 8 + header + len(files["config.json"])
    assert not RepositoryCache("org/model").path.exists()


def test_huggingface_hub_and_mlx_lm_find_it_offline(
    hub: HubServer, client: Hub, tmp_path: Path
) -> None:
    written = write_model(tmp_path / "llama", LLAMA)
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    hub.add("org/model", files)
    pull(client, make_plan(client, "org/model"), Watch())
    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    assert not cache.warnings and not cache.incomplete_files
    (repository,) = cache.repos
    assert (repository.repo_id, repository.nb_files) == ("org/model", len(files))
    assert repository.refs.keys() == {"main"}
    code = "import mlx_lm; model, _ = mlx_lm.load('org/model'); print(type(model).__module__)"
    asked = len(hub.requests)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "mlx_lm.models.llama", done.stderr
    assert len(hub.requests) == asked


# Where a transfer is disturbed: around the header, pieces, and the ends.
POSITIONS = [0, 1, 7, 8, 200, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, SIZE - 1]


@pytest.mark.parametrize("at", POSITIONS)
def test_a_cut_connection_is_continued_where_it_ended(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    hub.spoil(WEIGHTS, cut_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == len(files[WEIGHTS])


def test_many_cuts_in_a_row(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    for at in range(10_000, SIZE, 10_000):
        hub.spoil(WEIGHTS, cut_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == len(files[WEIGHTS])
    starts = [one.start for one in hub.answers(WEIGHTS)[2:]]
    assert starts == [0, *range(10_000, SIZE, 10_000)]


@pytest.mark.parametrize("at", [0, 5, PIECE, SIZE - 1])
def test_a_stalled_connection_is_left_and_continued(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    hub.spoil(WEIGHTS, stall_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.answers(WEIGHTS)[-1].start == at
    assert sent_since(hub, before) == len(files[WEIGHTS])


def note_of_weights(status: Status) -> str:
    return next(one.note for one in status.files if one.file.name == WEIGHTS)


@pytest.mark.parametrize("at", POSITIONS)
def test_a_wrong_byte_costs_that_file_alone(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan, before, all_before = make_plan(client, "org/model"), hub.sent(WEIGHTS), hub.sent()
    hub.spoil(WEIGHTS, wrong_byte_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == 2 * len(files[WEIGHTS])
    assert hub.sent() - all_before == sum(map(len, files.values())) + len(files[WEIGHTS])


def test_a_small_file_is_checked_too(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil("tokenizer.json", wrong_byte_at=3)
    assert_whole(pull(client, plan, Watch()), files)


def test_always_damaged_is_an_error_and_nothing_is_installed(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, wrong_byte_at=9, times=None)
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "checksum_mismatch" and WEIGHTS in error.message
    assert installed_models() == []
    hub.heal()
    assert_whole(pull(client, plan, Watch()), files)


@pytest.mark.parametrize("where", ["hub", "storage"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again(
    hub: HubServer, client: Hub, files: dict[str, bytes], status: int, where: Any
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent()
    hub.spoil(WEIGHTS, status=status, where=where, times=2)
    hub.spoil("config.json", status=status, headers={"Retry-After": "0"}, where="hub")
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.sent() - before == sum(map(len, files.values()))


def test_retry_after_is_waited_for(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=429, headers={"Retry-After": "1"}, where="hub")
    waits: list[float | None] = []
    patience = Patience(first_wait_s=0.01)
    client.patience = SimpleNamespace(  # type: ignore[assignment]
        stall_s=5,
        connect_s=2,
        wait_s=lambda failures, error: waits.append(error.retry_after) or 0.01,
    )
    pull(client, plan, Watch())
    assert waits == [1.0]
    later = Interruption("rate_limited", "busy", retry_after=20)
    assert patience.wait_s(1, later) == 20
    assert patience.wait_s(1, Interruption("rate_limited", "busy", retry_after=4000)) is None
    waits_s = [patience.wait_s(n, Interruption("hub_unavailable", "busy")) for n in range(1, 9)]
    assert waits_s[-1] is None and None not in waits_s[:-1]
    for n, wait_s in enumerate(waits_s[:-1]):
        assert 0.5 <= (wait_s or 0) / (0.01 * 2**n) <= 1.5


@pytest.mark.parametrize(
    "said", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "soon", "-1", "\xb2", "1e9"]
)
def test_a_retry_after_without_sense_is_no_time(
    hub: HubServer, client: Hub, files: dict[str, bytes], said: str
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=503, headers={"Retry-After": said})
    assert_whole(pull(client, plan, Watch()), files)


@pytest.mark.parametrize("status", [429, 503])
def test_metadata_is_asked_for_again_and_then_given_up(
    hub: HubServer, client: Hub, files: dict[str, bytes], status: int
) -> None:
    hub.api_faults.append(Fault(status=status, times=2))
    told: list[str] = []
    with Hub(QUICK, told.append) as telling:
        plan = make_plan(telling, "org/model")
    assert plan.total_bytes == sum(map(len, files.values()))
    assert told == [f"127.0.0.1 answers {status}; asking again"] * 2
    hub.api_faults.append(Fault(status=status, headers={"Retry-After": "0"}, times=None))
    error = refusal(lambda: make_plan(client, "org/model"))
    assert error.code == ("rate_limited" if status == 429 else "hub_unavailable")


def test_a_hub_that_stays_broken_is_given_up_and_what_came_is_kept(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, cut_at=100_000, times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "hub_unavailable"
    assert installed_models() == []
    hub.heal()
    before = hub.sent(WEIGHTS)
    assert_whole(pull(client, make_plan(client, "org/model"), Watch()), files)
    header = int.from_bytes(files[WEIGHTS][:8], "little") + 8
    assert sent_since(hub, before) == len(files[WEIGHTS]) - 100_000 + header


def test_a_server_without_ranges_is_read_from_the_start(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    hub.spoil(WEIGHTS, cut_at=100_000)
    hub.spoil(WEIGHTS, ignore_range=True)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == 100_000 + len(files[WEIGHTS])


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_an_answer_without_a_length_is_read_to_its_end(
    hub: HubServer, client: Hub, files: dict[str, bytes], name: str
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(name, no_length=True)
    assert_whole(pull(client, plan, Watch()), files)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.spoil(name, no_length=True, cut_at=5)
    assert_whole(pull(client, plan, Watch()), files)


def test_compressed_content_is_refused(hub: HubServer, client: Hub, files: Any) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, gzip_claimed=True, times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "hub_not_understood"


def test_another_etag_means_looking_again(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, etag="e" * 64, where="hub")
    assert_whole(pull(client, plan, Watch()), files)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.spoil(WEIGHTS, etag="e" * 64, where="hub", times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "repository_changed"
    assert installed_models() == []


def test_files_replaced_in_the_middle_are_all_of_the_new_commit(
    hub: HubServer, client: Hub
) -> None:
    """The commit vanishes and another takes its place, as after a force push."""
    old, new = model_files(shards=2, size=SIZE), model_files(shards=2, size=SIZE, seed=1)
    repository = hub.add("org/model", old)
    plan = make_plan(client, "org/model")

    def replace(file: str, offset: int) -> None:
        hub.on_bytes(None)
        del repository.commits[repository.refs["main"]]
        repository.commit(new)

    hub.spoil("model-00001-of-00002.safetensors", cut_at=PIECE)
    hub.spoil("model-00002-of-00002.safetensors", cut_at=PIECE)
    hub.on_bytes(replace)
    model = pull(client, plan, Watch())
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == new
    assert model.path.name == repository.refs["main"]


def test_a_pull_after_a_new_commit_fetches_what_changed(hub: HubServer, client: Hub) -> None:
    files = model_files(shards=2, size=SIZE)
    repository = hub.add("org/model", files)
    first = pull(client, make_plan(client, "org/model"), Watch())
    changed = "model-00002-of-00002.safetensors"
    updated = files | {changed: model_files(shards=2, size=SIZE, seed=1)[changed]}
    repository.commit(updated)
    plan = make_plan(client, "org/model")
    assert not plan.installed
    assert plan.missing_bytes == len(updated[changed])
    before = hub.sent()
    model = pull(client, plan, Watch(None))
    assert hub.sent() - before == len(updated[changed])
    assert find_model("org/model").path == model.path != first.path
    assert (model.path / changed).read_bytes() == updated[changed]


def test_a_partial_file_of_another_content_is_never_continued(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    file = next(one for one in plan.files if one.name == WEIGHTS)
    cache = RepositoryCache("org/model")
    cache.blobs.mkdir(parents=True)
    (cache.blobs / f"{'e' * 64}.incomplete").write_bytes(files[WEIGHTS][:1000])
    cache.partial(file).write_bytes(b"x" * 1000)  # its name lies
    before = hub.sent(WEIGHTS)
    model = pull(client, plan, Watch())
    assert (model.path / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert sent_since(hub, before) == 2 * len(files[WEIGHTS]) - 1000
    cache.blob(file).unlink()
    cache.partial(file).write_bytes(b"x" * (SIZE * 2))  # longer than the file
    assert make_plan(client, "org/model").missing_bytes == len(files[WEIGHTS])
    pull(client, plan, Watch(None))
    assert (model.path / WEIGHTS).read_bytes() == files[WEIGHTS]


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1000, PIECE + 1000, 4 * PIECE])
def test_a_cancelled_pull_ends_at_once_and_is_continued(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, stall_at=at, times=None)

    def cancel(status: Status) -> None:
        weights = next(one for one in status.files if one.file.name == WEIGHTS)
        others = [one for one in status.files if one is not weights]
        if weights.done == at and all(one.state == "done" for one in others):
            raise Cancelled

    with Hub(Patience(connect_s=2, stall_s=60)) as patient, pytest.raises(Cancelled):
        pull(patient, plan, Watch(cancel))
    assert not [one for one in threading.enumerate() if one.name.startswith("transfer-")]
    assert installed_models() == []
    hub.heal()
    hub.release()
    before = hub.sent()
    plan = make_plan(client, "org/model")
    assert plan.missing_bytes == len(files[WEIGHTS]) - at
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.answers(WEIGHTS)[-1].start == at
    assert hub.sent() - before <= len(files[WEIGHTS]) - at + 1000  # and the header, looked at again


def test_a_pull_cancelled_before_any_answer_ends_at_once(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, silent=True, times=None)

    def cancel(status: Status) -> None:
        if hub.silent.is_set():
            raise Cancelled

    # It would wait a second for its threads, and they a minute for an answer.
    with Hub(Patience(connect_s=1, stall_s=60)) as patient, pytest.raises(Cancelled):
        pull(patient, plan, Watch(cancel))
    assert not [one for one in threading.enumerate() if one.name.startswith("transfer-")]
    hub.heal()
    hub.release()
    assert_whole(pull(client, plan, Watch()), files)


def test_the_second_of_two_pulls_waits_and_fetches_nothing(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    before = hub.sent()
    waiting = threading.Event()
    hub.on_bytes(lambda file, offset: None if waiting.wait(20) else None)
    models: list[InstalledModel] = []

    class Waiting(Watch):
        def waiting(self) -> None:
            waiting.set()

    def one() -> None:
        with Hub() as own:  # its default patience: the first answer is held back for a while
            models.append(pull(own, plan, Waiting()))

    pulls = [threading.Thread(target=one) for _ in range(2)]
    for thread in pulls:
        thread.start()
    for thread in pulls:
        thread.join(60)
    assert len(models) == 2 and models[0] == models[1]
    assert waiting.is_set()
    assert hub.sent() - before == sum(map(len, files.values()))


def test_a_lock_whose_file_was_removed_excludes_nobody(tmp_path: Path) -> None:
    path, waiting = tmp_path / "lock", threading.Event()
    held: list[bool] = []

    def second() -> None:
        with locked(path, waiting.set):
            held.append(path.exists())

    thread = threading.Thread(target=second)
    with locked(path, lambda: None):
        thread.start()
        assert waiting.wait(20)
        path.unlink()  # as huggingface_hub does when it is done
    thread.join(20)
    assert held == [True]


def test_what_huggingface_hub_is_fetching_is_waited_for(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    cache = RepositoryCache("org/model")
    file = next(one for one in plan.files if one.name == WEIGHTS)
    before = hub.sent(WEIGHTS)
    path = Path(constants.HF_HUB_CACHE, ".locks", cache.path.name, f"{file.etag}.lock")
    path.parent.mkdir(parents=True)
    lock = FileLock(path)
    lock.acquire()

    def finish(status: Status) -> None:
        if "another program fetches it" in note_of_weights(status) and lock.is_locked:
            cache.blob(file).write_bytes(files[WEIGHTS])
            lock.release()

    assert_whole(pull(client, plan, Watch(finish)), files)
    assert sent_since(hub, before) == 0


def test_a_snapshot_that_another_program_began_is_completed(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    repository = hub.repositories["org/model"]
    repository.commit(files | {"README.md": b"# Hello"})
    for name in ("README.md", "config.json"):
        hf_hub_download("org/model", name, endpoint=hub.endpoint)
    plan = make_plan(client, "org/model")
    assert plan.here_bytes == len(files["config.json"])
    model = pull(client, plan, Watch())
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == files | {
        "README.md": b"# Hello"
    }
    assert not (RepositoryCache("org/model").path / ".gryphon-staging").exists()


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun by another program"])
def test_installing_ends_at_any_step_and_is_never_half_listed(
    hub: HubServer, client: Hub, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    files = model_files(size=1000) | {f"{letter}.txt": b"" for letter in "abcdefgh"}
    hub.add("org/model", files | {"README.md": b"#"})
    cache = RepositoryCache("org/model")
    plan = make_plan(client, "org/model")
    pull(client, plan, Watch())
    snapshot = cache.snapshot(plan.repository.commit)
    shutil.rmtree(snapshot)
    if begun:
        for name in ("README.md", "config.json"):
            hf_hub_download("org/model", name, endpoint=hub.endpoint)
    shutil.rmtree(cache.path / "refs")
    before = {path.name: path.readlink() for path in snapshot.glob("*")}
    whole = set(files) | set(before)
    for last in range(1, 100):
        steps = 0

        def step(real: Callable[..., Any], last: int = last) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == last:
                    raise Cancelled
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("symlink", "rename", "mkdir", "link"):
                patch.setattr(os, name, step(getattr(os, name)))
            try:
                pull(client, plan, Watch())
            except Cancelled:
                pass
            else:
                break
        for model in installed_models():
            assert {path.name for path in model.path.iterdir()} == whole, last
        pull(client, plan, Watch(None))
        assert {path.name for path in snapshot.iterdir()} >= set(files)
        for folder in ("refs", "snapshots"):
            shutil.rmtree(cache.path / folder)
        snapshot.mkdir(parents=True)
        for name, target in before.items():
            (snapshot / name).symlink_to(target)
    assert last > len(files) + 2


def test_what_others_downloaded_is_not_fetched_again(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    snapshot_download("org/model", endpoint=hub.endpoint)
    before = hub.sent()
    plan = make_plan(client, "org/model")
    assert plan.installed and plan.missing_bytes == 0
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.sent() == before


def test_revisions(hub: HubServer, client: Hub) -> None:
    repository = hub.add("org/model", model_files())
    second = repository.commit(model_files(seed=1), "v2")
    pull(client, make_plan(client, "org/model"), Watch())
    model = pull(client, make_plan(client, "org/model", "v2"), Watch(None))
    assert (model.name, model.path.name) == ("org/model@v2", second)
    assert [one.name for one in installed_models()] == ["org/model", "org/model@v2"]
    for name in ("org/model@v2", f"org/model@{second}", f"org/model@{second[:7]}"):
        assert find_model(name).path == model.path
    for name in ("org/model@v3", f"org/model@{second[:3]}", "org/model@../v2", "org/model@"):
        assert refusal(lambda name=name: find_model(name)).code == "model_not_found"
    by_commit = make_plan(client, "org/model", second)
    assert by_commit.installed
    assert refusal(lambda: make_plan(client, "org/model", "v3")).code == "revision_not_found"


def test_names() -> None:
    assert parse_name("org/model") == ("org/model", "main")
    assert parse_name("org/model@v2") == parse_name("org/model", "v2") == ("org/model", "v2")
    assert parse_name("o/m@refs/pr/1") == ("o/m", "refs/pr/1")
    for name in ("model", "a/b/c", "../x", "a/..", "a--b/c", "/a/b", "a/b@", "a/b@../x", "a/b@/x",
                 "a/b@x//y", "a/b@./y", "a b/c", "a/b@x y", "a/b\n", "-a/b", "", "@", "a/b@v1@v2",
                 "ö/b", "a/" + "b" * 97):  # fmt: skip
        assert refusal(lambda name=name: parse_name(name)).code == "usage"
    assert refusal(lambda: parse_name("a/b@v1", "v2")).code == "usage"


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    hub: HubServer, client: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000))
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "disk_full" and "0.10 GB free" in error.message
    assert hub.sent() == before
    assert installed_models() == []


def test_a_disk_that_runs_full_keeps_what_came(
    hub: HubServer, client: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(client, "org/model")
    write, room = transfer._write, [100_000]

    def limited(output: Any, chunk: bytes) -> None:
        write(output, chunk[: room[0]])
        room[0] -= len(chunk)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_write", limited)
        error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "disk_full" and "gryphon pull org/model" in error.message
    before = hub.sent()
    plan = make_plan(client, "org/model")
    assert plan.here_bytes > 90_000
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.sent() - before <= plan.missing_bytes + 1000


def test_a_cache_that_cannot_be_written_is_named(
    hub: HubServer, client: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "hub").write_text("a file")
    error = refusal(lambda: pull(client, make_plan(client, "org/model"), Watch()))
    assert error.code == "no_write_permission" and "HF_HUB_CACHE" in error.message


# Hostile repositories.


def replaced(name: str, data: bytes) -> dict[str, bytes]:
    return model_files() | {name: data}


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


TENSOR = '{"dtype":"F16","shape":[4],"data_offsets":[0,8]}'
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (replaced("../evil.json", b"{}"), "unsafe_model"),
        (replaced("/etc/evil.json", b"{}"), "unsafe_model"),
        (replaced("a/../../evil.json", b"{}"), "unsafe_model"),
        (replaced("..", b"{}"), "unsafe_model"),
        (replaced("a//b.json", b"{}"), "unsafe_model"),
        (replaced("a\\b.json", b"{}"), "unsafe_model"),
        (replaced("a\x1b[31m.json", b"{}"), "unsafe_model"),
        (replaced("a\0.json", b"{}"), "unsafe_model"),
        (replaced("x" * 300 + ".json", b"{}"), "unsafe_model"),
        (replaced("Config.json", b"{}"), "unsafe_model"),
        (model_files(config=CONFIG | {"auto_map": {"AutoModel": "x.Y"}}), "unsafe_model"),
        (model_files(config=CONFIG | {"model_file": "x.py"}), "unsafe_model"),
        (model_files(config={}), "invalid_model"),
        (model_files(config={"model_type": 3}), "invalid_model"),
        (replaced("config.json", b"{"), "invalid_model"),
        (replaced("config.json", b"[]"), "invalid_model"),
        (replaced("config.json", b"[" * 1_000_000), "invalid_model"),
        (replaced("config.json", b'{"a":' * 100_000), "invalid_model"),
        (replaced("config.json", b"\xff\xfe"), "invalid_model"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "invalid_model"),
        ({"config.json": json.dumps(CONFIG).encode(), "m.bin": b"x"}, "unsupported_model"),
        ({"model.gguf": b"x"}, "unsupported_model"),
        ({}, "unsupported_model"),
        (replaced(WEIGHTS, b""), "invalid_model"),
        (replaced(WEIGHTS, b"\xff" * 20), "invalid_model"),
        (replaced(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), "invalid_model"),
        (replaced(WEIGHTS, header("[]")), "invalid_model"),
        (replaced(WEIGHTS, header('{"a":' * 50_000)), "invalid_model"),
        (replaced(WEIGHTS, header(f'{{"a":{TENSOR}}}')), "invalid_model"),
        (replaced(WEIGHTS, header(f'{{"a":{TENSOR},"a":{TENSOR}}}', bytes(8))), "invalid_model"),
        (replaced(WEIGHTS, header(f'{{"a":{TENSOR},"b":{TENSOR}}}', bytes(8))), "invalid_model"),
        (replaced(WEIGHTS, header(f'{{"a":{TENSOR}}}', bytes(9))), "invalid_model"),
        (
            replaced(WEIGHTS, header('{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,8]}}')),
            "invalid_model",
        ),
        (
            replaced(
                WEIGHTS,
                header(
                    '{"a":{"dtype":"F16","shape":[5000000000],"data_offsets":[0,10000000000]}}'
                ),
            ),
            "invalid_model",
        ),
        (
            replaced(WEIGHTS, header(
                '{"a":{"dtype":"F16","shape":[' + ",".join(["9" * 4000] * 500)
                + '],"data_offsets":[0,8]}}', bytes(8)
            )),
            "invalid_model",
        ),
        (replaced(INDEX, b'{"weight_map": {"a": "../../x.safetensors"}}'), "invalid_model"),
        (replaced(INDEX, b'{"weight_map": {"a": "gone.safetensors"}}'), "invalid_model"),
        (replaced(INDEX, b'{"weight_map": {"a": ["x"]}}'), "invalid_model"),
        (replaced(INDEX, b'{"weight_map": {}}'), "invalid_model"),
        (replaced(INDEX, b'{"weight_map": {"a": "config.json"}}'), "unsupported_model"),
        (
            replaced(INDEX, b'{"weight_map": {"absent": "model.safetensors"}}'),
            "invalid_model",
        ),
        (replaced("model-2.safetensors", model_files()[WEIGHTS]), "invalid_model"),
    ],
)  # fmt: skip
def test_hostile_repositories_are_refused(
    hub: HubServer, client: Hub, tmp_path: Path, files: dict[str, bytes], code: str
) -> None:
    hub.add("org/model", files)
    report = Watch()
    error = refusal(lambda: pull(client, make_plan(client, "org/model"), report))
    assert error.code == code, error.message
    assert error.message.isprintable() and len(error.message) < 700
    assert installed_models() == []
    assert not list(tmp_path.rglob("evil*"))
    written = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) < 2_000_000


@pytest.mark.parametrize("claimed", [10_000_000_000, 10, -1, 2**70, 1.5, None])
def test_sizes_that_the_hub_makes_up(hub: HubServer, client: Hub, claimed: Any) -> None:
    repository = hub.add("org/model", model_files())
    repository.sizes[WEIGHTS] = claimed
    error = refusal(lambda: pull(client, make_plan(client, "org/model"), Watch()))
    assert error.code in ("repository_changed", "hub_not_understood", "invalid_model")
    assert installed_models() == []


def test_files_that_differ_from_what_was_looked_at_are_not_installed(
    hub: HubServer, client: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that shows a harmless header by Range and has another content by its own digest."""
    hub.repositories["org/model"].commit(replaced(WEIGHTS, b"\xff" * 100))
    import app.library.pull as module

    monkeypatch.setattr(module, "_headers", lambda *arguments: {})
    plan = make_plan(client, "org/model")
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "invalid_model" and "fetched but not installed" in error.message
    assert installed_models() == []


# Access.


def access(hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, token: str | None) -> str:
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    try:
        with Hub(QUICK) as client:
            make_plan(client, name)
    except GryphonError as error:
        assert (token or "no token") not in error.message
        return f"{error.code}: {error.message}"
    return "fine"


def test_each_way_to_have_no_access_is_another_sentence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", model_files(), gated="manual")
    hub.add("org/private", model_files(), private=True)
    hub.add("org/new", model_files())
    hub.add("org/old", model_files(), moved_to="org/new")
    hub.add("org/closed", model_files(), disabled=True)
    hub.tokens = {
        "tok_narrow": set(),
        "tok_stranger": {"gated"},
        "tok_member": {"gated", "org/gated", "org/private"},
    }
    cases: list[tuple[str, str | None, str, str]] = [
        ("org/gated", None, "token_missing", f"{hub.endpoint}/org/gated"),
        ("org/gated", "tok_revoked", "token_invalid", f"{hub.endpoint}/settings/tokens"),
        ("org/gated", "tok_narrow", "token_scope", "gated repositories"),
        ("org/gated", "tok_stranger", "licence_not_accepted", f"{hub.endpoint}/org/gated"),
        ("org/private", None, "model_not_found", "private"),
        ("org/private", "tok_stranger", "model_not_found", "your token"),
        ("org/gone", None, "model_not_found", "hf auth login"),
        ("org/gone", "tok_member", "model_not_found", "removed"),
        ("org/old", None, "repository_renamed", "gryphon pull org/new"),
        ("org/closed", None, "repository_disabled", "closed"),
    ]
    for name, token, code, expected in cases:
        said = access(hub, monkeypatch, name, token)
        assert said.startswith(f"{code}: ") and expected in said, (name, token, said)
    for name in ("org/gated", "org/private", "org/new"):
        assert access(hub, monkeypatch, name, "tok_member") == "fine"
    assert all(one.authorization is None for one in hub.requests if one.host == "storage")
    assert access(hub, monkeypatch, "org/new", "tok\u00e9n").startswith("token_invalid")
    hub.stop()
    assert access(hub, monkeypatch, "org/new", None).startswith("hub_unreachable")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refusal(lambda: Hub()))


def test_access_withdrawn_in_the_middle(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", model_files(size=SIZE), gated="auto")
    hub.tokens = {"tok_member": {"gated", "org/model"}}
    monkeypatch.setenv("HF_TOKEN", "tok_member")
    with Hub(QUICK) as client:
        plan = make_plan(client, "org/model")
        hub.tokens = {"tok_member": {"gated"}}
        error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "licence_not_accepted"
    assert installed_models() == []


def test_a_storage_link_that_expired_is_asked_for_again(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=403, where="storage", times=2)
    assert_whole(pull(client, plan, Watch()), files)


def test_bodies_of_a_metadata_request_that_no_hub_sends(
    hub: HubServer, client: Hub, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ..hub_server import _Handler

    for info in ([], 3, {}, {"id": "org/model"}, {"id": "org/model", "sha": "../x"},
                 {"id": "org/model", "sha": "a" * 40, "siblings": [{"rfilename": "x"}]},
                 {"id": "org/model", "sha": "a" * 40, "siblings": [3]}):  # fmt: skip
        monkeypatch.setattr(_Handler, "_info", lambda self, *_, info=info: info)
        assert refusal(lambda: make_plan(client, "org/model")).code == "hub_not_understood"


@pytest.mark.parametrize("status", [200, 404])
def test_a_metadata_answer_without_end_is_left(
    hub: HubServer, client: Hub, files: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(hub_client, "MAX_ANSWER_BYTES", 1_000_000)
    hub.api_faults.append(Fault(status=status, body=itertools.repeat(b" " * 10_000)))
    found = refusal(lambda: make_plan(client, "org/model"))
    assert found.code == "hub_not_understood" and "more than 1,000,000 bytes" in found.message
    assert hub.requests[-1].sent < 10_000_000  # what the sockets between hold


def test_a_metadata_answer_that_trickles_is_left(
    hub: HubServer, client: Hub, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "MAX_ANSWER_S", 0.2)

    def trickle() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b" "

    hub.api_faults.append(Fault(status=200, body=trickle()))
    assert "longer than 0.2 seconds" in refusal(lambda: make_plan(client, "org/model")).message


def test_a_token_does_not_follow_metadata_to_another_host(
    hub: HubServer, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.tokens["hf_secret"] = set()
    commit = hub.repositories["org/model"].refs["main"]
    elsewhere = f"{hub.storage}/org/model/{commit}/config.json?X-Signature=storage-needs-no-token"
    hub.api_faults.append(Fault(status=307, headers={"Location": elsewhere}))
    with Hub(QUICK) as client:
        assert refusal(lambda: make_plan(client, "org/model")).code == "hub_not_understood"
    asked = [(one.host, one.authorization) for one in hub.requests]
    assert asked == [("hub", "Bearer hf_secret"), ("storage", None)]


def test_a_compressed_metadata_answer_is_not_unpacked(
    hub: HubServer, client: Hub, files: Any
) -> None:
    bomb = gzip.compress(bytes(100_000))
    hub.api_faults.append(
        Fault(status=200, body=iter([bomb]), headers={"Content-Encoding": "gzip"})
    )
    found = refusal(lambda: make_plan(client, "org/model"))
    assert found.code == "hub_not_understood" and "compressed" in found.message


def test_blobs_have_the_permissions_of_the_umask(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    probe = Path(constants.HF_HUB_CACHE).parent
    probe.mkdir(parents=True, exist_ok=True)
    (probe / "probe").touch()
    usual = (probe / "probe").stat().st_mode
    model = pull(client, make_plan(client, "org/model"), Watch())
    assert {path.stat().st_mode for path in model.path.iterdir()} == {usual}
