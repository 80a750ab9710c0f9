"""Whether megatron-core and transformers compute the same with the weights of both sides, in fp32, on the tokens of a text.

Where the whole model fits the free memory, every layer and the logits are compared; where it does not, a sample of layers is, one at
a time, each on the hidden states that the one before it left. Does not know: how the weights are stored.
"""

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_instruct.conversion import huggingface_side, megatron_side, proof
from megatron_instruct.conversion.safetensors_folder import read_rows, stored_tensors
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.platform.device import Machine

_BYTES_PER_PARAMETER = 7.0  # fp32 and what is stored beside it, were all of it in memory at once: what is much smaller is soon computed
_RESERVE = 1.5e9  # bytes
_SAMPLE_TOKENS = 64  # of the text that single layers are compared on, and whole models at least
_WORK = 1.5e11  # parameters x tokens of a whole model: some ten seconds of two cores for both sides
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Both sides of a conversion."""

    architecture: Architecture
    parameter: Callable[[str], torch.Tensor]
    """megatron-core's parameter of this name, in fp32; a vocabulary without its padding."""
    folder: Path
    """The Hugging Face folder."""
    config_file: Path
    rounded_to: torch.dtype | None
    """The type that weights were rounded to on the way, if any."""


def compare(sides: Sides, machine: Machine, ids: list[int]) -> list[proof.Check]:
    """Run both sides over a text."""
    import psutil

    needed = sides.architecture.num_parameters * _BYTES_PER_PARAMETER + _RESERVE
    return whole_model(sides, machine, ids) if needed < psutil.virtual_memory().available else sample_of_layers(sides, machine, ids)


def whole_model(sides: Sides, machine: Machine, ids: list[int]) -> list[proof.Check]:
    """Compare every layer, and the logits; of a larger model on fewer tokens."""
    architecture = sides.architecture
    ids = ids[: max(_SAMPLE_TOKENS, round(_WORK / architecture.num_parameters))]
    model = megatron_side.build(architecture, machine, sides.parameter)
    ours = megatron_side.outputs_of(model, architecture, ids, epsilon=proof.epsilon_of(sides.rounded_to))
    del model
    layers, logits = huggingface_side.outputs(sides.folder, sides.config_file, ids)
    checks = [
        proof.check_layer(number, mine, theirs, moved=moved)
        for number, (mine, theirs, moved) in enumerate(zip(ours.layers, layers, ours.layers_moved, strict=True))
    ]
    return [*checks, proof.check_logits(ours.logits, logits, moved=ours.logits_moved)]


def sample_of_layers(sides: Sides, machine: Machine, ids: list[int]) -> list[proof.Check]:
    """Compare the first, the middle and the last layer, and the first one with a sliding window.

    No side ever has more than one matrix in fp32; the rest of a layer stays in its file.
    """
    architecture = sides.architecture
    ids = ids[:_SAMPLE_TOKENS]
    hidden_SC = read_rows(_EMBEDDING, stored_tensors(sides.folder)[_EMBEDDING], ids).float()
    last = architecture.num_layers - 1
    checks = []
    for layer in sorted({0, last // 2, last, architecture.first_window_layer}):
        has_window = architecture.sliding_window is not None and layer >= architecture.first_window_layer
        one = dataclasses.replace(
            architecture,
            num_layers=1,
            vocab_size=1,
            tie_embeddings=True,
            first_window_layer=0,
            sliding_window=architecture.sliding_window if has_window else None,
        )
        model = megatron_side.build(one, machine, lambda name, layer=layer: _of_layer(sides, name, layer))  # type: ignore[misc]
        outputs = megatron_side.outputs_of(model, one, [0] * len(ids), epsilon=proof.epsilon_of(sides.rounded_to), hidden_SC=hidden_SC)
        del model
        gc.collect()  # a model's parts know each other
        ours = outputs.layers[0]
        theirs = huggingface_side.layer_output(sides.folder, sides.config_file, layer, hidden_SC)
        checks.append(proof.check_layer(layer, ours, theirs, moved=outputs.layers_moved[0]))
        hidden_SC = ours
    return checks


def _of_layer(sides: Sides, name: str, layer: int) -> torch.Tensor:
    """Return a parameter of the layer for a model that has it alone; what lies outside the layers is not looked at."""
    if name.startswith("decoder.layers.0."):
        return sides.parameter(name.replace("decoder.layers.0.", f"decoder.layers.{layer}.", 1))
    return torch.zeros(1)
