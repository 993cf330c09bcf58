"""Compiles translation units with the system's g++, and loads them. Cached on disk by content."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx

_HERE = Path(__file__).parent
_SHIM = _HERE / "shim"
_RUNTIME = _HERE / "runtime"
MLX_HEADERS = Path(next(iter(mlx.__path__))) / "include"
_KEPT_SECONDS = 14 * 24 * 3600
_INCLUDES = ["-isystem", str(_SHIM), "-isystem", str(MLX_HEADERS)]

_KERNEL_FLAGS = [
    "-std=c++14",  # what Metal 3 is
    "-pedantic-errors",
    "-Werror=vla",
    "-Werror=uninitialized",
    "-Werror=return-type",
    "-fsingle-precision-constant",  # Metal has no double
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-gnu-unique",  # two kernels must not share their static data
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fmax-errors=8",
]
_CHECK_FLAGS = [
    "-O1",
    "-g",
    "-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow",
    "-ftrivial-auto-var-init=pattern",
    # A line of the kernel must stay one place in the code.
    "-fno-tree-tail-merge",
    "-fno-crossjumping",
    "-fno-thread-jumps",
    "-fno-optimize-sibling-calls",
]
_FAST_FLAGS = ["-O2", "-g", "-fwrapv"]


class CompileError(Exception):
    """The compiler's own words, with the kernel's line numbers."""


def build_kernel(source: str, *, check: bool) -> Path:
    """The shared library of a translation unit."""
    flags = [*_KERNEL_FLAGS, *_processor_flags(), *(_CHECK_FLAGS if check else _FAST_FLAGS)]
    runtime = build_runtime()
    key = _digest(source, " ".join(flags), _toolchain(), runtime.name)
    target = _cache() / f"kernel-{key}.so"
    if target.exists():
        return target
    prelude = _precompiled_prelude(tuple(flags))
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        unit, binary = Path(folder) / "kernel.cpp", Path(folder) / "kernel.o"
        unit.write_text(source)
        includes = ["-isystem", str(prelude), *_INCLUDES]
        _run([_gxx(), *flags, *includes, "-c", str(unit), "-o", str(binary)])
        shared = Path(folder) / "kernel.so"
        # Not through -fsanitize: the sanitizer's library stays away, the runtime has its functions.
        _run([_gxx(), "-shared", "-Wl,-Bsymbolic", str(binary), str(runtime), "-o", str(shared)])
        shared.replace(target)
    return target


@functools.cache
def _precompiled_prelude(flags: tuple[str, ...]) -> Path:
    """A folder with the shim and MLX's headers, parsed: half of a small kernel's time."""
    target = _cache() / f"prelude-{_digest(*flags, _toolchain())}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            built = Path(folder) / "built"
            built.mkdir()
            header = _SHIM / "mh_prelude.h"
            shutil.copy(header, built)
            output = str(built / "mh_prelude.h.gch")
            _run([_gxx(), *flags, *_INCLUDES, "-x", "c++-header", str(header), "-o", output])
            with contextlib.suppress(OSError):  # another process was faster
                built.rename(target)
    return target


@functools.cache
def build_runtime() -> Path:
    """The shared library that runs kernels and checks them."""
    sources = sorted(_RUNTIME.glob("*.cpp"))
    texts = [path.read_text() for path in (*sources, _RUNTIME / "runtime.h", _SHIM / "mh_abi.h")]
    flags = [
        "-std=c++17",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
        "-pthread",
    ]
    target = _cache() / f"runtime-{_digest(*texts, *flags, _toolchain())}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            shared = Path(folder) / "runtime.so"
            includes = [f"-I{_SHIM}", f"-I{_RUNTIME}"]
            _run([_gxx(), *flags, *includes, *map(str, sources), "-o", str(shared)])
            shared.replace(target)
    return target


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def resolve(path: Path, offsets: list[int]) -> list[list[tuple[str, int]]]:
    """For each offset in a library the places in the source it stands for, innermost first."""
    if not offsets:
        return []
    command = ["addr2line", "-a", "-i", "-e", str(path), *(hex(offset) for offset in offsets)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chains: list[list[tuple[str, int]]] = []
    for line in output.splitlines():
        if line.startswith("0x"):
            chains.append([])
            continue
        file, _, number = line.split(" (")[0].rpartition(":")
        chains[-1].append((os.path.basename(file), int(number) if number.isdigit() else 0))
    return chains


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise CompileError("\n".join(errors) or done.stderr or f"{command[0]} failed")


@functools.cache
def _gxx() -> str:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RuntimeError("[metal_host] runs on Linux on x86-64 only.")
    for tool in ("g++", "addr2line"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"[metal_host] needs {tool}; Debian has it in g++ and binutils.")
    return "g++"


@functools.cache
def _toolchain() -> str:
    """The compiler and every header that a kernel sees."""
    version = subprocess.run([_gxx(), "--version"], capture_output=True, text=True, check=True)
    kernels = MLX_HEADERS / "mlx" / "backend" / "metal" / "kernels"
    headers = [path for path in sorted(_SHIM.rglob("*")) if path.is_file()]
    headers += [kernels / "utils.h", kernels / "bf16.h", kernels / "defines.h"]
    return _digest(version.stdout, *(path.read_text() for path in headers))


@functools.cache
def _processor_flags() -> list[str]:
    known = Path("/proc/cpuinfo").read_text()
    return [f"-m{name}" for name in ("fma", "f16c") if f" {name} " in known]


@functools.cache
def _cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"gryphon-metal-host-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise RuntimeError(f"[metal_host] {path} belongs to somebody else.")
    for old in path.glob("*.so"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                old.unlink()
    return path


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
