"""What `gryphon serve` makes of its options: the API key above all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from app.cli import build_parser, faces
from app.errors import GryphonError
from app.server import api_key
from app.server.serving import ServerOptions


def options(*words: str) -> ServerOptions:
    return faces._options(build_parser().parse_args(["serve", *words]))


def test_on_loopback_no_key_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--host", "localhost"], ["--host", "::1"], ["--socket", "/tmp/s"]):
        assert options(*words).api_key is None
    assert not api_key.path().exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("face", ["serve", "chat"])
def test_off_loopback_a_key_is_made_shown_once_and_kept(
    capsys: pytest.CaptureFixture[str], face: str
) -> None:
    arguments = build_parser().parse_args([face, "--host", "0.0.0.0"])
    key = faces._options(arguments).api_key
    assert key is not None and len(key) >= 43  # 256 bits
    first = capsys.readouterr()
    assert first.out == "" and first.err.count(key) == 1
    assert str(api_key.path()) in first.err
    assert stat.S_IMODE(api_key.path().stat().st_mode) == 0o600
    assert options("--host", "0.0.0.0").api_key == key
    second = capsys.readouterr()
    assert key not in second.err and str(api_key.path()) in second.err


def test_a_new_key_takes_the_place_of_the_old_one() -> None:
    keys = [options("--generate-key").api_key for _ in range(3)]
    assert len(set(keys)) == 3 and None not in keys
    assert api_key.kept() == keys[-1]
    assert options().api_key is None
    assert [one.name for one in api_key.path().parent.iterdir() if "api_key" in one.name] == [
        "api_key"
    ]


def test_a_key_that_is_given_is_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options("--host", "0.0.0.0", "--api-key", "mine").api_key == "mine"
    monkeypatch.setenv("GRYPHON_API_KEY", "from the environment")
    assert options("--host", "0.0.0.0").api_key == "from the environment"
    assert options().api_key == "from the environment"
    assert options("--api-key", "mine").api_key == "mine"
    assert not api_key.path().exists()
    with pytest.raises(SystemExit) as caught:
        options("--api-key", "mine", "--generate-key")
    assert caught.value.code == 2


@pytest.mark.parametrize("harm", ["others read it", "a link", "a directory", "empty", "not a key"])
def test_a_key_that_others_may_know_is_not_used(tmp_path: Path, harm: str) -> None:
    api_key.make()
    place = api_key.path()
    if harm == "others read it":
        place.chmod(0o640)
    elif harm == "empty":
        place.write_text("")
    elif harm == "not a key":
        place.write_bytes(b"\xff\x00" * 40)
    else:
        place.rename(tmp_path / "elsewhere")
        place.mkdir() if harm == "a directory" else place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GryphonError) as caught:
        options("--host", "0.0.0.0")
    assert caught.value.code == "unsafe_api_key"
    assert "--generate-key" in caught.value.message


def test_a_key_that_cannot_be_kept_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.server.api_key.os.open", full)
    with pytest.raises(GryphonError, match="No space left on device"):
        options("--generate-key")


def test_the_other_options() -> None:
    words = ["--socket", "s", "--tls-cert", "c", "--tls-key", "k", "--allow-origin", "http://a"]
    made = options(*words)
    assert (made.socket, made.tls_certificate, made.tls_key) == (Path("s"), Path("c"), Path("k"))
    assert made.allow_origins == ["http://a"]
