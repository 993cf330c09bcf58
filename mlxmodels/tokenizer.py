"""Text to token ids and back. Imports neither MLX nor transformers.

`Tokenizer` wraps a tokenizer.json; `StreamingDetokenizer` turns ids that arrive one by one into
text that, joined, is exactly what decoding all of them at once gives.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mlxmodels.checkpoint import eos_token_ids, read_optional_json
from mlxmodels.detokenizer import Detokenizer, detokenizer_for
from mlxmodels.errors import ModelError


class Tokenizer:
    """A model's tokenizer and its special tokens."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token = bos_token
        """Text of the token that opens a sequence, None if the model has none."""
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token = eos_token
        """Text of the token that ends a sequence, None if the model has none."""
        self.eos_token_ids = eos_token_ids
        """Ids that end a sequence, as the directory's files declare them."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """Ids that stand for no text."""
        decoder = backend.decoder
        self._decoder = {} if decoder is None else json.loads(decoder.__getstate__())
        self._spelling = self.detokenizer()

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a model directory.

        Raises:
            ModelError: tokenizer.json is missing or cannot be read.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            has_model = any(path.glob("*.model"))
            advice = (
                "it holds a sentencepiece model only, which is not supported yet; convert it with "
                "transformers' AutoTokenizer.save_pretrained"
                if has_model
                else "download the model again with its tokenizer"
            )
            raise ModelError(f"{path} has no tokenizer.json: {advice}.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{file} cannot be read: {error}. Download it again.") from error

        settings = read_optional_json(path / "tokenizer_config.json")
        special = read_optional_json(path / "special_tokens_map.json")
        config = read_optional_json(path / "config.json")
        generation = read_optional_json(path / "generation_config.json")
        ends = set(eos_token_ids(config, generation))
        eos = _token_text("eos_token", settings, special)
        if eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
            ends.add(eos_id)
        bos = _token_text("bos_token", settings, special)
        bos_id = config.get("bos_token_id")
        if bos is None and type(bos_id) is int and 0 <= bos_id < 2**31:
            bos = backend.id_to_token(bos_id)
        return cls(backend, bos_token=bos, eos_token=eos, eos_token_ids=frozenset(ends))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text; with special tokens, whatever the tokenizer puts around a sequence."""
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            # Half a surrogate pair, as a JSON escape can smuggle in, is no text.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and ids outside the vocabulary leave none."""
        return self._backend.decode(
            [id for id in ids if 0 <= id < _MAX_ID], skip_special_tokens=True
        )

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling of an id, None outside the vocabulary."""
        return self._backend.id_to_token(id) if 0 <= id < _MAX_ID else None

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
        return detokenizer_for(self._decoder, self.decode)


class StreamingDetokenizer:
    """Text of a growing sequence of ids: joined, exactly `Tokenizer.decode` of all of them.

    Text is held back only while the bytes of a character are incomplete, or, in vocabularies with
    byte fallback, until a run of byte tokens ends, since one bad byte changes the whole run.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special_ids
        self._token = tokenizer.token
        self._text = tokenizer.detokenizer()

    def add(self, id: int) -> str:
        """The text that this id completes; "" for special tokens and ids that mean nothing."""
        token = None if id in self._special else self._token(id)
        return "" if token is None else self._text.add(id, token)

    def finish(self) -> str:
        """What was held back."""
        return self._text.finish()


def read_chat_template(path: str | Path) -> str | None:
    """The chat template: chat_template.jinja, else tokenizer_config.json's, "default" of several.

    Raises:
        ModelError: a file cannot be read.
    """
    file = Path(path) / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read: {error}.") from error
    template = read_optional_json(Path(path) / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {
            item.get("name"): item.get("template") for item in template if isinstance(item, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(name: str, *sources: Mapping[str, Any]) -> str | None:
    """A special token that a config file names as text or as {"content": text}."""
    for source in sources:
        value = source.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        # Half a surrogate pair, as a JSON escape can smuggle in, is no token's text.
        if isinstance(value, str) and not re.search("[\ud800-\udfff]", value):
            return value
    return None


_MAX_ID = 1 << 32  # the tokenizers library holds ids in 32 bits and raises on more
