"""Settings of tools/synthesize.py. Names of inference settings are those of vLLM."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.pages import require_page
from megatron_instruct.shares import parse_share
from megatron_instruct.synthesis.filter_settings import FilterSettings


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

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_num_seqs", "kv_cache_gib", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0, and 1 at most.")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A running server with the completions endpoint of OpenAI, such as vLLM's. For engine=server."""

    server_url: str | None = None
    """Where its interface begins, such as http://localhost:8000/v1."""
    server_model: str | None = None
    """Name of the model there (default: the server's only one, or the one named like --model)."""
    server_prompt: Literal["ids", "text"] = "ids"
    """Send prompts as token ids, so that lengths and special tokens are exact, or as text, for servers that take no ids."""
    server_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key, where it asks for one."""
    request_timeout: float = 600.0
    """Seconds that an answer may take, from the question to its last byte."""
    server_patience: float = 60.0
    """Seconds that a server which cannot be reached is waited for."""


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Let a language model write instruction-response pairs for raw texts, and gather them in M-shot examples.

    Writes OUTPUT_DIR/examples.jsonl (one M-shot example a line), rejects.jsonl and manifest.json. Killed at any moment and started again,
    it goes on from the requests that are finished.
    """

    input: tuple[str, ...]
    """Files, folders or glob patterns of raw texts: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt."""
    output_dir: Path
    """Folder of the result."""
    model: Path
    """Synthesizer: a folder in Hugging Face form."""
    tokenizer: Path | None = None
    """Its tokenizer: folder (default: the model's)."""
    revision: str | None = None
    """Name of the synthesizer's version, kept with every pair (default: the beginning of its fingerprint)."""
    prompt_format: str = "instruction-synthesizer"
    """Prompt format by name (instruction-synthesizer, chat, chat-zh, chat-extractive), or a .yaml file of your own."""
    structured_output: Literal["none", "form", "extractive"] | None = None
    """Force on completions: nothing, the form of the pairs, or moreover answers taken from the text (default: as the format says)."""
    report: Path | None = None
    """Page to look at, such as report.html: yield, reasons, rates, random examples (default: none)."""
    report_examples: int = 20
    """Random texts that the page shows."""
    text_key: str = "text"
    """JSON key of the text."""
    id_key: str = "id"
    """JSON key of the text's id; a text without is named by its file and line."""
    question_key: str | None = None
    """JSON key of a question: a text with one is asked for its answer alone, which no filter looks at (default: none)."""
    pairs_key: str | None = None
    """JSON key of pairs that are known already, a list of objects with question and answer: a text with them is not asked about, and is
    shown before the later texts of its chain (default: none)."""
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
    """Texts in a shard, about: what a worker makes, and one file holds until all are merged. Examples do not depend on it."""
    retries: int = 2
    """Times that a failed request is asked again before it is set aside."""
    failures_in_a_row: int = 16
    """Requests set aside one after the other, with none that succeeded between them, that stop the run."""
    restarts: int = 2
    """Times that a dead engine, or a dead worker, is started again before the run stops."""
    in_flight: int | None = None
    """Requests in work at once, of each engine (default: max_num_seqs of vLLM, 64 of a server)."""
    replicas: int = 1
    """Engines, each in a process of its own: data parallelism."""
    executor: Literal["local", "ray"] = "local"
    """Where the engines are: on this machine, or on a Ray cluster, whose machines share a file system."""
    ray_address: str | None = None
    """The Ray cluster (default: the environment variable RAY_ADDRESS, or Ray started here)."""
    share: str | None = None
    """I/N: work on every N-th shard from the I-th, beside runs of the other shares; a last run without it merges."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a record that cannot be read: stop and name it, or set it aside."""
    engine: Literal["vllm", "server", "scripted"] = "vllm"
    """What generates: vllm in this process, a running server, or answers from a file."""
    script: Path | None = None
    """File of answers for engine=scripted."""
    filtering: FilterSettings = field(default_factory=FilterSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        require_page("report", self.report)
        for name in (
            "limit",
            "rounds",
            "max_new_tokens",
            "max_model_len",
            "shard_size",
            "failures_in_a_row",
            "in_flight",
            "replicas",
            "report_examples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        for name in ("retries", "restarts", "temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 leaves tokens as they are.")
        if self.max_new_tokens >= self.max_model_len:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a text in max_model_len={self.max_model_len}; make it smaller."
            )
        if (self.engine == "server") != (self.server.server_url is not None):
            raise ConfigError("engine=server and server_url belong together; give both, or neither.")
        for name in ("request_timeout", "server_patience"):
            if getattr(self.server, name) <= 0:
                raise ConfigError(f"{name}={getattr(self.server, name)} must be above 0 seconds.")
        parse_share(self.share)

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.model

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, at most."""
        return self.max_model_len - self.max_new_tokens
