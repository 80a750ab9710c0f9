"""Initial weights that depend on the seed and on the parameter's name in the whole model, never on the layout.

Each parameter is drawn whole from its own random stream and cut as megatron-core cuts it: normal with `init_method_std`, for the
matrices that write to the residual stream divided by sqrt(2 · layers) (GPT-2; Megatron-LM, arXiv:1909.08053), ones for norms,
zeros for biases.
"""

import hashlib
import math
import re
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.models.architecture import Architecture

_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
_GATED = "linear_fc1.weight"


def initialize_parameters(model: GPTModel, architecture: Architecture, *, seed: int) -> None:
    """Fill the parameters of one model chunk in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(_draw(_global_name(model, name), parameter, architecture, seed))


def _global_name(model: GPTModel, name: str) -> str:
    """Replace the indices of layer and expert on this rank by those in the model; a tied output layer is the embedding.

    Experts are modules of their own on the CPU, and parameters of one module on CUDA (weight0, weight1, …).
    """
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        rest = re.sub(r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", match[2])
        rest = re.sub(r"(?<=local_experts\.)\d+", lambda local: str(_first_expert(model) + int(local[0])), rest)
        return f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}.{rest}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def _first_expert(model: GPTModel) -> int:
    """Return the number in the model of this rank's first expert."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    return int(parallel_state.get_expert_model_parallel_rank() * model.config.num_moe_experts // ranks)


def _draw(name: str, parameter: torch.nn.Parameter, architecture: Architecture, seed: int) -> torch.Tensor:
    """Return this rank's part of the parameter."""
    std = architecture.init_method_std
    if name.endswith(_RESIDUAL):
        std /= math.sqrt(2 * architecture.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if ".experts." in name:
        size, rank = parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank()
    else:
        size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    shape = list(parameter.shape)
    split = getattr(parameter, "partition_dim", -1)
    if split >= 0:
        shape[split] *= size
    vocabulary = "word_embeddings" in name or "output_layer" in name
    rows = architecture.vocab_size if vocabulary else shape[0]
    whole = torch.empty(rows, *shape[1:]).normal_(0.0, std, generator=generator)
    if rows < shape[0]:  # rows that pad the vocabulary
        whole = torch.cat([whole, whole.new_zeros(shape[0] - rows, *shape[1:])])
    if split < 0 or size == 1:
        return whole
    if name.endswith(_GATED):  # each rank holds its part of the gate, then its part of the up projection
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return cast(torch.Tensor, whole.chunk(size, dim=split)[rank])
