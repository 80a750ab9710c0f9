"""Files of the tiktoken family -> a `Vocabulary`: NAME.tiktoken, tekken.json, and the JSON list that Megatron's TikTokenizer reads.

Comes in: a file and, where it leaves out how text is cut and which tokens are special, a definition beside it: the file's whole name
with .yaml added. Goes out: every id with its bytes, the pattern, the special tokens. Does not know: tiktoken.
Sources: tiktoken 0.14 (tiktoken/load.py), mistral-common 1.13 (tekken.py), megatron-core 0.19 (tiktoken_tokenizer.py).
"""

import base64
import binascii
import functools
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_instruct.errors import InputError, did_you_mean

_FIELDS = ("pattern", "special_tokens", "num_special_tokens", "vocab_size", "eod_token", "bos_token")
_FILLER = "<SPECIAL_{}>"
"""Name of the special tokens up to num_special_tokens that have none of their own, as in Megatron and mistral-common."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What decides the ids, and which of them are special."""

    pattern: str
    """Regular expression that cuts the text before bytes are merged."""
    ranks: Mapping[bytes, int]
    """The id of each token; of two pairs of tokens the one whose whole has the lower id is merged first."""
    special_tokens: Mapping[str, int]
    eod_token: str | None
    bos_token: str | None


def read_tiktoken(file: Path) -> Vocabulary:
    """Read a .tiktoken file: a line for each token, its bytes in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not a readable .tiktoken file: byte {error.start} is not ASCII; its lines are 'BASE64 RANK'."
        ) from error
    for number, line in enumerate(lines, start=1):
        token, _, rank = line.partition(" ")
        if line.strip():
            ranks[_decoded(token, f"{file}:{number}")] = _rank(rank, f"{file}:{number}")
    definition = _definition(file) or _facts()["encodings"].get(file.name.removesuffix(".tiktoken"))
    if definition is None:
        known = ", ".join(f"{name}.tiktoken" for name in _facts()["encodings"])
        raise InputError(
            f"{file} does not say how text is cut and which tokens are special; write {file.name}.yaml beside it with pattern, "
            f"special_tokens and eod_token (files known without: {known})."
        )
    return _vocabulary(file, ranks, definition)


def read_tekken(file: Path, content: Mapping[str, Any]) -> Vocabulary:
    """Read the content of a tekken.json file: special tokens have the first ids, and as many ranks as fit the vocabulary follow."""
    settings, special = content["config"], content.get("special_tokens")
    if special is None:
        special = [{"rank": rank, "token_str": name} for rank, name in enumerate(_facts()["tekken_special_tokens"])]
    try:
        definition = {
            "pattern": settings["pattern"],
            "special_tokens": [token["token_str"] for token in sorted(special, key=lambda token: int(token["rank"]))],
            "num_special_tokens": settings["default_num_special_tokens"],
            "vocab_size": settings["default_vocab_size"],
            "eod_token": "</s>",
            "bos_token": "<s>",
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not a readable tekken.json: it lacks {error}; give the model's own file.") from error
    return _vocabulary(file, _listed(file, content["vocab"]), definition)


def read_megatron_list(file: Path, content: list[Any]) -> Vocabulary:
    """Read the content of a vocabulary of Megatron's TikTokenizer: a list of {rank, token_bytes, token_str}."""
    return _vocabulary(file, _listed(file, content), {**_facts()["megatron"], **(_definition(file) or {})})


def definition_of(file: Path) -> Path:
    """Return where the definition of `file` is, if it has one."""
    return file.with_name(file.name + ".yaml")


def copy_with_definition(file: Path, target: Path) -> None:
    """Copy `file` to `target`, with the definition that is beside it or, of a published encoding, known by its name."""
    shutil.copyfile(file, target)
    known = _facts()["encodings"].get(file.name.removesuffix(".tiktoken"))
    if definition_of(file).is_file():
        shutil.copyfile(definition_of(file), definition_of(target))
    elif known is not None:
        definition_of(target).write_text(yaml.safe_dump(known), encoding="utf-8")


