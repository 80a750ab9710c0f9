"""preprocess_data.py: the right tokens in Megatron's format, whatever the workers, and nothing lost."""

import contextlib
import gzip
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import write_json
from megatron_instruct.manifest import Manifest, records, write_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.run import main, run


def preprocess(inputs: Path | Sequence[Path], prefix: Path, tokenizer: Path, **settings: Any) -> dict[str, Manifest]:
    given = [inputs] if isinstance(inputs, Path) else inputs
    return run(
        PreprocessConfig(input=tuple(map(str, given)), output_prefix=prefix, tokenizer_model=tokenizer, **{"workers": 1, **settings})
    )


def outputs(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_bytes_are_those_of_megatron_core_for_the_same_tokens(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder, append_eod=True, workers=2, partitions=5)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    builder = core.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=core.DType.optimal_dtype(tokenizer.get_vocab_size()))
    for line in corpus.read_text(encoding="utf-8").splitlines():
        ids = [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, tokenizer.token_to_id("<|endoftext|>")]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "b.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / "out" / f"a_text_document.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_workers_and_partitions_and_compression_leave_the_tokens_the_same(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    preprocess(corpus, tmp_path / "one" / "a", tokenizer_folder)
    preprocess(corpus, tmp_path / "many" / "a", tokenizer_folder, workers=2, partitions=17, log_interval=10)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")
    assert sorted(outputs(tmp_path / "one")) == [f"a_text_document.{suffix}" for suffix in ("bin", "idx", "manifest.json", "rejects.jsonl")]
    lines = corpus.read_bytes().splitlines(keepends=True)
    (tmp_path / "1.jsonl").write_bytes(b"".join(lines[:100]))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[100:])))
    preprocess([tmp_path / "1.jsonl", tmp_path / "2.jsonl.gz"], tmp_path / "two" / "a", tokenizer_folder)
    for suffix in ("bin", "idx"):
        assert outputs(tmp_path / "two")[f"a_text_document.{suffix}"] == outputs(tmp_path / "one")[f"a_text_document.{suffix}"]


