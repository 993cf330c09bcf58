"""A model directory becomes a LoadedModel: config, strict weights, quantization, tokenizer."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmodels import checkpoint, heads, quantization, registry
from mlxmodels.checkpoint import listed
from mlxmodels.errors import ModelError
from mlxmodels.packing import Settings
from mlxmodels.tokenizer import Tokenizer, read_chat_template

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run and what is known about it."""

    model: nn.Module
    """mlx-lm's contract: model(inputs [B, T], cache=None) -> logits [B, T, V]; make_cache(). Ports
    of ours are a `heads.TaskModel`, which also has forward()."""
    config: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: str | None
    context_length: int | None
    """Tokens the model can hold at most; None if there is no hard limit."""
    trained_length: int | None
    """Tokens it was trained on, before any rotary scaling; None if the config does not say."""
    eos_token_ids: frozenset[int]
    family: str
    """The config's model_type."""
    nbytes: int
    """Bytes of the weights in memory."""

    def make_cache(self) -> list[Any]:
        """Empty layer states for one sequence, to pass as `cache` and keep."""
        if hasattr(self.model, "make_cache"):
            return list(self.model.make_cache())
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(self.model))

    def begin_prompt(self, caches: list[Any], tokens: int) -> None:
        """Announce how long the prompt is that the next calls read in chunks.

        A rotary base that depends on the length (Open-Llama's dynamic scaling) then is that of the
        whole prompt in every chunk. Other models take no notice.
        """
        if getattr(self.model, "rotates_by_length", False):
            for cache in caches:
                cache.prepare(lengths=[tokens])

    def end_prompt(self, caches: list[Any]) -> None:
        """Undo `begin_prompt`; before decoding, merging or saving the states."""
        if getattr(self.model, "rotates_by_length", False):
            for cache in caches:
                cache.finalize()


def load(
    path: str | Path, task: str = heads.CAUSAL_LM, *, dtype: mx.Dtype | None = None
) -> LoadedModel:
    """Load a model directory in Hugging Face or MLX layout.

    Args:
        path: Directory with config.json, *.safetensors and tokenizer.json or a sentencepiece model.
        task: The head to load: "causal-lm", "base", "sequence-classification",
            "token-classification" or "question-answering". mlx-lm's models have the first only.
        dtype: If given, every floating tensor is cast to it and quantized layers are expanded to
            it; None keeps what the files hold, or, if they hold several, what config.json names.
            float32 is the fast choice on a CPU.

    Raises:
        ModelError: anything about the directory that keeps it from being loaded, by name.
    """
    if task not in heads.TASKS:
        raise ModelError(f"unknown task {task!r}; known are {', '.join(heads.TASKS)}.")
    path = Path(path).expanduser()
    config = checkpoint.read_config(path)
    family = config["model_type"]
    registry.model_classes(config)  # or else refuse before reading anything
    files = checkpoint.weight_files(path)
    generation = checkpoint.read_optional_json(path / "generation_config.json")
    tokenizer = Tokenizer.from_directory(path)

    if registry.supported(family) == "native":
        model: nn.Module = _load_native(path, files, config, task, dtype)
    elif task == heads.CAUSAL_LM:
        model = _load_zoo(path, dtype)
    else:
        raise ModelError(
            f"models of the family {family!r} run through mlx-lm, which has no {task!r} head; "
            f"load them as {heads.CAUSAL_LM!r}."
        )

    # Layers draw initial weights that nobody evaluates. MLX's generator would keep the splits of
    # its key that they came from, all of them, for as long as the process lives.
    mx.eval(mx.random.state)
    trained, context = _lengths(model, config)
    return LoadedModel(
        model=model,
        config=config,
        tokenizer=tokenizer,
        chat_template=read_chat_template(path),
        context_length=context,
        trained_length=trained,
        eos_token_ids=checkpoint.eos_token_ids(generation, config) | tokenizer.eos_token_ids,
        family=family,
        nbytes=sum(value.nbytes for value in _parameters(model).values()),
    )


def load_lazily(path: str | Path) -> nn.Module:
    """A causal language model whose float weights are read when they are computed with.

    Raises:
        ModelError: as `load`.
    """
    path = Path(path)
    config = checkpoint.read_config(path)
    registry.model_classes(config)
    if registry.supported(config["model_type"]) != "native":
        return _load_zoo(path, None, lazy=True)
    files = checkpoint.weight_files(path)
    return _load_native(path, files, config, heads.CAUSAL_LM, None, lazy=True)


def _load_native(
    path: Path,
    files: list[Path],
    config: Mapping[str, Any],
    task: str,
    dtype: mx.Dtype | None,
    *,
    lazy: bool = False,
) -> nn.Module:
    weights: dict[str, mx.array] = {}
    for file in files:
        weights.update(_read_tensors(file))
    model = build(path, config, task, len(weights))
    weights = model.sanitize(weights)
    plan = quantization.layer_settings(config, weights)
    _check_dtypes(path, weights, plan)
    with building(path):
        if dtype is not None:
            weights = quantization.expanded(weights, plan, dtype)
        else:
            weights = _one_dtype(config, weights, plan)
            quantization.quantize_layers(model, plan)
    _check_head(path, config, task, model, weights)
    _check_names(path, model, weights)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


