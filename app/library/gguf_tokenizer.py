"""The tokenizer inside a GGUF → tokenizer.json, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from app.errors import GryphonError

# llama.cpp's name of a pre-tokenizer → the same splits made with `tokenizers`. "smollm" cuts at
# each \p{N}, then by GPT-2's pattern (llama.cpp src/llama-vocab.cpp).
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}

# Tokens that end a turn in the templates of llama-architecture models; a generation stops at them
# whichever of them the GGUF calls its end-of-sequence token.
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")


def save_tokenizer(reader: gguf.GGUFReader, destination: Path) -> None:
    """Write the three files into `destination`.

    Raises:
        GryphonError: "unsupported_model" for a tokenizer other than byte-level BPE, or one with a
            pre-tokenizer that is not known here.
    """
    tokenizer = build_tokenizer(reader)
    tokenizer.save(str(destination / "tokenizer.json"))

    bos, eos, unknown, padding = (
        _contents(reader, f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "unknown", "padding")
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(_contents(reader, "tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(_contents(reader, "tokenizer.ggml.add_eos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _contents(reader, "llama.context_length"),
    }
    for name, token_id in (("bos", bos), ("eos", eos), ("unk", unknown), ("pad", padding)):
        if token_id is not None:
            config[f"{name}_token"] = tokenizer.id_to_token(token_id)
    template = _contents(reader, "tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    _write_json(destination / "tokenizer_config.json", config)

    turn_ends = [tokenizer.token_to_id(token) for token in _TURN_ENDS]
    ends = dict.fromkeys([eos, *turn_ends])  # in this order, each once
    generation = {
        "bos_token_id": bos,
        "eos_token_id": [token_id for token_id in ends if token_id is not None],
        "pad_token_id": padding,
    }
    _write_json(
        destination / "generation_config.json",
        {name: value for name, value in generation.items() if value is not None},
    )


def build_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Byte-level BPE from the GGUF's vocabulary, merges and pre-tokenizer."""
    model = _contents(reader, "tokenizer.ggml.model")
    pre = _contents(reader, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise GryphonError(
            "unsupported_model",
            f"GGUF tokenizer {model!r} with pre-tokenizer {pre!r} cannot be converted; this "
            f"version converts 'gpt2' with one of {', '.join(sorted(_PRE_TOKENIZERS))}.",
        )
    tokens: list[str] = _contents(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _contents(reader, "tokenizer.ggml.token_type", [TokenType.NORMAL])
    merges = [tuple(merge.split(" ")) for merge in _contents(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
                for token, token_kind in zip(tokens, kinds, strict=False)
                if token_kind == kind
            ]
        )
    tokenizer.post_processor = _post_processor(reader, tokens)
    return tokenizer


def _post_processor(reader: gguf.GGUFReader, tokens: list[str]) -> Any:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not _contents(reader, "tokenizer.ggml.add_bos_token", False):
        return byte_level
    bos_id = _contents(reader, "tokenizer.ggml.bos_token_id")
    bos = tokens[bos_id]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    return processors.Sequence([byte_level, template])


def _contents(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
