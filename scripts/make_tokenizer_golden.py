#!/usr/bin/env python3
# /// script
# requires-python = "==3.11.*"
# dependencies = ["transformers==4.57.6", "sentencepiece==0.2.3", "protobuf==7.36.2"]
# ///
"""Writes tests/golden/tokenizers/: small sentencepiece models and what transformers makes of them.

uv builds the environment named above, outside the repository, and runs this in it:

    uv run --script scripts/make_tokenizer_golden.py

Per family: the trained model, the tokenizer.json that transformers converts it to,
tokenizer_config.json, config.json with the special ids, and expected.json: for every text of
texts.json the ids that the slow tokenizer gives, which asks sentencepiece itself, and the text that
the converted one decodes them to.
"""

import argparse
import io
import json
import lzma
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    GemmaTokenizer,
    GemmaTokenizerFast,
    LlamaTokenizer,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
    XGLMTokenizer,
    XGLMTokenizerFast,
    convert_slow_tokenizer,
)

OUTPUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizers"

# What the models are trained on. Enough of every script for pieces of it to be learned, and too
# little for all of its characters, so that byte fallback and unknown pieces occur as well.
CORPUS = (
    """\
The keeper of the lighthouse counted the ships that passed, and wrote each of them in his book.
She said: "Nothing is older than the sea, and nothing is younger than this morning's wave."
It's raining again; the streets are empty, the windows are lit, and the kettle is on the stove.
We walked from the harbour to the old market, where they were selling apples, pears and bread.
There were 12 boats in 1987, 345 in 2004, and by 2023 there were more than 10,000 of them.
Call me at 555-0199 before 7:30, or write to someone@example.com about invoice #42 (99.95 EUR).
What would you do with an hour of silence? Read, think, sleep, wait, listen, remember, forget.
A model reads tokens, not letters; the tokenizer decides where the words begin and where they end.
def mean(values: list[float]) -> float:
    return sum(values) / len(values)
    if not values:
        raise ValueError("no values")
for (int i = 0; i < n; ++i) { total += a[i] * b[i]; }
import numpy as np; x = np.zeros((3, 4)); print(x.shape, x[1:, ::2].sum())
<div class="note"><p>Hello &amp; goodbye</p></div> <h1>Title</h1> <!-- note -->
SELECT name, COUNT(*) FROM ships WHERE year >= 1987 GROUP BY name ORDER BY 2 DESC;
{"name": "value", "list": [1, 2.5, -3e10, null, true], "nested": {"key": "other value"}}
C'est la vie, dit-elle; l'été fut long et l'hiver déjà là. Où êtes-vous allés, mes amis ?
Die Straße führt über die Brücke; größere Häuser stehen dort, und die Vögel singen früh.
El niño mañana irá a la montaña con su corazón lleno de alegría. ¿Por qué no? ¡Claro que sí!
Привет, мир! Это простое предложение на русском языке, и в нём много слов о море и о небе.
日本語の文章です。今日は天気がいいですね。東京から京都まで新幹線で行きます。
これは日本のテキストです。私は本を読みます。あなたは何を読みますか。
中文句子在这里。今天天气很好，我们去公园。中国的人口很多，语言也很多。
我们在学习中文和日本语。你好，世界！这是一个测试。
한국어 문장입니다. 오늘은 날씨가 좋습니다. 우리는 바다에 갑니다.
مرحبا بالعالم، هذه جملة باللغة العربية. البحر كبير والسماء زرقاء.
שלום עולם, זה משפט בעברית. הים גדול והשמים כחולים.
नमस्ते दुनिया, यह हिंदी में एक वाक्य है। आज मौसम अच्छा है।
Emoji: 😀 😀 😂 🎉 👍 👍 ❤️ 🚀 and more words with 😀 smiles 😂 and 🎉 cake.
""".splitlines()
    * 4
)

