"""What the stages need of a tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_instruct.tokenizer.flat import FlatTokens


class Tokenizer(Protocol):
    """Text to ids and back, without special tokens added; text that spells one becomes ordinary tokens."""

    kind: str
    """What Megatron calls it, such as HuggingFaceTokenizer or GPTSentencePieceTokenizer."""
    vocab_size: int
    """Number of ids, added tokens included: every id is below it."""
    eod: int
    """Id put after each document."""
    bos: int | None
    """Id that a sequence starts with, where the model has one."""
    fingerprint: str
    """SHA-256 of what decides the ids."""

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        """Encode many texts into one array. ends: say which bytes of its text each token stands for, too, exactly."""

    def decode(self, ids: Iterable[int]) -> str: ...
