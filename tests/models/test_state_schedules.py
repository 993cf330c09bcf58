"""Random schedules: whatever befalls a batch, each row's logits are those of its text read alone.

A schedule reads chunks with and without padding, lets rows join, leave, branch off and go back, and
replaces states by their snapshots, copies and saved files, also in the middle of a padded prompt.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxmodels.cache import WindowCache
from mlxmodels.saved_state import load_states, save_states

from ..tolerance import assert_logits_close
from .conftest import CONFIGS, random_model

KINDS = {
    "recurrent_gemma": CONFIGS["recurrent_gemma"],
    "ring": CONFIGS["recurrent_gemma"] | {"block_types": ["attention"], "num_hidden_layers": 2},
    "gemma2": CONFIGS["gemma2"],
    "open_llama": CONFIGS["open_llama"],
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of 7 that grow on their way there."""
    monkeypatch.setattr(WindowCache, "_growth", 3)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(KINDS[request.param])


@dataclass
class Row:
    """What one row has read, and the logits that came out after each token."""

    text: list[int]
    logits: list[mx.array]

    def branch(self) -> Row:
        return Row(list(self.text), list(self.logits))


@dataclass
class Batch:
    rows: list[Row]
    states: list[Any]

    def check(self) -> None:
        lengths = tuple(len(row.text) for row in self.rows)
        assert all(state.offsets == lengths for state in self.states)


class Schedule:
    """Batches and what happens to them, drawn from one seed."""

    def __init__(self, model: Any, seed: int, directory: Path) -> None:
        self.model = model
        self.draw = random.Random(seed)
        self.directory = directory
        self.batches = [self.fresh()]

    def run(self, acts: int) -> None:
        for _ in range(acts):
            act = self.draw.choice(
                [
                    self.read,
                    self.read,
                    self.read,
                    self.rebuild,
                    self.leave,
                    self.join,
                    self.branch,
                    self.go_back,
                ]
            )
            act(self.draw.choice(self.batches))
            if len(self.batches) < 3:
                self.batches.append(self.fresh())
            for batch in self.batches:
                batch.check()

    def compare(self) -> None:
        for number, batch in enumerate(self.batches):
            for i, row in enumerate(batch.rows):
                if row.text:
                    alone = self.model(mx.array([row.text]))[0]
                    assert_logits_close(f"row {i} of batch {number}", mx.stack(row.logits), alone)

    def fresh(self) -> Batch:
        """Rows that have read nothing or, padded on the left, their prompts."""
        rows = [Row([], []) for _ in range(self.draw.randint(1, 3))]
        batch = Batch(rows, self.model.make_cache())
        tokens = self.draw.randint(1, 20)
        padding = [self.draw.randint(0, tokens) for _ in rows]
        for state in batch.states:
            state.prepare(left_padding=padding)
        self.feed(batch, padding, [tokens] * len(rows), tokens)
        return batch

    def read(self, batch: Batch) -> None:
        """One to ten tokens for every row, or fewer and padding."""
        tokens = self.draw.choice([1, 1, 2, 5, 10])
        lengths = [tokens for _ in batch.rows]
        is_padded = self.draw.random() < 0.5
        if is_padded:
            lengths = [self.draw.randint(0, tokens) for _ in batch.rows]
            for state in batch.states:
                state.prepare(lengths=lengths, right_padding=[tokens - n for n in lengths])
        self.feed(batch, [0] * len(lengths), lengths, tokens)
        if is_padded:
            for state in batch.states:
                state.finalize()

    def feed(self, batch: Batch, begins: list[int], ends: list[int], tokens: int) -> None:
        """Read tokens in chunks; those of a row from its begin to its end are its own."""
        done = 0
        while done < tokens:
            size = self.draw.randint(1, tokens - done)
            chunk = [[self.draw.randint(2, 96) for _ in range(size)] for _ in batch.rows]
            logits = self.model(mx.array(chunk), cache=batch.states)
            if self.draw.random() < 0.5:
                mx.eval(logits)
            for b, row in enumerate(batch.rows):
                for t in range(max(0, begins[b] - done), min(size, ends[b] - done)):
                    row.text.append(chunk[b][t])
                    row.logits.append(logits[b, t])
            done += size
            if self.draw.random() < 0.2:
                self.rebuild(batch)

    def rebuild(self, batch: Batch) -> None:
        """Replace the states by what should be equal to them."""
        how = self.draw.choice(["snapshot", "copy", "file"])
        if how == "snapshot":
            batch.states = [type(state).from_state(state.state) for state in batch.states]
        elif how == "copy":
            batch.states = copy.deepcopy(batch.states)
        else:
            save_states(self.directory / "states", batch.states)
            batch.states, _ = load_states(self.directory / "states")

    def join(self, batch: Batch) -> None:
        """Put all batches together, beginning with this one."""
        others = [other for other in self.batches if other is not batch]
        if self.draw.random() < 0.5:
            layers = zip(batch.states, *(other.states for other in others), strict=True)
            batch.states = [type(layer[0]).merge(list(layer)) for layer in layers]
        else:
            for other in others:
                for state, more in zip(batch.states, other.states, strict=True):
                    state.extend(more)
        batch.rows += [row for other in others for row in other.rows]
        self.batches = [batch]
        if len(batch.rows) > 6:
            self.leave(batch)

    def leave(self, batch: Batch) -> None:
        """Keep some rows in some order, at times the same one twice."""
        several = range(len(batch.rows))
        kept = self.draw.sample(several, self.draw.randint(1, min(5, len(several))))
        if self.draw.random() < 0.2:
            kept.append(kept[0])
        for state in batch.states:
            state.filter(kept)
        batch.rows = [batch.rows[i].branch() for i in kept]

    def branch(self, batch: Batch) -> None:
        """Take one row or all as a batch of its own, and leave the original to go on."""
        if self.draw.random() < 0.5:
            states = [type(state).from_state(state.state) for state in batch.states]
            self.batches.append(Batch([row.branch() for row in batch.rows], states))
        else:
            i = self.draw.randrange(len(batch.rows))
            states = [state.extract(i) for state in batch.states]
            self.batches.append(Batch([batch.rows[i].branch()], states))

    def go_back(self, batch: Batch) -> None:
        """Take tokens back, if that is possible."""
        if not all(state.is_trimmable() for state in batch.states):
            return
        n = self.draw.randint(1, 4)
        shortest = min(len(row.text) for row in batch.rows)
        assert all(state.trim(n) == min(n, shortest) for state in batch.states)
        for row in batch.rows:
            length = len(row.text) - min(n, shortest)
            del row.text[length:], row.logits[length:]


@pytest.mark.parametrize("seed", range(13))
def test_every_row_reads_as_if_alone(model: Any, seed: int, tmp_path: Path) -> None:
    schedule = Schedule(model, seed, tmp_path)
    schedule.run(acts=14)
    schedule.compare()
