"""The header of PREFIX.idx, Megatron's index of a data set, little-endian: magic (9 bytes), uint64 version, uint8 dtype code, uint64 number
of sequences, uint64 length of the document array. Source: megatron.core.datasets.indexed_dataset, megatron-core 0.19."""

import struct
from typing import Any

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1)
}
"""Of the tokens, by code."""
