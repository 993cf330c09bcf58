"""A fast BLAS under MLX on Linux, without root or a compiler.

The `mlx-cpu` wheel links netlib's reference BLAS. MLX takes its few BLAS and LAPACK names from the
global scope when it is loaded, so a library that offers them there first, replaces them. The one
at hand, OpenBLAS from the `scipy-openblas32` wheel, prefixes every name with `scipy_`: we keep a
copy in the cache directory whose symbol table calls them what MLX does (`elf.py`).

`preload` must run before the first `import mlx.core`. Never touched on macOS, where MLX uses
Accelerate. Neither this module nor `elf` imports MLX.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app import paths
from app.engine.elf import ElfError, ElfLibrary
from app.errors import GryphonError
from app.settings import Settings

_PREFIX = "scipy_"
_PACKAGE = "scipy-openblas32"
_ESSENTIAL = "cblas_sgemm"
# cblas_sgemm, sgetrf_; not the C++ and C library names beside them.
_BLAS_NAME = re.compile(r"cblas_\w+|[a-z]\w*_")


@dataclass(frozen=True)
class Blas:
    """How matrix products will run on the CPU."""

    kind: Literal["openblas", "reference", "accelerate"]
    path: Path | None
    """The library to load before MLX, or None."""
    note: str
    """One line for people; says why and what to do when the path is the slow one."""


_loaded: Blas | None = None


def prepare() -> Blas:
    """Find or make the library that `preload` would load; loads nothing and raises nothing."""
    if sys.platform == "darwin":
        return Blas("accelerate", None, "Accelerate")
    if Settings.from_environment().blas == "off":
        return _slow("GRYPHON_BLAS=off", "unset it to use OpenBLAS")
    try:
        source = _packaged_library()
        if source is None:
            return _system_library() or _slow(
                f"{_PACKAGE} is not installed", f"pip install {_PACKAGE}"
            )
        library = _renamed_copy(source, _mlx_imports())
        version = importlib.metadata.version(_PACKAGE)
    except (ElfError, OSError, ImportError, GryphonError) as error:
        return _slow(f"OpenBLAS cannot be prepared ({error})", f"reinstall {_PACKAGE} and mlx-cpu")
    return Blas("openblas", library, f"OpenBLAS {_short(version)} ({_PACKAGE})")


def preload() -> Blas:
    """Put OpenBLAS into this process, before MLX is imported; later calls return the same.

    Raises nothing: without OpenBLAS, MLX runs on its own BLAS, and the note says why.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load(prepare())
    return _loaded


def provided_names() -> tuple[set[str], set[str]]:
    """BLAS and LAPACK names that MLX imports: those OpenBLAS provides, and the others.

    Raises:
        GryphonError, OSError, ElfError: either library is missing or damaged.
    """
    source = _packaged_library()
    if source is None:
        raise GryphonError("blas_not_installed", f"{_PACKAGE} is not installed.")
    offered = ElfLibrary(source.read_bytes()).defined()
    imported = {name for name in _mlx_imports() if _BLAS_NAME.fullmatch(name)}
    provided = {name for name in imported if _PREFIX + name in offered}
    return provided, imported - provided


def _load(blas: Blas) -> Blas:
    if blas.path is None:
        return blas
    if "mlx.core" in sys.modules:
        return _slow("MLX was imported before OpenBLAS", "call preload() first")
    if hasattr(ctypes.CDLL(None), _ESSENTIAL):
        return _slow(f"another library provides {_ESSENTIAL}", "start without LD_PRELOAD")
    try:
        library = ctypes.CDLL(str(blas.path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return _slow(f"OpenBLAS cannot be loaded ({error})", f"reinstall {_PACKAGE}")
    if _address(ctypes.CDLL(None)) != _address(library):
        return _slow("OpenBLAS was loaded but does not take effect", f"reinstall {_PACKAGE}")
    return blas


def _slow(reason: str, remedy: str) -> Blas:
    return Blas("reference", None, f"slow path: MLX's own BLAS, because {reason}; {remedy}")


def _short(version: str) -> str:
    """OpenBLAS's own version: 0.3.34 of 0.3.34.481.3."""
    return ".".join(version.split(".")[:3])


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library[_ESSENTIAL], ctypes.c_void_p).value


def _package_file(name: str, pattern: str) -> Path | None:
    """The first file of an installed package that fits, wherever a namespace package has its parts.

    MLX's own kernel cache, /tmp/mlx, is one of them for a script that was started in /tmp.
    """
    # find_spec runs no code of a top-level package.
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    files = (file for place in locations for file in sorted((Path(place) / "lib").glob(pattern)))
    return next(files, None)


def _packaged_library() -> Path | None:
    return _package_file("scipy_openblas32", "libscipy_openblas*.so*")


def _system_library() -> Blas | None:
    name = ctypes.util.find_library("openblas")
    return Blas("openblas", Path(name), f"OpenBLAS of the system ({name})") if name else None


def _mlx_imports() -> set[str]:
    """Names that MLX's library leaves undefined.

    Raises:
        GryphonError: MLX is not installed.
    """
    library = _package_file("mlx", "libmlx.so")
    if library is None:
        raise GryphonError("mlx_not_installed", "MLX's libmlx.so was not found.")
    return ElfLibrary(library.read_bytes()).undefined()


def _renamed_copy(source: Path, names: set[str]) -> Path:
    """The copy of `source` that exports `names` without prefix, made at the first call."""
    data = source.read_bytes()
    key = hashlib.sha256(data + "\n".join(sorted(names)).encode()).hexdigest()[:16]
    target = paths.cache_dir() / "blas" / key / "libopenblas-unprefixed.so"
    # Renaming keeps the size, so another size means a copy cut short by a full disk.
    if target.exists() and target.stat().st_size == len(data):
        return target
    library = ElfLibrary(data).export_without_prefix(_PREFIX, names)
    for directory in (target.parent.parent, target.parent):
        directory.mkdir(mode=0o700, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(library)
        os.replace(temporary, target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
