"""Which documents were in step N? From the indices that the run was fed by.

Comes in: the folder of a run, the data sets at the places that its settings name, seen from where it was started. Goes out: for each
sample of a step the pieces of documents that it is cut from, in words. Reads only.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.config import parse, run_tool
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.phases import phase_of
from megatron_instruct.training.pieces import pieces
from megatron_instruct.training.run import SETTINGS, STARTED_IN


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Say which documents the steps of a run were made of. Changes nothing."""

    save: Path
    """Folder of the run, as pretrain.py has it."""
    iterations: tuple[int, ...]
    """Steps, from 1."""
    text: bool = False
    """Print the text of each piece, too."""

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 1:
            raise ConfigError(f"iterations={' '.join(map(str, self.iterations))!r}: give one or more steps; they count from 1.")


def run(config: TraceConfig) -> None:
    """Print the documents of each step."""
    settings = _settings(config)  # torch and megatron-core take seconds to import: a wrong folder or step is told without them

    from megatron_instruct.platform import noise

    noise.silence()
    from megatron_instruct.training.data import training_samples
    from megatron_instruct.training.sources import sources_of

    with contextlib.chdir(_started_in(config)):
        tokenizer = load_tokenizer(settings.data.tokenizer_model or settings.checkpoint.save / "tokenizer")
        samples = training_samples(settings, sources_of(settings, tokenizer, remembers=False))
        for iteration in config.iterations:
            phase = phase_of(settings.phases, iteration)
            of_phase = "" if phase is None else f" (phase {phase.number}, steps {phase.start + 1} to {phase.end})"
            first = settings.batch.samples_before(iteration - 1)
            for number in range(first, settings.batch.samples_before(iteration)):
                print(f"step {iteration}{of_phase}, sample {number - first}:")
                for piece in pieces(samples, number):
                    print(f"  {piece}")
                    if config.text:
                        print(f"    {tokenizer.decode(piece.ids)!r}")


def _settings(config: TraceConfig) -> PretrainConfig:
    path = config.save / SETTINGS
    if not path.is_file():
        raise InputError(f"save={config.save}: {path.name} is missing: no run of pretrain.py has started there.")
    settings = parse(PretrainConfig, ["--config", str(path)], prog=str(path))
    assert settings is not None, "nothing asks for --print-config"
    if max(config.iterations) > settings.batch.train_iters:
        raise ConfigError(f"iterations: step {max(config.iterations)} is beyond train_iters={settings.batch.train_iters} of the run.")
    return dataclasses.replace(settings, checkpoint=dataclasses.replace(settings.checkpoint, save=config.save.absolute()))


def _started_in(config: TraceConfig) -> Path:
    """Return the folder that the run was started in, where this machine has it; else that of now."""
    with open(config.save / SETTINGS, encoding="utf-8") as stream:
        first = stream.readline()
    folder = Path(json.loads(first.removeprefix(STARTED_IN))) if first.startswith(STARTED_IN) else Path()
    return folder if folder.is_dir() else Path()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(TraceConfig, run, argv, prog="trace_data.py")
