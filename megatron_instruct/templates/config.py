"""Settings of tools/render_templates.py."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.pages import require_page


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """Render examples (raw texts with their instruction-response pairs) through varied templates into instruction-augmented texts.

    Writes augmented.jsonl (one document a line; its key "text" is what preprocess_data.py encodes), rejects.jsonl and manifest.json.
    The result depends on the examples, the bank and the seed alone.
    """

    input: tuple[str, ...]
    """Files of examples (.jsonl, .jsonl.gz, .jsonl.zst), glob patterns, or folders that synthesize.py wrote; rendered in this order."""
    output_dir: Path
    """Folder to write; it must be new, empty, or hold this very result, finished or not."""
    seed: int = 1234
    """Whole number that, with an example's id, decides what is drawn for it."""
    language: str | None = None
    """Language of the bank that comes with the package: en or zh (default: en)."""
    bank: Path | None = None
    """YAML file of a bank of your own, used instead; see docs/templates.md."""
    extend_bank: Path | None = None
    """YAML file whose templates and probabilities are added to the bank."""
    on_error: Literal["stop", "reject"] = "stop"
    """What to do with a line that is no example: stop and name it, or set it aside in the rejects file. A pair that no template can take,
    such as one whose answer is none of its options, is set aside in either case."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that render. The result does not depend on their number."""
    show: int = 0
    """Number of documents to print at the end, coloured by role."""
    show_html: Path | None = None
    """File, NAME.html, to write the shown documents to, as a page; the terminal then shows none."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input is empty; give at least one file, folder or glob pattern.")
        if self.bank is not None and self.language is not None:
            raise ConfigError(f"language={self.language} and bank={self.bank}: a bank has its own language; give one of the two.")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be 1 or more.")
        if self.show < 0:
            raise ConfigError(f"show={self.show} must be 0 or more.")
        if self.show_html is not None and self.show == 0:
            raise ConfigError(f"show_html={self.show_html} without documents to show; add --show 20.")
        require_page("show_html", self.show_html)
