"""What the engine's benchmarks compare, each contender in a process of its own:

    gryphon            the whole stack below a face: client, socket, engine, our port
    scheduler          the engine's scheduler in this process, without client and socket
    bare               our port in a loop that does nothing but take the most likely token
    mlx-lm             its `stream_generate` as it installs, weights as stored
    mlx-lm float32     the same, weights expanded to float32
    mlx-lm matched     the same with Gryphon's BLAS, so that what is left is the code

    .venv/bin/python scripts/engine_contenders.py CONTENDER MODEL

Each line on standard input, `{"prompt": [token ids], "length": tokens}`, is answered by a line
`{"first_s": …, "rest_s": …}`: seconds until the first token, and from there to the last one. All
are timed by the same clock where tokens come out (mlx-lm's own `generation_tps` counts one token
more than it times); answers are greedy and have their full length.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = ("gryphon", "scheduler", "bare", "mlx-lm", "mlx-lm float32", "mlx-lm matched")

Generate = Callable[[list[int], int, Callable[[], None]], None]
"""Prompt, length, and what to call at every token."""


def answer_tasks(generate: Generate) -> None:
    """Generate for each line of standard input."""
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(timed(generate, task["prompt"], task["length"])), flush=True)


def timed(generate: Generate, prompt: list[int], length: int) -> dict[str, float]:
    times: list[float] = []
    begin = time.perf_counter()
    generate(prompt, length, lambda: times.append(time.perf_counter()))
    if len(times) != length:
        sys.exit(f"{len(times)} tokens instead of {length}")
    return {"first_s": times[0] - begin, "rest_s": times[-1] - times[0]}


def request_of(path: Path, prompt: list[int], length: int, number: int) -> Any:
    from app.engine.protocol import GenerationRequest, ModelRef, Sampling

    return GenerationRequest(
        id=str(number),
        model=ModelRef(path.name, str(path)),
        prompt_tokens=prompt,
        sampling=Sampling(temperature=0),
        max_tokens=length,
    )


def gryphon(path: Path) -> None:
    from app.engine.client import EngineClient
    from app.engine.protocol import Failed, Token

    loop = asyncio.new_event_loop()
    client = EngineClient()
    numbers = iter(range(1, 1_000_000))

    async def stream(prompt: list[int], length: int, on_token: Callable[[], None]) -> None:
        async for event in client.stream(request_of(path, prompt, length, next(numbers))):
            if isinstance(event, Failed):
                sys.exit(event.message)
            if isinstance(event, Token):
                on_token()

    def generate(prompt: list[int], length: int, on_token: Callable[[], None]) -> None:
        loop.run_until_complete(stream(prompt, length, on_token))

    answer_tasks(generate)
    loop.run_until_complete(client.close())


def scheduler(path: Path) -> None:
    from app.engine import blas

    blas.preload()
    from app.engine.batch import Row
    from app.engine.protocol import Event, Failed, Finished, Token
    from app.engine.scheduler import Scheduler

    engine = Scheduler()
    threading.Thread(target=engine.run, daemon=True).start()

    def generate(prompt: list[int], length: int, on_token: Callable[[], None]) -> None:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def emit(event: Event) -> None:
            if isinstance(event, Token):
                on_token()
            elif isinstance(event, Finished | Failed):
                events.put(event)

        engine.submit(Row(request_of(path, prompt, length, 1), emit, prompt))
        end = events.get()
        if isinstance(end, Failed):
            sys.exit(end.message)

    answer_tasks(generate)
    sys.stdout.flush()
    os._exit(0)  # as the engine does: MLX may not like how a thread that used it goes


def bare(path: Path) -> None:
    from app.engine import blas

    blas.preload()
    import mlx.core as mx

    from app.engine.admission import PREFILL_CHUNK
    from app.engine.memory import MemoryBudget
    from app.engine.protocol import ModelRef
    from app.engine.resident import load_resident, plan_resident

    ref = ModelRef(path.name, str(path))
    loaded = load_resident(ref, plan_resident(ref, MemoryBudget()), lambda *_: None).loaded
    model, chunk = loaded.model, PREFILL_CHUNK[mx.default_device().type]

    def generate(prompt: list[int], length: int, on_token: Callable[[], None]) -> None:
        states = loaded.make_cache()
        for start in range(0, len(prompt) - 1, chunk):
            part = prompt[start : min(start + chunk, len(prompt) - 1)]
            model(mx.array([part], mx.int32), cache=states)
            mx.eval([state.state for state in states])
        token = mx.array(prompt[-1:], mx.int32)
        unread = None
        for step in range(length + 1):
            if step < length:
                token = mx.argmax(model(token[:, None], cache=states)[:, -1], axis=-1)
                mx.async_eval(token)
            if unread is not None:
                unread.item()
                on_token()
            unread = token

    answer_tasks(generate)


def mlx_lm(path: Path, contender: str) -> None:
    if contender == "mlx-lm matched":
        from app.engine import blas

        blas.preload()
    import mlx.core as mx
    from engine_models import WITHOUT_COUNTERPART, link_for_mlx_lm
    from mlx_lm import stream_generate
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.utils import dequantize_model, load_model

    family = json.loads((path / "config.json").read_text())["model_type"]
    with tempfile.TemporaryDirectory() as directory:
        linked = link_for_mlx_lm(path, Path(directory))
        if family in WITHOUT_COUNTERPART:
            from mlxmodels import registry

            model, _ = load_model(linked, get_model_classes=registry.model_classes)
        else:
            model, _ = load_model(linked)
        tokenizer = load_tokenizer(linked)
    tokenizer.eos_token_ids = set()
    if contender != "mlx-lm":
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())

    def generate(prompt: list[int], length: int, on_token: Callable[[], None]) -> None:
        for _ in stream_generate(model, tokenizer, prompt, max_tokens=length):
            on_token()

    answer_tasks(generate)


def main() -> None:
    contender, path = sys.argv[1], Path(sys.argv[2])
    made = {"gryphon": gryphon, "scheduler": scheduler, "bare": bare}
    if contender in made:
        made[contender](path)
    else:
        mlx_lm(path, contender)


if __name__ == "__main__":
    main()
