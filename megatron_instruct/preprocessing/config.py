"""Settings of tools/preprocess_data.py. Names and meanings are those of Megatron's preprocess_data.py where it has the setting."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError

TokenizerType = Literal["HuggingFaceTokenizer", "GPTSentencePieceTokenizer"]


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Encode a corpus, or the instruction-augmented texts of render_templates.py, into a Megatron indexed data set.

    Writes OUTPUT_PREFIX_KEY_document.bin, .idx, .rejects.jsonl and .manifest.json for each JSON key. Killed at any moment and
    started again, it goes on from the parts that are finished, and ends with the same bytes.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt; encoded in this order."""
    output_prefix: Path
    """Path and beginning of the names of the output files."""
    tokenizer_model: Path
    """Tokenizer: a Hugging Face folder with tokenizer.json, or a sentencepiece .model file."""
    tokenizer_type: TokenizerType | None = None
    """Kind that tokenizer_model must be (default: whichever it is)."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys whose text is encoded; each becomes a data set of its own."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a document that cannot be read: stop and name it, or set it aside in the rejects file."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that encode (default: one a core). The result does not depend on it."""
    partitions: int | None = None
    """Parts that the work is divided into; a finished one is not done again (default: about 64, each of 1 to 64 MB).
    The result does not depend on it."""
    log_interval: int = 1000
    """Documents between two updates of the progress display, per worker."""

    def __post_init__(self) -> None:
        for name in ("workers", "partitions", "log_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"json_keys={' '.join(self.json_keys)!r} must name at least one key, and each once.")
        for key in self.json_keys:
            if not key or "/" in key or "\0" in key:
                raise ConfigError(f"json_keys: {key!r} becomes part of a file name; it must not be empty or hold a slash.")
        if self.output_prefix.name in ("", ".."):
            raise ConfigError(f"output_prefix={self.output_prefix} names a folder; add the beginning of a file name, such as out/corpus.")

    def prefix(self, key: str) -> Path:
        """Return the prefix of the data set of one JSON key, as --data-path takes it."""
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_document")
