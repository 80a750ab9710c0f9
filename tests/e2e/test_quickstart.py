"""The quick start: the corpus is divided whole, stages are found in order, and (slow) it runs from a corpus to a report."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def divide(*arguments: object) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, str(QUICKSTART / "corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_text_is_in_exactly_one_part(tmp_path: Path) -> None:
    done = divide("--input", QUICKSTART / "jargon.jsonl", "--output-dir", tmp_path, "--synthesize", 50, "--heldout", 20)
    assert done.returncode == 0, done.stderr
    parts = [ids(tmp_path / f"{name}.jsonl") for name in ("synthesize", "raw", "heldout")]
    assert [len(parts[0]), len(parts[2])] == [50, 20]
    assert sorted(text for part in parts for text in part) == sorted(ids(QUICKSTART / "jargon.jsonl"))


def test_the_parts_do_not_depend_on_the_order_of_the_corpus(tmp_path: Path) -> None:
    lines = (QUICKSTART / "jargon.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for name, rows in (("a", lines), ("b", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        assert divide("--input", tmp_path / f"{name}.jsonl", "--output-dir", tmp_path / name).returncode == 0
    assert sorted(ids(tmp_path / "a" / "heldout.jsonl")) == sorted(ids(tmp_path / "b" / "heldout.jsonl"))


def test_broken_lines_and_repeated_ids_are_set_aside_and_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"id": str(number), "text": f"Text {number} about kludges."}) for number in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*rows, "{broken", '{"id": "x"}', rows[3]]), encoding="utf-8")
    done = divide("--input", tmp_path / "corpus.jsonl", "--output-dir", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert manifest["rejected"] == {"broken JSON": 1, "missing text": 1, "repeated id": 1}
    assert len((tmp_path / "parts" / "rejects.jsonl").read_text().splitlines()) == 3
    assert "3 lines set aside" in done.stdout


def test_the_smallest_corpus_still_has_texts_of_every_part(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Text {number} about kludges."}) for number in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert divide("--input", tmp_path / "corpus.jsonl", "--output-dir", tmp_path / "parts").returncode == 0
    assert [len(ids(tmp_path / "parts" / f"{name}.jsonl")) for name in ("synthesize", "raw", "heldout")] == [18, 6, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds 0 texts, and 1 lines could not be read (the first: {path}:1: empty file)"),
        ('{"id": "1", "body": "no text"}\n', "(the first: {path}:1: missing text)"),
        ('{"text": "only one"}\n', "holds 1 texts; the quick start needs at least 30"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    done = divide("--input", path, "--output-dir", tmp_path / "parts")
    assert done.returncode == 3
    assert message.format(path=path) in done.stderr
    assert not (tmp_path / "parts" / "manifest.json").exists()


def test_the_base_model_is_unpacked_once(smollm2_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smollm2_folder.iterdir()}
    done = subprocess.run([sys.executable, QUICKSTART / "smollm2.py", smollm2_folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"Finished already: {smollm2_folder}.\n"), done.stderr
    assert {path: path.stat().st_mtime_ns for path in smollm2_folder.iterdir()} == before


def quickstart(*arguments: object, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(QUICKSTART / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=timeout, env={**os.environ})


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    done = quickstart("--corpus", tmp_path / "no.jsonl", "--output-dir", tmp_path / "run")
    assert done.returncode == 3
    assert f"--corpus {tmp_path / 'no.jsonl'}: no such file" in done.stderr


def test_a_stage_that_fails_ends_the_quick_start_with_its_status(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = quickstart("--corpus", tmp_path / "empty.jsonl", "--output-dir", tmp_path / "run")
    assert done.returncode == 3
    assert "the stage 'corpus' ended with status 3; its message is above" in done.stderr


@pytest.mark.slow
def test_a_small_quick_start_from_an_own_corpus_to_a_report_and_again(tmp_path: Path, smollm2_folder: Path) -> None:
    lines = (QUICKSTART / "jargon.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--corpus", tmp_path / "own.jsonl", "--output-dir", tmp_path / "run", "--base-model", smollm2_folder]
    arguments += ["--synthesize", 8, "--heldout", 20, "--train-iters", 2]
    done = quickstart(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in ("Did it help?", "PASS", "<svg", "tools/pretrain.py"):
        assert words in report
    assert "FAIL" not in report
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "report.html"}
    again = quickstart(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in before if before[path] != after[path] and path.name != "lock"] == []
