"""What is decayed, and loss and gradient of the z-loss beside a plain formula, on each tensor rank that torchrun starts. Prints JSON."""

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
from megatron_instruct.models.vocabulary_padding import leave_out_padding
from megatron_instruct.models.z_loss import add_z_loss
from megatron_instruct.platform import device
from megatron_instruct.training.optimizer import make_optimizer, torch_optimizers, wrap_data_parallel
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.parallel import ParallelOptions

COEFFICIENT, VOCABULARY, SEQUENCE, BATCH = 0.3, 256, 5, 2
WITHOUT_PADDING = 100
"""Ids where the rows of the second rank, and some of the first, are padding."""


def main() -> None:
    machine = device.initialize()
    size = torch.distributed.get_world_size()
    layout = ParallelLayout(world_size=size, tensor=size)
    join_model_parallel_groups(layout, seed=1)
    result: dict[str, object] = {}
    for exempt in (False, True):
        architecture = make_architecture({"family": "qwen2", "num_layers": 1}, preset_name="tiny", vocab_size=VOCABULARY, seq_length=8)
        (model,) = build_model(architecture, layout, machine, BuildOptions())
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        chunks = wrap_data_parallel([model], ParallelOptions())
        batch = BatchOptions(global_batch_size=1, train_iters=2, lr=1e-3, no_weight_decay_on_embeddings=exempt)
        optimizer = make_optimizer(chunks, ParallelOptions(), batch, machine)
        decay = {
            names[id(parameter)]: group["wd_mult"]
            for inner in torch_optimizers(optimizer)
            for group in inner.param_groups
            for parameter in group["params"]
        }
        result["exempt" if exempt else "default"] = decay
    add_z_loss(model, COEFFICIENT)
    result["loss"], result["gradient"] = _differences(model, VOCABULARY)
    leave_out_padding(model, WITHOUT_PADDING)
    result["loss without padding"], result["gradient without padding"] = _differences(model, WITHOUT_PADDING)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _differences(model: Any, vocab_size: int) -> tuple[float, float]:
    """Return how far loss and gradient are from the plain formula over so many of the logits."""
    generator = torch.Generator().manual_seed(3)
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    whole = 4 * torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator)
    labels_BS = torch.randint(0, vocab_size, (BATCH, SEQUENCE), generator=generator)
    mine = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    losses_BS = model.compute_language_model_loss(labels_BS, mine * 1.0)
    losses_BS.sum().backward()

    plain = whole.clone().requires_grad_()
    logits = plain[..., :vocab_size]
    entropy_SB = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.T.flatten(), reduction="none").view(SEQUENCE, BATCH)
    (entropy_SB + COEFFICIENT * logits.logsumexp(-1).square()).sum().backward()
    assert mine.grad is not None
    assert plain.grad is not None
    wanted = plain.grad.chunk(size, dim=-1)[rank]
    return float((losses_BS.T - entropy_SB).detach().abs().max()), float((mine.grad - wanted).abs().max())


if __name__ == "__main__":
    main()
