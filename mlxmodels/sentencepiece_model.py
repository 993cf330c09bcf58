"""A lone sentencepiece model as a tokenizer, with the rules of its family.

A `.model` knows pieces and how to normalise text, nothing more. As in transformers' slow
tokenizers, which ask sentencepiece too, special tokens are cut out of the text before sentencepiece
sees it, the family says what opens a sequence, and XGLM moves the ids.

The tokenizer.json that transformers 4.57 converts the same model to gives the same ids but for:

- Llama with `"legacy": false`, text that starts with a space or "▁": the conversion takes that for
  the prefix space, sentencepiece adds one.
- A "▁" typed beside spaces where runs of it are pieces of their own (Gemma): the conversion finds
  those before spaces become "▁", sentencepiece after.
- Unigram models (XGLM), several splits of equal score: each takes another one. And letters under
  many combining marks: the conversion composes none of them, sentencepiece the first.

There sentencepiece is followed: it is what the model was trained with. Ids decode to the same text
but for one: the conversion of a Gemma model without a piece for the tab makes one of the byte 9,
which then no longer is part of a run of bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxmodels.added_tokens import AddedToken, AddedTokens, declared_tokens, token_text
from mlxmodels.detokenizer import ByteFallback, Detokenizer, Metaspace
from mlxmodels.errors import ModelError

_SPACE = "▁"
# Appended to a model: normalizer_spec { add_dummy_prefix: false }. Of a field that comes twice,
# protobuf takes the last.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Family:
    """What a family adds to the model itself. The defaults are Llama's, thus Open-Llama's."""

    adds_bos: bool = True
    special: tuple[str, ...] = ()
    """Pieces that stand for no text although the model calls them user-defined."""
    is_fairseq: bool = False
    """Ids as fairseq numbers them, one above the model's, and </s> opens a sequence."""


_GEMMA = Family(special=("<start_of_turn>", "<end_of_turn>"))
FAMILIES = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "recurrent_gemma": _GEMMA,
    "nemotron": Family(adds_bos=False),
    "xglm": Family(is_fairseq=True),
}
_FAIRSEQ_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
_FAIRSEQ_UNKNOWN = _FAIRSEQ_WORDS.index("<unk>")


