"""Settings of tools/preprocess_data.py. Names and meanings are those of Megatron's preprocess_data.py where it has the setting."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.shares import parse_share
from megatron_instruct.tokenizer.fast_proof import FastChoice

TokenizerType = Literal["HuggingFaceTokenizer", "GPTSentencePieceTokenizer", "TikTokenizer"]


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Encode a corpus into a Megatron indexed data set: plain documents, examples with pairs (rendered on the way), or rendered ones.

    Writes OUTPUT_PREFIX_KEY_document.bin, .idx, .rejects.jsonl and .manifest.json for each JSON key, and .roles where documents have
    roles. Killed at any moment and started again, it goes on from the parts that are finished, and ends with the same bytes.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt, and data sets that datasets saved;
    encoded in this order. Plain documents, examples of synthesize.py and documents of render_templates.py may be mixed: each record's
    keys say what it is."""
    output_prefix: Path
    """Path and beginning of the names of the output files."""
    tokenizer_model: Path
    """Tokenizer: a Hugging Face folder with tokenizer.json, a sentencepiece .model file, or a tiktoken or tekken file."""
    tokenizer_type: TokenizerType | None = None
    """Kind that tokenizer_model must be (default: whichever it is)."""
    fast_tokenizer: FastChoice = "auto"
    """gigatoken in the place of the tokenizer's own library, once it made the same tokens of a sample of the input: auto says so and does
    without where it is not installed or does not agree; gigatoken insists; none does without. The result does not depend on it."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys whose text is encoded; each becomes a data set of its own. Examples with pairs and rendered documents need "text" alone."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    prepend_bos: bool = False
    """Begin each document with the tokenizer's BOS token, as prompts of the instruction synthesizer do; its role is context."""
    split_sentences: bool = False
    """Make each sentence a sequence of its own; the data set is then named OUTPUT_PREFIX_KEY_sentence."""
    lang: str = "english"
    """Language whose sentences are split, such as german or chinese."""

    seed: int = 1234
    """Whole number that, with an example's id, decides what is drawn for it when it is rendered."""
    language: str | None = None
    """Language of the template bank that comes with the package: en or zh (default: en)."""
    bank: Path | None = None
    """YAML file of a template bank of your own, used instead; see docs/templates.md."""
    extend_bank: Path | None = None
    """YAML file whose templates and probabilities are added to the bank."""

    min_document_tokens: int | None = None
    """Documents of fewer tokens, without an end-of-document token, are set aside in the rejects file."""
    max_document_tokens: int | None = None
    """Documents of more tokens, without an end-of-document token, are treated as long_documents says."""
    long_documents: Literal["split", "reject"] = "split"
    """Above max_document_tokens: split into the fewest documents that fit, of nearly equal length, or reject."""
    shuffle_seed: int | None = None
    """Whole number that decides an order in which the documents are written (default: the order of the input)."""
    pack_sequence_length: int | None = None
    """Pack documents by best fit into sequences of exactly so many tokens, for training with this --seq-length. Only longer documents
    are cut; what is left of a sequence is filled with the end-of-document token."""

    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a document that cannot be read: stop and name it, or set it aside in the rejects file."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that encode (default: one a core). The result does not depend on it."""
    executor: Literal["local", "ray"] = "local"
    """Where parts are encoded: in processes of this machine, or on a Ray cluster, whose machines share a file system."""
    ray_address: str | None = None
    """Address of the Ray cluster (default: RAY_ADDRESS, else one is started on this machine's cores)."""
    share: str | None = None
    """I/N: encode every N-th part from the I-th, beside runs of the other shares; a last run without it merges."""
    partitions: int | None = None
    """Parts that the work is divided into; a finished one is not done again (default: about 64, but each of 4 to 64 MiB).
    The result does not depend on it."""
    log_interval: int = 1000
    """Documents between two updates of the progress display, per worker."""

    def __post_init__(self) -> None:
        for name in ("workers", "partitions", "log_interval", "min_document_tokens", "max_document_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("pack_sequence_length", self.pack_sequence_length, 2)
        _at_least("shuffle_seed", self.shuffle_seed, 0)
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        if self.output_prefix.name in ("", ".."):
            raise ConfigError(f"output_prefix={self.output_prefix} names a folder; add the beginning of a file name, such as out/corpus.")
        parse_share(self.share)
        if self.ray_address is not None and self.executor != "ray":
            raise ConfigError(f"ray_address={self.ray_address} needs executor=ray; set it, or drop the address.")
        if self.bank is not None and self.language is not None:
            raise ConfigError(f"language={self.language} and bank={self.bank}: a bank has its own language; give one of the two.")
        self._check_keys()
        self._check_sequences()

    def _check_keys(self) -> None:
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"json_keys={' '.join(self.json_keys)!r} must name at least one key, and each once.")
        for key in self.json_keys:
            if not key or "/" in key or "\0" in key:
                raise ConfigError(f"json_keys: {key!r} becomes part of a file name; it must not be empty or hold a slash.")

    def _check_sequences(self) -> None:
        low, high = self.min_document_tokens, self.max_document_tokens
        if low is not None and high is not None and low > high:
            raise ConfigError(f"min_document_tokens={low} is above max_document_tokens={high}: no document would be left.")
        if self.long_documents == "reject" and high is None:
            raise ConfigError("long_documents=reject needs max_document_tokens, which says what is long; add it.")
        if self.lang != "english" and not self.split_sentences:
            raise ConfigError(f"lang={self.lang} is that of sentences to be split; add --split-sentences, or leave lang out.")
        if self.split_sentences and self.pack_sequence_length is not None:
            raise ConfigError("split_sentences makes a sequence of each sentence, pack_sequence_length of many documents; give one.")
        if self.split_sentences and high is not None and self.long_documents == "split":
            raise ConfigError("max_document_tokens with split_sentences would cut sentences; add --long-documents reject.")

    def prefix(self, key: str) -> Path:
        """Return the prefix of the data set of one JSON key, as --data-path takes it."""
        level = "sentence" if self.split_sentences else "document"
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_{level}")

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the result for every input, as the manifest keeps them."""
        return {
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            **({"prepend_bos": True} if self.prepend_bos else {}),
            "split_sentences": self.lang if self.split_sentences else None,
            "min_document_tokens": self.min_document_tokens,
            "max_document_tokens": self.max_document_tokens,
            "long_documents": self.long_documents if self.max_document_tokens is not None else None,
            "shuffle_seed": self.shuffle_seed,
            "pack_sequence_length": self.pack_sequence_length,
            "on_error": self.on_error,
        }


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} must be at least {least}.")
