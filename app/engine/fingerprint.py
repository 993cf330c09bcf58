"""A name for everything that decides what a model computes from tokens.

States kept on disk are of use to exactly the weights, the code and the device that made them, so
their directory is named after these (`app.engine.prefix_files`). Too many names cost time, one name
for two models would cost right answers: what is in doubt goes in.

Weights are not hashed whole: of 5 GB that takes seconds, at each load. A file is its path, inode,
size, and times of change to the nanosecond: the kernel sets the ctime at every write, and nothing
but the clock can set it back. Where a file system does not keep it, values from all over every
tensor, as loaded, tell one set of weights from another.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from app.engine.protocol import ModelRef
from app.settings import Settings
from mlxmodels.adapter_files import CONFIG_FILE, TENSORS_FILE
from mlxmodels.checkpoint import weight_files

if TYPE_CHECKING:
    from app.engine.resident import ResidentModel

_ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE)
# Of the layout of a file of states and of what its metadata says.
_FORMAT = 1
_TICK_S = 0.05
"""Of a kernel's clock for times of files, at most."""
_SAMPLE = 64
"""Values of each tensor."""


def weights_on_disk(ref: ModelRef) -> list[tuple[object, ...]]:
    """What identifies the files that a model's weights are in, an adapter's too, without reading
    them.

    A file that is being changed just now is waited for, a twentieth of a second: two changes within
    one tick of the file system's clock would look like one.

    Raises:
        ModelError, OSError: the files cannot be read.
    """
    found: list[tuple[object, ...]] = []
    files = weight_files(Path(ref.path))
    if ref.adapter:
        # Its config too: that says by how much the adapter's product is scaled.
        of_adapter = (Path(ref.adapter) / name for name in _ADAPTER_FILES)
        files = [*files, *filter(Path.exists, of_adapter)]
    for file in files:
        info = file.stat()
        age_s = time.time() - info.st_ctime_ns / 1e9
        if 0 <= age_s < _TICK_S:
            time.sleep(_TICK_S - age_s)
            info = file.stat()
        times = info.st_mtime_ns, info.st_ctime_ns
        found.append((str(file.resolve()), info.st_ino, info.st_size, *times))
    return found


def fingerprint(resident: ResidentModel) -> str | None:
    """Hexadecimal digits that no model shares whose states could differ.

    Returns:
        None if the files have changed since before the model was loaded from them.

    Raises:
        ModelError, OSError: the files cannot be read any more.
    """
    loaded = resident.loaded
    if resident.weight_files != weights_on_disk(resident.ref):
        return None
    parameters: dict[str, mx.array] = tree_flatten(loaded.model.parameters(), destination={})  # type: ignore[assignment]
    samples = [_sample(parameters[name]) for name in sorted(parameters)]
    mx.eval(samples)
    content = hashlib.sha256()
    for sample in samples:
        content.update(memoryview(sample))  # type: ignore[arg-type]  # a buffer
    # What the model was loaded as: dtypes and quantization, adapters, its window and other options.
    layout = [
        [name, str(parameters[name].dtype), list(parameters[name].shape)]
        for name in sorted(parameters)
    ]
    settings = Settings.from_environment()
    facts = {
        "format": _FORMAT,
        "code": _code(),
        "packages": [version(name) for name in ("mlx", "mlx-lm")],
        "device": _device(),
        "kernels": settings.kernels,
        "blas": settings.blas,
        "config": loaded.config,
        "parameters": layout,
        "samples": content.hexdigest(),
        "files": resident.weight_files,
    }
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sample(array: mx.array) -> mx.array:
    """Some values from all over a tensor."""
    flat = array.reshape(-1)
    return mx.contiguous(flat[:: max(1, flat.size // _SAMPLE)])


def _device() -> str:
    device = mx.default_device()
    if device.type == mx.DeviceType.gpu:
        return str(mx.device_info().get("device_name", "gpu"))
    return "cpu"


@functools.cache
def _code() -> str:
    """A hash of our own sources that compute states; mlx-lm's are told by its version."""
    digest = hashlib.sha256()
    for package in ("mlxmodels", "metal"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for root in spec.submodule_search_locations:
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".metal"):
                    digest.update(str(path.relative_to(root)).encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()
