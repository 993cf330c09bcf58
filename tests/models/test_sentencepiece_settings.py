"""What a model directory says about its sentencepiece model, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mlxmodels import ModelError
from mlxmodels.tokenizer import Tokenizer

from .tokenizer_goldens import lone_files, streamed, without, written


@pytest.mark.parametrize(
    ("family", "bos", "eos", "ends", "special"),
    [
        ("gemma", "<bos>", "<eos>", ["<eos>", "<end_of_turn>"], ["<pad>", "<start_of_turn>"]),
        ("open_llama", "<s>", "</s>", ["</s>"], ["<unk>"]),
        ("nemotron", "<s>", "</s>", ["</s>", "<extra_id_1>"], ["<extra_id_0>", "<pad>"]),
        ("xglm", "<s>", "</s>", ["</s>"], ["<unk>", "<pad>", "<madeupword0>", "<madeupword6>"]),
    ],
)
@pytest.mark.parametrize("settings", ["tokenizer_config.json", "no tokenizer_config.json"])
def test_special_tokens_of_a_family(
    tmp_path: Path,
    family: str,
    bos: str,
    eos: str,
    ends: list[str],
    special: list[str],
    settings: str,
) -> None:
    files = lone_files(family)
    files.pop(settings.removeprefix("no ") if settings.startswith("no ") else "", None)
    tokenizer = Tokenizer.from_directory(written(tmp_path, files))
    ids = {tokenizer.token(id): id for id in tokenizer.special_ids}
    assert tokenizer.bos_token == bos and tokenizer.bos_token_id == ids[bos]
    assert tokenizer.eos_token == eos and tokenizer.eos_token_ids == {ids[end] for end in ends}
    assert set(special) <= set(ids)
    before = {"gemma": [2], "open_llama": [1], "nemotron": [], "xglm": [2]}[family]
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello", add_special_tokens=True) == [*before, *plain]


def test_xglm_numbers_its_pieces_as_fairseq_does(tmp_path: Path) -> None:
    files = lone_files("xglm")
    tokenizer = Tokenizer.from_directory(written(tmp_path, files))
    processor = sentencepiece.SentencePieceProcessor(model_proto=files["sentencepiece.bpe.model"])
    size = processor.vocab_size()
    assert [tokenizer.token(id) for id in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    for id in range(3, size):
        assert tokenizer.token(id + 1) == processor.id_to_piece(id)
    made_up = [tokenizer.token(size + 1 + i) for i in range(7)]
    assert made_up == [f"<madeupword{i}>" for i in range(7)]
    assert tokenizer.vocab_size == size + 8 and tokenizer.token(size + 8) is None
    unknown = tokenizer.encode("\U00010348", add_special_tokens=False)
    assert unknown[-1] == 3 and tokenizer.decode(unknown) == ""


def test_settings_say_what_surrounds_a_sequence(tmp_path: Path) -> None:
    def surrounded(family: str, **settings: Any) -> list[str | None]:
        path = written(tmp_path / family, lone_files(family), tokenizer_config=settings)
        tokenizer = Tokenizer.from_directory(path)
        plain = len(tokenizer.encode("Hello", add_special_tokens=False))
        tokens = [tokenizer.token(id) for id in tokenizer.encode("Hello", add_special_tokens=True)]
        middle = tokens.index("H") if "H" in tokens else tokens.index("▁H")
        first = middle - (tokens[middle - 1] == "▁")
        return [*tokens[:first], "…", *tokens[first + plain :]]

    assert surrounded("nemotron") == ["…"]
    assert surrounded("nemotron", add_bos_token=True) == ["<s>", "…"]
    assert surrounded("nemotron", add_eos_token=True) == ["…", "</s>"]
    assert surrounded("gemma", add_bos_token=False) == ["…"]
    assert surrounded("gemma", add_bos_token=None, add_eos_token=True) == ["<bos>", "…", "<eos>"]
    assert surrounded("gemma", bos_token={"content": "<mask>"}) == ["<mask>", "…"]
    masked = surrounded("gemma", add_eos_token=True, eos_token="<mask>")
    assert masked == ["<bos>", "…", "<mask>"]
    assert surrounded("gemma", bos_token="<nowhere>") == ["…"]
    assert surrounded("xglm", add_bos_token=True, add_eos_token=True) == ["</s>", "…"]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "recurrent_gemma"])
def test_every_gemma_has_gemmas_rules(tmp_path: Path, family: str) -> None:
    files = without(lone_files("gemma"), "tokenizer_config.json")
    tokenizer = Tokenizer.from_directory(written(tmp_path, files, config={"model_type": family}))
    turns = [
        tokenizer.encode(f"<{turn}_of_turn>", add_special_tokens=False) for turn in ("start", "end")
    ]
    assert turns == [[6], [7]] and {6, 7} <= tokenizer.special_ids and 7 in tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("legacy", "text", "tokens"),
    [
        (True, "a<s>a</s> a", ["▁a", "<s>", "▁a", "</s>", "▁", "▁a"]),
        (True, "[TOOL]a", ["[TOOL]", "▁a"]),
        (False, "a<s>a</s> a", ["▁a", "<s>", "a", "</s>", "▁a"]),
        (False, "[TOOL]a", ["▁", "[TOOL]", "a"]),
        (False, "<s>a", ["<s>", "a"]),
        (False, "", []),
    ],
)
def test_legacy_is_a_prefix_space_after_every_special_token(
    tmp_path: Path, legacy: bool, text: str, tokens: list[str]
) -> None:
    settings = {"legacy": legacy, "added_tokens_decoder": {"640": {"content": "[TOOL]"}}}
    path = written(tmp_path, lone_files("open_llama"), tokenizer_config=settings)
    tokenizer = Tokenizer.from_directory(path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [tokenizer.token(id) for id in ids] == tokens


@pytest.mark.parametrize(
    ("ids", "bos", "eos"),
    [
        ({}, "<bos>", "<eos>"),
        ({"bos_token_id": 4, "eos_token_id": 7}, "<mask>", "<end_of_turn>"),
        ({"bos_token_id": -1, "eos_token_id": 640}, "<bos>", "<eos>"),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, "<bos>", "<eos>"),
    ],
)
def test_the_model_names_what_the_files_do_not(
    tmp_path: Path, ids: dict[str, Any], bos: str, eos: str
) -> None:
    path = written(tmp_path, without(lone_files("gemma"), "tokenizer_config.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "gemma"} | ids))
    tokenizer = Tokenizer.from_directory(path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (bos, eos)
    assert tokenizer.encode("a", add_special_tokens=True)[0] == tokenizer.bos_token_id


def test_a_prefix_space_can_be_declined(tmp_path: Path) -> None:
    files = lone_files("open_llama")
    path = written(tmp_path, files, tokenizer_config={"add_prefix_space": False})
    tokenizer = Tokenizer.from_directory(path)
    for text in ("Hello", " Hello", "<s>Hello</s> x", ""):
        ids = tokenizer.encode(text, add_special_tokens=False)
        special = "<s>", "</s>"
        assert "".join(tokenizer.token(id) or "" for id in ids) == text.replace(" ", "▁")
        assert tokenizer.decode(ids) == text.replace(special[0], "").replace(special[1], "")


def test_added_tokens_of_the_settings(tmp_path: Path) -> None:
    entries = {
        "5": {"content": "<instead>", "special": True},
        "640": {"content": "[TOOL]", "special": False},
        "641": {"content": "[LEFT]", "lstrip": True, "special": True},
        "642": {"content": "[RIGHT]", "rstrip": True},
        "643": {"content": "whole", "single_word": True},
        "646": {"content": "\n"},
        "900": {"content": "[TOOL][LONG]"},
    }
    older = {"[OLD]": 644, "[BOTH]": 645, "[TOOL]": 640}
    special = ["[OLD]", {"content": "th"}, "<extra_id_1>", "<nowhere>", None]
    settings: dict[str, Any] = {"added_tokens_decoder": entries, "pad_token": "in"}
    settings |= {"additional_special_tokens": special, "bos_token": "<extra_id_1>"}
    files = lone_files("nemotron") | {"added_tokens.json": json.dumps(older).encode()}
    tokenizer = Tokenizer.from_directory(written(tmp_path, files, tokenizer_config=settings))

    def tokens(text: str) -> list[str | None]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [tokenizer.token(id) for id in ids]

    assert tokens("a[TOOL]a") == ["a", "[TOOL]", "a"]
    assert tokens("a[TOOL][LONG]a") == ["a", "[TOOL][LONG]", "a"]
    assert tokens("a \t[LEFT] a") == ["a", "[LEFT]", "▁a"]
    assert tokens("a [RIGHT] \n a[RIGHT]") == ["a", "▁", "[RIGHT]", "a", "[RIGHT]"]
    assert tokens("\na") == ["\n", "a"]
    assert tokens("a[RIGHT] [LEFT]  [RIGHT]")[1:] == ["[RIGHT]", "[LEFT]", "▁▁", "[RIGHT]"]
    assert tokens("whole")[-1] == "whole" and "whole" not in tokens("wholesome awhole whole_")
    assert tokens("[BOTH][OLD]<instead>") == ["[BOTH]", "[OLD]", "<instead>"]
    assert tokenizer.token(5) == "<instead>" and "<extra_id_1>" not in tokens("<extra_id_1>")
    assert tokenizer.bos_token == "<extra_id_1>" and tokenizer.bos_token_id is None
    assert tokenizer.vocab_size == 640 + 8
    found = {tokenizer.token(id) for id in tokenizer.special_ids}
    assert found >= {"[LEFT]", "[OLD]", "<instead>", "th", "in"}
    assert not found & {"[TOOL]", "[RIGHT]", "[BOTH]", "whole"}
    ids = tokenizer.encode("[TOOL]x[LEFT][RIGHT]", add_special_tokens=False)
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == "[TOOL]x[RIGHT]"
    assert tokenizer.token_bytes(640) == b"[TOOL]"


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": ["<x>"]},
        {"added_tokens_decoder": {"700": "<x>"}},
        {"added_tokens_decoder": {"700": {"content": None}}},
        {"added_tokens_decoder": {"700": {"content": ""}}},
        {"added_tokens_decoder": {"700": {"content": "\ud800"}}},
        {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"9999999999": {"content": "<x>"}}},
    ],
)
def test_malformed_added_tokens_are_one_sentence(tmp_path: Path, settings: Any) -> None:
    path = written(tmp_path, lone_files("gemma"), tokenizer_config=settings)
    with pytest.raises(ModelError, match="added_tokens_decoder holds .*download"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("text", ["x", " ", "<", "the ", "日", "</s>", "\x00", "e\u0301"])
@pytest.mark.parametrize("family", ["open_llama", "xglm"])
def test_a_megabyte_is_encoded_in_one_go(tmp_path: Path, family: str, text: str) -> None:
    # Work that grew with the square of the length would not end within the tests' time limit.
    tokenizer = Tokenizer.from_directory(written(tmp_path, lone_files(family)))
    long = text * (1_000_000 // len(text))
    ids = tokenizer.encode(long, add_special_tokens=False)
    assert len(ids) <= len(long.encode()) + 1
    if family == "open_llama" and text == "日":
        assert tokenizer.decode(ids) == long


def broken(change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    files = lone_files("gemma")
    return files | {"tokenizer.model": change(files["tokenizer.model"])}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: b"",
        lambda model: model[: len(model) // 2],
        lambda model: b"IQ== 0\nIg== 1\n",  # tiktoken's format, which some call tokenizer.model too
        lambda model: b'{"version": "1.0"}',
        lambda model: model.replace("日".encode(), b"\xe6\x97 "),
    ],
    ids=["empty", "half", "tiktoken", "json", "not UTF-8"],
)
def test_what_is_no_sentencepiece_model_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = written(tmp_path, broken(change))
    with pytest.raises(ModelError, match="tokenizer.model is not a sentencepiece model .*download"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("tokens", [{"<x>": -1}, {"<x>": "5"}, {"<x>": 2**31}, {"": 5}])
def test_malformed_older_added_tokens_are_one_sentence(tmp_path: Path, tokens: Any) -> None:
    path = written(tmp_path, lone_files("gemma"), added_tokens=tokens)
    with pytest.raises(ModelError, match=r"added_tokens.json holds .*download"):
        Tokenizer.from_directory(path)


def test_a_model_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bytes(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, lone_files("gemma"))
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(ModelError, match="tokenizer.model cannot be read: Permission denied"):
        Tokenizer.from_directory(path)


def test_no_model_or_several_are_refused(tmp_path: Path) -> None:
    files = lone_files("gemma")
    path = written(tmp_path, without(files, "tokenizer.model"))
    with pytest.raises(ModelError, match=r"no tokenizer.json and no sentencepiece \*.model"):
        Tokenizer.from_directory(path)
    (path / "folder.model").mkdir()
    for name in ("spiece.model", "tokenizer.model"):
        (path / name).write_bytes(files["tokenizer.model"])
        if name == "spiece.model":
            assert Tokenizer.from_directory(path).bos_token == "<bos>"
    with pytest.raises(ModelError, match="several .*spiece.model, tokenizer.model"):
        Tokenizer.from_directory(path)