def test_special_token_text_in_a_document_makes_no_end_of_document(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    preprocess(corpus, tmp_path / "a", tokenizer_folder, append_eod=True)
    dataset = IndexedDataset(tmp_path / "a_text_document")
    assert int((dataset.tokens == 0).sum()) == len(dataset) == 400, "one at each end, none for the <|endoftext|> of the texts"


def test_each_json_key_is_a_data_set(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    manifests = preprocess(corpus, tmp_path / "a", tokenizer_folder, json_keys=("text", "title"))
    assert set(manifests) == {"text", "title"}
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert tokenizer.decode(IndexedDataset(tmp_path / "a_title_document").document(7).tolist()) == "T7"
    assert manifests["title"].counts["tokens"] == len(IndexedDataset(tmp_path / "a_title_document").tokens)


def test_augmented_texts_are_taken_as_they_are(tmp_path: Path, tokenizer_folder: Path) -> None:
    row = {"id": "1", "text": "Context. Question? Answer.", "spans": [[0, 26, "context"]], "provenance": {}}
    (tmp_path / "augmented.jsonl").write_text(json.dumps(row) + "\n")
    assert preprocess(tmp_path / "augmented.jsonl", tmp_path / "a", tokenizer_folder)["text"].counts["documents"] == 1


def test_sentencepiece_model_of_a_real_size(tmp_path: Path, corpus: Path) -> None:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    manifest = preprocess(corpus, tmp_path / "a", model, append_eod=True, tokenizer_type="GPTSentencePieceTokenizer")["text"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    rows = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    expected = [token for text in rows for token in [*reference.encode(text), 2]]
    assert IndexedDataset(tmp_path / "a_text_document").tokens.tolist() == expected
    assert manifest.facts["tokenizer"]["vocab_size"] == 32_000


def test_the_full_vocabulary_decides_the_dtype(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens([f"<extra_{number}>" for number in range(65_500 - model.get_vocab_size())])
    (tmp_path / "big").mkdir()
    model.save(str(tmp_path / "big" / "tokenizer.json"))
    (tmp_path / "big" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    preprocess(corpus, tmp_path / "a", tmp_path / "big")
    preprocess(corpus, tmp_path / "b", tokenizer_folder)
    assert IndexedDataset(tmp_path / "a_text_document").dtype == np.int32
    assert IndexedDataset(tmp_path / "b_text_document").dtype == np.uint16


BAD_LINES = {
    b'{"text": "cut': "broken JSON",
    b"[1]": "not an object",
    b'{"text": "\xff\xfe"}': "invalid UTF-8",
    b'{"body": "x"}': "missing text",
    b'{"text": null}': "text is no string",
    b'{"text": "  "}': "empty text",
    b'{"text": "a \\udc80 b"}': "lone surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_stops_the_run_and_is_named(tmp_path: Path, corpus: Path, tokenizer_folder: Path, line: bytes) -> None:
    with open(corpus, "ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(InputError, match=rf"corpus.jsonl:401: {BAD_LINES[line]}"):
        preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder, partitions=3)
    assert not list((tmp_path / "out").glob("*_document*"))


@pytest.mark.parametrize("partitions", [1, 9])
def test_rejects_are_kept_in_order_and_counted(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], partitions: int
) -> None:
    lines = corpus.read_bytes().splitlines()
    bad = {50 * (place + 1): line for place, line in enumerate(BAD_LINES)}
    for number, line in bad.items():
        lines[number - 1] = line
    corpus.write_bytes(b"\n".join(lines))
    (tmp_path / "empty.jsonl").touch()
    inputs = [corpus, tmp_path / "empty.jsonl"]
    manifest = preprocess(inputs, tmp_path / "a", tokenizer_folder, on_error="reject", partitions=partitions)["text"]
    assert manifest.counts["documents_in"] == 401
    assert manifest.counts["documents"] == len(IndexedDataset(tmp_path / "a_text_document")) == 400 - len(bad)
    assert manifest.rejected == dict.fromkeys(sorted([*BAD_LINES.values(), "empty file"]), 1)
    rejects = [json.loads(line) for line in (tmp_path / "a_text_document.rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(n, BAD_LINES[line]) for n, line in bad.items()] + [(1, "empty file")]
    assert rejects[0]["raw"] == '{"text": "cut'
    assert "401 documents in = 393 documents + 8 rejected (broken JSON 1, empty file 1" in capsys.readouterr().out


def test_text_that_makes_no_token_is_rejected(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.normalizer = tokenizers.normalizers.Replace("z", "")
    (tmp_path / "t").mkdir()
    model.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": "zzz"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"c.jsonl:2: no tokens"):
        preprocess(tmp_path / "c.jsonl", tmp_path / "a", tmp_path / "t")
    manifest = preprocess(tmp_path / "c.jsonl", tmp_path / "a", tmp_path / "t", on_error="reject")["text"]
    assert (manifest.counts["documents"], manifest.rejected) == (2, {"no tokens": 1})


@pytest.mark.parametrize("policy", ["stop", "reject"])
def test_an_input_without_any_document_is_an_error(tmp_path: Path, tokenizer_folder: Path, policy: str) -> None:
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(InputError, match="empty file"):
        preprocess(tmp_path / "c.jsonl", tmp_path / "a", tokenizer_folder, on_error=policy)
    assert not (tmp_path / "a_text_document.manifest.json").exists()


def test_errors_name_what_is_wrong(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(InputError, match=r"absent.jsonl: no such file"):
        preprocess(tmp_path / "absent.jsonl", tmp_path / "a", tokenizer_folder)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"folder.jsonl: the folder holds no file of a known suffix"):
        preprocess(tmp_path / "folder.jsonl", tmp_path / "a", tokenizer_folder)
    with pytest.raises(InputError, match=r"tokenizer .*none: no such file or folder"):
        preprocess(corpus, tmp_path / "a", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is a HuggingFaceTokenizer; leave tokenizer_type out"):
        preprocess(corpus, tmp_path / "a", tokenizer_folder, tokenizer_type="GPTSentencePieceTokenizer")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes())[:-100])
    with pytest.raises(InputError, match=r"cut.jsonl.gz:\d+: truncated file: the file ends early"):
        preprocess(tmp_path / "cut.jsonl.gz", tmp_path / "a", tokenizer_folder)
    for settings in ({"workers": 0}, {"partitions": 0}, {"json_keys": ()}, {"json_keys": ("a", "a")}, {"json_keys": ("a/b",)}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            preprocess(corpus, tmp_path / "a", tokenizer_folder, **settings)


def test_an_unwritable_output_exits_with_1_and_says_so(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(corpus), "--output-prefix", str(corpus / "a"), "--tokenizer-model", str(tokenizer_folder)]
    assert main(arguments) == 1
    assert "corpus.jsonl" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_place_and_the_run_goes_on_later(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*("--input", str(corpus), "--output-prefix", str(tmp_path / "a"), "--tokenizer-model", str(tokenizer_folder))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file that cannot grow stands for a disk that is full
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"at work on {corpus} in {tmp_path / 'a.parts'}; finished work is kept" in capsys.readouterr().err
    assert not list(tmp_path.glob("*_document*"))
    assert main(arguments) == 0


def test_a_stage_output_that_was_changed_is_refused(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    render = tmp_path / "render"
    render.mkdir()
    augmented = corpus.rename(render / "augmented.jsonl")
    write_manifest(render / "manifest.json", Manifest(stage="render", settings={}, outputs=records([augmented], relative_to=render)))
    preprocess(augmented, tmp_path / "a", tokenizer_folder)
    content = augmented.read_bytes()
    augmented.write_bytes(content.replace(b"Entry 3", b"Entry 9"))
    with pytest.raises(InputError, match="was changed after the stage 'render' wrote it"):
        preprocess(augmented, tmp_path / "b", tokenizer_folder)
    augmented.write_bytes(content[:-10])
    with pytest.raises(InputError, match="where its manifest says"):
        preprocess(augmented, tmp_path / "b", tokenizer_folder)
    augmented.write_bytes(content)
    write_json(render / "manifest.json", {"someone": "else's"})
    preprocess(augmented, tmp_path / "b", tokenizer_folder)


def test_a_finished_run_is_not_done_again_and_other_settings_are_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(corpus, tmp_path / "a", tokenizer_folder)
    stamp = (tmp_path / "a_text_document.bin").stat().st_mtime_ns
    capsys.readouterr()
    preprocess(corpus, tmp_path / "a", tokenizer_folder, workers=2, partitions=3)
    assert capsys.readouterr().out == f"Finished already: {tmp_path / 'a_text_document'}.\n"
    assert (tmp_path / "a_text_document.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="append_eod"):
        preprocess(corpus, tmp_path / "a", tokenizer_folder, append_eod=True)


def test_files_of_another_tool_are_never_overwritten(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a_text_document.bin").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"a_text_document.bin exists already and has no manifest"):
        preprocess(corpus, tmp_path / "a", tokenizer_folder)
    assert (tmp_path / "a_text_document.bin").read_bytes() == b"precious"
    (tmp_path / "b_text_document.rejects.jsonl").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"b_text_document.rejects.jsonl exists already and has no manifest"):
        preprocess(corpus, tmp_path / "b", tokenizer_folder)


def test_a_folder_of_another_tool_is_neither_used_nor_removed(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    mine = [tmp_path / name for name in ("a.parts/mine.jsonl", "a.fingerprints/mine.json")]
    for file in mine:
        file.parent.mkdir()
        file.write_bytes(b"precious")
    for _ in range(2):
        with pytest.raises(InputError, match=r"a.parts holds mine.jsonl and no plan.json of a run, so it is not this tool's"):
            preprocess(corpus, tmp_path / "a", tokenizer_folder)
    assert [file.name for file in mine[0].parent.iterdir()] == ["mine.jsonl"]
    mine[0].parent.rename(tmp_path / "away")
    preprocess(corpus, tmp_path / "a", tokenizer_folder)
    (tmp_path / "away").rename(mine[0].parent)
    preprocess(corpus, tmp_path / "a", tokenizer_folder)
    assert [[file.name for file in one.parent.iterdir()] for one in mine] == [["mine.jsonl"], ["mine.json"]]


def test_an_output_within_the_input_is_refused(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    (folder := tmp_path / "corpus").mkdir()
    shutil.copy(corpus, folder)
    for given in (folder, folder / "*"):
        with pytest.raises(ConfigError, match=r"output .*/corpus/a_text_document.bin lies in the input .*/corpus"):
            preprocess(given, folder / "a", tokenizer_folder)
    assert [file.name for file in folder.iterdir()] == [corpus.name]
    preprocess(folder, tmp_path / "corpus", tokenizer_folder)  # beside the folder, with its name
    preprocess(folder / "*.jsonl", folder / "a", tokenizer_folder)


def test_the_stage_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys
import megatron_instruct.preprocessing.run, megatron_instruct.preprocessing.inspection
sys.exit(" ".join(sorted({"torch", "transformers", "pyarrow"} & sys.modules.keys())) or 0)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_an_interruption_does_not_wait_for_the_input_to_be_cut(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end = threading.Event(), threading.Event()

    def cut(*_: Any, **__: Any) -> list[Any]:
        begun.set()
        end.wait()
        return []

    def interrupted(*_: Any) -> Any:
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_instruct.preprocessing.run.usual_parts", cut)
    monkeypatch.setattr("megatron_instruct.preprocessing.run.shared_records", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            preprocess(corpus, tmp_path / "out", tokenizer_folder)
        assert not end.is_set()
    finally:
        end.set()


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("when", ["while it is fingerprinted", "while it is encoded"])
def test_what_was_made_of_a_changed_input_is_not_gone_on_with_when_it_is_as_before(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, killed: bool
) -> None:
    """killed: before the run could look at its inputs once more."""
    before = corpus.read_bytes()
    preprocess(corpus, tmp_path / "calm" / "a", tokenizer_folder)
    step = "shared_records" if when == "while it is fingerprinted" else "take_up"
    module = importlib.import_module("megatron_instruct.preprocessing.run")
    work = getattr(module, step)

    def changing(*arguments: Any, **more: Any) -> Any:
        done = work(*arguments, **more)
        corpus.write_bytes(before.replace(b"a", b"A"))
        return done

    monkeypatch.setattr(module, step, changing)
    if killed:
        monkeypatch.setattr(module, "unchanged", lambda *_: contextlib.nullcontext())
    with pytest.raises(InputError, match="changed while it was read; run the same command again"):
        preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder, on_error="reject")
    monkeypatch.undo()
    corpus.write_bytes(before)
    preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder, on_error="reject")
    for name in ("a_text_document.bin", "a_text_document.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
