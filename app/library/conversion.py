"""Convert a checkpoint to MLX: look at it, then write, check and install the result.

The work is done by child processes (`mlxmodels.conversion`, `app.library.gguf_conversion`) in a
directory beside the target that keeps its name, `.NAME.partial-convert`, so that the next run finds
what an interrupted one had ready. The finished model appears by one rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from app import __version__, paths
from app.errors import GryphonError
from app.library import child
from app.library.disk import file_error, free_bytes
from app.library.embedded import NAME as EMBEDDED_NAME
from app.library.file_lock import locked
from app.library.installed import (
    InstalledModel,
    find_model,
    find_place,
    read_model,
)
from mlxmodels import float_checkpoint, packing
from mlxmodels.errors import ModelError
from mlxmodels.packing import Packing
from mlxmodels.safetensors_header import TensorEntry
from mlxmodels.shards import SHARD_BYTES

RECORD = "conversion.json"
"""In the result: what it was made of, and how."""

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,120}", re.ASCII)
_SPARE_BYTES = 100_000_000


class Report(Protocol):
    """Hears how a conversion is doing. May raise to cancel it."""

    def waiting(self) -> None:
        """Another conversion to the same place is running; called again and again."""

    def converting(self, done: int, total: int) -> None:
        """Bytes of the result that are written."""

    def kept(self, shards: int, of: int) -> None:
        """Files of the result that are whole and outlive an interruption."""


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion would make."""

    asked: str
    """The source, as it was named."""
    source: Path
    """A directory, or a GGUF file. Need not exist yet."""
    source_bytes: int
    target: Path
    packing: Packing
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    """Of the result, as far as one can tell before the model is built."""
    origin: dict[str, Any]
    """For the record: where the source is from."""
    license: str | None = None
    shard_bytes: int = SHARD_BYTES
    """Of weights in a file of the result."""

    @property
    def name(self) -> str:
        """What the result is called."""
        return self.target.name

    @property
    def result_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_gguf(self) -> bool:
        return self.source.suffix == ".gguf"

    @property
    def staging(self) -> Path:
        return self.target.with_name(f".{self.name}.partial-convert")

    @property
    def here_bytes(self) -> int:
        """What an interrupted conversion left, of whatever settings."""
        files = self.staging.rglob("*") if self.staging.is_dir() else ()
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def work_bytes(self) -> int:
        """What the disk must hold for it, beside the source."""
        floats = self.source_bytes if self.is_gguf and self.packing != Packing() else 0
        return self.result_bytes + floats

    @property
    def free_bytes(self) -> int:
        return free_bytes(self.target.parent)

    @property
    def installed(self) -> bool:
        """Something is there already."""
        return os.path.lexists(self.target)


def shard_bytes_asked(asked: int | None) -> int:
    """
    Raises:
        GryphonError: "usage".
    """
    if asked is not None and asked < 1:
        raise GryphonError("usage", f"--shard-bytes must be at least 1, got {asked}.")
    return asked or SHARD_BYTES


def packing_asked(**asked: Any) -> Packing:
    """
    Raises:
        GryphonError: "usage", for settings without sense.
    """
    try:
        return Packing(**asked)
    except ModelError as error:
        sentence = str(error)
        raise GryphonError("usage", sentence[:1].upper() + sentence[1:]) from error


def make_plan(source: str, packing: Packing, out: str | None = None) -> ConversionPlan:
    """Look at a source on this machine: a directory, an installed model's name or a GGUF file.

    Raises:
        GryphonError: "model_not_found"; "invalid_model" and "unsupported_model" for what is damaged
            or cannot be converted; "usage" for a name that none can have.
    """
    path, base = _find(source)
    target = target_of(out, f"{base}-{packing.suffix}")
    try:
        if path.suffix == ".gguf" and path.is_file():
            from app.library import gguf_conversion

            config, tensors = gguf_conversion.expected(path, packing)
            size = path.stat().st_size
        else:
            if not path.is_dir():
                float_checkpoint.refuse_other_forms(path)
            held = float_checkpoint.read(path)
            config, tensors = expected(str(path), held.config, held.tensors, packing)
            size = sum(tensor.nbytes for tensor in held.tensors.values())
    except ModelError as error:
        raise GryphonError("unsupported_model", str(error)) from error
    except OSError as error:
        raise GryphonError(
            "invalid_model", f"{path} cannot be read: {error.strerror or error}."
        ) from error
    return ConversionPlan(source, path, size, target, packing, config, tensors, {"source": source})


