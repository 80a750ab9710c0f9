"""The tokenizer of a source, checked against its model: no more ids than the embedding has rows, and no code of its own.

Does not know: what is done with it.
"""

from pathlib import Path

from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer

_CONFIG = "tokenizer_config.json"


def read_tokenizer(place: Path, *, model: Path, rows: int) -> Tokenizer:
    """Load the tokenizer of a model whose embedding has so many rows. Raises InputError where the two do not fit."""
    tokenizer = load_tokenizer(place)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer {place} has {tokenizer.vocab_size} ids, and the embedding of {model} has {rows} rows; "
            "give the model's own tokenizer with --tokenizer."
        )
    content = read_json(place / _CONFIG) if (place / _CONFIG).is_file() else {}
    if isinstance(content, dict) and content.get("auto_map"):
        raise InputError(
            f"{place / _CONFIG}: auto_map={content['auto_map']!r} calls for code of the tokenizer's own, which is never run; remove "
            "auto_map where tokenizer.json alone is the tokenizer, or give another one with --tokenizer."
        )
    return tokenizer
