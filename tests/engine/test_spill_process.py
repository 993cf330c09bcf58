"""What was read, kept over the end of the engine process, however it ends; and purged."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from app import paths
from app.engine.client import EngineClient
from app.engine.prefix_files import PrefixFiles
from app.engine.protocol import (
    Accepted,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
)
from app.errors import GryphonError

from ..tiny_models import RECURRENT_GEMMA, write_model
from .asking import check_files
from .test_crash import processes_of, until_no_process


@pytest.fixture(scope="session")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    path = write_model(tmp_path_factory.mktemp("models") / "griffin", RECURRENT_GEMMA)
    return ModelRef("griffin", str(path))


@pytest.fixture
async def new_client() -> AsyncIterator[Callable[[], EngineClient]]:
    clients: list[EngineClient] = []

    def make() -> EngineClient:
        clients.append(EngineClient())
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
def files(home: Path) -> PrefixFiles:
    return PrefixFiles(paths.prefix_dir())


async def ask(
    client: EngineClient, model: ModelRef, text: str = "Why is the sky blue?", chat: str = ""
) -> tuple[int, int]:
    """Tokens of the prompt, and those that were not computed again."""
    request = GenerationRequest(
        id=f"{text} {chat}",
        model=model,
        messages=[Message("user", text)],
        sampling=Sampling(temperature=0),
        max_tokens=4,
        chat=chat,
    )
    events = [event async for event in client.stream(request)]
    assert isinstance(events[-1], Finished), events[-1]
    accepted = next(event for event in events if isinstance(event, Accepted))
    return accepted.prompt_tokens, accepted.cached_tokens


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not come to that")


async def pid_of(client: EngineClient) -> int:
    status = await client.status()
    assert status is not None
    return status.pid


async def test_an_engine_that_ends_at_once_saves_what_it_read(
    new_client: Callable[[], EngineClient], griffin: ModelRef, home: Path, files: PrefixFiles
) -> None:
    first = new_client()
    total, cached = await ask(first, griffin)
    assert cached == 0
    await first.close()
    await until_no_process(home, seconds=1)
    assert check_files(files.root) >= 2
    assert await ask(new_client(), griffin) == (total, total - 1)


async def test_an_idle_engine_that_is_killed_has_saved_what_it_read(
    new_client: Callable[[], EngineClient], griffin: ModelRef, files: PrefixFiles
) -> None:
    client = new_client()
    total, _ = await ask(client, griffin, chat="c")
    await until(lambda: len(files.stored()) == 3)
    os.kill(await pid_of(client), signal.SIGKILL)
    await until(lambda: client._writer is None)
    assert await ask(client, griffin) == (total, total - 1)
    check_files(files.root)


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from app.engine.client import EngineClient
from app.engine.protocol import *
async def main():
    client = EngineClient()
    request = GenerationRequest(id="r", model=ModelRef("griffin", sys.argv[2]), max_tokens=4,
                                messages=[Message("user", "Why is the sky blue?")])
    async for event in client.stream(request):
        pass
    print(type(event).__name__, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_the_engine_of_a_killed_parent_ends_within_a_second_and_saves_what_it_read(
    new_client: Callable[[], EngineClient], griffin: ModelRef, home: Path, files: PrefixFiles
) -> None:
    root = str(Path(__file__).parent.parent.parent)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, root, griffin.path], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert await asyncio.to_thread(parent.stdout.readline) == "Finished\n"
    assert processes_of(home)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until_no_process(home, seconds=1)
    assert check_files(files.root) >= 2
    total, cached = await ask(new_client(), griffin)
    assert cached == total - 1


@pytest.mark.parametrize("what", [".safetensors", ".chats"])
async def test_a_kill_in_the_middle_of_a_write_leaves_nothing_that_is_read(
    new_client: Callable[[], EngineClient],
    griffin: ModelRef,
    files: PrefixFiles,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'app.engine.worker' in ' '.join(sys.orig_argv):\n"
        "    genuine = os.replace\n"
        "    def replace(source, target, *rest, **options):\n"
        f"        if str(target).endswith({what!r}):\n"
        "            time.sleep(600)\n"
        "        return genuine(source, target, *rest, **options)\n"
        "    os.replace = replace\n"
    )
    client = new_client()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        await ask(client, griffin, chat="c")
        await until(lambda: any(path.name.startswith(".") for path in files.root.rglob("*")))
        os.kill(await pid_of(client), signal.SIGKILL)
        await until_no_process(home, seconds=1)
    assert check_files(files.root, killed=True) == 0
    _, cached = await ask(client, griffin, chat="c")
    assert cached == 0
    await until(lambda: len(files.stored()) == 3)
    await client.close()
    check_files(files.root)


@pytest.mark.parametrize("engine", ["its own", "another's", "none", "dying"])
async def test_a_chat_is_forgotten_whoever_runs_the_engine(
    new_client: Callable[[], EngineClient],
    griffin: ModelRef,
    files: PrefixFiles,
    engine: str,
    home: Path,
) -> None:
    first = new_client()
    words = {"a": "What is a?", "b": "What is b?"}
    for chat, text in words.items():
        await ask(first, griffin, text, chat)
    await until(lambda: len(files.stored()) == 5)  # the beginning of both is one
    client = first if engine == "its own" else new_client()
    if engine == "none":
        await first.close()
        await until_no_process(home, seconds=1)
    if engine == "dying":
        await client.start()
        os.kill(await pid_of(client), signal.SIGSTOP)
        forgetting = asyncio.ensure_future(client.forget_chat("a"))
        await asyncio.sleep(0)
        os.kill(first._owned._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await forgetting
    else:
        await client.forget_chat("a")
    assert {chat for one in files.stored() for chat in files.chats(one.path)} == {"b"}
    assert len(files.stored()) == 3
    for chat, text in words.items():
        total, cached = await ask(client, griffin, text)
        assert (cached == total - 1) == (chat == "b")
    await client.forget_chat("")
    assert not files.stored()
    _, cached = await ask(client, griffin, words["b"])
    assert cached == 0


@pytest.mark.parametrize("purged", ["a", ""])
async def test_a_prompt_in_preparation_when_its_chat_is_forgotten_leaves_nothing(
    new_client: Callable[[], EngineClient], griffin: ModelRef, files: PrefixFiles, purged: str
) -> None:
    client = new_client()
    await ask(client, griffin)  # starts the preparation process
    (preparing,) = [
        child
        for child in psutil.Process(await pid_of(client)).children()
        if "app.engine.preparation" in child.cmdline()
    ]
    preparing.suspend()
    asking = asyncio.ensure_future(ask(client, griffin, "What is a?", "a"))
    try:
        while not (status := await client.status()) or not status.requests:
            await asyncio.sleep(0.01)
        await new_client().forget_chat(purged)
        assert not asking.done()
    finally:
        preparing.resume()
    await asking
    total, cached = await ask(client, griffin, "What is a?")
    assert cached < total - 1
    assert "a" not in {chat for one in files.stored() for chat in files.chats(one.path)}


async def test_without_an_engine_what_it_left_unfinished_is_forgotten_too(
    new_client: Callable[[], EngineClient], files: PrefixFiles, home: Path
) -> None:
    unfinished = files.directory("k") / ".x.safetensors.abc"
    unfinished.write_text("words")
    await new_client().forget_chat("any")
    assert not unfinished.exists()
    assert not processes_of(home), "an engine was started for this"


async def test_what_cannot_be_removed_is_told(
    new_client: Callable[[], EngineClient], files: PrefixFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.directory("k") / "x.safetensors"
    path.write_text("words")
    files.set_chats(path, {"a": 3})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(GryphonError, match="Not everything could be removed") as caught:
        await new_client().forget_chat("a")
    assert str(files.root) in caught.value.message


async def test_the_id_of_a_chat_is_checked(
    new_client: Callable[[], EngineClient], griffin: ModelRef
) -> None:
    client = new_client()
    await client.start()
    with pytest.raises(GryphonError, match="200 characters"):
        await client.forget_chat("x" * 201)
    request = GenerationRequest(id="r", model=griffin, prompt="x", chat="x" * 201)
    (end,) = [event async for event in client.stream(request)]
    assert not isinstance(end, Finished) and "200 characters" in end.message  # type: ignore[union-attr]
