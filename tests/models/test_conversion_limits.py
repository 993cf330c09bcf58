"""Conversions of checkpoints of any size: killed at random they end with the same bytes and write
nothing twice, and they take little memory. `scripts/prove` runs them on 2 GB."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels.checkpoint import weight_files
from mlxmodels.conversion import Request, convert
from mlxmodels.packing import Packing
from mlxmodels.shards import digest

from ..rounds import SCALE, rounds
from .conftest import GEMMA2, RECURRENT_GEMMA, build, byte_tokenizer, flat

LAYER = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64, "lru_width": 1024}
SMALL = {"hidden_size": 64, "intermediate_size": 128}
MEGABYTE = 1_000_000

Record = Callable[[str, object], None]


def random_checkpoint(path: Path, config: dict[str, Any], shard_bytes: int) -> Path:
    """A checkpoint in bfloat16 of random numbers."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    shapes = {name: value.shape for name, value in flat(build(config)).items()}
    part: dict[str, mx.array] = {}
    weight_map: dict[str, str] = {}

    def save() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        mx.save_safetensors(str(path / file), part)
        weight_map.update(dict.fromkeys(part, file))
        part.clear()

    mx.random.seed(0)
    numbers = {shape: mx.random.normal(shape).astype(mx.bfloat16) for shape in shapes.values()}
    for name, shape in shapes.items():
        part[name] = numbers[shape]  # the same in every layer: of no matter here, and quick
        if sum(value.nbytes for value in part.values()) > shard_bytes:
            save()
    save()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def request(path: Path, made: Path, shard_bytes: int, **asked: Any) -> Request:
    made.mkdir(exist_ok=True)
    return Request(path, made, Packing(**asked), shard_bytes)


def digests(path: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in path.iterdir()}


@pytest.mark.parametrize("number", rounds(1))
def test_killed_anywhere_it_ends_with_the_same_bytes_and_keeps_whole_files(
    tmp_path: Path, number: int, record_property: Record
) -> None:
    draw = random.Random(number)
    family = draw.choice([GEMMA2, RECURRENT_GEMMA])
    path = random_checkpoint(tmp_path / "source", family | SMALL, 20_000)
    asked = draw.choice([{"bits": 4, "group_size": 32}, {"mode": "mxfp4"}, {"dtype": "float16"}])
    shard_bytes = draw.randrange(4_000, 12_000)
    convert(request(path, tmp_path / "want", shard_bytes, **asked))
    want = digests(tmp_path / "want")
    text = request(path, tmp_path / "made", shard_bytes, **asked).to_json()
    kept = kills = 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlxmodels.conversion", text],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        lines = draw.randrange(1, 12)
        for line in child.stdout:
            event = json.loads(line)
            if "kept" in event:
                assert event["kept"] >= kept, "a whole file was written again"
                kept = event["kept"]
            lines -= 1
            if lines == 0:
                break
        child.kill()
        kills += 1
        child.communicate()
    assert kept > 0
    convert(request(path, tmp_path / "made", shard_bytes, **asked))
    assert digests(tmp_path / "made") == want
    record_property("kills", kills)
    record_property("files_kept", kept)


MEMORY = """
import re, resource, sys
from pathlib import Path
import psutil
from mlxmodels.conversion import Request, convert

def peak():
    try:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

convert(Request.from_json(sys.argv[1]))
before = psutil.Process().memory_info().rss
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports have one too
except OSError:
    before = peak()
convert(Request.from_json(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.parametrize("asked", [{"dtype": "float16"}, {"bits": 4}, {"mode": "mxfp4"}], ids=str)
def test_memory_stays_below_a_file_and_its_result(
    tmp_path: Path, asked: dict[str, Any], record_property: Record
) -> None:
    """What a process takes for a large checkpoint above what it took for a small one."""
    layers = min(4 * SCALE, 100)
    small = random_checkpoint(tmp_path / "small", GEMMA2 | SMALL, 20_000)
    total = layers * 21 * MEGABYTE
    config = GEMMA2 | LAYER | {"num_hidden_layers": layers}
    large = random_checkpoint(tmp_path / "large", config, total // 4)
    largest = max(file.stat().st_size for file in weight_files(large))
    requests = [
        request(path, tmp_path / f"{path.name}-made", total // 4, **asked).to_json()
        for path in (small, large)
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, *requests], capture_output=True, text=True, check=True
    )
    grown, made = int(done.stdout), tmp_path / "large-made"
    written = max(file.stat().st_size for file in made.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in weight_files(large))
    way = Packing(**asked).suffix
    record_property(f"{way}_source_MB", total // MEGABYTE)
    record_property(f"{way}_peak_MB", grown // MEGABYTE)
    record_property(f"{way}_allowed_MB", int(1.3 * (largest + written)) // MEGABYTE)
    print(
        way, grown // MEGABYTE, "MB grown;", largest // MEGABYTE, "in", written // MEGABYTE, "out"
    )
    assert grown < 1.3 * (largest + written)
    assert 1.3 * (largest + written) < total  # or else holding everything would pass
