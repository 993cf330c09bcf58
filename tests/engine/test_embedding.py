"""Embeddings are the same however inputs share forward calls, and never in the way of streams.

The truth is the decoder's own output for one input read whole: no batch, no cache, no chunks.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from numpy.typing import NDArray

import mlxmodels
from app.engine import embedding as embedding_module
from app.engine.batch import Row
from app.engine.embedding import Embedding
from app.engine.protocol import (
    Accepted,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Progress,
    Sampling,
    Token,
)
from app.engine.resident import ResidentModel
from app.engine.scheduler import Scheduler
from mlxmodels.footprint import MIN_CHUNK, footprint
from mlxmodels.hidden_states import HiddenStates
from mlxmodels.loading import LoadedModel

from ..models.goldens import NAMES, Golden
from ..tiny_models import (
    FALCON_H1,
    GEMMA,
    GEMMA2,
    LLAMA,
    NEMOTRON,
    OPEN_LLAMA,
    QWEN3_NEXT,
    RECURRENT_GEMMA,
    XGLM,
    write_model,
)

FAMILIES = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "nemotron": NEMOTRON,
    "open_llama": OPEN_LLAMA,
    # The rotary base of each input depends on how long it is.
    "open_llama dynamic": OPEN_LLAMA
    | {"max_position_embeddings": 30, "rope_scaling": {"type": "dynamic", "factor": 20.0}},
    "recurrent_gemma": RECURRENT_GEMMA,
    "xglm": XGLM,
    "zoo llama": LLAMA,
    "zoo falcon_h1": FALCON_H1,
    "zoo qwen3_next": QWEN3_NEXT,
}
# Around the windows of 8, and several chunks; some twice, to share a call without padding.
LENGTHS = (1, 2, 7, 40, 41, 300, 2, 300, 41)
TOLERANCE = 1e-5
"""Of each number of a vector of length 1, in float32."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    root = tmp_path_factory.mktemp("embedding")
    return {
        name: ModelRef(name, str(write_model(root / name.replace(" ", "_"), config)))
        for name, config in FAMILIES.items()
    }


def tokens_of(length: int, seed: object = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(256), k=length)


class Rig:
    """A scheduler on its own thread, and all that it says, in order."""

    def __init__(self, **settings: Any) -> None:
        self.scheduler = Scheduler(**settings)
        self.events: list[Event] = []
        self.unloaded = threading.Event()
        self.scheduler.on_idle = self.unloaded.set
        self._ended: dict[str, threading.Event] = {}
        self._after: dict[str, tuple[type, Any]] = {}
        self._count = 0
        self._thread = threading.Thread(target=self.scheduler.run)
        self._thread.start()

    def close(self) -> None:
        self.scheduler.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _emit(self, event: Event) -> None:  # on the scheduler's thread
        self.events.append(event)
        id = getattr(event, "id", "")
        kind, then = self._after.get(id, (Finished, None))
        if then is not None and isinstance(event, kind):
            del self._after[id]
            then()
        if isinstance(event, (Finished, Failed)):
            self._ended[id].set()

    def submit(self, row: Row) -> None:
        self._ended[row.request.id] = threading.Event()
        self.scheduler.submit(row)

    def row(self, request: Embed | GenerationRequest, prompt: list[int]) -> Row:
        return Row(request, self._emit, prompt)

    def embed(self, model: ModelRef, inputs: list[list[int]], id: str = "", **more: Any) -> Row:
        self._count += 1
        id = id or f"embed {self._count}"
        request = Embed(id=id, model=model, tokens=inputs, **more)
        job = Embedding(inputs, request.pooling)
        row = self.row(request, job.longest)
        row.embedding = job
        return row

    def when(self, id: str, kind: type, then: Any) -> None:
        """Call something at the first event of that kind of a request."""
        self._after[id] = kind, then

    def end(self, id: str) -> Finished | Failed:
        assert self._ended[id].wait(60)
        (end,) = (e for e in self.of(id) if isinstance(e, (Finished, Failed)))
        assert self.of(id)[-1] is end
        return end

    def of(self, id: str) -> list[Event]:
        return [event for event in self.events if getattr(event, "id", "") == id]

    def vectors(self, row: Row) -> NDArray[np.float32]:
        """What a request ends with."""
        self.submit(row)
        end = self.end(row.request.id)
        assert isinstance(end, Finished), end
        assert end.reason == "stop"
        (answer,) = (e for e in self.of(row.request.id) if isinstance(e, Embedded))
        (accepted,) = (e for e in self.of(row.request.id) if isinstance(e, Accepted))
        total = sum(answer.prompt_tokens)
        assert end.usage.prompt_tokens == accepted.prompt_tokens == total
        return np.frombuffer(answer.vectors, "<f4").reshape(-1, answer.dimensions)

    def failure(self, row: Row) -> Failed:
        self.submit(row)
        end = self.end(row.request.id)
        assert isinstance(end, Failed), end
        return end


