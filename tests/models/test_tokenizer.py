"""Streamed text is the decoded text, for every kind of decoder and every split."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from mlxmodels import ModelError
from mlxmodels.detokenizer import Window, detokenizer_for
from mlxmodels.tokenizer import (
    StreamingDetokenizer,
    Tokenizer,
    TokenizerJson,
    read_chat_template,
)

SAMPLES = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "def f(x):\n\treturn x  # tab\n",
    "naïve café — “quotes”",
    "日本語のテキストと中文",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 combining",
    "مرحبا بالعالم",
    "a\x00b\x7fc\u200b",
    " ",
    "▁ mark itself",
]


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    for token in ("He", "ll", "Hell", "Ġw", "æĹ", "Ċĉ"):
        vocab[token] = len(vocab)
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Ġ", "w")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["日本"])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_fallback(*, strip: bool) -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for token in ["▁", *"Helo,wrd!", "▁w", "▁▁", "日", "<0x4>", "<0xZZ>", "<0x41>x", "\n"]:
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "w")], byte_fallback=True, unk_token="<unk>")
    )
    prepend = "first" if strip else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "▁", "▁He", "llo", *"Helo,wrd!ay", "日", "▁▁"]
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "hello": 1, "##s": 2, "world": 3, ",": 4, "##ing": 5}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def spelled_bytes() -> tokenizers.Tokenizer:
    """Byte tokens under a decoder in an order of its own, for which there is no table."""
    tokenizer = byte_fallback(strip=False)
    steps = [decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": lambda: byte_fallback(strip=False),
    "byte_fallback_strip": lambda: byte_fallback(strip=True),
    "metaspace": metaspace,
    "word_piece": word_piece,
}


def wrapped(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(TokenizerJson(tokenizer))


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return wrapped(KINDS[request.param]())


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = StreamingDetokenizer(tokenizer)
    return "".join([stream.add(id) for id in ids] + [stream.finish()])


@pytest.mark.parametrize("text", SAMPLES)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for end in range(len(ids) + 1):
        assert streamed(tokenizer, ids[:end]) == tokenizer.decode(ids[:end])


def test_random_ids_stream_as_they_decode(tokenizer: Tokenizer) -> None:
    # Special tokens, ids past the vocabulary and every kind of broken UTF-8 among them.
    generator = random.Random(7)
    for _ in range(400):
        length = generator.randrange(1, 30)
        ids = [generator.randrange(tokenizer.vocab_size + 5) for _ in range(length)]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_random_bytes_stream_as_they_decode(kind: str) -> None:
    tokenizer = wrapped(KINDS[kind]())
    of_byte = {tokenizer.token_bytes(id): id for id in reversed(range(tokenizer.vocab_size))}
    generator = random.Random(11)
    for _ in range(400):
        text = "".join(chr(generator.choice([65, 233, 8364, 128512])) for _ in range(6)).encode()
        data = bytearray(text)
        for _ in range(generator.randrange(3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        ids = [of_byte[bytes([byte])] for byte in data]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), bytes(data)


def test_incomplete_bytes_are_held_back() -> None:
    tokenizer = wrapped(byte_level())
    stream = StreamingDetokenizer(tokenizer)
    ids = tokenizer.encode("€!", add_special_tokens=False)
    assert [stream.add(id) for id in ids] == ["", "", "€", "!"]
    assert stream.add(ids[0]) == "" and stream.finish() == "\ufffd" and stream.finish() == ""


def test_special_and_unknown_ids_leave_no_text(tokenizer: Tokenizer) -> None:
    stream = StreamingDetokenizer(tokenizer)
    special = sorted(tokenizer.special_ids)
    for id in [*special, tokenizer.vocab_size, 10**9, 2**40, -1]:
        assert stream.add(id) == ""
    assert stream.finish() == "" and tokenizer.decode([*special, 2**40, -1]) == ""


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_piece"])
def test_table_decoders_never_decode_a_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(TokenizerJson, "decode", lambda self, ids: decoded.append(ids) or "")
    stream = StreamingDetokenizer(wrapped(KINDS[kind]()))
    for id in range(100):
        stream.add(id)
    stream.finish()
    assert bool(decoded) == (kind == "word_piece")


@pytest.mark.parametrize("spaces", range(4))
def test_as_many_spaces_are_stripped_as_the_decoder_says(spaces: int) -> None:
    backend = byte_fallback(strip=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", spaces, 0)])
    tokenizer = wrapped(backend)
    tokens = ["▁", "▁▁", "▁w", "H", "<0x20>"]
    ids = [backend.token_to_id(token) for token in tokens]
    for length in range(5):
        for row in itertools.product(ids, repeat=length):
            assert streamed(tokenizer, list(row)) == tokenizer.decode(row), row


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_metaspace_keeps_its_scheme_and_its_mark(scheme: str) -> None:
    backend = metaspace()
    backend.add_tokens(["_a", "_", "__b"])
    backend.decoder = decoders.Metaspace(replacement="_", prepend_scheme=scheme)
    tokenizer = wrapped(backend)
    ids = [backend.token_to_id(token) for token in ("_a", "_", "__b", "▁", "H")]
    for row in itertools.product(ids, repeat=3):
        assert streamed(tokenizer, list(row)) == tokenizer.decode(row), row


@pytest.mark.parametrize(
    "more",
    [
        [decoders.Strip(" ", 0, 1)],
        [decoders.Replace("H", "J")],
        [decoders.Strip(" ", 0, 0), decoders.Replace("H", "J")],
    ],
)
def test_a_decoder_of_other_steps_is_still_followed(more: list[decoders.Decoder]) -> None:
    backend = byte_fallback(strip=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = wrapped(backend)
    for text in ["", "Hello, world!", "H H ", "日本語 é", "  H"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_an_unknown_decoder_holds_characters_back_but_not_for_ever() -> None:
    tokenizer = wrapped(spelled_bytes())
    stream = StreamingDetokenizer(tokenizer)
    pieces = [stream.add(1 + byte) for byte in "é😀日".encode()]
    assert pieces == ["", "é", "", "", "", "😀", "", "", "日"]

    stream = StreamingDetokenizer(tokenizer)
    pieces = [stream.add(1 + 0x80) for _ in range(64)]
    assert not any(pieces[:4]) and any(pieces)


def test_an_unknown_decoder_decodes_a_short_window_only() -> None:
    tokenizer = wrapped(spelled_bytes())
    calls = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal calls
        calls += 1
        assert len(ids) < 128
        return tokenizer.decode(ids)

    generator = random.Random(3)
    stream = detokenizer_for({"type": "nothing known"}, decode)
    assert isinstance(stream, Window)
    for i in range(4000):
        byte = 0x80 if i < 1000 else generator.choice([0x41, 0x80, 0xE6, 0xFF])
        stream.add(1 + byte, f"<0x{byte:02X}>")
    stream.finish()
    assert calls < 3 * 4000


def test_token_bytes_name_one_token() -> None:
    tokenizer = wrapped(byte_level())
    (id,) = tokenizer.encode("Hell", add_special_tokens=False)
    assert tokenizer.token_bytes(id) == b"Hell"
    assert tokenizer.token_bytes(tokenizer._backend.token_id("æĹ")) == "日".encode()[:2]
    assert tokenizer.token_bytes(tokenizer._backend.token_id("<s>")) == b"<s>"
    assert tokenizer.token_bytes(10**6) == b""
    fallback = wrapped(byte_fallback(strip=True))
    assert fallback.token_bytes(1 + 0xE6) == b"\xe6"
    assert fallback.token_bytes(fallback._backend.token_id("▁w")) == b" w"


def test_half_a_surrogate_pair_is_replaced() -> None:
    tokenizer = wrapped(byte_level())
    ids = tokenizer.encode("a\ud83db", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a\ufffdb"


def test_truncation_and_padding_of_the_file_are_off() -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(wrapped(backend).encode("Hello, world!", add_special_tokens=False)) == 9


def test_special_tokens_come_from_any_file(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<kept>", special=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = Tokenizer.from_directory(tmp_path)
    assert plain.bos_token is None and plain.bos_token_id is None and not plain.eos_token_ids
    kept = backend.token_to_id("<kept>")
    assert kept not in plain.special_ids and plain.decode([kept]) == "<kept>"
    assert plain.vocab_size == backend.get_vocab_size()

    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": 3}))
    by_id = Tokenizer.from_directory(tmp_path)
    assert by_id.bos_token == "<s>" and by_id.eos_token_ids == {3}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    full = Tokenizer.from_directory(tmp_path)
    assert full.eos_token_ids == {3, 4, 5, eos} and full.eos_token == "</s>"
    assert full.special_ids == {bos, eos}


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("gemma", "<end_of_turn>"),
        ("gemma2", "<end_of_turn>"),
        ("recurrent_gemma", "<end_of_turn>"),
        ("nemotron", "<extra_id_1>"),
        ("llama", None),
    ],
)
def test_a_turn_ends_where_the_family_says(tmp_path: Path, family: str, end: str | None) -> None:
    backend = byte_level()
    backend.add_special_tokens(["<end_of_turn>", "<extra_id_1>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "eos_token_id": 3}))
    wanted = {3} if end is None else {3, backend.token_to_id(end)}
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == wanted


def test_an_unreadable_template_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match="chat_template.jinja cannot be read"):
        read_chat_template(tmp_path)
    assert read_chat_template(tmp_path / "nowhere") is None
