"""Conversion is exact: block types, rotary row order, tokenizer; what it cannot do is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from app.errors import GryphonError
from app.library import gguf_conversion
from app.library.gguf_conversion import convert, module_name, pack, quantize_blocks
from mlxmodels import shards
from mlxmodels.tokenizer import Tokenizer as MlxTokenizer

from ..models.tokenizer_goldens import TEXTS, files_of

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 64, 2

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "def f(x):\n    return x**2  # two\n\tif True:\n\t\tpass\r\n",
    "你好，世界！日本語テスト 한국어 \u3000全角",
    "👩‍👩‍👧‍👦🎉 🇫🇷 \U0001d54f\U00010348",
    "مرحبا بالعالم שלום",
    "\x00\x01\x02\x7f\x1b[31m\u200b\u200d\ufeff\xa0",
    "1234567890 3.14 1,000,000 ½ ² ٣٤ Ⅷ a1b2",
    "   leading, trailing   \n\n\n\t\t\n ",
    "I'm you're we'll they'd it's can't I'M",
    "naïve café e\u0301 ſ ﬁ ≠∑∫",
    "x" * 300,
    "<|im_start|>user\nhi<|im_end|>\n",
]


def dequantized(weights: dict[str, mx.array], module: str, bits: int) -> np.ndarray:
    scales, biases = (weights[f"{module}.{name}"] for name in ("scales", "biases"))
    return np.array(
        mx.dequantize(
            weights[f"{module}.weight"],
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=32,
            bits=bits,
        )
    )


K_BYTES = {Type.Q4_K: 144, Type.Q5_K: 176}


@pytest.mark.parametrize("kind", K_BYTES)
def test_k_blocks_dequantize_to_the_same_numbers(kind: Type) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (5, 3, K_BYTES[kind]), dtype=np.uint8)
    scale = rng.standard_normal((5, 3, 2)).astype(np.float16)  # gguf writes no such blocks
    blocks[..., :4] = scale.view(np.uint8)
    data = blocks.reshape(5, -1)
    quantized = quantize_blocks(data, kind)
    assert quantized is not None
    q, scales, biases, bits = quantized
    assert (q.shape, scales.shape, scales.dtype) == ((5, 768), (5, 24), np.float32)
    weights = {
        "m.weight": mx.array(pack(q, bits)),
        "m.scales": mx.array(scales),
        "m.biases": mx.array(biases),
    }
    want = gguf.quants.dequantize(data, kind)
    np.testing.assert_array_equal(dequantized(weights, "m", bits), want)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4], ids="{:g}".format)
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_blocks_dequantize_to_the_same_bits(kind: Type, magnitude: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((7, 96)) * magnitude).astype(np.float32)
    values[0, :32] = 0
    data = gguf.quants.quantize(values, kind)
    quantized = quantize_blocks(data, kind)
    assert quantized is not None
    q, scales, biases, bits = quantized
    weights = {
        "m.weight": mx.array(pack(q, bits)),
        "m.scales": mx.array(scales),
        "m.biases": mx.array(biases),
    }
    np.testing.assert_array_equal(
        dequantized(weights, "m", bits), gguf.quants.dequantize(data, kind)
    )


def test_biases_too_large_for_float16_are_kept_in_float32() -> None:
    data = np.concatenate(
        [np.array([60000], np.float16).view(np.uint8), np.arange(32, dtype=np.uint8)]
    )
    quantized = quantize_blocks(data[None], Type.Q8_0)
    assert quantized is not None
    _, scales, biases, _ = quantized
    assert scales.dtype == biases.dtype == np.float32
    assert biases[0, 0] == -128 * 60000


def test_other_types_are_left_to_expansion() -> None:
    assert quantize_blocks(np.zeros((1, 4), np.float32), Type.F32) is None
    assert quantize_blocks(np.zeros((1, 210), np.uint8), Type.Q6_K) is None


@pytest.mark.parametrize("kind", [Type.BF16, Type.F16])
def test_what_is_expanded_is_exact_in_the_narrowest_type(tmp_path: Path, kind: Type) -> None:
    weights = llama_weights()
    up = "blk.1.ffn_up.weight"
    made, _ = converted(write_gguf(tmp_path / "m.gguf", weights, {up: kind}), tmp_path / "out")
    got = made["model.layers.1.mlp.up_proj.weight"]
    want = gguf.quants.dequantize(gguf.quants.quantize(weights[up], kind), kind)
    assert got.dtype == {Type.BF16: mx.bfloat16, Type.F16: mx.float16}[kind]
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), want)


def llama_cpp_row_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py: half-split to interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def byte_level_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kinds: dict[str, Type] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
    pre: str = "smollm",
    pieces: SentencePieceProcessor | None = None,
) -> Path:
    """A small model of the llama architecture, with a byte-level tokenizer or a sentencepiece
    model's."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *byte_level_alphabet(),
        "Ġt",
        "he",
        "Ġthe",
        "12",
    ]
    types = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_license("mit")
    if pieces is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    else:
        ids = list(range(pieces.vocab_size()))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces.id_to_piece(ids))
        writer.add_token_scores(pieces.get_score(ids))
        writer.add_token_types([kind_of(pieces, id) for id in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ 'ünï' }}\n")
    change(writer)
    for name, weight in weights.items():
        kind = (kinds or {}).get(name, Type.F32)
        data = weight if kind == Type.F32 else gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kind_of(pieces: SentencePieceProcessor, id: int) -> gguf.TokenType:
    if pieces.is_unknown(id):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(id):
        return gguf.TokenType.CONTROL
    if pieces.is_unused(id):
        return gguf.TokenType.UNUSED
    return gguf.TokenType.BYTE if pieces.is_byte(id) else gguf.TokenType.NORMAL


