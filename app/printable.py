"""Text that is safe to put on a terminal."""

from __future__ import annotations

# C0 controls become their visible pictures and C1 controls a replacement character: what a model
# writes, or a person pastes, must never reach the terminal as an escape sequence.
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROLS[0x7F] = 0x2421
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with Unix newlines and without control characters other than newline and tab."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)
