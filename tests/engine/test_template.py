"""Chat templates: rendered in a sandbox, refused clearly."""

from __future__ import annotations

import pytest

from app.engine.chat_prompt import ChatPrompts
from app.engine.protocol import Message
from app.engine.template import ChatTemplate, PromptEncoder
from app.errors import GryphonError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURN = [{"role": "user", "content": "Hi <b>&</b> {{ 7 * 7 }}"}]


class WordTokenizer:
    """Words are tokens; BOS is added like Llama's, with an EOS suffix like some others'."""

    def __init__(self, prefix: list[str], suffix: list[str]) -> None:
        self.prefix, self.suffix = prefix, suffix

    def encode(self, text: str, *, add_special_tokens: bool) -> list[str]:
        words = text.split()
        return self.prefix + words + self.suffix if add_special_tokens else words


def test_a_conversation_is_rendered_open_for_the_answer() -> None:
    rendered = ChatTemplate(CHATML, {}).render(TURN)
    assert rendered == (
        "<|im_start|>user\nHi <b>&</b> {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_model_gets_the_contents_alone() -> None:
    prompt = ChatPrompts({}, {}).prompt([Message("system", "A"), Message("user", "B")])
    assert prompt.text == "A\n\nB"
    assert "base model" in prompt.notice


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "append"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ nothing.at_all }}", "undefined"),
    ],
)
def test_what_a_template_may_not_do_is_one_clear_error(source: str, said: str) -> None:
    with pytest.raises(GryphonError) as caught:
        ChatTemplate(source, {}).render(TURN)
    assert caught.value.code == "template_error"
    assert said in caught.value.message


def test_a_template_that_is_not_jinja_names_the_line() -> None:
    with pytest.raises(GryphonError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})


@pytest.mark.parametrize("text", ["one two", "<s> one two", "<s> <s> one two"])
def test_the_prefix_is_there_exactly_once(text: str) -> None:
    encoder = PromptEncoder(WordTokenizer(["<s>"], []))
    assert encoder.encode(text) == ["<s>", "one", "two"]


def test_a_suffix_is_never_added_and_no_prefix_stays_none() -> None:
    assert PromptEncoder(WordTokenizer([], ["</s>"])).encode("one") == ["one"]
    assert PromptEncoder(WordTokenizer(["<s>"], ["</s>"])).encode("") == ["<s>"]
