"""Constraints through the whole engine: what they allow, how they end, and how they go with every
other field of a request. JSON schemas drawn at random: `test_constrained_json.py`; grammars made to
break the engine: `test_hostile_constraints.py`."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxmodels
from app.engine.client import EngineClient
from app.engine.constraint import MAX_CONSTRAINT_BYTES, Constraint
from app.engine.matcher import Matcher
from app.engine.protocol import (
    GenerationRequest,
    Message,
    ModelRef,
    Sampling,
    Token,
    check_request,
)
from app.engine.sampling import logprobs_of
from app.errors import GryphonError

from ..scheduler_rig import Rig, text_and_reason
from ..tiny_models import GEMMA, OPEN_LLAMA, write_model

EOS = 258


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("constraints")
    configs = {
        "endless": OPEN_LLAMA,
        "ending": OPEN_LLAMA | {"eos_token_id": [EOS, 257]},
        "padded": GEMMA | {"vocab_size": 300},
        "narrow": GEMMA | {"vocab_size": 250},
    }
    return {
        name: ModelRef(name, str(write_model(root / name, config)))
        for name, config in configs.items()
    }


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def request(model: ModelRef, constraint: Constraint | None, **fields: Any) -> GenerationRequest:
    values: dict[str, Any] = {"sampling": Sampling(temperature=1, seed=3), "max_tokens": 60}
    values |= {"prompt_tokens": [40, 41, 42]}
    return GenerationRequest(id="r", model=model, constraint=constraint, **(values | fields))


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


@pytest.mark.parametrize("model", ["endless", "ending"])
def test_every_kind_holds_the_whole_answer(
    rig: Rig, models: dict[str, ModelRef], model: str
) -> None:
    lark = 'start: greeting ("," greeting){0,4}\ngreeting: "hi" | /h[eé]llo/'
    patterns = {
        regex("(yes|no|naïve 🙂)"): "(yes|no|naïve 🙂)",
        regex("[a-f]{3,5}"): "[a-f]{3,5}",
        Constraint("lark", lark): "(hi|h[eé]llo)(,(hi|h[eé]llo)){0,4}",
    }
    for constraint, pattern in patterns.items():
        for seed in range(4):
            sampling = Sampling(temperature=1, seed=seed)
            text, reason = rig.answer(
                request(models[model], constraint, sampling=sampling, max_tokens=100)
            )
            assert reason == "stop" and re.fullmatch(pattern, text), (pattern, text)


async def test_a_json_object_needs_no_schema_and_no_word_in_the_prompt(
    models: dict[str, ModelRef],
) -> None:
    """Through the whole engine, as a face asks."""
    made = request(
        models["ending"],
        Constraint("json_object"),
        prompt_tokens=None,
        messages=[Message("user", "Hello")],
        sampling=Sampling(temperature=2, seed=5),
        max_tokens=300,
    )
    client = EngineClient()
    text, reason = text_and_reason([event async for event in client.stream(made)])
    await client.close()
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)
    # Never more white space than a new line and its indentation, however the model likes it.
    assert not re.search(r"[ \t\n]{23}", text)


def test_where_the_end_is_allowed_the_model_chooses_when(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    lengths = set()
    for seed in range(12):
        sampling = Sampling(temperature=1, seed=seed, logit_bias={EOS: 2})
        text, reason = rig.answer(request(models["ending"], regex("[a-z]*"), sampling=sampling))
        assert reason in ("stop", "length") and re.fullmatch("[a-z]*", text)
        lengths.add(len(text))
    assert len(lengths) > 3


def test_an_answer_does_not_end_before_it_is_complete(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    sampling = Sampling(temperature=1, seed=0, logit_bias={EOS: 100, 257: 100})
    text, reason = rig.answer(request(models["ending"], regex("[a-z]{20}x*"), sampling=sampling))
    assert (len(text), reason) == (20, "stop")


def test_an_end_of_sequence_token_in_the_middle_of_a_grammar_does_not_end(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    grammar = Constraint("lark", 'start: "a" <eos> "b" <|im_end|>')
    assert rig.answer(request(models["ending"], grammar)) == ("ab", "stop")
    refused = rig.failure(request(models["ending"], grammar, ignore_eos=True))
    assert refused.code == "constraint_failed" and "ignore_eos" in refused.message


def test_nothing_brings_back_what_is_not_allowed(rig: Rig, models: dict[str, ModelRef]) -> None:
    sampling = Sampling(
        temperature=2,
        seed=1,
        top_k=5,
        top_p=0.9,
        typical_p=0.8,
        min_p=0.01,
        xtc_probability=1,
        xtc_threshold=0.05,
        repetition_penalty=0.1,
        presence_penalty=-2,
        frequency_penalty=-2,
        logit_bias=dict.fromkeys(range(100, 250), 100.0),
    )
    made = request(models["endless"], regex("[a-e]{50}"), sampling=sampling)
    text, reason = rig.answer(made)
    assert re.fullmatch("[a-e]{50}", text) and reason == "stop"


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 30}])
def test_a_grammar_that_must_end_does_so_whatever_else_is_asked(
    rig: Rig, models: dict[str, ModelRef], fields: dict[str, Any]
) -> None:
    for model in ("ending", "endless"):
        made = request(models[model], regex("abc"), **fields)
        assert rig.answer(made) == ("abc", "stop")
    # Where it may go on, it does.
    text, reason = rig.answer(request(models["ending"], regex("a+"), **fields))
    assert len(text) >= 30


def test_length_and_stop_strings_cut_it_short_and_say_so(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    made = request(models["endless"], regex("[ab]{50}"), max_tokens=7)
    text, reason = rig.answer(made)
    assert (len(text), reason) == (7, "length")
    made = request(models["endless"], regex("abcdef"), stop=["cd"])
    assert rig.answer(made) == ("ab", "stop")


def test_logprobs_are_the_models_own(rig: Rig, models: dict[str, ModelRef]) -> None:
    made = request(models["endless"], regex("zq"), logprobs=True, top_logprobs=3)
    events = rig.events(made)
    first = next(event for event in events if isinstance(event, Token))
    loaded = mlxmodels.load(models["endless"].path)
    whole = logprobs_of(loaded.model(mx.array([[40, 41, 42]]))[:, -1])[0]
    assert first.logprob is not None and first.text == "z"
    assert first.logprob.logprob == pytest.approx(whole[first.token_id].item(), abs=1e-4)
    assert first.top[0].logprob == pytest.approx(whole.max().item(), abs=1e-4)


def test_rows_of_the_embedding_that_are_no_tokens_are_never_drawn(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    sampling = Sampling(temperature=1, seed=0, logit_bias=dict.fromkeys(range(259, 300), 100.0))
    made = request(models["padded"], regex("(?s:.){40}"), sampling=sampling)
    text, reason = rig.answer(made)
    assert len(text) == 40 and reason == "stop"


@pytest.mark.parametrize("width", [2, 3, 6])
def test_a_mask_is_as_wide_as_the_logits(width: int) -> None:
    """Three ids of a tokenizer, of which the first and the last may come, or the end."""
    ours, theirs = socket.socketpair()
    matcher = Matcher(ours, 3, bytes([0b1101, 0, 0, 0]))
    mask = np.ones(width, np.bool_)
    matcher.allow(mask, [1])
    assert mask.tolist() == [True, True, True, False, False, False][:width]
    matcher.close()
    theirs.close()


def test_tokens_that_the_model_has_no_logits_for_cannot_be_asked_for(
    rig: Rig, models: dict[str, ModelRef]
) -> None:
    assert rig.answer(request(models["narrow"], regex("abc"))) == ("abc", "stop")
    grammar = Constraint("lark", 'start: "a" <eos> "b"')
    refused = rig.failure(request(models["narrow"], grammar))
    assert refused.code == "constraint_failed" and "none of the tokens" in refused.message


def test_constraints_follow_the_model_that_is_asked(rig: Rig, models: dict[str, ModelRef]) -> None:
    for name in ("endless", "padded", "ending", "endless"):
        assert rig.answer(request(models[name], regex("ab?c"))) in (
            ("abc", "stop"),
            ("ac", "stop"),
        )


def _with_tokenizer(model: ModelRef, path: Path, tokenizer: dict[str, Any]) -> ModelRef:
    path.mkdir()
    for file in Path(model.path).iterdir():
        (path / file.name).symlink_to(file)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ModelRef(path.name, str(path))


def _tokenizer(vocabulary: list[str], decoder: dict[str, Any]) -> dict[str, Any]:
    unknown = {"id": 0, "content": "<unk>", "special": True, "single_word": False}
    return {
        "version": "1.0",
        "added_tokens": [unknown | {"lstrip": False, "rstrip": False, "normalized": False}],
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(["<unk>", *vocabulary])},
            "merges": [],
            "byte_fallback": True,
        },
        "decoder": decoder,
    }


def test_a_space_at_the_start_is_kept_where_decoding_would_drop_it(
    rig: Rig, models: dict[str, ModelRef], tmp_path: Path
) -> None:
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = _tokenizer(["▁", *bytes_], {"type": "Sequence", "decoders": steps})
    model = _with_tokenizer(models["endless"], tmp_path / "spm", tokenizer)
    assert rig.answer(request(model, regex(" é🙂 x"))) == (" é🙂 x", "stop")


def test_a_tokenizer_with_rules_of_its_own_is_refused_by_name(
    rig: Rig, models: dict[str, ModelRef], tmp_path: Path
) -> None:
    tokenizer = _tokenizer(["a", "##b"], {"type": "WordPiece", "prefix": "##", "cleanup": True})
    model = _with_tokenizer(models["endless"], tmp_path / "pieces", tokenizer)
    refused = rig.failure(request(model, regex("ab")))
    assert refused.code == "unsupported_constraint" and "pieces" in refused.message


SCHEMAS_REFUSED = {
    '{"type": "string", "maxlength": 3}': "maxlength",
    '{"type": "integer", "nullable": true}': "nullable",
    '{"minimum": 3, "exclusiveMinimum": true}': "exclusiveMinimum",
    '{"properties": {"a": {"anyOf": [{"not": {}}]}}}': "#/properties/a/anyOf/0/not",
    '{"$defs": {"x": {"uniqueItems": true}}}': "uniqueItems",
    '{"items": [{"type": "string"}]}': "prefixItems",
    '{"type": "object", "minProperties": 2}': "minProperties",
    '{"x-guidance": {"lenient": true}}': "x-guidance",
    '{"$ref": "https://example.com/schema.json"}': "nothing is fetched",
    '{"anyOf": {}}': "list of schemas",
    '{"items": 3}': "#/items",
    '{"type": "string"': "not JSON",
    '{"maximum": NaN}': "NaN",
    "true": "must be a JSON object",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("text", SCHEMAS_REFUSED)
def test_a_schema_of_which_something_would_be_ignored_is_refused_by_name(text: str) -> None:
    made = request(ModelRef("m", "m"), Constraint("json_schema", text))
    with pytest.raises(GryphonError) as caught:
        check_request(made)
    assert caught.value.code == "invalid_constraint"
    assert SCHEMAS_REFUSED[text] in caught.value.message or "deeply" in caught.value.message


def test_annotations_are_no_reason_to_refuse() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "x",
        "title": "T",
        "description": "D",
        "type": "object",
        "properties": {"not": {"default": {"if": 1}, "examples": [{"not": 1}], "x-order": 3}},
        "deprecated": True,
    }
    check_request(request(ModelRef("m", "m"), Constraint("json_schema", json.dumps(schema))))


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (Constraint("json_object", "{}"), "no text"),
        (Constraint("regex", ""), "empty"),
        (Constraint("lark", " \n"), "empty"),
        (Constraint("lark", "x" * (MAX_CONSTRAINT_BYTES + 1)), str(MAX_CONSTRAINT_BYTES)),
        (Constraint("regex", "é" * (MAX_CONSTRAINT_BYTES // 2 + 1)), str(MAX_CONSTRAINT_BYTES)),
        (Constraint("lark", "start: a\na[lazy, temperature=0.5]: /x/"), "temperature"),
    ],
)
def test_what_no_model_could_follow_is_refused_before_one_is_asked(
    constraint: Constraint, said: str
) -> None:
    with pytest.raises(GryphonError, match=said) as caught:
        check_request(request(ModelRef("m", "m"), constraint))
    assert caught.value.code == "invalid_constraint"


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-ahead"),
        (Constraint("lark", "start: x"), "x"),
        (Constraint("lark", "start: start"), "no text matches"),
        (Constraint("json_schema", '{"format": "postcode"}'), "Unknown format: postcode"),
        (Constraint("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}'), "minimum"),
        (Constraint("json_schema", '{"$ref": "#/$defs/none"}'), "'/$defs/none' does not"),
        (Constraint("json_schema", '{"$ref": "other.json"}'), "other.json"),
        (
            Constraint("lark", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'),
            'Unimplemented keys: ["not"]',
        ),
    ],
)
def test_what_llguidance_refuses_is_told_in_one_sentence(
    rig: Rig, models: dict[str, ModelRef], constraint: Constraint, said: str
) -> None:
    refused = rig.failure(request(models["endless"], constraint))
    assert refused.code == "invalid_constraint"
    assert said in refused.message and "\n" not in refused.message
    assert "cannot be followed" in refused.message and refused.message.endswith(".")
