"""transformers' view of a Hugging Face folder, from a process of its own.

A process that runs megatron-core on the CPU has torch's tensor factories replaced (platform/cpu_seam.py), and transformers 5.19
then leaves the rotary frequencies of a loaded model uninitialised without a word. So transformers gets a process that has met
neither; it is started once, and ends with this one, however this one ends. Nothing is ever downloaded, and no code of a folder is run.
"""

import functools
import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion.safetensors_folder import read_tensor, stored_tensors
from megatron_instruct.errors import InputError

_NO_VOCABULARY = 8  # rows of an embedding that is not used


def start() -> None:
    """Start the process, so that it loads its libraries while this one works."""
    _process()


def outputs(folder: Path, config_file: Path, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what transformers computes in fp32: after each layer [S, C], and the logits [S, V].

    Raises InputError where transformers would make up a weight, or cannot load the folder.
    """
    layers, logits = _ask("outputs", folder, config_file, ids)
    return [torch.from_numpy(layer) for layer in layers], torch.from_numpy(logits)


def layer_output(folder: Path, config_file: Path, layer: int, hidden_SC: torch.Tensor) -> torch.Tensor:
    """Return what transformers makes of hidden states with one layer of the folder, in fp32: [S, C]. No other layer takes memory."""
    return torch.from_numpy(_ask("layer_output", folder, config_file, layer, hidden_SC.numpy()))


def token_ids(folder: Path, text: str) -> list[int]:
    """Return the ids that AutoTokenizer makes of the text, without special tokens around it."""
    ids: list[int] = _ask("token_ids", folder, text)
    return ids


def _ask(question: str, *values: Any) -> Any:
    connection = _process()
    try:
        connection.send((question, values))
        succeeded, answer = connection.recv()
    except (EOFError, OSError) as error:
        _process.cache_clear()
        raise InputError("the process that runs transformers died, probably for lack of memory; free some, and run this again.") from error
    if not succeeded:
        raise InputError(f"transformers cannot load {values[0]}: {answer}")
    return answer


@functools.cache
def _process() -> "Connection[Any, Any]":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), daemon=True, name="transformers").start()
    theirs.close()
    return ours


def _serve(connection: "Connection[Any, Any]") -> None:
    """Answer questions until the other end is closed."""
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    while True:
        try:
            question, values = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _ANSWERS[question](*values)))
        except Exception as error:  # whatever it is, it is the answer
            connection.send((False, f"{type(error).__name__}: {error}"))


def _outputs(folder: Path, config_file: Path, ids: list[int]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(config_file, local_files_only=True)
    model = _load(folder, config)
    layers, logits = _run(model, input_ids=torch.tensor([ids]))
    return layers, logits


def _layer_output(folder: Path, config_file: Path, layer: int, hidden_SC: Any) -> Any:
    """Make a folder of this layer alone, with a vocabulary of nothing, and let transformers load it as it loads any."""
    import safetensors.torch
    import transformers

    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": _NO_VOCABULARY, "tie_word_embeddings": True}
    content = json.loads(config_file.read_text(encoding="utf-8"))
    if content.get("layer_types"):
        kind = content["layer_types"][layer]
        changes["layer_types"] = [kind]
    if "max_window_layers" in content:
        changes["max_window_layers"] = 0 if layer >= content["max_window_layers"] else 1
    kept = {name: value for name, value in content.items() if not name.endswith("_token_id")}
    prefix = f"model.layers.{layer}."
    tensors = {
        name.replace(prefix, "model.layers.0.", 1): read_tensor(name, stored)
        for name, stored in stored_tensors(folder).items()
        if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
    }
    hidden_size = hidden_SC.shape[1]
    tensors |= {"model.embed_tokens.weight": torch.zeros(_NO_VOCABULARY, hidden_size), "model.norm.weight": torch.ones(hidden_size)}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps({**kept, **changes}), encoding="utf-8")
        safetensors.torch.save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
        del tensors
        model = _load(Path(place), transformers.AutoConfig.from_pretrained(place, local_files_only=True))
        layers, _ = _run(model, inputs_embeds=torch.from_numpy(hidden_SC)[None])
    return layers[0]


def _load(folder: Path, config: Any) -> Any:
    """Load a model in fp32. Experts one by one: the grouped product of torch 2.13 refuses some sizes on the CPU."""
    import transformers

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        experts_implementation="eager",
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise ValueError(f"{what.replace('_', ' ')} {sorted(map(str, loading[what]))}")
    return model.eval()


def _run(model: Any, **given: torch.Tensor) -> tuple[list[Any], Any]:
    layers: list[Any] = []

    def keep(_module: Any, _input: Any, output: Any) -> None:
        layers.append((output[0] if isinstance(output, tuple) else output)[0].clone().numpy())

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0].float().numpy()
    return layers, logits


def _token_ids(folder: Path, text: str) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


_ANSWERS: dict[str, Callable[..., Any]] = {"outputs": _outputs, "layer_output": _layer_output, "token_ids": _token_ids}
