"""OpenBLAS in place of the reference BLAS: taken by MLX, right, reused, and never fatal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine import blas
from app.engine.elf import ElfError, ElfLibrary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

# Multiplies with MLX and reports whose cblas_sgemm stands in libmlx's global offset table.
PROBE = """
import ctypes, json, struct, sys
from pathlib import Path
from app.engine import blas
from app.engine.elf import ElfLibrary
result = blas.preload()
assert blas.preload() is result
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
a, b = (rng.standard_normal(s).astype(np.float32) for s in ((37, 101), (53, 101)))
error = float(np.abs(np.array(mx.array(a) @ mx.array(b).T) - a.astype(np.float64) @ b.T).max())
square = a[:37, :37] @ a[:37, :37].T + np.eye(37, dtype=np.float32)
with mx.stream(mx.cpu):
    factor = np.array(mx.linalg.cholesky(mx.array(square)))
error = max(error, float(np.abs(factor @ factor.T - square).max()))

maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
mapped = [(int(m[0].split("-")[0], 16), int(m[0].split("-")[1], 16), m[5]) for m in maps if m[5:]]
mlx_base, _, mlx_path = min(m for m in mapped if m[2].endswith("libmlx.so"))
mlx_elf = ElfLibrary(Path(mlx_path).read_bytes())
wanted = next(s.index for s in mlx_elf.symbols if s.name == "cblas_sgemm")
slots = [
    slot
    for section in mlx_elf._sections if section.kind == 4  # SHT_RELA
    for slot, info, _ in struct.iter_unpack(
        "<QQq", mlx_elf.data[section.offset : section.offset + section.size])
    if info >> 32 == wanted
]
address = ctypes.c_uint64.from_address(mlx_base + slots[0]).value
owner = next(path for start, end, path in mapped if start <= address < end)
print(json.dumps({"kind": result.kind, "note": result.note, "path": str(result.path),
                  "owner": owner, "error": error}))
"""


def probe(home: Path, code: str = PROBE, **environment: str) -> dict[str, object]:
    clean = {k: v for k, v in os.environ.items() if k not in ("GRYPHON_BLAS", "LD_PRELOAD")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "GRYPHON_HOME": str(home), **environment},
        cwd=Path(blas.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, object] = json.loads(finished.stdout)
    return result


def test_mlx_takes_its_matrix_product_from_our_copy_below_a_path_with_spaces(
    tmp_path: Path,
) -> None:
    home = tmp_path / "a home with spaces"
    result = probe(home)
    assert result["kind"] == "openblas", result["note"]
    assert result["owner"] == result["path"]
    assert Path(str(result["path"])).is_relative_to(home)
    assert float(str(result["error"])) < 1e-4
    assert Path(str(result["path"])).stat().st_mode & 0o777 == 0o600


def test_the_second_process_reuses_the_copy(tmp_path: Path) -> None:
    path = Path(str(probe(tmp_path)["path"]))
    before = path.stat().st_mtime_ns
    assert probe(tmp_path)["path"] == str(path)
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_copy_cut_short_is_made_again(tmp_path: Path) -> None:
    path = Path(str(probe(tmp_path)["path"]))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert probe(tmp_path)["kind"] == "openblas"
    assert path.read_bytes() == whole


def test_switched_off(tmp_path: Path) -> None:
    result = probe(tmp_path, GRYPHON_BLAS="off")
    assert result["kind"] == "reference"
    assert "GRYPHON_BLAS" in str(result["note"])
    assert "mlx_cpu.libs" in str(result["owner"])
    assert not (tmp_path / "cache" / "blas").exists()


@pytest.mark.parametrize("content", [b"", b"not a library", None], ids=["empty", "text", "cut"])
def test_a_damaged_openblas_leaves_mlx_working(tmp_path: Path, content: bytes | None) -> None:
    source = blas._packaged_library()
    assert source is not None
    broken = tmp_path / "libscipy_openblas.so"
    broken.write_bytes(source.read_bytes()[:100_000] if content is None else content)
    code = PROBE.replace(
        "result = blas.preload()",
        f"blas._packaged_library = lambda: Path({str(broken)!r}); result = blas.preload()",
        1,
    )
    result = probe(tmp_path / "home", code)
    assert result["kind"] == "reference"
    assert "slow path" in str(result["note"])
    assert float(str(result["error"])) < 1e-4


def test_absent_openblas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRYPHON_BLAS", raising=False)
    monkeypatch.setattr(blas, "_packaged_library", lambda: None)
    monkeypatch.setattr(blas, "_system_library", lambda: None)
    result = blas.prepare()
    assert result.kind == "reference"
    assert "pip install scipy-openblas32" in result.note


def test_unwritable_cache_is_a_note_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GRYPHON_BLAS", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "file"))
    assert "cannot be prepared" in blas.prepare().note


def test_preloading_after_mlx_says_so(tmp_path: Path) -> None:
    code = "import mlx.core\n" + PROBE
    assert "MLX was imported before" in str(probe(tmp_path, code)["note"])


def test_macos_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.prepare() == blas.Blas("accelerate", None, "Accelerate")


def test_every_blas_name_that_mlx_imports_is_provided() -> None:
    provided, missing = blas.provided_names()
    assert {"cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "sgetrf_", "ssyevd_"} <= provided
    assert not missing


def test_only_the_wanted_names_lose_their_prefix() -> None:
    source = blas._packaged_library()
    assert source is not None
    original = ElfLibrary(source.read_bytes())
    renamed = ElfLibrary(original.export_without_prefix("scipy_", {"cblas_sgemm"}))
    assert renamed.defined() ^ original.defined() == {"cblas_sgemm", "scipy_cblas_sgemm"}
    assert [s.value for s in renamed.symbols] == [s.value for s in original.symbols]
    with pytest.raises(ElfError, match="defines no symbol"):
        original.export_without_prefix("scipy_", {"no_such_name"})


def test_mlx_is_found_behind_a_directory_of_its_name(tmp_path: Path) -> None:
    """MLX caches kernels in /tmp/mlx, which a script in /tmp sees as part of the package."""
    (tmp_path / "mlx").mkdir()
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from app.engine import blas\n"
        "assert 'cblas_sgemm' in blas._mlx_imports()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
