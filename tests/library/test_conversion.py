"""`gryphon convert`: what is installed, what an interruption leaves, what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from app.cli import main
from app.library import conversion, leftovers
from app.library.file_lock import locked
from app.library.installed import find_model, installed_models
from mlxmodels import load, shards
from mlxmodels.packing import Packing
from mlxmodels.perplexity import perplexity

from ..tiny_models import GEMMA2, RECURRENT_GEMMA, write_model
from .test_gguf_conversion import llama_weights, write_gguf

GRYPHON = str(Path(sys.executable).with_name("gryphon"))
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
WAY = ("-q", "4", "--group-size", "32", "--shard-bytes", "8000")


class Quiet:
    """A report that only counts."""

    def __init__(self) -> None:
        self.waited = threading.Event()

    def waiting(self) -> None:
        self.waited.set()

    def converting(self, done: int, total: int) -> None:
        pass

    def kept(self, shards: int, of: int) -> None:
        pass


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", GEMMA2 | WIDE)


def gryphon(*words: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [GRYPHON, *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def digests(path: Path) -> dict[str, str]:
    return {file.name: shards.digest(file) for file in path.iterdir()}


def failure(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["convert", *map(str, words)]) in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_directory_becomes_an_installed_model_that_answers(source: Path, home: Path) -> None:
    before = digests(source)
    done = gryphon("convert", source, *WAY, "--json")
    assert done.returncode == 0, done.stderr
    told = events(done.stdout)
    plan, result = told[0], told[-1]
    assert (plan["type"], plan["name"], plan["family"]) == ("plan", "tiny-4bit-g32", "gemma2")
    assert plan["result_bytes"] < plan["total_bytes"] and plan["fit"]["verdict"] == "fits"
    assert (result["type"], result["already"]) == ("installed", False)
    (model,) = installed_models()
    assert (model.name, model.quantization, model.source) == ("tiny-4bit-g32", "4-bit", "gryphon")
    index = json.loads((model.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan["result_bytes"]
    assert conversion.read_record(model.path)["source"] == str(source)
    assert digests(source) == before
    assert not list(home.glob("data/models/.*"))
    answer = gryphon("run", "--model", model.name, "--raw", "--max-tokens", "4", "hello")
    assert answer.returncode == 0, answer.stderr


def test_an_installed_model_is_converted_by_its_name_to_a_directory(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "--dtype", "bfloat16", "--out", "half"]) == 0
    assert main(["convert", "half", "--mode", "mxfp8", "--out", str(tmp_path / "made")]) == 0
    assert "is installed" in capsys.readouterr().out
    assert [model.name for model in installed_models()] == ["half"]
    assert find_model("half").quantization == "bfloat16"
    assert load(tmp_path / "made").config["quantization"]["mode"] == "mxfp8"


KILLS = int(os.environ.get("GRYPHON_TEST_KILLS", "3"))


def test_killed_at_any_moment_it_goes_on_from_what_is_whole(source: Path, home: Path) -> None:
    assert gryphon("convert", source, *WAY, "--out", "want").returncode == 0
    want = digests(find_model("want").path)
    shutil.rmtree(find_model("want").path)
    moments, kept = random.Random(KILLS), 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [GRYPHON, "convert", str(source), *WAY, "--out", "made", "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines = moments.randrange(1, 8)
        for line in process.stdout:
            event = json.loads(line)
            if event["type"] == "kept":
                assert event["shards"] >= kept, "what was whole was written again"
                kept = event["shards"]
            lines -= 1
            if lines == 0:
                break
        process.kill()
        process.communicate()
        assert installed_models() == []
    done = gryphon("convert", source, *WAY, "--out", "made", "--json")
    assert done.returncode == 0, done.stderr
    first = next(event for event in events(done.stdout) if event["type"] == "kept")
    assert kept > 0 and first["shards"] >= kept
    made = digests(find_model("made").path)
    assert made | {"README.md": ""} == want | {"README.md": ""}
    assert not list(home.glob("data/models/.*"))


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(source: Path) -> None:
    process = subprocess.Popen(
        [GRYPHON, "convert", str(source), *WAY, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["type"] == "kept":
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the child hears it too
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert events(output)[-1]["type"] == "interrupted"
    assert "Traceback" not in errors
    assert installed_models() == []
    assert gryphon("convert", source, *WAY).returncode == 0


def test_what_people_read_after_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    from app.cli.convert import ConvertView

    with pytest.raises(KeyboardInterrupt), ConvertView("tiny") as view:
        view.kept(3, 7)
        raise KeyboardInterrupt
    sentence = "Interrupted: 3 of 7 files of the result are kept. The same command goes on"
    assert sentence in capsys.readouterr().err


def test_prune_knows_what_was_left(source: Path, home: Path) -> None:
    assert gryphon("convert", source, *WAY, "--out", "made").returncode == 0
    left = home / "data/models/.made.partial-convert"
    find_model("made").path.rename(left)
    assert leftovers.leftovers() == []
    for path in (left, *left.iterdir()):
        os.utime(path, (time.time() - 7200,) * 2)
    (found,) = leftovers.leftovers()
    assert found.paths == (left,)


def test_nothing_is_overwritten(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), *WAY]) == 0
    sentence = failure(capsys, source, *WAY)
    assert "tiny-4bit-g32 exists already, made from" in sentence and "--out NAME" in sentence
    assert "exists already" in failure(capsys, source, *WAY, "--out", source)


def test_a_second_conversion_to_one_place_waits(source: Path) -> None:
    plan = conversion.make_plan(str(source), Packing(bits=8, group_size=32))
    report, done = Quiet(), []
    with locked(plan.target.with_name(f".{plan.name}.lock"), lambda: None):
        thread = threading.Thread(target=lambda: done.append(conversion.convert(plan, report)))
        thread.start()
        assert report.waited.wait(60) and not done
    thread.join(120)
    assert done and find_model(plan.name).path == plan.target


def test_a_dry_run_says_what_it_would_make_and_makes_nothing(
    source: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "-q", "4", "--group-size", "32", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("tiny-4bit-g32 from", "4-bit, groups of 32", "weights", "budget", "verdict"):
        assert words in said
    assert not list((home / "data/models").glob("*tiny*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-q", "7"], "bits 7: affine has 2, 3, 4, 5, 6, 8."),
        (["-q", "4", "--recipe", "mixed_4_6"], "give one of the two"),
        (["--recipe", "best"], "known are mixed_2_6, mixed_3_4"),
        (["-q", "4", "--group-size", "48"], "group_size 48: affine has"),
        (["-q", "4", "--out", "smollm2-135m"], "cannot be the name of a converted model"),
        (["-q", "4", "--out", "a+b"], "cannot be the name of a converted model"),
        (["-q", "4", "--out", "/nowhere/at/all"], "There is no directory /nowhere/at"),
        (["-q", "4", "--shard-bytes", "0"], "--shard-bytes must be at least 1, got 0."),
        (["-q", "4", "--eval", "/nowhere"], "--eval /nowhere is not a file."),
    ],
)
def test_wrong_usage_is_one_sentence(
    source: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert sentence in failure(capsys, source, *words)
    assert installed_models() == []


def test_sources_that_are_none_are_refused(
    tmp_path: Path, source: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "gryphon pull org/model -q 4" in failure(capsys, "org/model", "-q", "4")
    assert "No installed model is called 'nothing'" in failure(capsys, "nothing", "-q", "4")
    (tmp_path / "gemma-2b.ckpt").write_bytes(b"x")
    said = failure(capsys, tmp_path / "gemma-2b.ckpt", "-q", "4")
    assert "is a PyTorch pickle" in said and "google/gemma-2b" in said
    assert main(["convert", str(source), *WAY]) == 0
    assert "is quantized already" in failure(capsys, "tiny-4bit-g32", "-q", "8")
    (source / "config.json").write_text(json.dumps(GEMMA2 | WIDE | {"model_type": "unheard_of"}))
    assert "'unheard_of' are not supported" in failure(capsys, source, "-q", "8")
    (source / "config.json").write_text(json.dumps(GEMMA2 | WIDE | {"num_hidden_layers": 7}))
    assert "lacks weights of this architecture" in failure(capsys, source, "-q", "8")
    assert not list((home / "data/models").glob(".*.partial-*"))
    (source / "model.safetensors").write_bytes(b"0" * 100)
    assert "is damaged" in failure(capsys, source, "-q", "8")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    source: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    assert "free. Free some space" in failure(capsys, source, *WAY)
    assert not list((home / "data/models").glob(".*"))


# A GGUF file ----------------------------------------------------------------------------------


@pytest.fixture
def float_gguf(tmp_path: Path) -> Path:
    weights = llama_weights()
    kinds = {name: Type.F16 for name, weight in weights.items() if weight.ndim == 2}
    return write_gguf(tmp_path / "words.gguf", weights, kinds)


def test_a_gguf_is_converted_without_loss_or_quantized(float_gguf: Path) -> None:
    assert main(["convert", str(float_gguf)]) == 0
    assert main(["convert", str(float_gguf), "-q", "8", "--group-size", "32"]) == 0
    exact, packed = load(find_model("words-mlx").path), load(find_model("words-8bit-g32").path)
    assert exact.family == "llama"
    want = mx.array(llama_weights()["blk.0.ffn_up.weight"].astype(np.float16))
    assert mx.array_equal(exact.model.layers[0].mlp.up_proj.weight, want)
    up = packed.model.layers[0].mlp.up_proj
    quantized = mx.quantize(want, group_size=32, bits=8)
    assert all(map(mx.array_equal, (up.weight, up.scales, up.biases), quantized))
    assert load(find_model("words-mlx").path).tokenizer.encode("the 12", False)


def test_a_quantized_gguf_is_not_rounded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = llama_weights()
    kinds = {name: Type.Q8_0 for name, weight in weights.items() if weight.ndim == 2}
    path = write_gguf(tmp_path / "q8.gguf", weights, kinds)
    said = failure(capsys, path, "-q", "4")
    assert "is quantized already (15 tensors of Q8_0)" in said
    assert main(["convert", str(path)]) == 0
    assert find_model("q8-mlx").quantization == "8-bit"


# Perplexity -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


def plain_perplexity(path: Path, text: str, window: int) -> tuple[float, int]:
    """By whole windows at once, without states."""
    loaded = load(path, dtype=mx.float32)
    ids = loaded.tokenizer.encode(text, False)
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) > 1:
            logits = loaded.model(mx.array([part[:-1]]))[0]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            total -= sum(logprobs[i, id].item() for i, id in enumerate(part[1:]))
            count += len(part) - 1
    return math.exp(total / count), count


@pytest.mark.parametrize("config", [GEMMA2, RECURRENT_GEMMA], ids=lambda c: c["model_type"])
def test_perplexity_is_that_of_the_whole_text(
    tmp_path: Path, text: Path, config: dict[str, Any]
) -> None:
    path = write_model(tmp_path / "tiny", config)
    found = perplexity(load(path), text.read_text())
    want, count = plain_perplexity(path, text.read_text(), found.window)
    assert found.tokens == count and math.isclose(found.perplexity, want, rel_tol=1e-4)


def test_eval_reports_source_result_and_change(source: Path, text: Path) -> None:
    done = gryphon("convert", source, "-q", "2", "--group-size", "32", "--eval", text, "--json")
    assert done.returncode == 0, done.stderr
    told = events(done.stdout)[-1]
    assert told["type"] == "evaluated"
    before, count = plain_perplexity(source, text.read_text(), told["window"])
    after, _ = plain_perplexity(find_model("tiny-2bit-g32").path, text.read_text(), told["window"])
    assert told["tokens"] == count
    assert math.isclose(told["source_perplexity"], before, rel_tol=1e-3)
    assert math.isclose(told["perplexity"], after, rel_tol=1e-3)
    assert math.isclose(told["change"], after / before - 1, rel_tol=1e-2, abs_tol=1e-3)


def test_a_text_that_is_none_is_refused_after_the_result_is_safe(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    done = gryphon("convert", source, *WAY, "--eval", tmp_path / "noise")
    assert done.returncode == 1 and "is not a text in UTF-8" in done.stderr
    assert find_model("tiny-4bit-g32")
