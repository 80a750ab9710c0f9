"""The indexed data set is megatron-core's, byte for byte, in both directions."""

from pathlib import Path

import numpy as np
import pytest

from megatron_instruct.errors import InputError
from megatron_instruct.index_format import DTYPES
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file, write_index
from megatron_instruct.preprocessing.verify import verify
from megatron_instruct.tokenizer import token_dtype

RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 60_000, size=RANDOM.integers(1, 50)) for _ in range(300)]


def write_ours(prefix: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    bin_file(prefix).write_bytes(b"".join(document.astype(dtype).tobytes() for document in DOCUMENTS))
    lengths = np.array([len(document) for document in DOCUMENTS], dtype=np.int32)
    with open(idx_file(prefix), "wb") as stream:
        write_index(stream, dtype, [lengths[:100], lengths[100:100], lengths[100:]])


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 128_256])
def test_bytes_are_those_of_megatron_core(tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron-core 0.19 warns where it finds none
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    dtype = core.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == np.dtype(dtype)
    theirs = tmp_path / "theirs"
    builder = core.IndexedDatasetBuilder(str(bin_file(theirs)), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(idx_file(theirs)))
    write_ours(tmp_path / "ours", vocab_size)
    for file in (bin_file, idx_file):
        assert file(tmp_path / "ours").read_bytes() == file(theirs).read_bytes()

    opened = core.IndexedDataset(str(tmp_path / "ours"))
    assert len(opened) == len(DOCUMENTS)
    assert all((opened[number] == document).all() for number, document in enumerate(DOCUMENTS))
    assert {code: dtype.name for code, dtype in DTYPES.items()} == {member.value: member.name for member in core.DType}


def test_documents_of_several_sequences_by_megatron_core_are_read(tmp_path: Path) -> None:
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    builder = core.IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    builder.add_document(np.array([1, 2, 3, 9]), [2, 2])
    builder.add_document(np.array([], dtype=np.int64), [])
    builder.add_document(np.array([4, 9]), [2])
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(tmp_path / "d")
    assert [dataset.document(number).tolist() for number in range(len(dataset))] == [[1, 2, 3, 9], [], [4, 9]]
    found = verify(tmp_path / "d", vocab_size=10, eod=9)
    assert (found.documents, found.tokens, found.empty_documents, found.ended_documents, found.faults) == (3, 6, 1, 2, ())


def test_a_sound_data_set_has_no_faults(tmp_path: Path) -> None:
    write_ours(tmp_path / "d", 65_000)
    found = verify(tmp_path / "d", vocab_size=60_000, eod=None)
    assert (found.documents, found.tokens, found.faults) == (300, sum(map(len, DOCUMENTS)), ())


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("d.bin", lambda content: content[:-2], "bytes; the index describes"),
        ("d.bin", lambda content: content[:-1], "no multiple of 2"),
        ("d.idx", lambda content: content[:-8], "document bounds take"),
        ("d.idx", lambda content: content[:20], "is not the index"),
        ("d.idx", lambda content: b"X" + content[1:], "is not the index"),
        ("d.idx", lambda content: content[:9] + b"\x02" + content[10:], "version 2"),
        ("d.idx", lambda content: content[:17] + b"\x09" + content[18:], "dtype code 9"),
        ("d.idx", lambda content: content[:34] + b"\x01\x00\x00\x70" + content[38:], "does not start where"),
        ("d.idx", lambda content: content[:34] + b"\xff\xff\xff\xff" + content[38:], "negative length"),
        ("d.idx", lambda content: content[:-8] + content[-16:-8], "must run from 0 to 300"),
        ("d.idx", lambda content: content[:-16] + b"\x01" + bytes(7) + content[-8:], "not in order"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, damage: object, words: str) -> None:
    write_ours(tmp_path / "d", 65_000)
    assert callable(damage)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(InputError, match=words):
        faults = verify(tmp_path / "d", vocab_size=None, eod=None).faults
        raise InputError(" ".join(faults))


def test_ids_beyond_the_vocabulary_are_a_fault(tmp_path: Path) -> None:
    write_ours(tmp_path / "d", 65_000)
    (fault,) = verify(tmp_path / "d", vocab_size=100, eod=None).faults
    assert "vocabulary has 100" in fault
