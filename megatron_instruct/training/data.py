"""Indexed data sets -> batches of token tensors.

Comes in: prefixes of .bin/.idx files with the manifests that preprocessing wrote. Goes out: for each step and data-parallel
rank, the same samples whatever the layout. Order and blending are megatron-core's (BlendedMegatronDatasetBuilder, GPTDataset).
Does not know: the model.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import TEMPORARY_SUFFIX, atomic_folder
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.tokenizer import Tokenizer
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.plan import BatchPlan

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


def find_sources(config: PretrainConfig, tokenizer: Tokenizer) -> DataSources:
    """Read blends and manifests. Raises ConfigError for a broken blend, InputError for data missing or of another tokenizer."""
    options = config.data
    train = parse_blend(options.data_path or options.train_data_path, field="data_path" if options.data_path else "train_data_path")
    valid = parse_blend(options.valid_data_path, field="valid_data_path") if options.valid_data_path else None
    check_split(options.split)
    prints = [_blend_fingerprint(blend, tokenizer, adopt=options.adopt_data) for blend in (train, valid) if blend is not None]
    vocabulary = Vocabulary(fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    fingerprint = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
    return DataSources(train=train, valid=valid, split=options.split, vocabulary=vocabulary, fingerprint=fingerprint)


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


def build_datasets(config: PretrainConfig, sources: DataSources, plan: BatchPlan) -> tuple[Any, Any]:
    """Return the training and the validation data set (None where there is none), over sample numbers 0, 1, 2, ...

    Every process calls it; megatron-core builds the indices on rank 0 first. Raises InputError where a share is empty.
    """
    validation = config.checkpoint.eval_iters * plan.global_batch_size if config.checkpoint.eval_interval else 0
    sizes = [plan.train_iters * plan.global_batch_size, validation, 0]
    common: dict[str, Any] = {
        "random_seed": config.batch.seed,
        "sequence_length": config.batch.seq_length,
        "tokenizer": sources.vocabulary,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": config.data.eod_mask_loss,
        "create_attention_mask": False,
    }
    if config.data.data_path:
        common |= {"blend": sources.train, "split": sources.split}
    else:
        common |= {"blend_per_split": [sources.train, sources.valid, None]}
    of_indices = [sources.fingerprint, sources.split, sizes, config.batch.seed, config.batch.seq_length]
    name = hashlib.sha256(json.dumps(of_indices).encode()).hexdigest()[:16]
    with _index_cache((config.data.data_cache_path or config.checkpoint.save / "cache") / name) as cache:
        settings = GPTDatasetConfig(**common, path_to_cache=str(cache))
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    if train is None:
        raise InputError(f"the training share of the data is empty (split={sources.split!r}); give more data or another split.")
    if validation and valid is None:
        raise InputError(
            f"eval_interval={config.checkpoint.eval_interval} asks for validation, and there is no data for it "
            f"(split={sources.split!r}); give valid_data_path, another split, or drop eval_interval."
        )
    return train, valid if validation else None


@contextlib.contextmanager
def _index_cache(folder: Path) -> Iterator[Path]:
    """Yield where megatron-core keeps its indices. While they are built the folder has a temporary name: a killed build counts for nothing.

    The name stands for everything that the indices depend on, the content of the data included, which megatron-core's own keys
    leave out: a data set rebuilt at the same prefix does not meet stale indices.
    """
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


def _blend_fingerprint(blend: Blend, tokenizer: Tokenizer, *, adopt: bool) -> list[Any]:
    prefixes, weights = blend
    prints: list[Any] = [weights]
    for prefix in prefixes:
        manifest = _data_manifest(Path(prefix), adopt=adopt)
        if manifest is None:
            prints.append(_foreign_fingerprint(Path(prefix)))
            continue
        _check_tokenizer(prefix, manifest, tokenizer)
        prints.append([output.sha256 for output in manifest.outputs if output.path.endswith((".bin", ".idx"))])
    return prints


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
