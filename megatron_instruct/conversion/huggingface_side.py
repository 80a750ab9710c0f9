"""transformers' view of a Hugging Face folder, from a process of its own.

A process that runs megatron-core on the CPU has torch's tensor factories replaced (platform/cpu_seam.py), and transformers 5.19
then leaves the rotary frequencies of a loaded model uninitialised without a word. So transformers gets a process that has met
neither; it is started once, and ends with this one, however this one ends. Nothing is ever downloaded, and no code of a folder is run.
"""

import contextlib
import functools
import gc
import json
import multiprocessing
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion.mapped import forget_pages
from megatron_instruct.conversion.safetensors_folder import read_tensor, stored_tensors
from megatron_instruct.errors import InputError
from megatron_instruct.platform.device import return_freed_memory

_NOT_NEEDED = ("sklearn", "torchaudio", "torchvision")
"""What transformers loads for other models where it finds it: 3 s and 130 MB."""
_LOAD = "load"
"""The one question that is not answered."""
_NO_VOCABULARY = 8  # rows of an embedding that is not used


def start(model_class: str) -> None:
    """Start the process, so that it loads its libraries, and transformers' class of the model, while this one works."""
    with contextlib.suppress(OSError):  # it died since it was last asked: whoever asks next says so
        _process().send((_LOAD, (model_class,)))


