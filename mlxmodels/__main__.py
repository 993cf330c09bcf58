"""`python -m mlxmodels PATH`: what a model directory holds, without loading its weights."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxmodels import checkpoint, heads, registry
from mlxmodels.cache import RecurrentState, WindowCache
from mlxmodels.errors import ModelError
from mlxmodels.full_cache import FullCache
from mlxmodels.loading import build, building
from mlxmodels.safetensors_header import TensorEntry, read_header

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Print the description; 1 if the directory cannot be read, with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m mlxmodels", description=__doc__)
    parser.add_argument("path", type=Path, help="directory with config.json and *.safetensors")
    path = parser.parse_args(arguments).path
    try:
        facts = describe(path.expanduser())
    except ModelError as error:
        print(f"mlxmodels: {error}", file=sys.stderr)
        return 1
    for name, value in facts.items():
        print(f"{name:<13} {value}")
    return 0


def describe(path: Path) -> dict[str, str]:
    """Family, parameters, layers by type, state, quantization and heads of a model directory.

    Raises:
        ModelError: its config or its files cannot be read, or nothing runs its family.
    """
    config = checkpoint.read_config(path)
    registry.model_classes(config)
    tensors: dict[str, TensorEntry] = {}
    for file in checkpoint.weight_files(path):
        tensors |= read_header(file)
    family = config["model_type"]
    native = registry.supported(family) == "native"
    facts = {
        "family": f"{family} ({'own port' if native else 'mlx-lm'})",
        "parameters": f"{checkpoint.parameter_count(config, tensors):,}",
        "weights": f"{sum(entry.nbytes for entry in tensors.values()):,} bytes, "
        + _listed(Counter(entry.dtype for entry in tensors.values())),
        "quantization": _quantization(config, tensors),
    }
    if native:
        model = build(path, config, heads.BASE, len(tensors))
        facts["heads"] = _heads(model.args, tensors)
        facts |= _states(path, model, tensors)
    return facts


def _states(path: Path, model: Any, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Layers by the kind of their state, and its bytes.

    Shapes are known before anything is computed: a forward call is described and thrown away.
    """
    if model.bidirectional:
        return {"layers": f"{len(model.layers)} bidirectional", "state": "none: reads whole texts"}
    stored = Counter(entry.dtype for entry in tensors.values() if entry.dtype in _DTYPES)
    dtype = stored.most_common(1)[0][0] if stored else "F32"
    states = model.make_cache()
    with building(path):
        model.set_dtype(_DTYPES[dtype])
        model(mx.zeros((1, 1), dtype=mx.int32), cache=states)
    kinds = Counter(_kind(state) for state in states)
    fixed = sum(_fixed_bytes(state) for state in states)
    growing = sum(
        state.nbytes // state.keys.shape[2]
        for state in states
        if isinstance(state, FullCache) and state.keys is not None
    )
    return {
        "layers": _listed(kinds),
        "state": f"{growing:,} bytes per token and {fixed:,} fixed per sequence, {dtype}",
    }


def _fixed_bytes(state: Any) -> int:
    """Bytes that a state comes to and stays at; a ring has all its slots in the end."""
    if isinstance(state, WindowCache) and state.keys is not None:
        return state.nbytes // state.keys.shape[2] * state.window
    return 0 if isinstance(state, FullCache) else int(state.nbytes)


def _kind(state: object) -> str:
    if isinstance(state, WindowCache):
        return f"attention to {state.window} tokens"
    return "recurrent" if isinstance(state, RecurrentState) else "full attention"


def _quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str:
    layers = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not layers:
        return "none"
    described = config.get("quantization") or config.get("quantization_config")
    default = described if isinstance(described, dict) else {}
    kinds: Counter[str] = Counter()
    for layer in layers:
        own = default.get(layer)
        settings = {**default, **own} if isinstance(own, dict) else default
        kinds[
            f"{settings.get('mode', 'affine')} {settings.get('bits')}-bit in groups of "
            f"{checkpoint.group_size(config, layer)}"
        ] += 1
    return _listed(kinds)


def _heads(args: Any, tensors: Mapping[str, TensorEntry]) -> str:
    """What the files hold besides the decoder."""
    if "qa_outputs.weight" in tensors:
        return heads.QUESTION_ANSWERING
    if "score.weight" in tensors:
        has_bias = "score.bias" in tensors
        task = heads.TOKEN_CLASSIFICATION if has_bias else heads.SEQUENCE_CLASSIFICATION
        return f"{task}, {(*tensors['score.weight'].shape, 0)[0]} labels"
    if args.is_tied:
        return f"{heads.CAUSAL_LM}, tied to the embedding"
    return heads.CAUSAL_LM if "lm_head.weight" in tensors else f"none ({heads.BASE})"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
