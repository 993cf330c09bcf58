"""Which code runs a model_type: a port of ours, else mlx-lm's, and nothing imported before need."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mlxmodels.errors import ModelError

NATIVE: Mapping[str, str] = {
    "gemma": "mlxmodels.gemma",
    "gemma2": "mlxmodels.gemma2",
    "nemotron": "mlxmodels.nemotron",
    "open-llama": "mlxmodels.open_llama",
    "recurrent_gemma": "mlxmodels.recurrent_gemma",
    "xglm": "mlxmodels.xglm",
}


def supported(model_type: str) -> Literal["native", "zoo"] | None:
    """Whether a model_type is a port of ours, one of mlx-lm's, or unknown; imports neither."""
    if model_type in NATIVE:
        return "native"
    # Its other files are parts of models.
    is_model = re.search(r"^(class|from .* import.*) Model\b", zoo_source(model_type), re.M)
    return "zoo" if is_model else None


def known(model_type: str) -> Literal["native", "zoo"]:
    """As `supported`.

    Raises:
        ModelError: nothing runs this family.
    """
    kind = supported(model_type)
    if kind is None:
        raise ModelError(
            f"models of the family {model_type!r} are not supported; Gryphon's own ports are "
            f"{', '.join(NATIVE)}; others run through mlx-lm if it knows them."
        )
    return kind


def zoo_source(model_type: str) -> str:
    """The source of mlx-lm's file for a model_type, empty if it has none; not run."""
    name = _zoo_aliases().get(model_type, model_type)
    if not name.replace("_", "").replace("-", "").isalnum():
        return ""
    try:
        return (_zoo_directory() / "models" / f"{name}.py").read_text(encoding="utf-8")
    except OSError:
        return ""


def model_classes(config: Mapping[str, Any]) -> tuple[type, type]:
    """Model and ModelArgs of a config; fits mlx_lm.utils.load_model(get_model_classes=...).

    Raises:
        ModelError: nothing runs this family.
    """
    model_type = config["model_type"]
    if known(model_type) == "native":
        module = import_module(NATIVE[model_type])
        return module.Model, module.ModelArgs
    from mlx_lm.utils import _get_classes  # costs most of a second: it imports transformers

    try:
        model, args = _get_classes(dict(config))
    except (Exception, SystemExit) as error:  # one of its modules ends the process when it cannot
        raise ModelError(
            f"mlx-lm cannot run models of the family {model_type!r} here: "
            f"{error or type(error).__name__}."
        ) from error
    return model, args


@cache
def _zoo_directory() -> Path:
    spec = find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        return Path("/nonexistent")
    return Path(spec.origin).parent


@cache
def _zoo_aliases() -> dict[str, str]:
    """mlx-lm's table of model types that share a file, read without running mlx-lm."""
    source = _zoo_directory() / "utils.py"
    if not source.is_file():
        return {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            return dict(ast.literal_eval(node.value))
    return {}
