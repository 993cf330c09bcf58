"""Pulling from a hub that misbehaves: whatever goes wrong, the files end up byte-identical, only
what was missing is fetched again, and nothing is listed before it is whole."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from app.library.hub import Hub
from app.library.hub_errors import Interruption
from app.library.installed import installed_models
from app.library.patience import Patience
from app.library.pull import make_plan, pull

from ..hub_server import Fault, HubServer
from .model_files import model_files
from .pulling import HASTY, PIECE, QUICK, SIZE, WEIGHTS, Watch, assert_whole, refusal, sent_since

# Where a transfer is disturbed: around the header, pieces, and the ends.
POSITIONS = [0, 1, 7, 8, 200, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, SIZE - 1]


@pytest.mark.parametrize("at", POSITIONS)
def test_a_cut_connection_is_continued_where_it_ended(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    hub.spoil(WEIGHTS, cut_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == len(files[WEIGHTS])


def test_many_cuts_in_a_row(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    for at in range(10_000, SIZE, 10_000):
        hub.spoil(WEIGHTS, cut_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == len(files[WEIGHTS])
    starts = [one.start for one in hub.answers(WEIGHTS)[2:]]
    assert starts == [0, *range(10_000, SIZE, 10_000)]


@pytest.mark.parametrize("at", [0, 5, PIECE, SIZE - 1])
def test_a_stalled_connection_is_left_and_continued(
    hub: HubServer, files: dict[str, bytes], at: int
) -> None:
    with Hub(HASTY) as hasty:
        plan, before = make_plan(hasty, "org/model"), len(hub.answers(WEIGHTS))
        hub.spoil(WEIGHTS, stall_at=at)
        assert_whole(pull(hasty, plan, Watch()), files)
    first, *_, last = hub.answers(WEIGHTS)[before:]
    # Where the hub fell silent, or before it: a busy machine may keep us from reading for as long.
    assert (first.start, first.sent) == (0, at) and last.start <= at
    assert last.sent == len(files[WEIGHTS]) - last.start


@pytest.mark.parametrize("at", POSITIONS)
def test_a_wrong_byte_costs_that_file_alone(
    hub: HubServer, client: Hub, files: dict[str, bytes], at: int
) -> None:
    plan, before, all_before = make_plan(client, "org/model"), hub.sent(WEIGHTS), hub.sent()
    hub.spoil(WEIGHTS, wrong_byte_at=at)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == 2 * len(files[WEIGHTS])
    assert hub.sent() - all_before == sum(map(len, files.values())) + len(files[WEIGHTS])


def test_a_small_file_is_checked_too(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil("tokenizer.json", wrong_byte_at=3)
    assert_whole(pull(client, plan, Watch()), files)


def test_always_damaged_is_an_error_and_nothing_is_installed(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, wrong_byte_at=9, times=None)
    error = refusal(lambda: pull(client, plan, Watch()))
    assert error.code == "checksum_mismatch" and WEIGHTS in error.message
    assert installed_models() == []
    hub.heal()
    assert_whole(pull(client, plan, Watch()), files)


@pytest.mark.parametrize("where", ["hub", "storage"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again(
    hub: HubServer, client: Hub, files: dict[str, bytes], status: int, where: Any
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent()
    hub.spoil(WEIGHTS, status=status, where=where, times=2)
    hub.spoil("config.json", status=status, headers={"Retry-After": "0"}, where="hub")
    assert_whole(pull(client, plan, Watch()), files)
    assert hub.sent() - before == sum(map(len, files.values()))


def test_retry_after_is_waited_for(hub: HubServer, client: Hub, files: dict[str, bytes]) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=429, headers={"Retry-After": "1"}, where="hub")
    waits: list[float | None] = []
    patience = Patience(first_wait_s=0.01)
    client.patience = SimpleNamespace(  # type: ignore[assignment]
        stall_s=5,
        connect_s=2,
        wait_s=lambda failures, error: waits.append(error.retry_after) or 0.01,
    )
    pull(client, plan, Watch())
    assert waits == [1.0]
    later = Interruption("rate_limited", "busy", retry_after=20)
    assert patience.wait_s(1, later) == 20
    assert patience.wait_s(1, Interruption("rate_limited", "busy", retry_after=4000)) is None
    waits_s = [patience.wait_s(n, Interruption("hub_unavailable", "busy")) for n in range(1, 9)]
    assert waits_s[-1] is None and None not in waits_s[:-1]
    for n, wait_s in enumerate(waits_s[:-1]):
        assert 0.5 <= (wait_s or 0) / (0.01 * 2**n) <= 1.5


@pytest.mark.parametrize(
    "said", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "soon", "-1", "\xb2", "1e9"]
)
def test_a_retry_after_without_sense_is_no_time(
    hub: HubServer, client: Hub, files: dict[str, bytes], said: str
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=503, headers={"Retry-After": said})
    assert_whole(pull(client, plan, Watch()), files)


@pytest.mark.parametrize("status", [429, 503])
def test_metadata_is_asked_for_again_and_then_given_up(
    hub: HubServer, client: Hub, files: dict[str, bytes], status: int
) -> None:
    hub.api_faults.append(Fault(status=status, times=2))
    told: list[str] = []
    with Hub(QUICK, told.append) as telling:
        plan = make_plan(telling, "org/model")
    assert plan.total_bytes == sum(map(len, files.values()))
    assert told == [f"127.0.0.1 answers {status}; asking again"] * 2
    hub.api_faults.append(Fault(status=status, headers={"Retry-After": "0"}, times=None))
    error = refusal(lambda: make_plan(client, "org/model"))
    assert error.code == ("rate_limited" if status == 429 else "hub_unavailable")


def test_a_hub_that_stays_broken_is_given_up_and_what_came_is_kept(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, cut_at=100_000, times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "hub_unavailable"
    assert installed_models() == []
    hub.heal()
    before = hub.sent(WEIGHTS)
    assert_whole(pull(client, make_plan(client, "org/model"), Watch()), files)
    header = int.from_bytes(files[WEIGHTS][:8], "little") + 8
    assert sent_since(hub, before) == len(files[WEIGHTS]) - 100_000 + header


def test_a_server_without_ranges_is_read_from_the_start(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan, before = make_plan(client, "org/model"), hub.sent(WEIGHTS)
    hub.spoil(WEIGHTS, cut_at=100_000)
    hub.spoil(WEIGHTS, ignore_range=True)
    assert_whole(pull(client, plan, Watch()), files)
    assert sent_since(hub, before) == 100_000 + len(files[WEIGHTS])


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_an_answer_without_a_length_is_read_to_its_end(
    hub: HubServer, client: Hub, files: dict[str, bytes], name: str
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(name, no_length=True)
    assert_whole(pull(client, plan, Watch()), files)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.spoil(name, no_length=True, cut_at=5)
    assert_whole(pull(client, plan, Watch()), files)


def test_compressed_content_is_refused(hub: HubServer, client: Hub, files: Any) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, gzip_claimed=True, times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "hub_not_understood"


def test_another_etag_means_looking_again(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, etag="e" * 64, where="hub")
    assert_whole(pull(client, plan, Watch()), files)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.spoil(WEIGHTS, etag="e" * 64, where="hub", times=None)
    assert refusal(lambda: pull(client, plan, Watch())).code == "repository_changed"
    assert installed_models() == []


def test_files_replaced_in_the_middle_are_all_of_the_new_commit(
    hub: HubServer, client: Hub
) -> None:
    """The commit vanishes and another takes its place, as after a force push."""
    old, new = model_files(shards=2, size=SIZE), model_files(shards=2, size=SIZE, seed=1)
    repository = hub.add("org/model", old)
    plan = make_plan(client, "org/model")

    def replace(file: str, offset: int) -> None:
        hub.on_bytes(None)
        del repository.commits[repository.refs["main"]]
        repository.commit(new)

    hub.spoil("model-00001-of-00002.safetensors", cut_at=PIECE)
    hub.spoil("model-00002-of-00002.safetensors", cut_at=PIECE)
    hub.on_bytes(replace)
    model = pull(client, plan, Watch())
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == new
    assert model.path.name == repository.refs["main"]


def test_a_storage_link_that_expired_is_asked_for_again(
    hub: HubServer, client: Hub, files: dict[str, bytes]
) -> None:
    plan = make_plan(client, "org/model")
    hub.spoil(WEIGHTS, status=403, where="storage", times=2)
    assert_whole(pull(client, plan, Watch()), files)