class SentencePieceModel:
    """Encodes as the family's slow tokenizer in transformers, decodes as its tokenizer.json would.

    Args:
        file: The `.model`.
        config: config.json; its model_type chooses the family.
        settings: tokenizer_config.json.
        named: Texts of the special tokens the directory's files name: "bos_token", ...

    Raises:
        ModelError: the file is no sentencepiece model, or the settings are malformed.
    """

    def __init__(
        self,
        file: Path,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
        named: Mapping[str, str],
    ) -> None:
        family = FAMILIES.get(str(config.get("model_type")), Family())
        self._is_fairseq = family.is_fairseq
        self._offset = 1 if family.is_fairseq else 0
        self._load(file, settings)

        declared = declared_tokens(file.parent, settings)
        special = {*named.values(), *family.special, *_additional(settings)}
        added = self._added_tokens(declared, special)
        self._added = AddedTokens(added)
        self._not_special = AddedTokens({i: one for i, one in added.items() if not one.special})
        self.special_ids = self._added.special_ids()
        own = range(self._offset, self._offset + len(self._pieces))
        self.vocab_size = len(own) + sum(id not in own for id in self._added.ids.values())

        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.bos_token = named.get("bos_token") or self._named_by_id("bos_token_id", config, bos_id)
        """What opens a sequence: as a file names it, else as the model does."""
        self.eos_token = named.get("eos_token") or self._named_by_id("eos_token_id", config, eos_id)
        """What ends a sequence, found like `bos_token`."""
        first = self.bos_token if _flag(settings, "add_bos_token", family.adds_bos) else None
        last = self.eos_token if _flag(settings, "add_eos_token", False) else None
        if family.is_fairseq:
            first, last = self.eos_token, None
        self._before, self._after = self._ids_of(first), self._ids_of(last)

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        parts = (self._added if parse_special else self._not_special).split(text)
        if self._prefixes_once and parts:
            if isinstance(parts[0], str):
                parts[0] = _SPACE + parts[0]
            elif parts[0] not in self.special_ids:
                parts.insert(0, _SPACE)
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._text_ids(part)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        stream = self.detokenizer()
        tokens = ((id, self.token(id)) for id in ids if id not in self.special_ids)
        pieces = [stream.add(id, token) for id, token in tokens if token is not None]
        return "".join(pieces) + stream.finish()

    def token(self, id: int) -> str | None:
        if id in self._added:
            return self._added[id].content
        own = id - self._offset
        return self._pieces[own] if 0 <= own < len(self._pieces) else None

    def token_id(self, token: str) -> int | None:
        if token in self._added.ids:
            return self._added.ids[token]
        id = self._piece_id(token)
        return None if id in self._added else id

    def detokenizer(self) -> Detokenizer:
        if self._is_fairseq:
            return Metaspace(_SPACE, strips_first=True)
        return ByteFallback(_SPACE, " ", " ", 1 if self._has_prefix else 0)

    def _load(self, file: Path, settings: Mapping[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            model = file.read_bytes()
            self._processor.LoadFromSerializedProto(model)
            adds_prefix = _SPACE in "".join(self._processor.encode("a", out_type=str))
            self._has_prefix = adds_prefix and _flag(settings, "add_prefix_space", True)
            # Legacy is a prefix for every stretch of text that follows a special token.
            self._prefixes_once = self._has_prefix and not _flag(settings, "legacy", True)
            if adds_prefix and (self._prefixes_once or not self._has_prefix):
                self._processor.LoadFromSerializedProto(model + _NO_DUMMY_PREFIX)
            self._pieces = self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{file} is not a sentencepiece model ({error}); download it again, or use a build "
                f"of this model that has a tokenizer.json."
            ) from error

    def _added_tokens(
        self, declared: Mapping[int, AddedToken], special: set[str]
    ) -> dict[int, AddedToken]:
        """The model's own control tokens and what files declare; special ones marked as such."""
        if self._is_fairseq:
            words = dict(enumerate(_FAIRSEQ_WORDS))
            words |= {len(self._pieces) + 1 + i: f"<madeupword{i}>" for i in range(7)}
        else:
            every = list(range(len(self._pieces)))
            controls, unknown = self._processor.is_control(every), self._processor.is_unknown(every)
            words = {id: self._pieces[id] for id in every if controls[id] or unknown[id]}
        added = {id: AddedToken(word, special=True) for id, word in words.items()} | dict(declared)
        ids = {token.content: id for id, token in added.items()}
        for word in special:
            if word in ids:
                added[ids[word]] = replace(added[ids[word]], special=True)
            elif (id := self._piece_id(word)) is not None and id not in added:
                added[id] = AddedToken(word, special=True)
        return added

    def _piece_id(self, piece: str) -> int | None:
        own = self._processor.piece_to_id(piece)
        return own + self._offset if self._pieces[own] == piece else None

    def _named_by_id(self, key: str, config: Mapping[str, Any], own: int) -> str | None:
        id = config.get(key)
        named = self.token(id) if type(id) is int else None
        return self._pieces[own] if named is None and own >= 0 else named

    def _ids_of(self, token: str | None) -> list[int]:
        id = None if token is None else self.token_id(token)
        return [] if id is None else [id]

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        if not self._is_fairseq:
            return ids
        unknown = self._processor.unk_id()
        return [_FAIRSEQ_UNKNOWN if id == unknown else id + self._offset for id in ids]


def find_model(path: Path) -> Path:
    """The one sentencepiece model of a directory.

    Raises:
        ModelError: there is none, or several.
    """
    files = sorted(file for file in path.glob("*.model") if file.is_file())
    if not files:
        raise ModelError(
            f"{path} has no tokenizer.json and no sentencepiece *.model; download the model again "
            f"with its tokenizer."
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(
            f"{path} has no tokenizer.json but several sentencepiece models ({names}); keep the "
            f"one that belongs to it."
        )
    return files[0]


def _additional(settings: Mapping[str, Any]) -> set[str]:
    words = settings.get("additional_special_tokens")
    texts = map(token_text, words if isinstance(words, list) else [])
    return {text for text in texts if text is not None}


def _flag(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return value if isinstance(value, bool) else default
