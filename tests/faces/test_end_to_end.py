"""The whole road with a real model: command, endpoint and chat, as a newcomer uses them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

GRYPHON = str(Path(sys.executable).with_name("gryphon"))


@pytest.fixture
def server(furnished: Path) -> Iterator[str]:
    """`gryphon serve` on a free port; its URL."""
    process = subprocess.Popen(
        [GRYPHON, "serve", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+", line)
    assert found is not None, line
    yield found.group()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in rest


def engine_pid() -> int:
    done = subprocess.run([GRYPHON, "ps", "--json"], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["pid"])


def test_run_answers_a_question_of_fact(furnished: Path) -> None:
    done = subprocess.run(
        [GRYPHON, "run", "--temperature", "0", "What is the capital of France?"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_openai_client_talks_to_the_model(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="unused")
    model = client.models.list().data[0].id
    assert model == "smollm2-135m"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=12
    )
    text = whole.choices[0].message.content or ""
    assert "Paris" in text and whole.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    raw = client.completions.create(
        model=model, prompt="The capital of France is", temperature=0, max_tokens=2, logprobs=1
    )
    assert raw.choices[0].text.strip().startswith("Paris")
    with pytest.raises(openai.NotFoundError, match="smollm2-135m"):
        client.chat.completions.create(model="gpt-4", messages=question)
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model=model, prompt="word " * 9000)


def test_kill_9_of_the_engine_mid_stream_then_the_next_request_works(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)
    story = [{"role": "user", "content": "Tell me a very long story."}]
    stream = client.chat.completions.create(
        model="smollm2-135m", messages=story, temperature=0, stream=True
    )
    with pytest.raises(openai.APIError, match="signal 9"):
        for count, _ in enumerate(stream):
            if count == 3:
                os.kill(engine_pid(), signal.SIGKILL)
    again = client.chat.completions.create(
        model="smollm2-135m", messages=story, temperature=0, max_tokens=3
    )
    assert again.choices[0].message.content
    with urllib.request.urlopen(f"{server}/health") as answer:
        assert json.load(answer)["engine"] == "ready"


class Terminal:
    """A program in tmux, seen and driven as a person does."""

    def __init__(self, socket: Path, width: int, height: int) -> None:
        self._base = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        environment = [
            f"-e{name}={value}" for name, value in os.environ.items() if "\n" not in value
        ]
        self._tmux("new-session", "-d", f"-x{width}", f"-y{height}", *environment, f"'{GRYPHON}'")

    def _tmux(self, *words: str) -> str:
        return subprocess.run(
            [*self._base, *words], capture_output=True, text=True, check=True
        ).stdout

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, screen := self.screen()):
            assert time.monotonic() < deadline, f"no {pattern!r} on the screen:\n{screen}"
            time.sleep(0.05)
        return screen

    def wait_for_end(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while subprocess.run([*self._base, "has-session"], capture_output=True).returncode == 0:
            assert time.monotonic() < deadline, f"still running:\n{self.screen()}"
            time.sleep(0.05)

    def close(self) -> None:
        subprocess.run([*self._base, "kill-server"], capture_output=True)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[list[Terminal]]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def test_a_chat_is_typed_streamed_cancelled_quit_and_found_again(
    furnished: Path, terminals: list[Terminal], tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path / "a", 100, 30)
    terminals.append(terminal)
    terminal.wait_for("Enter sends")
    terminal.type("Tell me a very long story about the sea.")
    terminal.press("Enter")
    screen = terminal.wait_for(r"generating · \d+\.\d tok/s")
    assert "very long story" in screen and "8192" in screen
    # The endpoint runs beside the chat, on the same engine.
    url = re.search(r"http://127\.0\.0\.1:\d+", screen)
    if url is not None:  # the port is taken where another gryphon runs on this machine
        with urllib.request.urlopen(f"{url.group()}/health") as answer:
            assert json.load(answer)["model"] == "smollm2-135m"
    terminal.press("Escape")
    terminal.wait_for("idle")
    told = [line.strip() for line in terminal.screen().splitlines() if "sea" in line]
    assert len(told) > 1
    terminal.type("a thought I did not send")
    terminal.press("C-q")
    terminal.wait_for_end()

    again = Terminal(tmp_path / "b", 60, 24)
    terminals.append(again)
    screen = again.wait_for("very long story")
    assert "a thought I did not send" in again.wait_for("a thought")
    again.press("C-q")
    again.wait_for_end()


def test_the_chat_survives_kill_9_of_its_engine(
    furnished: Path, terminals: list[Terminal], tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path / "a", 100, 30)
    terminals.append(terminal)
    terminal.wait_for("idle")
    terminal.type("Tell me a very long story.")
    terminal.press("Enter")
    terminal.wait_for(r"generating · \d+\.\d tok/s")
    os.kill(engine_pid(), signal.SIGKILL)
    terminal.wait_for("stopped unexpectedly")
    terminal.press("C-r")
    terminal.wait_for(r"generating · \d+\.\d tok/s")
    terminal.press("Escape")
    terminal.press("C-q")
    terminal.wait_for_end()
