"""What a run starts from: its own checkpoint, another one's weights, or nothing; and the settings that make it that run.

Comes in: settings and checkpoint folders. Goes out: small frozen values. Nothing is built and no process group is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import check_positions
from megatron_instruct.models.checkpoint_folder import iterations, read_description
from megatron_instruct.models.presets import DIMENSIONS, make_architecture, preset
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer
from megatron_instruct.training.checkpoint_choice import check_identity, damage_of, newest_candidate
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.fp8 import fp8_identity
from megatron_instruct.training.phases import with_free_phases
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.model import ModelOptions
from megatron_instruct.training.sources import DataSources

_SETTINGS = (*DIMENSIONS, "sliding_window", "init_method_std")
"""What the settings of a run say of its model."""
_RESULT_SETTINGS = tuple(name for name in BatchOptions.__dataclass_fields__ if name != "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from."""

    path: Path | None
    """Iteration folder of a checkpoint; None from scratch."""
    iteration: int
    """Steps done already."""
    saved_identity: dict[str, Any] | None
    """Settings of the run that the checkpoint belongs to, where it is this run's own, optimizer included; None otherwise."""
    architecture: Architecture
    tokenizer: Tokenizer
    tokenizer_path: Path
    manifest: Manifest | None = None
    """Of the checkpoint."""
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints of this run that are not whole, and why."""

    @property
    def resumes(self) -> bool:
        return self.saved_identity is not None


def find_start(config: PretrainConfig, *, passed_over: Mapping[int, str] | None = None) -> Start:
    """Look for this run's own newest whole checkpoint, then for the one to load, then at the model settings.

    passed_over: iterations of this run whose checkpoints are known to be damaged, each with the reason.
    """
    options = config.checkpoint
    resumes = bool(iterations(options.save))
    source = options.save if resumes else options.load
    tokenizer_path = config.data.tokenizer_model or (source / "tokenizer" if source is not None else None)
    if tokenizer_path is None:
        raise ConfigError("tokenizer_model is needed to train from scratch; give the tokenizer that made the data.")
    tokenizer = load_tokenizer(tokenizer_path)
    if source is None:
        architecture = architecture_from(config.model, vocab_size=tokenizer.vocab_size, seq_length=config.batch.seq_length)
        return Start(
            path=None, saved_identity=None, iteration=0, architecture=architecture, tokenizer=tokenizer, tokenizer_path=tokenizer_path
        )
    if resumes:
        found = newest_candidate(source, passed_over=passed_over)
        path, manifest, architecture, skipped = found.path, found.manifest, found.architecture, found.passed_over
    else:
        path, manifest, architecture = read_description(source)
        skipped = ()
        trained_with = manifest.facts.get("tokenizer")
        if trained_with is not None and trained_with != tokenizer.fingerprint:
            raise InputError(
                f"{tokenizer_path} is another tokenizer than the one that {path} was trained with; leave --tokenizer-model out: "
                f"{source / 'tokenizer'} is that one."
            )
    check_positions(architecture, config.batch.seq_length)
    _check_agreement(config.model, architecture, source)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer_path} has {tokenizer.vocab_size} ids, and the model in {source} has {architecture.vocab_size} "
            "embedding rows; give the model's own tokenizer."
        )
    return Start(
        path=path,
        saved_identity=dict(manifest.settings) if resumes else None,
        iteration=int(manifest.facts["iteration"]) if resumes else 0,
        architecture=architecture,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        manifest=manifest,
        passed_over=skipped,
    )


def check_same_run(config: PretrainConfig, start: Start, identity: dict[str, Any]) -> None:
    """Raise ConfigError where this run's own checkpoint was made with other settings."""
    if start.saved_identity is not None:
        saved = with_free_phases(start.saved_identity, identity, iteration=start.iteration, where=str(config.checkpoint.save))
        check_identity(config.checkpoint.save, saved, identity)


def whole_start(config: PretrainConfig, start: Start, identity: dict[str, Any]) -> Start:
    """Return the start, or an older one, every file of whose checkpoint is as it was written. Every process calls it."""
    damaged: dict[int, str] = {}
    while config.checkpoint.verify_integrity and start.path is not None and start.manifest is not None:
        wrong = damage_of(start.path, start.manifest)
        if wrong is None:
            break
        if not start.resumes:
            raise InputError(f"{wrong}; make or copy {start.path} again.")
        damaged[start.iteration] = wrong
        start = find_start(config, passed_over=damaged)
        check_same_run(config, start, identity)
    return start


def architecture_from(options: ModelOptions, *, vocab_size: int, seq_length: int) -> Architecture:
    """Return the model that the settings describe."""
    given = {name: getattr(options, name) for name in _SETTINGS}
    architecture = make_architecture(given, preset_name=options.preset, vocab_size=vocab_size, seq_length=seq_length)
    return check_positions(architecture, seq_length)


def _check_agreement(options: ModelOptions, architecture: Architecture, source: Path) -> None:
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    wanted = {**(preset(options.preset) if options.preset else {}), **given}
    for name, value in wanted.items():
        if value != getattr(architecture, name):
            origin = name if name in given else f"preset={options.preset}"
            raise ConfigError(
                f"{origin} asks for {name}={value!r}, and the model in {source} has {getattr(architecture, name)!r}; "
                f"drop {origin.split('=')[0]}: the model's size comes from the checkpoint."
            )


def run_identity(config: PretrainConfig, start: Start, sources: DataSources) -> dict[str, Any]:
    """Return the settings that decide the result of a run, whatever its layout."""
    batch = config.batch
    return {
        "architecture": start.architecture.to_json(),
        "tokenizer": start.tokenizer.fingerprint,
        "data": sources.fingerprint,
        "test_data": sources.test_fingerprint,
        "phases": [source.to_json() for source in sources.phases] or None,
        "strict_epochs": config.data.whole_epochs or None,
        "split": config.data.split if config.data.is_divided else None,
        "eod_mask_loss": config.data.eod_mask_loss,
        "reset_attention_mask": config.data.reset_attention_mask,
        "role_weights": dict(config.data.role_weights),
        **{name: getattr(batch, name) for name in _RESULT_SETTINGS if name not in batch.of_optional_parts},
        **batch.of_optional_parts,
        "experts": config.experts.of_result or None,
        "optimizer": config.optimizer.of_result,
        "dtype": config.dtype,
        "loss_scaling": config.precision.loss_scaling,
        "fp8": fp8_identity(config.fp8),
        "load": None if config.checkpoint.load is None else str(config.checkpoint.load),
        "transformer_config": dict(config.model.transformer_config),
    }
