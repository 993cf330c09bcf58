"""The command line as a person types it: real processes, real exit codes, no traceback."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli import report, terminal
from app.engine.protocol import RequestStatus
from mlxmodels.footprint import footprint

from ..tiny_models import (
    OPEN_LLAMA,
    RECURRENT_GEMMA,
    write_adapter,
    write_model,
    write_scripted_model,
)

GRYPHON = str(Path(sys.executable).with_name("gryphon"))


def gryphon(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [GRYPHON, *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture
def tiny(home: Path) -> Path:
    """The tiny model, installed as "tiny" in this test's home."""
    return write_model(home / "data" / "models" / "tiny", OPEN_LLAMA)


def test_run_streams_text_and_nothing_else_to_standard_output(tiny: Path) -> None:
    words = ["run", "--temperature", "0", "--max-tokens", "5", "--seed", "1", "Hello"]
    done = gryphon(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n") and len(done.stdout) > 1
    assert gryphon(*words).stdout == done.stdout


def test_run_shows_what_a_model_thinks_apart_from_its_answer(home: Path) -> None:
    template = "<think>{% for m in messages %}{{ m.content }}{% endfor %}\n<think>\n"
    pieces = ["Hm", "m.", "</think>", "\n\nForty", "-two."]
    write_scripted_model(home / "data" / "models" / "thinker", pieces, template=template)
    words = ["run", "-m", "thinker", "--temperature", "0", "Hi"]
    done = gryphon(*words)
    assert (done.stdout, done.stderr) == ("Forty-two.\n", "Hmm.\n\n")
    done = gryphon(*words, "--hide-thinking")
    assert (done.stdout, done.stderr) == ("Forty-two.\n", "")


def test_run_reads_standard_input_before_the_prompt(tiny: Path) -> None:
    words = ["run", "--raw", "--temperature", "0", "--max-tokens", "3", "--json"]

    def prompt_tokens(done: subprocess.CompletedProcess[str]) -> int:
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        return next(e["prompt_tokens"] for e in events if e["type"] == "accepted")

    assert prompt_tokens(gryphon(*words, "abc")) == 3
    assert prompt_tokens(gryphon(*words, stdin="defgh")) == 5
    assert prompt_tokens(gryphon(*words, "abc", stdin="defgh")) == 5 + 2 + 3


def test_run_json_is_one_event_a_line_with_one_end(tiny: Path) -> None:
    done = gryphon("run", "--json", "--max-tokens", "4", "Hi")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "finished" and kinds.count("finished") == 1
    assert events[-1]["reason"] == "length" and kinds.count("token") == 4


def test_stats_go_to_standard_error(tiny: Path) -> None:
    done = gryphon("run", "--stats", "--max-tokens", "4", "Hi")
    assert "tok/s" in done.stderr and "tok/s" not in done.stdout


def test_guesses_leave_the_text_as_it_is_and_stats_count_them(tiny: Path) -> None:
    words = ["run", "--temperature", "0", "--max-tokens", "12", "--stats", "Hello"]
    plain = gryphon(*words)
    assert plain.returncode == 0 and "guesses" not in plain.stderr
    for more in (["--draft", "tiny"], ["--prompt-lookup"]):
        fast = gryphon(*words, *more)
        assert (fast.returncode, fast.stdout) == (0, plain.stdout)
        assert "--draft" not in more or "guesses right (100%)" in fast.stderr


def test_an_adapter_is_a_model_of_its_own_until_it_is_removed(
    tiny: Path, home: Path, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "mine", tiny)
    words = ["run", "--temperature", "0", "--max-tokens", "8", "Hello"]
    plain = gryphon(*words)
    adapted = gryphon(*words, "--adapter", str(directory))
    assert adapted.returncode == 0 and adapted.stdout != plain.stdout
    assert "No adapter is installed" in gryphon("adapters", "list").stdout
    added = gryphon("adapters", "add", str(directory))
    assert added.returncode == 0 and "tiny+mine" in added.stdout
    assert gryphon(*words, "-m", "tiny+mine").stdout == adapted.stdout
    listed = json.loads(gryphon("adapters", "list", "--json").stdout)
    assert listed == [{"name": "mine", "base": "tiny", "model": "tiny+mine"}]
    models = json.loads(gryphon("list", "--json").stdout)
    assert [(model["name"], model["base"]) for model in models] == [
        ("tiny", ""),
        ("tiny+mine", "tiny"),
    ]
    assert "mine" in gryphon("show", "tiny+mine").stdout
    assert gryphon("adapters", "rm", "mine").returncode == 0
    gone = gryphon(*words, "-m", "tiny+mine")
    assert gone.returncode == 1 and "tiny+mine" in gone.stderr


def test_the_form_of_the_answer_is_what_was_asked(tiny: Path, tmp_path: Path) -> None:
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], '
    schema += '"additionalProperties": false}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "sky.lark").write_text('start: "the sky is " ("blue" | "grey")')
    (tmp_path / "llama.gbnf").write_text('root ::= "yes" | "no"')
    for given in (schema, str(tmp_path / "schema.json")):
        assert json.loads(gryphon("run", "--json-schema", given, "Hi").stdout)["ok"] in (
            True,
            False,
        )
    assert gryphon("run", "--regex", "(yes|no)", "Hi").stdout in ("yes\n", "no\n")
    done = gryphon("run", "--grammar", str(tmp_path / "sky.lark"), "Hi")
    assert done.stdout in ("the sky is blue\n", "the sky is grey\n")
    done = gryphon("run", "--format", "json", "--max-tokens", "20", "Hi")
    assert done.stdout.startswith("{")
    refused = gryphon("run", "--grammar", str(tmp_path / "llama.gbnf"), "Hi")
    assert refused.returncode == 2 and "Lark" in refused.stderr


