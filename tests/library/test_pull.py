"""What a pull installs, beside other pulls and other programs, and what it leaves."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download

from app.library import transfer
from app.library.details import describe
from app.library.file_lock import locked
from app.library.hub import Hub
from app.library.hub_cache import RepositoryCache
from app.library.installed import InstalledModel, find_model, installed_models
from app.library.patience import Patience
from app.library.pull import make_plan, parse_name, pull
from app.library.transfer import Status
from app.library.verification import verify

from ..hub_server import HubServer
from ..tiny_models import LLAMA, write_model
from .model_files import model_files, safetensors
from .pulling import PIECE, SIZE, WEIGHTS, Watch, assert_whole, refusal, sent_since


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


def test_chat_templates_in_a_directory_of_theirs_come_too(hub: HubServer, client: Hub) -> None:
    tools = "additional_chat_templates/tools.jinja"
    others = {"additional_chat_templates/x.py": b"!", "additional_chat_templates/a/b.jinja": b"!"}
    files = model_files() | {tools: b"{{ tools }}"}
    hub.add("org/model", files | others)
    model = pull(client, make_plan(client, "org/model"), Watch())
    there = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*.*")}
    assert there == set(files)
    assert describe(model).chat_templates == {"default": "{{ messages }}", "tools": "{{ tools }}"}
    checks = {check.name: check for check in verify(model.path, lambda done, total: None)}
    assert checks.keys() == set(files)
    assert all(check.digest_known and not check.problem for check in checks.values())
    (model.path / tools).resolve().write_bytes(b"{{ other }}")
    checks = {check.name: check for check in verify(model.path, lambda done, total: None)}
    assert [name for name, check in checks.items() if check.problem] == [tools]


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


def note_of_weights(status: Status) -> str:
    return next(one.note for one in status.files if one.file.name == WEIGHTS)


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
    assert error.code == "disk_full" and "has 100 MB free" in error.message
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


def test_blobs_have_the_permissions_of_the_umask(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    probe = Path(constants.HF_HUB_CACHE).parent
    probe.mkdir(parents=True, exist_ok=True)
    (probe / "probe").touch()
    usual = (probe / "probe").stat().st_mode
    model = pull(client, make_plan(client, "org/model"), Watch())
    assert {path.stat().st_mode for path in model.path.iterdir()} == {usual}
