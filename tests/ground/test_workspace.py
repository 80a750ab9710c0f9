"""Folders of unfinished work: what a run made is taken up or removed, what anybody else made is left alone."""

from pathlib import Path

import pytest

from megatron_instruct import workspace
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.workspace import held, is_own, plan_of, remove, require_own, take_up

PLAN = {"settings": {"seed": 1, "rounds": 2}, "inputs": [["a.jsonl", "0" * 64]]}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that a run with PLAN has begun, as shares leave it."""
    folder = tmp_path / "parts"
    take_up(folder, PLAN, outputs=())
    (folder / "000000").mkdir()
    for name in ("000000/summary.json", "000001.journal", "lock", "lock.0", "lock.door"):
        (folder / name).write_text("{}")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_same_plan_goes_on_and_another_one_begins_with_nothing_but_locks(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(work)
    take_up(work, PLAN, outputs=())
    assert (names(work), capsys.readouterr().out) == (before, "")
    take_up(work, {**PLAN, "inputs": []}, outputs=())
    assert (names(work), plan_of(work)) == (["lock", "lock.0", "lock.door", "plan.json"], {**PLAN, "inputs": []})
    assert "Leftovers of an unfinished run" in capsys.readouterr().out


def test_parts_of_a_removal_that_was_killed_belong_to_no_plan(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "_clear", killed)
    with pytest.raises(KeyboardInterrupt):
        take_up(work, {**PLAN, "inputs": []}, outputs=())
    monkeypatch.undo()
    assert is_own(work)
    take_up(work, PLAN, outputs=())
    assert names(work) == ["lock", "lock.0", "lock.door", "plan.json"]


@pytest.mark.parametrize(
    ("plan", "difference"),
    [
        ({**PLAN, "settings": {"seed": 1, "rounds": 3}}, "made with rounds=2, and this run asks for rounds=3"),
        ({**PLAN, "settings": {"seed": 1}}, "made with rounds=2, and this run asks for rounds=None"),
        ({**PLAN, "inputs": []}, "made from other inputs"),
    ],
)
def test_dear_parts_of_another_plan_are_refused_and_kept(work: Path, plan: dict[str, object], difference: str) -> None:
    before = names(work)
    with pytest.raises(ConfigError, match=rf"parts holds unfinished work {difference}; .* or remove .*parts to begin anew"):
        take_up(work, plan, outputs=(), dear=True)
    assert (names(work), plan_of(work)) == (before, PLAN)


@pytest.mark.parametrize("mine", ["a.jsonl", "plan.json"])
def test_what_no_run_made_is_neither_taken_up_nor_removed(tmp_path: Path, mine: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in (mine, "b.jsonl", "lock"):
        (folder / name).write_text('{"mine": true}')
    with pytest.raises(
        InputError, match=r"parts holds .*\.jsonl and no plan.json of a run, so it is not this tool's; choose another output"
    ):
        take_up(folder, PLAN, outputs=())
    with pytest.raises(InputError, match="is not this tool's"):
        require_own(folder)
    remove(folder)
    assert names(folder) == sorted([mine, "b.jsonl", "lock"])


def test_what_a_run_made_is_removed_whole(work: Path, tmp_path: Path) -> None:
    require_own(work)
    remove(work)
    assert not work.exists()
    remove(work)
    require_own(work)
    for marks in ((), ("lock", "lock.door"), ("plan.json.partial",)):  # of a run that was killed before it had a plan
        work.mkdir()
        for name in marks:
            (work / name).touch()
        require_own(work)
        remove(work)
        assert not work.exists()


def test_outputs_of_others_are_refused_and_those_of_a_run_are_not(tmp_path: Path) -> None:
    output = tmp_path / "out" / "texts.jsonl"
    output.parent.mkdir()
    output.write_text("precious")
    for begin in (
        lambda: take_up(tmp_path / "out" / "parts", PLAN, outputs=[output]),
        lambda: held(tmp_path / "out", [output]).__enter__(),
    ):
        with pytest.raises(InputError, match=r"texts.jsonl exists already and has no manifest: .* choose another output or remove it"):
            begin()
    assert names(tmp_path / "out") == ["texts.jsonl"], "no mark is left that would let it pass the next time"
    output.unlink()
    with held(tmp_path / "out", [output]):
        output.write_text("half")  # killed here
    with held(tmp_path / "out", [output]):
        assert output.read_text() == "half"


def test_unfinished_work_of_another_stage_is_neither_taken_up_nor_removed(tmp_path: Path, work: Path) -> None:
    merging = tmp_path / "all.parts"
    take_up(merging, {**PLAN, "stage": "merge"}, outputs=())
    (merging / "000000").mkdir()
    for folder, whose in ((work, "of another tool"), (merging, "of merge")):
        before = names(folder)
        with pytest.raises(InputError, match=rf"parts holds unfinished work {whose}; .* choose another output"):
            take_up(folder, {**PLAN, "stage": "preprocess"}, outputs=())
        with pytest.raises(InputError, match="let its command finish it"):
            require_own(folder, "preprocess")
        remove(folder, "preprocess")
        assert (is_own(folder, "preprocess"), names(folder)) == (False, before)
    remove(merging, "merge")
    assert not merging.exists()


def test_work_may_lie_elsewhere_behind_a_link(tmp_path: Path) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "parts"
    scratch.mkdir()
    folder.symlink_to(scratch)
    take_up(folder, PLAN, outputs=())
    (folder / "000000").mkdir()
    remove(folder)
    assert names(tmp_path) == []
