"""The sentencepiece goldens as model directories."""

from __future__ import annotations

import base64
import json
import lzma
from pathlib import Path
from typing import Any

from mlxmodels.tokenizer import StreamingDetokenizer, Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizers"
TEXTS: list[str] = json.loads((GOLDEN / "texts.json").read_text())
FAMILIES = ["gemma", "open_llama", "open_llama_not_legacy", "nemotron", "xglm"]


def files_of(family: str) -> dict[str, bytes]:
    """A model directory of this family, with both kinds of tokenizer."""
    folder, _, variant = family.partition("_not_")
    suffix = f"_not_{variant}" if variant else ""
    (model,) = (GOLDEN / folder).glob("*.model")
    files = {"config.json": (GOLDEN / folder / "config.json").read_bytes()}
    for name in ("tokenizer", "tokenizer_config"):
        files[f"{name}.json"] = (GOLDEN / folder / f"{name}{suffix}.json").read_bytes()
    files[model.name] = model.read_bytes()
    if family == "xglm":  # the two files' common part
        characters = lzma.decompress((GOLDEN / "nmt_nfkc.bin.xz").read_bytes())
        files[model.name] += field(3, field(2, characters))  # normalizer_spec, precompiled_charsmap
        converted = json.loads(files["tokenizer.json"])
        text = base64.b64encode(characters).decode()
        converted["normalizer"]["normalizers"][0]["precompiled_charsmap"] = text
        files["tokenizer.json"] = json.dumps(converted).encode()
    return files


def field(number: int, value: bytes) -> bytes:
    """A field of bytes in protobuf's format."""
    size, length = len(value), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + value


def written(path: Path, files: dict[str, bytes], **changed: Any) -> Path:
    """A directory with these files; in those named, without ".json", keys are replaced."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    for name, values in changed.items():
        file = path / f"{name}.json"
        content = json.loads(file.read_bytes()) if file.is_file() else {}
        file.write_text(json.dumps(content | values))
    return path


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def lone_files(family: str) -> dict[str, bytes]:
    return without(files_of(family), "tokenizer.json")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamingDetokenizer(tokenizer)
    return [*[stream.add(id) for id in ids], stream.finish()]
