"""A header is believed only where the file bears it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels import ModelError
from mlxmodels.safetensors_header import read_header

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def test_reads_what_mlx_writes(tmp_path: Path) -> None:
    tensors = {
        "a": mx.zeros((2, 3)),
        "b": mx.zeros((5,), dtype=mx.bfloat16),
        "c": mx.zeros((4, 4), dtype=mx.uint32),
        "scalar": mx.array(1.0),
    }
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors, {"format": "mlx"})
    entries = read_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    assert entries["b"].dtype == "BF16" and entries["b"].nbytes == 10


def test_an_empty_tensor_is_fine(tmp_path: Path) -> None:
    empty = {"dtype": "F16", "shape": [0, 7], "data_offsets": [24, 24]}
    assert read_header(write(tmp_path, {"a": GOOD, "b": empty}))["b"].nbytes == 0


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"not json", bytes(24), "its header is not JSON"),
        (b"\xff\xfe", bytes(24), "its header is not JSON"),
        ([], bytes(24), "its header is not a JSON object"),
        (b'{"a": 1, "a": 2}', bytes(24), "its header names something twice"),
        ({"a": 5}, bytes(24), "tensor 'a' is not described"),
        ({"a": GOOD | {"dtype": "F33"}}, bytes(24), "unknown dtype 'F33'"),
        ({"a": GOOD | {"shape": [2, -3]}}, bytes(24), "no valid shape"),
        ({"a": GOOD | {"shape": [2, 3.5]}}, bytes(24), "no valid shape"),
        ({"a": GOOD | {"shape": [2, 3] + [1] * 31}}, bytes(24), "no valid shape"),
        ({"a": GOOD | {"data_offsets": [0]}}, bytes(24), "no valid shape"),
        ({"a": {"dtype": "F32"}}, bytes(24), "no valid shape"),
        ({"a": GOOD | {"shape": [2, 4]}}, bytes(24), "claims 24 bytes"),
        ({"a": GOOD}, bytes(23), "it is cut short: 24 bytes of tensors, 23 are there"),
        ({"a": GOOD}, bytes(30), "6 bytes at its end belong to no tensor"),
        ({"a": GOOD, "b": GOOD}, bytes(48), "overlaps another or leaves a gap"),
        ({"a": GOOD | {"data_offsets": [8, 32]}}, bytes(32), "leaves a gap"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_header(write(tmp_path, header, data))
    assert reason in str(caught.value)
    assert "is damaged" in str(caught.value)


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(ModelError, match="cut short after 108 bytes"):
        read_header(file)
    with file.open("r+b") as sparse:
        sparse.write((200_000_000).to_bytes(8, "little"))
        sparse.truncate(300_000_000)
    with pytest.raises(ModelError, match="header claims 200,000,000 bytes"):
        read_header(file)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone.safetensors cannot be read"):
        read_header(tmp_path / "gone.safetensors")
