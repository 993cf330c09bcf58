"""No token, wrong scope, licence not accepted, renamed, gone, offline: each another sentence."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from app.errors import GryphonError
from app.library.hub import Hub
from app.library.installed import installed_models
from app.library.pull import make_plan, pull

from ..hub_server import HubServer
from .model_files import model_files
from .pulling import QUICK, SIZE, Watch, refusal


def access(hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, token: str | None) -> str:
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    try:
        with Hub(QUICK) as client:
            make_plan(client, name)
    except GryphonError as error:
        assert (token or "no token") not in error.message
        return f"{error.code}: {error.message}"
    return "fine"


def test_each_way_to_have_no_access_is_another_sentence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", model_files(), gated="manual")
    hub.add("org/private", model_files(), private=True)
    hub.add("org/new", model_files())
    hub.add("org/old", model_files(), moved_to="org/new")
    hub.add("org/closed", model_files(), disabled=True)
    hub.tokens = {
        "tok_narrow": set(),
        "tok_stranger": {"gated"},
        "tok_member": {"gated", "org/gated", "org/private"},
    }
    cases: list[tuple[str, str | None, str, str]] = [
        ("org/gated", None, "token_missing", f"{hub.endpoint}/org/gated"),
        ("org/gated", "tok_revoked", "token_invalid", f"{hub.endpoint}/settings/tokens"),
        ("org/gated", "tok_narrow", "token_scope", "gated repositories"),
        ("org/gated", "tok_stranger", "licence_not_accepted", f"{hub.endpoint}/org/gated"),
        ("org/private", None, "model_not_found", "private"),
        ("org/private", "tok_stranger", "model_not_found", "your token"),
        ("org/gone", None, "model_not_found", "hf auth login"),
        ("org/gone", "tok_member", "model_not_found", "removed"),
        ("org/old", None, "repository_renamed", "gryphon pull org/new"),
        ("org/closed", None, "repository_disabled", "closed"),
    ]
    for name, token, code, expected in cases:
        said = access(hub, monkeypatch, name, token)
        assert said.startswith(f"{code}: ") and expected in said, (name, token, said)
    for name in ("org/gated", "org/private", "org/new"):
        assert access(hub, monkeypatch, name, "tok_member") == "fine"
    assert all(one.authorization is None for one in hub.requests if one.host == "storage")
    assert access(hub, monkeypatch, "org/new", "tok\u00e9n").startswith("token_invalid")
    hub.stop()
    assert access(hub, monkeypatch, "org/new", None).startswith("hub_unreachable")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refusal(lambda: Hub()))


def test_access_withdrawn_in_the_middle(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", model_files(size=SIZE), gated="auto")
    hub.tokens = {"tok_member": {"gated", "org/model"}}
    monkeypatch.setenv("HF_TOKEN", "tok_member")
    with Hub(QUICK) as client:
        plan = make_plan(client, "org/model")
        hub.tokens = {"tok_member": {"gated"}}
        error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "licence_not_accepted"
    assert installed_models() == []
