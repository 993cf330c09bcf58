"""What a model takes in memory, from its config.json and safetensors headers, without MLX.

Three terms: weights as they will be held, the states of the sequences that run, and the scratch of
one forward call. Bytes of weights and states are exact for our ports and for those of mlx-lm's
models whose layers all keep keys and values in the usual way (`basis` "formula"). For its other
models every layer is taken to keep all keys and values, which is too much for most ("estimate"),
until `of_states` has looked at their states after a first token ("measured").

Scratch is a bound: `scratch_bytes` is 1 to `SCRATCH_FACTOR` times what mlx 0.32 takes on a CPU for
models 256 channels wide and up; tests/models/test_footprint.py measures it. Not yet calibrated on
an Apple GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlxmodels.checkpoint import parameter_count, read_config, weight_files
from mlxmodels.errors import ModelError
from mlxmodels.registry import zoo_source
from mlxmodels.safetensors_header import TensorEntry, read_header

SCRATCH_FACTOR = 8.0
"""Scratch is at most this many times what a forward call really takes; see the module."""

SLOT_STEP = 256
"""Keys and values grow by this many tokens at a time, ours and mlx-lm's."""

MIN_CONTEXT = 256
"""Tokens of context without which a model is of no use."""

MIN_CHUNK = 16
"""Tokens that are read at a time when memory is short."""

Basis = Literal["formula", "estimate", "measured"]

_MAX_LAYERS = 10_000
_FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_CONFIG_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# Head dims for which MLX's attention on a GPU computes a prompt without a matrix of scores.
_FUSED_HEAD_DIMS = (64, 80, 128)
# Modules of mlx-lm that do not change what its models keep of a token.
_PLAIN_PARTS = {"base", "activations", "rope_utils", "switch_layers", "pipeline"}
# A logit is float32; so are its softmax, what filters sort and sum, and the changed copies of it.
_LOGIT_COPIES = 8

# What the families of our own take where config.json is silent; tests compare with their ModelArgs.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "nemotron": {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
    },
    "open-llama": {
        "vocab_size": 100000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "recurrent_gemma": {
        "vocab_size": 256000,
        "hidden_size": 2560,
        "intermediate_size": 7680,
        "num_hidden_layers": 26,
        "num_attention_heads": 10,
        "conv1d_width": 4,
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "xglm": {
        "vocab_size": 256008,
        "d_model": 1024,
        "ffn_dim": 4096,
        "num_layers": 24,
        "attention_heads": 16,
    },
}

_ALIASES = {
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "attention_heads", "n_head", "n_heads"),
    "attention_window_size": ("attention_window_size", "sliding_window"),
    "sliding_window": ("sliding_window", "sliding_window_size"),
    "block_types": ("block_types", "_block_types"),
}


