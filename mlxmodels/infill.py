"""How models are told of a gap in a text (fill in the middle): a few tokens with agreed spellings.

Which ones a model has shows in its tokenizer. Imports neither MLX nor transformers.

Sources: SantaCoder arXiv:2301.03988; StarCoder 2 arXiv:2402.19173; Code Llama arXiv:2308.12950;
DeepSeek-Coder arXiv:2401.14196; Qwen2.5-Coder arXiv:2409.12186; CodeGemma arXiv:2406.11409;
mistral-common `encode_fim`; for the last two, llama.cpp's `llama-vocab.cpp`.
"""

from collections.abc import Callable
from typing import NamedTuple


class InfillTokens(NamedTuple):
    """The tokens of one convention."""

    prefix: str
    """Before the text that precedes the gap."""
    suffix: str
    """Before the text that follows it."""
    middle: str = ""
    """Where the model begins to fill it; none where that is after what precedes the gap."""
    suffix_first: bool = False
    """Whether what follows the gap is read before what precedes it."""
    repository: str = ""
    """Before a repository's name, with `file` before each file's; for context from other files."""
    file: str = ""
    ends: tuple[str, ...] = ()
    """What a filled gap may end with besides the tokens above and the end of the sequence."""

    @property
    def required(self) -> tuple[str, ...]:
        """Spellings that a tokenizer must all have."""
        return tuple(filter(None, (self.prefix, self.suffix, self.middle)))

    @property
    def all_ends(self) -> tuple[str, ...]:
        """Spellings of what does not belong to a gap's content."""
        return (*self.required, *filter(None, (self.repository, self.file)), *self.ends)


CONVENTIONS = (
    # Qwen2.5-Coder and Qwen3-Coder, CodeGemma, Granite 4.
    InfillTokens(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        repository="<|repo_name|>",
        file="<|file_sep|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|file_separator|>"),
    ),
    # StarCoder 1 and 2, Stable Code, Granite Code, Refact.
    InfillTokens(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>", "<filename>"),
    ),
    # SantaCoder.
    InfillTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>",)),
    # DeepSeek-Coder 1 and 2, DeepSeek V2 and V3. The second marks the gap, the third the end.
    InfillTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ends=("<|EOT|>",)),
    # Code Llama.
    InfillTokens("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    # Codestral.
    InfillTokens("[PREFIX]", "[SUFFIX]", suffix_first=True, ends=("[MIDDLE]",)),
    # GLM 4.5.
    InfillTokens("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ends=("<|endoftext|>",)),
    # Falcon-H1 Tiny Coder.
    InfillTokens("<|prefix|>", "<|suffix|>", "<|middle|>", ends=("<|endoftext|>",)),
)


def infill_tokens(has: Callable[[str], bool]) -> InfillTokens | None:
    """The convention whose tokens a tokenizer has; None where it has those of none.

    Args:
        has: Whether it has a token of this spelling.
    """
    return next((one for one in CONVENTIONS if all(map(has, one.required))), None)
