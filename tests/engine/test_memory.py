"""How a model will be held, and whether it will be: from headers, before MLX opens a file."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlxmodels
from app import machine
from app.engine import memory
from app.engine.memory import MemoryBudget, plan_load
from app.errors import GryphonError
from app.machine import RESERVE_BYTES, SystemMemory, binary_bytes, system_memory
from app.settings import Settings
from app.settings_file import keep_alive_s
from mlxmodels.footprint import footprint

from ..tiny_models import OPEN_LLAMA, write_model

GIB = 1024**3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", OPEN_LLAMA)


def _quantized(path: Path) -> Path:
    """The same model at 4 bits, its head at 8 with another group size."""
    loaded = mlxmodels.load(path).model
    overrides = {"model.embed_tokens": {"group_size": 32, "bits": 8}}

    def how(name: str, module: nn.Module) -> bool | dict[str, int]:
        return hasattr(module, "to_quantized") and overrides.get(name, True)

    nn.quantize(loaded, 32, 4, class_predicate=how)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(loaded.parameters())), {"format": "mlx"}
    )
    config = OPEN_LLAMA | {"quantization": {"group_size": 32, "bits": 4, **overrides}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_plan_is_what_loading_then_takes(model: Path) -> None:
    plan = plan_load(_quantized(model), MemoryBudget())
    assert plan.dtype == mx.float32 and plan.note == "float32"
    assert mlxmodels.load(model, dtype=plan.dtype).nbytes == plan.footprint.weight_bytes


def test_weights_stay_as_stored_where_float32_does_not_fit(model: Path) -> None:
    path = _quantized(model)
    expanded = footprint(path, expand=True)
    plan = plan_load(path, MemoryBudget(expanded.least_bytes))
    assert plan.dtype == mx.float32
    plan = plan_load(path, MemoryBudget(expanded.least_bytes - 1))
    assert (plan.dtype, plan.footprint) == (None, footprint(path, expand=False))
    assert "slow" in plan.note and binary_bytes(expanded.least_bytes) in plan.note


def test_what_does_not_fit_is_refused_with_the_arithmetic(model: Path) -> None:
    """Weights alone would fit: without a context and a place to compute they are of no use."""
    needed = footprint(model, expand=True)
    for budget in (needed.weight_bytes - 1, needed.weight_bytes, needed.least_bytes - 1):
        with pytest.raises(GryphonError) as caught:
            plan_load(model, MemoryBudget(budget))
        assert caught.value.code == "does_not_fit"
        for count in (needed.weight_bytes, needed.state_bytes(256), budget, RESERVE_BYTES):
            assert binary_bytes(count) in caught.value.message
    plan_load(model, MemoryBudget(needed.least_bytes))


def test_the_budget_is_the_least_of_the_cap_the_machine_and_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have = SystemMemory(8 * GIB, 4 * GIB)
    monkeypatch.setattr(machine, "system_memory", lambda: have)
    held = mx.zeros((GIB // 64,), mx.uint32)
    mx.eval(held)
    others = pytest.approx(mx.get_active_memory(), rel=0.1)
    assert MemoryBudget().limit_bytes == 8 * GIB - RESERVE_BYTES
    assert MemoryBudget().now_bytes() - (4 * GIB - RESERVE_BYTES) == others
    assert MemoryBudget().now_bytes(for_running=True) - (4 * GIB - RESERVE_BYTES // 2) == others
    del held
    assert MemoryBudget(GIB).limit_bytes == MemoryBudget(GIB).now_bytes() == GIB
    have = SystemMemory(8 * GIB, 100)
    assert MemoryBudget(GIB).now_bytes() == 0


def test_on_a_gpu_its_working_set_is_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "system_memory", lambda: SystemMemory(16 * GIB, 15 * GIB))
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    working_set = {"max_recommended_working_set_size": 10 * GIB}
    monkeypatch.setattr(memory.mx, "device_info", lambda: working_set)
    assert MemoryBudget().now_bytes() == MemoryBudget().limit_bytes == 10 * GIB - RESERVE_BYTES


# The machine, as the kernel's files tell it.


class Machine:
    """A root directory with the files that are read."""

    def __init__(self, root: Path, cgroups: str) -> None:
        self.root = root
        self.write("proc/self/cgroup", cgroups)

    def write(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def read(self) -> SystemMemory:
        return system_memory(self.root)


@pytest.fixture(autouse=True)
def _physical(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        total = 64 * GIB
        available = 40 * GIB

    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Memory)


def test_without_cgroups_it_is_what_psutil_says(tmp_path: Path) -> None:
    assert system_memory(tmp_path) == SystemMemory(64 * GIB, 40 * GIB)


def test_a_cgroup_of_version_2_limits_it_and_file_pages_are_not_use(tmp_path: Path) -> None:
    here = Machine(tmp_path, "0::/user.slice/app.scope")
    here.write("sys/fs/cgroup/user.slice/app.scope/memory.max", 8 * GIB)
    here.write("sys/fs/cgroup/user.slice/app.scope/memory.current", 5 * GIB)
    here.write("sys/fs/cgroup/user.slice/app.scope/memory.stat", f"anon 1\ninactive_file {GIB}")
    here.write("sys/fs/cgroup/user.slice/memory.max", "max")
    here.write("sys/fs/cgroup/user.slice/memory.current", 6 * GIB)
    assert here.read() == SystemMemory(8 * GIB, 4 * GIB)


def test_a_parent_that_is_narrower_limits_it_too(tmp_path: Path) -> None:
    here = Machine(tmp_path, "0::/a/b")
    for group, limit, used in (("a/b", 8, 1), ("a", 4, 3)):
        here.write(f"sys/fs/cgroup/{group}/memory.max", limit * GIB)
        here.write(f"sys/fs/cgroup/{group}/memory.current", used * GIB)
    assert here.read() == SystemMemory(4 * GIB, GIB)


def test_in_a_container_the_path_is_the_hosts_and_the_mount_is_ours(tmp_path: Path) -> None:
    here = Machine(tmp_path, "0::/docker/0123abcd")
    here.write("sys/fs/cgroup/memory.max", 2 * GIB)
    here.write("sys/fs/cgroup/memory.current", 3 * GIB)
    assert here.read() == SystemMemory(2 * GIB, 0)


def test_a_cgroup_of_version_1_limits_it(tmp_path: Path) -> None:
    here = Machine(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/jobs/one\n0::/")
    directory = "sys/fs/cgroup/memory/jobs/one"
    here.write(f"{directory}/memory.limit_in_bytes", 3 * GIB)
    here.write(f"{directory}/memory.usage_in_bytes", 2 * GIB)
    here.write(f"{directory}/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
    here.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    here.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 50 * GIB)
    assert here.read() == SystemMemory(3 * GIB, GIB + GIB // 2)


def test_files_that_make_no_sense_limit_nothing(tmp_path: Path) -> None:
    here = Machine(tmp_path, "rubbish\n0::/a")
    here.write("sys/fs/cgroup/a/memory.max", "many")
    here.write("sys/fs/cgroup/a/memory.current", "")
    assert here.read() == SystemMemory(64 * GIB, 40 * GIB)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 KiB"), (1, "1 KiB"), (5 * 2**20, "5.0 MiB"), (GIB * 3 // 2, "1.5 GiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert binary_bytes(count) == text


def test_the_settings_are_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment().memory_bytes is None
    assert (Settings.from_environment().keep_alive_s, keep_alive_s()) == (None, 300)
    monkeypatch.setenv("GRYPHON_MEMORY_BYTES", "1048576")
    monkeypatch.setenv("GRYPHON_KEEP_ALIVE", "-1")
    assert Settings.from_environment().memory_bytes == 2**20
    assert Settings.from_environment().keep_alive_s == keep_alive_s() == -1
    for name, text in (("GRYPHON_MEMORY_BYTES", "8GiB"), ("GRYPHON_KEEP_ALIVE", "nan")):
        with monkeypatch.context() as patch, pytest.raises(GryphonError, match=name):
            patch.setenv(name, text)
            Settings.from_environment()
