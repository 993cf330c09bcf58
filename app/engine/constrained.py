"""Which tokens a step's rows may draw: everything, but for rows with a constraint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine.batch import Row
from app.errors import GryphonError


def allowed_tokens(rows: Sequence[Row], vocab_size: int) -> NDArray[np.bool_]:
    """The mask of a step, [B, V]; V is `vocab_size`, the width of the logits.

    A row whose answer is complete, or whose constraint cannot be followed any further, ends here
    and may draw anything, as nobody will read it.
    """
    allowed = np.empty((len(rows), vocab_size), np.bool_)
    for row, into in zip(rows, allowed, strict=True):
        try:
            _allow(row, into)
        except GryphonError as error:
            row.fail(error.code, error.message)
        if row.done:
            into[:] = True
    return allowed


def _allow(row: Row, into: NDArray[np.bool_]) -> None:
    if row.matcher is None or row.done:
        into[:] = True
        return
    assert row.text is not None and row.sampling is not None
    ends = row.sampling.eos_token_ids
    row.matcher.wait()
    if row.matcher.must_end:
        row.finish("stop", row.text.finish())
        return
    row.matcher.allow(into, ends)
    # A grammar may name one of the model's ends in its middle.
    is_end_forced = np.count_nonzero(into) == np.count_nonzero(into[list(ends)])
    if is_end_forced and row.launched < row.sampling.min_tokens:
        raise GryphonError(
            "constraint_failed",
            "The grammar asks for an end-of-sequence token here, which min_tokens or ignore_eos "
            "forbids. Leave them out.",
        )
