#!/usr/bin/env python
"""Synthesis of corpora of any size with the scripted engine: highest memory from 1,000 to 100,000 texts, and the time to plan 1,000,000.

Each size is the whole stage of tools/synthesize.py in a process of its own, from the files to the manifest; planning is all that comes
before the first request: fingerprints, every text read, checked and measured, columns and shards. No other tool has both. The last line
is JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BOUND_SECONDS = 60.0
SENTENCE = "The bug number one is told of here. "
COMPLETION = "<QUE> What is entry {id}? <ANS> It is about a bug. </END>\n\n<QUE> Which bug is told of? <ANS> The bug number one. </END>"


class Planned(Exception):
    """The engine was asked for: all that comes before it is done."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a process took."""

    seconds: float
    processor_seconds: float
    peak_mib: float
    texts: int


def write_inputs(folder: Path, texts: int) -> None:
    """Write a model folder with a tokenizer of one token a byte, a script, and a corpus of so many texts."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    (folder / "model").mkdir(parents=True)
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "script.yaml").write_text(json.dumps({"completion": COMPLETION}))
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as stream:
        for number in range(texts):
            row = {"id": f"t{number:07d}", "text": f"Entry t{number:07d} is about a bug. {SENTENCE * (number % 15 + 1)}"}
            stream.write(json.dumps(row) + "\n")


def work(folder: Path, plan_only: bool, connection: Connection) -> None:
    """Be the process that is measured."""
    from megatron_instruct.synthesis.config import SynthesizeConfig
    from megatron_instruct.synthesis.run import run

    config = SynthesizeConfig(
        input=(str(folder / "corpus.jsonl"),),
        output_dir=folder / "out",
        model=folder / "model",
        engine="scripted",
        script=folder / "script.yaml",
    )
    began = time.perf_counter()
    if plan_only:
        with mock.patch("megatron_instruct.synthesis.worker.load_engine", side_effect=Planned), contextlib.suppress(Planned):
            run(config)
        texts = json.loads((folder / "out" / "shards" / "intake" / "summary.json").read_text())["texts"]
    else:
        manifest = run(config)
        assert manifest is not None, "no share was asked for"
        texts = manifest.counts["texts"]
    seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    (peak,) = (int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    processor = usage.ru_utime + usage.ru_stime
    connection.send(Measured(seconds=seconds, processor_seconds=processor, peak_mib=peak / 1024, texts=texts))


def measured(texts: int, *, plan_only: bool) -> Measured:
    """Do the stage, or its planning, for a corpus of so many texts."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), texts)
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(Path(name), plan_only, theirs))
        process.start()
        theirs.close()
        found: Measured = ours.recv()
        process.join()
    assert found.texts == texts, "every text is there once"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes of corpora")
    parser.add_argument("--planned-texts", type=int, default=1_000_000, help="size of the corpus that is only planned")
    options = parser.parse_args(argv)
    result: dict[str, object] = {"benchmark": "synthesis_scale", "bound_seconds": BOUND_SECONDS}
    for texts in options.texts:
        one = measured(texts, plan_only=False)
        result[f"peak_mib_{texts}"] = round(one.peak_mib, 1)
        result[f"texts_per_processor_second_{texts}"] = round(texts / one.processor_seconds)
        print(f"{texts:,} texts: {one.peak_mib:.1f} MiB, {one.seconds:.1f} s, {one.processor_seconds:.1f} s of processor", file=sys.stderr)
    one = measured(options.planned_texts, plan_only=True)
    result |= {"planned_texts": options.planned_texts, "plan_seconds": round(one.seconds, 1)}
    result |= {"plan_processor_seconds": round(one.processor_seconds, 1), "plan_peak_mib": round(one.peak_mib, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
