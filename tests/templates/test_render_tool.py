"""render_templates.py as a user meets it: whole or absent, the same bytes again, nothing lost without a reason."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.corpora.parts import Part, usual_parts
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import write_json
from megatron_instruct.manifest import Manifest, read_manifest, records, write_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.run import run as preprocess
from megatron_instruct.templates.config import RenderConfig
from megatron_instruct.templates.run import main, run

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parents[2]


def example(number: int) -> dict[str, Any]:
    options = ["north", "south", "east", "west"]
    pairs = [
        {"question": f"What is {number}?", "answer": "A number.", "kind": "free_form"},
        {"question": "Where is it?", "answer": options[number % 4], "kind": "options", "options": options},
        {"question": "How so?", "answer": "Thus.", "kind": "chain_of_thought", "rationale": "One sees it."},
    ]
    shots = [{"id": f"{number}.{shot}", "text": f"Text {number}.{shot} about {{braces}} and </s>.", "pairs": pairs} for shot in (0, 1)]
    return {"id": f"{number}.0", "shots": shots}


def write_examples(path: Path, count: int, *extra: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example(number)) + "\n" for number in range(count)) + "".join(line + "\n" for line in extra))
    return path


@pytest.fixture
def synthesis(tmp_path: Path) -> Path:
    """A folder as synthesis leaves it."""
    folder = tmp_path / "synthesis"
    write_examples(folder / "examples.jsonl", 300)
    (folder / "rejects.jsonl").write_text('{"reason": "incomplete"}\n')
    write_manifest(
        folder / "manifest.json",
        Manifest(
            stage="synthesize", settings={}, outputs=records([folder / "examples.jsonl", folder / "rejects.jsonl"], relative_to=folder)
        ),
    )
    return folder


def render_to(folder: Path, *inputs: Path, **settings: Any) -> Manifest:
    return run(RenderConfig(input=tuple(map(str, inputs)), output_dir=folder, **settings))


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "augmented.jsonl").read_text(encoding="utf-8").splitlines()]


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_folder_of_synthesis_becomes_documents_with_spans_and_a_manifest(tmp_path: Path, synthesis: Path) -> None:
    manifest = render_to(tmp_path / "out", synthesis)
    rows = documents(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"{number}.0" for number in range(300)]
    for number, row in enumerate(rows):
        contexts = [row["text"][start:end] for start, end, role in row["spans"] if role == "context"]
        assert contexts == [f"Text {number}.{shot} about {{braces}} and </s>." for shot in (0, 1)]
    counts = manifest.counts
    assert (counts["examples"], counts["documents"], counts["examples_rejected"]) == (300, 300, 0)
    assert (counts["pairs"], counts["pairs_rendered"], counts["pairs_rejected"]) == (1800, 1800, 0)
    assert sum(count for name, count in counts.items() if name.startswith("layout_")) == 300
    assert counts["layout_classic"] > 200
    assert read_manifest(tmp_path / "out" / "manifest.json", stage="render") == manifest
    assert sorted(contents(tmp_path / "out")) == ["augmented.jsonl", "manifest.json", "rejects.jsonl"]


def test_preprocessing_takes_what_was_rendered(tmp_path: Path, synthesis: Path, tokenizer_folder: Path) -> None:
    render_to(tmp_path / "out", synthesis)
    settings = PreprocessConfig(input=(str(tmp_path / "out"),), output_prefix=tmp_path / "a", tokenizer_model=tokenizer_folder, workers=1)
    assert preprocess(settings)["text"].counts["documents"] == 300


def test_order_and_company_of_examples_do_not_change_a_document(tmp_path: Path, synthesis: Path) -> None:
    render_to(tmp_path / "out", synthesis)
    lines = (synthesis / "examples.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[200:50:-7]))
    render_to(tmp_path / "some", tmp_path / "some.jsonl")
    all_documents = {row["id"]: row for row in documents(tmp_path / "out")}
    assert all(all_documents[row["id"]] == row for row in documents(tmp_path / "some"))


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    tmp_path: Path, synthesis: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    render_to(tmp_path / "out", synthesis)
    before = (tmp_path / "out" / "augmented.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    render_to(tmp_path / "out", synthesis)
    assert capsys.readouterr().out == f"Finished already: {tmp_path / 'out'}.\n"
    assert (tmp_path / "out" / "augmented.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"seed=1234, and this run asks for seed=5"):
        render_to(tmp_path / "out", synthesis, seed=5)
    with pytest.raises(ConfigError, match="asks for bank="):
        render_to(tmp_path / "out", synthesis, language="zh")


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 2500, "{broken")
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(examples.read_bytes()))
    for workers in (1, 2, 3):
        render_to(tmp_path / str(workers), examples, tmp_path / "more.jsonl.gz", workers=workers, on_error="reject")
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")
    rows = documents(tmp_path / "3")
    assert rows[:2500] == rows[2500:] and len(rejects(tmp_path / "3")) == 2


def test_kill_9_and_again_gives_the_same_bytes(tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 12_000)
    render_to(tmp_path / "calm", examples)
    out = tmp_path / "killed"
    for wanted in (1, 3):
        process = start("render_templates.py", "--input", examples, "--output-dir", out, "--workers", "1")
        deadline = time.monotonic() + 60
        while len(finished_parts(out)) < wanted:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "manifest.json").exists()
    finished = finished_parts(out)
    (out / "augmented.jsonl").write_bytes(b"killed between two renames")
    (out / "rejects.jsonl.partial").write_bytes(b"killed while it was written")
    assert main(["--input", str(examples), "--output-dir", str(out)]) == 0
    assert contents(out) == contents(tmp_path / "calm")
    assert f"{len(finished)} of " in capsys.readouterr().out and finished, "the last run went on with these"
    write_json(out / "parts" / "000000" / "summary.json", {})
    write_json(out / "parts" / "plan.json", {"stage": "render", "settings": {}})
    (out / "lock").touch()
    assert main(["--input", str(examples), "--output-dir", str(out)]) == 0, "killed before it had cleared up"
    assert contents(out) == contents(tmp_path / "calm")


def test_parts_of_another_seed_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 6000, "{broken")
    with pytest.raises(InputError, match="broken JSON"):
        render_to(tmp_path / "out", examples, workers=1)
    assert finished_parts(tmp_path / "out")
    render_to(tmp_path / "out", examples, seed=5, on_error="reject")
    render_to(tmp_path / "calm", examples, seed=5, on_error="reject")
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert "Leftovers of an unfinished run" in capsys.readouterr().out


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 5)

    def cut(files: Sequence[Path]) -> list[Part]:
        parts = usual_parts(files)
        write_examples(examples, 6)
        return parts

    monkeypatch.setattr("megatron_instruct.templates.run.usual_parts", cut)
    with pytest.raises(InputError, match=r"examples.jsonl changed while it was read; run the same command again"):
        render_to(tmp_path / "out", examples)
    assert not (tmp_path / "out" / "augmented.jsonl").exists()
    monkeypatch.undo()
    assert render_to(tmp_path / "out", examples).counts["documents"] == 6


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_made_of_a_changed_input_is_not_gone_on_with_when_it_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """killed: before the run could look at its inputs once more."""
    examples = write_examples(tmp_path / "examples.jsonl", 5)
    before = examples.read_bytes()
    render_to(tmp_path / "calm", examples)

    def cut(files: Sequence[Path]) -> list[Part]:
        parts = usual_parts(files)
        examples.write_bytes(before.replace(b"A number.", b"A NUMBER."))
        return parts

    monkeypatch.setattr("megatron_instruct.templates.run.usual_parts", cut)
    if killed:
        monkeypatch.setattr("megatron_instruct.templates.run.unchanged", lambda *_: contextlib.nullcontext())
    with pytest.raises(InputError, match=r"examples.jsonl changed while it was read"):
        render_to(tmp_path / "out", examples)
    monkeypatch.undo()
    examples.write_bytes(before)
    render_to(tmp_path / "out", examples)
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_an_unfinished_synthesis_is_neither_read_nor_written_to(tmp_path: Path, synthesis: Path) -> None:
    work = synthesis / "shards" / "000000"
    work.mkdir(parents=True)
    shutil.copy(synthesis / "examples.jsonl", work)
    (synthesis / "lock").touch()
    (work.parent / "plan.json").write_text('{"settings": {}}')
    with pytest.raises(InputError, match=r"shards is unfinished work of a run: let its command finish it, or name the files"):
        render_to(tmp_path / "out", synthesis)
    (synthesis / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds files and no manifest\.json, so they are not of this stage"):
        render_to(synthesis, synthesis / "examples.jsonl")
    assert (synthesis / "lock").exists()
    assert render_to(tmp_path / "out", synthesis / "examples.jsonl").counts["documents"] > 0


def finished_parts(folder: Path) -> list[Path]:
    return sorted((folder / "parts").glob("[0-9]*[0-9]/summary.json"))


BAD_LINES = {
    '{"id": "x", "shots": [': "broken JSON",
    "[1]": "not an object",
    '{"text": "a plain corpus"}': "no example",
    '{"id": "x", "shots": [{"id": "x", "text": "t", "pairs": [{"question": "q"}]}]}': "no example",
    '{"id": "x", "shots": [{"id": "x", "text": "a \\udc80", "pairs": []}]}': "lone surrogate",
    '{"id": "x", "shots": [{"id": "x", "text": "a \\u0000", "pairs": []}]}': "NUL character",
    '{"id": "x", "shots": [{"id": "x", "text": "a", "pairs": [{"question": "\\udc80", "answer": "b", "kind": "options"}]}]}': (
        "lone surrogate"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_example_stops_the_run_and_is_named(tmp_path: Path, line: str) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 5, line)
    with pytest.raises(InputError, match=rf"examples.jsonl:6: {BAD_LINES[line]}: .*--on-error reject"):
        render_to(tmp_path / "out", examples)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "augmented.jsonl").exists()


def test_such_lines_are_set_aside_on_demand_and_everything_adds_up(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "examples.jsonl", 5, *BAD_LINES)
    manifest = render_to(tmp_path / "out", examples, on_error="reject")
    assert (manifest.counts["examples"], manifest.counts["documents"], manifest.counts["examples_rejected"]) == (12, 5, 7)
    assert manifest.rejected == {"NUL character": 1, "broken JSON": 1, "lone surrogate": 2, "no example": 2, "not an object": 1}
    rows = rejects(tmp_path / "out")
    assert [(row["line"], row["reason"]) for row in rows] == [(6 + place, reason) for place, reason in enumerate(BAD_LINES.values())]
    assert [json.loads(row["raw"])["shots"][0]["text"] for row in rows[4:6]] == ["a \udc80", "a \0"]
    (tmp_path / "examples.jsonl.gz").write_bytes(gzip.compress(examples.read_bytes()))  # read by the careful readers alone
    render_to(tmp_path / "careful", tmp_path / "examples.jsonl.gz", on_error="reject")
    assert documents(tmp_path / "careful") == documents(tmp_path / "out")
    assert [{**row, "file": str(examples)} for row in rejects(tmp_path / "careful")] == rows


def test_a_pair_whose_answer_is_no_option_is_set_aside_under_either_policy(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(example(5)))
    broken["shots"][1]["pairs"][1]["answer"] = "up"
    examples = write_examples(tmp_path / "examples.jsonl", 5, json.dumps(broken))
    manifest = render_to(tmp_path / "out", examples)
    assert manifest.rejected == {"answer is no option": 1}
    assert (manifest.counts["pairs"], manifest.counts["pairs_rendered"], manifest.counts["pairs_rejected"]) == (36, 35, 1)
    (row,) = rejects(tmp_path / "out")
    assert (row["line"], row["reason"], row["raw_text"], row["pair"]["answer"]) == (6, "answer is no option", "5.1", "up")


def test_an_input_that_gives_no_document_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").touch()
    for policy in ("stop", "reject"):
        with pytest.raises(InputError, match="empty file"):
            render_to(tmp_path / "out", tmp_path / "examples.jsonl", on_error=policy)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"nothing/\*\*/examples.jsonl: no such file"):
        render_to(tmp_path / "out", tmp_path / "nothing")


def test_a_changed_result_of_synthesis_is_refused(tmp_path: Path, synthesis: Path) -> None:
    content = (synthesis / "examples.jsonl").read_text()
    (synthesis / "examples.jsonl").write_text(content.replace("Text 3", "Text 9"))
    with pytest.raises(InputError, match="was changed after the stage 'synthesize' wrote it"):
        render_to(tmp_path / "out", synthesis)
    write_json(synthesis / "manifest.json", {"someone": "else's"})
    render_to(tmp_path / "out", synthesis)


def test_a_folder_of_other_files_is_never_written_to(tmp_path: Path, synthesis: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "augmented.jsonl").write_text("precious")
    with pytest.raises(InputError, match="they are not of this stage"):
        render_to(tmp_path / "out", synthesis)
    assert (tmp_path / "out" / "augmented.jsonl").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    render_to(tmp_path / "empty", synthesis)


def test_what_others_keep_in_parts_stays(tmp_path: Path, synthesis: Path) -> None:
    write_examples(mine := tmp_path / "out" / "parts" / "mine.jsonl", 3)
    before = mine.read_bytes()
    (tmp_path / "out" / "lock").touch()  # as a run leaves it that was killed before it had parts
    with pytest.raises(InputError, match=r"parts holds mine.jsonl and no plan.json of a run"):
        render_to(tmp_path / "out", synthesis)
    mine.rename(tmp_path / "mine.jsonl")
    (tmp_path / "out" / "rejects.jsonl").write_text("precious")
    with pytest.raises(InputError, match=r"rejects.jsonl exists already"):
        render_to(tmp_path / "out", synthesis)
    (tmp_path / "out" / "rejects.jsonl").unlink()
    render_to(tmp_path / "out", synthesis)
    mine.parent.mkdir()
    (tmp_path / "mine.jsonl").rename(mine)
    (tmp_path / "out" / "lock").touch()
    render_to(tmp_path / "out", synthesis)
    assert mine.read_bytes() == before


def test_an_output_that_the_input_takes_in_is_refused(tmp_path: Path, synthesis: Path) -> None:
    with pytest.raises(ConfigError, match=r"output .*synthesis/out lies in the input .*/\*\*/\*.jsonl"):
        render_to(synthesis / "out", synthesis / "**" / "*.jsonl")
    assert not (synthesis / "out").exists()
    render_to(synthesis / "out", synthesis)  # of a folder, files of another name are read
    render_to(synthesis / "out", synthesis)


def test_languages_and_banks_of_ones_own(tmp_path: Path, synthesis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_to(tmp_path / "zh", synthesis, language="zh")
    assert documents(tmp_path / "zh")[0]["provenance"]["bank"]["language"] == "zh"
    mine = tmp_path / "mine.yaml"
    mine.write_text('bridges: ["Up we get:\\n"]\nprobabilities: {bridge: 1}\n')
    render_to(tmp_path / "mine", synthesis, extend_bank=mine)
    assert sum("Up we get:" in row["text"] for row in documents(tmp_path / "mine")) >= 1
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "megatron_instruct/templates/banks/en.yaml").read_text().replace("language: en", "language: mine"))
    render_to(tmp_path / "own", synthesis, bank=own)
    assert documents(tmp_path / "own")[0]["provenance"]["bank"]["language"] == "mine"
    arguments = ["--input", str(synthesis), "--output-dir", str(tmp_path / "x")]
    assert main([*arguments, "--language", "en", "--bank", str(own)]) == 2
    assert main([*arguments, "--language", "fr"]) == 2
    assert main([*arguments, "--bank", str(tmp_path / "none.yaml")]) == 3
    errors = capsys.readouterr().err
    assert "a bank has its own language; give one of the two" in errors
    assert "known: en, zh" in errors


def test_show_prints_documents_by_role_and_writes_a_page(tmp_path: Path, synthesis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(synthesis), "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("=" * 20) == 2
    assert "[context]Text 0.0 about {braces} and </s>." in out
    assert "[response]" in out
    assert main([*arguments, "--show", "3", "--show-html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<pre>") == 3
    assert '<span class="context">Text 2.1 about {braces} and &lt;/s&gt;.</span>' in page
    assert "http" not in page, "it needs nothing else"
    assert main([*arguments, "--show-html", str(tmp_path / "page.html")]) == 2


def test_memory_is_flat_and_the_stage_loads_no_torch(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from megatron_instruct.templates.run import main
assert main(["--input", sys.argv[1], "--output-dir", sys.argv[2]]) == 0
others = {"torch", "transformers", "pyarrow", "numpy", "megatron_instruct.preprocessing", "megatron_instruct.synthesis"}
assert not others & sys.modules.keys(), others & sys.modules.keys()
print(sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
    peaks = []
    for count in (2000, 12_000):
        examples = write_examples(tmp_path / f"{count}.jsonl", count)
        command = [sys.executable, "-c", code, str(examples), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 4096, "KiB; the larger result has more than 10 MB more"


def test_a_page_takes_the_place_of_no_data(tmp_path: Path, synthesis: Path) -> None:
    examples = synthesis / "examples.jsonl"
    for place in (examples, tmp_path / "out" / "augmented.jsonl"):
        with pytest.raises(ConfigError, match=r"show_html=.*\.jsonl is written as a page; give it a name that ends in \.html"):
            run(RenderConfig(input=(str(examples),), output_dir=tmp_path / "out", workers=1, show=1, show_html=place))
    assert not (tmp_path / "out").exists()
