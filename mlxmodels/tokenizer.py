"""Text to token ids and back. Imports neither MLX nor transformers.

`Tokenizer` wraps a tokenizer.json or a sentencepiece model; `StreamingDetokenizer` turns ids that
arrive one by one into text that, joined, is exactly what decoding all of them at once gives.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from mlxmodels.added_tokens import token_text
from mlxmodels.checkpoint import eos_token_ids, read_optional_json
from mlxmodels.detokenizer import Detokenizer, Window, detokenizer_for
from mlxmodels.errors import ModelError
from mlxmodels.sentencepiece_model import SentencePieceModel, find_model

# What ends the model's turn in a chat, whether the directory's files say so or not.
_TURN_ENDS = {
    "gemma": "<end_of_turn>",
    "gemma2": "<end_of_turn>",
    "recurrent_gemma": "<end_of_turn>",
    "nemotron": "<extra_id_1>",
}
_SPECIAL_NAMES = [f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
_MAX_ID = 1 << 32  # the tokenizers library holds ids in 32 bits and raises on more


class Backend(Protocol):
    """What encodes and decodes: well-formed text, ids of up to 32 bits in the vocabulary or not."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(
        self, text: str, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token(self, id: int) -> str | None: ...

    def token_id(self, token: str) -> int | None: ...

    def detokenizer(self) -> Detokenizer: ...


class TokenizerJson:
    """A tokenizer.json, applied by the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        decoder = tokenizer.decoder
        self._decoder = {} if decoder is None else json.loads(decoder.__getstate__())

    @classmethod
    def from_file(cls, file: Path) -> "TokenizerJson":
        """
        Raises:
            ModelError: the file cannot be read.
        """
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, and panics, which are not even that
            raise ModelError(f"{file} cannot be read: {error}. Download it again.") from error

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        # Of nothing, a Strip decoder makes a panic (tokenizers 0.23).
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def token(self, id: int) -> str | None:
        return self._tokenizer.id_to_token(id)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def detokenizer(self) -> Detokenizer:
        return detokenizer_for(self._decoder, self.decode)


class Tokenizer:
    """A model's tokenizer and its special tokens."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self.bos_token = bos_token
        """Text of the token that opens a sequence, None if the model has none."""
        self.bos_token_id = None if bos_token is None else backend.token_id(bos_token)
        self.eos_token = eos_token
        """Text of the token that ends a sequence, None if the model has none."""
        self.eos_token_ids = eos_token_ids
        """Ids that end a sequence: those the directory's files declare, and its family's."""
        known = {"bos_token": bos_token, "eos_token": eos_token}
        self.special_tokens = dict(special_tokens or {}) | {k: v for k, v in known.items() if v}
        """Texts of the tokens that have a name, by names such as "bos_token"."""
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        """Ids that stand for no text."""
        self._spelling = self.detokenizer()
        self.tokens_are_bytes = not isinstance(self._spelling, Window)
        """Whether a text is the bytes of its tokens, one after the other. Not where a decoder puts
        spaces or joins words by rules of its own."""

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a model directory: its tokenizer.json, or a lone sentencepiece model.

        Raises:
            ModelError: neither is there, or a file cannot be read.
        """
        path = Path(path)
        settings = read_optional_json(path / "special_tokens_map.json")
        given = read_optional_json(path / "tokenizer_config.json")
        settings |= {key: value for key, value in given.items() if value is not None}
        config = read_optional_json(path / "config.json")
        generation = read_optional_json(path / "generation_config.json")
        texts = {name: token_text(settings.get(name)) for name in _SPECIAL_NAMES}
        named = {name: text for name, text in texts.items() if text is not None}

        backend: Backend
        if (path / "tokenizer.json").is_file():
            backend = TokenizerJson.from_file(path / "tokenizer.json")
            bos, eos = named.get("bos_token"), named.get("eos_token")
            bos_id = config.get("bos_token_id")
            if bos is None and type(bos_id) is int and 0 <= bos_id < _MAX_ID:
                bos = backend.token(bos_id)
        else:
            backend = model = SentencePieceModel(find_model(path), config, settings, named)
            bos, eos = model.bos_token, model.eos_token

        ends = set(eos_token_ids(config, generation))
        for token in (eos, _TURN_ENDS.get(str(config.get("model_type")))):
            if token is not None and (id := backend.token_id(token)) is not None:
                ends.add(id)
        return cls(
            backend,
            bos_token=bos,
            eos_token=eos,
            eos_token_ids=frozenset(ends),
            special_tokens=named,
        )

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: Add whatever the tokenizer puts around a sequence.
            parse_special: Where the text spells a special token, that is it; else text like any.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            # Half a surrogate pair, as a JSON escape can smuggle in, is no text.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._backend.encode(text, add_special_tokens, parse_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and ids outside the vocabulary leave none."""
        return self._backend.decode([id for id in ids if 0 <= id < _MAX_ID])

    def token_id(self, token: str) -> int | None:
        """The id of the vocabulary's own spelling of a token, None if it has none such."""
        return self._backend.token_id(token)

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling of an id, None outside the vocabulary."""
        return self._backend.token(id) if 0 <= id < _MAX_ID else None

    def token_bytes(self, id: int) -> bytes:
        """Bytes an id alone stands for; a special token's spelling; b"" outside the vocabulary.

        A character may be spread over several tokens, so these need not be valid UTF-8.
        """
        token = self.token(id)
        if token is None:
            return b""
        return token.encode() if id in self.special_ids else self._spelling.bytes_of(token)

    def detokenizer(self) -> Detokenizer:
        """A new incremental decoder; `StreamingDetokenizer` is the way to use it."""
        return self._backend.detokenizer()


class StreamingDetokenizer:
    """Text of a growing sequence of ids: joined, exactly `Tokenizer.decode` of all of them.

    Text is held back only while the bytes of a character are incomplete, or, in vocabularies with
    byte fallback, until a run of byte tokens ends, since one bad byte changes the whole run.
    A space that decoding drops from the start of a text stays with `keep_first_space`.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_first_space: bool = False) -> None:
        self._special = tokenizer.special_ids
        self._token = tokenizer.token
        self._text = tokenizer.detokenizer()
        if keep_first_space:
            self._text.keep_first_space()

    def add(self, id: int) -> str:
        """The text that this id completes; "" for special tokens and ids that mean nothing."""
        token = None if id in self._special else self._token(id)
        return "" if token is None else self._text.add(id, token)

    def finish(self) -> str:
        """What was held back."""
        return self._text.finish()


def read_chat_template(path: str | Path) -> str | None:
    """The chat template named "default"; None where there is none.

    Raises:
        ModelError: a file cannot be read.
    """
    return read_chat_templates(path).get("default")


def read_chat_templates(path: str | Path) -> dict[str, str]:
    """The chat templates of a directory by name; a lone one is "default".

    From tokenizer_config.json, or chat_template.json where that has none; files of their own,
    chat_template.jinja and those in additional_chat_templates/, come before either.

    Raises:
        ModelError: a file cannot be read.
    """
    path = Path(path)
    files = {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    templates = {name: _text_of(file) for name, file in files.items()}
    if "default" in templates:
        return templates
    for name in ("tokenizer_config.json", "chat_template.json"):
        if named := _named_templates(read_optional_json(path / name).get("chat_template")):
            return named | templates
    return templates


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error


def _named_templates(value: object) -> dict[str, str]:
    """One template, {name: template}, or a list of {"name", "template"}."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        value = {item.get("name"): item.get("template") for item in items}
    if not isinstance(value, dict):
        return {}
    named = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}
    return {"default": next(iter(named.values()))} if len(named) == 1 else named
