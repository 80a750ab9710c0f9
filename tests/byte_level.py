"""A small byte-level BPE tokenizer, trained on the spot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers


def train_tokenizer(folder: Path, texts: Sequence[str], *, vocab_size: int, named: Mapping[str, str]) -> Path:
    """Write a Hugging Face folder. named: special tokens by what tokenizer_config.json calls them."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(named.values()), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(named)))
    return folder
