"""transformers' view of a Hugging Face folder, from a process of its own.

A process that runs megatron-core on the CPU has torch's tensor factories replaced (platform/cpu_seam.py), and transformers 5.19
then leaves the rotary frequencies of a loaded model uninitialised without a word. So transformers gets a process that has met
neither; it is started once, and ends with this one, however this one ends. Nothing is ever downloaded, and no code of a folder is run.
"""

import functools
import multiprocessing
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.errors import InputError


def start() -> None:
    """Start the process, so that it loads its libraries while this one works."""
    _process()


def logits(folder: Path, config_file: Path, ids: list[int]) -> torch.Tensor:
    """Return transformers' fp32 logits [S, V]. Raises InputError where transformers would make up a weight, or cannot load the folder."""
    return torch.from_numpy(_ask("logits", folder, config_file, ids))


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
            connection.send((True, _logits(*values) if question == "logits" else _token_ids(*values)))
        except Exception as error:  # whatever it is, it is the answer
            connection.send((False, f"{type(error).__name__}: {error}"))


def _logits(folder: Path, config_file: Path, ids: list[int]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(config_file, local_files_only=True)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise ValueError(f"{what.replace('_', ' ')} {sorted(map(str, loading[what]))}")
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def _token_ids(folder: Path, text: str) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