def expected(
    name: str, config: dict[str, Any], tensors: dict[str, TensorEntry], asked: Packing
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """config.json and tensors of the result, about.

    Raises:
        GryphonError: "unsupported_model" when the weights are quantized already.
    """
    try:
        float_checkpoint.refuse_packed(name, config, tensors)
    except ModelError as error:
        raise GryphonError("unsupported_model", str(error)) from error
    return packing.expected(config, tensors, asked)


def target_of(out: str | None, default: str) -> Path:
    """Where the result goes: a name is one of Gryphon's own models, else it is a directory.

    Raises:
        GryphonError: "usage".
    """
    name = default if out is None else out
    if out is not None and (os.sep in out or out.startswith((".", "~"))):
        target = Path(os.path.abspath(os.path.expanduser(out)))
        if not target.parent.is_dir():
            raise GryphonError("usage", f"There is no directory {target.parent} for {target.name}.")
        if not target.name:
            raise GryphonError("usage", f"{out!r} is no place for a new directory.")
        return target
    if not _NAME.fullmatch(name) or name in (EMBEDDED_NAME, "adapters"):
        raise GryphonError(
            "usage",
            f"{name!r} cannot be the name of a converted model. Choose another with --out: "
            "letters, digits, '.', '_' and '-', or the path of a directory.",
        )
    return paths.models_dir() / name


def refuse_taken(plan: ConversionPlan) -> None:
    """
    Raises:
        GryphonError: "target_exists".
    """
    if plan.installed:
        made = read_record(plan.target).get("source")
        was = f", made from {made}" if made else ""
        raise GryphonError(
            "target_exists",
            f"{plan.target} exists already{was}, and nothing is overwritten. `gryphon rm "
            f"{plan.name}` removes an installed model; --out NAME gives the result another place.",
        )


def check_free_space(plan: ConversionPlan, besides: int = 0) -> None:
    """
    Args:
        besides: Bytes that the same disk must hold, too.

    Raises:
        GryphonError: "disk_full".
    """
    missing = plan.work_bytes + besides - plan.here_bytes + _SPARE_BYTES
    free = plan.free_bytes
    if missing > free:
        raise GryphonError(
            "disk_full",
            f"Making {plan.name} takes {missing / 1e9:.2f} GB more, and the disk of "
            f"{plan.target.parent} has {free / 1e9:.2f} GB free. Free some space, or set "
            "GRYPHON_HOME to another disk.",
        )


def convert(plan: ConversionPlan, report: Report, shard_bytes: int = SHARD_BYTES) -> InstalledModel:
    """Make and install the result.

    Raises:
        GryphonError: "target_exists", "disk_full", "unsupported_model", "invalid_model",
            "conversion_failed" …; what is whole of the result is kept for the next run.
    """
    refuse_taken(plan)
    lock = plan.target.with_name(f".{plan.name}.lock")
    try:
        with locked(lock, report.waiting):
            refuse_taken(plan)
            check_free_space(plan)
            made = _made(plan, report)
            _describe(plan, made)
            model = read_model(made, plan.name, "gryphon")
            made.rename(plan.target)
            shutil.rmtree(plan.staging)
            lock.unlink(missing_ok=True)
    except OSError as error:
        raise _file_error(plan, error) from error
    source = model.source if plan.target.parent == paths.models_dir() else "path"
    return read_model(plan.target, plan.name, source)


def read_record(target: Path) -> dict[str, Any]:
    """What a converted model was made of; empty for any other directory."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return {}


def _made(plan: ConversionPlan, report: Report) -> Path:
    """The finished directory, in the staging directory."""
    made = plan.staging / "model"
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _fill(made, plan, report)
    except GryphonError:
        if not any(plan.staging.rglob("*.safetensors")):  # refused: there is nothing to go on from
            shutil.rmtree(plan.staging)
        raise
    return made


def _fill(made: Path, plan: ConversionPlan, report: Report) -> None:
    source = plan.source
    if plan.is_gguf:
        floats = made if plan.packing == Packing() else plan.staging / "floats"
        floats.mkdir(mode=0o700, exist_ok=True)
        _run(
            "app.library.gguf_conversion",
            [str(source), str(floats), "llama", str(plan.shard_bytes)],
            plan,
            report,
        )
        source = floats
        if floats == made:
            return
    request = {
        "source": str(source),
        "destination": str(made),
        "packing": asdict(plan.packing),
        "shard_bytes": plan.shard_bytes,
    }
    _run("mlxmodels.conversion", [json.dumps(request)], plan, report)


def _run(module: str, arguments: list[str], plan: ConversionPlan, report: Report) -> None:
    failure: GryphonError | None = None

    def hear(event: dict[str, Any]) -> None:
        nonlocal failure
        if "message" in event:
            failure = GryphonError(event.get("code", "unsupported_model"), event["message"])
        elif "done" in event:
            report.converting(event["done"], event["total"])
        elif "kept" in event:
            report.kept(event["kept"], event["shards"])

    reason = child.run(module, arguments, plan.staging / "child.log", hear)
    if failure is None and reason is not None:
        free = plan.free_bytes / 1e9
        failure = GryphonError(
            "conversion_failed",
            f"{plan.asked} could not be converted ({reason}). {free:.1f} GB of disk are free. What "
            "is whole of the result is kept; the same command goes on from there.",
        )
    if failure is not None:
        raise failure


def _describe(plan: ConversionPlan, made: Path) -> None:
    record = plan.origin | {"made": plan.packing.describe(), "by": f"Gryphon {__version__}"}
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = made / "README.md"
    if not card.exists():  # that of a GGUF has its licence
        front_matter = f"---\nlicense: {plan.license}\n---\n" if plan.license else ""
        text = f"{front_matter}# {plan.name}\n\nConverted from `{plan.asked}` by Gryphon: "
        card.write_text(f"{text}{plan.packing.describe()}.\n", encoding="utf-8")


def _find(source: str) -> tuple[Path, str]:
    """Its path, and the first part of the result's name."""
    if place := find_place(source):
        path, name, _ = place
        return path, re.sub(r"[^\w.-]", "-", name.rpartition("/")[2])
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.exists():
        name = path.stem if path.is_file() else path.name
        return path, re.sub(r"[^\w.-]", "-", name)
    if source.count("/") == 1 and not source.startswith((".", "~", "/")):
        raise GryphonError(
            "model_not_found",
            f"{source} is neither installed nor a directory. `gryphon pull {source} -q 4` fetches "
            "it from the Hugging Face Hub and converts it.",
        )
    model = find_model(source)  # raises what to do, or finds one with an adapter on it
    raise GryphonError(
        "unsupported_model",
        f"{model.name} is a model with an adapter on it, which is not converted. Convert its base "
        f"{model.base}, then put the adapter on the result.",
    )


def _file_error(plan: ConversionPlan, error: OSError) -> GryphonError:
    failure = file_error(plan.target.parent, plan.name, error)
    if failure.code == "disk_full":
        return GryphonError(
            "disk_full",
            f"The disk of {plan.target.parent} ran full. What is whole of {plan.name} is kept: "
            "free some space, then the same command goes on from there.",
        )
    return GryphonError(
        "no_write_permission",
        f"{plan.name} cannot be written to {plan.target.parent}: {error.strerror or error}. Make "
        "it writable, or choose another place with --out.",
    )
