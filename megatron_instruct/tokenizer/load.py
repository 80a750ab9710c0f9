"""Which tokenizer a path holds, and the files that make it up.

Comes in: a path. Goes out: a `Tokenizer`; a copy of its files. Does not know: how each kind encodes.
"""

import shutil
from pathlib import Path

from megatron_instruct.errors import InputError
from megatron_instruct.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_instruct.tokenizer.special_tokens import GENERATION

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Files of a Hugging Face tokenizer that travel with a model."""


def load_tokenizer(path: Path | str, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer folder or .model file.

    eod_token: the token put after each document; by default the end-of-sequence token that the tokenizer names.
    Raises InputError where there is no tokenizer, ConfigError where eod_token is unknown.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(path / "tokenizer.json", eod_token)
        if (path / "tokenizer.model").is_file():
            return SentencePieceTokenizer(path / "tokenizer.model", eod_token)
        raise InputError(f"tokenizer folder {path} has neither tokenizer.json nor tokenizer.model; give the model's own folder.")
    if not path.is_file():
        raise InputError(
            f"tokenizer {path}: no such file or folder; give a Hugging Face folder with tokenizer.json, or a sentencepiece .model file."
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod_token)
    return SentencePieceTokenizer(path, eod_token)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files into the existing folder `target`, so that load_tokenizer finds the same tokenizer there."""
    if source.is_file() and source.suffix != ".json":
        shutil.copyfile(source, target / "tokenizer.model")
        return
    folder = source if source.is_dir() else source.parent
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.json")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and not (source.is_file() and name == "tokenizer.json"):
            shutil.copyfile(folder / name, target / name)
    for name in (GENERATION, "config.json"):  # ids of special tokens, which a model made with this tokenizer needs
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)
