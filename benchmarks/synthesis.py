#!/usr/bin/env python
"""Synthesis against the reference script's rounds and against a bare LLM.generate: the same vLLM engine, model and texts, taking turns.

- ours: all that tools/synthesize.py does, but for loading the engine: from the model's fingerprint and the intake to filters and the merge
- reference: the loop of the public script (microsoft/LMOps, instruction_pretrain/README.md) with that project's own functions: one
  LLM.generate a round, each round after the one before. Give the folder `instruction_pretrain` of a checkout with --reference. Its BOS and
  EOS, which it writes as text, are made those of the model, so that both sides ask the same
- generate: one LLM.generate over the very prompts that ours sent, all known from the beginning

Every turn begins with an empty prefix cache. Pairs are counted as parsed, before filters, by each side's own parser; with a model that
writes none, read the ratio of texts. The last line is JSON with medians and ratios (above 1: ours is faster).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_instruct.corpora.read import Record, raw_text, read_records
from megatron_instruct.records import RawText

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn."""

    seconds: float
    processor_seconds: float
    """Of all threads, the engine's among them, which are in this process: what a machine with other work to do leaves to compare."""
    texts: int
    pairs: int
    tokens: int


class Watch:
    """Times by both clocks."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


class Shared:
    """The engine that all sides use; for ours it looks like one that is loaded and closed, and remembers what it was asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.capacity = engine, engine.capacity
        self.requests: list[Any] = []

    def submit(self, request: Any) -> None:
        self.requests.append(request)
        self.engine.submit(request)

    def poll(self) -> Any:
        return self.engine.poll()

    def close(self) -> None:
        """Others still need it."""

    def reset(self) -> None:
        self.requests.clear()
        self.engine.llm.reset_prefix_cache()


def small_model() -> Path:
    """Return SmolLM2-135M-Instruct as a folder, unpacked where the quick start's results are, unless it is there."""
    folder = ROOT / "runs" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "examples" / "quickstart" / "smollm2.py"), str(folder)], check=True)
    return folder


def texts_of(corpus: Path, *, most: int, longest: int) -> list[RawText]:
    """Return the first texts of at most `longest` characters: the reference guesses lengths, and one that does not fit ends its run."""
    found: list[RawText] = []
    for record in read_records(corpus):
        text = raw_text(record) if isinstance(record, Record) else None
        if isinstance(text, RawText) and len(text.text) <= longest:
            found.append(text)
            if len(found) == most:
                break
    return found


def our_turn(shared: Shared, options: argparse.Namespace, corpus: Path, rounds: int, folder: Path) -> Turn:
    from megatron_instruct.synthesis.run import run

    config = our_config(options, corpus, rounds, folder / "out")
    watch = Watch()
    with mock.patch("megatron_instruct.synthesis.worker.load_engine", lambda *_: shared):
        manifest = run(config)
    times = watch.read()
    assert manifest is not None, "no share was asked for"
    return Turn(*times, manifest.counts["texts"], manifest.counts.get("pairs_parsed", 0), manifest.counts["generated_tokens"])


def our_config(options: argparse.Namespace, corpus: Path, rounds: int, output: Path) -> Any:
    from megatron_instruct.synthesis.config import SynthesizeConfig, VllmSettings

    return SynthesizeConfig(
        input=(str(corpus),),
        output_dir=output,
        model=options.model,
        rounds=rounds,
        max_new_tokens=options.max_new_tokens,
        max_model_len=options.max_model_len,
        vllm=VllmSettings(threads=options.threads, kv_cache_gib=options.kv_cache_gib, max_num_seqs=options.max_num_seqs),
    )


