"""Against the tools of a real Megatron-LM checkout, which the variable MEGATRON_LM names: the same input gives the same bytes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.merge_datasets import MergeConfig
from megatron_instruct.preprocessing.merge_datasets import run as merge
from megatron_instruct.preprocessing.run import run

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout() -> Path:
    folder = os.environ.get("MEGATRON_LM")
    if not folder:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    path = Path(folder).resolve()
    assert (path / "tools" / "preprocess_data.py").is_file(), f"MEGATRON_LM={folder} is no checkout of Megatron-LM"
    return path


@pytest.fixture
def model() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def theirs(checkout: Path, tool: str, *arguments: object) -> None:
    command = [sys.executable, str(checkout / "tools" / tool), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def same_bytes(first: Path, second: Path) -> bool:
    return all(Path(f"{first}{suffix}").read_bytes() == Path(f"{second}{suffix}").read_bytes() for suffix in (".bin", ".idx"))


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_are_those_of_preprocess_data(
    tmp_path: Path, corpus: Path, jargon: list[dict[str, str]], checkout: Path, model: Path, append_eod: bool
) -> None:
    with open(corpus, "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": row["text"], "title": row["id"]}) + "\n" for row in jargon)
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "theirs", "--json-keys", "text", "title", "--workers", 2]
    arguments += ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model, *(["--append-eod"] if append_eod else [])]
    theirs(checkout, "preprocess_data.py", *arguments)
    config = PreprocessConfig(
        input=(str(corpus),),
        output_prefix=tmp_path / "ours",
        tokenizer_model=model,
        json_keys=("text", "title"),
        append_eod=append_eod,
        workers=2,
    )
    run(config)
    for key in ("text", "title"):
        assert same_bytes(config.prefix(key), tmp_path / f"theirs_{key}_document")


def test_merged_bytes_are_those_of_merge_datasets(tmp_path: Path, jargon: list[dict[str, str]], checkout: Path, model: Path) -> None:
    for name, rows in (("b", jargon[:200]), ("a", jargon[200:300]), ("c", jargon[300:301])):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run(
            PreprocessConfig(
                input=(str(source),), output_prefix=tmp_path / "ours" / name, tokenizer_model=model, append_eod=True, workers=1
            )
        )
    (tmp_path / "theirs").mkdir()  # their tool takes no other file in the folder than .bin and .idx
    for file in (tmp_path / "ours").iterdir():
        if file.suffix in (".bin", ".idx"):
            (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    theirs(checkout, "merge_datasets.py", "--input", tmp_path / "theirs", "--output-prefix", tmp_path / "their_merge")
    merge(MergeConfig(input=tmp_path / "ours", output_prefix=tmp_path / "our_merge"))
    assert same_bytes(tmp_path / "our_merge", tmp_path / "their_merge")
