"""Blends that begin where an earlier phase stopped, and the phases of a run one after another.

Comes in: a blend, and how many samples of each data set are used up. Goes out: data sets over sample numbers. The order of draws is
megatron-core's BlendedDataset's. Does not know: checkpoints, the model.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split

from megatron_instruct.training.epochs import StrictEpochDataset
from megatron_instruct.training.index_file import IndexFile, shares_of
from megatron_instruct.training.role_weights import RoleWeightedConfig, RoleWeightedDataset
from megatron_instruct.training.sources import Blend

_MARGIN = 1.005
"""Of the samples prepared for a data set: megatron-core's draws keep a blend's weights to about one sample."""


class Rest:
    """A data set from a sample on. megatron-core's BlendedDataset reads index_split and unique_identifiers."""

    def __init__(self, dataset: RoleWeightedDataset, start: int) -> None:
        self.dataset, self.start = dataset, start
        self.index_split = dataset.index_split
        self.unique_identifiers = {**dataset.unique_identifiers, "start": start}

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __getitem__(self, number: int) -> Any:
        return self.dataset[self.start + int(number)]


class Phases:
    """The data sets of the phases, one after another."""

    def __init__(self, parts: Sequence[tuple[int, Any]]) -> None:
        self._starts, self._datasets = [start for start, _ in parts], [dataset for _, dataset in parts]

    def __len__(self) -> int:
        return self._starts[-1] + len(self._datasets[-1])

    def __getitem__(self, number: int) -> Any:
        dataset, place = self.at(number)
        return dataset[place]

    def at(self, number: int) -> tuple[Any, int]:
        """Return the data set that holds a sample, and the sample's number there."""
        phase = bisect.bisect_right(self._starts, number) - 1
        return self._datasets[phase], number - self._starts[phase]


def blend(
    settings: RoleWeightedConfig,
    of: Blend,
    indices: Sequence[IndexFile],
    *,
    starts: Sequence[int],
    size: int,
    part: Split,
    split: str | None,
) -> Any:
    """Return at least `size` samples of a blend; without weights, in proportion to the tokens.

    starts: the first sample of each data set that is free. part: what the samples are for; those for training are of strict epochs.
    split: None where data sets are taken whole.
    """
    kind = StrictEpochDataset if part is Split.train else RoleWeightedDataset
    prefixes, weights = of
    share = (0.0, 1.0) if split is None else shares_of(split)[part.value]
    weights = weights or [float(index.tokens(share)) for index in indices]
    total, parts = math.fsum(weights), []
    for prefix, index, start, weight in zip(prefixes, indices, starts, weights, strict=True):
        bounds = [round(bound * float(len(index.lengths))) for bound in share]
        needed = start + math.ceil(math.ceil(size * weight / total) * _MARGIN) + 1
        parts.append(
            Rest(
                kind(
                    kind.build_low_level_dataset(prefix, settings),
                    prefix,
                    np.arange(*bounds, dtype=np.int32),
                    needed,
                    part,
                    settings,
                ),
                start,
            )
        )
    return parts[0] if len(parts) == 1 else BlendedDataset(parts, [weight / total for weight in weights], size, settings)


def counts(dataset: Any, prefixes: Sequence[str], size: int) -> Mapping[str, int]:
    """Return how many samples of each data set a blend of `size` samples draws."""
    if isinstance(dataset, Rest):
        return {prefixes[0]: size}
    drawn = np.bincount(dataset.dataset_index, minlength=len(prefixes)).tolist()
    found: dict[str, int] = {}
    for prefix, count in zip(prefixes, drawn, strict=True):
        found[prefix] = found.get(prefix, 0) + count
    return found


def locate(samples: Any, number: int) -> tuple[RoleWeightedDataset, int]:
    """Return the data set that a sample of a run comes from, and its number there."""
    while not isinstance(samples, RoleWeightedDataset):
        if isinstance(samples, Phases):
            samples, number = samples.at(number)
        elif isinstance(samples, Rest):
            samples, number = samples.dataset, samples.start + number
        else:
            samples, number = samples.datasets[int(samples.dataset_index[number])], int(samples.dataset_sample_index[number])
    return samples, number
