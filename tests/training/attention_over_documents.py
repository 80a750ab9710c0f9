"""What a small model says of two documents in one sequence; started as a process of its own, prints one line of JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_instruct.platform import noise

EOD, FIRST, SECOND = 0, 9, 6


def main() -> None:
    noise.silence()
    import torch

    from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
    from megatron_instruct.models.layout import ParallelLayout
    from megatron_instruct.models.presets import make_architecture
    from megatron_instruct.platform import device
    from megatron_instruct.training.documents import forbidden_attention

    machine = device.initialize(timeout_minutes=1, threads=1)
    layout = ParallelLayout(world_size=1)
    join_model_parallel_groups(layout, seed=1)
    size = make_architecture({}, preset_name="tiny", vocab_size=64, seq_length=32)
    (model,) = build_model(size, layout, machine, BuildOptions(make_vocab_size_divisible_by=64))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    first, other, second = (torch.randint(1, 64, (1, n), generator=generator) for n in (FIRST, FIRST, SECOND))
    end = torch.tensor([[EOD]])

    def logits(*parts: torch.Tensor, within_documents: bool) -> torch.Tensor:
        tokens = torch.cat(parts, dim=1)
        positions = torch.arange(tokens.size(1))[None]
        with torch.no_grad():
            return model(tokens, positions, forbidden_attention(tokens, EOD) if within_documents else None)[0]

    found = {}
    for within in (True, False):
        one, two = (logits(start, end, second, within_documents=within)[FIRST + 1 :] for start in (first, other))
        found[f"changed by the document before ({within})"] = not torch.equal(one, two)
        alone = logits(second, within_documents=within)
        found[f"difference from the document alone ({within})"] = float((one - alone).abs().max())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
