"""Indexed data sets -> batches of token tensors.

Comes in: the checked sources of a run. Goes out: for each step and data-parallel rank, the same samples whatever the layout. Order and
blending are megatron-core's (BlendedMegatronDatasetBuilder, GPTDataset), but for what phases and strict epochs ask for
(training.blends). Does not know: the model.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_instruct.errors import InputError
from megatron_instruct.files import distinct_endings
from megatron_instruct.models.batches import BatchPlan
from megatron_instruct.platform.processes import end_with_parent
from megatron_instruct.training.blends import Phases, blend, counts
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.documents import COMPONENT
from megatron_instruct.training.index_cache import IndexCache
from megatron_instruct.training.role_weights import RoleWeightedConfig, RoleWeightedDataset, weights_by_code
from megatron_instruct.training.sources import Blend, DataSources, index_root

_COLUMNS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class HeldOut:
    """What the model is evaluated on."""

    dataset: Any
    """Over sample numbers."""
    components: tuple[str, ...]
    """The data sets that samples are numbered by, in the shortest names that differ; none where they come from one."""


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """The data of a run, over sample numbers 0, 1, 2, ..."""

    train: Any
    valid: HeldOut | None
    test: HeldOut | None


def build_datasets(config: PretrainConfig, sources: DataSources, plan: BatchPlan) -> DataSets:
    """Return what the model learns from and is evaluated on.

    Every process calls it; one process a file system builds the indices. Raises InputError where a share is empty.
    """
    cache = IndexCache(index_root(config))
    train, valid = _datasets(config, sources, cache)
    if train is None:
        raise InputError(f"the training share of the data is empty (split={sources.split!r}); give more data or another split.")
    if _validation_size(config) and valid is None:
        raise InputError(
            f"eval_interval={config.checkpoint.eval_interval} asks for validation, and there is no data for it "
            f"(split={sources.split!r}); give valid_data_path, another split, or drop eval_interval."
        )
    return DataSets(
        train=train,
        valid=HeldOut(valid, _names(sources.valid or sources.train)) if _validation_size(config) else None,
        test=None if sources.test is None else HeldOut(_test_set(config, sources, sources.test, cache), _names(sources.test)),
    )


def training_samples(config: PretrainConfig, sources: DataSources) -> Any:
    """Return the training data set of a run that has started, from its indices. Needs no process group.

    Raises InputError where the indices are missing, which a run with other data or settings would have.
    """
    return _datasets(config, sources, IndexCache(index_root(config)))[0]


def _names(blend: Blend) -> tuple[str, ...]:
    paths = [Path(prefix) for prefix in blend[0]]
    return tuple(distinct_endings(paths) or [f"{number} {path.name}" for number, path in enumerate(paths)]) if len(paths) > 1 else ()


def _datasets(config: PretrainConfig, sources: DataSources, cache: IndexCache) -> tuple[Any, Any]:
    batch, validation = config.batch, _validation_size(config)
    if not config.data.whole_epochs:
        sizes = [batch.train_iters * batch.global_batch_size, validation, 0]
        name = _name(config, sources.train, sources.valid, sources.split, sources.fingerprint, sizes)
        train, valid, _ = cache.load(name, lambda folder: _as_megatron(config, sources, folder, sizes))
        return train, valid
    used: dict[str, int] = {}
    parts: list[tuple[int, Any]] = []
    plan = [(source.blend, source.phase.start, source.phase.end, source.fingerprint) for source in sources.phases]
    for of_phase, start, end, fingerprint in plan or [(sources.train, 0, batch.train_iters, sources.fingerprint)]:
        first = batch.samples_before(start)
        length = batch.samples_before(end) - first
        part = _own_blend(config, sources, cache, of_phase, fingerprint, size=length, used=used, part=Split.train)
        parts.append((first, part))
        drawn = counts(part, of_phase[0], length)
        used = {**used, **{prefix: used.get(prefix, 0) + count for prefix, count in drawn.items()}}
    of_validation = sources.valid or (None if sources.phases else sources.train)
    if not validation or of_validation is None:
        return Phases(parts), None
    valid = _own_blend(config, sources, cache, of_validation, sources.fingerprint, size=validation, used={}, part=Split.valid)
    return Phases(parts), valid


def _test_set(config: PretrainConfig, sources: DataSources, of: Blend, cache: IndexCache) -> Any:
    """Has indices of its own, so that those of the others do not depend on whether there is a test."""
    size, fingerprint = config.checkpoint.eval_iters * config.batch.global_batch_size, sources.test_fingerprint or sources.fingerprint
    if config.data.whole_epochs:
        return _own_blend(config, sources, cache, of, fingerprint, size=size, used={}, part=Split.test)
    sizes = [0, 0, size]
    name = _name(config, of, sources.split if config.data.is_divided else None, fingerprint, sizes)
    return cache.load(name, lambda folder: _as_megatron(config, sources, folder, sizes))[Split.test.value]


def _own_blend(
    config: PretrainConfig,
    sources: DataSources,
    cache: IndexCache,
    of: Blend,
    fingerprint: str,
    *,
    size: int,
    used: dict[str, int],
    part: Split,
) -> Any:
    """Return `size` samples of a blend. used: samples of each data set that earlier phases took."""
    split = sources.split if config.data.is_divided else None
    starts = [used.get(prefix, 0) for prefix in of[0]]
    name = _name(config, of, split, fingerprint, starts, size, part.name)
    return cache.load(
        name,
        lambda folder: blend(
            _settings(config, sources, folder),
            of,
            [sources.indices[prefix] for prefix in of[0]],
            starts=starts,
            size=size,
            part=part,
            split=split,
        ),
    )


def _name(config: PretrainConfig, *what: Any) -> str:
    """Return the folder of indices that depend on `what`.

    The name stands for everything that they depend on, the content of the data included, which megatron-core's own keys leave out: a
    data set rebuilt at the same prefix does not meet stale indices. (megatron.core.__version__ would not do: it ends in the commit of the
    folder that one works in.)
    """
    of_indices = [importlib.metadata.version("megatron-core"), config.batch.seed, config.batch.seq_length, *what]
    return hashlib.sha256(json.dumps(of_indices).encode()).hexdigest()[:16]


def _validation_size(config: PretrainConfig) -> int:
    return config.checkpoint.eval_iters * config.batch.global_batch_size if config.checkpoint.eval_interval else 0


def _as_megatron(config: PretrainConfig, sources: DataSources, folder: Path, sizes: list[int]) -> Any:
    """Return what megatron-core makes of the data for training, validation and test, None where no sample is asked for."""
    settings = _settings(config, sources, folder)
    if settings.split_matrix is not None:  # megatron-core builds every share, and never ends where a data set has no token in one
        settings.split_matrix = [share if size else None for share, size in zip(settings.split_matrix, sizes, strict=True)]
    else:
        settings.blend_per_split = [blend if size else None for blend, size in zip(settings.blend_per_split, sizes, strict=True)]
    return BlendedMegatronDatasetBuilder(RoleWeightedDataset, sizes, lambda: True, settings).build()


def _settings(config: PretrainConfig, sources: DataSources, folder: Path) -> RoleWeightedConfig:
    by_split = (
        {"blend": sources.train, "split": sources.split}
        if config.data.is_divided
        else {"blend_per_split": [sources.train, sources.valid, sources.test]}
    )
    return RoleWeightedConfig(
        random_seed=config.batch.seed,
        sequence_length=config.batch.seq_length,
        tokenizer=sources.vocabulary,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,  # made from the tokens, on the device: training.documents
        role_weights=weights_by_code(config.data.role_weights),
        with_roles=sources.roles if config.data.role_weights else frozenset(),
        path_to_cache=str(folder),
        **by_split,
    )


def batches(dataset: Any, samples: Iterator[list[int]], *, num_workers: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield one microbatch after another, on the device: tokens, labels, loss_mask, position_ids [B, S], and COMPONENT [B] of a blend."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Samples(samples),
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise a seed for its workers is drawn from the stream of the dropout
    )
    for batch in loader:
        yield {name: batch[name].to(device, non_blocking=True) for name in (*_COLUMNS, COMPONENT) if name in batch}


class _Samples(torch.utils.data.Sampler[list[int]]):
    def __init__(self, samples: Iterator[list[int]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[list[int]]:
        return self._samples
