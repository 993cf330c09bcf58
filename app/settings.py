"""Everything Gryphon reads from the environment, in one place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from app.errors import GryphonError

Kernels = Literal["auto", "metal", "reference"]


@dataclass(frozen=True)
class Settings:
    """Settings of this process, as `from_environment` finds them."""

    home: Path | None = None
    """GRYPHON_HOME: holds data, cache and state together; platform directories when unset."""

    api_key: str | None = None
    """GRYPHON_API_KEY: required of every REST request; unlike --api-key, no process list has it."""

    blas: str = "auto"
    """GRYPHON_BLAS: "auto" or "off"; Linux only, whether the engine preloads OpenBLAS."""

    kernels: Kernels = "auto"
    """GRYPHON_KERNELS: "auto" uses Metal kernels where they run and pass their self-check, "metal"
    insists on them, "reference" on plain MLX."""

    prompt_time_limit_s: float = 15.0
    """GRYPHON_PROMPT_TIME_LIMIT: seconds one prompt may take to render and tokenize."""

    prefix_cache_bytes: int | None = None
    """GRYPHON_PREFIX_CACHE_BYTES: memory for the states of earlier prompts and answers; 0 keeps
    none, None is a tenth of what is available once a model is loaded, at most 2 GiB."""

    prefix_disk_bytes: int | None = None
    """GRYPHON_PREFIX_DISK_BYTES: disk for the same, so that a restart finds it again; 0 keeps none
    there, None is a tenth of the free disk, at most 4 GiB."""

    memory_bytes: int | None = None
    """GRYPHON_MEMORY_BYTES: the most that weights, states, prefix cache and scratch may take
    together; None is what the machine has, less a reserve."""

    keep_alive_s: float | None = None
    """GRYPHON_KEEP_ALIVE: seconds a model stays in memory after its last request; 0 unloads it at
    once, a negative number or "inf" never. None leaves it to `app.settings_file`."""

    default_model: str | None = None
    """GRYPHON_MODEL: the installed model, or alias, that is used when none is named. None leaves it
    to `app.settings_file`."""

    engine_log_level: str = "warning"
    """GRYPHON_LOG: debug, info, warning or error; never includes prompt text."""

    codex_home: Path | None = None
    """CODEX_HOME: where Codex keeps its configuration, for `gryphon editor`."""

    claude_config_dir: Path | None = None
    """CLAUDE_CONFIG_DIR: where Claude Code keeps its settings, for `gryphon editor`."""

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the environment.

        Raises:
            GryphonError: "invalid_setting", naming the variable.
        """
        env = os.environ
        return cls(
            home=home(),
            api_key=env.get("GRYPHON_API_KEY") or None,
            blas=env.get("GRYPHON_BLAS", "auto"),
            kernels=_kernels(),
            prompt_time_limit_s=_seconds("GRYPHON_PROMPT_TIME_LIMIT", cls.prompt_time_limit_s),
            prefix_cache_bytes=_bytes("GRYPHON_PREFIX_CACHE_BYTES"),
            prefix_disk_bytes=_bytes("GRYPHON_PREFIX_DISK_BYTES"),
            memory_bytes=_bytes("GRYPHON_MEMORY_BYTES"),
            keep_alive_s=_keep_alive(),
            default_model=env.get("GRYPHON_MODEL") or None,
            engine_log_level=env.get("GRYPHON_LOG", "warning"),
            codex_home=_path("CODEX_HOME"),
            claude_config_dir=_path("CLAUDE_CONFIG_DIR"),
        )


def home() -> Path | None:
    """GRYPHON_HOME alone, for `app.paths`.

    Raises:
        GryphonError: "invalid_setting".
    """
    return _path("GRYPHON_HOME")


def _path(name: str) -> Path | None:
    text = os.environ.get(name, "")
    try:
        return Path(text).expanduser().absolute() if text else None
    except RuntimeError as error:
        raise GryphonError("invalid_setting", f"{name}={text}: {error}") from error


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise GryphonError(
            "invalid_setting", f"{name} must be a number of seconds, up to a day, got {text!r}."
        )
    return value


def _keep_alive() -> float | None:
    text = os.environ.get("GRYPHON_KEEP_ALIVE", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise GryphonError(
            "invalid_setting",
            f"GRYPHON_KEEP_ALIVE must be a number of seconds, negative for ever, got {text!r}.",
        )
    return value


def _bytes(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not (text.isascii() and text.isdigit()):
        raise GryphonError("invalid_setting", f"{name} must be a number of bytes, got {text!r}.")
    return int(text) if text else None


def _kernels() -> Kernels:
    text = os.environ.get("GRYPHON_KERNELS") or "auto"
    if text not in get_args(Kernels):
        raise GryphonError(
            "invalid_setting", f"GRYPHON_KERNELS must be auto, metal or reference, got {text!r}."
        )
    return cast(Kernels, text)


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment for a child of ours, with `extra` set on top."""
    return {**os.environ, **extra}
