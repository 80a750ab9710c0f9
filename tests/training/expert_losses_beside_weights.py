"""What the router's losses add to its gradient where some of the tokens count in the loss, and where all do; prints one line of JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_instruct.platform import noise


def main() -> None:
    noise.silence()
    import torch

    from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
    from megatron_instruct.models.layout import ParallelLayout
    from megatron_instruct.models.presets import make_architecture
    from megatron_instruct.platform import device
    from megatron_instruct.training.expert_losses import scale_expert_losses
    from megatron_instruct.training.optimizer import make_optimizer, wrap_data_parallel
    from megatron_instruct.training.settings.batch import BatchOptions
    from megatron_instruct.training.settings.parallel import ParallelOptions
    from megatron_instruct.training.step import StepShape, compute_gradients, share_that_counts
    from megatron_instruct.training.streams import Replayable

    machine = device.initialize(timeout_minutes=1, threads=1)
    layout, shape = ParallelLayout(world_size=1), StepShape(num_microbatches=2, micro_batch_size=1, seq_length=32)
    join_model_parallel_groups(layout, seed=1)
    architecture = make_architecture({"num_layers": 1}, preset_name="tiny-experts", vocab_size=128, seq_length=32)
    models = build_model(architecture, layout, machine, BuildOptions())
    chunks = wrap_data_parallel(models, ParallelOptions())
    optimizer = make_optimizer(chunks, ParallelOptions(), BatchOptions(global_batch_size=2, train_iters=1, lr=1e-3), machine)
    router = next(parameter for name, parameter in models[0].named_parameters() if name.endswith("router.weight"))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 128, (2, 1, 33), generator=generator)

    def gradient(counted: tuple[int, int], coefficient: float) -> torch.Tensor:
        """counted: tokens of each microbatch that count in the loss."""
        models[0].config.moe_aux_loss_coeff = models[0].config.moe_z_loss_coeff = coefficient
        masks = [(torch.arange(32) < count).float()[None] for count in counted]
        positions = torch.arange(32)[None]
        batches = [
            {"tokens": row[:, :-1], "labels": row[:, 1:], "loss_mask": mask, "position_ids": positions}
            for row, mask in zip(tokens, masks, strict=True)
        ]
        stream = Replayable(iter(batches))
        scale_expert_losses(models[0].config, share_that_counts(stream.peek(2)))
        compute_gradients(chunks, optimizer, [stream], shape)
        return router.main_grad.clone()

    some, every = (gradient(counted, 0.5) - gradient(counted, 0.0) for counted in ((3, 5), (32, 32)))
    print(json.dumps({"added": float(every.norm()), "difference": float((some - every).norm())}))


if __name__ == "__main__":
    main()
