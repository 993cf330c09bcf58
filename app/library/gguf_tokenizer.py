"""The tokenizer inside a GGUF → tokenizer.json, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from app.errors import GryphonError

# llama.cpp's name of a pre-tokenizer → the same splits made with `tokenizers`. "smollm" cuts at
# each \p{N}, then by GPT-2's pattern (llama.cpp src/llama-vocab.cpp).
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
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


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's


def save_tokenizer(reader: gguf.GGUFReader, destination: Path) -> None:
    """Write the three files into `destination`.

    Raises:
        GryphonError: "unsupported_model" for a tokenizer other than byte-level BPE and
            sentencepiece BPE, or one with a pre-tokenizer that is not known here.
    """
    tokenizer = build_tokenizer(reader)
    tokenizer.save(str(destination / "tokenizer.json"))

    bos, eos, unknown, padding = (
        _contents(reader, f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "unknown", "padding")
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(
            _contents(
                reader,
                "tokenizer.ggml.add_bos_token",
                _contents(reader, "tokenizer.ggml.model") == "llama",
            )
        ),
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
    """The GGUF's vocabulary, and merges as it has them or as the scores of its pieces say."""
    model = _contents(reader, "tokenizer.ggml.model")
    pre = _contents(reader, "tokenizer.ggml.pre", "gpt-2")
    tokens: list[str] = _contents(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _contents(reader, "tokenizer.ggml.token_type", [TokenType.NORMAL])
    if model == "llama":
        tokenizer = _sentencepiece(reader, tokens, kinds)
    elif model == "gpt2" and pre in _PRE_TOKENIZERS:
        tokenizer = _byte_level(reader, tokens, pre)
    else:
        raise GryphonError(
            "unsupported_model",
            f"GGUF tokenizer {model!r} with pre-tokenizer {pre!r} cannot be converted; this "
            f"version converts 'llama', and 'gpt2' with {', '.join(sorted(_PRE_TOKENIZERS))}.",
        )
    for kind, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.UNKNOWN, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
                for token, token_kind in zip(tokens, kinds, strict=False)
                if token_kind == kind
            ]
        )
    byte_level = None if model == "llama" else processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = _post_processor(reader, tokens, byte_level)
    return tokenizer


def _byte_level(reader: gguf.GGUFReader, tokens: list[str], pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _contents(reader, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3's tokenizer takes a word that is a token as that, whatever its merges lead to.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader: gguf.GGUFReader, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """A sentencepiece BPE model, whose pieces merge by score, as tokenizers knows it."""
    scores: list[float] = _contents(reader, "tokenizer.ggml.scores", [])
    if len(scores) != len(tokens) or len(kinds) != len(tokens):
        raise GryphonError(
            "invalid_model",
            f"The GGUF has {len(tokens)} tokens, but {len(scores)} scores and {len(kinds)} types.",
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    merges = [
        (-scores[vocab[token]], vocab[token[:cut]], token[:cut], token[cut:])
        for token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    unknown = next((t for t, k in zip(tokens, kinds, strict=True) if k == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in kinds,
        )
    )
    prefixes = bool(_contents(reader, "tokenizer.ggml.add_space_prefix", True))
    # A space before every stretch of text, also after a special token, as llama.cpp does it.
    prefix = [normalizers.Prepend(_SPACE)] if prefixes else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixes else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _post_processor(reader: gguf.GGUFReader, tokens: list[str], own: Any) -> Any:
    # Without a word of the GGUF, sentencepiece models open a sequence with a token, others do not.
    if not _contents(reader, "tokenizer.ggml.add_bos_token", own is None):
        return own or processors.Sequence([])
    bos_id = _contents(reader, "tokenizer.ggml.bos_token_id")
    bos = tokens[bos_id]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    return template if own is None else processors.Sequence([own, template])


def _contents(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
