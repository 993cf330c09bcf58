"""GGUF checkpoint of the llama architecture → MLX safetensors directory of model type open-llama.

Nothing is rounded. GGUF's legacy block formats store 32 weights as `w = d * q + m` with float16 `d`
and `m`, which is MLX's affine mode at group size 32, so only the packing of `q` changes:

    GGUF   MLX bits  scale  bias      q in the GGUF block
    Q4_0   4         d      -8 * d    weights 0-15 in the low nibbles, 16-31 in the high ones
    Q4_1   4         d      m         the same
    Q5_0   5         d      -16 * d   the same, fifth bits in a 32-bit word before them
    Q5_1   5         d      m         the same
    Q8_0   8         d      -128 * d  signed bytes, stored here plus 128

Every other type is expanded to float32. Rows of the query and key projections come back from
llama.cpp's interleaved rotary order to the half-split order that HF checkpoints and MLX use.

Runs as a process of its own, `python -m app.library.gguf_conversion SOURCE DESTINATION`: one JSON
object per line on stdout, {"done", "total"} in tensors, and at a failure {"code", "message"}.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from app.errors import GryphonError
from app.library.gguf_tokenizer import save_tokenizer

GROUP_SIZE = 32

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


def convert(source: Path, destination: Path, progress: Callable[[int, int], None]) -> None:
    """Write the model in `source` as a model directory into the existing `destination`.

    Raises:
        GryphonError: "invalid_model" when the file is damaged, "unsupported_model" when it holds
            something that this conversion cannot carry over exactly.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise GryphonError("invalid_model", f"{source} is not a readable GGUF: {error}.") from error
    config = model_config(reader)
    weights: dict[str, np.ndarray] = {}
    bits_of: dict[str, int] = {}
    for done, tensor in enumerate(reader.tensors):
        module = module_name(tensor.name)
        rows = _half_split_rows(module, len(tensor.data), config)
        data = tensor.data if rows is None else tensor.data[rows]
        quantized = quantize_blocks(data, tensor.tensor_type)
        if quantized is None:
            weights[f"{module}.weight"] = _narrowed(
                gguf.quants.dequantize(data, tensor.tensor_type)
            )
        else:
            q, scales, biases, bits_of[module] = quantized
            weights[f"{module}.weight"] = pack(q, bits_of[module])
            weights[f"{module}.scales"] = scales
            weights[f"{module}.biases"] = biases
        progress(done + 1, len(reader.tensors))

    config["shared_input_output_embedding"] = "lm_head.weight" not in weights
    config["tie_word_embeddings"] = config["shared_input_output_embedding"]
    if bits_of:
        config["quantization"] = _quantization(bits_of)
    save_file(weights, destination / "model.safetensors", metadata={"format": "mlx"})
    _write_json(destination / "config.json", config)
    save_tokenizer(reader, destination)
    _write_model_card(destination / "README.md", reader, source)


def model_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """config.json of the model, but for what its tensors decide.

    Raises:
        GryphonError: "unsupported_model" for another architecture or a feature open-llama lacks.
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
            f"The GGUF rotates {rotary} dimensions per head; open-llama rotates {hidden // heads}.",
        )
    return {
        "architectures": ["OpenLlamaForCausalLM"],
        "model_type": "open-llama",
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
        "use_stable_embedding": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", None),
    }


def module_name(tensor_name: str) -> str:
    """Checkpoint path of the module whose weight the GGUF calls `tensor_name`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor_name)
    if match is None or match[2] not in _NAMES:
        raise GryphonError(
            "unsupported_model", f"GGUF tensor {tensor_name!r} has no place in open-llama."
        )
    name = _NAMES[match[2]]
    return name if match[1] is None else f"model.layers.{match[1]}.{name}"


def quantize_blocks(data: np.ndarray, kind: Type) -> Quantized | None:
    """Take GGUF blocks [rows, bytes] apart; None when `kind` has no exact affine counterpart."""
    if kind not in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0):
        return None
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


def main(arguments: list[str]) -> int:
    """Entry point of the child process."""
    source, destination = map(Path, arguments)
    os.umask(0o077)
    try:
        convert(
            source,
            destination,
            lambda done, total: print(json.dumps({"done": done, "total": total}), flush=True),
        )
    except GryphonError as error:
        print(json.dumps({"code": error.code, "message": error.message}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
