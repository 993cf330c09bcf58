"""Gaps in texts: each convention's tokens in order, code that spells them, how answers end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from app.engine.client import EngineClient
from app.engine.infill_prompt import infill_prompt
from app.engine.protocol import (
    Accepted,
    ContextFile,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Infill,
    Message,
    ModelRef,
    Sampling,
    Token,
    check_request,
)
from app.errors import GryphonError
from mlxmodels.infill import CONVENTIONS, infill_tokens
from mlxmodels.tokenizer import Tokenizer, TokenizerJson

from ..tiny_models import OPEN_LLAMA, byte_tokenizer, write_model, write_scripted_model

QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
QWEN_FILES = ["<|repo_name|>", "<|file_sep|>", "<|fim_pad|>", "<|endoftext|>"]


def with_tokens(*added: str) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(added))
    return Tokenizer(TokenizerJson(tokenizer))


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@pytest.mark.parametrize(
    ("added", "want"),
    [
        (QWEN, "<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>mid"),
        (
            ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
            "<fim_prefix>before<fim_suffix>after<fim_middle>mid",
        ),
        (
            ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
            "<fim-prefix>before<fim-suffix>after<fim-middle>mid",
        ),
        (
            ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
            "<｜fim▁begin｜>before<｜fim▁hole｜>after<｜fim▁end｜>mid",
        ),
        (["▁<PRE>", "▁<SUF>", "▁<MID>"], "▁<PRE>before▁<SUF>after▁<MID>mid"),
        (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]after[PREFIX]beforemid"),
        (
            ["<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"],
            "<|code_prefix|>before<|code_suffix|>after<|code_middle|>mid",
        ),
        (
            ["<|prefix|>", "<|suffix|>", "<|middle|>"],
            "<|prefix|>before<|suffix|>after<|middle|>mid",
        ),
    ],
    ids=[convention.prefix for convention in CONVENTIONS],
)
def test_each_convention_has_its_tokens_in_its_order(added: list[str], want: str) -> None:
    tokenizer = with_tokens(*added)
    prompt = infill_prompt(tokenizer, [7], "before", "after", Infill(middle="mid"))
    assert prompt.tokens[0] == 7 and spelled(tokenizer, prompt.tokens[1:]) == want
    assert {tokenizer.token_id(token) for token in added} <= set(prompt.ends)
    assert infill_tokens(lambda token: token in added[:-1]) is None


def test_code_that_spells_a_token_is_code() -> None:
    tokenizer = with_tokens(*QWEN)
    prefix, suffix = "x = '<|fim_suffix|>'", "# <|im_end|> <|fim_middle|>"
    tokens = infill_prompt(tokenizer, [], prefix, suffix, Infill()).tokens
    want = f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"
    assert spelled(tokenizer, tokens) == want
    assert sum(token in tokenizer.special_ids for token in tokens) == 3


def test_other_files_come_first_in_the_models_own_way() -> None:
    files = [ContextFile("a.py", "A = 1"), ContextFile("b.py", "B = 2")]
    own = with_tokens(*QWEN, *QWEN_FILES)
    prompt = infill_prompt(own, [7], "p", "s", Infill(files=files))
    assert spelled(own, prompt.tokens[1:]) == (
        "<|repo_name|>repository\n<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n"
        "<|file_sep|>file\n<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>"
    )
    (boundary,) = prompt.boundaries
    other = infill_prompt(own, [7], "pq", "", Infill(files=files))
    assert prompt.tokens[:boundary] == other.tokens[:boundary]
    assert own.token(prompt.tokens[boundary]) == "<|fim_prefix|>"
    assert {own.token_id(token) for token in QWEN_FILES} <= set(prompt.ends)
    without = with_tokens(*QWEN)
    plain = infill_prompt(without, [], "p", "s", Infill(files=files)).tokens
    assert spelled(without, plain).startswith("--- a.py ---\nA = 1\n--- b.py ---\nB = 2\n<|fim_")


def test_no_space_is_put_where_a_text_goes_on() -> None:
    """Such tokenizers put one before a text; what follows a gap has none that is not its own."""
    letters = [*"abdefgt_ ▁☺", "<s>"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>"])
    tokenizer = Tokenizer(TokenizerJson(backend))
    for suffix, spelled_suffix in (("bat", "bat"), (" bat", "▁bat")):
        tokens = infill_prompt(tokenizer, [], "def", suffix, Infill(middle="ag")).tokens
        names = [tokenizer.token(id) for id in tokens]
        assert names == ["▁<PRE>", *"▁def", "▁<SUF>", *spelled_suffix, "▁<MID>", *"ag"]


# In the engine.


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


def coder(path: Path, pieces: list[str], *, decoder: dict[str, object] | None = None) -> ModelRef:
    """A model that answers with these pieces, whatever the prompt, and has Qwen's tokens."""
    write_scripted_model(path, pieces, specials=("<|file_sep|>",))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    # In place of bytes that no text here has: ids beyond the model's vocabulary could not be read.
    vocabulary = tokenizer["model"]["vocab"]
    for letter, id in [one for one in vocabulary.items() if one[1] < len(QWEN)]:
        del vocabulary[letter]
        vocabulary[QWEN[id]] = id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": id, "content": token, "special": True, **flags} for id, token in enumerate(QWEN)
    ]
    tokenizer["decoder"] = decoder or tokenizer["decoder"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ModelRef("coder", str(path))


def text_of(events: list[Event]) -> str:
    end = events[-1]
    assert isinstance(end, Finished) and end.reason == "stop", end
    return "".join(event.text for event in events if isinstance(event, Token)) + end.text


def gap(model: ModelRef, **fields: object) -> GenerationRequest:
    values = {"prompt": "def f(", "suffix": "):", "sampling": Sampling(temperature=0)}
    return GenerationRequest(id="g", model=model, **(values | fields))  # type: ignore[arg-type]


async def test_a_filled_gap_ends_where_the_next_file_would_begin(
    client: EngineClient, tmp_path: Path
) -> None:
    model = coder(tmp_path / "coder", ["a ", "b", "<|file_sep|>", "c"])
    empty: dict[str, object] = {"suffix": "", "infill": Infill(middle="x")}
    for fields, shown in (({}, "def f():"), (empty, "def f(x")):
        events = [event async for event in client.stream(gap(model, max_tokens=9, **fields))]
        assert text_of(events) == "a b"
        (accepted,) = (event for event in events if isinstance(event, Accepted))
        assert accepted.prompt_tokens == len(QWEN) + len(shown)
    plain = gap(model, suffix="", max_tokens=9)
    # Where no gap is filled, that is a token like any other.
    assert text_of([event async for event in client.stream(plain)]) == "a bc"
    # Decoding drops the space that some tokenizers put before a text; a gap begins no text.
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    spaced = coder(tmp_path / "spaced", ["▁a", "b"], decoder=metaspace)
    assert text_of([event async for event in client.stream(gap(spaced))]) == " ab"
    assert text_of([event async for event in client.stream(gap(spaced, suffix=""))]) == "ab"


async def test_a_model_without_the_tokens_refuses_and_still_completes(
    client: EngineClient, tmp_path: Path
) -> None:
    model = ModelRef("plain", str(write_model(tmp_path / "plain", OPEN_LLAMA)))
    events = [event async for event in client.stream(gap(model))]
    assert isinstance(events[-1], Failed) and events[-1].code == "no_infill"
    events = [event async for event in client.stream(gap(model, suffix="", max_tokens=2))]
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None, "prompt_tokens": [1]},
        {"prompt": None, "messages": [Message("user", "a")]},
        {"infill": Infill(files=[ContextFile("a", "b")] * 257)},
        {"infill": Infill(files=[ContextFile("a" * 4097, "b")])},
    ],
)
def test_a_gap_needs_a_prompt_and_files_within_reason(fields: dict[str, object]) -> None:
    with pytest.raises(GryphonError) as caught:
        check_request(gap(ModelRef("m", "/m"), **fields))
    assert caught.value.code == "invalid_request"
