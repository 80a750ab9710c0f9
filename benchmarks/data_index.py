"""Indices of a data set of 10 billion tokens: how long does a first start take, beside megatron-core alone, and a second one?

    python benchmarks/data_index.py [--documents 10000000] [--rounds 3] [--folder FOLDER]

The data set is 10 million documents of 1,000 tokens on average; its .bin is sparse, its .idx whole. Each measurement is a process of its
own, the kinds in turn, from the moment that everything is imported: "megatron" is BlendedMegatronDatasetBuilder with the same settings,
"first" all that tools/pretrain.py does with its data before the first batch (index, manifest and content looked at, indices built, flushed
to the disk and opened), "second" the same with the indices there. Ratios of medians; one JSON line at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SEQUENCE, BATCH, MEAN = 2048, 512, 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for the data set, 200 MB (default: a temporary one)")
    parser.add_argument("--measure", choices=("megatron", "first", "second"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.documents)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        make_data(folder, options.documents)
        found: dict[str, list[float]] = {"megatron": [], "first": [], "second": []}
        for number in range(options.rounds):
            for kind, seconds in found.items():
                seconds.append(in_a_process(kind, folder, options.documents))
            print(f"round {number + 1}: " + ", ".join(f"{kind} {seconds[-1]:.2f} s" for kind, seconds in found.items()), flush=True)
            shutil.rmtree(folder / "megatron")
            shutil.rmtree(folder / "run")
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    result = {
        "benchmark": "data_index",
        "documents": options.documents,
        "tokens": options.documents * MEAN,
        **{f"{kind}_seconds": round(median, 3) for kind, median in medians.items()},
        "first_over_megatron": round(medians["first"] / medians["megatron"], 3),
        "second_over_first": round(medians["second"] / medians["first"], 3),
        "rounds": options.rounds,
    }
    print(json.dumps(result))
    return 0


def in_a_process(kind: str, folder: Path, documents: int) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", kind, "--folder", str(folder), "--documents", str(documents)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    return float(json.loads(result.stdout.splitlines()[-1]))


def make_data(folder: Path, documents: int) -> None:
    """Write an index whose documents have 1 to 2 * MEAN - 1 tokens, a .bin that has only its size, a tokenizer, and the manifest."""
    import numpy as np
    import tokenizers

    from megatron_instruct.manifest import FileRecord, Manifest, write_manifest
    from megatron_instruct.tokenizer import load_tokenizer

    (folder / "tokenizer").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, "a")).save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    half = np.random.RandomState(0).randint(1, 2 * MEAN, size=documents // 2, dtype=np.int32)
    lengths = np.concatenate([half, 2 * MEAN - half])
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    with open(folder / "data.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]))
        stream.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        for array in (lengths, starts, np.arange(len(lengths) + 1, dtype=np.int64)):
            stream.write(array.tobytes())
    size = int(lengths.sum(dtype=np.int64)) * 2
    with open(folder / "data.bin", "wb") as stream:
        stream.truncate(size)
    # preprocessing takes the SHA-256 while it writes; a start compares no bytes that did not change since
    sizes = {"data.bin": size, "data.idx": (folder / "data.idx").stat().st_size}
    outputs = tuple(FileRecord(path=name, bytes=count, sha256="0" * 64) for name, count in sizes.items())
    facts = {"tokenizer": {"fingerprint": load_tokenizer(folder / "tokenizer").fingerprint}}
    write_manifest(folder / "data.manifest.json", Manifest(stage="preprocess", settings={"append_eod": True}, outputs=outputs, facts=facts))


def measure(kind: str, folder: Path, documents: int) -> float:
    """Return the seconds from settings to data sets."""
    from megatron_instruct.platform import noise

    noise.silence()
    steps = documents * MEAN * 9 // 10 // SEQUENCE // BATCH
    return from_megatron(folder, steps) if kind == "megatron" else from_here(folder, steps)


def from_here(folder: Path, steps: int) -> float:
    from megatron_instruct.config import parse
    from megatron_instruct.models.batches import BatchPlan
    from megatron_instruct.platform import device
    from megatron_instruct.tokenizer import load_tokenizer
    from megatron_instruct.training.config import PretrainConfig
    from megatron_instruct.training.data import build_datasets
    from megatron_instruct.training.sources import sources_of

    device.initialize()
    tokenizer = load_tokenizer(folder / "tokenizer")
    words: list[Any] = ["--data-path", folder / "data", "--save", folder / "run", "--seq-length", SEQUENCE, "--train-iters", steps]
    words += ["--global-batch-size", BATCH, "--lr", "1e-4", "--preset", "tiny"]
    config = parse(PretrainConfig, list(map(str, words)), prog="data_index.py")
    assert config is not None, "nothing asks for --print-config"
    plan = BatchPlan(global_batch_size=BATCH, micro_batch_size=1, data_parallel=1, train_iters=steps)
    start = time.perf_counter()
    train = build_datasets(config, sources_of(config, tokenizer), plan).train
    seconds = time.perf_counter() - start
    assert len(train) >= steps * BATCH, "the data suffice"
    return seconds


def from_megatron(folder: Path, steps: int) -> float:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_instruct.training.sources import Vocabulary

    settings = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        tokenizer=Vocabulary(fingerprint="x", vocab_size=2, eod=0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder / "megatron"),
        blend=([str(folder / "data")], None),
        split="969,30,1",
    )
    start = time.perf_counter()
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [steps * BATCH, 0, 0], lambda: True, settings).build()
    seconds = time.perf_counter() - start
    assert len(train) >= steps * BATCH, "the data suffice"
    return seconds


if __name__ == "__main__":
    sys.exit(main())
