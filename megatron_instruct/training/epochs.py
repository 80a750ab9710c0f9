"""Epochs that keep their promise: every document exactly once an epoch, and an order that does not depend on how long a run is.

Comes in: what megatron-core's GPTDataset comes in with. Goes out: the same three indices, made otherwise. The documents of epoch e are
permuted by a stream of (seed, e), the epochs run on in one stream of tokens, which is cut into samples; the samples that begin in an
epoch are permuted among themselves. megatron-core 0.19 permutes the documents of several epochs together, and how many is a matter of the
number of samples asked for. Does not know: blends.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.training.role_weights import RoleWeightedDataset

Indices = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


class StrictEpochDataset(RoleWeightedDataset):
    """A data set whose samples run through whole epochs."""

    def _build_document_sample_shuffle_indices(self) -> Indices:
        folder = Path(self.config.path_to_cache)
        names = ("document", "sample", "shuffle")
        paths = [folder / f"{self.unique_description_hash}-strict-{self.index_split.name}-{name}_index.npy" for name in names]
        if not paths[-1].is_file():  # the folder has its name once all of it is there
            folder.mkdir(parents=True, exist_ok=True)
            indices = strict_indices(
                self.dataset.sequence_lengths,
                self.indices,
                num_samples=self.num_samples,
                seq_length=self.config.sequence_length,
                seed=self.config.random_seed,
            )
            for path, index in zip(paths, indices, strict=True):
                np.save(path, index)
        document, sample, shuffle = (np.load(path, mmap_mode="r") for path in paths)
        return document, sample, shuffle


def strict_indices(
    lengths: npt.NDArray[np.int32], documents: npt.NDArray[np.int32], *, num_samples: int, seq_length: int, seed: int
) -> Indices:
    """Return megatron-core's document, sample and shuffle index for at least `num_samples` samples, in whole epochs.

    lengths: tokens of each document of the data set. documents: those that take part.
    """
    from megatron.core.datasets import helpers

    tokens = int(lengths[documents].sum(dtype=np.int64))
    epochs = max(math.ceil(num_samples * seq_length / tokens), 1)
    parts = [_stream(seed, epoch, "documents").permutation(documents) for epoch in range(epochs)]
    missing = seq_length + 1  # the last sample of the last epoch ends in the next one
    epoch = epochs
    while missing > 0:
        following = _stream(seed, epoch, "documents").permutation(documents)
        ends = np.cumsum(lengths[following], dtype=np.int64)
        taken = min(int(np.searchsorted(ends, missing)) + 1, len(following))
        parts.append(following[:taken])
        missing -= int(ends[taken - 1])
        epoch += 1
    order = np.concatenate(parts).astype(np.int32)
    in_order = int(lengths[order].sum(dtype=np.int64))
    samples = helpers.build_sample_idx(np.ascontiguousarray(lengths), order, seq_length, 1, in_order)
    bounds = [math.ceil(epoch * tokens / seq_length) for epoch in range(epochs + 1)]
    shuffled = [
        _stream(seed, epoch, "samples").permutation(np.arange(start, stop, dtype=np.uint32))
        for epoch, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    return order, samples, np.concatenate(shuffled)


def _stream(seed: int, epoch: int, of: str) -> np.random.RandomState:
    """Return random numbers of their own; RandomState's streams are the same in every version of numpy."""
    return np.random.RandomState([seed, epoch, {"documents": 0, "samples": 1}[of]])
