"""tool_choice "required" and a tool's name, through the whole engine: models with random weights
whose tokenizers have the markers of each way of writing calls try everything that they are let."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import pytest_asyncio
import tokenizers

from app.engine.answer_parts import AnswerFormat
from app.engine.call_formats import CALL_FORMATS
from app.engine.call_grammar import call_grammar
from app.engine.chat_prompt import _REASONING, ChatPrompts
from app.engine.client import EngineClient
from app.engine.constraint import Constraint
from app.engine.matcher_process import Follower, NotFollowed
from app.engine.protocol import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Message,
    ModelRef,
    PromptLookup,
    Sampling,
    Token,
    Tool,
    ToolCall,
    check_request,
)
from app.engine.vocabulary import Vocabulary
from app.errors import GryphonError
from mlxmodels.tokenizer import Tokenizer

from ..tiny_models import OPEN_LLAMA, byte_tokenizer, write_model
from .test_chat_prompt import TEMPLATES, TOOL, WITH_CALL

# How a template of each format writes the call `c` of a past turn, by which the format is known.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments|tojson }}}\n'
    "</tool_call>",
    "nemotron": '<toolcall> {"name": "{{ c.name }}", "arguments": {{ c.arguments|tojson }}} '
    "</toolcall>",
    "nemotron_nano": '<TOOLCALL>[{"name": "{{ c.name }}", "arguments": {{ c.arguments|tojson }}}]'
    "</TOOLCALL>",
    "command": '<|START_ACTION|>[{"tool_name": "{{ c.name }}", "parameters": '
    "{{ c.arguments|tojson }}}]<|END_ACTION|>",
    "granite": '<|tool_call|>[{"name": "{{ c.name }}", "arguments": {{ c.arguments|tojson }}}]',
    "mistral": "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments|tojson }}",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>"
    "{{ c.arguments|tojson }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama": '{"name": "{{ c.name }}", "parameters": {{ c.arguments|tojson }}}',
    "functions": "<function={{ c.name }}>{{ c.arguments|tojson }}</function>",
    "qwen_xml": "<tool_call>\n<function={{ c.name }}>\n<parameter=gryphon_key>\n"
    "{{ c.arguments.gryphon_key }}\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>{{ c.name }}\n<arg_key>gryphon_key</arg_key>\n<arg_value>"
    "{{ c.arguments.gryphon_key }}</arg_value>\n</tool_call>",
    "gemma4": '<|tool_call>call:{{ c.name }}{gryphon_key:<|"|>'
    '{{ c.arguments.gryphon_key }}<|"|>}<tool_call|>',
    "pythonic": "[{{ c.name }}(gryphon_key={{ c.arguments.gryphon_key|tojson }})]",
    "lfm2": '<|tool_call_start|>[{"name": "{{ c.name }}", "arguments": '
    "{{ c.arguments|tojson }}}]<|tool_call_end|>",
}
NOT_ENFORCED = {"gemma4"}
ENFORCED = [name for name in WRITTEN if name not in NOT_ENFORCED]
# What ends text that is free: likely enough to come by itself.
ENDS = ["</parameter>", "</arg_value>", "</think>", '"']
OPENS = "<think>"
EOS, MOST = 258, 200

PLAIN_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "°F", "3", "null"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 40},
        "exact": {"type": "boolean"},
        "at": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["days", "unit"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "string", "maxLength": 3}},
}
FORECAST = Tool("get-forecast.v2", "The weather.", PLAIN_PARAMETERS)
NOTE = Tool(
    "note",
    "Keeps a text.",
    {
        "type": "object",
        "properties": {"text": {"type": "string"}, "tag": {"const": "x"}},
        "required": ["text"],
        "additionalProperties": False,
    },
)
NOW = Tool("now", "", {"type": "object", "additionalProperties": False})
LOOK = Tool("look_up", "", PLAIN_PARAMETERS)
TOOLS = [NOTE, NOW, LOOK]


# One template for all: template_options say how it writes calls, and whether it opens reasoning.
TEMPLATE = (
    "{{ tools|tojson if tools }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}"
    "{% for t in m.tool_calls or [] %}{% set c = t.function %}"
    + "".join(
        f"{{% if way == '{way}' %}}{written}{{% endif %}}" for way, written in WRITTEN.items()
    )
    + "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% if thinks %}<think>{% endif %}{% endif %}"
)


def write(path: Path, *, are_special: bool) -> ModelRef:
    """A model with random weights, and the markers of all formats as special tokens or others."""
    tokenizer = byte_tokenizer()
    markers = {marker for way in CALL_FORMATS.values() for marker in way.markers}
    # No tokenizer has a token of these.
    markers -= {"<function=", "```", ";"}
    for marker in sorted(markers | {"<think>", "</think>"}):
        token = tokenizers.AddedToken(marker, normalized=False, special=are_special)
        (tokenizer.add_special_tokens if are_special else tokenizer.add_tokens)([token])
    config = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": EOS}
    write_model(path, OPEN_LLAMA | config | {"max_position_embeddings": 8192})
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return ModelRef(path.name, str(path))


def biased(model: ModelRef) -> dict[int, float]:
    """What makes free text end sooner or later."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{model.path}/tokenizer.json")
    ids = [tokenizer.token_to_id(end) for end in ENDS]
    return {id: 4.0 for id in ids if id is not None}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    """One engine for all, in the home of the first test."""
    client = EngineClient()
    yield client
    await client.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ModelRef]:
    """By whether their markers are special tokens."""
    root = tmp_path_factory.mktemp("choice")
    return {special: write(root / f"{special}", are_special=special) for special in (True, False)}