@contextlib.contextmanager
def rig(**settings: Any) -> Iterator[Rig]:
    running = Rig(**settings)
    try:
        yield running
    finally:
        running.close()


def pooled(hidden: mx.array, pooling: str) -> NDArray[np.float64]:
    states = np.array(hidden[0]).astype(np.float64)
    vector = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_in_a_batch_equals_the_input_alone(
    models: dict[str, ModelRef], family: str
) -> None:
    model = models[family]
    loaded = mlxmodels.load(model.path, dtype=mx.float32)
    inputs = [tokens_of(length, index) for index, length in enumerate(LENGTHS)]
    decoder = cast(Any, loaded.model).model
    states = [decoder(mx.array([tokens])) for tokens in inputs]
    with rig() as engine:
        for pooling in ("mean", "last"):
            truth = np.stack([pooled(one, pooling) for one in states])
            together = engine.vectors(engine.embed(model, inputs, pooling=pooling))
            assert np.abs(together - truth).max() <= TOLERANCE
            alone = [engine.vectors(engine.embed(model, [one], pooling=pooling)) for one in inputs]
            assert np.abs(np.concatenate(alone) - truth).max() <= TOLERANCE


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("_base", "_default"))])
def test_vectors_are_those_of_the_reference(name: str) -> None:
    """The hidden states that transformers or DeepMind's code computed with the same weights."""
    golden = Golden(name)
    loaded = _loaded(golden.model, golden.config["model_type"])
    resident = ResidentModel(ModelRef(name, ""), loaded, Sampling(), cast(Any, None), "")
    case = golden.cases["hidden"]
    assert set(case.inputs) == {"input_ids"}
    states = [name for name in case.outputs if name.startswith("hidden_states.")]
    want = case.outputs[f"hidden_states.{len(states) - 1}"]  # the last is after the final norm
    inputs = cast("list[list[int]]", case.inputs["input_ids"].tolist())
    for pooling in ("mean", "last"):
        for size in (7, 1000):  # in chunks, and as one batch
            job = Embedding(inputs, cast(Any, pooling))
            while not job.is_over:
                job.step(resident, size)
            got = np.frombuffer(job.answer("e").vectors, "<f4").reshape(len(inputs), -1)
            for index in range(len(inputs)):
                truth = pooled(want[index : index + 1].astype(mx.float32), pooling)
                assert np.abs(got[index] - truth).max() <= 1e-4


def _loaded(model: Any, family: str) -> LoadedModel:
    nothing = cast(Any, None)
    return LoadedModel(model, {}, nothing, nothing, nothing, nothing, frozenset(), family, 0)


def generation(model: ModelRef, id: str, max_tokens: int) -> GenerationRequest:
    sampling = Sampling(temperature=0)
    return GenerationRequest(
        id=id, model=model, prompt_tokens=[0], sampling=sampling, max_tokens=max_tokens
    )


def chunks_between(events: list[Event], stream: str) -> list[int]:
    """How many chunks were read between one token of a stream and the next."""
    counts = [0]
    for event in events:
        if isinstance(event, Token) and event.id == stream:
            counts.append(0)
        elif isinstance(event, Progress) and event.phase == "prefill":
            counts[-1] += 1
    return counts[1:-1]