TEXTS = [
    "",
    " ",
    "  ",
    "     ",
    "a",
    "Hello, world!",
    " leading",
    "  two leading",
    "trailing ",
    "trailing two  ",
    "in  the   middle    of",
    "\t",
    "\ttab first",
    "a\tb\t\tc",
    "\n",
    "\n\n",
    "line\nline\n\nline\n\n\nline",
    "carriage\r\nreturn\r\n",
    "  \n  mixed \t \n ",
    '    if not values:\n        raise ValueError("no values")\n',
    "a\x00b",
    "\x00",
    "\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x7f\x80\x9f",
    "soft\xadhyphen, zero\u200bwidth, joiner\u200d, non\u200cjoiner, word\u2060joiner",
    "no-break\xa0space, thin\u2009space, ideographic\u3000space, line\u2028separator\u2029",
    "\ufeffbyte-order mark",
    "mark \ufeff inside",
    "👩‍👩‍👧‍👦 family",
    "🇩🇪🇯🇵 flags 🏳️‍🌈",
    "👍🏽 skin, ❤️ heart, 1️⃣ keycap",
    "😀😂🎉🚀",
    "x😀y",
    "مرحبا بالعالم",
    "שלום עולם!",
    "abc שלום 123 مرحبا xyz",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "e\u0301 and \u00e9, A\u030a and \u00c5",
    "Z\u0351\u0346\u0312a\u0335\u0317l\u0336g\u0321o\u0489",
    "naïve café — “quotes” … ‘single’",
    "日本語のテキスト",
    "今天天气很好，我们去公园。",
    "龘靐齉爩 rare",
    "한국어 문장입니다.",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "ｆｕｌｌ　ｗｉｄｔｈ ＡＢＣ１２３！",
    "ﬁ ligature, ½ half, ² square, Ⅷ roman, ㎏ unit, ℌ letter, ﷺ",
    "नमस्ते दुनिया",
    "Привет, мир! Ёлка",
    "def f(x):\n\treturn x  # tab\n",
    "for (int i = 0; i < n; ++i) { total += a[i]; }",
    '<div class="note"><h1>Title</h1></div>',
    "a=b+c;//d\\n\\t\\x00 %s {0} ${x}",
    "0123456789",
    "3.14159 1,000,000 -5 1e-10 0x1F 12:34",
    "٠١٢٣ ௧௨ 四五 Ⅳ",
    "x" * 300,
    "supercalifragilistic" * 20,
    "the" * 50 + " " + "ship " * 40,
    "▁",
    "▁▁▁",
    "▁ mark itself",
    "a▁b ▁ c▁",
    " ▁▁ x",
    "<0x41>",
    "<0x41><0x0A><0xFF>x",
    "<s>",
    "</s>",
    "<bos>",
    "<unk>",
    "<pad> and <mask>",
    "<s>Hello</s>",
    "a <s> b",
    "a<s>b</s> c </s>",
    "<s> <s>  x</s>",
    "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    " <start_of_turn> spaced <end_of_turn> ",
    "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n",
    "<madeupword0> x <madeupword6> <madeupword7>",
    "<S> </S> <BOS> < s> <s > <start_of_turn <end_of_turn>> <<s>>",
    "\ue000 private use \uf8ff \U00100000",
    "unassigned \u0378 \uffff \U000e0001 \U0003fffd",
    "replacement \ufffd character",
    "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚 𓀀 𐍈",
    "ÀÉÎÕÜ ÿŸ ßẞ ıİ ǅ",
    "aaaa" + "\u0301" * 20,
    "ends in half an emoji sequence 👩‍",
    "mixed 日本 and العربية, עברית 😀\tand\ncode(); ",
]

