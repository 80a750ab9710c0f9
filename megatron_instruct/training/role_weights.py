"""Samples whose loss is weighed by what each token is: context, instruction, response, glue, end of document, padding.

Comes in: PREFIX.roles, one byte per token in the order of PREFIX.bin. Goes out: megatron-core's samples with loss_mask [S] multiplied by
the weight of the token that is to be predicted. Padding weighs nothing. A data set without roles is left as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_instruct.errors import InputError
from megatron_instruct.records import ROLE_CODES, ROLES_SUFFIX


@dataclass
class RoleWeightedConfig(GPTDatasetConfig):  # type: ignore[misc]
    """megatron-core's settings and the weights."""

    role_weights: tuple[float, ...] = ()
    """By role code."""
    with_roles: frozenset[str] = frozenset()
    """Prefixes that have a roles file."""


def weights_by_code(role_weights: dict[str, float]) -> tuple[float, ...]:
    """Return the weight of each role code; roles not named weigh nothing."""
    return tuple(0.0 if role == "padding" else role_weights.get(role, 0.0) for role in ROLE_CODES)


class RoleWeightedDataset(GPTDataset):  # type: ignore[misc]
    """GPTDataset whose loss_mask holds weights. Order and cuts of the samples are the same."""

    def __init__(self, indexed_dataset: Any, dataset_path: str, *arguments: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *arguments)
        self.dataset: Any
        self._roles = _Roles(indexed_dataset, Path(f"{dataset_path}{ROLES_SUFFIX}")) if dataset_path in self.config.with_roles else None
        self._weights = torch.tensor(self.config.role_weights, dtype=torch.float32)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = super().__getitem__(idx)
        if self._roles is None:
            return sample
        tokens, self.dataset = self.dataset, self._roles  # the same cuts, out of the other file
        try:
            roles, _, _ = self._query_document_sample_shuffle_indices(idx or 0)
        finally:
            self.dataset = tokens
        of_labels = torch.from_numpy(roles[1:]).clamp(min=0)  # megatron-core pads with a negative number, where loss_mask is 0
        return {**sample, "loss_mask": sample["loss_mask"] * self._weights[of_labels]}

    def pieces(self, idx: int) -> list[tuple[int, int, int]]:
        """Return what a sample is cut from: sequence of the data set, its first token and number of tokens here, labels' last included."""
        sample = int(self.shuffle_index[idx])
        (first, offset), (last, end) = self.sample_index[sample], self.sample_index[sample + 1]
        found = []
        for place in range(int(first), int(last) + 1):
            document = int(self.document_index[place])
            start = int(offset) if place == first else 0
            stop = int(end) + 1 if place == last else int(self.dataset.sequence_lengths[document])
            found.append((document, start, stop - start))
        return found


class _Roles:
    """The roles file, read as megatron-core reads the tokens."""

    def __init__(self, indexed_dataset: Any, path: Path) -> None:
        index = indexed_dataset.index
        self._starts: npt.NDArray[np.int64] = index.sequence_pointers // index.dtype_size
        self._lengths: npt.NDArray[np.int32] = index.sequence_lengths
        self._codes = np.memmap(path, dtype=np.uint8, mode="r")
        if len(self._codes) != self._lengths.sum(dtype=np.int64):
            raise InputError(f"{path} has {len(self._codes)} bytes, and the data set has {self._lengths.sum(dtype=np.int64)} tokens.")

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.uint8]:
        start = int(self._starts[idx]) + offset
        count = int(self._lengths[idx]) - offset if length is None else int(length)
        return self._codes[start : start + count]