def request(
    model: ModelRef, choice: str = "required", *, seed: int = 0, way: str = "hermes", **fields: Any
) -> GenerationRequest:
    given: dict[str, Any] = {
        "id": f"r{seed}",
        "messages": [Message("user", "Hi")],
        "tools": TOOLS,
        "max_tokens": MOST,
        "template_options": {"way": way},
    }
    if "sampling" not in fields:
        bias = biased(model)
        fields["sampling"] = Sampling(temperature=1, top_k=0, top_p=1, seed=seed, logit_bias=bias)
    return GenerationRequest(model=model, tool_choice=choice, **(given | fields))


async def ask(client: EngineClient, request: GenerationRequest) -> list[Event]:
    return [event async for event in client.stream(request)]


def read_model(model: ModelRef) -> tuple[Vocabulary, Tokenizer]:
    path = Path(model.path)
    return Vocabulary(path), Tokenizer.from_directory(path)


def followed(vocabulary: Vocabulary, grammar: Constraint, ids: list[int]) -> list[int]:
    """The ids that are left when a grammar has come to its end.

    Raises:
        NotFollowed: one of them is not allowed.
    """
    follower = Follower(vocabulary, grammar)
    end = 1 << (vocabulary.size % 8)
    for i, id in enumerate(ids):
        allowed = follower.allowed()
        if allowed[vocabulary.size // 8] & end:
            return ids[i:]
        if not allowed[id // 8] >> (id % 8) & 1:
            raise NotFollowed(f"{id} at {i} of {ids}")
        follower.consume(id)
    assert follower.allowed()[vocabulary.size // 8] & end
    return []


def reasoning(events: list[Event]) -> str:
    return "".join(e.reasoning for e in events if isinstance(e, (Token, Finished)))


def check(events: list[Event], allowed: list[Tool], most: int = MOST) -> str:
    """One call if the answer ended by itself, none or one otherwise, and never text; the reason."""
    end = events[-1]
    assert isinstance(end, Finished), end
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert not any(event.text for event in events if isinstance(event, (Token, Finished)))
    assert end.reason == "length" or (end.reason == "tool_calls" and len(calls) == 1)
    if end.reason == "length":
        assert end.usage.completion_tokens == most and len(calls) <= 1
    for call in calls:
        (tool,) = [tool for tool in allowed if tool.name == call.name]
        jsonschema.validate(json.loads(call.arguments), tool.parameters)
    return end.reason


# In this order, as the engine holds one model.
@pytest.mark.parametrize("way", ENFORCED)
@pytest.mark.parametrize("are_special", [True, False], ids=["special", "text"])
async def test_an_answer_that_ends_is_one_call_of_an_allowed_tool(
    client: EngineClient, models: dict[bool, ModelRef], way: str, are_special: bool
) -> None:
    model = models[are_special]
    options = {"way": way, "thinks": True}
    asked = [(TOOLS, request(model, way=way, seed=seed)) for seed in range(4)]
    asked += [([LOOK], request(model, "look_up", way=way, seed=4))]
    asked += [(TOOLS, request(model, seed=5, template_options=options))]
    answers = await asyncio.gather(*(ask(client, each) for _, each in asked))
    reasons = [check(events, allowed) for (allowed, _), events in zip(asked, answers, strict=True)]
    assert reasons.count("tool_calls") >= 3, reasons
    assert reasoning(answers[5])


async def test_required_leaves_it_to_the_model_which(
    client: EngineClient, models: dict[bool, ModelRef]
) -> None:
    asked = [request(models[False], seed=seed, max_tokens=100) for seed in range(8)]
    answers = await asyncio.gather(*(ask(client, each) for each in asked))
    called = {event.name for events in answers for event in events if isinstance(event, ToolCall)}
    assert len(called) > 1


@pytest.mark.parametrize("are_special", [True, False], ids=["special", "text"])
async def test_the_call_that_a_template_writes_is_allowed(
    models: dict[bool, ModelRef], are_special: bool
) -> None:
    vocabulary, tokenizer = read_model(models[are_special])
    tools = [NOW, Tool("look", parameters=NOW.parameters), TOOL, Tool("look_up_all")]
    for source, way in TEMPLATES.values():
        text = ChatPrompts({"default": source}, {}).prompt(WITH_CALL, [TOOL]).text
        text = text.rpartition("Hi")[2].partition("42")[0]
        format = CALL_FORMATS[way]
        openers = [*format.dropped, *format.readers, *filter(None, [format.bare_start])]
        text = text[min(at for opener in openers if (at := text.find(opener)) >= 0) :]
        grammar = call_grammar(AnswerFormat(calls=way), tools, "required", tokenizer)
        followed(vocabulary, grammar, tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("are_special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("markers", _REASONING, ids=str)
async def test_reasoning_ends_at_its_marker_and_at_no_text_that_looks_like_it(
    tmp_path: Path, markers: tuple[str, str], are_special: bool
) -> None:
    tokenizer = byte_tokenizer()
    if are_special:  # Gemma 4's opens with a special token and more
        tokenizer.add_special_tokens([marker.removesuffix("thought") for marker in markers])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary, ours = read_model(ModelRef("m", str(tmp_path)))
    opening, closing = markers
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for begins in (True, False):
        format = AnswerFormat(markers, begins, "hermes")
        grammar = call_grammar(format, [NOW], "required", ours)
        for thought in ("", "\nHm, <tool_call> é</ \n"):
            text = f"{'' if begins else opening}{thought}{closing}\n\n{call}"
            assert not followed(vocabulary, grammar, ours.encode(text, add_special_tokens=False))
        if are_special:  # spelled out, it would be read as the token and end the reasoning too
            ids = [] if begins else ours.encode(opening, add_special_tokens=False)
            ids += [ours.encode(letter, add_special_tokens=False)[0] for letter in closing]
            with pytest.raises(NotFollowed):
                followed(vocabulary, grammar, ids)


async def test_every_format_is_tried_here() -> None:
    assert set(WRITTEN) == set(CALL_FORMATS)


@pytest.mark.parametrize("way", NOT_ENFORCED)
async def test_a_format_that_is_no_grammar_is_refused_by_name(
    client: EngineClient, models: dict[bool, ModelRef], way: str
) -> None:
    refused = (await ask(client, request(models[True], way=way)))[-1]
    assert isinstance(refused, Failed) and refused.code == "unsupported_constraint"
    assert way in refused.message and "Use auto" in refused.message


async def test_length_cuts_a_call_short_and_none_of_it_is_text(
    client: EngineClient, models: dict[bool, ModelRef]
) -> None:
    cut = [(way, most) for way in ("hermes", "llama", "pythonic", "glm") for most in (1, 8, 30)]
    asked = [
        request(models[True], "look_up", way=way, seed=i, max_tokens=most)
        for i, (way, most) in enumerate(cut)
    ]
    answers = await asyncio.gather(*(ask(client, each) for each in asked))
    for (_, most), events in zip(cut, answers, strict=True):
        assert check(events, [LOOK], most) == "length"
        assert not any(isinstance(event, ToolCall) for event in events)


@pytest.mark.parametrize(
    "fields", [{"stop": ["a", "{", "<"]}, {"ignore_eos": True}, {"min_tokens": 200}], ids=str
)
async def test_nothing_else_that_is_asked_ends_it_or_goes_on(
    client: EngineClient, models: dict[bool, ModelRef], fields: dict[str, Any]
) -> None:
    events = await ask(client, request(models[True], "now", tools=[NOW, NOTE], **fields))
    assert check(events, [NOW]) == "tool_calls"


async def test_rows_beside_it_say_what_they_say_alone(
    client: EngineClient, models: dict[bool, ModelRef]
) -> None:
    async def tokens(each: GenerationRequest) -> list[int]:
        return [e.token_id for e in await ask(client, each) if isinstance(e, Token)]

    free = [request(models[True], "auto", seed=100 + i, max_tokens=60 + i) for i in range(2)]
    held = [request(models[True], seed=i, way=way) for i, way in enumerate(ENFORCED[:3])]
    alone = [await tokens(each) for each in (*free, held[0])]
    together = await asyncio.gather(*map(tokens, free + held))
    assert together[:3] == alone and len(alone[0]) == 60


async def test_a_call_that_cannot_be_read_fails_and_says_why(
    client: EngineClient, models: dict[bool, ModelRef]
) -> None:
    one = {"type": "array", "minItems": 1, "maxItems": 1}
    levels: dict[str, Any] = {"l40": {"const": 1}}
    levels |= {f"l{i}": one | {"items": {"$ref": f"#/$defs/l{i + 1}"}} for i in range(40)}
    properties = {"a": {"$ref": "#/$defs/l0"}}
    deep = {"properties": properties, "required": ["a"], "additionalProperties": False}
    tool = Tool("deep", "", deep | {"$defs": levels})
    made = request(models[True], "deep", tools=[tool], way="llama", max_tokens=900)
    events = await ask(client, made)
    end = events[-1]
    assert isinstance(end, Failed) and end.code == "constraint_failed"
    assert "32 levels" in end.message
    assert not any(event.text for event in events if isinstance(event, Token))


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


NOT_CHECKED = {
    "not": schema(a={"not": {}}),
    "maxlength": schema(a={"type": "string", "maxlength": 3}),
    "must be object": {"type": "array"},
    "must be object, got": {"type": ["string", "null"]},
    "x-guidance": schema() | {"x-guidance": {"lenient": True}},
    "#/required": {"required": [3]},
    "#/type": {"type": {"a": 1}},
    "#/properties": {"properties": []},
    "#/properties/a/enum": schema(a={"enum": "xyz"}),
    "nothing is fetched": schema(a={"$ref": "https://example.com/x.json"}),
}


@pytest.mark.parametrize("said", NOT_CHECKED)
async def test_parameters_that_cannot_be_enforced_are_refused_by_name(said: str) -> None:
    tools = [NOW, Tool("bad", "", NOT_CHECKED[said])]
    for choice in ("required", "bad"):
        made = request(ModelRef("m", "m"), choice, tools=tools, sampling=Sampling())
        with pytest.raises(GryphonError) as caught:
            check_request(made)
        assert caught.value.code == "invalid_constraint"
        assert said in caught.value.message and "'bad'" in caught.value.message
    for choice in ("auto", "none", "now"):  # nothing is held to it
        check_request(request(ModelRef("m", "m"), choice, tools=tools, sampling=Sampling()))


async def test_what_does_not_go_with_it_is_refused() -> None:
    for fields in (
        {"tools": []},
        {"speculation": PromptLookup()},
        {"constraint": Constraint("json_object")},
    ):
        made = request(ModelRef("m", "m"), sampling=Sampling(), **fields)
        with pytest.raises(GryphonError, match="tool"):
            check_request(made)


HOSTILE = {
    "no such definition": ("hermes", schema(a={"$ref": "#/$defs/none"})),
    "nothing is valid": ("hermes", schema(a={"type": "integer", "minimum": 2, "maximum": 1})),
    "a required one is missing": ("qwen_xml", {"required": ["a"]}),
    "combined": ("qwen_xml", {"anyOf": [schema(a={"type": "string"})]}),
    "pattern between tags": ("qwen_xml", schema(a={"type": "string", "pattern": "^a+$"})),
    "no value between tags": ("glm", schema(a={"enum": []})),
    "no type between tags": ("glm", schema(a={})),
    "text read as JSON": ("glm", schema(a={"enum": ['{"a": 1}']})),
    "a tag in a value": ("glm", schema(a={"type": "string", "enum": ["</arg_value>"]})),
    "a name with tags": ("glm", schema(**{"a</arg_key>": {"type": "string"}})),
    "a name that is none in Python": ("pythonic", schema(**{"1a": {"type": "string"}})),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_parameters_are_refused_in_a_sentence(
    client: EngineClient, models: dict[bool, ModelRef], what: str
) -> None:
    way, parameters = HOSTILE[what]
    tools = [NOW, Tool("bad", "", parameters)]
    refused = (await ask(client, request(models[True], "bad", way=way, tools=tools)))[-1]
    assert isinstance(refused, Failed), refused
    assert refused.code in ("invalid_constraint", "unsupported_constraint"), refused
    assert "cannot be enforced" in refused.message and "auto" in refused.message
    assert "\n" not in refused.message and "json_" not in refused.message
    events = await ask(client, request(models[True], "now", way=way, tools=tools))
    assert check(events, [NOW]) == "tool_calls"
