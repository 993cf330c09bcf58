"""Listing and finding models by their files: own, from the hub's cache, and by path."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.errors import GryphonError
from app.library.details import describe
from app.library.installed import find_model, installed_models

CONFIG: dict[str, Any] = {"model_type": "open-llama", "max_position_embeddings": 512}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """`tensors`: name → dtype, shape, bytes; the data is zeros."""
    header, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))


def write_model(path: Path, config: dict[str, Any] | str = CONFIG, age_s: int = 0) -> Path:
    path.mkdir(parents=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    write_safetensors(path / "model.safetensors", {"model.norm.weight": ("BF16", [4], 8)})
    for file in path.iterdir():
        os.utime(file, (1e9 - age_s, 1e9 - age_s))
    return path


def write_hub_model(cache: Path, name: str, commit: str = "abc", *, main: bool = True) -> Path:
    """A model as huggingface_hub lays it out: files are links into `blobs`."""
    repository = cache / ("models--" + name.replace("/", "--"))
    model = write_model(repository / "snapshots" / commit)
    (repository / "blobs").mkdir()
    for file in list(model.iterdir()):
        blob = repository / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(blob)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home" / "data" / "models"


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Path:
    return tmp_path / "hub"


def refusal(name: str | None, *, allow_path: bool = True) -> GryphonError:
    with pytest.raises(GryphonError) as caught:
        find_model(name, allow_path=allow_path)
    return caught.value


def test_nothing_installed_says_what_to_run(models: Path) -> None:
    assert installed_models() == []
    error = refusal(None)
    assert error.code == "no_model_installed"
    assert "gryphon pull smollm2-135m" in error.message


def test_own_and_hub_models_are_listed_by_name(models: Path, hub: Path) -> None:
    write_model(models / "mine")
    snapshot = write_hub_model(hub, "org/a-model")
    own, theirs = installed_models()
    assert (own.name, own.source, own.family) == ("mine", "gryphon", "open-llama")
    assert (own.quantization, own.context_length) == ("bfloat16", 512)
    assert own.size_bytes == sum(file.stat().st_size for file in own.path.iterdir())
    assert (theirs.name, theirs.source, theirs.path) == ("org/a-model", "hub", snapshot)
    assert theirs.ref.path == str(snapshot)
    assert theirs.size_bytes == own.size_bytes


def test_a_hub_model_pulled_at_a_revision_is_found_without_main(hub: Path) -> None:
    snapshot = write_hub_model(hub, "org/pinned", main=False)
    assert find_model("org/pinned").path == snapshot


def test_damaged_and_unfinished_directories_do_not_break_the_list(models: Path, hub: Path) -> None:
    write_model(models / "good")
    write_model(models / "no-json", "{")
    write_model(models / "a-list", "[]")
    write_model(models / "no-type", {})
    write_model(models / ".smollm2-135m.partial-xyz")
    (models / "empty").mkdir()
    (models / "a-file").write_text("")
    (write_model(models / "cut-short") / "model.safetensors").write_bytes(b"\xff" * 20)
    (hub / "models--org--never-downloaded" / "refs").mkdir(parents=True)
    (write_hub_model(hub, "org/dangling") / "model.safetensors").resolve().unlink()
    sharded = write_hub_model(hub, "org/half")
    shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert [model.name for model in installed_models()] == ["good"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda path: (path / "config.json").write_text("3"), "not a JSON object"),
        (lambda path: (path / "config.json").write_text("{}"), "no model_type"),
        (lambda path: (path / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "cut short after 0 bytes"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x08" + b"\0" * 15), "not JSON"),
        (
            lambda path: (path / "model.safetensors").write_bytes(
                (path / "model.safetensors").read_bytes()[:-1]
            ),
            "8 bytes of tensors, 7 are there",
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}'
            ),
            "1 of its 2 weight files are missing",
        ),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../../x.safetensors"}}'
            ),
            "outside the directory",
        ),
    ],
)
def test_each_fault_of_a_directory_is_named(
    models: Path, tmp_path: Path, damage: Any, expected: str
) -> None:
    by_path, by_name = write_model(tmp_path / "model"), write_model(models / "named")
    damage(by_path)
    damage(by_name)
    for error in (refusal(str(by_path)), refusal("named", allow_path=False)):
        assert error.code == "invalid_model"
        assert expected in error.message


def test_paths(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "elsewhere" / "tiny")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tiny", "./tiny", "tiny/", "~/elsewhere/tiny", str(tmp_path / "elsewhere/tiny")):
        found = find_model(name, allow_path=True)
        assert (found.name, found.source) == ("tiny", "path")
        assert found.path == tmp_path / "elsewhere" / "tiny"
    missing = refusal("./absent")
    assert missing.code == "model_not_found"
    assert "There is nothing at" in missing.message
    assert "it is a file" in refusal("tiny/config.json").message
    assert refusal("./tiny", allow_path=False).code == "model_not_found"
    for strange in ("", "a\0b", "x" * 5000, "./" + "x" * 5000, "../..", "no/such/model/here"):
        assert refusal(strange).code in ("model_not_found", "invalid_model")


def test_an_unknown_name_gets_a_suggestion_and_the_list(models: Path) -> None:
    write_model(models / "gemma-2-2b")
    write_model(models / "other")
    error = refusal("gema-2-2b")
    assert error.code == "model_not_found"
    assert "Did you mean gemma-2-2b?" in error.message
    assert "Installed: gemma-2-2b, other." in error.message
    assert "gryphon pull smollm2-135m" in refusal("smollm2-135m").message


def test_the_default_is_the_embedded_model_else_the_latest(models: Path) -> None:
    write_model(models / "new", age_s=0)
    write_model(models / "old", age_s=100)
    assert find_model().name == "new"
    write_model(models / "smollm2-135m", age_s=200)
    assert find_model().name == "smollm2-135m"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "4-bit"),
        ({"quantization": {"bits": 4, "lm_head": {"bits": 8}}}, "mixed 4/8-bit"),
        ({"quantization": {"bits": 4, "lm_head": False}}, "4-bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_quantization_for_people(models: Path, config: dict[str, Any], expected: str) -> None:
    write_model(models / "model", CONFIG | config)
    assert find_model("model").quantization == expected


def test_a_recurrent_model_has_no_context_limit(models: Path) -> None:
    write_model(models / "griffin", CONFIG | {"model_type": "recurrent_gemma"})
    assert find_model("griffin").context_length is None


def test_details_count_what_packed_weights_unpack_to(models: Path) -> None:
    quantization = {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 64, "bits": 8},
    }
    path = write_model(models / "m", CONFIG | {"num_layers": 3, "quantization": quantization})
    write_safetensors(
        path / "model.safetensors",
        {
            "model.embed_tokens.weight": ("U32", [10, 16], 640),
            "model.embed_tokens.scales": ("F16", [10, 1], 20),
            "model.embed_tokens.biases": ("F16", [10, 1], 20),
            "lm_head.weight": ("U32", [10, 8], 320),
            "lm_head.scales": ("F16", [10, 2], 40),
            "lm_head.biases": ("F16", [10, 2], 40),
            "model.norm.weight": ("F32", [64], 256),
        },
    )
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\nText\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    details = describe(find_model("m"))
    assert details.parameters == 640 + 640 + 64
    assert details.tensors == {"8-bit": 1, "4-bit": 1, "F32": 1}
    assert details.weight_bytes == 1336
    assert (details.layers, details.heads) == (3, None)
    assert (details.license, details.has_chat_template) == ("apache-2.0", True)


def test_details_of_the_embedded_model(
    embedded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRYPHON_HOME", str(embedded_home))
    model = find_model("smollm2-135m")
    assert (model.family, model.quantization, model.context_length) == (
        "open-llama",
        "mixed 4/8-bit",
        8192,
    )
    details = describe(model)
    assert details.parameters == 134_515_008
    assert details.tensors == {"4-bit": 210, "F16": 61, "8-bit": 1}
    assert (details.license, details.has_chat_template) == ("apache-2.0", True)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"]
)
def test_a_file_of_lists_in_lists_is_damage_to_its_own_model_alone(models: Path, file: str) -> None:
    write_model(models / "good")
    (write_model(models / "odd") / file).write_text("[" * 200_000)
    assert "good" in [model.name for model in installed_models()]
    with contextlib.suppress(GryphonError):
        assert not describe(find_model("odd")).has_chat_template


def test_listing_imports_neither_mlx_nor_the_hub_client() -> None:
    code = (
        "import sys; from app.library import details, embedded, installed; "
        "installed.installed_models(); "
        "print([m for m in ('mlx', 'numpy', 'gguf', 'huggingface_hub.hf_api', 'httpx') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
