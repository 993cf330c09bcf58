"""What importing costs: counting tokens must not bring MLX, our ports must not bring mlx-lm."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import mlxmodels",
        "import mlxmodels.tokenizer",
        "import mlxmodels.safetensors_header",
        "from mlxmodels import ModelError, supported; supported('llama'); supported('nothing')",
    ],
)
def test_no_mlx_without_a_model(statement: str) -> None:
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "torch", "metal"}
    assert not imported_by(statement) & heavy


def test_our_ports_do_without_mlx_lm() -> None:
    loaded = imported_by(
        "import mlxmodels; mlxmodels.load; "
        "from mlxmodels import registry; registry.model_classes({'model_type': 'open-llama'}); "
        "registry.model_classes({'model_type': 'recurrent_gemma'})"
    )
    assert "mlx" in loaded and not loaded & {"mlx_lm", "transformers", "numpy"}


def test_unknown_names_are_attribute_errors() -> None:
    import mlxmodels

    with pytest.raises(AttributeError, match="nonsense"):
        _ = mlxmodels.nonsense
