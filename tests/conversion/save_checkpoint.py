"""Save a checkpoint as a trainer does, from the processes that torchrun starts: FOLDER TOKENIZER LAYOUT(JSON) ARCHITECTURE(JSON)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed

from megatron_instruct.manifest import Manifest, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
from megatron_instruct.models.checkpoint import save_weights
from megatron_instruct.models.checkpoint_folder import iteration_folder, write_latest
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.platform import device
from megatron_instruct.tokenizer import copy_tokenizer, load_tokenizer


def main() -> None:
    folder, tokenizer, sizes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    architecture = Architecture.from_json(json.loads(sys.argv[4]))
    machine = device.initialize()
    layout = ParallelLayout(world_size=torch.distributed.get_world_size(), **sizes)
    join_model_parallel_groups(layout, seed=1234)
    chunks = build_model(architecture, layout, machine, BuildOptions())
    path = iteration_folder(folder, 12)
    path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    save_weights(path, chunks)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "tokenizer").mkdir()
        copy_tokenizer(tokenizer, folder / "tokenizer")
        facts = {"architecture": architecture.to_json(), "iteration": 12, "tokenizer": load_tokenizer(tokenizer).fingerprint}
        outputs = records([path], relative_to=path)
        write_manifest(path / "manifest.json", Manifest(stage="pretrain", settings={"dtype": "fp32"}, outputs=outputs, facts=facts))
        write_latest(folder, 12)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