def build(path: Path, config: Mapping[str, Any], task: str, tensors: int) -> heads.TaskModel:
    """A port with no weights yet; nothing is computed.

    Args:
        path: The directory, for errors.
        tensors: How many its files hold.

    Raises:
        ModelError: the config describes a model that cannot be built, or another one.
    """
    model_class, args_class = registry.model_classes(config)
    with building(path):
        args = args_class.from_dict(config)  # type: ignore[attr-defined]
        if args.num_hidden_layers > max(64, tensors):  # building it would take for ever
            raise ModelError(
                f"config.json sets num_hidden_layers to {args.num_hidden_layers}, and {path} holds "
                f"{tensors} tensors in all; check that config.json belongs to it."
            )
        model: heads.TaskModel = model_class(args, task)
    return model


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Whatever a config makes the layers' constructors raise is the config's fault."""
    try:
        yield
    except ModelError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the config.json of {path} describes a model that cannot be built ({error}); "
            f"download it again."
        ) from error


def _check_dtypes(
    path: Path, weights: Mapping[str, mx.array], plan: Mapping[str, Settings]
) -> None:
    """MLX reads dtypes it does not have (float8) as integers, which would compute nonsense."""
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        if layer in plan and part == "weight":
            fits = value.dtype == mx.uint32
        elif layer in plan and part == "scales":
            fits = value.dtype == mx.uint8 or mx.issubdtype(value.dtype, mx.floating)
        else:
            fits = mx.issubdtype(value.dtype, mx.floating)
        if not fits:
            raise ModelError(
                f"{path} stores {name} as {str(value.dtype).removeprefix('mlx.core.')}, which is "
                f"no kind of weight this architecture has; use another build of the model."
            )


def _one_dtype(
    config: Mapping[str, Any],
    weights: dict[str, mx.array],
    plan: Mapping[str, Settings],
) -> dict[str, mx.array]:
    """Weights of several dtypes in the one that config.json names, else the embedding's.

    Products of mixed dtypes would silently run in the widest of them.
    """
    loose = {name: v for name, v in weights.items() if name.rpartition(".")[0] not in plan}
    if len({value.dtype for value in loose.values()}) < 2:
        return weights
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    if dtype is None:
        dtype = loose.get("model.embed_tokens.weight", next(iter(loose.values()))).dtype
    return weights | {name: value.astype(dtype) for name, value in loose.items()}


def _check_head(
    path: Path,
    config: Mapping[str, Any],
    task: str,
    model: nn.Module,
    weights: Mapping[str, mx.array],
) -> None:
    """Say so in the head's name when a checkpoint of one task is loaded for another."""
    head = [name for name in _parameters(model) if not name.startswith("model.")]
    missing = [name for name in head if name not in weights]
    if task == heads.CAUSAL_LM:
        others = [name for name in weights if name.startswith(("score.", "qa_outputs."))]
        missing = missing or head or ["lm_head.weight"] if others else []
    if not missing:
        return
    saved_as = config.get("architectures")
    origin = f"; it was saved as {saved_as[0]}" if isinstance(saved_as, list) and saved_as else ""
    raise ModelError(
        f"{path} has no {task} head ({listed(missing)}){origin}: load it for the task it was "
        f"trained for, or as {heads.BASE!r}."
    )


def _read_tensors(file: Path) -> dict[str, mx.array]:
    try:
        tensors = mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{file} cannot be read by MLX: {error}.") from error
    assert isinstance(tensors, dict)
    return tensors


def _check_names(path: Path, model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    expected = {name: value.shape for name, value in _parameters(model).items()}
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(
            f"{path} lacks weights of this architecture: {listed(missing)}; "
            f"download it again, or check that config.json belongs to it."
        )
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise ModelError(
            f"{path} holds weights this architecture does not have: {listed(extra)}; "
            f"check that config.json belongs to it."
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ModelError(
                f"{path} holds {name} of shape {weights[name].shape} where config.json means "
                f"{shape}; check that config.json belongs to it."
            )


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})  # type: ignore[return-value]


def _load_zoo(path: Path, dtype: mx.Dtype | None, *, lazy: bool = False) -> nn.Module:
    from mlx_lm.utils import dequantize_model, load_model

    try:
        model, _ = load_model(path, lazy, get_model_classes=registry.model_classes)
    except ModelError:
        raise
    except Exception as error:  # mlx-lm raises whatever its models raise
        raise ModelError(f"{path} could not be loaded by mlx-lm: {error}") from error
    if dtype is not None:
        model.set_dtype(dtype)  # first, or expanding would round to the dtype of the scales
        model = dequantize_model(model)
        model.set_dtype(dtype)  # and again: mxfp4, mxfp8 and nvfp4 expand to bfloat16
        mx.eval(model.parameters())
    loaded: nn.Module = model
    return loaded


def _lengths(model: nn.Module, config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Trained length and hard context length."""
    if isinstance(model, heads.TaskModel):
        trained = getattr(model.args, "max_position_embeddings", None)
        factor = getattr(model.args, "rope_factor", 1.0)
        return trained, None if trained is None else int(trained * factor)
    text = config.get("text_config")
    source = text if isinstance(text, dict) else config
    value = source.get("max_position_embeddings")
    trained = value if type(value) is int and value > 0 else None
    return trained, trained
