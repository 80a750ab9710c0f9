"""1,200 damaged inputs of every format, through readers and the whole stage: no crash, no lost record, the same whatever the parts.

A seed decides every input, so a failure comes back; the file's name says which it is.
"""

import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from megatron_instruct.corpora.lines import is_utf8
from megatron_instruct.corpora.parts import plan_parts, read_part
from megatron_instruct.corpora.read import BrokenRecord, Record, find_files, read_records, text_of
from megatron_instruct.preprocessing.blocks import beside_ascii
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.run import run

FILES = 1200
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt")
PIECES = [
    *(
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\r",
        b"\r\n",
        b"\n",
        b"\n\n \n",
        b"{",
        b"}",
        b"[",
        b'"',
        b",",
        b"\\",
        b"\x1a",
    ),
    *(b"null", b"[1]", b"NaN", b"-0", b"1e999", b"9" * 30, b"9" * 5000, b'{"text": null}', b'{"text": 1.5}', b'{"text": "\\u0000"}'),
    *(b'"\\ud83d"', b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b"[" * 1400 + b"]" * 1400, b"[" * 3000, b'{"a":' * 3000),
    *(b'{"text": "x", "n": ' + b"[" * depth + b"]" * depth + b"}" for depth in (900, 1400, 2000)),
    *(b'\n{"text": "</s><|endoftext|>"}\n', b"ARROW1\0\0", b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", bytes(300)),
]


def random_text(chance: random.Random) -> str:
    alphabets = ["ab c.\n", "é“漢字 \u2028\x85\x0b", "😀\U0010ffff", " \t\n\u3000", "</s>"]
    alphabets += ["\x00a", "\ud800x"] if chance.random() < 0.1 else []
    return "".join(chance.choice(chance.choice(alphabets)) for _ in range(chance.choice((0, 1, 5, 40, 400))))


def random_value(chance: random.Random, depth: int = 0) -> Any:
    if depth < 4 and chance.random() < 0.3:
        values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        return values if chance.random() < 0.5 else {random_text(chance): value for value in values}
    return chance.choice((None, True, -1, 2**70, 0.1, float("nan"), random_text(chance), "plain"))


def random_row(chance: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {"text": random_text(chance)} if chance.random() < 0.8 else {}
    names = ("id", "id", "title", "provenance", "spans", "shots", "text", "")
    return row | {chance.choice(names): random_value(chance) for _ in range(chance.randrange(3))}


def lines(chance: random.Random) -> bytes:
    rows = [random_row(chance) if chance.random() < 0.9 else random_value(chance) for _ in range(chance.randrange(1, 12))]
    ends = ("\n", "\n", "\r\n", "\n\n")
    return "".join(json.dumps(row, ensure_ascii=True) + chance.choice(ends) for row in rows).encode()


def table(chance: random.Random) -> pyarrow.Table:
    """Texts beside a column of another kind, which is sometimes called text."""
    count = chance.randrange(0, 40)
    texts = [chance.choice((None, random_text(chance).replace("\ud800", ""))) for _ in range(count)]
    other = chance.choice(([1.5] * count, [[1, 2]] * count, [{"a": 1}] * count, [b"\xff"] * count, [None] * count, [2**62] * count))
    names = chance.choice((("text", "n"), ("text", "id"), ("text", "text "), ("n", "text"), ("title", "n")))
    return pyarrow.table({names[0]: pyarrow.array(texts, pyarrow.string()), names[1]: other})


def sound(chance: random.Random, suffix: str) -> bytes:
    """A file of its format, of unusual content."""
    sink = pyarrow.BufferOutputStream()
    if suffix == ".parquet":
        settings = {"compression": chance.choice(("none", "snappy", "zstd")), "write_page_checksum": chance.random() < 0.5}
        pyarrow.parquet.write_table(table(chance), sink, row_group_size=chance.choice((3, 10, 100)), **settings)
        return bytes(sink.getvalue())
    if suffix == ".arrow":
        content = table(chance)
        with chance.choice((pyarrow.ipc.new_stream, pyarrow.ipc.new_file))(sink, content.schema) as stream:
            stream.write_table(content, max_chunksize=chance.choice((3, 10, 100)))
        return bytes(sink.getvalue())
    if suffix == ".txt":
        return random_text(chance).encode("utf-8", "surrogatepass")
    return lines(chance)


def mutated(chance: random.Random, content: bytes) -> bytes:
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(content) + 1)
        kind = chance.randrange(4)
        if kind == 0 and place < len(content):
            content = content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
        elif kind == 1:
            content = content[:place]
        elif kind == 2:
            content = content[:place] + chance.choice(PIECES) + content[place:]
        else:
            content = content[:place] + chance.randbytes(chance.randrange(20)) + content[place + chance.randrange(20) :]
    return content


def packed(chance: random.Random, content: bytes, suffix: str) -> bytes:
    """Compress mutated lines in one to three members, and mutate half of the results again."""
    pack: Callable[[bytes], bytes] = gzip.compress
    if suffix.endswith(".zst"):
        pack = zstandard.ZstdCompressor(write_checksum=chance.random() < 0.7).compress
    cuts = sorted(chance.randrange(len(content) + 1) for _ in range(chance.randrange(3)))
    bounds = [0, *cuts, len(content)]
    members = b"".join(pack(content[start:end]) for start, end in itertools.pairwise(bounds))
    return mutated(chance, members) if chance.random() < 0.5 else members


def told(item: Record | BrokenRecord) -> tuple[int, str, str]:
    """What an item says, in a form that is equal to itself where it holds NaN, and short where it is nested deeply."""
    broken = item.broken("record", "") if isinstance(item, Record) else item
    return broken.line, broken.reason, broken.detail + broken.raw


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    files = []
    for number in range(FILES):
        chance, suffix = random.Random(number), SUFFIXES[number % len(SUFFIXES)]
        content = mutated(chance, sound(chance, suffix))
        if suffix in (".jsonl.gz", ".jsonl.zst"):
            content = packed(chance, content, suffix)
        files.append(folder / f"{number:05d}{suffix}")
        files[-1].write_bytes(content)
    assert find_files([str(folder)]) == files
    return files


def test_no_input_breaks_a_reader_and_seven_parts_give_what_one_gives(inputs: list[Path]) -> None:
    reasons: Counter[str] = Counter()
    for path in inputs:
        items = list(read_records(path))
        parts = plan_parts([path], part_bytes=max(path.stat().st_size // 7, 1))
        assert [told(item) for part in parts for item in read_part(part)] == list(map(told, items)), path.name
        assert items, f"{path.name}: a file without documents is told"
        if path.suffix == ".jsonl":
            filled = [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
            assert [item.line for item in items] == (filled or [1]), f"{path.name}: one item for each line that is not blank"
        texts = [text_of(item, "text") if isinstance(item, Record) else item for item in items]
        reasons.update(text.reason if isinstance(text, BrokenRecord) else "document" for text in texts)
    assert len(reasons) > 12, f"the inputs reach many branches: {reasons}"
    assert min(reasons["document"], reasons.total() - reasons["document"]) > 1000


def test_whether_all_is_utf8_shows_beside_what_is_ascii() -> None:
    generator = random.Random(8)
    characters = [b"a", b"\n", *(character.encode() for character in "é漢😀"), b"\xc3", b"\x80", b"\xe6\xbc", b"\xf0\x9f", b"\xff"]
    weights = [40, 5, 4, 4, 4, *[0.3] * 5]
    contents = [b"".join(generator.choices(characters, weights, k=generator.randrange(60))) for _ in range(20_000)]
    valid = [is_utf8(content) for content in contents]
    assert valid == [is_utf8(beside_ascii(content)) for content in contents]
    assert 5_000 < sum(valid) < 15_000


def test_documents_in_are_documents_out_and_rejects(inputs: list[Path], tokenizer_folder: Path, tmp_path: Path) -> None:
    results = []
    for partitions, workers in ((1, 1), (7, 2)):
        config = PreprocessConfig(
            input=(str(inputs[0].parent),),
            output_prefix=tmp_path / str(partitions) / "a",
            tokenizer_model=tokenizer_folder,
            on_error="reject",
            partitions=partitions,
            workers=workers,
        )
        manifest = run(config)["text"]
        results.append({file.name: file.read_bytes() for file in (tmp_path / str(partitions)).iterdir()})
    assert results[0] == results[1]

    items = [item for path in inputs for item in read_records(path)]
    assert manifest.counts["documents_in"] == len(items) == manifest.counts["documents"] + sum(manifest.rejected.values())
    rejected = [json.loads(line) for line in results[0]["a_text_document.rejects.jsonl"].splitlines()]
    assert Counter(row["reason"] for row in rejected) == manifest.rejected
    unread = Counter((str(item.path), item.line, item.reason) for item in items if isinstance(item, BrokenRecord))
    unused = Counter((row["path"], row["line"], row["reason"]) for row in rejected)
    assert unread <= unused
    places = {(path, line) for path, line, _ in unused - unread}
    texts = [text_of(item, "text") for item in items if isinstance(item, Record) and (str(item.path), item.line) not in places]
    decoder = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    dataset = IndexedDataset(tmp_path / "7" / "a_text_document")
    documents = [dataset.document(number).tolist() for number in range(len(dataset))]
    assert texts == decoder.decode_batch(documents, skip_special_tokens=False), "in their order, each as it was"
