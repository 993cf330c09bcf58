# ruff: noqa: E501 (templates keep the lines they have)
"""Conversations as templates write them. The templates are shortened from those that the models
publish, with what matters kept: markers, roles they refuse, and how they want calls to be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.engine.answer_parts import AnswerFormat, AnswerParts
from app.engine.call_readers import Call
from app.engine.chat_prompt import BASE_MODEL, SYSTEM_FOLDED, TURNS_JOINED, ChatPrompt, ChatPrompts
from app.engine.conversation import Message, Tool, ToolCallPart
from app.errors import GryphonError
from mlxmodels.tokenizer import read_chat_templates

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = Tool("look_up", "Finds things.", {"type": "object", "properties": {"q": {"type": "string"}}})
CALL = ToolCallPart("call_0a1b2c3d4e5f0a1b2c3d4e5f", "look_up", '{"q": "a \\"b\\""}')
ASK = [Message("system", "Be brief."), Message("user", "Hi")]
WITH_CALL = [
    Message("user", "Hi"),
    Message("assistant", "", tool_calls=[CALL]),
    Message("tool", "42", tool_call_id=CALL.id),
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
NEMOTRON = (
    "{{'<extra_id_0>System'}}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'\\n' + message['content'].strip()}}{% endif %}{% endfor %}{% if tools %}"
    "{% for tool in tools %}{{ '\\n<tool> ' + tool|tojson + ' </tool>' }}{% endfor %}{% endif %}"
    "{{'\\n\\n'}}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<extra_id_1>User\\n' + message['content'].strip() + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<extra_id_1>Assistant\\n' + message['content'].strip() + '\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<extra_id_1>Tool\\n' + message['content'].strip() + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<extra_id_1>Assistant\\n'}}{% endif %}"
)
# Qwen 3: past reasoning is dropped up to the last question, and kept from there on.
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\nAnswer with <tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query_index and message.reasoning_content %}
            {{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """
{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("conversation roles must alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and tools is not none %}{{- "[AVAILABLE_TOOLS]" + tools|tojson + "[/AVAILABLE_TOOLS]" }}{%- endif %}
        {{- "[INST]" + (system_message + "\\n\\n" if loop.last and system_message is defined else "") + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{{- "]" + eos_token if loop.last else ", " }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- message["content"] + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- if message.tool_call_id|length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}
"""
# DeepSeek R1: arguments are text, no content is None, and the prompt opens the reasoning. Its
# distilled models say nothing of tools; V3.1 does, in words like these.
DEEPSEEK = """
{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- endif %}{%- endfor %}
{%- if tools %}{{- "## Tools\\n" }}{%- for tool in tools %}{{- tool.function | tojson }}{%- endfor %}{%- endif %}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] }}{%- endif -%}
  {%- if message['role'] == 'assistant' and message['tool_calls'] -%}
    {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
    {%- for tool in message['tool_calls'] -%}
      {{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message['content'] is not none -%}
    {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
  {%- endif -%}
  {%- if message['role'] == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' }}{%- endif -%}
"""
QWEN_CODER = """
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '<function><name>' ~ tool.function.name ~ '</name></function>' }}{%- endfor %}{{- '</tools><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.content is string %}{{- message.content }}{%- endif %}
    {%- for tool_call in message.tool_calls or [] %}
        {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
        {{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
        {%- for name, value in tool_call.arguments|items %}{{- '<parameter=' + name + '>\\n' }}{{- value if value is string else value | tojson }}{{- '\\n</parameter>\\n' }}{%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
GRANITE = """
{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' + tools|tojson(indent=4) + '<|end_of_text|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}{{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>[' }}{%- for c in message.tool_calls %}{{- {'name': c.function.name, 'arguments': c.function.arguments}|tojson }}{%- endfor %}{{- ']<|end_of_text|>\\n' }}
    {%- else %}{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
"""

# SmolLM3 takes tools under a name of its own, writes them as Python, and leaves calls to the content.
SMOLLM3 = """
{{- "<|im_start|>system\\n" }}
{%- if xml_tools %}{{- "Call them in <tool_call></tool_call>:\\n<tools>" }}{%- for tool in xml_tools %}{{- tool | string }}{%- endfor %}{{- "</tools>" }}{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}{{- "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- elif message.role == "tool" %}{{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""

# LFM2 says nothing of how calls are written.
LFM2 = """
{{- bos_token -}}
{%- if tools -%}{{- "<|im_start|>system\\nList of tools: <|tool_list_start|>[" -}}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{{- "]<|tool_list_end|><|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


def prompt(source: str | dict[str, str], *given: Any, **options: Any) -> ChatPrompt:
    sources = {"default": source} if isinstance(source, str) else source
    return ChatPrompts(sources, SPECIAL).prompt(*given, **options)


def refused(source: str | dict[str, str], *given: Any, code: str = "invalid_request") -> str:
    with pytest.raises(GryphonError) as caught:
        prompt(source, *given)
    assert caught.value.code == code
    return caught.value.message


# Roles.


def test_a_system_message_goes_where_the_template_has_a_place_for_it() -> None:
    chat = prompt(CHATML, ASK)
    assert chat.text.startswith("<|im_start|>system\nBe brief.") and chat.notice == ""


def test_gemma_gets_the_system_message_in_the_first_user_turn_and_says_so() -> None:
    """Gemma, Gemma 2 and RecurrentGemma publish this template."""
    chat = prompt(GEMMA, [*ASK, Message("assistant", "Yo"), Message("user", "More")])
    assert chat.text == (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYo"
        "<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n"
    )
    assert chat.notice == SYSTEM_FOLDED


def test_a_template_that_drops_the_system_message_in_silence_gets_it_folded() -> None:
    silent = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    chat = prompt(silent, ASK)
    assert "user\nBe brief.\n\nHi" in chat.text and chat.notice == SYSTEM_FOLDED


def test_turns_that_must_alternate_are_joined() -> None:
    chat = prompt(GEMMA, [Message("user", "a"), Message("user", "b")])
    assert "user\na\n\nb<end_of_turn>" in chat.text and chat.notice == TURNS_JOINED
    both = prompt(GEMMA, [*ASK, Message("user", "b")])
    assert "user\nBe brief.\n\nHi\n\nb<end_of_turn>" in both.text
    assert both.notice == f"{SYSTEM_FOLDED} {TURNS_JOINED}"


def test_a_later_system_message_is_folded_where_only_the_first_has_a_place() -> None:
    turns = [
        *ASK,
        Message("assistant", "Yo"),
        Message("system", "Now rhyme."),
        Message("user", "b"),
    ]
    chat = prompt(MISTRAL, turns)
    assert "Now rhyme.\n\nb[/INST]" in chat.text and chat.notice == SYSTEM_FOLDED


def test_what_cannot_be_arranged_is_refused_in_the_templates_own_words() -> None:
    turns = [Message("assistant", "a"), Message("user", "b")]
    assert "must alternate" in refused(GEMMA, turns, code="template_error")


def test_nemotron_has_a_system_turn() -> None:
    chat = prompt(NEMOTRON, ASK)
    assert chat.text == (
        "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
    )
    assert chat.notice == ""


def test_a_base_model_continues_the_text_and_says_so() -> None:
    chat = prompt({}, ASK)
    assert (chat.text, chat.notice) == ("Be brief.\n\nHi", BASE_MODEL)
    assert chat.format.is_plain


# Tools.

TEMPLATES = {
    "nemotron": (NEMOTRON, "nemotron"),
    "qwen3": (QWEN3, "hermes"),
    "llama": (LLAMA, "llama"),
    "mistral": (MISTRAL, "mistral"),
    "deepseek": (DEEPSEEK, "deepseek"),
    "qwen-coder": (QWEN_CODER, "qwen_xml"),
    "granite": (GRANITE, "granite"),
    "smollm3": (SMOLLM3, "hermes"),
    "lfm2": (LFM2, "lfm2"),
}


@pytest.mark.parametrize(("source", "format"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_tells_of_tools_and_how_it_writes_calls(source: str, format: str) -> None:
    chat = prompt(source, [Message("user", "Hi")], [TOOL])
    assert "look_up" in chat.text and chat.format.calls == format
    assert prompt(source, [Message("user", "Hi")]).format.calls == ""


@pytest.mark.parametrize("source", [source for source, _ in TEMPLATES.values()], ids=TEMPLATES)
def test_a_call_that_a_template_writes_is_read_as_that_call(source: str) -> None:
    """What went in as objects or as text, with ids as they must be, comes out as it was."""
    chat = prompt(source, WITH_CALL, [TOOL])
    between = chat.text.split("Hi")[-1].split("42")[0].split("assistant<|end_header_id|>\n\n")[-1]
    parts = AnswerParts(AnswerFormat(calls=chat.format.calls), [TOOL]).add(between)
    assert Call("look_up", CALL.arguments) in parts
    assert "42" in chat.text and "None" not in chat.text


def test_an_empty_answer_beside_a_call_leaves_no_turn_of_its_own() -> None:
    assert prompt(DEEPSEEK, WITH_CALL, [TOOL]).text.count("<｜Assistant｜>") == 2


@pytest.mark.parametrize("source", [CHATML, GEMMA], ids=["chatml", "gemma"])
def test_tools_that_a_template_would_ignore_are_refused(source: str) -> None:
    assert "has no tools" in refused(source, [Message("user", "Hi")], [TOOL])
    assert "tool calls" in refused(source, WITH_CALL)


def test_tools_are_refused_where_calls_could_not_be_read() -> None:
    unknown = QWEN3.replace("<tool_call>", "«call»").replace("</tool_call>", "«end»")
    assert "not one that this version reads" in refused(unknown, [Message("user", "Hi")], [TOOL])


def test_a_base_model_refuses_tools() -> None:
    assert "knows no tools" in refused({}, [Message("user", "Hi")], [TOOL])


def test_the_template_for_tools_is_used_for_conversations_with_tools() -> None:
    sources = {"default": CHATML, "tool_use": QWEN3}
    assert prompt(sources, [Message("user", "Hi")], [TOOL]).format.calls == "hermes"
    assert "<tool_call>" in prompt(sources, WITH_CALL).text
    assert prompt(sources, ASK).format.is_plain
    assert "none is named default" in refused({"rag": CHATML, "x": ""}, ASK, code="template_error")


# Reasoning.


def test_reasoning_is_looked_for_where_the_template_knows_it() -> None:
    question = [Message("user", "Hi")]
    qwen = prompt(QWEN3, question).format
    assert qwen.reasoning == ("<think>", "</think>") and not qwen.begins_reasoning
    assert prompt(DEEPSEEK, question).format.begins_reasoning
    assert prompt(CHATML, [Message("user", "Say <think>")]).format.is_plain


def test_an_option_reaches_the_template_and_one_it_lacks_is_refused() -> None:
    chat = ChatPrompts({"default": QWEN3}, SPECIAL)
    off = chat.prompt([Message("user", "Hi")], options={"enable_thinking": False})
    assert off.text.endswith("<think>\n\n</think>\n\n") and not off.format.begins_reasoning
    with pytest.raises(GryphonError, match="no option 'enable_thinking'"):
        prompt(CHATML, ASK, options={"enable_thinking": False})
    for name in ("enable_think", "thinking", "assistant"):  # a slip, or a word of its text
        with pytest.raises(GryphonError, match=f"no option '{name}'"):
            prompt(QWEN3, ASK, options={name: False})
    with pytest.raises(GryphonError, match="base model"):
        prompt({}, ASK, options={"enable_thinking": False})


def test_past_reasoning_is_given_to_the_template() -> None:
    thought = Message("assistant", "", reasoning="Hm.", tool_calls=[CALL])
    text = prompt(QWEN3, [WITH_CALL[0], thought, WITH_CALL[2]], [TOOL]).text
    assert "<think>\nHm.\n</think>" in text
    later = prompt(QWEN3, [WITH_CALL[0], thought, WITH_CALL[2], Message("user", "x")], [TOOL]).text
    assert "Hm." not in later


# Where templates are found, and what they are given.


def test_tojson_takes_transformers_options_and_generation_marks_nothing() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ {'b': 'é<', 'a': 1} | tojson(sort_keys=True, "
        "separators=(',', ':')) }}{% endgeneration %}{% endfor %}{{ unk_token }}{{ bos_token }}"
        "{% if documents is none and tools is none %}none{% endif %}"
    )
    chat = ChatPrompts({"default": source}, {"unk_token": "<unk>"}).prompt([Message("user", "x")])
    assert chat.text == '{"a":1,"b":"é<"}<unk>none'


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
        (
            {"tokenizer_config.json": {"chat_template": {"default": "A", "tool_use": "T"}}},
            {"default": "A", "tool_use": "T"},
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "default", "template": "A"},
                        {"name": "tool_use", "template": "T"},
                        {"name": 3},
                        "x",
                    ]
                }
            },
            {"default": "A", "tool_use": "T"},
        ),
        ({"chat_template.json": {"chat_template": "P"}}, {"default": "P"}),
        (
            {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T",
             "tokenizer_config.json": {"chat_template": "A"}},
            {"default": "J", "tool_use": "T"},
        ),
        (
            {"additional_chat_templates/tool_use.jinja": "T",
             "tokenizer_config.json": {"chat_template": "A"}},
            {"default": "A", "tool_use": "T"},
        ),
        ({"tokenizer_config.json": {"chat_template": 3}}, {}),
    ],
)  # fmt: skip
def test_templates_are_found_where_models_keep_them(
    tmp_path: Path, files: dict[str, Any], found: dict[str, str]
) -> None:
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_chat_templates(tmp_path) == found