@dataclass(frozen=True)
class Slots:
    """Keys and values of layers of one kind."""

    bytes_per_token: int
    """Of one token in all these layers together."""
    layers: int
    window: int | None = None
    """Tokens kept at most; None keeps all."""

    def held(self, tokens: int) -> int:
        """Tokens that there is room for once so many have been read."""
        slots = -(-tokens // SLOT_STEP) * SLOT_STEP
        return slots if self.window is None else min(slots, self.window)


@dataclass(frozen=True)
class Widths:
    """Channels that a forward call computes for each token, in the widest layer."""

    hidden: int
    mlp: int
    heads: int
    head_dim: int
    kv_heads: int
    recurrent: int
    vocab: int


@dataclass(frozen=True)
class Footprint:
    """Bytes that one model takes. Sequences are rows of one batch, padded to the longest."""

    basis: Basis
    parameters: int
    stored_bytes: int
    """Its weights as its files hold them."""
    weight_bytes: int
    """Its weights as they will be held."""
    loading_bytes: int
    """The most that weights take while they are loaded: both forms, where they are expanded."""
    item_bytes: int
    """Of one number in keys, values and activations."""
    slots: tuple[Slots, ...]
    fixed_bytes: int
    """State of one row that does not depend on its length."""
    widths: Widths
    has_scores: bool
    """Whether attention holds a matrix of scores while a prompt is read."""
    is_ours: bool
    """Whether a port of ours runs it; else one of mlx-lm's models."""

    @property
    def bytes_per_token(self) -> int:
        """What a token adds to a row's state where no window is full."""
        return sum(kind.bytes_per_token for kind in self.slots if kind.window is None)

    def state_bytes(self, tokens: int, rows: int = 1) -> int:
        """Layer states of rows of which the longest has read so many tokens.

        Of one row exact, of more a bound: a batch has room for the next token; those of mlx-lm grow
        by a step from wherever they are.
        """
        if tokens <= 0 or rows <= 0:
            return 0
        if rows > 1:
            tokens += 1 if self.is_ours else SLOT_STEP
        slots = sum(kind.bytes_per_token * kind.held(tokens) for kind in self.slots)
        return rows * (slots + self.fixed_bytes)

    def scratch_bytes(self, chunk: int, tokens: int, rows: int = 1) -> int:
        """What one forward call holds beside weights and states.

        Args:
            chunk: Tokens of each row in this call.
            tokens: Those of the longest row when it ends.
            rows: Of the batch.
        """
        w, item, count = self.widths, self.item_bytes, chunk * rows
        channels = 8 * w.hidden + 4 * w.mlp + 2 * (w.heads + 2 * w.kv_heads) * w.head_dim
        total = count * (channels * item + 40 * w.recurrent)
        keys = max((self._seen(kind, chunk, tokens) for kind in self.slots), default=0)
        if self.has_scores:
            total += count * w.heads * keys * 4 + chunk * keys
        # One layer's states are there twice while they are written, rings once more in order.
        for kind in self.slots:
            copies = 2 if kind.window is None else 4
            layer = kind.bytes_per_token // max(1, kind.layers)
            total += rows * copies * layer * self._seen(kind, chunk, tokens + SLOT_STEP)
        return total

    def decode_bytes(self, tokens: int, rows: int = 1) -> int:
        """Scratch of a decode step, with its logits and what sampling makes of them."""
        return self.scratch_bytes(1, tokens, rows) + rows * self.widths.vocab * 4 * _LOGIT_COPIES

    @property
    def least_bytes(self) -> int:
        """What must be there for the model to load and to answer anything."""
        return max(self.loading_bytes, self.weight_bytes + self.row_bytes(MIN_CHUNK, MIN_CONTEXT))

    def row_bytes(self, chunk: int, tokens: int, rows: int = 1) -> int:
        """States of rows, a decode step of them all, and a chunk of the prompt that one reads."""
        reading = self.scratch_bytes(chunk, tokens)
        return self.state_bytes(tokens, rows) + self.decode_bytes(tokens, rows) + reading

    @staticmethod
    def _seen(kind: Slots, chunk: int, tokens: int) -> int:
        return tokens if kind.window is None else min(tokens, kind.window + chunk)

    def largest_context(self, budget_bytes: int, chunk: int) -> int | None:
        """Tokens that one row may have within so many bytes, weights not counted.

        Args:
            chunk: Tokens at a time in which a prompt is read.

        Returns:
            0 if not one fits, None if memory sets no limit.
        """

        def fits(tokens: int) -> bool:
            return self.row_bytes(min(chunk, tokens), tokens) <= budget_bytes

        if not fits(1):
            return 0
        high = 1
        while fits(2 * high):
            high *= 2
            if high >= 2**40:
                return None
        low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def as_held(
    path: Path, available_bytes: int, *, on_gpu: bool
) -> tuple[Footprint, Footprint | None]:
    """What a model directory takes in the form in which the engine holds it; see `held`.

    Raises:
        ModelError: as `footprint`.
    """
    return held(*read_directory(path), available_bytes, on_gpu=on_gpu)


def held(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    available_bytes: int,
    *,
    on_gpu: bool,
) -> tuple[Footprint, Footprint | None]:
    """What a model takes in the form in which the engine holds it.

    On Apple GPUs weights stay as stored. On a CPU everything is expanded to float32 where memory
    allows: 16-bit and quantized products run up to a hundred times slower there.

    Args:
        config: config.json.
        tensors: Of all the model's files together, by name.

    Returns:
        That footprint, which may be more than is available, too; and that of float32 if this is
        what it would be with more memory.

    Raises:
        ModelError: as `of_config`.
    """
    expanded = None
    if not on_gpu:
        expanded = of_tensors(config, tensors, expand=True)
        if expanded.least_bytes <= available_bytes:
            return expanded, None
    return of_tensors(config, tensors, expand=False, on_gpu=on_gpu), expanded


def footprint(path: Path, *, expand: bool, on_gpu: bool = False) -> Footprint:
    """What a model directory will take.

    Args:
        path: Directory with config.json and *.safetensors.
        expand: Whether weights become float32, as the engine has them on a CPU; else as stored.
        on_gpu: Whether MLX's fused attention for an Apple GPU will run.

    Raises:
        ModelError: config.json or a header cannot be read, or lacks a size.
    """
    return of_tensors(*read_directory(path), expand=expand, on_gpu=on_gpu)


def read_directory(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """config.json of a model directory, and the tensors of all its files by name.

    Raises:
        ModelError: one of them cannot be read, or is damaged.
    """
    config = read_config(path)
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(path):
        tensors |= read_header(file)
    return config, tensors


def of_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry],
    *,
    expand: bool,
    on_gpu: bool = False,
) -> Footprint:
    """As `footprint`, of a model's config and tensors, wherever its files are.

    Raises:
        ModelError: as `of_config`.
    """
    parameters = parameter_count(config, tensors)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    weights = 4 * parameters if expand else stored
    # What is stored as it will be held is taken as it is.
    loading = weights if weights == stored or not expand else weights + stored
    item = 4 if expand else _item_bytes(config, tensors)
    return of_config(config, parameters, stored, weights, loading, item, on_gpu=on_gpu)