def llama_weights(untied: bool = False, vocabulary: int = 263) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)}
    if untied:
        shapes["output"] = (263, HIDDEN)
    for layer in range(LAYERS):
        kv = HIDDEN // HEADS * KV_HEADS
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (96, HIDDEN),
            "ffn_up": (96, HIDDEN),
            "ffn_down": (HIDDEN, 96),
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def converted(source: Path, destination: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    destination.mkdir()
    convert(source, destination, family="open-llama")
    weights = mx.load(str(destination / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights, json.loads((destination / "config.json").read_text())


def test_a_small_model_survives_whole(tmp_path: Path) -> None:
    original = llama_weights(untied=True)
    kinds = {
        name: Type.Q8_0 if name == "output.weight" else Type.Q4_1
        for name, weight in original.items()
        if weight.ndim == 2 and name != "token_embd.weight"
    }
    stored = {
        name: llama_cpp_row_order(weight, HEADS if "attn_q" in name else KV_HEADS)
        if "attn_q" in name or "attn_k" in name
        else weight
        for name, weight in original.items()
    }
    weights, config = converted(write_gguf(tmp_path / "m.gguf", stored, kinds), tmp_path / "out")
    for name, weight in original.items():
        module = module_name(name)
        if name in kinds:
            bits = config["quantization"].get(module, config["quantization"])["bits"]
            # Rows are quantized one by one, so the order they were stored in does not show.
            expected = gguf.quants.dequantize(
                gguf.quants.quantize(weight, kinds[name]), kinds[name]
            )
            np.testing.assert_array_equal(dequantized(weights, module, bits), expected, name)
        else:
            np.testing.assert_array_equal(np.array(weights[f"{module}.weight"]), weight, name)
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "lm_head": {"group_size": 32, "bits": 8},
    }
    assert config["model_type"] == "open-llama"
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert config["shared_input_output_embedding"] is config["tie_word_embeddings"] is False
    assert config["use_stable_embedding"] is False


def test_an_unquantized_tied_model(tmp_path: Path) -> None:
    weights, config = converted(write_gguf(tmp_path / "m.gguf", llama_weights()), tmp_path / "out")
    assert config["shared_input_output_embedding"] is config["tie_word_embeddings"] is True
    assert "quantization" not in config
    assert "lm_head.weight" not in weights


def test_tokenizer_files(tmp_path: Path) -> None:
    def add_bos(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(True)

    converted(write_gguf(tmp_path / "m.gguf", llama_weights(), change=add_bos), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|> the 12")
    assert encoded.tokens == ["<|im_start|>", "<|im_start|>", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.encode("x", add_special_tokens=False).tokens == ["x"]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ 'ünï' }}\n"
    assert (config["add_bos_token"], config["bos_token"]) == (True, "<|im_start|>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


def test_sentencepiece_pieces_give_the_ids_of_their_model(tmp_path: Path) -> None:
    files = files_of("open_llama")
    original = tmp_path / "original"
    original.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (original / name).write_bytes(files[name])
    pieces = SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    weights = llama_weights(vocabulary=pieces.vocab_size())
    converted(write_gguf(tmp_path / "m.gguf", weights, pieces=pieces), tmp_path / "out")
    ours, want = (MlxTokenizer.from_directory(tmp_path / name) for name in ("out", "original"))
    for text in TEXTS:
        if text.startswith(" ") or "\N{LOWER ONE EIGHTH BLOCK}" in text:
            continue  # see mlxmodels.sentencepiece_model on what a tokenizer.json does there
        assert ours.encode(text, True) == want.encode(text, True), text
        assert ours.decode(ours.encode(text, False)) == want.decode(want.encode(text, False))


def test_words_of_llama_3_are_split_as_its_pattern_says(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_weights(), pre="llama-bpe")
    converted(path, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    split = tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay 12345 the  !?\n\n x")
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in split]
    assert words == ["I", "'LL", " pay", " ", "123", "45", " the", " ", " !?\n\n", " x"]
    assert (
        tokenizer.decode(tokenizer.encode("the 12 é", add_special_tokens=False).ids) == "the 12 é"
    )


def test_an_embedding_that_is_not_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_weights(vocabulary=100))
    with pytest.raises(GryphonError, match="263 tokens, and an embedding of 100"):
        converted(path, tmp_path / "out")


def test_killed_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_weights())

    class Killed(shards.Progress):
        def kept(self, shards: int, of: int) -> None:
            if shards == 4:
                raise KeyboardInterrupt

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    convert(path, tmp_path / "whole", shard_bytes=50_000)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "resumed", Killed(), shard_bytes=50_000)
    first = sorted((tmp_path / "resumed").iterdir())[0]
    written = first.stat().st_mtime_ns
    convert(path, tmp_path / "resumed", shard_bytes=50_000)
    assert first.stat().st_mtime_ns == written
    files = [[(f.name, f.read_bytes()) for f in sorted((tmp_path / n).iterdir())]
             for n in ("whole", "resumed")]  # fmt: skip
    assert len(files[0]) > 6 and files[0] == files[1]


def expert(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(8)


def scaled(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "qwen2"}, "'qwen2'"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"change": expert}, "llama.expert_count"),
        ({"change": scaled}, "llama.rope.scaling.type"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    source = write_gguf(tmp_path / "m.gguf", llama_weights(), **options)
    with pytest.raises(GryphonError) as caught:
        converted(source, tmp_path / "out")
    assert caught.value.code == "unsupported_model"
    assert named in caught.value.message


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_up_exps.weight"]
)
def test_a_tensor_without_a_place_is_refused(tmp_path: Path, name: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", llama_weights() | {name: np.ones((32,), np.float32)})
    with pytest.raises(GryphonError, match=name):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, 20_000])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    source = write_gguf(tmp_path / "m.gguf", llama_weights())
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(GryphonError) as caught:
        converted(source, tmp_path / "out")
    assert caught.value.code == "invalid_model"