@functools.cache
def _facts() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tiktoken_encodings.yaml").read_text(encoding="utf-8"))
    return content


def _definition(file: Path) -> dict[str, Any] | None:
    place = definition_of(file)
    if not place.is_file():
        return None
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{place} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{place} must be a mapping with {', '.join(_FIELDS)}.")
    for field in content:
        if field not in _FIELDS:
            raise InputError(f"{place}: {field!r} is no field of a definition{did_you_mean(str(field), _FIELDS)}")
    return content


def _vocabulary(file: Path, ranks: dict[bytes, int], definition: Mapping[str, Any]) -> Vocabulary:
    """Put ranks and special tokens into one vocabulary, after checks."""
    special, shift = _special_tokens(file, definition)
    size = definition.get("vocab_size")
    if size is not None:
        ranks = {token: rank for token, rank in ranks.items() if rank < size - shift}
        if len(ranks) != size - shift and isinstance(definition.get("special_tokens"), list):
            raise InputError(f"{file} has {len(ranks)} tokens; vocab_size={size} takes {size - shift} beside {shift} special ones.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{file} is not a readable tokenizer of the tiktoken family: it has no token for the byte 0x{missing[0]:02X}.")
    ranks = {token: rank + shift for token, rank in ranks.items()}
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) != len(ids):
        double = next(left for left, right in itertools.pairwise(sorted(ids)) if left == right)
        raise InputError(f"{file}: two tokens have the id {double}; mend the ids of special_tokens in its definition.")
    pattern = definition.get("pattern")
    if not isinstance(pattern, str):
        names = ", ".join(_facts()["patterns"])
        raise InputError(f"{file}: its definition has pattern={pattern!r}; it must be a regular expression or one of {names}.")
    return Vocabulary(
        pattern=_facts()["patterns"].get(pattern, pattern),
        ranks=ranks,
        special_tokens=special,
        eod_token=definition.get("eod_token"),
        bos_token=definition.get("bos_token"),
    )


def _special_tokens(file: Path, definition: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Return the ids of special tokens, and by how much they move the ranks: a list takes the first ids, a mapping names its own."""
    given = definition.get("special_tokens")
    if isinstance(given, dict) and all(isinstance(name, str) and isinstance(number, int) and number >= 0 for name, number in given.items()):
        return given, 0
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or len(set(given)) != len(given):
        raise InputError(
            f"{file}: special_tokens={given!r} must be a list of names, which take the first ids, or a mapping from names to ids; "
            "no name may stand twice."
        )
    count = definition.get("num_special_tokens", _facts()["megatron"]["num_special_tokens"])
    if not isinstance(count, int) or count < len(given):
        raise InputError(f"{file}: num_special_tokens={count!r} must be a number of at least {len(given)}, that of special_tokens.")
    names = [*given, *(_FILLER.format(number) for number in range(len(given), count))]
    return {name: number for number, name in enumerate(names)}, count


def _listed(file: Path, tokens: Any) -> dict[bytes, int]:
    """Return the ranks of a JSON list of tokens."""
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"{file} is not a readable vocabulary: it must hold a list of tokens with rank and token_bytes.")
    ranks: dict[bytes, int] = {}
    for place, token in enumerate(tokens):
        if not isinstance(token, dict) or token.get("rank") != place or not isinstance(token.get("token_bytes"), str):
            raise InputError(f"{file}: token {place} is {token!r}; it must have rank {place} and token_bytes in base64.")
        ranks[_decoded(token["token_bytes"], f"{file}: token {place}")] = place
    return ranks


def _decoded(token: str, where: str) -> bytes:
    try:
        content = base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: {token[:40]!r} is not base64 ({error}); a line of a .tiktoken file is 'BASE64 RANK'.") from error
    if not content:
        raise InputError(f"{where}: a token without bytes; a line of a .tiktoken file is 'BASE64 RANK'.")
    return content


def _rank(text: str, where: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"{where}: the rank is {text[:40]!r}; it must be a whole number, and a line is 'BASE64 RANK'.")
    return int(text)
