"""What synthesis writes to, and what it never removes: other people's files, its own input, the answers of an unfinished run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct import fingerprints

Synthesize = Callable[..., tuple[int, str]]


def test_a_corpus_below_the_output_is_kept(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus(3)
    (shards := bench.folder / "out" / "shards").mkdir(parents=True)
    corpus = corpus.rename(shards / "a.jsonl")
    for given in (shards, corpus):
        status, printed = synthesize(given)
        assert (status, f"{shards} holds a.jsonl and no plan.json" in printed) == (3, True), printed
    assert sorted(path.name for path in shards.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("name", ["examples.jsonl", "rejects.jsonl"])
@pytest.mark.parametrize("shards", [True, False])
def test_files_of_others_are_not_overwritten(bench: Any, synthesize: Synthesize, name: str, shards: bool) -> None:
    (out := bench.folder / "out").mkdir()
    (out / name).write_text("precious")
    if shards:
        (out / "shards").mkdir()
    status, printed = synthesize(bench.corpus(2))
    assert (status, f"{out / name} exists already" in printed) == (3, True), printed
    assert (out / name).read_text() == "precious"


def test_a_finished_run_leaves_what_others_put_beside_its_result(
    bench: Any, synthesize: Synthesize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_BATCH_BYTES", 1)
    mine = [bench.folder / "out" / name for name in ("shards/a.jsonl", "fingerprints/mine.json")]
    mine[1].parent.mkdir(parents=True)
    mine[1].write_text("precious")
    corpus = bench.corpus(2)
    assert synthesize(corpus)[0] == 0
    mine[0].parent.mkdir()
    mine[0].write_text("precious")
    status, printed = synthesize(corpus)
    assert (status, "Finished already" in printed) == (0, True)
    assert [file.read_text() for file in mine] == ["precious"] * 2
    assert sorted(bench.outputs("out")) == ["examples.jsonl", "fingerprints/mine.json", "manifest.json", "rejects.jsonl", "shards/a.jsonl"]


def test_an_output_within_the_input_is_refused_at_once(bench: Any, synthesize: Synthesize) -> None:
    data = bench.corpus(3).parent / "data"
    data.mkdir()
    bench.corpus(3, "data/a.jsonl")
    for given in (data, data / "**" / "*.jsonl"):
        status, printed = synthesize(given, "data/out")
        assert (status, f"output {data / 'out'} lies in the input {given}" in printed) == (2, True), printed
    bench.corpus(["What is a bug?"], "data/questions.txt")
    filters = {"filters": "contamination", "decontaminate": data}
    status, printed = synthesize(bench.folder / "corpus.jsonl", "data/out", **filters)
    assert (status, f"lies in the input {data}" in printed) == (2, True), printed
    assert not (data / "out").exists()
    assert synthesize(data / "a.jsonl", "data/out")[0] == 0, "a file that is named itself"


def finished_shards(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob("shards/*/timing.json"))


def test_finished_shards_survive_a_mistyped_setting(bench: Any, synthesize: Synthesize) -> None:
    corpus, other = bench.corpus(12), bench.corpus(11, "other.jsonl")
    settings = {"rounds": 3, "shard_size": 6}
    assert synthesize(corpus, "calm", **settings)[0] == 0
    for share in ("0/2", "1/2"):
        assert synthesize(corpus, share=share, **settings)[0] == 0
    out = bench.folder / "out"
    assert finished_shards(out) == ["000000", "000001"]
    wrong = {"rounds=3, and this run asks for rounds=2": (corpus, {"shard_size": 6}), "made from other inputs": (other, settings)}
    for message, (given, typed) in wrong.items():
        status, printed = synthesize(given, **typed)
        assert (status, message in printed, f"remove {out / 'shards'} to begin anew" in printed) == (2, True, True), printed
        assert finished_shards(out) == ["000000", "000001"]
    assert synthesize(corpus, **settings)[0] == 0
    assert bench.outputs("out") == bench.outputs("calm")


def test_answers_of_an_unfinished_shard_survive_it_too_and_what_holds_none_does_not_hinder(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus(12)
    bench.script(dead_after=2)
    assert synthesize(corpus, restarts=0, rounds=3)[0] == 5
    (journal,) = (bench.folder / "out" / "shards").glob("*.journal")
    answers = journal.read_bytes()
    status, printed = synthesize(corpus, rounds=2)
    assert (status, "rounds=3, and this run asks for rounds=2" in printed) == (2, True), printed
    assert journal.read_bytes() == answers
    bench.script(dead_after=0)
    assert synthesize(corpus, "early", restarts=0, rounds=3)[0] == 5
    assert (bench.folder / "early" / "shards" / "intake").is_dir()
    bench.script()
    for output in ("early", "calm"):
        status, printed = synthesize(corpus, output, rounds=2)
        assert (status, "Leftovers of an unfinished run" in printed) == (0, output == "early"), printed
    assert bench.outputs("early") == bench.outputs("calm")
