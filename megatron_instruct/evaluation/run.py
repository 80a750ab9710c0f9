"""A model in a Hugging Face folder -> results.json, samples.jsonl, manifest.json.

Each task, and the perplexity, is kept in OUTPUT_DIR.parts as soon as it is finished; the folder is removed when all is done.
Comes in: the model folder, task folders, held-out documents. Does not know: how the model was made.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import find_files, require_outside
from megatron_instruct.errors import ConfigError, InputError, MissingPackageError
from megatron_instruct.evaluation.comparison import compare, comparison_table
from megatron_instruct.evaluation.config import PERPLEXITY, EvaluateConfig
from megatron_instruct.evaluation.documents import read_documents
from megatron_instruct.evaluation.harness import check_backend, check_include_path, find_tasks, load_hf, load_vllm, run_task
from megatron_instruct.evaluation.perplexity import document_nll, perplexity_results, windows_of
from megatron_instruct.evaluation.questions import Document
from megatron_instruct.evaluation.results import RESULTS, SAMPLES, STAGE, Results, read_results, results_from_json, table
from megatron_instruct.files import atomic_write, locked, read_json, write_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, read_manifest, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megatron_instruct.workspace import remove, take_up

_LONGEST_DEFAULT = 4096
"""Tokens: above it, a sequence length is used only when asked for, since logits of long sequences fill the memory."""

_TASK = "task-{}.json"
"""Name of the part of a task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The settings with all defaults resolved."""

    seq_length: int
    stride: int
    dtype: str
    device: str
    start: int
    """Id of the token that documents are scored after."""
    start_name: str


def run(config: EvaluateConfig) -> Results:
    """Do the stage and return what it found."""
    tokenizer, model_config = _check_model(config.model)
    if config.tasks:
        check_backend(config.backend)
        check_include_path(config.include_path)
    plan = _plan(config, tokenizer, model_config)
    require_outside((*config.perplexity_data, *map(str, config.include_path)), config.output_dir, [SAMPLES])
    files = find_files(config.perplexity_data) if config.perplexity_data else []
    inputs = records([*_model_files(config), *config.include_path, *files])
    settings = _settings(config, plan)
    manifest_file = config.output_dir / "manifest.json"
    other = read_results(config.compare) if config.compare else None
    if (done := finished(manifest_file, stage=STAGE, settings=settings, inputs=inputs)) is not None:
        print(f"Finished already: {config.output_dir}.")
        results = read_results(config.output_dir)
    else:
        results, done = _evaluate(config, plan, tokenizer, files, settings, inputs)
    print(table(results, done))
    if other is not None and config.compare is not None:
        print(comparison_table(compare(other, results), name_a=str(config.compare), name_b=str(config.output_dir)))
        if differing := _differing(read_manifest(config.compare / "manifest.json", stage=STAGE).settings, settings):
            print(f"evaluated with other settings, of which the difference may be (a / b): {differing}")
    return results


def _check_model(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Check, before anything heavy is loaded, that the folder holds a model and the tokenizer that goes with it."""
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such folder; give a Hugging Face folder, such as convert_checkpoint.py writes.")
    if not (folder / "config.json").is_file():
        raise InputError(f"model {folder} has no config.json; give a Hugging Face folder, such as convert_checkpoint.py writes.")
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"model {folder} has no tokenizer.json; copy the tokenizer's files into it. "
            "A bare sentencepiece .model is not taken: transformers 5 reads wrong ids from it."
        )
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"model {folder} has no .safetensors file; export the model again.")
    content = read_json(folder / "config.json")
    if not isinstance(content, dict):
        raise InputError(f"{folder / 'config.json'} is not a JSON object; export the model again.")
    tokenizer = load_tokenizer(folder)
    size = content.get("vocab_size")
    if isinstance(size, int) and tokenizer.vocab_size > size:
        raise InputError(
            f"model {folder}: the tokenizer has {tokenizer.vocab_size:,} ids and the model {size:,}; they do not belong together."
        )
    return tokenizer, content


