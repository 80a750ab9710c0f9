"""Train a tiny model of each family for three steps, in the processes that torchrun starts: TENSOR. Prints what came of it as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed

from megatron_instruct.models.architecture import FAMILIES
from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture
from megatron_instruct.platform import device
from megatron_instruct.training.optimizer import make_optimizer, wrap_data_parallel
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.parallel import ParallelOptions
from megatron_instruct.training.step import StepShape, compute_gradients, update

SEQUENCE, STEPS = 32, 3


def main() -> None:
    tensor = int(sys.argv[1])
    machine = device.initialize()
    layout = ParallelLayout(world_size=torch.distributed.get_world_size(), tensor=tensor, sequence_parallel=tensor > 1)
    join_model_parallel_groups(layout, seed=1234)
    result: dict[str, Any] = {}
    for family, parts in FAMILIES.items():
        experts = {"num_experts": 4, "experts_per_token": 2, "router_aux_loss_coef": 0.02} if parts.experts else {}
        window = {"sliding_window": 12} if parts.window else {}
        given = {"family": family, "num_layers": 2, **experts, **window}
        architecture = make_architecture(given, preset_name="tiny", vocab_size=200, seq_length=SEQUENCE)
        models = build_model(architecture, layout, machine, BuildOptions())
        chunks = wrap_data_parallel(models, ParallelOptions())
        batch = BatchOptions(seq_length=SEQUENCE, micro_batch_size=2, global_batch_size=2, train_iters=STEPS, lr=3e-3, lr_warmup_iters=0)
        optimizer = make_optimizer(chunks, ParallelOptions(), batch, machine)
        tokens = torch.randint(0, 200, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
        micro = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(2, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        }
        before = {name: value.detach().clone() for name, value in models[0].named_parameters()}
        shape = StepShape(num_microbatches=1, micro_batch_size=2, seq_length=SEQUENCE)
        steps = [update(optimizer, compute_gradients(chunks, optimizer, [iter([micro])], shape)) for _ in range(STEPS)]
        still = [name for name, value in models[0].named_parameters() if torch.equal(value, before[name])]
        result[family] = {"losses": [step.loss for step in steps], "norms": [step.grad_norm for step in steps], "unchanged": still}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
