"""What a model can do is found out from its template, in a process that a template cannot hang."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from app.engine import abilities
from app.engine.abilities import Abilities, AbilityFinder
from app.engine.ability_probe import abilities_of
from app.engine.protocol import ModelRef
from app.errors import GryphonError

from ..tiny_models import byte_tokenizer
from .test_chat_prompt import CHATML, GEMMA, MISTRAL, QWEN3

BROODING = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
EFFORT = "{{ reasoning_effort }}{% for m in messages %}{{ m.content }}{% endfor %}"
UNREADABLE = (
    "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def write(path: Path, template: str | None) -> Path:
    path.mkdir()
    byte_tokenizer().save(str(path / "tokenizer.json"))
    settings = {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, Abilities()),
        (CHATML, Abilities()),
        (GEMMA, Abilities()),
        (QWEN3, Abilities(tools=True, thinks=True, switch="enable_thinking")),
        (MISTRAL, Abilities(tools=True)),
        (BROODING, Abilities(thinks=True, thinks_unasked=True)),
        (EFFORT, Abilities(thinks=True, effort="reasoning_effort")),
        # Tells of tools, but nobody could read its calls: requests with tools are refused.
        (UNREADABLE, Abilities()),
    ],
)
def test_abilities(tmp_path: Path, template: str | None, expected: Abilities) -> None:
    found = abilities_of(write(tmp_path / "m", template))
    assert found.template == (template or "")
    assert [getattr(found, name) for name in Abilities.__struct_fields__[:-1]] == [
        getattr(expected, name) for name in Abilities.__struct_fields__[:-1]
    ]


async def test_found_out_once_for_each_state_of_the_files(tmp_path: Path) -> None:
    finder, ref = AbilityFinder(), ModelRef("m", str(write(tmp_path / "m", QWEN3)))
    first, again = await asyncio.gather(finder.of(ref, 1.0), finder.of(ref, 1.0))
    assert first is again and first.tools
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    assert (await finder.of(ref, 1.0)).tools
    assert not (await finder.of(ref, 2.0)).tools


@pytest.mark.parametrize("template", ["{% broken", ENDLESS])
async def test_a_template_that_is_broken_or_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(abilities, "TIME_LIMIT_S", 2.0)
    ref = ModelRef("m", str(write(tmp_path / "m", template)))
    with pytest.raises(GryphonError, match="m can do") as failed:
        await AbilityFinder().of(ref, 1.0)
    assert failed.value.code == "template_error"
