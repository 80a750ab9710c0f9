"""The log: one line an interval, metrics.jsonl without duplicates after a resume, TensorBoard event files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_instruct.errors import ConfigError, InputError, MissingPackageError
from megatron_instruct.training.metrics import Metrics, RunSize
from megatron_instruct.training.settings.watching import WatchOptions

from .conftest import CONTEXT, INTERLEAVED, SEQUENCE, Runs
from .test_bad_input import start

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = RunSize(train_iters=10, tokens_per_iteration=100, flops_per_token=1e3, peak_flops=1e9, devices=4, peak_memory=lambda: 3 << 29)


def metrics(folder: Path, *, start: int = 0, tensorboard: Path | None = None, writes: bool = True) -> Metrics:
    return Metrics(folder, SIZE, start_iteration=start, tensorboard_dir=tensorboard, writes=writes)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fill(folder: Path, *, start: int, end: int) -> None:
    with metrics(folder, start=start) as log:
        if start == 0:
            log.evaluation("validation", 0, 9.0)
        for iteration in range(start + 1, end + 1):
            log.training(iteration, loss=1.0 / iteration, lr=0.1, grad_norm=2.0)
            if iteration % 2 == 0:
                log.evaluation("validation", iteration, 3.0)


def test_a_line_says_loss_rate_share_of_peak_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path) as log:
        log.restart_clock(2)
        log.training(4, loss=1.25, lr=0.1, grad_norm=2.0)
    out = capsys.readouterr().out
    for part in (
        "iteration  4/10",
        "loss 1.2500",
        "lr 1.000e-01",
        "grad norm 2.000",
        "tokens/s",
        "TFLOP/s (",
        "of peak)",
        "| 1.5 GiB |",
        "left",
    ):
        assert part in out
    (row,) = rows(tmp_path)
    assert row["tokens"] == 400
    assert row["tokens_per_second"] == pytest.approx(2 * 100 / row["seconds"])
    assert row["tflops"] == pytest.approx(row["tokens_per_second"] * 1e3 / 4 / 1e12)
    assert row["memory"] == 3 << 29
    assert row["peak_fraction"] == pytest.approx(row["tokens_per_second"] * 1e3 / 1e9)


def test_a_resumed_run_repeats_no_row_and_loses_none(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=7)
    fill(tmp_path, start=4, end=10)
    assert [row["iteration"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 11))
    assert [row["iteration"] for row in rows(tmp_path) if "validation_loss" in row] == [0, 2, 4, 6, 8, 10]


def test_a_run_from_the_beginning_drops_what_an_interrupted_one_wrote(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=3)
    fill(tmp_path, start=0, end=2)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2, 2]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=4)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 5, "lo')
    fill(tmp_path, start=4, end=5)
    assert [row["iteration"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5]


def test_what_the_model_wrote_outlives_a_resume_whatever_separators_it_holds(tmp_path: Path) -> None:
    with metrics(tmp_path) as log:
        log.samples(2, ["a prompt"], ["one\u2028two\x85three"])
        log.samples(4, ["a prompt"], ["four"])
    with metrics(tmp_path, start=4):
        pass
    with open(tmp_path / "samples.jsonl", encoding="utf-8") as stream:
        assert [json.loads(line)["text"] for line in stream] == ["one\u2028two\x85three", "four"]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path, writes=False) as log:
        log.training(1, loss=1.0, lr=0.1, grad_norm=1.0)
        log.evaluation("validation", 1, 2.0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metrics(tmp_path, tensorboard=tmp_path / "events") as log:
        log.training(1, loss=1.5, lr=0.1, grad_norm=2.0)
        log.evaluation("validation", 1, 3.5)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "validation_loss"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5)]


def test_validation_says_the_loss_of_each_data_set_of_a_blend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metrics(tmp_path, tensorboard=tmp_path / "events") as log:
        log.evaluation("validation", 3, 2.0, {"web": 1.5, "books": 3.0})
    assert rows(tmp_path) == [{"iteration": 3, "validation_loss": 2.0, "validation_loss_of": {"web": 1.5, "books": 3.0}}]
    assert "validation after iteration 3 | loss 2.0000 | web 1.5000 | books 3.0000" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.value for event in events.Scalars("validation_loss_of/books")] == [3.0]


@pytest.mark.slow
def test_the_loss_of_each_data_set_adds_up_to_the_whole_and_is_the_same_in_every_layout(
    one: dict[str, Path], more: dict[str, Path]
) -> None:
    whole, shared = ([row for row in rows(folder["blend"]) if "validation_loss" in row] for folder in (one, more))
    assert len(whole) == 3
    for row, other in zip(whole, shared, strict=True):
        parts = row["validation_loss_of"]
        assert set(parts) == {"0 jargon_text_document", "1 jargon_text_document"}
        low, high = sorted(parts.values())
        assert low < row["validation_loss"] < high
        share = (row["validation_loss"] - parts["1 jargon_text_document"]) / (
            parts["0 jargon_text_document"] - parts["1 jargon_text_document"]
        )
        assert share * 16 == pytest.approx(round(share * 16), abs=1e-3), "16 sequences, a whole number of them of the first data set"
        assert other["validation_loss_of"] == pytest.approx(parts, abs=1e-5)
    assert "validation_loss_of" not in json.dumps(rows(one["reference"]))


def samples(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sampled(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs whose model goes on with prompts at the beginning, after two steps and at the end, in several layouts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("A hacker is\nThe bug that\n\nIn\n")
    more = ("--sample-prompts", path, "--sample-interval", 2, "--sample-tokens", 4, "--train-iters", 4, "--lr-warmup-iters", 1)
    layouts = {"sequence parallel": SEQUENCE, "interleaved": INTERLEAVED, "context": CONTEXT, "data": ()}
    return runs(1, {"one": more}, {}) | runs(2, {name: (*layout, *more) for name, layout in layouts.items()}, {})


@pytest.mark.slow
def test_samples_are_written_at_intervals_and_are_the_same_in_every_layout(sampled: dict[str, Path]) -> None:
    reference = samples(sampled["one"])
    prompts = ["A hacker is", "The bug that", "In"]
    assert [(row["iteration"], row["prompt"]) for row in reference] == [(step, text) for step in (0, 2, 4) for text in prompts]
    for name, folder in sampled.items():
        assert samples(folder) == reference, name


@pytest.mark.slow
def test_a_sample_is_what_transformers_would_write_greedily(sampled: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_instruct.conversion.config import ConvertConfig
    from megatron_instruct.conversion.run import run as convert
    from megatron_instruct.tokenizer import load_tokenizer

    convert(ConvertConfig(load=sampled["one"], save=tmp_path / "hf", prove=False))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load_tokenizer(tokenizer_folder)
    for row in samples(sampled["one"])[-3:]:
        (ids,) = tokenizer.encode_batch([str(row["prompt"])])
        written = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=tokenizer.eod, pad_token_id=0)[0]
        continued = [token for token in written[len(ids) :].tolist() if token != tokenizer.eod]
        assert row["text"] == tokenizer.decode(continued)


def test_prompts_that_are_missing_empty_or_too_long_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    from megatron_instruct.tokenizer import load_tokenizer
    from megatron_instruct.training.samples import read_prompts

    path, tokenizer = tmp_path / "prompts.txt", load_tokenizer(tokenizer_folder)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(path, tokenizer, new_tokens=4, positions=64)
    path.write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path, tokenizer, new_tokens=4, positions=64)
    path.write_text("word " * 100)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and with sample_tokens=4 it is longer than the model's 64 positions"):
        read_prompts(path, tokenizer, new_tokens=4, positions=64)


def test_wandb_that_is_not_installed_is_told_before_anything_is_made(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="--wandb-project needs the package wandb"):
        start(flags(tmp_path / "save", "--wandb-project", "test"))
    assert not (tmp_path / "save").exists()


def test_wandb_that_is_not_installed_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"--wandb-project needs the package wandb; install it with: pip"):
        Metrics(tmp_path, SIZE, start_iteration=0, tensorboard_dir=None, writes=True, watch=WatchOptions(wandb_project="test"))


def test_wandb_offline_keeps_what_is_logged_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional package: pip install wandb")
    watch = WatchOptions(wandb_project="test", wandb_mode="offline")
    for begin in (0, 2):  # a resumed run is the same one
        with Metrics(tmp_path, SIZE, start_iteration=begin, tensorboard_dir=None, writes=True, watch=watch, settings={"lr": 0.1}) as log:
            log.training(begin + 1, loss=1.5, lr=0.1, grad_norm=2.0)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len({folder.name.split("-")[3] for folder in folders}) == 1  # offline-run-TIME-ID, and -1 behind it in the same second
    assert list(folders[0].glob("*.wandb"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_interval": 5}, "go together"),
        ({"sample_prompts": Path("p"), "sample_interval": 0}, "sample_interval=0 must be at least 1"),
        ({"wandb_mode": "offline"}, "need wandb_project"),
    ],
)
def test_settings_of_watching_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WatchOptions(**settings)  # type: ignore[arg-type]
