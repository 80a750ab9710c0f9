"""Settings of tools/prepare_synthesizer_data.py and tools/make_synthesizer_questions.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Write context-based task data as documents to tune an instruction synthesizer on.

    Writes OUTPUT_DIR/documents/DATA_SET.jsonl with the role of every character, for preprocess_data.py with --prepend-bos --append-eod
    --pack-sequence-length, one data set at a time, so that a sequence holds examples of one data set; rejects.jsonl; manifest.json.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns of rows with context, QA_list and rc_name: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow."""
    output_dir: Path
    """Folder of the result."""
    tokenizer_model: Path
    """Tokenizer of the model that is tuned: folder or file."""
    prompt_format: str = "instruction-synthesizer"
    """Prompt format that the synthesizer is tuned in, by name, or a .yaml file; of kind markers."""
    seq_length: int = 4096
    """Tokens of a sequence; an example is never longer."""
    max_examples: int = 10_000
    """Examples of one data set, at most; drawn by the seed where it has more."""
    long_contexts: Literal["cut", "reject"] = "cut"
    """What to do with an example that is longer than a sequence: cut its context, or set it aside."""
    seed: int = 0
    """Decides which examples are drawn."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a row that cannot be read: stop and name it, or set it aside."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        for name, least in (("seq_length", 16), ("max_examples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Write the texts that an instruction synthesizer is evaluated on, for synthesize.py with --question-key question --pairs-key pairs.

    Writes OUTPUT_DIR/texts.jsonl: for each context one text to write pairs for, and one for each of its questions to answer, with the gold
    pairs beside them and, with shots, the examples that are shown before them; and manifest.json, which names the rounds to pass.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns of rows with context, QA_list and rc_name."""
    output_dir: Path
    """Folder of the result."""
    shots: int = 0
    """Examples of the same data set with their gold pairs that are shown before each text; they are not evaluated."""
    contexts: int = 100
    """Contexts of one data set, at most."""
    questions: int = 3
    """Questions of one context, at most; 0 asks for pairs alone."""
    held_out: tuple[str, ...] = ()
    """Data sets that the synthesizer never saw; kept for the table."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a row that cannot be read: stop and name it, or leave it out."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        for name, least in (("shots", 0), ("contexts", 1), ("questions", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}.")
