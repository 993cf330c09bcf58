"""Questions of text and tokens, answered by the preparation processes."""

from __future__ import annotations

from app.engine.embed_request import MAX_TOKENS as MAX_EMBED_TOKENS
from app.engine.embed_request import Embed
from app.engine.preparation_pool import PreparationPool
from app.engine.preparation_work import Ids, Prompt, Texts
from app.engine.token_commands import (
    MAX_TEXT_BYTES,
    MAX_TOKENS,
    Detokenize,
    Detokenized,
    Tokenize,
    Tokenized,
    check_detokenize,
    check_tokenize,
)
from app.errors import GryphonError


async def tokenized(command: Tokenize, pool: PreparationPool, client: str) -> Tokenized:
    """The answer to a `Tokenize`.

    Raises:
        GryphonError: as `check_tokenize` and `PreparationPool.answer`.
    """
    check_tokenize(command)
    path = command.model.path
    if command.text is not None:
        work = Texts(path, [command.text], command.add_special, command.parse_special)
        tokens = (await pool.answer(work, client)).token_ids
    else:
        prompt = Prompt(
            path,
            command.messages,
            tools=command.tools,
            template_options=command.template_options,
            opens_turn=command.add_generation_prompt,
            is_prefix=False,
        )
        tokens = (await pool.answer(prompt, client)).token_ids
    if len(tokens) > MAX_TOKENS:
        raise GryphonError(
            "request_too_large",
            f"This is {len(tokens)} tokens, and one answer holds {MAX_TOKENS}. Divide it.",
        )
    pieces = None
    if command.with_pieces:
        pieces = (await pool.answer(Ids(path, tokens, "pieces"), client)).pieces
    return Tokenized(command.id, tokens, pieces)


async def detokenized(command: Detokenize, pool: PreparationPool, client: str) -> Detokenized:
    """The answer to a `Detokenize`.

    Raises:
        GryphonError: as `check_detokenize` and `PreparationPool.answer`.
    """
    check_detokenize(command)
    ids = Ids(command.model.path, command.tokens, "spelled" if command.with_special else "text")
    text = (await pool.answer(ids, client)).text
    if (size := len(text.encode())) > 8 * MAX_TEXT_BYTES:
        raise GryphonError(
            "request_too_large",
            f"The text of these tokens takes {size} bytes, and one answer holds "
            f"{8 * MAX_TEXT_BYTES}. Divide them.",
        )
    return Detokenized(command.id, text)


async def embed_inputs(request: Embed, pool: PreparationPool, client: str) -> list[list[int]]:
    """Token ids of each input, at least one each.

    Raises:
        GryphonError: "invalid_request", naming an empty input; "request_too_large"; as
            `PreparationPool.answer`.
    """
    if request.tokens is not None:
        inputs = request.tokens
    else:
        inputs = (await pool.answer(Texts(request.model.path, request.texts or []), client)).each
    if (total := sum(map(len, inputs))) > MAX_EMBED_TOKENS:
        raise GryphonError(
            "request_too_large",
            f"The inputs have {total} tokens together, and one request takes {MAX_EMBED_TOKENS}. "
            "Divide them.",
        )
    for index, tokens in enumerate(inputs):
        if not tokens:
            raise GryphonError("invalid_request", f"Input {index} is empty: it holds no token.")
    return inputs
