"""What synthesis writes to, and what it never removes: other people's files, its own input, the answers of an unfinished run."""

from collections.abc import Callable
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
