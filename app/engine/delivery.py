"""A drawn token becomes events: text, reasoning, calls, and the end of the answer."""

from __future__ import annotations

from app.engine.batch import Launch, Row
from app.engine.protocol import Token, TokenLogprob
from mlxmodels import LoadedModel


def deliver(row: Row, token_id: int, launch: Launch, index: int, model: LoadedModel) -> None:
    """Tell who asked of a row's next token.

    Args:
        launch: The step that drew it; its logprobs are at `index`.
        model: What decides which tokens end an answer, and what a token is called.
    """
    assert row.text is not None
    if launch.was_broken(index):
        row.is_forgotten = True  # its states are no better
        row.fail(
            "invalid_numbers",
            f"{row.request.model.name} computed what is no number (NaN), so its answer means "
            "nothing: its weights may be damaged (`gryphon verify` finds that) or may not work in "
            "their dtype. Use another build of the model.",
        )
        return
    row.answer.append(token_id)
    is_end = token_id in model.eos_token_ids or token_id in row.ends
    if is_end and (row.matcher is None or row.matcher.may_end):
        row.finish("stop", row.text.finish())
        return
    if row.matcher is not None:
        row.matcher.advance(token_id)
    row.generated += 1
    may_stop = row.generated >= row.generation.min_tokens
    new = row.text.add(token_id, may_stop=may_stop)
    logprob, top = None, []
    if row.generation.logprobs:
        value, alternatives = launch.logprobs_of(index, row.generation.top_logprobs)
        logprob = _named(model, token_id, value)
        top = [_named(model, *alternative) for alternative in alternatives]
    row.emit(Token(row.request.id, new.text, token_id, logprob, top, new.reasoning))
    row.send_calls(new)
    if new.has_stopped:
        row.finish("stop")
    elif row.generated >= row.max_tokens:
        row.finish("length", row.text.finish())


def _named(model: LoadedModel, token_id: int, logprob: float) -> TokenLogprob:
    raw = model.tokenizer.token_bytes(token_id)
    return TokenLogprob(token_id, raw.decode("utf-8", "replace"), raw, logprob)
