"""What was read, kept on disk: a restart goes on from it, and only the right model does."""

from __future__ import annotations

import logging
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import ModelRef, Sampling
from mlxmodels.saved_state import load_states

from ..rounds import rounds
from .asking import FAMILIES, MIB, TRIMMABLE, engine, rendered, tokens_of


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
    checkpoints: dict[str, ModelRef], files: PrefixFiles, family: str, round: int
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
        for restart in range(4):
            with engine(model, memory, files) as cached:
                for step in range(6):
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
            check_directory(files)
    assert reused > 0 and after_restart > 0


def check_directory(files: PrefixFiles) -> None:
    """Nothing but whole files, for their owner only."""
    assert stat.S_IMODE(files.root.stat().st_mode) == 0o700
    for directory in files.root.iterdir():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for path in directory.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.suffix in (".safetensors", ".chats")
            if path.suffix == ".safetensors":
                load_states(path)
            else:
                assert path.with_suffix(".safetensors").exists() and files.chats(path)


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
    check_directory(files)


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
