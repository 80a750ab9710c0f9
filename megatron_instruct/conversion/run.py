"""tools/convert_checkpoint.py: a Hugging Face folder -> a Megatron checkpoint, or back, or a checkpoint laid out anew; the source says.

The walk: settings -> direction -> source, checked by name and size -> weight table -> result under a temporary name -> proof -> commit.
"""

import gc
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_instruct.config import run_tool
from megatron_instruct.conversion.config import ConvertConfig, Way
from megatron_instruct.conversion.digests import Digests
from megatron_instruct.conversion.target import BYTES, require_memory, require_new, require_room
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest, finished
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import iteration_folder

_HUGGINGFACE, _MEGATRON = "config.json", "latest_checkpointed_iteration.txt"


def way_of(config: ConvertConfig) -> Way:
    """Recognise what the source is and return what is made of it; --to must agree."""
    found = [name for name in (_HUGGINGFACE, _MEGATRON) if (config.load / name).is_file()]
    if not found:
        raise InputError(
            f"load={config.load} is neither a Hugging Face folder ({_HUGGINGFACE}) nor a checkpoint folder ({_MEGATRON}); "
            "give one of them. An iter_ folder is named by its parent and --iteration."
        )
    if len(found) == 2 and config.to is None:
        raise ConfigError(f"load={config.load} holds both {_HUGGINGFACE} and {_MEGATRON}; say with --to what to make.")
    if found == [_HUGGINGFACE] and config.to == "huggingface":
        raise ConfigError(f"to='huggingface', but load={config.load} holds {_HUGGINGFACE}, which becomes 'megatron'; drop --to.")
    if _MEGATRON in found and config.to != "megatron":
        return "export"
    if found == [_MEGATRON]:
        return "re-layout"
    if config.iteration is not None:
        raise ConfigError(f"iteration={config.iteration} goes with a Megatron source, and {config.load} is a Hugging Face folder; drop it.")
    return "import"


def run(config: ConvertConfig) -> Manifest:
    """Do the stage and return its manifest."""
    started = time.monotonic()
    way = way_of(config)
    with _quiet_libraries():
        manifest = {"import": _import, "export": _export, "re-layout": _relayout}[way](config)
    proved = "proved" if manifest.facts["proof"]["proved"] else "NOT proved (--no-prove)"
    print(
        f"{config.save}: {manifest.counts['parameters'] / 1e6:,.1f}M parameters in {manifest.facts['dtype']}, "
        f"for {'huggingface' if way == 'export' else 'megatron'}, {proved}; {time.monotonic() - started:,.1f} s"
    )
    return manifest


# torch takes seconds to import, and megatron-core some more: --help and a wrong flag answer without them, a source that is refused
# without megatron-core, and while it is imported, the source is read already.


def _import(config: ConvertConfig) -> Manifest:
    from megatron_instruct.conversion.huggingface_source import read_source

    source = read_source(config)
    place = iteration_folder(config.save, 0) / "manifest.json"
    inputs = source.inputs(config, {}) if place.is_file() else ()
    if (done := finished(place, stage="convert", settings=source.settings(config), inputs=inputs)) is not None:
        print(f"Finished already: {config.save}.")
        return done
    text = _prepare(config, source.architecture, source.dtype)
    with Digests(source.files, grows=False) as digests:
        with _quick_imports():
            from megatron_instruct.conversion.to_megatron import convert
        return convert(config, source, digests, text)


def _export(config: ConvertConfig) -> Manifest:
    from megatron_instruct.conversion.megatron_source import read_source

    source = read_source(config)
    place, settings = config.save / "manifest.json", source.settings(config)
    if (done := finished(place, stage="convert", settings=settings, inputs=source.inputs(config))) is not None:
        print(f"Finished already: {config.save}.")
        return done
    text = _prepare(config, source.architecture, source.dtype)
    with Digests(source.files, grows=False) as digests:
        with _quick_imports():
            from megatron_instruct.conversion.to_huggingface import convert
        return convert(config, source, digests, text)


def _relayout(config: ConvertConfig) -> Manifest:
    from megatron_instruct.conversion.relayout import relayout

    return relayout(config)


def _prepare(config: ConvertConfig, architecture: Architecture, dtype: str) -> str:
    """Check the target, the disk, the memory, and the proof's text, which is returned; start what the proof needs."""
    from megatron_instruct.conversion import huggingface_side, proof
    from megatron_instruct.conversion.weights import largest_tensor, weights_of
    from megatron_instruct.models.huggingface_config import FORMS

    require_new(config.save)
    require_room(config.save, architecture.num_parameters * BYTES[dtype])
    require_memory(largest_tensor(weights_of(architecture)))
    text = proof.proof_text(config.prove_text)
    if config.prove:
        huggingface_side.start(FORMS[architecture.family].model_class)
    return text


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave out what megatron-core 0.19.2 and torch 2.13 say of themselves: missing GPU libraries and their own deprecations."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.")
        yield


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Let megatron-core 0.19.2 be imported without torch's compiler, which it asks for on import and which conversion has no use for.

    It takes 2 s and 70 MB. Without collections of garbage, too: that so many imports leave none takes a tenth of their time to find out.
    """
    import torch

    gc.disable()
    compiler = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(ConvertConfig, run, argv, prog="convert_checkpoint.py")
