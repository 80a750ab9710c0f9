"""Indexed data sets -> batches of token tensors.

Comes in: the checked sources of a run. Goes out: for each step and data-parallel rank, the same samples whatever the layout. Order and
blending are megatron-core's (BlendedMegatronDatasetBuilder, GPTDataset). Does not know: the model.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_instruct.errors import InputError
from megatron_instruct.files import TEMPORARY_SUFFIX, atomic_folder
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.plan import BatchPlan
from megatron_instruct.training.role_weights import RoleWeightedConfig, RoleWeightedDataset, weights_by_code
from megatron_instruct.training.sources import DataSources


def build_datasets(config: PretrainConfig, sources: DataSources, plan: BatchPlan) -> tuple[Any, Any]:
    """Return the training and the validation data set (None where there is none), over sample numbers 0, 1, 2, ...

    Every process calls it; megatron-core builds the indices on rank 0 first. Raises InputError where a share is empty.
    """
    validation = config.checkpoint.eval_iters * plan.global_batch_size if config.checkpoint.eval_interval else 0
    sizes = [plan.train_iters * plan.global_batch_size, validation, 0]
    with _index_cache(index_folder(config, sources, sizes)) as cache:
        train, valid = _megatron_datasets(config, sources, sizes, cache)
    if train is None:
        raise InputError(f"the training share of the data is empty (split={sources.split!r}); give more data or another split.")
    if validation and valid is None:
        raise InputError(
            f"eval_interval={config.checkpoint.eval_interval} asks for validation, and there is no data for it "
            f"(split={sources.split!r}); give valid_data_path, another split, or drop eval_interval."
        )
    return train, valid if validation else None


def training_samples(config: PretrainConfig, sources: DataSources) -> Any:
    """Return the training data set of a run that has started, from its indices. Needs no process group.

    Raises InputError where the indices are missing, which a run with other data or settings would have.
    """
    batch = config.batch
    validation = config.checkpoint.eval_iters * batch.global_batch_size if config.checkpoint.eval_interval else 0
    sizes = [batch.train_iters * batch.global_batch_size, validation, 0]
    folder = index_folder(config, sources, sizes)
    if not folder.is_dir():
        raise InputError(f"{folder}: no indices of this run; its data changed since, or its cache was removed.")
    return _megatron_datasets(config, sources, sizes, folder)[0]


def index_folder(config: PretrainConfig, sources: DataSources, sizes: list[int]) -> Path:
    """Return where megatron-core keeps its indices.

    The name stands for everything that they depend on, the content of the data included, which megatron-core's own keys leave out: a
    data set rebuilt at the same prefix does not meet stale indices.
    """
    of_indices = [sources.fingerprint, sources.split, sizes, config.batch.seed, config.batch.seq_length]
    name = hashlib.sha256(json.dumps(of_indices).encode()).hexdigest()[:16]
    return (config.data.data_cache_path or config.checkpoint.save / "cache") / name


def _megatron_datasets(config: PretrainConfig, sources: DataSources, sizes: list[int], cache: Path) -> tuple[Any, Any]:
    by_split = (
        {"blend": sources.train, "split": sources.split}
        if config.data.data_path
        else {"blend_per_split": [sources.train, sources.valid, None]}
    )
    settings = RoleWeightedConfig(
        random_seed=config.batch.seed,
        sequence_length=config.batch.seq_length,
        tokenizer=sources.vocabulary,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,  # made from the tokens, on the device: training.documents
        role_weights=weights_by_code(config.data.role_weights),
        with_roles=sources.roles if config.data.role_weights else frozenset(),
        path_to_cache=str(cache),
        **by_split,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(RoleWeightedDataset, sizes, lambda: True, settings).build()
    return train, valid


@contextlib.contextmanager
def _index_cache(folder: Path) -> Iterator[Path]:
    """Yield where to read or build the indices. While they are built the folder has a temporary name: a killed build counts for nothing."""
    first = torch.distributed.get_rank() == 0
    exists = [first and folder.is_dir()]
    torch.distributed.broadcast_object_list(exists, src=0)
    if exists[0]:
        yield folder
        return
    with atomic_folder(folder) if first else contextlib.nullcontext():
        torch.distributed.barrier()
        yield folder.with_name(folder.name + TEMPORARY_SUFFIX)
        torch.distributed.barrier()


def batches(dataset: Any, samples: Iterator[list[int]], *, num_workers: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield one microbatch after another: tokens, labels, loss_mask, position_ids, each [B, S], on the device."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=_Samples(samples), num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        yield {name: batch[name].to(device, non_blocking=True) for name in ("tokens", "labels", "loss_mask", "position_ids")}


class _Samples(torch.utils.data.Sampler[list[int]]):
    def __init__(self, samples: Iterator[list[int]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[list[int]]:
        return self._samples