def test_a_stream_waits_for_one_chunk_at_most_and_prompts_take_turns_with_embeddings(
    models: dict[str, ModelRef],
) -> None:
    model = models["recurrent_gemma"]
    with rig() as engine:
        stream = engine.row(generation(model, "stream", 60), tokens_of(5))
        jobs = [
            engine.embed(model, [tokens_of(300, i) for i in range(8)], f"embed {name}")
            for name in ("a", "b")
        ]
        prompt = engine.row(generation(model, "prompt", 1), tokens_of(1500))

        def begin() -> None:
            for row in (*jobs, prompt):
                engine.submit(row)

        engine.when("stream", Token, begin)
        engine.submit(stream)
        ends = [engine.end(id) for id in ("stream", "prompt", "embed a", "embed b")]
        assert all(isinstance(end, Finished) for end in ends), ends
        waits = chunks_between(engine.events, "stream")
        assert max(waits) == 1 and sum(waits) > 20
        # While all three wait, each goes on: no two chunks of one without one of another.
        read = [e.id for e in engine.events if isinstance(e, Progress) and e.phase == "prefill"]
        begin_all = read.index("prompt")
        while_all = read[begin_all : begin_all + 8]
        assert all(a != b for a, b in zip(while_all, while_all[1:], strict=False)), while_all
        assert {"embed a", "embed b", "prompt"} <= set(while_all)


def test_a_cancelled_request_ends_at_once_and_leaves_nothing(models: dict[str, ModelRef]) -> None:
    model = models["open_llama"]
    with rig() as engine:
        row = engine.embed(model, [tokens_of(500, i) for i in range(40)], "e")
        engine.when("e", Accepted, lambda: engine.scheduler.cancel(row))
        engine.submit(row)
        end = engine.end("e")
        assert isinstance(end, Finished) and end.reason == "cancelled"
        assert sum(isinstance(event, Progress) for event in engine.of("e")) < 10
        assert not any(isinstance(event, Embedded) for event in engine.events)
        assert row.caches == [] and engine.scheduler.snapshot.running == 0
        vectors = engine.vectors(engine.embed(model, [tokens_of(3)], "next"))
        assert engine.scheduler.snapshot.state_bytes == 0 and len(vectors) == 1


