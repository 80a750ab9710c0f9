"""Build real models with their gradients and optimizer, take one step, and print the bytes that the fullest rank holds of each, as JSON.

PRESET:PRECISION ... [--layout tensor|pipeline|data|fully-sharded], in the processes that torchrun started.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed

from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture
from megatron_instruct.platform import device
from megatron_instruct.training.optimizer import make_optimizer, torch_optimizers, wrap_data_parallel
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.parallel import ParallelOptions

VOCABULARY, SEQUENCE, MICRO = 500, 32, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--layout", default="data", choices=["tensor", "pipeline", "data", "fully-sharded"])
    options = parser.parse_args()
    machine = device.initialize(threads=1)
    ranks = torch.distributed.get_world_size()
    sizes: dict[str, Any] = {options.layout: ranks} if options.layout in ("tensor", "pipeline") else {}
    layout = ParallelLayout(world_size=ranks, sequence_parallel=ranks > 1 and options.layout == "tensor", **sizes)
    join_model_parallel_groups(layout, seed=1234)
    found = {}
    for name in options.models:
        preset, precision = name.split(":")
        architecture = make_architecture({}, preset_name=preset, vocab_size=VOCABULARY, seq_length=SEQUENCE)
        fully = options.layout == "fully-sharded"
        parallel = ParallelOptions(bf16=precision == "bf16", use_distributed_optimizer=layout.data > 1, use_megatron_fsdp=fully)
        models = build_model(architecture, layout, machine, BuildOptions(dtype=precision))
        chunks = wrap_data_parallel(models, parallel)
        if fully:
            groups = [group for chunk in chunks for group in chunk.param_and_grad_buffer.parameter_groups]
            buffers = {"weights": "model_weight_buffer", "gradients": "main_grad_buffer", "optimizer": "main_weight_buffer"}
            found[name] = {part: sum(size(getattr(group, buffer).data) for group in groups) for part, buffer in buffers.items()}
            found[name]["optimizer"] *= 3 if precision == "bf16" else 2  # AdamW's moments, of the shards of the weights
            continue
        batch = BatchOptions(seq_length=SEQUENCE, global_batch_size=2, train_iters=2, lr=1e-3)
        optimizer = make_optimizer(chunks, parallel, batch, machine)
        for chunk in chunks:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                buffer.grad_data.fill_(1e-3)
        optimizer.step()
        if ranks == 1:
            found[name] = {"activations": kept_of_a_forward_pass(models[0])}
        found.setdefault(name, {})
        found[name] |= {
            "weights": sum(size(parameter) for model in models for parameter in model.parameters()),
            "gradients": sum(size(buffer.grad_data) for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]),
            "optimizer": optimizer_bytes(optimizer, mixed=parallel.bf16),
        }
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, found)
    fullest = {name: max((rank[name] for rank in gathered), key=lambda parts: sum(parts.values())) for name in found}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(fullest))


def kept_of_a_forward_pass(model: Any) -> int:
    """Return the bytes that a forward pass over MICRO sequences keeps for the backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(VOCABULARY, (MICRO, SEQUENCE + 1))
    positions = torch.arange(SEQUENCE).expand(MICRO, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(optimizer: Any, *, mixed: bool) -> int:
    """Moments, and with bf16 the fp32 weights that the optimizer steps."""
    total = 0
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                total += size(parameter) if mixed else 0
                total += sum(size(value) for key, value in inner.state[parameter].items() if key != "step")
    return total


if __name__ == "__main__":
    main()