def reference_turn(llm: Any, options: argparse.Namespace, texts: Sequence[RawText], rounds: int) -> Turn:
    """Round by round, as the public script does; it prints what it likes."""
    from utils import read_compre  # type: ignore[import-not-found]  # of the folder given with --reference
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    read_compre.eos_token = tokenizer.eos_token
    read_compre.cook_read.__defaults__ = (tokenizer.bos_token,)
    counted: list[int] = []
    generate = llm.generate

    def counting(*arguments: Any) -> Any:
        outputs = generate(*arguments, use_tqdm=False)
        counted.extend(len(output.outputs[0].token_ids) for output in outputs)
        return outputs

    raw = [text.text for text in texts]
    size = -(-len(raw) // rounds)
    examples: list[Any] = []
    limits = {"max_model_len": options.max_model_len, "max_new_tokens": options.max_new_tokens}
    watch = Watch()
    with mock.patch.object(llm, "generate", counting):
        for number in range(rounds):
            block = raw[number * size : (number + 1) * size]
            split = read_compre.get_dataset(prev_examples=examples, cur_raw_texts=block, **limits)
            examples = read_compre.run(split, llm, SamplingParams(temperature=0, max_tokens=options.max_new_tokens))
    times = watch.read()
    entries = [entry for collection in examples for entry in collection]
    return Turn(*times, len(entries), sum(len(entry["QA_list"]) for entry in entries), sum(counted))


def generate_turn(llm: Any, requests: Sequence[Any]) -> Turn:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
    watch = Watch()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=requests[0].max_new_tokens), use_tqdm=False)
    times = watch.read()
    return Turn(*times, len(outputs), 0, sum(len(output.outputs[0].token_ids) for output in outputs))


def turns_of(options: argparse.Namespace, rounds: int, shared: Shared, texts: Sequence[RawText]) -> Iterator[dict[str, Turn]]:
    """Yield each side's turns, in changing order, after one of ours that warms the engine up and shows what is asked."""
    llm = shared.engine.llm

    def ours() -> Turn:
        with tempfile.TemporaryDirectory() as name:
            corpus = Path(name) / "texts.jsonl"
            corpus.write_text("".join(json.dumps({"id": text.id, "text": text.text}) + "\n" for text in texts), encoding="utf-8")
            return our_turn(shared, options, corpus, rounds, Path(name))

    ours()
    requests = list(shared.requests)
    sides = {"ours": ours, "generate": lambda: generate_turn(llm, requests)}
    if options.reference is not None:
        sides["reference"] = lambda: reference_turn(llm, options, texts, rounds)
    for number in range(options.turns):
        first = number % len(sides)
        turn = {}
        for side in [*sides, *sides][first : first + len(sides)]:
            shared.reset()
            turn[side] = sides[side]()
        report = {
            side: f"{one.seconds:.1f} s, {one.processor_seconds:.1f} s of processor, {one.pairs} pairs, {one.tokens} tokens"
            for side, one in turn.items()
        }
        print(f"rounds {rounds}, turn {number + 1}: {report}", file=sys.stderr, flush=True)
        yield turn


def compared(turns: Sequence[dict[str, Turn]]) -> dict[str, Any]:
    """Return medians of each side, and how many times as fast ours is."""
    rates = {
        side: {
            f"{what}_per_{clock}": statistics.median(getattr(turn[side], what) / getattr(turn[side], f"{clock}s") for turn in turns)
            for clock in ("second", "processor_second")
            for what in ("texts", "pairs", "tokens")
        }
        for side in turns[0]
    }
    result: dict[str, Any] = {side: {name: round(rate, 3) for name, rate in side_rates.items()} for side, side_rates in rates.items()}
    for other in (side for side in rates if side != "ours"):
        result[f"ours / {other}"] = {name: round(rates["ours"][name] / rate, 3) for name, rate in rates[other].items() if rate}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a synthesizer (default: SmolLM2-135M, which writes no pairs)")
    parser.add_argument("--reference", type=Path, help="folder instruction_pretrain of a checkout of microsoft/LMOps (default: left out)")
    parser.add_argument("--corpus", type=Path, default=ROOT / "examples" / "quickstart" / "jargon.jsonl")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=1500, help="characters of a text, at most")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, help="texts in work at once (default: vLLM's own)")
    parser.add_argument("--threads", type=int, help="threads on CPU (default: vLLM binds one to each core)")
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    options = parser.parse_args()
    options.model = options.model or small_model()
    if options.reference is not None:
        sys.path.insert(0, str(options.reference))

    from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
    from megatron_instruct.synthesis.engines.vllm import VllmEngine
    from megatron_instruct.synthesis.worker import engine_settings

    config = our_config(options, options.corpus, 1, Path("unused"))
    shared = Shared(VllmEngine(engine_settings(config, load_prompt_format(config.prompt_format))))
    texts = texts_of(options.corpus, most=options.texts, longest=options.longest)
    result = {f"rounds_{rounds}": compared(list(turns_of(options, rounds, shared, texts))) for rounds in options.rounds}
    shared.engine.close()
    about = {
        "texts": len(texts),
        "turns": options.turns,
        "model": options.model.name,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({"benchmark": "synthesis", **about, **result}))


if __name__ == "__main__":
    main()
