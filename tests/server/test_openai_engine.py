"""OpenAI's routes over the real engine: a tiny model with random weights tries all it is let."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from app.engine.client import EngineClient
from app.library.installed import InstalledModel, read_model
from app.server.serving import ServerOptions, ServerThread

from ..tiny_models import OPEN_LLAMA, write_model

# Tells of tools and writes calls as Hermes does.
TEMPLATE = (
    "{{ tools|tojson if tools }}{% for m in messages %}\n{{ m.role }}: {{ m.content or '' }}"
    "{% for t in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments|tojson }}}\n'
    "</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "°F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 40},
    },
    "required": ["days", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
CONTEXT = 4096
ASK: Any = [{"role": "user", "content": "Hi"}]


class OneModel:
    """`app.library.installed` with one model."""

    def __init__(self, path: Path) -> None:
        self.model = read_model(path, "tiny", "gryphon")

    def installed_models(self) -> list[InstalledModel]:
        return [self.model]

    def find_model(self, name: str | None = None, *, allow_path: bool = False) -> InstalledModel:
        assert name == "tiny"
        return self.model


@pytest.fixture(scope="module")
def tiny(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    config = OPEN_LLAMA | {"eos_token_id": 258, "max_position_embeddings": CONTEXT}
    path = write_model(tmp_path_factory.mktemp("models") / "tiny", config)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    thread = ServerThread(EngineClient, ServerOptions(port=0), models=OneModel(path))
    thread.start()
    try:
        with openai.OpenAI(base_url=f"{thread.url}/v1", api_key="x", max_retries=0) as client:
            yield client
    finally:
        thread.stop()


def texts(client: openai.OpenAI, **asked: Any) -> list[str | None]:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=1, max_tokens=8, **asked
    )
    return [choice.message.content for choice in answer.choices]


def test_seeded_choices_differ_and_are_the_same_again(tiny: openai.OpenAI) -> None:
    three = texts(tiny, n=3, seed=11)
    assert len(set(three)) == 3
    assert texts(tiny, n=3, seed=11) == three
    assert texts(tiny, seed=11) == three[:1]
    assert texts(tiny, n=3, seed=12) != three


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_is_valid(tiny: openai.OpenAI, choice: Any, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": ASK,
        "tools": TOOLS[:1] if choice == "required" else TOOLS,
        "tool_choice": choice,
        "temperature": 1,
        "seed": 3,
    }
    if stream:
        with tiny.chat.completions.stream(**asked) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = tiny.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    # It goes on with the result.
    again = [
        *ASK,
        answer.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "22"},
    ]
    last = tiny.chat.completions.create(model="tiny", messages=again, max_tokens=2)
    assert last.usage is not None and last.usage.completion_tokens <= 2


def test_a_forced_call_of_responses_is_valid(tiny: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    with tiny.responses.stream(
        model="tiny", input="Hi", tools=[tool], tool_choice="required", temperature=1
    ) as stream:
        response = stream.get_final_response()
    (item,) = response.output
    assert item.type == "function_call"
    jsonschema.validate(json.loads(item.arguments), SCHEMA)
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "22"}
    call = item.model_dump(exclude_unset=True, exclude={"parsed_arguments"})
    sent: Any = [{"role": "user", "content": "Hi"}, call, output]
    again = tiny.responses.create(model="tiny", input=sent, tools=[tool], max_output_tokens=3)
    assert again.usage is not None and again.usage.output_tokens <= 3


@pytest.mark.parametrize("route", ["chat", "responses"])
def test_an_answer_is_held_to_its_schema(tiny: openai.OpenAI, route: str) -> None:
    named: dict[str, Any] = {"name": "weather", "schema": SCHEMA, "strict": True}
    if route == "chat":
        form: Any = {"type": "json_schema", "json_schema": named}
        answer = tiny.chat.completions.create(
            model="tiny", messages=ASK, response_format=form, temperature=1
        )
        text = answer.choices[0].message.content or ""
    else:
        form = {"type": "json_schema"} | named
        text = tiny.responses.create(
            model="tiny", input="Hi", text={"format": form}, temperature=1
        ).output_text
    jsonschema.validate(json.loads(text), SCHEMA)


def test_an_answer_is_one_of_those_given(tiny: openai.OpenAI) -> None:
    choices = ['say "no"', "yes\\maybe", "ö"]
    for seed in range(4):
        (text,) = texts(
            tiny,
            seed=seed,
            extra_body={"structured_outputs": {"choice": choices}, "max_tokens": 40},
        )
        assert text in choices


def test_logprobs_are_of_a_distribution(tiny: openai.OpenAI) -> None:
    answer = tiny.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for token in logprobs.content:
        tops = [one.logprob for one in token.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1 + 1e-6
        assert token.logprob == tops[0]  # greedy
    raw = tiny.completions.create(
        model="tiny", prompt="Hi", max_tokens=4, temperature=0, logprobs=3
    )
    own = raw.choices[0].logprobs
    assert own is not None and own.token_logprobs is not None
    assert len(own.token_logprobs) == 4


def test_biased_tokens_are_drawn(tiny: openai.OpenAI) -> None:
    alike = texts(tiny, logit_bias={"65": 100}, seed=1)
    other = texts(tiny, logit_bias={"66": 100}, seed=1)
    assert alike != other
    for (text,) in (alike, other):
        assert text is not None and len(text) == 8 and len(set(text)) == 1


def test_prompts_are_answered_as_if_alone(tiny: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 1, "seed": 5}
    prompts = ["Once upon", "a time there"]
    both = tiny.completions.create(prompt=prompts, echo=True, **asked)
    alone = [tiny.completions.create(prompt=one, **asked) for one in prompts]
    assert [one.text for one in both.choices] == [
        prompt + one.choices[0].text for prompt, one in zip(prompts, alone, strict=True)
    ]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"chat_template_kwargs": {"mood": "good"}}, "no option 'mood'"),
        ({"logit_bias": {"100000": 1}}, "token ids of 0 to"),
        ({"chat_template_kwargs": {"tools_in_user_message": 2**70}}, "64 bits"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "regex"),
    ],
)
def test_what_the_engine_refuses_is_a_bad_request(
    tiny: openai.OpenAI, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.chat.completions.create(model="tiny", messages=ASK, extra_body=more)
    assert said in caught.value.message


def test_a_model_without_tokens_for_a_gap_says_which_can(tiny: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="No installed model can") as caught:
        tiny.completions.create(model="tiny", prompt="a(", suffix=")")
    assert caught.value.code == "no_infill"


def test_the_room_in_memory_is_reported(tiny: openai.OpenAI) -> None:
    texts(tiny)
    (model,) = tiny.models.list().data
    assert model.model_extra is not None and model.model_extra["context_length"] == CONTEXT
