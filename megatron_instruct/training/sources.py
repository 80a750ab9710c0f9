"""Indexed data sets named in the settings -> what a run is fed with, checked before any process meets another.

Comes in: prefixes and weights, and the manifests that preprocessing wrote. Goes out: small frozen values. Does not know: torch.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.records import ROLES_SUFFIX
from megatron_instruct.tokenizer import Tokenizer
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.content import NAME, ContentCheck
from megatron_instruct.training.index_file import IndexFile, check_share, read_index, shares_of
from megatron_instruct.training.phases import PlacedPhase
from megatron_instruct.training.settings.data import DataOptions, GivenBlend

Blend = tuple[list[str], list[float] | None]
_MISSPELT_WEIGHT = re.compile(r"[^\w/]*[xXoO]?\d[\d.,_eE+-]*[%a-zA-Z]?|[oO][.,]\d+")
"""What looks more like 0,3 or x0.3 than like a path."""


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
class PhaseSource:
    """What one phase of a run is fed with."""

    phase: PlacedPhase
    blend: Blend
    fingerprint: str
    """SHA-256 over the content of every data set and the weights of the blend."""

    def to_json(self) -> dict[str, Any]:
        """Return what decides the result."""
        return {**self.phase.to_json(), "data": self.fingerprint}


@dataclass(frozen=True, kw_only=True)
class DataSources:
    """The data of a run, checked before any process group exists."""

    train: Blend
    """Of the first phase, where there are phases."""
    valid: Blend | None
    """None when train is divided by `split`."""
    test: Blend | None
    """What is evaluated after the last step: the test share of `train` where `split` divides it."""
    untested: str | None = None
    """Why the test share that `split` leaves is not evaluated."""
    phases: tuple[PhaseSource, ...]
    split: str
    vocabulary: Vocabulary
    fingerprint: str
    """SHA-256 over the content of every data set and the weights of the blend; with phases, of validation alone."""
    test_fingerprint: str | None
    """The same of the data given for the test alone."""
    roles: frozenset[str]
    """Prefixes that have the role of each token beside them."""
    indices: Mapping[str, IndexFile]
    """By prefix."""

    @property
    def without_roles(self) -> list[str]:
        blends = [self.train, self.valid, self.test, *(phase.blend for phase in self.phases)]
        return list(dict.fromkeys(prefix for blend in blends if blend for prefix in blend[0] if prefix not in self.roles))


def sources_of(config: PretrainConfig, tokenizer: Tokenizer, *, remembers: bool = True) -> DataSources:
    """Return the checked data of a run. Raises what find_sources raises, and where a share of the data is empty or too small.

    remembers: write down beside the index caches which files were read, so that the next start need not.
    """
    check = ContentCheck(index_root(config) / NAME, reads=os.environ.get("LOCAL_RANK", "0") == "0")
    sources = find_sources(config.data, tokenizer, phases=config.phases, check=check)
    _check_sizes(config, sources)
    sources = _with_test_share(config, sources)
    if check.reads and remembers:
        check.remember()
    return sources


def index_root(config: PretrainConfig) -> Path:
    """Return the folder of the index caches."""
    return config.data.data_cache_path or config.checkpoint.save / "cache"


def check_blends(config: PretrainConfig) -> None:
    """Raise ConfigError for blends and shares that cannot be, whatever the data."""
    data = config.data
    if not config.phases:
        _blend(data.training_blend)
    for phase in config.phases:
        parse_blend(phase.data_path, field=_field(phase))
    _blend(data.validation_blend)
    _blend(data.test_blend)
    shares_of(data.split)


def find_sources(
    options: DataOptions, tokenizer: Tokenizer, *, phases: Sequence[PlacedPhase] = (), check: ContentCheck | None = None
) -> DataSources:
    """Read blends and manifests. Raises ConfigError for a broken blend, InputError for data missing, changed or of another tokenizer."""
    check = check or ContentCheck(Path(NAME), reads=False)
    fields = {phase.number: parse_blend(phase.data_path, field=_field(phase)) for phase in phases}
    train = fields[1] if phases else parse_blend(options.training_blend.words, field=options.training_blend.field)
    valid, test = _blend(options.validation_blend), _blend(options.test_blend)
    shares_of(options.split)
    blends = [blend for blend in (train, valid, test, *fields.values()) if blend is not None]
    manifests = {prefix: _data_manifest(Path(prefix), adopt=options.adopt_data) for blend in blends for prefix in blend[0]}
    for prefix, manifest in manifests.items():
        if manifest is not None:
            _check_tokenizer(prefix, manifest, tokenizer)
    if options.reset_attention_mask:
        _check_ends(manifests)
    roles = frozenset(prefix for prefix, manifest in manifests.items() if manifest is not None and _has_roles(manifest))
    if options.role_weights:
        for blend in fields.values() or (train,):
            _check_roles(options, blend, roles)
    indices = {prefix: read_index(prefix) for prefix in manifests}
    prints: dict[str, Any] = {
        prefix: check.fingerprint(prefix, manifest) if manifest else check.foreign_fingerprint(indices[prefix], tokenizer.vocab_size)
        for prefix, manifest in manifests.items()
    }
    whole = [blend for blend in (None if phases else train, valid) if blend is not None]
    return DataSources(
        train=train,
        valid=valid,
        test=test,
        phases=tuple(
            PhaseSource(phase=phase, blend=fields[phase.number], fingerprint=_fingerprint([fields[phase.number]], prints))
            for phase in phases
        ),
        split=options.split,
        vocabulary=Vocabulary(fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod),
        fingerprint=_fingerprint(whole, prints),
        test_fingerprint=None if test is None else _fingerprint([test], prints),
        roles=roles,
        indices=indices,
    )


def _field(phase: PlacedPhase) -> str:
    return f"phases: data_path of phase {phase.number}"


def _blend(given: GivenBlend) -> Blend | None:
    return parse_blend(given.words, field=given.field) if given.words else None


def parse_blend(words: Sequence[str], *, field: str) -> Blend:
    """Read "PREFIX", "PREFIX PREFIX ..." or "WEIGHT PREFIX WEIGHT PREFIX ..."."""
    if not any(_is_number(word) for word in words):
        for word in words:
            if _MISSPELT_WEIGHT.fullmatch(word) and not Path(f"{word}.idx").exists():
                raise ConfigError(f"{field}: {word!r} is neither a number nor a data set; weights are numbers such as 0.3.")
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


def _check_sizes(config: PretrainConfig, sources: DataSources) -> None:
    """Raise where a data set has nothing to give, or where data that are taken once end before the run."""
    size, checkpoint = config.batch.global_batch_size, config.checkpoint
    for source in sources.phases:
        _check_size(config, sources, source.blend, part=0)
    if not sources.phases:
        _check_size(config, sources, sources.train, part=0, samples=config.batch.train_iters * size, setting="train_iters")
    if checkpoint.eval_interval is not None:
        if sources.valid is None and not config.data.is_divided:
            raise InputError(
                f"eval_interval={checkpoint.eval_interval} asks for validation, and there is no data for it; give valid_data_path, "
                "or drop eval_interval."
            )
        _check_size(config, sources, sources.valid or sources.train, part=1, samples=checkpoint.eval_iters * size, setting="eval_iters")
    if sources.test is not None:
        _check_size(config, sources, sources.test, part=2, samples=checkpoint.eval_iters * size, setting="eval_iters")


def _with_test_share(config: PretrainConfig, sources: DataSources) -> DataSources:
    """Return the sources with the test share of `split`, if there is one and the run evaluates.

    The default split leaves one: where it holds too little, the run goes without, and says so.
    """
    begin, end = shares_of(sources.split)[2]
    if not config.data.is_divided or config.checkpoint.eval_interval is None or begin == end:
        return sources
    samples = config.checkpoint.eval_iters * config.batch.global_batch_size
    try:
        _check_size(config, sources, sources.train, part=2, samples=samples, setting="eval_iters")
    except (ConfigError, InputError) as error:
        return dataclasses.replace(sources, untested=str(error))
    return dataclasses.replace(sources, test=sources.train)


def _check_size(
    config: PretrainConfig, sources: DataSources, blend: Blend, *, part: int, samples: int | None = None, setting: str = ""
) -> None:
    """Check a blend's share: 0 training, 1 validation, 2 test. samples: how many are taken, which `setting` decides; None: any number."""
    (prefixes, weights), length, size = blend, config.batch.seq_length, config.batch.global_batch_size
    split = sources.split if config.data.is_divided else None
    tokens = [check_share(sources.indices[prefix], split, part=part) for prefix in prefixes]
    there = sum((count - 1) // length for count in tokens)
    once = weights is None and len(prefixes) > 1 and not config.data.whole_epochs
    if once and samples is not None and there < samples:
        raise ConfigError(
            f"{setting}={samples // size}: so many global batches are {samples:,} sequences of {length} tokens, and "
            f"{', '.join(prefixes)} have {there:,}: prefixes without weights are taken once. "
            f"Give weights, which repeat data, or lower {setting} to {there // size}."
        )


def _fingerprint(blends: Sequence[Blend], prints: Mapping[str, Any]) -> str:
    content = [[weights, *(prints[prefix] for prefix in prefixes)] for prefixes, weights in blends]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
