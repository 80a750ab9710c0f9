"""Bad steps, signals and slow processes: real processes, faults made by the rehearsal, ends compared bit for bit."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.training.ledger import Ledger
from megatron_instruct.training.settings.faults import FaultOptions

from .conftest import PIPELINE, SHARDED, TENSOR, read_metrics, weights

pytestmark = pytest.mark.filterwarnings("ignore")
LAST = 10
BAD_OUTPUT = "nan-output module=decoder.layers.1.mlp rank=1 step="
SPIKES = ("--loss-spike-factor", 3, "--loss-spike-window", 20)
FRESH: dict[str, tuple[str, tuple[object, ...]]] = {
    "undisturbed": ("", ()),
    "passing": (f"{BAD_OUTPUT}6 tries=1", ()),
    "skipped": (f"{BAD_OUTPUT}6", ()),
    "gradient": ("nan-gradient parameter=decoder.layers.0.mlp.linear_fc1.weight rank=1 step=6", ()),
    "gone back": ("nan-weight parameter=decoder.final_layernorm.weight rank=0 step=7", ()),
    "hopeless": (f"{BAD_OUTPUT}5-99", ("--max-skips-in-a-row", 2)),
    "signalled": ("signal name=SIGUSR1 rank=1 step=6", ()),
    "spike": ("spike factor=100 step=6", SPIKES),
    "slow": ("slow seconds=0.1 rank=1 step=7", ("--straggler-interval", 0, "--straggler-factor", 10)),
}
"""Faults, and flags."""
AGAIN: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "again skipped": ("skipped", 4, ()),
    "again gone back": ("gone back", 4, ()),
    "again signalled": ("signalled", 6, ()),
    "again spike": ("spike", 4, SPIKES),
    "again hopeless": ("hopeless", 4, ("--max-skips-in-a-row", 2)),
}
"""Without faults: a run above, killed some steps after an iteration."""


@dataclass(frozen=True)
class Ended:
    folder: Path
    end: str

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "faults.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for line in (self.folder / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


Launch = Callable[..., dict[str, "Ended"]]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]], torchrun_session: Any) -> Launch:
    """Do runs on two processes, each with the faults that it is given, then the ones that go on; return how they ended."""

    def do(
        layout: tuple[object, ...], fresh: dict[str, tuple[str, tuple[object, ...]]], again: dict[str, tuple[str, int, tuple[object, ...]]]
    ) -> dict[str, Ended]:
        folder = tmp_path_factory.mktemp("faults")
        folders = {name: folder / name.replace(" ", "-") for name in (*fresh, *again)}
        # without validation, as nothing here is about it
        short = ("--train-iters", LAST, "--save-interval", 4, "--eval-interval", 100, *layout)
        plan = [
            {"flags": flags(folders[name], *short, *more), "faults": faults, "of": None, "at": 0} for name, (faults, more) in fresh.items()
        ]
        for name, (of, at, more) in again.items():
            plan.append({"flags": flags(folders[name], *short, *more), "faults": "", "of": str(folders[of]), "at": at})
        (folder / "runs.json").write_text(json.dumps(plan))
        result = torchrun_session(2, Path(__file__).with_name("several_runs.py"), folder / "runs.json")
        assert result.returncode == 0, result.stderr[-3000:]
        ends = json.loads((folder / "runs.json.ends").read_text())
        return {name: Ended(folder=path, end=end) for (name, path), end in zip(folders.items(), ends, strict=True)}

    return do


@pytest.fixture(scope="module")
def ended(launch: Launch) -> dict[str, Ended]:
    return launch(SHARDED, FRESH, AGAIN)


def assert_same(one: Ended, other: Ended) -> None:
    import torch

    assert read_metrics(one.folder) == read_metrics(other.folder)
    mine, theirs = weights(one.folder, LAST), weights(other.folder, LAST)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_passing_fault_is_run_again_on_the_same_batch_and_changes_nothing(ended: dict[str, Ended]) -> None:
    run = ended["passing"]
    assert_same(run, ended["undisturbed"])
    (event,) = run.events
    assert event["kind"] == "rerun" and event["iteration"] == 6
    assert [row["reruns"] for row in run.rows] == [0] * 5 + [1] * 5
    assert ended["undisturbed"].events == []


def test_a_bad_batch_is_skipped_and_named_with_rank_layer_and_documents(ended: dict[str, Ended], data: Path) -> None:
    run = ended["skipped"]
    (event,) = run.events
    assert event["kind"] == "skip" and event["iteration"] == 6
    assert event["where"] == "the output of layer 2: decoder.layers.1.mlp on rank 1 (tensor 0, pipeline 0, data 1), microbatch 0"
    assert event["documents"] and all(piece.startswith(f"{data} document ") for piece in event["documents"])
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert [row["skipped"] for row in run.rows] == [0] * 5 + [1] * 4
    assert [row["loss"] for row in run.rows[:5]] == [row["loss"] for row in ended["undisturbed"].rows[:5]]
    assert [row["loss"] for row in run.rows[5:]] != [row["loss"] for row in ended["undisturbed"].rows[6:]]


def test_a_bad_gradient_is_named_also_where_the_product_that_makes_it_adds_it_up(ended: dict[str, Ended]) -> None:
    (event,) = ended["gradient"].events
    assert event["kind"] == "skip"
    assert event["where"] == "the gradient of layer 1: decoder.layers.0.mlp.linear_fc1.weight on rank 1 (tensor 0, pipeline 0, data 1)"
    assert_same(ended["gradient"], ended["skipped"])


@pytest.mark.parametrize("of", ["skipped", "gone back", "spike"])
def test_a_run_that_goes_on_leaves_out_the_same_batches_and_ends_the_same(ended: dict[str, Ended], of: str) -> None:
    again = ended[f"again {of}"]
    assert again.end == "done"
    assert_same(again, ended[of])
    assert again.events == ended[of].events, "nothing was tried again"


def test_broken_weights_blame_no_batch_the_run_goes_back(ended: dict[str, Ended]) -> None:
    run = ended["gone back"]
    (event,) = run.events
    assert (event["kind"], event["iteration"], event["checkpoint"]) == ("rollback", 7, 4)
    assert "the weight decoder.final_layernorm.weight on rank 0" in event["where"]
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4, 8, 9, 10]
    assert [(row["skipped"], row["rollbacks"]) for row in run.rows[3:5]] == [(0, 0), (3, 1)]


def test_what_nothing_helps_ends_with_a_diagnosis_and_never_loops(ended: dict[str, Ended]) -> None:
    run = ended["hopeless"]
    assert [(event["kind"], event["iteration"]) for event in run.events] == [
        *(("skip", 5), ("skip", 6), ("rollback", 7), ("skip", 8), ("skip", 9)),
    ]
    status, text = run.end.split(" ", 1)
    assert status == "6"
    for part in ("step 10 cannot be done: the loss is", "layer 2", "rank 1", "went back 1 times", " document ", "trace_data.py"):
        assert part in text
    assert ended["again hopeless"].end == "done", "without the fault, the same folder goes on"


def test_a_signal_to_one_process_saves_the_same_step_on_all_and_the_run_goes_on(ended: dict[str, Ended]) -> None:
    run = ended["signalled"]
    assert run.end == f"75 SIGUSR1: saved after step 6 of {LAST}; the same command goes on from there."
    assert (run.folder / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert not (run.folder / "manifest.json").exists()
    assert_same(ended["again signalled"], ended["undisturbed"])


def test_a_loss_far_above_the_steps_before_is_a_bad_step(ended: dict[str, Ended]) -> None:
    (event,) = ended["spike"].events
    assert event["kind"] == "skip" and event["iteration"] == 6
    assert 80 < float(re.search(r"is ([\d.]+) times the median", event["reason"])[1]) < 110  # type: ignore[index]


def test_a_slow_process_is_named_once(ended: dict[str, Ended]) -> None:
    events = ended["slow"].events
    assert [event["ranks"] for event in events] == [[1]]
    assert "rank 1 on " in events[0]["text"] and "is slow: its own computation takes" in events[0]["text"]


@dataclass(frozen=True)
class OneModelOverTwo:
    """Where a fault of rank 1 is in a model of four layers that two processes share."""

    flags: tuple[object, ...]
    layer: int
    """Of decoder.layers.1 on rank 1, in the whole model."""
    place: str


SHARED_MODEL = {
    "tensor": OneModelOverTwo((*TENSOR, *SHARDED), 2, "rank 1 (tensor 1, pipeline 0, data 0)"),
    "pipeline": OneModelOverTwo(PIPELINE, 4, "rank 1 (tensor 0, pipeline 1, data 0)"),
}
FIRST_STAGE = "nan-output module=decoder.layers.0 rank=0 step=6"
GRADIENT = "nan-gradient parameter=decoder.layers.0.mlp.linear_fc1.weight rank=1 step=6"
BROKEN_WEIGHT = "nan-weight parameter=decoder.layers.1.mlp.linear_fc2.weight rank=1 step=7"


@pytest.mark.slow
@pytest.mark.parametrize("layout", SHARED_MODEL)
def test_bad_steps_of_a_model_over_two_processes_are_named_and_left_out_alike(layout: str, launch: Launch, data: Path) -> None:
    over = SHARED_MODEL[layout]
    fresh = {name: FRESH[name] for name in ("undisturbed", "passing", "skipped", "hopeless", "signalled", "spike")}
    fresh |= {"first stage": (FIRST_STAGE, ()), "gradient": (GRADIENT, ()), "gone back": (BROKEN_WEIGHT, ())}
    ended = launch(over.flags, fresh, {**AGAIN, "again first stage": ("first stage", 4, ())})

    assert_same(ended["passing"], ended["undisturbed"])
    assert [event["kind"] for event in ended["passing"].events] == ["rerun"]
    where = {
        "skipped": f"the output of layer {over.layer}: decoder.layers.1.mlp on {over.place}, microbatch 0",
        "first stage": "the output of layer 1: decoder.layers.0 on rank 0 (tensor 0, pipeline 0, data 0), microbatch 0",
        "gradient": f"the gradient of layer {over.layer - 1}: decoder.layers.0.mlp.linear_fc1.weight on {over.place}",
        "gone back": f"the weight layer {over.layer}: decoder.layers.1.mlp.linear_fc2.weight on {over.place}",
    }
    for name, text in where.items():
        (event,) = ended[name].events
        assert (event["kind"], event["where"]) == ("rollback" if name == "gone back" else "skip", text)
        assert event["documents"] and all(piece.startswith(f"{data} document ") for piece in event["documents"])
        left_out = {5, 6, 7} if name == "gone back" else {6}
        assert [row["iteration"] for row in ended[name].rows] == [step for step in range(1, LAST + 1) if step not in left_out]
        assert ended[name].rows[-1]["skipped"] == len(left_out)
    for of in ("skipped", "gone back", "spike", "first stage"):
        assert_same(ended[f"again {of}"], ended[of])
        assert ended[f"again {of}"].events == ended[of].events
    assert_same(ended["again signalled"], ended["undisturbed"])
    assert [event["kind"] for event in ended["spike"].events] == ["skip"]
    assert [event["kind"] for event in ended["hopeless"].events] == ["skip", "skip", "rollback", "skip", "skip"]
    assert ended["hopeless"].end.startswith("6 step 10 cannot be done: the loss is")
    assert f"layer {over.layer}: decoder.layers.1.mlp on {over.place}" in ended["hopeless"].end
    assert ended["again hopeless"].end == "done"


def test_a_mixture_of_experts_logs_nothing_of_what_was_left_out(launch: Launch) -> None:
    fresh = {name: (fault.replace("rank=1", "rank=0"), more) for name, (fault, more) in FRESH.items()}
    ended = launch(("--preset", "tiny-experts"), {name: fresh[name] for name in ("undisturbed", "passing", "skipped")}, {})
    assert_same(ended["passing"], ended["undisturbed"])
    balance = {name: [row["load_balancing_loss"] for row in run.rows] for name, run in ended.items()}
    assert balance["passing"] == balance["undisturbed"]
    assert balance["skipped"][:5] == balance["undisturbed"][:5]
    assert all(0.9 < value < 2 for value in balance["skipped"])


def test_faults_count_on_when_a_phase_to_come_is_changed(tmp_path: Path) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = {"data": "a", "phases": [{"until": 8}, {"data": "b"}]}
        Ledger(tmp_path, before).add("skip", 3, "step 3 was bad.")
        assert Ledger(tmp_path, {**before, "phases": [{"until": 8}, {"data": "c"}]}).skipped == {3}
        assert Ledger(tmp_path, {**before, "data": "c"}).skipped == set()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_interval": 0}, "exit_interval=0"),
        ({"loss_spike_factor": 1.0}, "loss_spike_factor=1.0 must be above 1"),
        ({"max_skips": -1}, "-1"),
    ],
)
def test_a_setting_that_breaks_a_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FaultOptions(**settings)


@pytest.mark.parametrize(("text", "message"), [("nan-outpt step=1", "did you mean 'nan-output'"), ("spike step=1", "needs factor=")])
def test_a_rehearsal_that_means_nothing_is_refused(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_instruct.training.rehearsal import VARIABLE, rehearsed

    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=message):
        rehearsed()
