"""--split-sentences: each sentence is a sequence; and every kind of output is byte for byte what Megatron's own builder writes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_instruct.errors import ConfigError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.inspection import main as inspect

Preprocess = Callable[..., dict[str, Manifest]]
Outputs = Callable[[Path], dict[str, bytes]]
ENGLISH = (
    'Dr. Smith arrived at 5 p.m. on Friday. He said: "Is it done?" It was not.',
    "One sentence only",
    "  A first one!   A second one?\n\nA third of Mr. Grey, Jr. himself.  ",
)


@pytest.fixture(params=["uint16", "int32"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A vocabulary below 65,500, and one above."""
    if request.param == "uint16":
        return tokenizer_folder
    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens([f"<extra_{number}>" for number in range(70_000)])
    (tmp_path / "big").mkdir()
    model.save(str(tmp_path / "big" / "tokenizer.json"))
    (tmp_path / "big" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return tmp_path / "big"


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("split_sentences", [False, True])
def test_bytes_are_those_of_megatrons_builder_for_every_kind_of_output(
    tmp_path: Path,
    corpus: Path,
    any_tokenizer: Path,
    preprocess: Preprocess,
    append_eod: bool,
    split_sentences: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron-core 0.19 warns where it finds none
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    punkt = pytest.importorskip("punkt")
    keys, level = ("text", "title"), "sentence" if split_sentences else "document"
    settings = {"json_keys": keys, "append_eod": append_eod, "split_sentences": split_sentences, "partitions": 5}
    preprocess(corpus, tmp_path / "out" / "a", any_tokenizer, **settings)
    tokenizer = tokenizers.Tokenizer.from_file(str(any_tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    dtype = core.DType.optimal_dtype(tokenizer.get_vocab_size())
    for key in keys:
        builder = core.IndexedDatasetBuilder(str(tmp_path / f"{key}.bin"), dtype=dtype)
        for line in corpus.read_text(encoding="utf-8").splitlines():
            text = json.loads(line)[key]
            pieces = punkt.tokenizer_for("english").tokenize(text) if split_sentences else [text]
            ids = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
            if append_eod:
                ids[-1].append(tokenizer.token_to_id("<|endoftext|>"))
            builder.add_document(np.array([token for piece in ids for token in piece]), list(map(len, ids)))
        builder.finalize(str(tmp_path / f"{key}.idx"))
        for suffix in ("bin", "idx"):
            assert (tmp_path / "out" / f"a_{key}_{level}.{suffix}").read_bytes() == (tmp_path / f"{key}.{suffix}").read_bytes()
    read = core.IndexedDataset(str(tmp_path / "out" / f"a_text_{level}"))
    assert len(read.document_indices) - 1 == 400
    assert (len(read) > 400) == split_sentences


def test_sentences_end_where_a_reader_would_end_them(
    tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
    manifest = preprocess(tmp_path / "c.jsonl", tmp_path / "a", tokenizer_folder, split_sentences=True, append_eod=True)["text"]
    dataset = IndexedDataset(tmp_path / "a_text_sentence")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ends = np.cumsum(dataset.sequence_lengths)
    read = [
        tokenizer.decode(dataset.tokens[end - length : end].tolist()) for end, length in zip(ends, dataset.sequence_lengths, strict=True)
    ]
    assert read == [
        *("Dr. Smith arrived at 5 p.m. on Friday.", 'He said: "Is it done?"', "It was not."),
        "One sentence only",
        *("  A first one!", "A second one?", "A third of Mr. Grey, Jr. himself."),
    ]
    assert dataset.document_bounds.tolist() == [0, 3, 4, 7]
    assert (manifest.counts["documents"], manifest.counts["documents_in"]) == (3, 3)
    assert inspect(["--data-path", str(tmp_path / "a_text_sentence"), "--tokenizer-model", str(tokenizer_folder)]) == 0


def test_sentences_of_other_languages_and_of_none(tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "今天下雨。我们走吧！你来吗？"}) + "\n")
    preprocess(tmp_path / "c.jsonl", tmp_path / "zh", tokenizer_folder, split_sentences=True, lang="chinese")
    assert len(IndexedDataset(tmp_path / "zh_text_sentence").sequence_lengths) == 3
    preprocess(tmp_path / "c.jsonl", tmp_path / "en", tokenizer_folder, split_sentences=True)
    assert len(IndexedDataset(tmp_path / "en_text_sentence").sequence_lengths) == 1
    with pytest.raises(ConfigError, match="lang='klingon' is no language that sentences can be split in"):
        preprocess(tmp_path / "c.jsonl", tmp_path / "k", tokenizer_folder, split_sentences=True, lang="klingon")


def test_sentences_keep_roles_and_shuffle_with_their_documents(
    tmp_path: Path, examples: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess, outputs: Outputs
) -> None:
    settings = {"split_sentences": True, "append_eod": True}
    preprocess([examples, corpus], tmp_path / "one" / "a", tokenizer_folder, **settings)
    preprocess([examples, corpus], tmp_path / "many" / "a", tokenizer_folder, partitions=7, workers=2, **settings)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")
    preprocess([examples, corpus], tmp_path / "mixed" / "a", tokenizer_folder, shuffle_seed=1, **settings)
    found = []
    for folder in ("one", "mixed"):
        dataset = IndexedDataset(tmp_path / folder / "a_text_sentence")
        roles = (tmp_path / folder / "a_text_sentence.roles").read_bytes()
        assert len(roles) == len(dataset.tokens)
        ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths)))[dataset.document_bounds]
        spans = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        counts = np.diff(dataset.document_bounds).tolist()
        found.append(
            sorted(
                (dataset.tokens[left:right].tolist(), roles[left:right], count) for (left, right), count in zip(spans, counts, strict=True)
            )
        )
    assert found[0] == found[1]
