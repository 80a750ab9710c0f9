"""Settings of tools/synthesize.py. Names of inference settings are those of vLLM."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.synthesis.filters import FilterSettings


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """How vLLM uses the machine. Of no effect on what is asked of it."""

    tensor_parallel_size: int = 1
    """GPUs that one model is divided over."""
    gpu_memory_utilization: float | None = None
    """Share of the memory that vLLM may use (default: 0.9 on GPU, 0.3 on CPU)."""
    max_num_seqs: int | None = None
    """Texts in work at once (default: vLLM's own)."""
    kv_cache_gib: int = 2
    """GiB for the KV cache on CPU."""
    threads: int | None = None
    """Threads on CPU (default: vLLM binds one to each core)."""
    enforce_eager: bool = False
    """Skip CUDA graphs: starts sooner, generates slower. Always so on CPU."""


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Let a language model write instruction-response pairs for raw texts, and gather them in M-shot examples.

    Writes OUTPUT_DIR/examples.jsonl (one M-shot example a line), rejects.jsonl and manifest.json. Killed at any moment and started again,
    it goes on from the shards that are finished.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns of raw texts: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""
    output_dir: Path
    """Folder of the result."""
    model: Path
    """Synthesizer: a folder in Hugging Face form."""
    tokenizer: Path | None = None
    """Its tokenizer: folder (default: the model's)."""
    revision: str | None = None
    """Name of the synthesizer's version, kept with every pair (default: the beginning of its fingerprint)."""
    prompt_format: str = "instruction-synthesizer"
    """Prompt format by name (instruction-synthesizer, chat, chat-extractive), or a .yaml file of your own."""
    text_key: str = "text"
    """JSON key of the text."""
    id_key: str = "id"
    """JSON key of the text's id; a text without is named by its file and line."""
    limit: int | None = None
    """Take so many texts from the beginning of the input (default: all)."""
    rounds: int = 2
    """M: texts in the longest chain, each written with the earlier ones shown (2 for general corpora, 3 for domains)."""
    max_new_tokens: int = 400
    """Tokens generated for a text, at most."""
    max_model_len: int = 4096
    """Tokens of prompt and completion together, at most."""
    long_texts: Literal["split", "reject"] = "split"
    """What to do with a text that does not fit max_model_len: split it at sentence ends, or set it aside."""
    temperature: float = 0.0
    """0 takes the likeliest token always."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there before become less likely."""
    seed: int = 0
    """Seed, used when temperature is above 0; each text has a random stream of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers that the model computes in (auto: the model's own on GPU, float32 on CPU)."""
    shard_size: int = 512
    """Texts in a shard: what is asked of the engine together and kept once it is done. Chains do not depend on it."""
    retries: int = 2
    """Times that a failed request is asked again before it is set aside."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a record that cannot be read: stop and name it, or set it aside."""
    engine: Literal["vllm", "scripted"] = "vllm"
    """What generates: vllm, or answers from a file."""
    script: Path | None = None
    """File of answers for engine=scripted."""
    filtering: FilterSettings = field(default_factory=FilterSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        for name in ("limit", "rounds", "max_new_tokens", "max_model_len", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        for name in ("retries", "temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        if self.max_new_tokens >= self.max_model_len:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a text in max_model_len={self.max_model_len}; make it smaller."
            )

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.model

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, at most."""
        return self.max_model_len - self.max_new_tokens
