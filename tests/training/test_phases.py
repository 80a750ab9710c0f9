"""Phases: when they begin and end, their learning rates, what may change on the way; and runs that are fed in phases."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.config import parse
from megatron_instruct.errors import ConfigError
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.phases import own_rate, parse_phases, phase_of, place_phases, set_rate, with_free_phases

from .conftest import ITERATIONS, assert_same_end, in_phases, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = ["--train-iters", "100", "--global-batch-size", "8", "--lr", "1e-3"]


def placed(*texts: str, train_iters: int = 100, decay_start: int | None = None) -> list[tuple[int, int]]:
    return [(phase.start, phase.end) for phase in place_phases(parse_phases(texts), train_iters=train_iters, decay_start=decay_start)]


def test_until_is_a_step_a_share_of_the_run_or_where_the_learning_rate_begins_to_fall() -> None:
    assert placed("{until: 30, data_path: a}", "{until: 80%, data_path: a}", "{data_path: a}") == [(0, 30), (30, 80), (80, 100)]
    assert placed("{until: decay, data_path: 0.7 a 0.3 b}", "{data_path: [1, a, 2, b]}", decay_start=90) == [(0, 90), (90, 100)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("{until: 50, data_path: a}", "{until: 50, data_path: a}"), "phase 2 ends at step 50, and begins after step 50"),
        (("{until: 50, data_path: a}",), "the last one ends at step 50, and train_iters=100; leave out its until"),
        (("{data_path: a}", "{data_path: a}"), "phase 1 of 2 has no until"),
        (("{until: decay, data_path: a}", "{data_path: a}"), "until=decay, which needs lr_decay_style=WSD"),
        (("{until: soon, data_path: a}", "{data_path: a}"), "until='soon'; give a step, a share of the run such as 80%, or decay"),
        (("{until: 50}", "{data_path: a}"), "data_path=None; give WEIGHT PREFIX pairs"),
        (("{untill: 50, data_path: a}",), "unknown key 'untill'; did you mean 'until'"),
        (("a b",), "phase 1 is 'a b'; give a mapping"),
        (("{data_path: a, min_lr: 0}",), "min_lr or lr_decay_style without lr"),
        (("{data_path: a, lr: fast}",), "lr='fast'"),
        (("{data_path: a, lr: 1e-3, min_lr: 1e-2}",), "0 <= min_lr <= lr"),
        (("{data_path: a, lr: 1e-3, lr_decay_style: cosin}",), "did you mean 'cosine'"),
    ],
)
def test_phases_that_cannot_be_are_refused_by_name(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placed(*texts)


def test_a_list_of_mappings_in_the_file_and_yaml_on_the_command_line_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text("phases:\n- until: 60%\n  data_path: 0.7 web 0.3 books\n- data_path: [1, books]\n  lr: 1.0e-4\n  min_lr: 0\n")
    words = ["--phases", "{until: 60%, data_path: 0.7 web 0.3 books}", "{data_path: [1, books], lr: 1.0e-4, min_lr: 0}"]
    configs = [parse(PretrainConfig, [*more, *BATCH, "--save", "s"], prog="x") for more in (["--config", str(file)], words)]
    assert configs[0] is not None and configs[1] is not None
    assert configs[0].phases == configs[1].phases
    assert [phase.data_path for phase in configs[0].phases] == [("0.7", "web", "0.3", "books"), ("1", "books")]
    parse(PretrainConfig, ["--config", str(file), *BATCH, "--save", "s", "--print-config"], prog="x")
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    resolved = parse(PretrainConfig, ["--config", str(again)], prog="x")
    assert resolved is not None and resolved.phases == configs[0].phases


def test_a_phase_has_a_learning_rate_of_its_own_from_its_first_step_to_its_end() -> None:
    texts = "{until: 10, data_path: a}", "{data_path: a, lr: 1.0, min_lr: 0.2}"
    phases = place_phases(parse_phases(texts), train_iters=14, decay_start=None)
    assert [own_rate(phases, step) for step in (1, 10)] == [None, None]
    assert [own_rate(phases, step) for step in range(11, 15)] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    groups: list[dict[str, Any]] = [{"lr": 3.0, "max_lr": 0.5}, {"lr": 3.0}]
    set_rate(groups, None, highest=1.0)
    assert [group["lr"] for group in groups] == [3.0, 3.0]
    set_rate(groups, 0.8, highest=1.0)
    assert [group["lr"] for group in groups] == [0.4, 0.8]


def test_a_phase_that_has_begun_cannot_be_changed_and_one_that_has_not_can() -> None:
    first, second = {"start": 0, "end": 10, "lr": None, "data": "x"}, {"start": 10, "end": 20, "lr": None, "data": "y"}
    changed = {**second, "data": "z"}
    saved, wanted = {"phases": [first, second]}, {"phases": [first, changed]}
    assert with_free_phases(saved, wanted, iteration=10, where="run") == wanted
    with pytest.raises(ConfigError, match=r"has done 11 steps, and phase 2, which has begun, is changed: the content of its data or"):
        with_free_phases(saved, wanted, iteration=11, where="run")
    with pytest.raises(ConfigError, match=r"phase 1, which has begun, is changed: end was 10 and is 12"):
        with_free_phases(saved, {"phases": [{**first, "end": 12}, changed]}, iteration=5, where="run")


def test_every_step_has_one_phase() -> None:
    phases = place_phases(parse_phases(["{until: 3, data_path: a}", "{data_path: a}"]), train_iters=5, decay_start=None)
    assert [phase.number for step in range(1, 6) if (phase := phase_of(phases, step))] == [1, 1, 1, 2, 2]


def test_a_run_stopped_inside_a_phase_goes_on_bit_for_bit(one: dict[str, Path]) -> None:
    assert_same_end(one["again phases"], one["phases"])


def test_a_phase_that_has_not_begun_can_be_changed_at_a_resume(one: dict[str, Path]) -> None:
    before, after = read_metrics(one["phases"]).training, read_metrics(one["phases with another end"]).training
    assert before[:14] == after[:14]
    assert [row[1] for row in before[14:]] != [row[1] for row in after[14:]]


def test_the_learning_rate_is_the_phase_s_own_while_it_lasts(one: dict[str, Path]) -> None:
    rates = {row[0]: row[2] for row in read_metrics(one["phases"]).training}
    usual = {row[0]: row[2] for row in read_metrics(one["reference"]).training}
    assert [rates[step] for step in range(8, 15)] == pytest.approx([5e-4 * (1 - done / 7) for done in range(7)])
    assert all(rates[step] == usual[step] for step in (*range(1, 8), *range(15, ITERATIONS + 1)))


def test_a_phase_that_has_begun_cannot_be_changed_at_a_resume(
    one: dict[str, Path], flags: Callable[..., list[str]], data: Path, tmp_path: Path
) -> None:
    from megatron_instruct.training.run import run

    folder = tmp_path / "stopped"
    shutil.copytree(one["phases"], folder)
    (folder / "manifest.json").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    words = [word.replace("until: 70%", "until: 13") for word in flags(folder, *in_phases(data))]
    config = parse(PretrainConfig, words, prog="pretrain.py")
    assert config is not None
    with pytest.raises(ConfigError, match=r"has done 10 steps, and phase 2, which has begun, is changed: end was 14 and is 13; restore it"):
        run(config)


def test_phases_end_at_their_steps_while_the_batch_grows(one: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The first phase is four steps of 4 sequences and three of 6."""
    from megatron_instruct.training.trace import TraceConfig
    from megatron_instruct.training.trace import run as trace

    printed = []
    for steps in (range(1, 8), range(8, 15)):
        trace(TraceConfig(save=one["phases growing"], iterations=tuple(steps)))
        printed.append(capsys.readouterr().out)
    assert [text.count(f"(phase {number}, ") for number, text in enumerate(printed, start=1)] == [4 * 4 + 3 * 6, 7 * 8]
    first, second = ({line for line in text.splitlines() if line.startswith("  ")} for text in printed)
    assert len(first) >= 4 * 4 + 3 * 6
    assert not first & second, "the second phase goes on where the first stopped"


def test_a_step_names_its_phase_and_its_documents(
    one: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And finds a run's indices after a commit in the folder that one works in, which megatron-core names in its version."""
    import megatron.core

    from megatron_instruct.training.trace import TraceConfig
    from megatron_instruct.training.trace import run as trace

    monkeypatch.setattr(megatron.core, "__version__", "0.19.2+another")
    trace(TraceConfig(save=one["phases"], iterations=(7, 8, 20)))
    printed = capsys.readouterr().out
    assert "step 7 (phase 1, steps 1 to 7), sample 0:" in printed
    assert "step 8 (phase 2, steps 8 to 14), sample 7:" in printed
    assert "step 20 (phase 3, steps 15 to 20), sample 0:" in printed
