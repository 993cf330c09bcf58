"""`gryphon ps` and `gryphon doctor`: what runs, and what would be used."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys

import msgspec

from app import __version__, paths
from app.cli import kernels
from app.cli.terminal import one_line
from app.engine.client import EngineClient
from app.engine.protocol import EngineStatus, RequestStatus
from app.errors import GryphonError
from app.library.installed import find_model, installed_models
from app.machine import binary_bytes
from app.settings import Settings, child_environment

_PACKAGES = ("mlx", "mlx-lm", "textual", "fastapi", "huggingface_hub", "tokenizers")
_PROBE_TIMEOUT_S = 120


async def _status() -> EngineStatus | None:
    client = EngineClient()
    try:
        return await client.status()
    finally:
        await client.close()


def ps(arguments: argparse.Namespace) -> int:
    """Print what the running engine does; starts none."""
    status = asyncio.run(_status())
    if arguments.json:
        print(json.dumps(None if status is None else msgspec.to_builtins(status), indent=2))
    elif status is None:
        print("No engine is running. It starts with the first request of a chat, run or serve.")
    else:
        print(_describe(status))
    return 0


def _describe(status: EngineStatus) -> str:
    model = status.model.name if status.model else "no model"
    context = "unlimited" if status.context_length is None else f"{status.context_length} tokens"
    rows = [
        ("model", f"{model}, {status.state}"),
        ("requests", f"{status.running} running, {status.queued} queued"),
        ("memory", f"{binary_bytes(status.weight_bytes)} weights, "
         f"{binary_bytes(status.state_bytes)} state, {binary_bytes(status.prefix_bytes)} kept for "
         f"later requests, {binary_bytes(status.scratch_bytes)} for computing"),
        ("budget", f"{binary_bytes(_used(status))} of {binary_bytes(status.budget_bytes)} used"),
        ("process", f"{binary_bytes(status.active_bytes)} in MLX's arrays, "
         f"{binary_bytes(status.footprint_bytes)} resident in all"),
        ("context", context if status.model else "-"),
        ("device", f"{status.device}: {status.backend_note}"),
        ("engine", f"process {status.pid}, up {status.uptime_s:.0f} s, gryphon {status.gryphon}"),
    ]  # fmt: skip
    lines = [f"{name:<9} {one_line(value)}" for name, value in rows]
    return "\n".join([*lines, *_table(status.requests)])


def _table(requests: list[RequestStatus]) -> list[str]:
    """The requests under way, a line each, under a heading."""
    if not requests:
        return []
    cells: list[tuple[str, ...]] = [
        ("request", "client", "model", "phase", "prompt", "cached", "generated", "time")
    ]
    cells += [
        (
            *(one_line(text) for text in (one.id, one.client, one.model, one.phase)),
            *(str(n) for n in (one.prompt_tokens, one.cached_tokens, one.generated_tokens)),
            f"{one.seconds:.0f} s",
        )
        for one in requests
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return ["", *lines]


def _used(status: EngineStatus) -> int:
    """What counts against the engine's memory budget: the sum of the terms that are shown."""
    held = status.weight_bytes + status.state_bytes + status.prefix_bytes
    return held + status.scratch_bytes


def doctor(arguments: argparse.Namespace) -> int:
    """Print what Gryphon stands on, and exit with 1 when something keeps it from working."""
    if arguments.kernels:
        return kernels.doctor(_versions(), as_json=arguments.json)
    report = _collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for section, values in report.items():
            print(section if values else f"{section}\n  none")
            for name, value in values.items():
                print(f"  {name:<16} {one_line(str(value))}")
    return 1 if report["problems"] else 0


def _collect() -> dict[str, dict[str, object]]:
    from huggingface_hub import constants

    problems: dict[str, object] = {}
    compute = _probe()
    if "error" in compute:
        problems["compute"] = compute["error"]
    if (
        str(compute.get("blas")).startswith("slow path")
        and Settings.from_environment().blas != "off"
    ):
        problems["blas"] = compute["blas"]
    where: dict[str, object] = {}
    try:
        where = {
            "models": paths.models_dir(),
            "hub models": constants.HF_HUB_CACHE,
            "settings": paths.settings_file(),
            "chats": paths.history_path(),
            "cache": paths.cache_dir(),
            "engine log": paths.engine_log(),
            "engine socket": paths.engine_socket(),
        }
    except GryphonError as error:
        problems["directories"] = error.message
    models: dict[str, object] = {}
    try:
        models["installed"] = len(installed_models())
        models["default"] = find_model().name
    except GryphonError as error:
        models["default"] = error.message
    return {
        "versions": _versions(),
        "compute": compute,
        "packages": {name: _location(name) for name in ("app", "mlxmodels", "metal")},
        "directories": {name: str(path) for name, path in where.items()},
        "models": models,
        "problems": problems,
    }


def _versions() -> dict[str, object]:
    return {
        "gryphon": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _location(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return str(spec.origin) if spec is not None else "not found"


def _probe() -> dict[str, object]:
    """Device, BLAS and its speed as the engine would have them, measured in a child."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "app.engine.probe"],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            env=child_environment(),
        )
        answer: dict[str, object] = json.loads(done.stdout)
        return answer
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {"error": f"MLX cannot be started in a process of its own ({type(error).__name__})."}
