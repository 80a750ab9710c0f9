"""Which special tokens a tokenizer names, and its fingerprint.

Comes in: the files beside a tokenizer, its vocabulary. Goes out: names, ids. Does not know: how text is encoded.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError, did_you_mean
from megatron_instruct.files import read_json

GENERATION = "generation_config.json"


def special_names(folder: Path) -> dict[str, str]:
    """Return the texts of eos_token and bos_token, from tokenizer_config.json, else special_tokens_map.json."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        content = _mapping(folder / file)
        for key in ("eos_token", "bos_token"):
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
    return names


def generation_eos(folder: Path) -> int | None:
    """Return the id of the end-of-sequence token that generation_config.json names, the first of several."""
    content = _mapping(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    value = content.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


def _mapping(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no mapping; copy the tokenizer's files again.")
    return content


def eod_id(vocabulary: Mapping[str, int], token: str | None, source: Path) -> int:
    if token is None:
        raise ConfigError(f"{source} and its neighbours name no end-of-sequence token to put after documents; name one with eod_token.")
    if token not in vocabulary:
        raise ConfigError(f"eod_token={token!r} is not in the vocabulary of {source}{did_you_mean(token, _special_looking(vocabulary))}")
    return vocabulary[token]


def _special_looking(vocabulary: Iterable[str]) -> list[str]:
    return [token for token in vocabulary if token.startswith("<") and token.endswith(">")][:50]


def fingerprint(content: bytes, eod: int) -> str:
    return hashlib.sha256(content + b"\0eod=" + str(eod).encode()).hexdigest()
