"""A tokenizer with exact ids, from a Hugging Face folder (tokenizer.json) or a sentencepiece .model file.

Comes in: a path. Goes out: token ids of texts, without special tokens added; text that spells a special token, such as "</s>",
becomes ordinary tokens. Does not know: torch, transformers, chat templates.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_instruct.errors import ConfigError, InputError, MissingPackageError, did_you_mean
from megatron_instruct.files import read_json

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
_GENERATION = "generation_config.json"


class Tokenizer(Protocol):
    """What the stages need of a tokenizer."""

    kind: str
    """What Megatron calls it: HuggingFaceTokenizer or GPTSentencePieceTokenizer."""
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
    def decode(self, ids: Iterable[int]) -> str: ...


def load_tokenizer(path: Path | str, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer folder or .model file.

    eod_token: the token put after each document; by default the end-of-sequence token that the tokenizer names.
    Raises InputError where there is no tokenizer, ConfigError where eod_token is unknown.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _HuggingFaceTokenizer(path / "tokenizer.json", eod_token)
        if (path / "tokenizer.model").is_file():
            return _SentencePieceTokenizer(path / "tokenizer.model", eod_token)
        raise InputError(f"tokenizer folder {path} has neither tokenizer.json nor tokenizer.model; give the model's own folder.")
    if not path.is_file():
        raise InputError(
            f"tokenizer {path}: no such file or folder; give a Hugging Face folder with tokenizer.json, or a sentencepiece .model file."
        )
    if path.suffix == ".json":
        return _HuggingFaceTokenizer(path, eod_token)
    return _SentencePieceTokenizer(path, eod_token)


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
    for name in (_GENERATION, "config.json"):  # ids of special tokens, which a model made with this tokenizer needs
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)


class _HuggingFaceTokenizer:
    """tokenizer.json through the tokenizers library."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, file: Path, eod_token: str | None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingPackageError("tokenizers", extra="data", purpose=f"the tokenizer {file}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise InputError(f"{file} is not a readable tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = _special_names(file.parent)
        generation_eos = _generation_eos(file.parent)
        token = eod_token or names.get("eos_token")
        if token is None and generation_eos is not None:
            token = self._tokenizer.id_to_token(generation_eos)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = _eod_id(vocabulary, token, file)
        bos = names.get("bos_token")
        self.bos: int | None = vocabulary.get(bos) if bos else None
        self.fingerprint = _fingerprint(_what_decides_ids(file), self.eod)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class _SentencePieceTokenizer:
    """A sentencepiece model through sentencepiece itself: converters are known to change ids without a word (transformers 5)."""

    kind = "GPTSentencePieceTokenizer"

    def __init__(self, file: Path, eod_token: str | None) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingPackageError("sentencepiece", extra="data", purpose=f"the tokenizer {file}") from error
        content = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file} is not a readable sentencepiece model: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()  # user-defined and control pieces are counted
        pieces = {self._processor.id_to_piece(number): number for number in range(self.vocab_size)}
        eos = self._processor.eos_id()
        self.eod = _eod_id(pieces, eod_token or (self._processor.id_to_piece(eos) if eos >= 0 else None), file)
        bos = self._processor.bos_id()
        self.bos: int | None = bos if bos >= 0 else None
        self.fingerprint = _fingerprint(content, self.eod)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


def _special_names(folder: Path) -> dict[str, str]:
    """Return the texts of eos_token and bos_token, from tokenizer_config.json, else special_tokens_map.json."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        content: dict[str, Any] = read_json(folder / file)
        for key in ("eos_token", "bos_token"):
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
    return names


def _generation_eos(folder: Path) -> int | None:
    """Return the id of the end-of-sequence token that generation_config.json names, the first of several."""
    content: dict[str, Any] = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    value = content.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


def _what_decides_ids(file: Path) -> bytes:
    """Return tokenizer.json in one canonical form, without what is never used here: padding, truncation, special tokens added around.

    Merges are written as "a b" by older and as ["a", "b"] by newer versions of the library; both mean the same.
    """
    content: dict[str, Any] = read_json(file)
    content = {key: value for key, value in content.items() if key not in ("version", "truncation", "padding", "post_processor")}
    merges = content["model"].get("merges")
    if merges:
        content["model"] = {**content["model"], "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]}
    return json.dumps(content, sort_keys=True).encode()


def _eod_id(vocabulary: dict[str, int], token: str | None, source: Path) -> int:
    if token is None:
        raise ConfigError(f"{source} and its neighbours name no end-of-sequence token to put after documents; name one with eod_token.")
    if token not in vocabulary:
        raise ConfigError(f"eod_token={token!r} is not in the vocabulary of {source}{did_you_mean(token, _special_looking(vocabulary))}")
    return vocabulary[token]


def _special_looking(vocabulary: Iterable[str]) -> list[str]:
    return [token for token in vocabulary if token.startswith("<") and token.endswith(">")][:50]


def _fingerprint(content: bytes, eod: int) -> str:
    return hashlib.sha256(content + b"\0eod=" + str(eod).encode()).hexdigest()
