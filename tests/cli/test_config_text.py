"""Changing configuration files as text: one place changes, everything else stays, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cli.config_text import (
    Named,
    NotEditable,
    Put,
    TextFormat,
    Unreadable,
    edited,
    jsonc,
    merged,
    puts,
    script,
    toml_text,
    yaml_text,
)

OURS = Put(("servers", "ours", "url"), "http://127.0.0.1:11500")

KEYS = st.sampled_from(["a", "b", "servers", "ours", "url", 'ünï "q" #', "{"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "x // y", "# no", 'a"b'])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
CHANGES = st.builds(
    Put,
    st.lists(KEYS, min_size=1, max_size=3).map(tuple),
    SCALARS.filter(lambda value: value is not None) | st.lists(SCALARS, max_size=2),
)


def with_comments(text: str, draw: Any) -> str:
    """JSON with comments, spaces and trailing commas strewn in where JSONC allows them."""
    result, in_string, number, before = [], False, 0, ""
    for index, char in enumerate(text):
        if char == '"' and text[index - 1] != "\\":
            in_string = not in_string
        if not in_string and char in "]}" and before not in ("[", "{"):
            result.append(draw(st.sampled_from(["", ","])))
        before = before if char.isspace() else char
        result.append(char)
        if not in_string and char in "[{,:":
            number += 1
            style = draw(
                st.sampled_from(["", "", " ", f" // c{number} {{,\n", f"/* c{number}, */"])
            )
            result.append(style)
    return "".join(result)


def comments_of(text: str) -> list[str]:
    return [text[start:end] for kind, start, end in jsonc._tokens(text) if kind == "comment"]


@settings(deadline=None, max_examples=60)
@given(st.data(), DOCUMENTS, CHANGES, st.sampled_from([None, 2, "\t"]))
def test_jsonc_changes_one_place_and_keeps_every_comment(
    data: Any, document: dict[str, Any], change: Put, indent: Any
) -> None:
    text = with_comments(json.dumps(document, indent=indent, ensure_ascii=False), data.draw)
    assert jsonc.read(text) == document
    try:
        wanted = merged(document, change)
    except NotEditable:
        with pytest.raises(NotEditable):
            edited(jsonc, text, [change])
        return
    result = edited(jsonc, text, [change])
    assert jsonc.read(result) == wanted
    assert edited(jsonc, result, [change]) == result
    kept = [one for one in comments_of(text) if one not in comments_of(result)]
    # Only a list or a null that is replaced takes the comments inside of it along.
    if kept:
        place: Any = document
        for step in change.path:
            place = place.get(step) if isinstance(place, dict) else None
        assert isinstance(place, list | dict)


def yaml_of(document: Any, draw: Any) -> str:
    flow = draw(st.sampled_from([False, None]))
    lines = yaml.safe_dump(
        document, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=4000
    ).splitlines()
    result = ["# the first line"]
    for line in lines:
        result.append(line)
        # Not after a line that may go on in the next one.
        if draw(st.booleans()) and line.rstrip().endswith((":", "x // y", "true", "false")):
            result.append("# a note")
    return "\n".join(result) + draw(st.sampled_from(["", "\n", "\n# the last line\n"]))


@settings(deadline=None, max_examples=60)
@given(st.data(), DOCUMENTS, CHANGES)
def test_yaml_is_changed_rightly_or_not_at_all(
    data: Any, document: dict[str, Any], change: Put
) -> None:
    text = yaml_of(document, data.draw)
    try:
        result = edited(yaml_text, text, [change])
    except NotEditable:
        return
    assert yaml.safe_load(result) == merged(document, change)
    assert edited(yaml_text, result, [change]) == result
    assert result.count("# a note") == text.count("# a note")
    assert result.startswith("# the first line\n")


ZED = """\
// Zed settings
//
// For information on how to configure Zed, see the docs.
{
  "theme": "One Dark", // dark, of course
  /* fonts */
  "buffer_font_size": 15,
  "language_models": {
    "openai_compatible": {
      "work": {
        "api_url": "https://llm.example.com/v1", // "quoted", with { and }
        "available_models": []
      } // no comma here
    }
  },
  "vim_mode": true,
  // "disabled": 1,
}
"""


def test_a_place_is_added_to_settings_with_comments() -> None:
    place = ("language_models", "openai_compatible", "gryphon")
    result = edited(jsonc, ZED, puts(place, {"api_url": "http://x/v1", "available_models": ["m"]}))
    old, new = ZED.splitlines(), result.splitlines()
    assert [line for line in new if line not in old] == [
        "      }, // no comma here",
        '      "gryphon": {',
        '        "api_url": "http://x/v1",',
        '        "available_models": [',
        '          "m"',
        "        ]",
        "      }",
    ]
    assert [line for line in old if line not in new] == ["      } // no comma here"]
    assert result.endswith('  "vim_mode": true,\n  // "disabled": 1,\n}\n')


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", '{\n  "a": {\n    "b": 1\n  }\n}\n'),
        ("// only a comment", '// only a comment\n{\n  "a": {\n    "b": 1\n  }\n}\n'),
        ("{}", '{\n  "a": {\n    "b": 1\n  }\n}'),
        ('{"x": 0}', '{"x": 0,\n  "a": {\n    "b": 1\n  }\n}'),
        ('{\n\t"x": 0, // c\n}', '{\n\t"x": 0, // c\n\t"a": {\n\t\t"b": 1\n\t},\n}'),
        ('{\n    "a": {}\n}', '{\n    "a": {\n        "b": 1\n    }\n}'),
        ('{"a": null}', '{"a": {\n  "b": 1\n}}'),
        ('{"a": {"b": 2 /* two */}}', '{"a": {"b": 1 /* two */}}'),
        ('{\r\n  "x": 0\r\n}\r\n', '{\r\n  "x": 0,\r\n  "a": {\r\n    "b": 1\r\n  }\r\n}\r\n'),
        ('\ufeff{"a": {"b": 2}}', '\ufeff{"a": {"b": 1}}'),
    ],
)
def test_json_follows_the_layout_that_is_there(text: str, want: str) -> None:
    assert edited(jsonc, text, [Put(("a", "b"), 1)]) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", "a:\n  - name: n\n    b: 1\n"),
        ("x: 0", "x: 0\na:\n  - name: n\n    b: 1\n"),
        ("a: []\n", 'a: [{"name": "n", "b": 1}]\n'),
        ("a: # ours\nx: 0\n", "a: # ours\n  - name: n\n    b: 1\nx: 0\n"),
        ("a:\n- name: m # m\n# end\n", "a:\n- name: m # m\n- name: n\n  b: 1\n# end\n"),
        ("a:\n  - name: n\n    b: 2 # two\n", "a:\n  - name: n\n    b: 1 # two\n"),
        ("a: [{name: m}]\n", 'a: [{name: m}, {"name": "n", "b": 1}]\n'),
        ("a:\n  - name: m\n    t: |\n      text\n\nx: 0\n", None),
        ("a:\r\n- name: m\r\nx: 0\r\n", "a:\r\n- name: m\r\n- name: n\r\n  b: 1\r\nx: 0\r\n"),
        ("a: &all\n  - name: m\nx: 0\n", "a: &all\n  - name: m\n  - name: n\n    b: 1\nx: 0\n"),
        ("---\n# c\na: !!seq\n- name: m\n...\n", None),
        ("b: &b {name: m}\na:\n  - *b\n  - <<: *b\n    name: k\n", None),
    ],
)  # fmt: skip
def test_yaml_follows_the_layout_that_is_there(text: str, want: str | None) -> None:
    change = Put(("a", Named("n"), "b"), 1)
    result = edited(yaml_text, text, [change])
    assert yaml.safe_load(result) == merged(yaml.safe_load(text), change)
    assert want is None or result == want


def test_toml_keeps_comments_and_order() -> None:
    text = '# mine\nmodel = "gpt"  # the best\n\n[model_providers.work] # w\nname = "W"\n\n[tui]\n'
    place = ("model_providers", "gryphon")
    result = edited(toml_text, text, puts(place, {"name": "Gryphon", "wire_api": "responses"}))
    added = '[model_providers.gryphon]\nname = "Gryphon"\nwire_api = "responses"\n'
    assert added in result
    assert result.replace(added, "").replace("\n", "") == text.replace("\n", "")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

UNREADABLE = [
    (jsonc, '{"a": 1'),
    (jsonc, '{"a": 1 "b": 2}'),
    (jsonc, "{'a': 1}"),
    (jsonc, '{"a": NaN}'),
    (jsonc, '{"a": 01}'),
    (jsonc, '{"a": 1} x'),
    (jsonc, '{,"a": 1}'),
    (jsonc, '{"a": 1} /* no end'),
    (jsonc, '{"a\n": 1}'),
    (jsonc, "[" * 100_000),
    (jsonc, "{" * 3 + '"a":' * 50_000),
    (jsonc, f'{{"a": {"9" * 5000}}}'),
    (jsonc, " " * 4_000_001),
    (yaml_text, "a: [1"),
    (yaml_text, "a: b: c"),
    (yaml_text, "\ta: 1"),
    (yaml_text, "a: 1\n---\nb: 2\n"),
    (yaml_text, "a: 1\na: 2\n"),
    (yaml_text, "a: !!python/object:os.system x\n"),
    (yaml_text, "a: *unknown\n"),
    (yaml_text, "a: &a [*a]\n"),
    (yaml_text, "[" * 2000),
    (yaml_text, BOMB),
    (toml_text, "a = "),
    (toml_text, "a = 1\na = 2\n"),
]


@pytest.mark.parametrize(("text_format", "text"), UNREADABLE)
def test_what_cannot_be_read_is_refused(text_format: TextFormat, text: str) -> None:
    with pytest.raises(Unreadable):
        edited(text_format, text, [OURS])


@pytest.mark.parametrize(
    ("text_format", "text"),
    [
        (jsonc, '{"servers": 1}'),
        (jsonc, '{"servers": {"ours": []}}'),
        (jsonc, "[]"),
        (jsonc, "7"),
        (jsonc, '{"servers": {}, "servers": {}}'),
        (yaml_text, "servers: text\n"),
        (yaml_text, "- servers\n"),
        (yaml_text, "base: &b {x: 1}\nservers: *b\nother: *b\n"),
        (toml_text, "servers = 1\n"),
        (toml_text, "[[servers]]\n"),
    ],
)
def test_what_stands_in_the_way_is_refused(text_format: TextFormat, text: str) -> None:
    with pytest.raises(NotEditable):
        edited(text_format, text, [OURS])


def test_a_format_that_changes_more_than_it_should_is_found_out() -> None:
    class Careless:
        read = staticmethod(jsonc.read)

        @staticmethod
        def put(text: str, path: Any, value: Any) -> str:
            return jsonc.put(text, path, value).replace("true", "false")

    with pytest.raises(NotEditable, match="without changing something else"):
        edited(Careless(), '{"mine": true}', [OURS])


def test_only_if_absent_leaves_what_is_there() -> None:
    change = [Put(("a",), 1, only_if_absent=True)]
    assert edited(jsonc, '{"a": 2}', change) == '{"a": 2}'
    assert jsonc.read(edited(jsonc, '{"a": null}', change)) == {"a": 1}


def block(text: str, line: str) -> str:
    return script.with_block(text, [line], comment='"', guards="g:x")


def test_a_block_is_put_at_the_top_and_changed_in_its_place() -> None:
    text = 'set nocompatible\n" let g:x = 0\n'
    once = block(text, "let g:x = 1")
    assert once.endswith(text) and "let g:x = 1\n" in once
    assert block(once, "let g:x = 1") == once
    assert block(f'" mine\n{once}', "let g:x = 2") == f'" mine\n{once}'.replace("= 1", "= 2")
    with pytest.raises(NotEditable, match="line 2 sets g:x"):
        block("set ruler\nlet g:x = 3\n", "let g:x = 1")
    with pytest.raises(NotEditable, match="once each"):
        block(once.replace("end", "END"), "let g:x = 1")