def test_the_process_reports_progress_and_failure_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "out").mkdir()
    source = write_gguf(tmp_path / "m.gguf", llama_weights())
    assert gguf_conversion.main([str(source), str(tmp_path / "out"), "llama"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = [event for event in events if "done" in event]
    assert len(done) == len(llama_weights())
    size = sum(weight.nbytes for weight in llama_weights().values())
    assert done[-1]["done"] == done[-1]["total"] == size
    assert events[-1] == {"kept": 1, "shards": 1}
    absent = str(tmp_path / "absent.gguf")
    assert gguf_conversion.main([absent, str(tmp_path / "out"), "llama"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "invalid_model"


@pytest.fixture
def smollm2(embedded_home: Path) -> Path:
    return embedded_home / "data" / "models" / "smollm2-135m"


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_the_embedded_tokenizer_returns_every_text(smollm2: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_embedded_tokenizer_splits_as_llama_cpp_does(smollm2: Path) -> None:
    """The ids come from llama.cpp's own tokenizer on the same GGUF (node-llama-cpp 3.21.1)."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    golden = json.loads((Path(__file__).parent / "smollm2_tokens.json").read_text("utf-8"))
    assert len(golden) >= 30
    for text, ids in golden:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_the_embedded_weights_are_exactly_the_gguf(smollm2: Path, embedded_gguf: Path) -> None:
    reader = gguf.GGUFReader(embedded_gguf)
    weights = mx.load(str(smollm2 / "model.safetensors"))
    assert isinstance(weights, dict)
    config = json.loads((smollm2 / "config.json").read_text())
    used = set()
    for tensor in reader.tensors:
        module = module_name(tensor.name)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2])
        if f"{module}.scales" in weights:
            settings = config["quantization"].get(module, config["quantization"])
            got = dequantized(weights, module, settings["bits"])
            used |= {f"{module}.scales", f"{module}.biases"}
        else:
            got = np.array(weights[f"{module}.weight"].astype(mx.float32))
        if heads is not None:
            got = llama_cpp_row_order(got, heads)
        np.testing.assert_array_equal(got, expected, tensor.name)
        used.add(f"{module}.weight")
    assert used == set(weights)