def test_every_sampling_option_reaches_the_engine(tiny: Path) -> None:
    """The letter A, as llama.cpp's and our own spelling of a bias makes the only choice."""
    biased = ["--logit-bias", "32=100", "--logit-bias", "33-100", "--ignore-eos"]
    others = ["--typical-p", "1", "--xtc-probability", "0", "--xtc-threshold", "0.2"]
    others += ["--repeat-penalty", "1", "--presence-penalty", "0", "--frequency-penalty", "0"]
    done = gryphon("run", *biased, *others, "--min-tokens", "3", "--max-tokens", "4", "Hi")
    assert done.stdout == "AAAA\n", done.stderr
    often = ["--logit-bias", "32=60", "--frequency-penalty", "2", "--repetition-penalty", "10"]
    assert gryphon("run", *often, "--max-tokens", "8", "Hi").stdout != "A" * 8 + "\n"


@pytest.mark.parametrize(
    ("words", "stdin", "status", "said"),
    [
        (["run"], "", 2, "There is no prompt"),
        (["run", "   "], None, 2, "There is no prompt"),
        (["run", "-m", "nope", "Hi"], None, 1, "nope"),
        (["run", "-m", "./nowhere", "Hi"], None, 1, "nowhere"),
        (["run", "-m", "/etc", "Hi"], None, 1, "config.json"),
        (["run", "-m", "/etc/hostname", "Hi"], None, 1, "not a"),
        (["run", "--temperature", "5", "Hi"], None, 1, "temperature must be 0 to 2, got 5"),
        (["run", "--max-tokens", "0", "Hi"], None, 1, "max_tokens"),
        (["run", "--top-p", "2", "Hi"], None, 1, "top_p"),
        (["run", "--typical-p", "2", "Hi"], None, 1, "typical_p must be 0 to 1"),
        (["run", "--xtc-threshold", "0.6", "Hi"], None, 1, "xtc_threshold must be 0 to 0.5"),
        (["run", "--repeat-penalty", "0", "Hi"], None, 1, "repetition_penalty must be 0.1 to 10"),
        (["run", "--logit-bias", "x=1", "Hi"], None, 2, "ID=BIAS"),
        (["run", "--logit-bias", "1=1.2.3", "Hi"], None, 2, "ID=BIAS"),
        (["run", "--logit-bias", "1=101", "Hi"], None, 1, "-100 to 100"),
        (["run", "--min-tokens", "-1", "Hi"], None, 1, "min_tokens"),
        (["run", "--format", "json", "--regex", "a", "Hi"], None, 2, "--format and --regex"),
        (["run", "--format", "xml", "Hi"], None, 2, "--format"),
        (["run", "-j", "nowhere.json", "Hi"], None, 2, "nowhere.json"),
        (["run", "-j", '{"nullable": true}', "Hi"], None, 1, "nullable"),
        (["run", "--grammar", "/dev/zero", "Hi"], None, 2, "262144 bytes"),
        (["run", "-m", "tiny", "--regex", "(", "Hi"], None, 1, "unclosed group"),
        (["run", "--raw", "--system", "x", "Hi"], None, 2, "--raw"),
        (["run", "--temperature", "warm", "Hi"], None, 2, "--temperature"),
        (["run", "--draft", "a", "--prompt-lookup", "Hi"], None, 2, "not allowed with"),
        (["run", "--draft", "nope", "Hi"], None, 1, "nope"),
        (["run", "--adapter", "/etc", "Hi"], None, 1, "it has no adapter_config.json"),
        (["adapters", "add", "/etc/nowhere"], None, 1, "not a directory"),
        (["adapters", "rm", "nope"], None, 1, "No adapter is called 'nope'"),
        (["adapters"], None, 2, "ACTION"),
        (["frobnicate"], None, 2, "frobnicate"),
        (["pull", "google/gemma-2b"], None, 1, "gryphon list"),
        (["show", "nope"], None, 1, "nope"),
        (["run", "-m", "tiny", "x" * 2000], None, 1, "room for 512"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_sentence(
    tiny: Path, words: list[str], stdin: str | None, status: int, said: str
) -> None:
    done = gryphon(*words, stdin=stdin)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_json_errors_are_json(tiny: Path) -> None:
    done = gryphon("run", "--json", "-m", "nope", "Hi")
    failed = json.loads(done.stdout)
    assert (done.returncode, failed["type"], failed["code"]) == (1, "failed", "model_not_found")


def _truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def _change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "model.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda path: (path / "config.json").write_text("{"), "config.json"),
        (lambda path: _change_config(path, model_type="frobnicator"), "frobnicator"),
        (lambda path: _change_config(path, num_hidden_layers=3), "layers.2"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    ],
    ids=["truncated", "empty", "bad config", "unknown family", "missing weights", "no tokenizer",
         "bad tokenizer"],
)  # fmt: skip
def test_a_damaged_model_is_named_with_what_is_wrong(tiny: Path, damage: object, said: str) -> None:
    damage(tiny)  # type: ignore[operator]
    done = gryphon("run", "-m", str(tiny), "Hi")
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_home_that_cannot_be_used_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "file"))
    for words in (["list"], ["run", "Hi"], ["show"]):
        done = gryphon(*words)
        assert done.returncode == 1
        assert "GRYPHON_HOME" in done.stderr and "file" in done.stderr


def test_ctrl_c_stops_cleanly(home: Path) -> None:
    write_model(home / "data" / "models" / "endless", RECURRENT_GEMMA)
    process = subprocess.Popen(
        [GRYPHON, "run", "--max-tokens", "1000000", "Hi"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_early_is_no_error(tiny: Path) -> None:
    command = f"'{GRYPHON}' run --max-tokens 300 Hi | head -c 1; echo \"${{PIPESTATUS[0]}}\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert done.stdout.endswith(b"0\n") and done.stderr == b""


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("> /dev/full", 1, "No space left"),
        ("--seed 99999999999999999999", 1, "seed must be a 64-bit whole number"),
        ("-m \"$(printf 'a\\377')\"", 1, "No installed model"),
        ("\"$(printf 'a\\377')\"", 2, "gryphon"),
        ("--json -m nope | true", 0, ""),
    ],
)
def test_odd_surroundings_never_end_in_a_traceback(
    tiny: Path, redirection: str, status: int, said: str
) -> None:
    command = f"'{GRYPHON}' run --max-tokens 3 Hi {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert said.encode() in done.stderr and b"Traceback" not in done.stderr


def test_a_prompt_that_is_not_utf8_is_refused(tiny: Path) -> None:
    done = subprocess.run(
        [GRYPHON, "run", b"caf\xe9"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.returncode, done.stderr) == (2, b"gryphon: The prompt is not UTF-8 text.\n")
    done = subprocess.run([GRYPHON, "run"], input=b"caf\xe9", capture_output=True)
    assert done.returncode == 2 and b"not UTF-8" in done.stderr


@pytest.mark.parametrize("home", ["~nosuchuser/x", "/proc/nowhere", "relative/" + "long" * 60])
def test_odd_homes_work_or_say_why(home: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [GRYPHON, "doctor"],
        env=os.environ | {"GRYPHON_HOME": home, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or home in done.stderr + done.stdout


def test_an_existing_home_keeps_its_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    subprocess.run([GRYPHON, "list"], env=os.environ | {"GRYPHON_HOME": str(tmp_path)}, check=True)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert made and all(path.stat().st_mode & 0o777 == 0o700 for path in made)


def test_list_show_and_ps(tiny: Path) -> None:
    assert "tiny" in gryphon("list").stdout and "open-llama" in gryphon("list").stdout
    (listed,) = json.loads(gryphon("list", "--json").stdout)
    assert (listed["name"], listed["context_length"]) == ("tiny", 512)
    shown = json.loads(gryphon("show", "tiny", "--json").stdout)
    assert shown["layers"] == 2 and shown["has_chat_template"] is True
    assert "chat template" in gryphon("show").stdout
    assert "No engine" in gryphon("ps").stdout
    assert json.loads(gryphon("ps", "--json").stdout) is None


def test_list_says_when_a_model_was_last_used(tiny: Path, home: Path) -> None:
    def listed() -> str | None:
        (model,) = json.loads(gryphon("list", "--json").stdout)
        return model["last_used"]

    assert listed() is None
    started = time.time()
    assert gryphon("run", "--raw", "--max-tokens", "1", "A").returncode == 0
    used = datetime.datetime.fromisoformat(listed() or "").timestamp()
    assert started - 1 <= used <= time.time()
    assert "just now" in gryphon("list").stdout
    (mark,) = (home / "state" / "used").iterdir()
    assert (mark.stat().st_size, mark.stat().st_mode & 0o777) == (0, 0o600)
    for age_s, said in ((61, "1 minute ago"), (7300, "2 hours ago"), (3e5, "3 days ago")):
        then = time.time() - age_s
        os.utime(mark, (then, then))
        assert said in gryphon("list").stdout
    assert gryphon("rm", "--yes", "tiny").returncode == 0 and not mark.exists()


def test_forget_drops_what_was_kept_and_no_chat(tiny: Path, home: Path) -> None:
    def cached_tokens() -> int:
        words = ["run", "--json", "--raw", "--max-tokens", "1", "A text of some length."]
        events = [json.loads(line) for line in gryphon(*words).stdout.splitlines()]
        return next(e["cached_tokens"] for e in events if e["type"] == "accepted")

    assert cached_tokens() == 0
    assert cached_tokens() > 0
    done = gryphon("forget")
    assert done.returncode == 0 and "Dropped" in done.stdout and not done.stderr
    assert not list((home / "cache" / "prefixes").rglob("*.safetensors"))
    assert cached_tokens() == 0


def test_show_fit_is_the_arithmetic(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = footprint(tiny, expand=sys.platform != "darwin", on_gpu=sys.platform == "darwin")
    done = gryphon("show", "tiny", "--fit", "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["verdict"], shown["limited_by"]) == (0, "fits", "model")
    assert shown["largest_context"] == 512
    assert shown["weight_bytes"] == taken.weight_bytes
    assert shown["state_bytes"] == {"512": taken.state_bytes(512)}
    for budget, verdict in ((taken.least_bytes, "memory sets"), (1000, "does not fit")):
        monkeypatch.setenv("GRYPHON_MEMORY_BYTES", str(budget))
        done = gryphon("show", "tiny", "--fit")
        assert done.returncode == ("not" in verdict)
        for term in ("weights", "state at 512", "computing", "GRYPHON_MEMORY_BYTES", verdict):
            assert term in done.stdout or ("state" in term and "not" in verdict), term


def test_show_fit_knows_models_without_a_limit(home: Path) -> None:
    write_model(home / "data" / "models" / "griffin", RECURRENT_GEMMA)
    shown = json.loads(gryphon("show", "griffin", "--fit", "--json").stdout)
    assert shown["largest_context"] is None and shown["bytes_per_token"] == 0
    assert len(set(shown["state_bytes"].values())) == 1 < len(shown["state_bytes"])
    assert "a context of any length" in gryphon("show", "griffin", "--fit").stdout


def test_show_fit_uses_the_budget_of_the_engine_that_runs(endless: None) -> None:
    budget = json.loads(gryphon("ps", "--json").stdout)["budget_bytes"]
    shown = json.loads(gryphon("show", "endless", "--fit", "--json").stdout)
    assert shown["budget_source"] == "what the running engine has"
    assert shown["budget_bytes"] == pytest.approx(budget, rel=0.2)


@pytest.fixture
def endless(home: Path) -> Iterator[None]:
    """Another gryphon that answers for longer than any test: "endless" has no context limit."""
    write_model(home / "data" / "models" / "endless", RECURRENT_GEMMA)
    process = subprocess.Popen(
        [GRYPHON, "run", "-m", "endless", "--max-tokens", "1000000", "Hi"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    reading = threading.Thread(target=process.stdout.read)  # or the pipe would fill
    reading.start()
    yield
    process.kill()
    reading.join()
    process.stdout.close()
    process.wait()


def test_ps_shows_the_engine_of_another_gryphon(endless: None) -> None:
    status = json.loads(gryphon("ps", "--json").stdout)
    assert status["model"]["name"] == "endless" and status["running"] == 1
    (running,) = status["requests"]
    assert (running["model"], running["phase"]) == ("endless", "decode")
    assert running["prompt_tokens"] > 0 and running["generated_tokens"] > 0
    assert status["counters"]["model_loads"] == 1
    held = status["weight_bytes"] + status["state_bytes"] + status["scratch_bytes"]
    assert 0 < held < status["active_bytes"] + status["scratch_bytes"] < status["budget_bytes"]
    assert status["footprint_bytes"] > status["active_bytes"]
    shown = gryphon("ps").stdout
    assert "endless, ready" in shown and "kept for later requests" in shown
    assert " for computing\n" in shown and " used\n" in shown
    heading, row = shown.splitlines()[-2:]
    assert heading.split()[:4] == ["request", "client", "model", "phase"]
    assert row.split()[0] == running["id"] and "decode" in row.split()


def test_ps_shows_names_that_others_chose_without_what_a_terminal_obeys() -> None:
    request = RequestStatus(
        id="\x1b[2Ja\nb",
        client="me",
        model="m",
        phase="queued",
        prompt_tokens=0,
        cached_tokens=0,
        generated_tokens=0,
        seconds=1.2,
    )
    (_, heading, row) = report._table([request])
    assert row.startswith("�[2Ja�b  me") and row.endswith("1 s")
    assert len(heading) == len(row)


def test_what_a_models_files_say_is_shown_without_what_a_terminal_obeys(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    obeyed = "x\x1b]0;taken\x07\x9b2J"
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": obeyed}))
    (tiny / "README.md").write_text(f"---\nlicense: {obeyed}\n---\n")
    for words in (["list"], ["show"], ["run", "-m", "tiny", "Hi"]):
        done = gryphon(*words)
        assert not set("\x1b\x07\x9b") & set(done.stdout + done.stderr), words
        assert "taken" in done.stdout + done.stderr


def test_an_answer_on_a_terminal_cannot_give_it_orders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.write_answer("a\x1b[2J\n")  # a file gets what the model wrote
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.write_answer("a\x1b[2J\tb\n")
    terminal.Thinking().show("c\x1b[2J")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a␛[2J\tb\n", "\x1b[2mc␛[2J\x1b[22m")


def test_no_wait_refuses_while_another_model_answers(endless: None, tiny: Path) -> None:
    done = gryphon("run", "-m", "tiny", "--no-wait", "--max-tokens", "1", "Hi")
    assert done.returncode == 1 and "endless is in use" in done.stderr


def test_doctor_names_what_would_be_used(tiny: Path) -> None:
    doctor = json.loads(gryphon("doctor", "--json").stdout)
    assert doctor["models"]["default"] == "tiny"
    assert Path(doctor["directories"]["hub models"]).name == "hub"
    assert doctor["compute"]["device"] in ("CPU", "Apple GPU")
    assert doctor["problems"] == {}
    assert set(doctor["packages"]) == {"app", "mlxmodels", "metal"}
    text = gryphon("doctor")
    assert text.returncode == 0 and "GFLOP/s" in text.stdout


def test_settings_that_are_wrong_are_said_before_an_engine_starts(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "config").mkdir()
    settings = home / "config" / "settings.toml"
    settings.write_text('keep_alive = "long"\n')
    done = gryphon("run", "-m", "tiny", "Hi")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"{settings}: line 1: 'keep_alive' must be a number of seconds" in done.stderr
    settings.unlink()
    monkeypatch.setenv("GRYPHON_PREFIX_CACHE_BYTES", "much")
    done = gryphon("run", "-m", "tiny", "Hi")
    assert done.returncode == 1 and "GRYPHON_PREFIX_CACHE_BYTES must be" in done.stderr
    assert not (home / "state" / "engine.log").exists()


def test_help_does_not_wait_for_anything_heavy() -> None:
    """What makes a command slow to start is what it imports."""
    heavy = "mlx textual fastapi uvicorn huggingface_hub numpy transformers msgspec asyncio"
    code = (
        "import sys, contextlib, io\n"
        "from app.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        f"print([name for name in {heavy!r}.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


_PARENT_ROOMS = ["cli.run", "cli.models", "cli.report", "cli.faces", "server.serving", "tui"]
_PARENT_ROOMS += ["cli.pull", "cli.upkeep", "cli.search", "cli.names"]
_PARENT_ROOMS += ["library.pull", "library.search", "library.catalog", "settings_file"]
_PARENT_ROOMS += ["cli.convert", "library.conversion", "library.gguf_conversion"]
_PARENT_ROOMS += ["library.evaluation", "library.quantized_pull"]
_PARENT_ROOMS += ["cli.editor"]


@pytest.mark.parametrize("module", [f"app.{name}" for name in _PARENT_ROOMS])
def test_the_parent_process_never_imports_mlx(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print([name for name in ('mlx', 'mlx.core', 'mlx_lm', 'transformers', 'torch')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_two_runs_at_once_both_answer_and_share_the_engine(tiny: Path, home: Path) -> None:
    """The one that started the engine ends first; the other is not disturbed."""
    words = [GRYPHON, "run", "--temperature", "0", "--json", "Hi", "--max-tokens"]
    both = [
        subprocess.Popen([*words, count], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        for count in ("50", "300")
    ]
    for process, count in zip(both, (50, 300), strict=True):
        output, _ = process.communicate(timeout=60)
        events = [json.loads(line) for line in output.splitlines()]
        assert events[-1]["usage"]["completion_tokens"] == count
    assert (home / "state" / "engine.log").read_text() == ""


@pytest.mark.parametrize("words", [[], ["--no-serve"], ["--port", "11600"], ["-m", "tiny"]])
def test_options_without_a_command_are_the_chats(tiny: Path, words: list[str]) -> None:
    done = gryphon(*words)
    assert done.returncode == 2 and "The chat needs a terminal" in done.stderr


def test_an_answer_that_reaches_the_default_length_says_so(home: Path) -> None:
    write_model(home / "data" / "models" / "tiny", OPEN_LLAMA, max_position_embeddings=4096)
    done = gryphon("run", "Hi")
    assert done.returncode == 0 and "stopped after 1024 tokens" in done.stderr
    assert gryphon("run", "--max-tokens", "2", "Hi").stderr == ""


def test_standard_input_without_end_is_refused(tiny: Path) -> None:
    command = f"'{GRYPHON}' run < /dev/zero"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Send less text" in done.stderr


def test_ctrl_c_again_and_again_prints_no_traceback(tiny: Path) -> None:
    process = subprocess.Popen(
        [GRYPHON, "run", "--max-tokens", "400", "Hi"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert b"Traceback" not in errors
