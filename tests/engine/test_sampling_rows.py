"""Sampling settings through the whole scheduler with real (tiny) models: a row among others is
that row alone for every setting, and each setting does to an answer what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

import mlxmodels
from app.engine.batch import Batch
from app.engine.protocol import (
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Sampling,
    Token,
)
from app.engine.sampling import logprobs_of

from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model
from .test_scheduler import Harness, alone, prompt_of

SETTINGS = {
    "greedy": {"sampling": Sampling(temperature=0)},
    "plain": {"sampling": Sampling(temperature=1.0, seed=1)},
    "top_k, top_p, min_p": {
        "sampling": Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, seed=2)
    },
    "typical_p": {"sampling": Sampling(temperature=1.0, typical_p=0.6, seed=3)},
    "XTC": {"sampling": Sampling(temperature=1.5, xtc_probability=0.5, xtc_threshold=0.02, seed=4)},
    "greedy, repetition": {"sampling": Sampling(temperature=0, repetition_penalty=1.5)},
    "presence": {"sampling": Sampling(temperature=1.0, presence_penalty=1.5, seed=6)},
    "frequency": {"sampling": Sampling(temperature=1.0, frequency_penalty=0.8, seed=7)},
    "bias": {"sampling": Sampling(temperature=1.0, logit_bias={7: 3.0, 90: -100.0}, seed=8)},
    "min_tokens": {"sampling": Sampling(temperature=2.0, seed=9), "min_tokens": 9},
    "ignore_eos": {"sampling": Sampling(temperature=2.0, seed=10), "ignore_eos": True},
    "logprobs": {"sampling": Sampling(temperature=1.0, seed=11), "logprobs": True},
    "top_logprobs": {
        "sampling": Sampling(temperature=1.0, seed=12), "logprobs": True, "top_logprobs": 5,
    },
    "stop": {"sampling": Sampling(temperature=1.0, seed=13), "stop": list("aeiou")},
    "other stop": {"sampling": Sampling(temperature=1.0, seed=13), "stop": ["never", *"AEIOU"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """Every fourth token ends an answer, so that rows leave all the time."""
    root, ends = tmp_path_factory.mktemp("models"), list(range(0, 259, 4))
    return {
        name: ModelRef(name, str(write_model(root / name, config, eos_token_id=ends)))
        for name, config in (("open_llama", OPEN_LLAMA), ("recurrent_gemma", RECURRENT_GEMMA))
    }


@pytest.fixture
def engine() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


def request(model: ModelRef, id: str, **fields: Any) -> GenerationRequest:
    fields.setdefault("max_tokens", 24)
    return GenerationRequest(id=id, model=model, prompt_tokens=[0], **fields)


@pytest.mark.parametrize("family", ["open_llama", "recurrent_gemma"])
def test_a_row_with_any_setting_is_the_same_alone_and_among_all_others(
    engine: Harness, models: dict[str, ModelRef], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, met = Batch.forward, set[frozenset[str]]()

    def forward(self: Batch, model: Any) -> Any:
        names = {row.request.id.rpartition(" ")[0] for row in self.rows}
        met.update(frozenset({one, other}) for one in names for other in names if one != other)
        return genuine(self, model)

    monkeypatch.setattr(Batch, "forward", forward)
    requests = {
        f"{name} {turn}": request(models[family], f"{name} {turn}", **fields)
        for turn in range(2)
        for name, fields in SETTINGS.items()
    }
    prompts = {name: prompt_of(3 + 5 * i, seed=i) for i, name in enumerate(requests)}
    for i, (name, asked) in enumerate(requests.items()):
        engine.submit(asked, prompts[name])
        for _ in range(i % 4):  # some steps between arrivals
            if not all(engine.ended(id) for id in engine.said):
                engine.next()
    engine.wait_all()
    together = {name: engine.tokens(name) for name in requests}
    for name, asked in requests.items():
        assert together[name] == alone(engine, asked, prompts[name]), name
        got, expected = (
            [event for event in engine.said[id] if isinstance(event, (Token, Finished))]
            for id in (name, f"alone-{name}")
        )
        for one, other in zip(got, expected, strict=True):
            assert said(one) == pytest.approx(said(other), abs=1e-4), name
    # Whatever a row asks for, it decoded with rows that ask for something else.
    assert {name for pair in met for name in pair} == SETTINGS.keys()
    assert len(met) > len(SETTINGS) * (len(SETTINGS) - 1) / 4, "few of the settings met"


def said(event: Token | Finished) -> dict[str, Any]:
    """What a token or an end tells, in a form that approx compares."""
    if isinstance(event, Finished):
        return {"reason": event.reason, "text": event.text}
    logprobs = [*([event.logprob] if event.logprob else []), *event.top]
    return {"text": event.text, "id": event.token_id} | {
        f"logprob {i} of {one.token_id}": one.logprob for i, one in enumerate(logprobs)
    }


def reference(
    path: str, prompt: list[int], count: int, change: Callable[[np.ndarray, list[int]], None]
) -> list[int]:
    """Greedy tokens of whole forward passes, with the logits changed in NumPy."""
    model, answer = mlxmodels.load(path).model, list[int]()
    for _ in range(count):
        logits = np.array(model(mx.array([prompt + answer]))[0, -1]).astype(np.float64)
        change(logits, answer)
        answer.append(int(np.argmax(logits)))
    return answer


def test_a_repetition_penalty_breaks_the_loop_that_a_greedy_row_is_in(
    engine: Harness, tmp_path: Path
) -> None:
    path = str(write_model(tmp_path / "loops", OPEN_LLAMA))
    prompt, penalty = prompt_of(5), 2.0
    for name, asked in {
        "free": Sampling(temperature=0),
        "penalized": Sampling(temperature=0, repetition_penalty=penalty),
    }.items():
        engine.submit(request(ModelRef("m", path), name, sampling=asked, max_tokens=40), prompt)
    engine.wait_all()

    def ctrl(logits: np.ndarray, answer: list[int]) -> None:
        for token in {*prompt, *answer}:
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )

    free, penalized = engine.tokens("free"), engine.tokens("penalized")
    assert len(set(free[-20:])) < 10, f"no loop to break: {free}"
    assert penalized == reference(path, prompt, 40, ctrl)
    assert len(set(penalized[-20:])) > len(set(free[-20:]))


def test_recommended_repetition_penalty_is_used_and_can_be_turned_off(
    engine: Harness, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "m", OPEN_LLAMA)
    plain = ModelRef("plain", str(path))
    penalty = Sampling(temperature=0, repetition_penalty=1.8)
    expected = alone(engine, request(plain, "a", sampling=penalty), prompt_of(5))
    free = alone(engine, request(plain, "b", sampling=Sampling(temperature=0)), prompt_of(5))
    (path / "generation_config.json").write_text('{"repetition_penalty": 1.8}')
    advised = ModelRef("advised", str(path))
    asked = request(advised, "c", sampling=Sampling(temperature=0))
    assert alone(engine, asked, prompt_of(5)) == expected != free
    off = Sampling(temperature=0, repetition_penalty=1.0)
    assert alone(engine, request(advised, "d", sampling=off), prompt_of(5)) == free


def test_a_biased_token_is_forced_or_banned(engine: Harness, models: dict[str, ModelRef]) -> None:
    model = models["open_llama"]
    forced = Sampling(temperature=0, logit_bias={33: 100})
    assert alone(engine, request(model, "a", sampling=forced), prompt_of(4)) == [33] * 24
    free = request(model, "b", sampling=Sampling(temperature=0), ignore_eos=True)
    token = alone(engine, free, prompt_of(4))[0]
    banned = msgspec.structs.replace(
        free, id="c", sampling=Sampling(temperature=0, logit_bias={token: -100})
    )
    assert token not in alone(engine, banned, prompt_of(4))


def test_no_end_of_sequence_comes_before_min_tokens(engine: Harness, tmp_path: Path) -> None:
    """The third greedy token is the end; the answer goes on as if it could not be chosen."""
    path = str(write_model(tmp_path / "free", OPEN_LLAMA))
    prompt = prompt_of(6)
    greedy = Sampling(temperature=0)
    free = alone(engine, request(ModelRef("free", path), "a", sampling=greedy), prompt)
    end = free[2]
    path = str(write_model(tmp_path / "ends", OPEN_LLAMA, eos_token_id=end))
    model = ModelRef("ends", path)

    def forbidden(until: int) -> Callable[[np.ndarray, list[int]], None]:
        def change(logits: np.ndarray, answer: list[int]) -> None:
            if len(answer) < until:
                logits[end] = -np.inf

        return change

    for least in (0, 1, 3, 10, 24):
        whole = reference(path, prompt, 24, forbidden(least))
        expected = whole[: whole.index(end)] if end in whole else whole
        asked = request(model, f"{least}", sampling=greedy, min_tokens=least)
        assert alone(engine, asked, prompt) == expected
        assert len(expected) >= least
    asked = request(model, "never", sampling=greedy, ignore_eos=True)
    assert alone(engine, asked, prompt) == reference(path, prompt, 24, forbidden(24))
    finished = engine.said["alone-never"][-1]
    assert isinstance(finished, Finished) and finished.reason == "length"


def test_a_stop_string_does_not_end_an_answer_before_min_tokens(
    engine: Harness, models: dict[str, ModelRef]
) -> None:
    """The row says B for ever, so that a stop string is complete at every token from the second."""
    sampling = Sampling(temperature=0, logit_bias={33: 100})
    asked = request(models["open_llama"], "a", sampling=sampling, stop=["BB"])
    for least, count, text in ((0, 2, ""), (2, 2, ""), (3, 3, "B"), (7, 7, "BBBBB")):
        id = f"{least}"
        engine.submit(msgspec.structs.replace(asked, id=id, min_tokens=least), prompt_of(3))
        engine.wait_all()
        tokens = [event for event in engine.said[id] if isinstance(event, Token)]
        said = "".join(event.text for event in tokens)
        assert (len(tokens), said) == (count, text), least


def test_logprobs_are_the_models_whatever_is_done_to_its_logits(
    engine: Harness, tmp_path: Path
) -> None:
    path = str(write_model(tmp_path / "m", OPEN_LLAMA, eos_token_id=3))
    prompt = prompt_of(5)
    asked = request(
        ModelRef("m", path),
        "a",
        sampling=Sampling(
            temperature=0, repetition_penalty=3.0, presence_penalty=2.0, logit_bias={7: 50}
        ),
        logprobs=True,
        top_logprobs=3,
        ignore_eos=True,
        max_tokens=8,
    )
    engine.submit(asked, prompt)
    engine.wait_all()
    tokens = [event for event in engine.said["a"] if isinstance(event, Token)]
    model = mlxmodels.load(path).model
    answer = [event.token_id for event in tokens]
    logprobs = logprobs_of(model(mx.array([prompt + answer]))[0])
    for i, event in enumerate(tokens):
        own = logprobs[len(prompt) - 1 + i]
        assert event.logprob is not None
        assert event.logprob.logprob == pytest.approx(own[event.token_id].item(), abs=1e-4)
        assert event.top[0].logprob == pytest.approx(own.max().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampling": Sampling(logit_bias={1: 1, 259: 1})}, "0 to 258 for open_llama, got 259"),
        ({"min_tokens": 600, "max_tokens": None}, "min_tokens is 600"),
        ({"min_tokens": 509, "max_tokens": 600}, "may have 508 at most"),
    ],
    ids=["bias", "room", "room under max_tokens"],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    engine: Harness, models: dict[str, ModelRef], fields: dict[str, Any], said: str
) -> None:
    engine.submit(request(models["open_llama"], "a", **fields), prompt_of(4))
    engine.wait_all()
    failed = engine.said["a"][-1]
    assert isinstance(failed, Failed) and said in failed.message, failed
