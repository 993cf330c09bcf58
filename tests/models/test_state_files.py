"""Files of layer states: written whole or not at all; a wrong one is one clear error."""

from __future__ import annotations

import json
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.saved_state import load_states, save_states, saved_metadata

from .tiny_states import ZOO, arrays_cache, fed, full, recurrent, same, window, zoo


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.safetensors"


def test_only_its_owner_can_read_the_file(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o644)
    save_states(path, [full()])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_states(path, [full()], {"which": "first"})

    def fail(file: Any, *args: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_states(path, [full()], {"which": "second"})
    assert load_states(path)[1] == {"which": "first"}
    assert not list(path.parent.glob(".snap*"))


def test_loaded_states_do_without_their_file(path: Path) -> None:
    save_states(path, [full()])
    (loaded,), _ = load_states(path)
    path.unlink()
    assert same(loaded.state[0], full().keys[:, :, :3])


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    save_states(path, [recurrent(), window(), full()], {"a": "b"})
    whole = path.read_bytes()
    for n in [0, 1, 7, 8, 9, *range(20, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ModelError) as caught:
            load_states(path)
        assert str(path) in str(caught.value) and "Download" not in str(caught.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="belong to no tensor"):
        load_states(path)


def test_no_flipped_byte_goes_unnoticed(path: Path) -> None:
    save_states(path, [recurrent(2), window(2), full(2)], {"tokens": "[1, 2, 3]"})
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        with pytest.raises(ModelError, match="states") as caught:
            load_states(path)
        assert str(path) in str(caught.value)


def foreign_file(path: Path, kind: str) -> None:
    if kind == "weights":
        mx.save_safetensors(str(path), {"w": mx.zeros((2, 2))}, {"format": "mlx"})
    elif kind == "mlx-lm's cache":
        from mlx_lm.models.cache import save_prompt_cache

        save_prompt_cache(str(path), [fed(zoo("KVCache"), 3)])
    elif kind == "text":
        path.write_text("hello, this is no safetensors file at all")
    elif kind == "directory":
        path.mkdir()


@pytest.mark.parametrize("kind", ["weights", "mlx-lm's cache", "text", "directory", "nothing"])
def test_a_foreign_file_is_refused(kind: str, path: Path) -> None:
    foreign_file(path, kind)
    for read in (load_states, saved_metadata):
        with pytest.raises(ModelError, match="snapshot.safetensors"):
            read(path)


def altered(path: Path, change: Callable[[dict[str, Any], dict[str, mx.array]], None]) -> None:
    """Rewrite a file of states with its document and its arrays changed."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    document = json.loads(metadata["gryphon.layer_states"])
    change(document, arrays)
    metadata["gryphon.layer_states"] = json.dumps(document)
    mx.save_safetensors(str(path), arrays, metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "expected format 1, got 2"),
        ({"version": "1"}, "expected format 1, got '1'"),
        ({"layers": None}, "list of layers"),
        ({"metadata": {"a": 1}}, "metadata of text"),
        ({"layers": [3]}, "layer 0, expected a layer's class and fields, got 3"),
        ({"layers": [{"class": "os.system"}]}, "expected one of RecurrentState.* got 'os.system'"),
        ({"layers": [{"class": []}]}, r"expected one of RecurrentState.* got \[\]"),
        ({"layers": [{"class": "CacheList", "states": 1}]}, "states of a CacheList, got 1"),
        ({"layers": [{"class": "FullCache", "keys": None}]}, "expected the fields"),
        ({"layers": []}, "array 0.conv belongs to no layer"),
    ],
)
def test_a_document_of_another_form_is_refused(
    change: dict[str, Any], reason: str, path: Path
) -> None:
    save_states(path, [recurrent()])
    altered(path, lambda document, arrays: document.update(change))
    with pytest.raises(ModelError, match=reason):
        load_states(path)


def test_lists_nested_without_end_are_refused(path: Path) -> None:
    save_states(path, [window()])
    nested: list[Any] = []
    for _ in range(700):
        nested = [nested]
    altered(path, lambda document, arrays: document["layers"][0].update(keys=nested))
    with pytest.raises(ModelError):
        load_states(path)


@pytest.mark.parametrize("state", [RecurrentState(), WindowCache(3), FullCache()])
def test_tokens_that_left_no_arrays_are_refused(state: Any, path: Path) -> None:
    save_states(path, [state])
    altered(path, lambda document, _: document["layers"][0].update(offsets=[3]))
    with pytest.raises(ModelError, match=r"offsets: expected none past 0 without arrays"):
        load_states(path)


TAMPERED: list[tuple[str, str, Any, str]] = [
    ("recurrent", "offsets", [4], "hidden: expected float32"),
    ("recurrent", "offsets", [], "offsets: expected a list"),
    ("recurrent", "offsets", [4, 2**40], "offsets: expected a list"),
    ("recurrent", "offsets", [4, 1.5], "offsets: expected a list"),
    ("recurrent", "offsets", [4, True], "offsets: expected a list"),
    ("recurrent", "remaining", [1], "remaining: expected 2 integers"),
    ("recurrent", "remaining", [1, -1], "remaining: expected 2 integers"),
    ("recurrent", "hidden", None, "hidden: expected float32"),
    ("recurrent", "hidden", mx.zeros((2, 6), mx.bfloat16), "got bfloat16 of shape"),
    ("recurrent", "hidden", mx.zeros((2, 7)), r"hidden: .* shape \(2, 6\)"),
    ("recurrent", "hidden", mx.zeros((3, 6)), "hidden: expected float32"),
    ("recurrent", "conv", mx.zeros((2, 3, 6), mx.int32), "conv: expected a floating"),
    ("recurrent", "conv", mx.zeros((3, 3, 6)), "conv: expected 2 rows"),
    ("recurrent", "conv", mx.zeros((2, 6)), "conv: expected a floating"),
    ("recurrent", "conv", [], "conv: expected a floating"),
    ("recurrent", "conv", "conv", "conv: expected a floating"),
    ("window", "window", 4, "keys: expected a floating array of 2 rows and 3 to 4 slots"),
    ("window", "window", 0, "window: expected a positive"),
    ("window", "window", None, "window: expected a positive"),
    ("window", "keys", mx.zeros((2, 2, 6, 4)), "keys: .* 3 to 5 slots"),
    ("window", "keys", mx.zeros((2, 2, 2, 4)), "keys: .* 3 to 5 slots"),
    ("window", "keys", mx.zeros((1, 2, 5, 4)), "keys: .* 2 rows"),
    ("window", "keys", None, "keys"),
    ("window", "values", None, "values: expected shape and dtype"),
    ("window", "values", mx.zeros((2, 2, 5, 3)), "values: expected shape and dtype"),
    ("window", "values", mx.zeros((2, 2, 5, 4), mx.float16), "values: expected shape and dtype"),
    ("full", "starts", [0], "starts: expected 2 integers"),
    ("full", "starts", [0, -1], "starts: expected 2 integers"),
    ("full", "starts", [1, 0], r"starts \+ offsets: expected 3 in every row"),
    ("full", "end", 2, r"starts \+ offsets: expected 2"),
    ("full", "end", 4, "keys: expected 4 slots or more"),
    ("full", "end", -3, "end: expected an integer from 0"),
    ("full", "offsets", [3, 2], r"starts \+ offsets"),
    ("full", "offsets", [3, 3, 3], "starts: expected 3"),
    ("full", "remaining", [0, 0, 0], "remaining"),
    ("full", "keys", mx.zeros((2, 2, 2, 4)), "shape|slots"),
    ("full", "keys", mx.zeros((2, 3, 4)), "keys: expected an array"),
    ("full", "keys", mx.zeros((2, 2, 3, 4), mx.int8), "keys: expected a floating"),
    ("full", "values", mx.zeros((2, 1, 3, 4)), "values: expected shape"),
    ("full", "values", mx.zeros((2, 2, 3, 4), mx.float16), "values: expected the dtype"),
    ("kv", "offset", 10, "keys: expected 10 slots"),
    ("kv", "offset", -1, "offset: expected an integer"),
    ("kv", "values", None, "values: expected shape"),
    ("quantized", "bits", "4", "bits: expected an integer"),
    ("quantized", "keys", [None], "keys: expected weights, scales and biases"),
    ("quantized", "offset", 90, "keys: expected 90 slots"),
    ("rotating", "index", 9, "keys: expected 9 slots"),
    ("rotating", "max_size", 0, "keep: expected less than max_size"),
    ("chunked", "start_position", 9, "start_position: expected at most 4"),
    ("arrays", "cache", [], "cache: expected a list of arrays"),
    ("arrays", "cache", [3], "cache.0: expected an array"),
    ("arrays", "lengths", mx.zeros((3,), mx.int32), "cache: expected arrays with equally"),
]


@pytest.mark.parametrize(("kind", "field", "value", "reason"), TAMPERED)
def test_a_state_that_cannot_be_is_refused(
    kind: str, field: str, value: Any, reason: str, path: Path
) -> None:
    ours = {"recurrent": recurrent, "window": window, "full": full}
    state = ours[kind](2) if kind in ours else arrays_cache() if kind == "arrays" else ZOO[kind]()
    save_states(path, [state])

    def change(document: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        name = f"0.{field}"
        for old in [old for old in arrays if old == name or old.startswith(f"{name}.")]:
            del arrays[old]
        document["layers"][0][field] = value
        if isinstance(value, mx.array):
            arrays[name] = value
            document["layers"][0][field] = {"array": name}

    altered(path, change)
    with pytest.raises(ModelError, match=reason) as caught:
        load_states(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_one_array_cannot_serve_twice(path: Path) -> None:
    save_states(path, [window()])
    altered(path, lambda document, _: document["layers"][0].update(keys={"array": "0.values"}))
    with pytest.raises(ModelError, match=r"expected an array of the file, got \{'array'"):
        load_states(path)


def test_believable_changes_are_found_by_the_checksum(path: Path) -> None:
    save_states(path, [recurrent()], {"model": "a"})
    altered(path, lambda document, _: document["layers"][0].update(offsets=[9]))
    with pytest.raises(ModelError, match="expected the checksum '[0-9a-f]{8}', got"):
        load_states(path)
    save_states(path, [recurrent()], {"model": "a"})
    altered(path, lambda document, arrays: arrays.update({"0.conv": arrays["0.conv"] + 1}))
    with pytest.raises(ModelError, match="expected the checksum"):
        load_states(path)