COMMON: dict[str, Any] = {
    "num_threads": 1,
    "hard_vocab_limit": False,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "allow_whitespace_only_pieces": True,
    "minloglevel": 2,
}
BPE: dict[str, Any] = COMMON | {
    "model_type": "bpe",
    "vocab_size": 640,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.98,
}
TRAINING: dict[str, dict[str, Any]] = {
    "gemma": BPE
    | {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": [
            *["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"],
            *["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<h1>", "</h1>"],
        ],
    },
    "open_llama": BPE | {"add_dummy_prefix": True},
    "nemotron": BPE
    | {
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "control_symbols": ["<extra_id_0>", "<extra_id_1>"],
    },
    "xglm": COMMON
    | {
        "model_type": "unigram",
        "vocab_size": 420,
        "character_coverage": 0.98,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "allow_whitespace_only_pieces": False,
        "normalization_rule_name": "nmt_nfkc",
    },
}
CONFIGS = {
    "gemma": {"model_type": "gemma", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "open_llama": {"model_type": "open-llama", "bos_token_id": 1, "eos_token_id": 2},
    "nemotron": {"model_type": "nemotron", "bos_token_id": 2, "eos_token_id": 3},
    "xglm": {"model_type": "xglm", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}


class NemotronConverter(convert_slow_tokenizer.LlamaConverter):
    """Llama's conversion with the ids that the model itself has."""

    def vocab(self, proto: Any) -> list[tuple[str, float]]:
        return [(piece.piece, piece.score) for piece in proto.pieces]

    def unk_id(self, proto: Any) -> int:
        return int(proto.trainer_spec.unk_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="default tests/golden/tokenizers"
    )
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "texts.json", TEXTS)
    for family, options in TRAINING.items():
        folder = output / family
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name = "sentencepiece.bpe.model" if family == "xglm" else "tokenizer.model"
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, **options
        )
        (folder / name).write_bytes(model.getvalue())
        write_json(folder / "config.json", CONFIGS[family])
        write_references(family, folder, str(folder / name))
        if family == "xglm":
            move_character_map(output, folder, name)


def write_references(family: str, folder: Path, model: str) -> None:
    if family == "gemma":
        record(folder, "", GemmaTokenizer(model), GemmaTokenizerFast)
    elif family == "open_llama":
        record(folder, "", LlamaTokenizer(model, legacy=True), LlamaTokenizerFast)
        record(folder, "_not_legacy", LlamaTokenizer(model, legacy=False), LlamaTokenizerFast)
    elif family == "xglm":
        record(folder, "", XGLMTokenizer(model), XGLMTokenizerFast)
    else:  # a slow class that takes ids and rules from the model; the conversion is ours
        slow = GemmaTokenizer(
            model,
            bos_token="<s>",
            eos_token="</s>",
            add_bos_token=False,
            additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
        )
        slow.add_prefix_space = False
        record(folder, "", slow, None)


def record(folder: Path, suffix: str, slow: Any, fast_class: Any) -> None:
    """The fast tokenizer and its decoded text, the slow one's ids and settings."""
    with tempfile.TemporaryDirectory() as scratch:
        slow.save_pretrained(scratch)
        settings = json.loads((Path(scratch) / "tokenizer_config.json").read_text())
        if fast_class is None:
            names = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token")}
            converted = NemotronConverter(slow).converted()
            fast = PreTrainedTokenizerFast(tokenizer_object=converted, **names)
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        else:
            # Built with no more than the path of the model, Llama's would lose its prefix space.
            fast = fast_class.from_pretrained(scratch)
    ids = [slow.encode(text) for text in TEXTS]
    decoded = [fast._tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    write_json(folder / f"tokenizer{suffix}.json", json.loads(fast._tokenizer.to_str()))
    write_json(folder / f"tokenizer_config{suffix}.json", settings)
    write_json(folder / f"expected{suffix}.json", {"ids": ids, "decoded": decoded})


def move_character_map(output: Path, folder: Path, name: str) -> None:
    """The normaliser's map, 560 kB in the model and tokenizer.json, goes to a file: 82 kB."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / name).read_bytes())
    map_ = proto.normalizer_spec.precompiled_charsmap
    proto.normalizer_spec.ClearField("precompiled_charsmap")
    (folder / name).write_bytes(proto.SerializeToString())
    (output / "nmt_nfkc.bin.xz").write_bytes(lzma.compress(map_, preset=9 | lzma.PRESET_EXTREME))
    converted = json.loads((folder / "tokenizer.json").read_text())
    del converted["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    write_json(folder / "tokenizer.json", converted)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
