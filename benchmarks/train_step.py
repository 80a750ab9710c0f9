#!/usr/bin/env python
"""One training step on CPU, ours against a plain transformers loop: the same sizes, batches, threads and precision.

Each side lives in a process of its own and is idle while the other one works; they take turns, a few steps at a time, so that
whatever else the machine does meets both alike. The last line is JSON with the medians and their ratio (above 1: ours is faster).

Ours is what tools/pretrain.py runs each iteration (compute_gradients and update of training.step, on one process); the other side is
LlamaForCausalLM with scaled_dot_product_attention, gradient accumulation, clipping, and torch's fused AdamW. In each turn the peak of the
machine is measured, too, by products of square matrices with as many threads; its share is of the model's operations, medians of both. They
are counted twice: with the half of attention that the causal mask leaves, and with all of it, as PaLM's model FLOPs utilization has it.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Step = Callable[[], float]


def batches(options: argparse.Namespace) -> Iterator[Any]:
    """Yield the same microbatches of random tokens, [B, S + 1], to both sides."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(options.vocab_size, (options.micro_batch_size, options.seq_length + 1), generator=generator)


def our_step(options: argparse.Namespace) -> Step:
    from megatron_instruct.platform import device, noise

    noise.silence()
    from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
    from megatron_instruct.models.layout import ParallelLayout
    from megatron_instruct.models.presets import make_architecture
    from megatron_instruct.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel
    from megatron_instruct.training.settings.batch import BatchOptions
    from megatron_instruct.training.settings.parallel import ParallelOptions
    from megatron_instruct.training.step import StepShape, compute_gradients, update

    machine = device.initialize(threads=options.threads)
    join_model_parallel_groups(ParallelLayout(), seed=1)
    architecture = make_architecture({}, preset_name=options.preset, vocab_size=options.vocab_size, seq_length=options.seq_length)
    chunks = wrap_data_parallel(
        build_model(architecture, ParallelLayout(), machine, BuildOptions(fuse_weight_gradients=True)), ParallelOptions()
    )
    size = options.micro_batch_size * options.num_microbatches
    batch = BatchOptions(train_iters=1000, seq_length=options.seq_length, global_batch_size=size, lr=3e-4)
    optimizer = make_optimizer(chunks, ParallelOptions(), batch, machine)
    scheduler = make_scheduler(optimizer, batch)
    shape = StepShape(num_microbatches=options.num_microbatches, micro_batch_size=options.micro_batch_size, seq_length=options.seq_length)

    def data() -> Iterator[dict[str, Any]]:
        import torch

        positions = torch.arange(options.seq_length).expand(options.micro_batch_size, -1)
        mask = torch.ones(options.micro_batch_size, options.seq_length)
        for tokens in batches(options):
            yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}

    stream = data()

    def step() -> float:
        loss = update(optimizer, compute_gradients(chunks, optimizer, [stream], shape)).loss
        scheduler.step(increment=size)
        return loss

    return step


def plain_step(options: argparse.Namespace) -> Step:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    from megatron_instruct.models.presets import preset

    torch.set_num_threads(options.threads)
    sizes = preset(options.preset)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        tie_word_embeddings=sizes.get("tie_embeddings", False),
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, 1000)
    stream = batches(options)

    def step() -> float:
        total = 0.0
        for _ in range(options.num_microbatches):
            tokens = next(stream)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            loss = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss / options.num_microbatches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return total

    return step


def side(make: Callable[[argparse.Namespace], Step], options: argparse.Namespace, pipe: Connection) -> None:
    """Answer each number of steps with the seconds that each of them took and the last loss; 0 ends."""
    step = make(options)
    pipe.send("ready")
    while count := pipe.recv():
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        pipe.send((seconds, loss))


def peak_flops(options: argparse.Namespace) -> float:
    """Measure the operations that matrix products do in a second while both sides are idle."""
    import torch

    from megatron_instruct.platform import device

    torch.set_num_threads(options.threads)
    measured = device.peak_flops(device.current(), "fp32")
    assert measured is not None, "the peak of a CPU is measured"
    return measured


def flops_per_token(options: argparse.Namespace, *, masked: bool) -> float:
    """masked: attention to later tokens, which the mask leaves out, does not count; PaLM's utilization (arXiv:2204.02311) counts it."""
    from megatron_instruct.models.presets import make_architecture

    architecture = make_architecture({}, preset_name=options.preset, vocab_size=options.vocab_size, seq_length=options.seq_length)
    return architecture.flops_per_token(options.seq_length * (1 if masked else 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="31M")
    parser.add_argument("--vocab-size", type=int, default=24064, help="ids; 24064 makes the preset 31M what its name says")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences")
    parser.add_argument("--num-microbatches", type=int, default=2, help="microbatches of one step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--turns", type=int, default=12, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn")
    parser.add_argument(
        "--warm-up", type=int, default=4, help="steps before the clock runs: the first three still ask the kernel for memory"
    )
    options = parser.parse_args()
    if min(options.turns, options.steps, options.warm_up) < 1:
        parser.error("--turns, --steps and --warm-up must be at least 1")

    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, make in (("ours", our_step), ("transformers", plain_step)):
        pipes[name], other = context.Pipe()
        context.Process(target=side, args=(make, options, other), daemon=True).start()
        other.close()  # a side that dies is then noticed
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    losses: dict[str, float] = {}
    peaks: list[float] = []
    for turn in range(-1, options.turns):
        said = []
        for name in list(pipes) if turn % 2 else reversed(list(pipes)):
            pipes[name].send(options.steps if turn >= 0 else options.warm_up)
            taken, losses[name] = pipes[name].recv()
            said.append(f"{name} {', '.join(f'{each:.2f}' for each in taken)} s, loss {losses[name]:.4f}")
            if turn >= 0:
                seconds[name] += taken
        peaks.append(peak_flops(options))
        print(f"turn {turn + 1}/{options.turns}: {'; '.join(said)}", flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    tokens = options.micro_batch_size * options.num_microbatches * options.seq_length
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    operations, peak = flops_per_token(options, masked=True), statistics.median(peaks)
    palm = flops_per_token(options, masked=False) / operations
    print(
        json.dumps(
            {
                **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
                **{f"{name}_best_tokens_per_second": round(tokens / min(taken), 1) for name, taken in seconds.items()},
                "ratio": round(rates["ours"] / rates["transformers"], 3),
                "ratio_of_best": round(min(seconds["transformers"]) / min(seconds["ours"]), 3),
                "peak_gflops": round(peak / 1e9, 1),
                **{f"{name}_share_of_peak": round(rate * operations / peak, 3) for name, rate in rates.items()},
                **{f"{name}_share_of_peak_as_palm": round(rate * operations * palm / peak, 3) for name, rate in rates.items()},
                "threads": options.threads,
                "shape": f"{options.preset}, {options.num_microbatches} x {options.micro_batch_size} x {options.seq_length}",
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