def of_config(
    config: Mapping[str, Any],
    parameters: int = 0,
    stored_bytes: int = 0,
    weight_bytes: int = 0,
    loading_bytes: int = 0,
    item_bytes: int = 4,
    *,
    on_gpu: bool = False,
) -> Footprint:
    """As `footprint`, of a config alone.

    Raises:
        ModelError: it lacks a size or has one that is no positive number.
    """
    family = str(config["model_type"])
    source = config
    if isinstance(config.get("text_config"), dict) and family not in DEFAULTS:
        source = config["text_config"]
    sizes = _Sizes(family, source)
    layers = sizes.number("num_hidden_layers")
    if layers > _MAX_LAYERS:  # each is looked at below
        raise ModelError(f"config.json sets num_hidden_layers to {layers:,}.")
    hidden = sizes.number("hidden_size")
    heads = sizes.number("num_attention_heads")
    kv_heads = heads if family == "xglm" else sizes.number("num_key_value_heads", heads)
    head_dim = sizes.number("head_dim", hidden // heads)
    mlp = sizes.number("intermediate_size", 4 * hidden)
    recurrent = fixed = 0
    basis: Basis = "formula"
    kinds: dict[int | None, int] = {None: layers}
    if family == "recurrent_gemma":
        recurrent = sizes.number("lru_width", hidden)
        blocks = sizes.names("block_types")
        windowed = sum(blocks[i % len(blocks)] != "recurrent" for i in range(layers))
        includes_self = source.get("attention_window_includes_self") is not False
        window = sizes.number("attention_window_size") + (not includes_self)
        kinds = {window: windowed}
        state = recurrent * ((sizes.number("conv1d_width") - 1) * item_bytes + 4)
        fixed, mlp, head_dim = (layers - windowed) * state, mlp // 2, hidden // heads
    elif family == "gemma2":
        pattern = ("sliding_attention", "full_attention")
        types = source.get("layer_types") or [pattern[i % 2] for i in range(layers)]
        kinds = _windows(types, layers, sizes.number("sliding_window"))
    elif family not in DEFAULTS:
        kinds, basis = _zoo_kinds(family, source, layers)
    per_token = 2 * kv_heads * head_dim * item_bytes
    softcap = source.get("attn_logit_softcapping") or family == "gemma2"
    return Footprint(
        basis=basis,
        parameters=parameters,
        stored_bytes=stored_bytes,
        weight_bytes=weight_bytes,
        loading_bytes=loading_bytes,
        item_bytes=item_bytes,
        slots=tuple(Slots(per_token * n, n, window) for window, n in kinds.items() if n),
        fixed_bytes=fixed,
        widths=Widths(
            hidden, mlp, heads, head_dim, kv_heads, recurrent, sizes.number("vocab_size", 32768)
        ),
        is_ours=family in DEFAULTS,
        has_scores=not on_gpu or bool(softcap) or head_dim not in _FUSED_HEAD_DIMS,
    )


def of_states(planned: Footprint, states: Iterable[Any]) -> Footprint:
    """A footprint with what a model's states are once they have read something.

    Arrays with a slot per token, those of caches that have `keys`, are taken to grow, up to the
    window that the cache names; whatever else a state holds is fixed.
    """
    kinds: dict[int | None, list[int]] = {}
    fixed = 0
    for state in _flat(states):
        window = getattr(state, "max_size", getattr(state, "window", None))
        first = getattr(state, "keys", None)
        while isinstance(first, list | tuple):  # quantized: packed numbers, scales, biases
            first = first[0]
        nbytes = int(state.nbytes)
        if first is None or not nbytes:
            fixed += nbytes
            continue
        kinds.setdefault(window, []).append(-(-nbytes // max(1, int(first.shape[2]))))
    slots = tuple(Slots(sum(sizes), len(sizes), window) for window, sizes in kinds.items())
    return replace(planned, basis="measured", slots=slots, fixed_bytes=fixed)


def _flat(states: Iterable[Any]) -> Iterable[Any]:
    for state in states:
        parts = getattr(state, "caches", None)
        if parts is None:
            yield state
        else:
            yield from _flat(parts)


class _Sizes:
    """Numbers of a config under the names that families give them."""

    def __init__(self, family: str, config: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = DEFAULTS.get(family, {})

    def _find(self, name: str) -> Any:
        for source in (self._config, self._defaults):
            for alias in _ALIASES.get(name, (name,)):
                if source.get(alias) is not None:
                    return source[alias]
        return None

    def number(self, name: str, default: int | None = None) -> int:
        value = self._find(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"config.json has no {name}; what the model takes is unknown.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**31:
            raise ModelError(f"config.json sets {name} to {value!r}, expected a positive number.")
        return int(value)

    def names(self, name: str) -> Sequence[str]:
        value = self._find(name)
        if not isinstance(value, list) or not value:
            raise ModelError(f"config.json sets {name} to {value!r}, expected a list of names.")
        return value


def _windows(types: Any, layers: int, window: int | None) -> dict[int | None, int]:
    """How many layers keep a window of that many tokens, and how many keep all."""
    sliding = types.count("sliding_attention") if isinstance(types, list) and window else 0
    return {window: sliding, None: layers - sliding}


def _zoo_kinds(
    family: str, config: Mapping[str, Any], layers: int
) -> tuple[dict[int | None, int], Basis]:
    source_text = zoo_source(family)
    if re.search(r"^class LlamaModel\b", source_text, re.M):
        window, types = config.get("sliding_window"), config.get("layer_types")
        return _windows(
            types, layers, window if type(window) is int and window > 0 else None
        ), "formula"
    # Without states of its own a model has mlx-lm's plain ones, a KVCache in every layer.
    parts = set(re.findall(r"^from \.(\w*)", source_text, re.M))
    is_plain = parts and parts <= _PLAIN_PARTS and "def make_cache" not in source_text
    return {None: layers}, "formula" if is_plain else "estimate"


def _item_bytes(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> int:
    """Of a number that the model computes with: its weights' dtype, where they have one."""
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(".scales")}
    floats = {
        name: tensor.dtype
        for name, tensor in tensors.items()
        if tensor.dtype in _FLOAT_BYTES and name.rpartition(".")[0] not in packed
    }
    kinds = set(floats.values()) or {t.dtype for t in tensors.values() if t.dtype in _FLOAT_BYTES}
    if len(kinds) == 1:
        return _FLOAT_BYTES[kinds.pop()]
    named = _CONFIG_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")))
    return named or max((_FLOAT_BYTES[kind] for kind in kinds), default=2)