def outputs(folder: Path, config_file: Path, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what transformers computes in fp32: after each layer [S, C], and the logits [S, V].

    Raises InputError where transformers would make up a weight, or cannot load the folder.
    """
    layers, logits = _ask("outputs", folder, config_file, ids)
    return [torch.from_numpy(layer) for layer in layers], torch.from_numpy(logits)


def layer_output(folder: Path, config_file: Path, layer: int, hidden_SC: torch.Tensor) -> torch.Tensor:
    """Return what transformers makes of hidden states with one layer of the folder, in fp32: [S, C]. No other layer takes memory."""
    return torch.from_numpy(_ask("layer_output", folder, config_file, layer, hidden_SC.numpy()))


def token_ids(folder: Path, config_file: Path, text: str) -> tuple[list[int], str]:
    """Return the ids that AutoTokenizer makes of the text, without special tokens around it, and the class that it takes.

    The class depends on config.json, too, whose place `config_file` is to take.
    """
    ids, kind = _ask("token_ids", folder, config_file, text)
    return ids, kind


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
    """Start the process. Before megatron-core is imported it is a fork, which shares the 280 MB that torch takes on import."""
    context: Any = multiprocessing.get_context("spawn" if "megatron.core" in sys.modules else "fork")
    ours, theirs = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: those of numpy's matrix products, at rest here
        context.Process(target=_serve, args=(theirs, ours), daemon=True, name="transformers").start()
    theirs.close()
    connection: Connection[Any, Any] = ours
    return connection


def _serve(connection: "Connection[Any, Any]", other_end: "Connection[Any, Any]") -> None:
    """Answer questions until the other end is closed, of which a fork has a copy.

    In a thread of its own: OpenMP's threads belong to the one that started them, and of a fork's first thread, where it had any, they are
    in the other process; it would wait for them for ever.
    """
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asks, and with it this one
    return_freed_memory()
    thread = threading.Thread(target=_answer, args=(connection,))
    thread.start()
    thread.join()


def _answer(connection: "Connection[Any, Any]") -> None:
    warnings.simplefilter("ignore")
    if "transformers" not in sys.modules:  # of a fork it may be there, and have found them
        sys.modules |= dict.fromkeys(_NOT_NEEDED)  # type: ignore[arg-type]
    gc.disable()  # which costs a tenth of the time of so many imports
    import transformers

    gc.enable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    while True:
        try:
            question, values = connection.recv()
        except EOFError:
            return
        if question == _LOAD:
            with contextlib.suppress(Exception):  # what is wrong shows when the class is asked for
                getattr(transformers, values[0])
            continue
        try:
            connection.send((True, _ANSWERS[question](*values)))
        except Exception as error:  # whatever it is, it is the answer
            connection.send((False, f"{type(error).__name__}: {error}"))
        gc.collect()  # the parts of the model that was loaded know each other


def _outputs(folder: Path, config_file: Path, ids: list[int]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(config_file, local_files_only=True, trust_remote_code=False)
    layers, logits = _run(_load(config, _weights(folder)), input_ids=torch.tensor([ids]))
    return layers, logits


def _layer_output(folder: Path, config_file: Path, layer: int, hidden_SC: Any) -> Any:
    """Let transformers load this layer alone, with a vocabulary of nothing."""
    import transformers

    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": _NO_VOCABULARY, "tie_word_embeddings": True}
    content = json.loads(config_file.read_text(encoding="utf-8"))
    if content.get("layer_types"):
        changes["layer_types"] = [content["layer_types"][layer]]
    if "max_window_layers" in content:
        changes["max_window_layers"] = 0 if layer >= content["max_window_layers"] else 1
    kept = {name: value for name, value in content.items() if not name.endswith("_token_id")}
    prefix = f"model.layers.{layer}."
    tensors = {name.replace(prefix, "model.layers.0.", 1): tensor for name, tensor in _weights(folder, prefix).items()}
    size = hidden_SC.shape[1]
    dtype = next(iter(tensors.values())).dtype
    tensors |= {"model.embed_tokens.weight": torch.zeros(_NO_VOCABULARY, size, dtype=dtype)}
    tensors |= {"model.norm.weight": torch.ones(size, dtype=dtype)}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps({**kept, **changes}), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    layers, _ = _run(_load(config, tensors), inputs_embeds=torch.from_numpy(hidden_SC)[None])
    return layers[0]


def _weights(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights whose names begin so, without those that old folders hold and that follow from the configuration."""
    return {
        name: read_tensor(name, stored)
        for name, stored in stored_tensors(folder).items()
        if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
    }


def _load(config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Let transformers load the tensors, which stay in their files; each module computes with copies of its own in fp32.

    Experts one by one: the grouped product of torch 2.13 refuses some sizes on the CPU.
    """
    import transformers

    types = {tensor.dtype for tensor in tensors.values()}
    model, loading = getattr(transformers, config.architectures[0]).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=types.pop() if len(types) == 1 else torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        experts_implementation="eager",
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise ValueError(f"{what.replace('_', ' ')} {sorted(map(str, loading[what]))}")
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            stored = {name: value.data for name, value in own.items()}
            module.register_forward_pre_hook(lambda _module, _given, own=own, stored=stored: _compute_in_fp32(own, stored))
            module.register_forward_hook(lambda _module, _given, _made, own=own, stored=stored: _give_back(own, stored))
    return model.eval()


def _compute_in_fp32(own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    for name, value in own.items():
        value.data = stored[name].float()


def _give_back(own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    for name, value in own.items():
        value.data = stored[name]
    forget_pages()


def _run(model: Any, **given: torch.Tensor) -> tuple[list[Any], Any]:
    layers: list[Any] = []

    def keep(_module: Any, _input: Any, output: Any) -> None:
        layers.append((output[0] if isinstance(output, tuple) else output)[0].clone().numpy())

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0].float().numpy()
    return layers, logits


def _token_ids(folder: Path, config_file: Path, text: str) -> tuple[list[int], str]:
    import transformers

    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            (Path(place) / file.name).symlink_to(file.absolute())
        (Path(place) / "config.json").unlink(missing_ok=True)
        (Path(place) / "config.json").symlink_to(config_file.absolute())
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), type(tokenizer).__name__


_ANSWERS: dict[str, Callable[..., Any]] = {"outputs": _outputs, "layer_output": _layer_output, "token_ids": _token_ids}
