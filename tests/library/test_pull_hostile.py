"""Repositories and answers meant to do harm are refused by name, before anything is written."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import GryphonError
from app.library import hub as hub_module
from app.library import hub_client
from app.library import pull as pull_module
from app.library.hub import Hub
from app.library.installed import installed_models
from app.library.pull import make_plan, pull

from ..hub_server import Fault, HubServer
from .model_files import CONFIG, model_files
from .pulling import QUICK, WEIGHTS, Watch, refusal


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


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_claims_to_be_huge_is_not_asked_for(
    hub: HubServer, client: Hub, name: str
) -> None:
    repository = hub.add("org/model", model_files(shards=2))
    repository.sizes[name] = 1_000_000_000
    error = refusal(lambda: make_plan(client, "org/model"))
    assert error.code == "invalid_model" and "has 1,000,000,000 bytes" in error.message
    assert hub.sent(name) == 0


def test_a_header_of_many_megabytes_is_not_read(hub: HubServer, client: Hub) -> None:
    weights = (30_000_000).to_bytes(8, "little") + b" " * 31_000_000
    hub.add("org/model", replaced(WEIGHTS, weights))
    error = refusal(lambda: make_plan(client, "org/model"))
    assert error.code == "invalid_model" and "claims 30,000,000 bytes" in error.message
    assert hub.sent(WEIGHTS) == 8


def test_more_tensors_than_any_model_has_are_refused(
    hub: HubServer, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", model_files(shards=3))
    monkeypatch.setattr(pull_module, "_MAX_TENSORS", 2)
    error = refusal(lambda: make_plan(client, "org/model"))
    assert error.code == "invalid_model" and "more than 2 tensors" in error.message


def test_files_that_differ_from_what_was_looked_at_are_not_installed(
    hub: HubServer, client: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that shows a harmless header by Range and has another content by its own digest."""
    hub.repositories["org/model"].commit(replaced(WEIGHTS, b"\xff" * 100))
    monkeypatch.setattr(pull_module, "_headers", lambda *arguments: {})
    plan = make_plan(client, "org/model")
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "invalid_model" and "fetched but not installed" in error.message
    assert installed_models() == []


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


@pytest.mark.parametrize("location", ["http://other/x", "ftp://other/x", "file:///x", "https://["])
def test_a_download_is_not_led_to_where_it_is_not_safe(location: str) -> None:
    with pytest.raises(GryphonError, match="not valid or not secure"):
        hub_module._redirected("https://hub.example/org/model/resolve/main/x", location)
    safe = hub_module._redirected("https://hub.example/a", "https://storage.example/b?c")
    assert safe == "https://storage.example/b?c"


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://x", "/org/model/resolve/x"])
def test_redirects_that_lead_nowhere_are_refused(
    hub: HubServer, client: Hub, files: dict[str, bytes], tmp_path: Path, location: str
) -> None:
    plan = make_plan(client, "org/model")
    if location.startswith("/"):  # to itself, without end
        location = f"/org/model/resolve/{plan.repository.commit}/{WEIGHTS}"
    hub.spoil(WEIGHTS, status=302, headers={"Location": location}, where="hub", times=None)
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "hub_refused" and len(hub.requests) < 60
    assert installed_models() == []