def test_what_no_model_can_embed_is_refused_by_name(
    models: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["open_llama"]
    with rig() as engine:
        assert engine.vectors(engine.embed(model, [tokens_of(512)], "most")).shape == (1, 32)
        long = engine.failure(engine.embed(model, [[1], tokens_of(513)], "long"))
        assert long.code == "context_length_exceeded"
        assert "Input 1 has 513 tokens" in long.message and "512" in long.message
        outside = engine.failure(engine.embed(model, [[1, 259]], "outside"))
        assert outside.code == "invalid_request" and "0 to 258" in outside.message
        monkeypatch.setattr(embedding_module, "MAX_VECTOR_BYTES", 2 * 32 * 4)
        assert engine.vectors(engine.embed(model, [[1], [2]], "two")).shape == (2, 32)
        many = engine.failure(engine.embed(model, [[1], [2], [3]], "three"))
        assert many.code == "request_too_large" and "384 bytes" in many.message


def test_numbers_that_are_none_are_never_sent(tmp_path: Path) -> None:
    path = write_model(tmp_path / "nan", OPEN_LLAMA)
    weights = cast("dict[str, mx.array]", mx.load(str(path / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] * mx.nan
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    with rig() as engine:
        for inputs in ([[1], [2, 3]], [tokens_of(300)]):
            failed = engine.failure(engine.embed(ModelRef("nan", str(path)), inputs))
            assert failed.code == "invalid_numbers" and "nan" in failed.message


def test_memory_bounds_what_is_read_at_once_and_not_the_result(
    models: dict[str, ModelRef],
) -> None:
    model = models["open_llama"]
    inputs = [tokens_of(length) for length in (1, 9, 60, 250)]

    def chunks(engine: Rig) -> int:
        return sum(isinstance(event, Progress) for event in engine.events)

    with rig() as engine:
        want, most = engine.vectors(engine.embed(model, inputs)), chunks(engine)
    taken = footprint(Path(model.path), expand=True)
    enough = taken.weight_bytes + taken.row_bytes(MIN_CHUNK, 260)
    with rig(memory_bytes=enough) as engine:
        assert np.abs(engine.vectors(engine.embed(model, inputs)) - want).max() <= TOLERANCE
        assert chunks(engine) > most
        refused = engine.failure(engine.embed(model, [tokens_of(500)], "large"))
        assert refused.code == "does_not_fit" and "500 tokens" in refused.message


def test_the_model_stays_as_long_as_the_request_says(models: dict[str, ModelRef]) -> None:
    model = models["open_llama"]
    with rig() as engine:
        engine.vectors(engine.embed(model, [[1, 2]], "stays"))
        assert engine.scheduler.snapshot.model == model and not engine.unloaded.is_set()
        engine.vectors(engine.embed(model, [[1, 2]], "goes", keep_alive_s=0.0))
        assert engine.unloaded.wait(60)
        other = models["gemma"]
        busy = engine.embed(model, [tokens_of(500, i) for i in range(20)], "busy")
        refused = engine.embed(other, [[1]], "other", wait_for_model=False)
        engine.when("busy", Accepted, lambda: engine.submit(refused))
        engine.submit(busy)
        end = engine.end("busy")
        assert isinstance(end, Finished)
        failed = engine.end("other")
        assert isinstance(failed, Failed) and failed.code == "model_busy"


# Where models of the zoo keep their hidden states.


class _Decoder(nn.Module):
    """Returns what it is told to, of 8 numbers for each of 32 tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 8)
        self.kind = kind

    def __call__(self, inputs: mx.array, cache: Any = None) -> Any:
        x = self.embed_tokens(inputs)
        x = mx.cumsum(x, axis=1)
        if self.kind == "rows see each other" and x.shape[0] > 1:
            x = x + x[::-1]
        if self.kind == "pair":
            return x, None
        return self.embed_tokens.as_linear(x) if self.kind == "logits" else x


class _Zoo(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        setattr(self, "heart" if kind == "elsewhere" else "model", _Decoder(kind))
        self.kind = kind

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        decoder = self["heart" if self.kind == "elsewhere" else "model"]
        x = decoder(inputs, cache)
        x = x[0] if self.kind == "pair" else x
        if self.kind == "logits":
            return x
        if self.kind == "another norm":
            x = mx.sin(5 * x)
        return mx.tanh(0.1 * decoder.embed_tokens.as_linear(x))

    def make_cache(self) -> list[Any]:
        return []


@pytest.mark.parametrize("kind", ["elsewhere", "pair", "logits", "another norm"])
def test_hidden_states_that_are_not_what_the_head_reads_are_refused(kind: str) -> None:
    mx.random.seed(0)
    with pytest.raises(mlxmodels.ModelError, match="of the family 'odd'"):
        HiddenStates(_loaded(_Zoo(kind), "odd"))


def test_rows_that_see_each_other_are_read_alone() -> None:
    mx.random.seed(0)
    assert HiddenStates(_loaded(_Zoo("plain"), "odd")).can_batch
    assert not HiddenStates(_loaded(_Zoo("rows see each other"), "odd")).can_batch
    assert HiddenStates(_loaded(_Zoo("plain"), "odd")).size == 8


def test_a_model_without_states_is_refused_by_name(tmp_path: Path) -> None:
    config = GEMMA2 | {"use_bidirectional_attention": True}
    model = ModelRef("both ways", str(write_model(tmp_path / "model", config)))
    with rig() as engine:
        failed = engine.failure(engine.embed(model, [[1]]))
        assert failed.code == "invalid_model" and "bidirectional" in failed.message
