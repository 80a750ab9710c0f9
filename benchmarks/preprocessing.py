#!/usr/bin/env python
"""preprocess_data.py against Megatron-LM's preprocess_data_fast.py (gigatoken) and preprocess_data.py, each as a whole process, in turns.

The same file, tokenizer (Mistral v1, of mistral-common) and number of workers; wall time from the start of the process to its end,
processor time of it and all its children, and the sum of their resident memory, sampled every 20 ms. .bin and .idx must be the same
bytes. Then ours alone: memory and rate by size, 1 worker against 2, short documents against the same text in long ones, and rendering
with tokenizing against tokenizing of the rendered text. Rates are megabytes (10^6 bytes) of text per second; ratios of processor time say
more where the machine has other work. The last line is JSON with medians and ratios.

The text is that of corpus/make_corpus.py, which is run where --cache does not hold it yet. The peers need a checkout of Megatron-LM
(--megatron-lm, or the variable MEGATRON_LM); without one ours is measured alone, and peers and ratios are null.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.02
PARTS = ("peers", "memory", "workers", "short", "rendering")


@dataclass(frozen=True)
class Measured:
    """One run of one command."""

    seconds: float
    processor_seconds: float
    peak_mib: float
    """Highest sum of resident memory over the process and its children, in MiB."""
    largest_mib: float
    """Highest resident memory of any one of them, in MiB."""
    digest: str
    """SHA-256 of .bin and .idx."""


def measure(command: Sequence[str], folder: Path, environment: Mapping[str, str], *, name: str = "out_text_document") -> Measured:
    """Run a command that writes a data set into `folder`, which is new before and gone after."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "log", "wb") as log:
        start, used = time.perf_counter(), processor_time_of_children()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(environment))
        peak = largest = 0
        while process.poll() is None:
            sizes = list(resident(process.pid))
            peak, largest = max(peak, sum(sizes)), max([largest, *sizes])
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'log').read_text(errors='replace')[-4000:]}")
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with open(folder / f"{name}{suffix}", "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    shutil.rmtree(folder)
    return Measured(seconds, processor_time_of_children() - used, peak / 2**20, largest / 2**20, digest.hexdigest())


def processor_time_of_children() -> float:
    """Return the processor time of all processes that this one, or one that it waited for, has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident(process: int) -> Iterator[int]:
    """Yield the resident memory of a process and its children, in bytes; what ends meanwhile counts for nothing.

    Linux names the children of each thread, so that not all processes of the machine are looked through, which would take time.
    """
    place = Path("/proc") / str(process)
    try:
        yield int((place / "statm").read_text().split()[1]) * resource.getpagesize()
        children = [child for task in (place / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, IndexError):
        return
    for child in children:
        yield from resident(int(child))


class Bench:
    """Files, tokenizer and commands of one benchmark run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.scratch = options, options.cache / "run"
        spec = importlib.util.find_spec("mistral_common")
        if spec is None or spec.origin is None:
            raise SystemExit("the benchmark's tokenizer comes with mistral-common; install it with: pip install mistral-common")
        self.model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
        self.environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each run of ours compiles itself, as no installed package does

    def corpus(self, megabytes: int, *, short: bool = False) -> Path:
        file = self.options.cache / f"text-{megabytes}mb{'-short' if short else ''}.jsonl"
        if not file.is_file():
            maker = ROOT / "benchmarks" / "corpus" / "make_corpus.py"
            subprocess.run([sys.executable, maker, "--cache", self.options.cache, "--megabytes", str(megabytes), "--short"], check=True)
        with open(file, "rb") as stream:  # into the page cache, for whoever comes first
            while stream.read(1 << 24):
                pass
        return file

    def ours(self, source: Path, *, workers: int | None = None) -> Measured:
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
        command += ["--output-prefix", str(self.scratch / "out"), "--tokenizer-model", str(self.model), "--append-eod"]
        return measure([*command, "--workers", str(workers or self.options.workers)], self.scratch, self.environment)

    def theirs(self, source: Path, *, fast: bool) -> Measured:
        """Megatron-LM's tool; its own code goes before that of an installed megatron-core."""
        checkout = self.options.megatron_lm.resolve()
        tool = checkout / "tools" / ("preprocess_data_fast.py" if fast else "preprocess_data.py")
        command = [sys.executable, str(tool), "--input", str(source), "--output-prefix", str(self.scratch / "out"), "--append-eod"]
        if fast:
            command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.huggingface_folder()), "--use-gigatoken"]
        else:
            command += ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(self.model)]
            command += ["--workers", str(self.options.workers), "--log-interval", "100000"]
        threads = {"RAYON_NUM_THREADS": str(self.options.workers)} if fast else {}
        return measure(command, self.scratch, {**self.environment, **threads, "PYTHONPATH": str(checkout)})

    def huggingface_folder(self) -> Path:
        """Write the tokenizer as preprocess_data_fast.py reads it; the ids are proved by the bytes of the data sets."""
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        folder: Path = self.options.cache / "tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(sentencepiece_to_tokenizer_json(self.model.read_bytes()), encoding="utf-8")
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
        return folder

    def turns(self, sides: Mapping[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
        """Measure each side `repetitions` times, taking turns."""
        found: dict[str, list[Measured]] = {name: [] for name in sides}
        for turn in range(self.options.repetitions):
            for name in list(sides) if turn % 2 == 0 else reversed(list(sides)):
                found[name].append(sides[name]())
                last = found[name][-1]
                print(f"  turn {turn + 1}, {name}: {last.seconds:.2f} s, {last.peak_mib:.0f} MiB in all", flush=True)
        return found


def summary(runs: Sequence[Measured], megabytes: float) -> dict[str, float]:
    return {
        "mb_per_second": round(megabytes / statistics.median(run.seconds for run in runs), 3),
        "best_mb_per_second": round(megabytes / min(run.seconds for run in runs), 3),
        "mb_per_processor_second": round(megabytes / statistics.median(run.processor_seconds for run in runs), 3),
        "peak_mib": round(statistics.median(run.peak_mib for run in runs), 1),
        "largest_process_mib": round(statistics.median(run.largest_mib for run in runs), 1),
    }


def ratio(of: Mapping[str, float], to: Mapping[str, float], *, rate: str = "mb_per_second") -> float:
    return round(of[rate] / to[rate], 3)


def processor_ratio(of: Mapping[str, float], to: Mapping[str, float]) -> float:
    return ratio(of, to, rate="mb_per_processor_second")


def peers(bench: Bench) -> dict[str, Any]:
    """Ours, the fast tool and the ordinary one on one file."""
    size = bench.options.megabytes
    source = bench.corpus(size)
    sides: dict[str, Callable[[], Measured]] = {"ours": lambda: bench.ours(source)}
    if bench.options.megatron_lm is not None:
        sides["megatron_fast"] = lambda: bench.theirs(source, fast=True)
        sides["megatron"] = lambda: bench.theirs(source, fast=False)
    runs = bench.turns(sides)
    figures: dict[str, Any] = {name: summary(found, size) for name, found in runs.items()}
    digests = {name: {run.digest for run in found} for name, found in runs.items()}
    for name in ("megatron_fast", "megatron"):
        measured = name in runs
        figures.setdefault(name, None)
        figures[f"ratio_to_{name}"] = ratio(figures["ours"], figures[name]) if measured else None
        figures[f"processor_ratio_to_{name}"] = processor_ratio(figures["ours"], figures[name]) if measured else None
        figures[f"same_bytes_as_{name}"] = digests[name] == digests["ours"] and len(digests[name]) == 1 if measured else None
    return figures


def memory(bench: Bench) -> dict[str, Any]:
    """Ours on one size after another, the smaller ones as often as the others."""
    sizes = [*bench.options.sizes, *([bench.options.large] if bench.options.large else [])]
    files = {size: bench.corpus(size) for size in sizes}
    runs = bench.turns({str(size): (lambda file=file: bench.ours(file)) for size, file in files.items()})  # type: ignore[misc]
    figures = {size: summary(found, float(size)) for size, found in runs.items()}
    first, last = figures[str(bench.options.sizes[-1])], figures[str(sizes[-1])]
    startup = cost_of_start(runs)
    per_byte = {size: round(1e3 * (statistics.median(r.seconds for r in found) - startup) / float(size), 3) for size, found in runs.items()}
    return {
        "by_megabytes": figures,
        "start_seconds": round(startup, 3),
        "milliseconds_per_mb_without_start": per_byte,
        "peak_large_to_small": round(last["peak_mib"] / first["peak_mib"], 3),
    }


def cost_of_start(runs: Mapping[str, Sequence[Measured]]) -> float:
    """Return the seconds at size 0 of the line through the medians."""
    points = [(float(size), statistics.median(run.seconds for run in found)) for size, found in runs.items()]
    return statistics.linear_regression(*zip(*points, strict=True)).intercept if len(points) > 1 else 0.0


def workers(bench: Bench) -> dict[str, Any]:
    size = bench.options.megabytes
    source = bench.corpus(size)
    runs = bench.turns({str(count): (lambda count=count: bench.ours(source, workers=count)) for count in (1, 2)})  # type: ignore[misc]
    one, two = (summary(runs[count], size) for count in ("1", "2"))
    return {"one": one, "two": two, "ratio": ratio(two, one), "processor_ratio": processor_ratio(two, one)}


def short(bench: Bench) -> dict[str, Any]:
    """The same text in documents of about 90 characters, and in long ones."""
    size = bench.options.large or bench.options.megabytes
    short_file, long_file = bench.corpus(size, short=True), bench.corpus(size)
    runs = bench.turns({"short": lambda: bench.ours(short_file), "long": lambda: bench.ours(long_file)})
    figures = {name: summary(found, size) for name, found in runs.items()}
    with open(short_file, "rb") as stream:
        documents = sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 24), b""))
    ratios = {"ratio": ratio(figures["short"], figures["long"]), "processor_ratio": processor_ratio(figures["short"], figures["long"])}
    return {**figures, "short_documents": documents, **ratios}


