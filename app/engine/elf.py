"""The dynamic symbols of a 64-bit little-endian ELF library: read them, export some renamed.

Only what `app.engine.blas` needs. Sizes and offsets come from the section headers, which linkers
and the tools that repair wheels keep. Reference: System V ABI, chapters 4 and 5 (gABI).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SECTION = struct.Struct("<IIQQQQIIQQ")  # name type flags addr offset size link info align entsize
_SYMBOL = struct.Struct("<IBBHQQ")  # name info other section value size
_DYNAMIC = struct.Struct("<qQ")  # tag value

_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_GNU_HASH = 6, 11, 0x6FFFFFF6
_DT_HASH, _DT_GNU_HASH = 4, 0x6FFFFEF5
_STB_LOCAL = 0
_SHN_UNDEF = 0


class ElfError(ValueError):
    """The bytes are not an ELF library of the expected kind."""


@dataclass(frozen=True)
class Section:
    """Where a section lies, in the file (`offset`) and in memory (`address`)."""

    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Symbol:
    """One entry of the dynamic symbol table."""

    index: int
    name: str
    name_offset: int
    defined: bool
    is_global: bool
    value: int


class ElfLibrary:
    """A shared library's bytes, with its dynamic symbols.

    Raises:
        ElfError: not ELF64 little-endian, no dynamic symbol table, or offsets outside the file.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        if data[:6] != b"\x7fELF\x02\x01":
            raise ElfError("not a 64-bit little-endian ELF file")
        try:
            self._sections = list(self._read_sections())
            self._dynsym = self._section(_SHT_DYNSYM)
            self._names = self._sections[self._dynsym.link]
            self.symbols = list(self._read_symbols())
        except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise ElfError(f"damaged ELF file: {error}") from error

    def undefined(self) -> set[str]:
        """Names that the library takes from others."""
        return {symbol.name for symbol in self.symbols if symbol.name and not symbol.defined}

    def defined(self) -> set[str]:
        """Names that the library offers to others."""
        return {symbol.name for symbol in self.symbols if symbol.defined and symbol.is_global}

    def export_without_prefix(self, prefix: str, names: set[str]) -> bytes:
        """A copy of the library in which each symbol `prefix + name` is called `name`.

        A symbol's new name is the tail of its old string, so no byte moves. The table that finds
        symbols by name does change: the GNU hash table, which requires a sorted symbol table,
        makes room for a System V one, which does not. References inside the library go through
        the same entries and so follow the new names.

        Raises:
            ElfError: the library defines none of the names or has no GNU hash table to replace.
        """
        renamed = {
            symbol.index: symbol.name.removeprefix(prefix)
            for symbol in self.symbols
            if symbol.defined
            and symbol.name.startswith(prefix)
            and symbol.name.removeprefix(prefix) in names
        }
        if not renamed:
            raise ElfError(f"the library defines no symbol {prefix}{min(names, default='')}")
        data = bytearray(self.data)
        try:
            for index in renamed:
                field = self._dynsym.offset + index * _SYMBOL.size
                new_offset = self.symbols[index].name_offset + len(prefix.encode())
                struct.pack_into("<I", data, field, new_offset)
            table = self._section(_SHT_GNU_HASH)
            hashes = self._system_v_hash_table(table.size, renamed)
            data[table.offset : table.offset + len(hashes)] = hashes
            self._point_hash_at(table.address, data)
        except (struct.error, IndexError, OverflowError) as error:
            raise ElfError(f"damaged ELF file: {error}") from error
        return bytes(data)

    def _system_v_hash_table(self, room: int, renamed: dict[int, str]) -> bytes:
        """nbucket, nchain, buckets, chains: each bucket starts a list linked by symbol index."""
        chains = [0] * len(self.symbols)
        exported = [s for s in self.symbols if s.defined and s.is_global]
        bucket_count = min(len(exported), room // 4 - 2 - len(chains))
        if bucket_count < 1:
            raise ElfError("the GNU hash table is too small to hold a System V one")
        buckets = [0] * bucket_count
        for symbol in exported:
            bucket = _system_v_hash(renamed.get(symbol.index, symbol.name)) % bucket_count
            chains[symbol.index], buckets[bucket] = buckets[bucket], symbol.index
        words = [bucket_count, len(chains), *buckets, *chains]
        return struct.pack(f"<{len(words)}I", *words)

    def _point_hash_at(self, address: int, data: bytearray) -> None:
        dynamic = self._section(_SHT_DYNAMIC)
        for offset in range(dynamic.offset, dynamic.offset + dynamic.size, _DYNAMIC.size):
            tag, _ = _DYNAMIC.unpack_from(data, offset)
            if tag in (_DT_HASH, _DT_GNU_HASH):
                _DYNAMIC.pack_into(data, offset, _DT_HASH, address)

    def _section(self, kind: int) -> Section:
        for section in self._sections:
            if section.kind == kind:
                return section
        raise ElfError(f"no section of type {kind:#x}")

    def _read_sections(self) -> Iterator[Section]:
        (table,) = struct.unpack_from("<Q", self.data, 0x28)
        entry_size, count = struct.unpack_from("<HH", self.data, 0x3A)
        for index in range(count):
            _, kind, _, address, offset, size, link, _, _, _ = _SECTION.unpack_from(
                self.data, table + index * entry_size
            )
            yield Section(kind, address, offset, size, link)

    def _read_symbols(self) -> Iterator[Symbol]:
        names = self.data[self._names.offset : self._names.offset + self._names.size]
        table = self.data[self._dynsym.offset : self._dynsym.offset + self._dynsym.size]
        if len(names) < self._names.size or len(table) < self._dynsym.size:
            raise ElfError("damaged ELF file: its symbols lie beyond its end")
        for index, (name, info, _, section, value, _) in enumerate(_SYMBOL.iter_unpack(table)):
            end = names.find(b"\0", name)
            if end < 0:
                raise ElfError("damaged ELF file: a symbol's name has no end")
            yield Symbol(
                index,
                names[name:end].decode(),
                name,
                defined=section != _SHN_UNDEF,
                is_global=info >> 4 != _STB_LOCAL,
                value=value,
            )


def _system_v_hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & 0x0FFFFFFF
    return value
