"""GGUF checkpoint of the llama architecture → MLX safetensors directory.

Nothing is rounded. GGUF's block formats store weights as `w = d * q + m`, 32 of them with one `d`
and one `m`, which is MLX's affine mode at group size 32, so only the packing of `q` changes:

    GGUF   MLX bits  scale   bias      q in the GGUF block
    Q4_0   4         d       -8 * d    weights 0-15 in the low nibbles, 16-31 in the high ones
    Q4_1   4         d       m         the same
    Q5_0   5         d       -16 * d   the same, fifth bits in a 32-bit word before them
    Q5_1   5         d       m         the same
    Q8_0   8         d       -128 * d  signed bytes, stored here plus 128
    Q4_K   4         d * s   -e * m    eight groups; s and m of 6 bits, d and e for all of them
    Q5_K   5         d * s   -e * m    the same, fifth bits in a plane of their own

Scales of the last two take float32. Every other type is expanded, to bfloat16 where it is that, to
float16 where that is exact, else to float32. Rows of the query and key projections come back from
llama.cpp's interleaved rotary order to the half-split order that HF checkpoints and MLX use.

Runs as a process of its own, `python -m app.library.gguf_conversion SOURCE DESTINATION FAMILY
[SHARD_BYTES]`: one JSON object per line on stdout, {"done", "total"} in bytes, {"kept", "shards"},
and at a failure {"code", "message"}. FAMILY is the model_type that the result gets, "llama" or
"open-llama".
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from app.errors import GryphonError
from app.library.gguf_tokenizer import save_tokenizer
from mlxmodels import packing, shards
from mlxmodels.errors import ModelError
from mlxmodels.packing import Packing
from mlxmodels.safetensors_header import TensorEntry
from mlxmodels.shards import Tensor, Unit

GROUP_SIZE = 32

_BITS = {
    Type.Q4_0: 4, Type.Q4_1: 4, Type.Q4_K: 4,
    Type.Q5_0: 5, Type.Q5_1: 5, Type.Q5_K: 5,
    Type.Q8_0: 8,
}  # fmt: skip
"""Of the types that are carried over as they are."""
_FLOATS = {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16"}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "open-llama": "OpenLlamaForCausalLM"}

# Checkpoint name of each GGUF tensor. What is absent here is refused by name, never dropped.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Quantized = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""Values q [rows, columns] uint8, scales and biases [rows, columns / 32], bits."""


def convert(
    source: Path,
    destination: Path,
    progress: shards.Progress | None = None,
    *,
    family: str = "llama",
    shard_bytes: int = shards.SHARD_BYTES,
) -> None:
    """Write the model in `source` as a model directory into the existing `destination`, a tensor in
    memory at a time. After a kill the next call goes on from the files that are whole.

    Raises:
        GryphonError: "invalid_model" when the file is damaged, "unsupported_model" when it holds
            something that this conversion cannot carry over exactly.
    """
    reader = _open(source)
    config = _config(reader, family)
    units = (
        Unit(tuple(entries), sum(entry.nbytes for entry in entries.values()), make)
        for entries, make in (
            (_entries(tensor), partial(_made, tensor, config)) for tensor in reader.tensors
        )
    )
    fingerprint = shards.fingerprint_of([source], config=config, shard_bytes=shard_bytes)
    shards.write(destination, units, fingerprint, progress or shards.Progress(), shard_bytes)
    _write_json(destination / "config.json", config)
    save_tokenizer(reader, destination)
    _write_model_card(destination / "README.md", reader, source)


def expected(source: Path, asked: Packing) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """config.json and tensors of the result, about; what a GGUF holds is looked at, not read.

    Raises:
        GryphonError: as `convert`; and "unsupported_model" when weights that are quantized already
            should be packed anew.
    """
    reader = _open(source)
    config = _config(reader, "llama")
    entries: dict[str, TensorEntry] = {}
    for tensor in reader.tensors:
        entries |= _entries(tensor)
    if asked == Packing():
        return config, entries
    kinds = Counter(t.tensor_type.name for t in reader.tensors if t.tensor_type not in _FLOATS)
    if kinds:
        held = ", ".join(f"{count} tensors of {kind}" for kind, count in kinds.most_common())
        raise GryphonError(
            "unsupported_model",
            f"{source} is quantized already ({held}). Rounding it once more would add error to "
            "error: convert it without -q and --dtype, which rounds nothing, or take a GGUF in "
            "F16, BF16 or F32.",
        )
    return packing.expected(config, entries, asked)