def rendering(bench: Bench) -> dict[str, Any]:
    """Examples rendered and tokenized, against tokenizing of the text that they become. Rates count the rendered text."""
    folder = bench.options.cache / "rendering"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    examples, plain = folder / "examples.jsonl", folder / "plain.jsonl"
    write_examples(bench.corpus(bench.options.megabytes), examples)
    tool = str(ROOT / "tools" / "render_templates.py")
    command = [sys.executable, tool, "--input", str(examples), "--output-dir", str(folder / "rendered")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    megabytes = 0.0
    with open(folder / "rendered" / "augmented.jsonl", encoding="utf-8") as stream, open(plain, "w", encoding="utf-8") as target:
        for line in stream:
            text = json.loads(line)["text"]
            megabytes += len(text.encode()) / 1e6
            target.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    runs = bench.turns({"rendering_and_tokenizing": lambda: bench.ours(examples), "tokenizing": lambda: bench.ours(plain)})
    figures = {name: summary(found, megabytes) for name, found in runs.items()}
    same = len({run.digest for found in runs.values() for run in found}) == 1
    shutil.rmtree(folder)
    return {
        **figures,
        "rendered_mb": round(megabytes, 1),
        "ratio": ratio(figures["rendering_and_tokenizing"], figures["tokenizing"]),
        "processor_ratio": processor_ratio(figures["rendering_and_tokenizing"], figures["tokenizing"]),
        "same_bytes": same,
    }


def write_examples(corpus: Path, target: Path) -> None:
    """Make examples of two texts with up to five pairs each: questions about the texts' own sentences, of all four kinds."""
    shots: list[dict[str, Any]] = []
    with open(corpus, encoding="utf-8") as stream, open(target, "w", encoding="utf-8") as out:
        for number, line in enumerate(stream):
            text = json.loads(line)["text"][:2500].strip()
            sentences = [found for found in re.findall(r"[A-Z][^.!?\n]{30,160}[.]", text) if not found.isspace()]
            pairs = [pair(place, sentence, sentences) for place, sentence in enumerate(dict.fromkeys(sentences[:5]))]
            shots.append({"id": str(number), "text": text, "pairs": pairs})
            if len(shots) == 2:
                out.write(json.dumps({"id": shots[0]["id"], "shots": shots}, ensure_ascii=False) + "\n")
                shots = []


def pair(place: int, sentence: str, sentences: Sequence[str]) -> dict[str, Any]:
    words = sentence.split()
    kind = ("free_form", "free_form", "options", "chain_of_thought", "options_chain_of_thought")[place % 5]
    options = list(dict.fromkeys([sentence, *sentences[:3]])) if kind.startswith("options") and len(set(sentences)) > 1 else []
    if kind.startswith("options") and not options:
        kind = "free_form"
    rationale = f"The text speaks of it where it says '{' '.join(words[:6])}'." if kind.endswith("chain_of_thought") else None
    question = f"What does the text say about '{' '.join(words[2:5])}'?"
    return {"question": question, "answer": sentence, "kind": kind, "options": options, "rationale": rationale, "provenance": {}}


def main() -> None:
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron-instruct" / "benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache, help="folder of the corpus, outside the repository")
    parser.add_argument("--megatron-lm", type=Path, default=os.environ.get("MEGATRON_LM") or None, help="checkout of Megatron-LM")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--megabytes", type=int, default=100, help="size for peers, workers and rendering, in 10^6 bytes of text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 100], help="sizes for memory and rate, in 10^6 bytes of text")
    parser.add_argument("--large", type=int, default=1000, help="largest size, also that of short documents; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=2, help="processes of ours and of preprocess_data.py, threads of the fast tool")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each side")
    options = parser.parse_args()
    options.megatron_lm = Path(options.megatron_lm) if options.megatron_lm else None
    if options.megatron_lm is None and "peers" in options.parts:
        print("no checkout of Megatron-LM (--megatron-lm, or the variable MEGATRON_LM): ours is measured alone")
    bench = Bench(options)
    made: dict[str, Any] = {}
    for part in options.parts:
        print(part, flush=True)
        made[part] = {"peers": peers, "memory": memory, "workers": workers, "short": short, "rendering": rendering}[part](bench)
    about = {
        "megabytes": options.megabytes,
        "processes": options.workers,
        "repetitions": options.repetitions,
        "versions": {name: importlib.metadata.version(name) for name in ("gigatoken", "sentencepiece", "tokenizers", "megatron-core")},
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({**made, **about}))


if __name__ == "__main__":
    main()
