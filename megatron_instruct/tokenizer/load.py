"""Which tokenizer a path holds, and the files that make it up.

Comes in: a path. Goes out: a `Tokenizer`; a copy of its files. Does not know: how each kind encodes.
"""

import re
import shutil
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json
from megatron_instruct.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_instruct.tokenizer.special_tokens import GENERATION
from megatron_instruct.tokenizer.tiktoken_files import copy_with_definition, read_megatron_list, read_tekken, read_tiktoken
from megatron_instruct.tokenizer.tiktoken_tokenizer import TikTokenizer

_TIKTOKEN, _MEGATRON = "tokenizer.tiktoken", "tiktoken.vocab.json"
"""What copies of a .tiktoken file, and of a vocabulary of Megatron's TikTokenizer, are called."""
_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers 5 keeps chat templates with names."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    _TIKTOKEN,
    f"{_TIKTOKEN}.yaml",
    _MEGATRON,
    f"{_MEGATRON}.yaml",
)
"""Files of a tokenizer that travel with a model."""


_IN_FOLDERS = ("tokenizer.json", "tokenizer.model", "tekken.json", _TIKTOKEN, _MEGATRON)
"""Names of tokenizers in folders, the first that is there counts."""


def load_tokenizer(path: Path | str, *, eod_token: str | None = None) -> Tokenizer:
    """Load the tokenizer in a folder or file; what is in a file decides its kind where the name does not.

    eod_token: the token put after each document; by default the end-of-sequence token that the tokenizer names.
    Raises InputError where there is no tokenizer, ConfigError where eod_token is unknown.
    """
    file = tokenizer_file(Path(path))
    match _kind(file):
        case "sentencepiece":
            return SentencePieceTokenizer(file, eod_token)
        case "tiktoken":
            return TikTokenizer(file, read_tiktoken(file), eod_token)
    content = read_json(file)
    if isinstance(content, list):
        return TikTokenizer(file, read_megatron_list(file, content), eod_token)
    if isinstance(content, dict) and {"config", "vocab"} <= content.keys():
        return TikTokenizer(file, read_tekken(file, content), eod_token)
    return HuggingFaceTokenizer(file, eod_token)


def tokenizer_file(path: Path) -> Path:
    """Return the file that holds the tokenizer at `path`, or raise InputError."""
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()] or sorted(path.glob("*.tiktoken"))[:1]
        if not found:
            raise InputError(
                f"tokenizer folder {path} has neither tokenizer.json nor tokenizer.model nor tekken.json nor a .tiktoken file; "
                "give the model's own folder."
            )
        path = found[0]
    if not path.is_file():
        raise InputError(
            f"tokenizer {path}: no such file or folder; give a Hugging Face folder with tokenizer.json, a sentencepiece .model file, "
            "a tekken.json or a .tiktoken file."
        )
    if not path.stat().st_size:
        raise InputError(f"tokenizer {path} is empty; copy or download it again.")
    return path


def _kind(file: Path) -> Literal["json", "tiktoken", "sentencepiece"]:
    if file.suffix == ".json":
        return "json"
    if file.suffix == ".tiktoken":
        return "tiktoken"
    with open(file, "rb") as stream:  # a tokenizer.model may be of either kind
        first_line = stream.readline(1000)
    return "tiktoken" if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\s*", first_line) else "sentencepiece"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files into the existing folder `target`, so that load_tokenizer finds the same tokenizer there."""
    file = tokenizer_file(source)
    kind = _kind(file)
    if kind == "tiktoken":
        copy_with_definition(file, target / _TIKTOKEN)
    elif kind == "sentencepiece":
        shutil.copyfile(file, target / "tokenizer.model")
    else:
        copy_with_definition(file, target / _json_name(file))
    if kind == "json" or source.is_dir():
        _copy_others(file.parent, target)


def _json_name(file: Path) -> str:
    content = read_json(file)
    if isinstance(content, list):
        return _MEGATRON
    return "tekken.json" if {"config", "vocab"} <= content.keys() else "tokenizer.json"


def _copy_others(folder: Path, target: Path) -> None:
    """Copy the files beside the tokenizer that belong to it, apart from tokenizers."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and name not in _IN_FOLDERS and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)
    if (folder / _TEMPLATES).is_dir() and not (target / _TEMPLATES).exists():
        shutil.copytree(folder / _TEMPLATES, target / _TEMPLATES, copy_function=shutil.copyfile)
    for name in (GENERATION, "config.json"):  # ids of special tokens, which a model made with this tokenizer needs
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)
