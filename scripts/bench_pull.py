"""A pull against huggingface_hub's snapshot_download, from one hub on this machine.

    .venv/bin/python scripts/bench_pull.py                    # 1 GB in 4 shards, 5 pairs
    .venv/bin/python scripts/bench_pull.py --size 0.2 --shards 1 --pairs 3

The hub (tests/hub_server.py) is a process of its own. Each download is one too, into an empty
cache, and times itself from the first request to the last rename: interpreters start outside of
it. The two take turns, each first every other time. A ratio is snapshot_download's time over ours:
above 1 ours is faster. Ours computes the sha256 of every byte and syncs the files to the disk;
snapshot_download does neither. The status is 1 where the median misses the goal. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from measurement import machine  # isort: skip  (preloads the BLAS)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GOAL = 0.9

OURS = """
import json, sys, time
from app.library.hub import Hub
from app.library.pull import make_plan, pull

class Silent:
    def waiting(self): pass
    def progress(self, status): pass

began = time.perf_counter()
with Hub() as hub:
    pull(hub, make_plan(hub, "org/model"), Silent())
print(json.dumps([time.perf_counter() - began, time.process_time()]))
"""
THEIRS = """
import json, sys, time
from huggingface_hub import snapshot_download

began = time.perf_counter()
snapshot_download("org/model")
print(json.dumps([time.perf_counter() - began, time.process_time()]))
"""


def serve(size: int, shards: int, started: Connection) -> None:
    """Be the hub until the other end closes."""
    from tests.hub_server import running
    from tests.library.model_files import model_files

    files = model_files(shards=shards, size=1000)
    source = random.Random(0)
    for name in [name for name in files if name.endswith(".safetensors")]:
        files[name] = _grown(files[name], size // shards, source)
    with running() as hub:
        hub.add("org/model", files)
        for name, data in files.items():
            hub.etag(name, data)  # now, not in the first download
        started.send((hub.endpoint, sum(map(len, files.values()))))
        started.recv()


def _grown(file: bytes, size: int, source: random.Random) -> bytes:
    """The same tensor with `size` bytes of random data."""
    from tests.library.model_files import safetensors

    length = int.from_bytes(file[:8], "little")
    (name,) = (key for key in json.loads(file[8 : 8 + length]) if key != "__metadata__")
    block = source.randbytes(1 << 20)
    data = (block * (size // len(block) + 1))[: size // 2 * 2]
    return safetensors({name: ("F16", [len(data) // 2], data)})


def download(code: str, endpoint: str, directory: Path) -> tuple[float, float]:
    """Seconds it took, and processor seconds of its process."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(directory),
        "HF_HUB_CACHE": str(directory / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_TOKEN", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
        wall, processor = json.loads(done.stdout.splitlines()[-1])
        return wall, processor
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=1.0, help="GB in all; default: 1")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to download to; default: temporary")
    arguments = parser.parse_args()
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    here, there = multiprocessing.Pipe()
    size = int(arguments.size * 1e9)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(size, arguments.shards, there), daemon=True)
    process.start()
    endpoint, total = here.recv()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        place = Path(temporary) / "cache"
        for count in range(arguments.pairs):
            turns = [(ours, OURS), (theirs, THEIRS)]
            for times, code in turns if count % 2 == 0 else reversed(turns):
                times.append(download(code, endpoint, place))
    here.send("end")
    process.join()
    ratios = [b[0] / a[0] for a, b in zip(ours, theirs, strict=True)]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"\n{total / 1e9:.2f} GB in {arguments.shards} shards, {arguments.pairs} pairs\n")
    print("| | seconds, median | MB/s | processor seconds |\n|---|---|---|---|")
    for name, times in (("gryphon pull", ours), ("snapshot_download", theirs)):
        wall, used = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {wall:.2f} | {total / wall / 1e6:.0f} | {used:.2f} |")
    ratio = statistics.median(ratios)
    print(f"\nratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); the goal is {GOAL}")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
