"""The settings file: what is wrong is named with its line, edits leave the rest alone."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path

import pytest

from app import settings_file
from app.errors import GryphonError


@pytest.fixture
def path(home: Path) -> Path:
    """Where it lies; its directory exists."""
    (home / "config").mkdir()
    return home / "config" / "settings.toml"


def refusal(text: str, path: Path) -> str:
    path.write_text(text)
    with pytest.raises(GryphonError) as caught:
        settings_file.read()
    assert caught.value.code == "invalid_setting"
    return caught.value.message


def test_it_need_not_exist_and_reading_makes_nothing(home: Path) -> None:
    assert settings_file.read() == settings_file.Stored()
    assert settings_file.keep_alive_s() == 300
    assert not (home / "config").exists()


def test_what_it_says_and_that_the_environment_wins(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(
        'keep_alive = 60\ndefault_model = "org/a"\n[aliases]\nfast = "org/b"\n"a.b" = "c"'
    )
    assert settings_file.read() == settings_file.Stored(60, "org/a", {"fast": "org/b", "a.b": "c"})
    assert settings_file.keep_alive_s() == 60
    for text, expected in (("-1", -1), ("0", 0), ("", 60)):
        monkeypatch.setenv("GRYPHON_KEEP_ALIVE", text)
        assert settings_file.keep_alive_s() == expected
    path.write_text("keep_alive = inf")
    assert settings_file.keep_alive_s() == float("inf")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n\nkeep_alife = 3\n", "line 3: 'keep_alife' is no setting; there are keep_alive"),
        ("[other]\n", "line 1: 'other' is no setting"),
        ("x.y = 1", "line 1: 'x' is no setting"),
        ('keep_alive = "5m"', "line 1: 'keep_alive' must be a number of seconds"),
        ("keep_alive = nan", "line 1: 'keep_alive' must be a number of seconds"),
        ("keep_alive = true", "line 1: 'keep_alive' must be a number of seconds"),
        (
            "# hello\ndefault_model = 3",
            "line 2: 'default_model' must be the name of a model, got 3",
        ),
        ('default_model = ""', "must be the name of a model"),
        ('default_model = "a\\u001b[2J"', "must be the name of a model"),
        ("aliases = 3", "line 1: 'aliases' must be a table"),
        ('[[aliases]]\nx = "y"', "must be a table"),
        ('[aliases]\nfast = "a"\n"../x" = "b"', "line 3: '../x' cannot be an alias"),
        ("[aliases]\nfast = {a = 1}", "line 2: 'fast' must be the name of a model"),
        ("keep_alive = \n", "not TOML: Invalid value (at line 1"),
        ("keep_alive = 1\nkeep_alive = 2\n", "not TOML"),
        ("a" * 1_000_001, "more than 1,000,000 bytes"),
        ("x=" + "[" * 100_000, "not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(path: Path, text: str, said: str) -> None:
    message = refusal(text, path)
    assert said in message and str(path) in message and len(message) < 1000
    assert message.isprintable()
    with pytest.raises(GryphonError):  # and is mended by its owner, not overwritten
        settings_file.set_default_model("org/x")
    assert path.read_text() == text


def test_a_file_that_is_no_text_is_named(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(GryphonError, match="not UTF-8"):
        settings_file.read()
    path.unlink()
    path.mkdir()
    with pytest.raises(GryphonError, match="cannot be read"):
        settings_file.read()


MINE = """\
# my machine

keep_alive = 60   # a minute

# what I type
[aliases]
fast = 'org/b'  # the small one
"a.b" = "c"
"""


def test_edits_leave_the_rest_alone(path: Path) -> None:
    path.write_text(MINE)
    settings_file.set_default_model("org/a")
    settings_file.set_alias("fast", "org/new")
    settings_file.set_alias("big", "org/big")
    settings_file.set_alias("x:1", "org/x")
    expected = MINE.replace("a minute\n", 'a minute\ndefault_model = "org/a"\n')
    expected = expected.replace("'org/b'", '"org/new"') + 'big = "org/big"\n"x:1" = "org/x"\n'
    assert path.read_text() == expected
    settings_file.set_default_model(None)
    settings_file.set_alias("big", None)
    settings_file.set_alias("x:1", None)
    settings_file.set_alias("fast", "org/b")
    settings_file.set_alias("gone", None)
    assert path.read_text() == MINE.replace("'org/b'", '"org/b"')


@pytest.mark.parametrize(
    "before",
    ["", "# only a comment", "# a\n\n", "[aliases]\n", "# of the table\n[aliases]",
     "keep_alive = 1", "\n\n[aliases] # mine\n\n", 'default_model = "x"\n',
     '  default_model="x"#y\n[ aliases ]\n',
     "keep_alive = 1\r\n[aliases]\r\n", '"default_model" = \'x\'\n'],
)  # fmt: skip
def test_anything_can_be_set_wherever_it_goes(path: Path, before: str) -> None:
    path.write_bytes(before.encode())
    comments = [line.strip() for line in before.splitlines() if line.strip().startswith("#")]
    kept = tomllib.loads(before).get("keep_alive")
    settings_file.set_alias("a", 'org/"quoted" \\ name é')
    settings_file.set_default_model("org/a")
    settings_file.set_alias("b", "org/b")
    stored = settings_file.read()
    assert stored.aliases == {"a": 'org/"quoted" \\ name é', "b": "org/b"}
    assert (stored.default_model, stored.keep_alive_s) == ("org/a", kept)
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert [line for line in lines if line.startswith("#")] == comments


@pytest.mark.parametrize(
    "text",
    [
        'aliases = { fast = "a" }\n',
        'aliases.fast = "a"\n',
        '["aliases"]\nfast = "a"\n',
        '[aliases]\nfast = """\na"""\n',
        '[aliases]\nother = """\nfast = 1 \\\n"""\nfast = "x"\n'.replace("\\\n", "\\\n"),
    ],
)
def test_what_cannot_be_edited_is_left_as_it_is(path: Path, text: str) -> None:
    path.write_text(text)
    try:
        before = dict(settings_file.read().aliases)
    except GryphonError:
        before = None
    with pytest.raises(GryphonError) as caught:
        settings_file.set_alias("fast", "org/new")
    assert path.read_text() == text
    if before is not None:
        assert 'write fast = "org/new" under [aliases] yourself' in caught.value.message


def test_it_is_private_and_replaced_at_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file.set_default_model("org/a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(GryphonError) as caught:
            settings_file.set_default_model("org/b")
    assert caught.value.code == "no_write_permission" and "No space left" in caught.value.message
    assert settings_file.read().default_model == "org/a"
    assert [one.name for one in path.parent.iterdir() if ".lock" not in one.name] == [path.name]
    elsewhere = tmp_path / "dotfiles.toml"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    settings_file.set_default_model("org/c")
    assert path.is_symlink() and 'default_model = "org/c"' in elsewhere.read_text()


def test_names_that_cannot_be_aliases(path: Path) -> None:
    for name in ("", "a/b", "../a", ".a", "a+b", "a@b", "-a", "a b", "a\n", "é", "a" * 65):
        with pytest.raises(GryphonError, match="An alias is letters"):
            settings_file.set_alias(name, "org/a")
    assert not path.exists()
