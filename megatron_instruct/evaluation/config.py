"""Settings of tools/evaluate.py and tools/make_evaluation_task.py."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.evaluation.questions import Style


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model in a Hugging Face folder: tasks of lm-eval, and perplexity on held-out documents.

    Writes results.json, samples.jsonl and manifest.json to OUTPUT_DIR. Killed at any moment and started again, it goes on from the
    tasks that are finished. --compare prints a comparison with an earlier result.
    """

    model: Path
    """Hugging Face folder with config.json, safetensors and tokenizer.json, as convert_checkpoint.py writes it."""
    output_dir: Path
    """Folder for the results."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, groups or tags; those of include_path as well."""
    include_path: tuple[Path, ...] = ()
    """Folders with tasks of your own, such as make_evaluation_task.py writes. Local tasks need no network."""
    num_fewshot: int | None = None
    """Solved examples shown before each question (default: what the task says)."""
    perplexity_data: tuple[str, ...] = ()
    """Held-out documents: files, folders or patterns of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt."""
    text_key: str = "text"
    """Key of the text in perplexity_data."""
    document_start: Literal["bos", "eod"] | None = None
    """Token that each document of perplexity_data is scored after (default: bos where the tokenizer puts it before a text by itself;
    else eod, which is what stands before a document in a data set of preprocess_data.py)."""
    seq_length: int | None = None
    """Longest sequence given to the model, in tokens (default: what its config allows, at most 4096)."""
    stride: int | None = None
    """Tokens by which the window moves in a document longer than seq_length (default: half of seq_length)."""
    limit: int | None = None
    """Questions of each task, and documents, at most: the first ones; for a trial."""
    batch_size: int = 8
    """Sequences scored at once. It changes the result in the last digits only."""
    backend: Literal["hf", "vllm"] = "hf"
    """What runs the tasks of lm-eval: transformers or vLLM. Perplexity is always computed with transformers."""
    device: str | None = None
    """Device of backend hf, such as cpu or cuda:0 (default: cuda where there is one)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision (default: float32 on the CPU, bfloat16 elsewhere)."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along."""
    compare: Path | None = None
    """OUTPUT_DIR of another model evaluated on the same questions: print how this one differs from it."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.perplexity_data:
            raise ConfigError("there is nothing to do: give --tasks, --perplexity-data or both.")
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks={' '.join(self.tasks)!r} names a task twice.")
        if PERPLEXITY in self.tasks:
            raise ConfigError(f"tasks: {PERPLEXITY!r} is no task of lm-eval; give the documents with --perplexity-data.")
        for name in ("limit", "batch_size", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot} must be at least 0.")
        if self.seq_length is not None and self.seq_length < 2:
            raise ConfigError(f"seq_length={self.seq_length} must be at least 2.")
        if self.stride is not None and self.seq_length is not None and self.stride > self.seq_length:
            raise ConfigError(f"stride={self.stride} is above seq_length={self.seq_length}: tokens would be left out.")


PERPLEXITY = "perplexity"
"""Name of the perplexity in results, beside the names of tasks."""


@dataclass(frozen=True, kw_only=True)
class MakeTaskConfig:
    """Make a multiple-choice task for lm-eval out of held-out documents; no labels are needed.

    Writes NAME.yaml, NAME.jsonl, rejects.jsonl and manifest.json to OUTPUT_DIR, which evaluate.py takes as --include-path.
    """

    input: tuple[str, ...]
    """Held-out documents: files, folders or patterns of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt."""
    output_dir: Path
    """Folder for the task."""
    name: str
    """Name of the task: letters, digits and underscores."""
    style: Style = "continuation"
    """continuation: which passage continues this beginning? definition: which headword belongs to this text? (needs title_key)."""
    choices: int = 4
    """Choices of each question."""
    max_questions: int | None = None
    """Questions at most; which, is drawn from the seed (default: one for every document that allows it)."""
    text_key: str = "text"
    """Key of the text."""
    title_key: str = "title"
    """Key of the headword, for definitions."""
    seed: int = 1234
    """Seed of all draws."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise ConfigError(f"name={self.name!r} must consist of letters, digits and underscores; it names a task and its files.")
        if self.choices < 2:
            raise ConfigError(f"choices={self.choices} must be at least 2.")
        if self.max_questions is not None and self.max_questions < 1:
            raise ConfigError(f"max_questions={self.max_questions} must be at least 1.")
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
