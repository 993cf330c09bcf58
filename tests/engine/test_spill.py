"""What was read, kept on disk: a restart goes on from it, and only the right model does."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from app import paths
from app.engine import fingerprint as fingerprinting
from app.engine import prefix_files, residency
from app.engine import resident as residing
from app.engine import scheduler as scheduling
from app.engine import spill as spilling
from app.engine.memory import MemoryBudget
from app.engine.prefix_cache import PrefixCache
from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import ModelRef, Sampling
from app.engine.states_file import file_name
from app.errors import GryphonError
from app.settings import Settings
from mlxmodels.cache import RecurrentState
from mlxmodels.saved_state import load_states, save_states

from ..rounds import rounds
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model
from .asking import FAMILIES, MIB, TRIMMABLE, check_files, engine, rendered, tokens_of


@pytest.fixture
def files(tmp_path: Path) -> PrefixFiles:
    root = tmp_path / "prefixes"
    root.mkdir(mode=0o700)
    return PrefixFiles(root, 256 * MIB)


@pytest.fixture(autouse=True)
def no_error_is_only_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors, errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("round", rounds(1))
def test_any_walk_with_restarts_gives_what_a_replay_gives(
    checkpoints: dict[str, ModelRef],
    files: PrefixFiles,
    family: str,
    round: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Chats that extend, edit, branch and retry, with restarts between, little memory, little disk,
    and chats that are deleted: their words are then nowhere."""
    draw = random.Random(f"{family} {round}")
    model = checkpoints[family]
    files = PrefixFiles(files.root, draw.choice([MIB, 256 * MIB]))
    memory = draw.choice([MIB // 8, 64 * MIB])

    def content() -> list[int]:
        return draw.choices(range(64), k=draw.choice([1, 3, 9, 40, 120]))

    system = ("system", content())
    chats = {name: [system, ("user", content())] for name in "abc"}
    reused = after_restart = 0
    with engine(model, 0) as plain:
        for restart in range(3):
            with engine(model, memory, files) as cached:
                for step in range(5):
                    name = draw.choice("abc")
                    turns = chats[name]
                    prompt, boundaries = rendered(turns)
                    if len(prompt) > 400:
                        chats[name] = [system, ("user", content())]
                        continue
                    seeded = Sampling(temperature=0.9, top_p=0.9, seed=step)
                    options: dict[str, Any] = {
                        "sampling": draw.choice([Sampling(temperature=0), seeded]),
                        "max_tokens": draw.randint(1, 14),
                    }
                    got = cached.ask(prompt, boundaries, chat=name, **options)
                    assert got.tokens == plain.ask(prompt, boundaries, **options).tokens, (
                        f"restart {restart}, step {step}, {got.cached} of {len(prompt)} cached"
                    )
                    reused += got.cached
                    after_restart += got.cached if step == 0 and restart else 0
                    action = draw.choice(["extend", "edit", "branch", "retry", "fork", "forget"])
                    if action == "extend":
                        turns += [("assistant", got.tokens), ("user", content())]
                    elif action == "edit":
                        turns[-1] = "user", content()
                    elif action == "branch":
                        at = draw.randrange(1, len(turns), 2)
                        chats[name] = [*turns[:at], ("user", content())]
                    elif action == "fork":
                        chats[draw.choice("abc")] = [*turns]
                    elif action == "forget":
                        if draw.random() < 0.7:
                            cached.save()
                        cached.forget(name)
                        assert not any(name in files.chats(one.path) for one in files.stored())
                    if draw.random() < 0.5:
                        cached.save()
                    assert cached.prefix_bytes <= memory
                cached.save()
                assert files.nbytes <= files._budget_bytes  # type: ignore[operator]
            check_files(files.root)
    assert reused > 0 and after_restart > 0
    record_property("restarts", 2)
    record_property("tokens_not_computed_again", reused)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_goes_on_from_what_was_read(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, family: str
) -> None:
    turns = [("system", tokens_of(50)), ("user", tokens_of(90))]
    prompt, boundaries = rendered(turns)
    with engine(checkpoints[family], files=files) as first:
        cold = first.ask(prompt, boundaries)
        assert cold.cached == 0
        first.save()
    with engine(checkpoints[family], files=files) as second:
        retried = second.ask(prompt, boundaries)
        assert retried.cached == len(prompt) - 1 and retried.tokens == cold.tokens
    with engine(checkpoints[family], files=files) as third, engine(checkpoints[family], 0) as plain:
        following, boundaries = rendered([*turns, ("assistant", cold.tokens), ("user", [7] * 9)])
        asked = third.ask(following, boundaries)
        assert asked.cached == len(prompt) + len(cold.tokens) - 1
        assert asked.tokens == plain.ask(following, boundaries).tokens
        edited, boundaries = rendered([turns[0], ("user", tokens_of(30, "other"))])
        asked = third.ask(edited, boundaries)
        assert asked.cached >= boundaries[0]
        assert asked.tokens == plain.ask(edited, boundaries).tokens
    check_files(files.root)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_several_entries_share_is_written_once(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, family: str
) -> None:
    turns: list[tuple[str, list[int]]] = []
    with engine(checkpoints[family], files=files) as cached:
        for turn in range(4):
            turns.append(("user", tokens_of(60, turn)))
            turns.append(("assistant", cached.ask(*rendered(turns)).tokens))
            cached.save()
        held = sum(stored.nbytes for stored in files.stored())
        # Headers take 1 to 4 KiB, a tree of keys and values per entry would take eight times more.
        assert held <= cached.prefix_bytes + 6000 * len(files.stored())
        if family in TRIMMABLE:
            assert len(files.stored()) == 1
    with engine(checkpoints[family], files=files) as again:
        for count in range(1, 8, 2):
            asked = again.ask(*rendered(turns[:count]))
            assert asked.cached == len(asked.prompt) - 1


# Whose states these are.


def cached_after(
    model: ModelRef, files: PrefixFiles, change: Any = lambda: None, length: int = 60
) -> int:
    """Prompt tokens that a second engine need not compute, after what happened to the first's."""
    with engine(model, files=files) as first:
        first.ask(tokens_of(length))
        first.save()
    change()
    with engine(model, files=files) as second, engine(model, 0) as plain:
        asked = second.ask(tokens_of(length))
        assert asked.tokens == plain.ask(tokens_of(length)).tokens
        return asked.cached


def rewritten(path: Path, target: Path) -> None:
    """Other weights in the same file: of the same size, and as old as the ones before."""
    times = target.stat()
    content = path.read_bytes()
    assert len(content) == times.st_size and content != target.read_bytes()
    with target.open("r+b") as file:
        file.write(content)
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("family", ["recurrent_gemma", "zoo llama"])
def test_other_weights_of_the_same_size_and_time_find_nothing(
    files: PrefixFiles, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", FAMILIES[family])
    other = write_model(tmp_path / "other", FAMILIES[family], seed=1)
    names = "model.safetensors"
    ref = ModelRef("model", str(model))
    assert cached_after(ref, files) == 59
    assert cached_after(ref, files, lambda: rewritten(other / names, model / names)) == 0
    # Also where a file system keeps no times of its own.
    for module in (fingerprinting, residing):
        monkeypatch.setattr(module, "weights_on_disk", lambda path: [])
    assert cached_after(ref, files) == 59
    original = write_model(tmp_path / "original", FAMILIES[family])
    assert cached_after(ref, files, lambda: rewritten(original / names, model / names)) == 0


def test_files_that_change_while_they_are_loaded_are_nobodys(
    files: PrefixFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model", OPEN_LLAMA)
    genuine = residency.load_resident

    def changing(*arguments: Any) -> Any:
        resident = genuine(*arguments)
        (path / "model.safetensors").touch()
        return resident

    monkeypatch.setattr(residency, "load_resident", changing)
    assert cached_after(ModelRef("model", str(path)), files) == 0
    assert not files.stored()


def set_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "what", ["nothing", "window", "mlx", "our code", "format", "kernels", "dtype"]
)
def test_whatever_changes_states_changes_the_key(
    files: PrefixFiles, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model", RECURRENT_GEMMA)

    def change() -> None:
        if what == "window":
            set_config(path, attention_window_size=7)
        elif what == "mlx":
            monkeypatch.setattr(fingerprinting, "version", lambda name: "0.99")
        elif what == "our code":
            monkeypatch.setattr(fingerprinting, "_code", lambda: "newer")
        elif what == "format":
            monkeypatch.setattr(fingerprinting, "_FORMAT", 99)
        elif what == "kernels":
            monkeypatch.setenv("GRYPHON_KERNELS", "reference")
        elif what == "dtype":
            genuine = residency.load_resident

            def in_bfloat16(*arguments: Any) -> Any:
                resident = genuine(*arguments)
                resident.loaded.model.set_dtype(mx.bfloat16)
                return resident

            monkeypatch.setattr(residency, "load_resident", in_bfloat16)

    cached = cached_after(ModelRef("model", str(path)), files, change)
    assert cached == (59 if what == "nothing" else 0)


def test_a_model_that_was_swapped_out_is_warm_when_it_comes_back(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        first = cached.ask(tokens_of(50))
        assert cached.ask(tokens_of(50), model=checkpoints["open_llama"]).cached == 0
        again = cached.ask(tokens_of(50))
        assert again.cached == 49 and again.tokens == first.tokens


# Files that are not what they should be.


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a bit flipped at its end":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "a token changed":
        states, metadata = load_states(path)
        save_states(path, states, metadata | {"tokens": "AAAA" + metadata["tokens"][4:]})
    elif how == "not safetensors":
        path.write_bytes(b"\xff" * 500)
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    elif how == "a link":
        moved = path.parent.parent.parent / path.name
        path.rename(moved)
        path.symlink_to(moved)
    elif how == "no metadata of ours":
        save_states(path, load_states(path)[0], {"key": "1"})
    elif how == "nested":
        states, metadata = load_states(path)
        save_states(path, states, metadata | {"lacks": "[" * 100_000})
    elif how == "lacks everything":
        states, metadata = load_states(path)
        everything = json.dumps(list(range(len(states))))
        save_states(path, [], metadata | {"lacks": everything, "trimmable": everything})
    elif how == "wider":
        states, metadata = load_states(path)
        for state in states:
            if isinstance(state, RecurrentState):
                assert state.conv is not None and state.hidden is not None
                state.conv = mx.concatenate([state.conv] * 2, axis=-1)
                state.hidden = mx.concatenate([state.hidden] * 2, axis=-1)
        save_states(path, states, metadata)
    elif how == "claims to be trimmable":
        states, metadata = load_states(path)
        everything = json.dumps(list(range(len(states))))
        save_states(path, states, metadata | {"trimmable": everything})
    elif how == "another length":
        states, metadata = load_states(path)
        for state in states:
            state.advance(3)
        save_states(path, states, metadata)
    elif how == "too few states":
        states, metadata = load_states(path)
        save_states(path, states[:-1], metadata)
    elif how == "another model's":
        states, metadata = load_states(path)
        save_states(path, states, metadata | {"key": "0" * 32})
    elif how == "whose is unreadable":
        path.with_suffix(".chats").write_text("{")
    elif how == "gone":
        path.unlink()
    else:
        raise AssertionError(how)


@pytest.fixture(scope="session")
def one_file(
    checkpoints: dict[str, ModelRef], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """A directory with the states after all but the last token of a prompt, and its answer."""
    files = PrefixFiles(tmp_path_factory.mktemp("one"), 256 * MIB)
    prompt = tokens_of(60)
    with engine(checkpoints["recurrent_gemma"], files=files) as first:
        good = first.ask(prompt, max_tokens=1)
        first.save()
    for stored in files.stored():
        if stored.path.name != file_name(prompt[:-1]):
            files.remove(stored.path)
    return files.root, good.tokens


BAD_AT_START = [
    "empty", "cut short", "a bit flipped at its end", "a token changed", "not safetensors",
    "a pipe", "a directory", "a link", "no metadata of ours", "nested", "lacks everything",
    "wider", "claims to be trimmable", "another length", "too few states", "another model's",
    "whose is unreadable",
]  # fmt: skip
BAD_LATER = ["cut short", "a pipe", "a link", "lacks everything", "wider", "gone"]


@pytest.mark.parametrize(
    ("when", "how"),
    [
        *(("before it starts", how) for how in BAD_AT_START),
        *(("while it runs", how) for how in BAD_LATER),
    ],
)
def test_a_bad_file_is_refused_and_removed(
    checkpoints: dict[str, ModelRef],
    files: PrefixFiles,
    one_file: tuple[Path, list[int]],
    how: str,
    when: str,
) -> None:
    model = checkpoints["recurrent_gemma"]
    prompt = tokens_of(60)
    shutil.copytree(one_file[0], files.root, dirs_exist_ok=True)
    (stored,) = files.stored()
    if when == "before it starts":
        damaged(stored.path, how)
    with engine(model, files=files) as second:
        if when == "while it runs":
            second.ask([5])  # it knows the file now
            damaged(stored.path, how)
        asked = second.ask(prompt, max_tokens=1)
        assert asked.tokens == one_file[1] and asked.cached == 0
        assert not stored.path.is_symlink() and not stored.path.exists()
        assert not stored.path.with_suffix(".chats").exists()
    linked = files.root.parent / stored.path.name
    assert linked.exists() == (how == "a link"), "what a link points to is not ours"


def test_leftovers_and_strangers_are_removed_at_the_start(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.safetensors").write_text("mine")
    (files.root / "linked").symlink_to(elsewhere)
    (files.root / "stray").write_text("")
    key = files.directory("0123")
    for name in (".x.safetensors.a1b2", "notes.txt", "y.chats", "z.safetensors.old"):
        (key / name).write_text("{}")
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        cached.ask([5])
    assert not list(files.root.glob("**/.*")) and not (files.root / "stray").exists()
    assert not key.exists() and not (files.root / "linked").is_symlink()
    assert (elsewhere / "x.safetensors").read_text() == "mine"


def test_the_directory_is_private_and_no_link(home: Path, tmp_path: Path) -> None:
    path = paths.prefix_dir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    assert stat.S_IMODE(paths.prefix_dir().stat().st_mode) == 0o700
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(GryphonError, match="not a directory of yours"):
        paths.prefix_dir()


# How much is kept.


def test_what_was_used_longest_ago_goes_first(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    model = checkpoints["open_llama"]

    def ask(first: int) -> int:
        asked = cached.ask([first] * 40, max_tokens=1)
        cached.save()
        for stored in files.stored():  # older by an hour, so that no clock is too coarse
            os.utime(stored.path, (stored.used_s - 3600, stored.used_s - 3600))
        return asked.cached

    with engine(model, files=files) as cached:
        ask(0)
    size = files.nbytes
    files = PrefixFiles(files.root, 3 * size + size // 2)
    with engine(model, 1, files) as cached:  # no room in memory at all
        assert [ask(0), ask(0)] == [39, 39]
    with engine(model, files=files) as cached:
        assert [ask(first) for first in (1, 2, 0, 3)] == [0, 0, 39, 0]
        assert len(files.stored()) == 3
    with engine(model, 1, files) as cached:
        assert [ask(first) for first in (0, 2, 3, 1)] == [39, 39, 39, 0]


def test_a_file_does_not_leave_out_what_goes_to_make_room_for_it(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    model = checkpoints["zoo falcon_h1"]
    with engine(model, files=files) as cached:
        cached.ask(tokens_of(200), max_tokens=1)
        cached.save()
        whole = max(stored.nbytes for stored in files.stored())
        assert len(files.stored()) == 2
        cached.forget("")
    files = PrefixFiles(files.root, whole + 5000)
    with engine(model, files=files) as cached:
        cached.ask(tokens_of(200), max_tokens=1)
        cached.save()  # the states after the answer's token, and then those before them
        assert len(files.stored()) == 1
    with engine(model, files=files) as cached:
        assert cached.ask(tokens_of(200)).cached == 199


def test_what_memory_serves_is_used_on_disk_too(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    with engine(checkpoints["open_llama"], files=files) as cached:
        cached.ask(tokens_of(40), max_tokens=1)
        cached.save()
        (stored,) = files.stored()
        os.utime(stored.path, (0, 0))
        cached.ask(tokens_of(40), max_tokens=1)
        cached.save()
        assert files.stored()[0].used_s > time.time() - 3600


def test_free_disk_is_left_to_others(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = PrefixFiles(files.root)
    free = 2 * 1024**3
    usage = shutil._ntuple_diskusage(1, 1, free)
    monkeypatch.setattr(prefix_files.shutil, "disk_usage", lambda path: usage._replace(free=free))
    (key := files.directory("k")).joinpath("a.safetensors").write_bytes(b"0" * 1000)
    assert files.make_room(free // 10 + 1000) is None, "a tenth of what is free"
    assert files.make_room(free // 10 - 1000) == []
    free = 1024**3 + 500
    assert files.make_room(1600) is None and len(files.stored()) == 1
    assert files.make_room(800) == [key / "a.safetensors"]
    free = 1024**3 - 10
    assert files.make_room(1) is None


def test_what_no_chat_goes_on_from_expires(files: PrefixFiles) -> None:
    key = files.directory("k")
    for name, age_days in (("new", 6), ("old", 8), ("chat", 8)):
        path = key / f"{name}.safetensors"
        path.write_bytes(b"0")
        used_s = time.time() - age_days * 86400
        os.utime(path, (used_s, used_s))
    files.set_chats(key / "chat.safetensors", {"1": 5})
    files.clean()
    assert {stored.path.stem for stored in files.stored()} == {"new", "chat"}


def test_the_number_of_files_has_a_bound(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_files, "MAX_FILES", 4)
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        for first in range(9):
            cached.ask([first] * 5, max_tokens=1)
        cached.save()
        assert len(files.stored()) == 4


def test_off_keeps_nothing_and_removes_what_was_kept(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    model = checkpoints["recurrent_gemma"]
    assert cached_after(model, files) == 59
    assert cached_after(model, PrefixFiles(files.root, 0)) == 0
    assert not files.stored()


@pytest.mark.parametrize(("text", "expected"), [("", None), ("0", 0), ("1048576", MIB)])
def test_the_limit_is_a_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
) -> None:
    monkeypatch.setenv("GRYPHON_PREFIX_DISK_BYTES", text)
    assert Settings.from_environment().prefix_disk_bytes == expected


def test_a_full_disk_costs_no_answer(
    checkpoints: dict[str, ModelRef],
    files: PrefixFiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spilling, "save_states", full)
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        good = cached.ask(tokens_of(40))
        cached.save()
        cached.save()
        asked = cached.ask(tokens_of(40))
        assert asked.cached == 39 and asked.tokens == good.tokens
    assert not files.stored()
    told = [record for record in caplog.records if "No space left" in record.getMessage()]
    assert len(told) == 1


def test_a_large_file_is_not_read_while_others_wait(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints["recurrent_gemma"]
    assert cached_after(model, files) == 59
    monkeypatch.setattr(spilling, "_URGENT_BYTES", 100)
    with engine(model, files=files) as cached:
        running = cached.submit(tokens_of(5), max_tokens=400)
        assert cached.ask(tokens_of(60)).cached == 0
        assert running.end is None, "nobody waited"
        cached.scheduler.stop()
    with engine(model, files=files) as cached:
        assert cached.ask(tokens_of(60)).cached == 59


def test_a_file_that_saves_little_is_not_read(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilling, "_BYTES_PER_TOKEN", 1)
    assert cached_after(checkpoints["recurrent_gemma"], files) == 0


def test_an_idle_engine_saves_by_itself_and_a_busy_one_waits(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "_QUIET_S", 0.0)
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        running = cached.submit(tokens_of(5), max_tokens=300)
        cached.ask(tokens_of(40))
        assert not files.stored() and running.end is None
        assert running.ended.wait(60)
        deadline = time.monotonic() + 30
        while len(files.stored()) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(files.stored()) == 4  # before the last token and at the end, of both
        cached.forget("")
        assert not files.stored() and cached.prefix_bytes == 0


# Forgetting.


def chats_on_disk(files: PrefixFiles) -> set[str]:
    return {chat for stored in files.stored() for chat in files.chats(stored.path)}


@pytest.mark.parametrize("family", ["recurrent_gemma", "gemma2", "open_llama", "zoo falcon_h1"])
@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_a_chat_goes_and_what_another_goes_on_from_stays(
    checkpoints: dict[str, ModelRef], files: PrefixFiles, family: str, where: str
) -> None:
    """Chat b was forked from a; c has nothing to do with either."""
    model = checkpoints[family]
    shared = [("user", tokens_of(50, "shared"))]
    with engine(model, files=files) as cached:
        answer = cached.ask(*rendered(shared), chat="a").tokens
        turns = [*shared, ("assistant", answer)]
        following = {name: rendered([*turns, ("user", tokens_of(40, name))]) for name in "ab"}
        cached.ask(*rendered(shared), chat="b")  # retried before it parted from a
        cached.ask(*following["a"], chat="a")
        cached.ask(tokens_of(70), chat="c")
        nobodys = cached.ask(tokens_of(30))
        if where != "memory":
            cached.save()
        if where != "disk":
            cached.forget("a")
    if where == "disk":
        files.forget("a")
        assert chats_on_disk(files) >= {"c"}
    if where == "memory":
        assert not files.stored()
        return
    with engine(model, files=files) as cached:
        assert cached.ask(*following["a"]).cached <= len(rendered(shared)[0]) + len(answer)
        assert cached.ask(tokens_of(70)).cached == 69
        assert cached.ask(nobodys.prompt).cached == 29
        cached.save()
        assert chats_on_disk(files) <= {"b", "c"}


@pytest.mark.parametrize("family", ["recurrent_gemma", "gemma2", "open_llama", "zoo falcon_h1"])
def test_in_memory_a_chat_goes_and_what_another_goes_on_from_stays(
    checkpoints: dict[str, ModelRef], family: str
) -> None:
    prompt = tokens_of(50)
    with engine(checkpoints[family]) as cached, engine(checkpoints[family], 0) as plain:
        answer = cached.ask(prompt, chat="a").tokens
        cached.ask(prompt, chat="b", max_tokens=1)
        longer = [*prompt, *answer, *tokens_of(40, "more")]
        cached.ask(longer, chat="a")
        cached.forget("a")
        again = cached.ask(longer, chat="c")
        assert again.cached == 50, "b goes on from after its prompt and a token"
        assert again.tokens == plain.ask(longer).tokens
        cached.forget("b")
        cached.forget("c")
        assert cached.prefix_bytes == 0
        assert cached.ask(prompt).cached == 0


def test_nothing_of_a_forgotten_chat_is_left_in_arrays_that_others_look_at(
    checkpoints: dict[str, ModelRef],
) -> None:
    """Keys and values of a branch are held once, by its longest entry, which is one chat's."""
    with engine(checkpoints["zoo falcon_h1"]) as cached:
        cached.ask(tokens_of(300), chat="b", max_tokens=1)
        before = cached.prefix_bytes
        cached.ask([*tokens_of(300), *tokens_of(150, "long")], chat="a", max_tokens=1)
        cached.forget("a")
        assert cached.prefix_bytes == before
        assert cached.ask(tokens_of(300)).cached == 299


def test_what_lacked_layers_of_a_forgotten_chat_is_saved_again(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    """The shorter entry, another chat's, is in memory; the longer one, the chat's, is not."""
    model = checkpoints["zoo falcon_h1"]
    plan = residing.plan_resident(model, MemoryBudget())
    resident = residing.load_resident(model, plan, lambda *_: None)
    cache = PrefixCache(64 * MIB, spilling.Spill.open(files, resident))
    tokens = tokens_of(60)
    states = resident.loaded.make_cache()
    resident.loaded.model(mx.array([tokens[:40]]), cache=states)
    cache.insert(tokens[:40], states, "b")
    resident.loaded.model(mx.array([tokens[40:]]), cache=states)
    cache.insert(tokens, states, "a")
    cache.save(60)
    longer = cache._tree.find(tokens)
    assert longer is not None
    cache._remove(longer)
    cache.forget("a")
    cache.save(60)
    found = PrefixCache(64 * MIB, spilling.Spill.open(files, resident)).find(tokens)
    assert found is not None and found[0] == 40


def test_what_is_running_for_a_forgotten_chat_leaves_nothing(
    checkpoints: dict[str, ModelRef], files: PrefixFiles
) -> None:
    with engine(checkpoints["recurrent_gemma"], files=files) as cached:
        running = [cached.submit(tokens_of(9, i), chat="a", max_tokens=60) for i in range(3)]
        other = cached.submit(tokens_of(9, "b"), chat="b", max_tokens=60)
        reading = cached.submit(tokens_of(2000), chat="a", max_tokens=5)
        cached.forget("a")
        for asked in (*running, other, reading):
            assert asked.ended.wait(60)
        cached.save()
        assert chats_on_disk(files) == {"b"}
        assert cached.ask(other.prompt).cached == 8
        assert cached.ask(running[0].prompt).cached == cached.ask(reading.prompt).cached == 0


def test_a_file_of_whom_nobody_can_say_whose_it_is_goes_with_any_chat(files: PrefixFiles) -> None:
    key = files.directory("k")
    for name in ("a", "b", "unreadable"):
        (key / f"{name}.safetensors").write_bytes(b"0")
        files.set_chats(key / f"{name}.safetensors", {name: 3})
    (key / "unreadable.chats").write_text("[")
    files.forget("a")
    assert {stored.path.stem for stored in files.stored()} == {"b"}
    assert {path.name for path in key.iterdir()} == {"b.safetensors", "b.chats"}
