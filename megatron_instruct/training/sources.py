"""Indexed data sets named in the settings -> what a run is fed with, checked before any process meets another.

Comes in: prefixes and weights, and the manifests that preprocessing wrote. Goes out: small frozen values. Does not know: torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.records import ROLES_SUFFIX
from megatron_instruct.tokenizer import Tokenizer
from megatron_instruct.training.settings.data import DataOptions

Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the data say of the tokenizer that made them. megatron-core reads eod, pad, vocab_size and unique_identifiers."""

    fingerprint: str
    vocab_size: int
    eod: int
    pad: int = -1
    """No id: samples are cut from a stream and never padded."""

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "vocab_size": self.vocab_size}


@dataclass(frozen=True, kw_only=True)
class DataSources:
    """The data of a run, checked before any process group exists."""

    train: Blend
    valid: Blend | None
    """None when train is divided by `split`."""
    split: str
    vocabulary: Vocabulary
    fingerprint: str
    """SHA-256 over the content of every data set and the weights of the blend."""
    roles: frozenset[str]
    """Prefixes that have the role of each token beside them."""

    @property
    def without_roles(self) -> list[str]:
        blends = [blend for blend in (self.train, self.valid) if blend is not None]
        return [prefix for prefixes, _ in blends for prefix in prefixes if prefix not in self.roles]


def find_sources(options: DataOptions, tokenizer: Tokenizer) -> DataSources:
    """Read blends and manifests. Raises ConfigError for a broken blend, InputError for data missing or of another tokenizer."""
    train = parse_blend(options.data_path or options.train_data_path, field="data_path" if options.data_path else "train_data_path")
    valid = parse_blend(options.valid_data_path, field="valid_data_path") if options.valid_data_path else None
    check_split(options.split)
    blends = [blend for blend in (train, valid) if blend is not None]
    manifests = {prefix: _data_manifest(Path(prefix), adopt=options.adopt_data) for blend in blends for prefix in blend[0]}
    for prefix, manifest in manifests.items():
        if manifest is not None:
            _check_tokenizer(prefix, manifest, tokenizer)
    if options.reset_attention_mask:
        _check_ends(manifests)
    roles = frozenset(prefix for prefix, manifest in manifests.items() if manifest is not None and _has_roles(manifest))
    if options.role_weights:
        _check_roles(options, train, roles)
    prints = [[weights, *(_fingerprint(prefix, manifests[prefix]) for prefix in prefixes)] for prefixes, weights in blends]
    vocabulary = Vocabulary(fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    fingerprint = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
    return DataSources(train=train, valid=valid, split=options.split, vocabulary=vocabulary, fingerprint=fingerprint, roles=roles)


def parse_blend(words: Sequence[str], *, field: str) -> Blend:
    """Read "PREFIX", "PREFIX PREFIX ..." or "WEIGHT PREFIX WEIGHT PREFIX ..."."""
    if not any(_is_number(word) for word in words):
        return list(words), None
    if len(words) % 2:
        raise ConfigError(f"{field} has {len(words)} words; give WEIGHT PREFIX pairs, or prefixes alone.")
    weights, prefixes = list(words[0::2]), list(words[1::2])
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not _is_number(weight) or not float(weight) > 0.0 or float(weight) == float("inf"):
            raise ConfigError(f"{field}: the weight {weight!r} of {prefix} is not a positive number.")
        if _is_number(prefix):
            raise ConfigError(f"{field}: {prefix!r} stands where a prefix must; give WEIGHT PREFIX pairs.")
    return prefixes, [float(weight) for weight in weights]


def check_split(split: str) -> None:
    """Raise ConfigError unless `split` is three shares, such as 969,30,1."""
    parts = split.split(",")
    if len(parts) != 3 or not all(_is_number(part) and float(part) >= 0 for part in parts) or sum(map(float, parts)) <= 0:
        raise ConfigError(f"split={split!r} must be three shares for training, validation and test, such as 969,30,1.")


def _fingerprint(prefix: str, manifest: Manifest | None) -> list[str] | str:
    if manifest is None:
        return _foreign_fingerprint(Path(prefix))
    return [output.sha256 for output in manifest.outputs if output.path.endswith((".bin", ".idx", ROLES_SUFFIX))]


def _has_roles(manifest: Manifest) -> bool:
    return any(output.path.endswith(ROLES_SUFFIX) for output in manifest.outputs)


def _check_ends(manifests: Mapping[str, Manifest | None]) -> None:
    for prefix, manifest in manifests.items():
        if manifest is not None and not manifest.settings.get("append_eod"):
            raise InputError(
                f"reset_attention_mask=True needs to know where documents end, and data set {prefix} was made without --append-eod; "
                "preprocess it again with --append-eod, or drop reset_attention_mask."
            )


def _check_roles(options: DataOptions, train: Blend, roles: frozenset[str]) -> None:
    if not roles.intersection(train[0]):
        raise InputError(
            f"role_weights={options.role_weights} needs data with roles, and none of {', '.join(train[0])} has a {ROLES_SUFFIX} file; "
            "preprocess examples (examples.jsonl or augmented.jsonl), or drop role_weights."
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _data_manifest(prefix: Path, *, adopt: bool) -> Manifest | None:
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise InputError(f"data set {prefix}: {prefix}{suffix} is missing; give the prefix that preprocess_data.py printed.")
    path = Path(f"{prefix}.manifest.json")
    if adopt and not path.is_file():
        return None
    if not path.is_file():
        raise InputError(
            f"data set {prefix} has no manifest ({path}): it is unfinished, or made by another tool; "
            "run preprocess_data.py again, or pass --adopt-data."
        )
    return read_manifest(path, stage="preprocess")


def _check_tokenizer(prefix: str, manifest: Manifest, tokenizer: Tokenizer) -> None:
    made_with = manifest.facts.get("tokenizer", {}).get("fingerprint")
    if made_with != tokenizer.fingerprint:
        raise InputError(
            f"data set {prefix} was made with the tokenizer {str(made_with)[:12]}, and the model's is {tokenizer.fingerprint[:12]}; "
            "preprocess the data with the model's tokenizer, or give the right tokenizer_model."
        )


def _foreign_fingerprint(prefix: Path) -> str:
    with open(f"{prefix}.idx", "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{digest}-{Path(f'{prefix}.bin').stat().st_size}"