def _model_files(config: EvaluateConfig) -> list[Path]:
    names = {"config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
    suffixes = {".safetensors", ".py"} if config.trust_remote_code else {".safetensors"}
    return [file for file in sorted(config.model.iterdir()) if file.name in names or file.suffix in suffixes]


def _plan(config: EvaluateConfig, tokenizer: Tokenizer, model_config: dict[str, Any]) -> _Plan:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("torch and transformers", extra="eval", purpose="evaluation") from error
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device}, but torch finds no CUDA device here; use device=cpu.")
    longest = model_config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 1 else None  # transformers judges what else it is
    seq_length = config.seq_length or min(longest or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    if longest is not None and seq_length > longest:
        raise ConfigError(f"seq_length={seq_length} is above the {longest} positions that {config.model} was made for.")
    stride = config.stride or max(seq_length // 2, 1)
    if stride >= seq_length:
        raise ConfigError(f"stride={stride} must be below seq_length={seq_length}: each window needs a token of the one before it.")
    start_name = config.document_start or ("bos" if _starts_with_bos(config.model, tokenizer) else "eod")
    start = tokenizer.eod if start_name == "eod" else tokenizer.bos
    if start is None:
        raise ConfigError(f"document_start=bos, but the tokenizer of {config.model} has no BOS token; use document_start=eod.")
    dtype = config.dtype or ("float32" if device == "cpu" else "bfloat16")
    return _Plan(seq_length=seq_length, stride=stride, dtype=dtype, device=device, start=start, start_name=start_name)


def _starts_with_bos(folder: Path, tokenizer: Tokenizer) -> bool:
    """Say whether the tokenizer puts BOS before a text by itself."""
    import tokenizers

    ids: list[int] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return tokenizer.bos is not None and ids[:1] == [tokenizer.bos]


def _settings(config: EvaluateConfig, plan: _Plan) -> dict[str, Any]:
    """Return what decides the result; batch size and device change the last digits only."""
    return {
        "tasks": list(config.tasks),
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "backend": config.backend,
        "dtype": plan.dtype,
        "seq_length": plan.seq_length,
        "perplexity": bool(config.perplexity_data),
        "stride": plan.stride,
        "document_start": plan.start_name,
        "text_key": config.text_key,
        "trust_remote_code": config.trust_remote_code,
    }


def _differing(settings_a: Mapping[str, Any], settings_b: Mapping[str, Any]) -> str:
    """Name the settings that change the values of the same questions, where they differ."""
    names = ("num_fewshot", "seq_length", "stride", "document_start", "dtype", "backend")
    return ", ".join(f"{name} {settings_a.get(name)} / {settings_b[name]}" for name in names if settings_a.get(name) != settings_b[name])


def _evaluate(
    config: EvaluateConfig,
    plan: _Plan,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    settings: dict[str, Any],
    inputs: tuple[FileRecord, ...],
) -> tuple[Results, Manifest]:
    documents = _documents(config, files)
    manager = find_tasks(config.tasks, config.include_path, num_fewshot=config.num_fewshot) if config.tasks else None
    parts = config.output_dir.with_name(config.output_dir.name + ".parts")
    outputs = [config.output_dir / name for name in (RESULTS, SAMPLES)]
    made_of = {"settings": settings, "inputs": [item.sha256 for item in inputs]}
    with locked(parts):
        if (done := finished(config.output_dir / "manifest.json", stage=STAGE, settings=settings, inputs=inputs)) is not None:
            remove(parts)  # another run has ended meanwhile
            return read_results(config.output_dir), done
        take_up(parts, made_of, outputs=outputs, dear=any(parts.glob(f"{PERPLEXITY}.json")) or any(parts.glob(_TASK.format("*"))))
        models = _Models(config, plan)
        results, shots = Results(metrics=(), samples=()), dict[str, int]()
        if documents:
            part = _part(parts / f"{PERPLEXITY}.json", lambda: (_perplexity(config, plan, tokenizer, documents, models.hf()), {}))
            results += part[0]
        for name in config.tasks:
            print(f"Task {name}.")
            run_one = partial(_task, name, manager, models, num_fewshot=config.num_fewshot, limit=config.limit)
            part = _part(parts / _TASK.format(name), run_one)
            results += part[0]
            shots |= part[1]
        manifest = _write(config, results, shots, settings, inputs)
        remove(parts)
    return results, manifest


def _task(name: str, manager: Any, models: "_Models", *, num_fewshot: int | None, limit: int | None) -> tuple[Results, dict[str, int]]:
    return run_task(name, manager, models.harness(), num_fewshot=num_fewshot, limit=limit)


class _Models:
    """The model, loaded when it is first needed: a run that goes on from finished parts may not need it."""

    def __init__(self, config: EvaluateConfig, plan: _Plan) -> None:
        self._config, self._plan = config, plan
        self._hf: Any = None
        self._harness: Any = None

    def hf(self) -> Any:
        if self._hf is None:
            self._hf = _load(self._config, self._plan)
        return self._hf

    def harness(self) -> Any:
        if self._harness is None:
            config, plan = self._config, self._plan
            if config.backend == "vllm":
                self._harness = load_vllm(
                    config.model,
                    batch_size=config.batch_size,
                    seq_length=plan.seq_length,
                    dtype=plan.dtype,
                    trust_remote_code=config.trust_remote_code,
                )
            else:
                import transformers

                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    config.model, local_files_only=True, trust_remote_code=config.trust_remote_code
                )
                self._harness = load_hf(self.hf(), tokenizer, batch_size=config.batch_size, seq_length=plan.seq_length)
        return self._harness


def _load(config: EvaluateConfig, plan: _Plan) -> Any:
    """Load the model. Raises InputError where transformers cannot, or where it would make up a weight, of which it only warns."""
    import safetensors
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    print(f"Loading {config.model} ({plan.dtype}, {plan.device}).")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=getattr(torch, plan.dtype),
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, TypeError, OSError, KeyError, RuntimeError, safetensors.SafetensorError, StrictDataclassError) as error:
        raise InputError(f"transformers cannot load {config.model}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise InputError(f"model {config.model} lacks {names}, which transformers would make up at random; export the model again.")
    return model.to(plan.device).eval()


def _part(path: Path, make: Callable[[], tuple[Results, dict[str, int]]]) -> tuple[Results, dict[str, int]]:
    """Take a finished part, or make and keep it."""
    if path.is_file():
        content = read_json(path)
        print(f"  {path.stem} is finished already.")
        return results_from_json(content["metrics"], content["samples"], where=str(path)), content["shots"]
    results, shots = make()
    write_json(path, {"metrics": results.metrics_json(), "samples": results.samples_json(), "shots": shots})
    return results, shots


def _documents(config: EvaluateConfig, files: Sequence[Path]) -> list[Document]:
    """Read the held-out documents; the first that cannot be read stops the run."""
    documents, broken = read_documents(files, text_key=config.text_key)
    if broken:
        raise InputError(
            f"{broken[0].where}: {broken[0].reason} ({broken[0].detail}); mend or remove it: a figure must not hide a document."
        )
    if files and not documents:
        raise InputError(f"perplexity_data {' '.join(config.perplexity_data)} holds no document.")
    return documents[: config.limit]


def _perplexity(config: EvaluateConfig, plan: _Plan, tokenizer: Tokenizer, documents: Sequence[Document], model: Any) -> Results:
    tokens = tokenizer.encode_batch([document.text for document in documents])
    sequences = [[plan.start, *ids] for ids in tokens]
    lengths = {"seq_length": plan.seq_length, "stride": plan.stride}
    total = sum(len(windows_of(0, len(sequence), **lengths)) for sequence in sequences)
    with Progress(PERPLEXITY, total=total, unit="sequences") as progress:
        nll = document_nll(sequences, model, batch_size=config.batch_size, report=progress.add, **lengths)
    return perplexity_results(
        [document.id for document in documents], [document.text for document in documents], [len(ids) for ids in tokens], nll
    )


def _write(
    config: EvaluateConfig, results: Results, shots: dict[str, int], settings: dict[str, Any], inputs: tuple[FileRecord, ...]
) -> Manifest:
    results_file, samples_file = config.output_dir / RESULTS, config.output_dir / SAMPLES
    write_json(results_file, {"metrics": results.metrics_json(), "num_fewshot": shots})
    with atomic_write(samples_file) as stream:
        stream.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in results.samples_json())
    documents = [sample for sample in results.samples if sample.task == PERPLEXITY]
    manifest = Manifest(
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        outputs=records([results_file, samples_file], relative_to=config.output_dir),
        counts={
            "documents": len(documents),
            "tokens": int(sum(sample.values["tokens"] for sample in documents)),
            "questions": len(results.samples) - len(documents),
        },
    )
    write_manifest(config.output_dir / "manifest.json", manifest)
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(EvaluateConfig, run, argv, prog="evaluate.py")