def _open(source: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise GryphonError("invalid_model", f"{source} is not a readable GGUF: {error}.") from error


def _config(reader: gguf.GGUFReader, family: str) -> dict[str, Any]:
    """config.json, complete."""
    config = model_config(reader, family)
    modules = {module_name(tensor.name): tensor.tensor_type for tensor in reader.tensors}
    rows = {module_name(tensor.name): int(tensor.shape[-1]) for tensor in reader.tensors}
    if rows.get("model.embed_tokens") != config["vocab_size"]:
        raise GryphonError(
            "invalid_model",
            f"The GGUF has {config['vocab_size']} tokens, and an embedding of "
            f"{rows.get('model.embed_tokens', 0)}.",
        )
    config["tie_word_embeddings"] = "lm_head" not in modules
    if family == "open-llama":
        config["shared_input_output_embedding"] = config["tie_word_embeddings"]
    bits_of = {module: _BITS[kind] for module, kind in modules.items() if kind in _BITS}
    matrices = [t.tensor_type for t in reader.tensors if len(t.shape) > 1]
    if bits_of:
        config["quantization"] = _quantization(bits_of)
    elif matrices and (dtype := _FLOATS.get(Counter(matrices).most_common(1)[0][0])):
        config["torch_dtype"] = dtype
    return config


def model_config(reader: gguf.GGUFReader, family: str) -> dict[str, Any]:
    """config.json of the model, but for what its tensors decide.

    Raises:
        GryphonError: "unsupported_model" for another architecture or a feature Llama lacks.
    """
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise GryphonError(
            "unsupported_model",
            f"GGUF architecture {architecture!r} cannot be converted; this version converts llama.",
        )
    for name in ("llama.rope.scaling.type", "llama.expert_count", "llama.attention.sliding_window"):
        if _field(reader, name, None) not in (None, 0, "none"):
            raise GryphonError("unsupported_model", f"{name} in a GGUF cannot be converted yet.")
    heads = _field(reader, "llama.attention.head_count")
    hidden = _field(reader, "llama.embedding_length")
    rotary = _field(reader, "llama.rope.dimension_count", hidden // heads)
    if rotary * heads != hidden:
        raise GryphonError(
            "unsupported_model",
            f"The GGUF rotates {rotary} dimensions per head; Llama rotates {hidden // heads}.",
        )
    own = {"use_stable_embedding": False} if family == "open-llama" else {"attention_bias": False}
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", heads),
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": _decimal(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(_field(reader, "llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", None),
        **own,
    }


def module_name(tensor_name: str) -> str:
    """Checkpoint path of the module whose weight the GGUF calls `tensor_name`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor_name)
    if match is None or match[2] not in _NAMES:
        raise GryphonError(
            "unsupported_model", f"GGUF tensor {tensor_name!r} has no place in Llama."
        )
    name = _NAMES[match[2]]
    return name if match[1] is None else f"model.layers.{match[1]}.{name}"


def _entries(tensor: gguf.ReaderTensor) -> dict[str, TensorEntry]:
    """What a tensor becomes; the floats of an expanded one may come out in half the bytes."""
    module, kind = module_name(tensor.name), tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if (bits := _BITS.get(kind)) and shape[-1] % GROUP_SIZE == 0:
        rows, columns = shape
        # Two bytes would be most often enough; see `quantize_blocks`.
        groups = TensorEntry("F32", (rows, columns // GROUP_SIZE), 0, rows * columns // 8)
        words = TensorEntry("U32", (rows, columns * bits // 32), 0, rows * columns * bits // 8)
        return {
            f"{module}.weight": words,
            f"{module}.scales": groups,
            f"{module}.biases": groups,
        }
    if kind not in _FLOATS:
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise GryphonError(
                "unsupported_model",
                f"GGUF tensor {tensor.name!r} is of the type {kind.name}, which is not converted.",
            ) from error
    item = 2 if kind in (Type.F16, Type.BF16) else 4
    dtype = "BF16" if kind == Type.BF16 else "F16" if kind == Type.F16 else "F32"
    return {f"{module}.weight": TensorEntry(dtype, shape, 0, int(np.prod(shape)) * item)}


def _made(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> list[Tensor]:
    """A tensor of the GGUF as those that MLX has for it."""
    module, kind = module_name(tensor.name), tensor.tensor_type
    rows = _half_split_rows(module, len(tensor.data), config)
    data = tensor.data if rows is None else tensor.data[rows]
    quantized = quantize_blocks(data, kind)
    if quantized is not None:
        q, scales, biases, bits = quantized
        parts = {"weight": pack(q, bits), "scales": scales, "biases": biases}
        return [_tensor(f"{module}.{part}", array) for part, array in parts.items()]
    if kind == Type.BF16:
        words = np.ascontiguousarray(data).view("<u2")
        return [Tensor(f"{module}.weight", "BF16", words.shape, words)]
    return [_tensor(f"{module}.weight", _narrowed(gguf.quants.dequantize(data, kind)))]


def _tensor(name: str, array: np.ndarray) -> Tensor:
    dtype = {"float16": "F16", "float32": "F32", "uint32": "U32"}[array.dtype.name]
    return Tensor(name, dtype, array.shape, np.ascontiguousarray(array))


def quantize_blocks(data: np.ndarray, kind: Type) -> Quantized | None:
    """Take GGUF blocks [rows, bytes] apart; None when `kind` has no exact affine counterpart."""
    if kind not in _BITS:
        return None
    if kind in (Type.Q4_K, Type.Q5_K):
        return _k_blocks(data, _BITS[kind])
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(len(data), -1, block_bytes)
    d, rest = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]
    if kind == Type.Q8_0:
        bits = 8
        q = rest ^ 0x80  # two's complement plus 128, modulo 256
    else:
        bits = 4 if kind in (Type.Q4_0, Type.Q4_1) else 5
        nibbles = rest[..., -16:]
        q = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
        if bits == 5:
            fifth = np.unpackbits(rest[..., -20:-16], axis=-1, bitorder="little")
            q |= fifth << 4
    scales: np.ndarray = d
    biases: np.ndarray
    if kind in (Type.Q4_1, Type.Q5_1):
        biases = rest[..., :2].copy().view(np.float16)[..., 0]
    else:
        # A float16 times a power of two is a float16 too, unless it grows too large for one.
        biases = d.astype(np.float32) * -(1 << (bits - 1))
        if np.abs(biases).max(initial=0) <= np.finfo(np.float16).max:
            biases = biases.astype(np.float16)
        else:
            scales = d.astype(np.float32)
    return q.reshape(len(data), -1), scales, biases, bits


def _k_blocks(data: np.ndarray, bits: int) -> Quantized:
    """Q4_K and Q5_K: 256 weights as eight groups, in 144 or 176 bytes.

    d, e (float16), 12 bytes of s and m, with 5 bits the 32 bytes of the fifth ones, then nibbles:
    of each 32 bytes the low ones are one group, the high ones the next.
    """
    rows = len(data)
    blocks = data.reshape(-1, 144 if bits == 4 else 176)
    d, e = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
    scales, minima = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
    nibbles = blocks[:, -128:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1)
    q = (nibbles & 0x0F).reshape(-1, 8, 32)
    if bits == 5:
        planes = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1)
        q |= (planes & 1) << 4
    groups = (rows, -1)
    return (
        q.reshape(groups),
        (d * scales.astype(np.float32)).reshape(groups),
        (-e * minima.astype(np.float32)).reshape(groups),
        bits,
    )


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Values [rows, columns] as MLX packs them: one little-endian stream of bits per row."""
    if bits == 8:
        stream = q
    elif bits == 4:
        stream = q[:, ::2] | (q[:, 1::2] << 4)
    else:
        per_value = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little")
        stream = np.packbits(per_value.reshape(len(q), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view(np.dtype("<u4"))


def _half_split_rows(module: str, rows: int, config: dict[str, Any]) -> np.ndarray | None:
    """Which GGUF row belongs at each checkpoint row; None where the order is the same."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }.get(module.rpartition(".")[2])
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _narrowed(weight: np.ndarray) -> np.ndarray:
    """As float16 where that is exact, so that the file has one float type; else as it is."""
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), weight) else weight


def _quantization(bits_of: dict[str, int]) -> dict[str, Any]:
    """mlx-lm's `quantization` entry: the most common width, and each module that differs."""
    common = Counter(bits_of.values()).most_common(1)[0][0]
    overrides = {
        module: {"group_size": GROUP_SIZE, "bits": bits}
        for module, bits in bits_of.items()
        if bits != common
    }
    return {"group_size": GROUP_SIZE, "bits": common, **overrides}


_REQUIRED: Any = object()


def _field(reader: gguf.GGUFReader, name: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise GryphonError("invalid_model", f"The GGUF lacks its field {name}.")
    return default


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_model_card(path: Path, reader: gguf.GGUFReader, source: Path) -> None:
    """README.md with the front matter that the Hugging Face hub gives a licence."""
    licence = _field(reader, "general.license", None)
    front_matter = f"---\nlicense: {licence}\n---\n" if licence else ""
    name = _field(reader, "general.name", source.stem)
    path.write_text(
        f"{front_matter}# {name}\n\nConverted without loss from `{source.name}` by Gryphon.\n",
        encoding="utf-8",
    )


class _Lines(shards.Progress):
    def kept(self, shards: int, of: int) -> None:
        _say(kept=shards, shards=of)

    def written(self, done: int, total: int) -> None:
        _say(done=done, total=total)


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main(arguments: list[str]) -> int:
    """Entry point of the child process."""
    source, destination = map(Path, arguments[:2])
    shard_bytes = int(arguments[3]) if arguments[3:] else shards.SHARD_BYTES
    os.umask(0o077)
    lock = os.open(destination.with_name(f"{destination.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # A process may still write there whose parent died before it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        convert(source, destination, _Lines(), family=arguments[2], shard_bytes=shard_bytes)
    except (GryphonError, ModelError) as error:
        code = error.code if isinstance(error, GryphonError) else "unsupported_model"
        _say(code=code, message=str(error))
        return 1
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
