"""tools/plan.py: a model and a cluster in; the best layouts, their cost, and the settings of the chosen one out. Needs no torch.

The walk: settings -> model and GPUs -> every legal layout, estimated -> table or JSON -> files of the chosen layout.
"""

import json
from collections.abc import Sequence

from megatron_instruct.config import run_tool
from megatron_instruct.errors import ConfigError
from megatron_instruct.files import atomic_folder, atomic_write, read_json, write_json
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import check_positions
from megatron_instruct.models.fp8_sizes import CAPABILITIES, NEEDS
from megatron_instruct.models.huggingface_config import read_architecture
from megatron_instruct.models.presets import DIMENSIONS, make_architecture
from megatron_instruct.planning.chart import write_chart
from megatron_instruct.planning.config import ModelOptions, PlanConfig
from megatron_instruct.planning.constants import Constants, load_constants
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.gpus import check_precision, find_gpu
from megatron_instruct.planning.report import GIB, as_json, describe_ranking, layout_in_words, parts, sentence, subject
from megatron_instruct.planning.search import Ranking, Task, rank, smallest_that_fits, usable_counts
from megatron_instruct.planning.settings import command_line, needs_checkpoint, settings_yaml
from megatron_instruct.planning.validation import table

SETTINGS, SCRIPT, PLAN, CHART = "pretrain.yaml", "run.sh", "plan.json", "plan.png"
"""Files that --write makes."""
_MOST_GPUS = 65536
"""How far to look for a number of GPUs that is enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/plan.py."""
    return run_tool(PlanConfig, run, argv, prog="plan.py")


def run(config: PlanConfig) -> None:
    """Print the plan, and write the files of the chosen layout. Raises ConfigError where nothing is legal or fits."""
    if config.output.validate:
        print(table())
        return
    task, constants, tokens = make_task(config), load_constants(), config.training.train_tokens
    ranking = rank(task, constants)
    if not ranking.fitting:
        raise ConfigError(_nothing_legal(task) if ranking.closest is None else _nothing_fits(task, ranking.closest, constants))
    shown = ranking.best_of_each_kind()[: config.output.top]
    if config.output.json:
        print(json.dumps(as_json(task, ranking, shown, tokens), indent=2))
    else:
        print(describe_ranking(task, ranking, shown, tokens))
    if config.output.write is not None:
        _write(config, task, ranking, shown)


def make_task(config: PlanConfig) -> Task:
    """Return what is to be planned, checked."""
    cluster, training = config.cluster, config.training
    assert cluster.gpu is not None and cluster.num_gpus is not None and training.global_batch_size is not None, "PlanConfig checks them"
    gpu = find_gpu(
        cluster.gpu,
        memory_gib=cluster.gpu_memory_gib,
        network_gb_per_second=cluster.network_gb_per_second,
        gpus_per_node=cluster.gpus_per_node,
    )
    check_precision(gpu, training.precision)
    able = [name for name, capability in CAPABILITIES.items() if capability >= NEEDS[training.fp8_recipe][0]]
    if training.precision == "fp8" and gpu.generation not in able:
        raise ConfigError(
            f"fp8_recipe={training.fp8_recipe} needs a {' or '.join(map(str.title, able))} GPU, and {gpu.kind} is none; "
            "take fp8_recipe=tensorwise or delayed."
        )
    node = gpu.gpus_per_node
    if cluster.num_gpus > node and cluster.num_gpus % node:
        less = cluster.num_gpus - cluster.num_gpus % node
        raise ConfigError(
            f"num_gpus={cluster.num_gpus} is not a multiple of the {node} GPUs of a machine; "
            f"take {less} or {less + node}, or set gpus_per_node."
        )
    architecture = find_architecture(config.model, training.seq_length)
    return Task(
        architecture=architecture,
        gpu=gpu,
        num_gpus=cluster.num_gpus,
        seq_length=training.seq_length,
        global_batch_size=training.global_batch_size,
        precision=training.precision,
        fp8_recipe=training.fp8_recipe,
        vocab_divisor=config.model.make_vocab_size_divisible_by,
    )


def find_architecture(options: ModelOptions, seq_length: int) -> Architecture:
    """Return the model of a preset, of single dimensions, or of a Hugging Face folder."""
    if options.hf_folder is not None:
        source = options.hf_folder / "config.json"
        architecture = read_architecture(read_json(source), source=str(source), max_position_embeddings=None)
    else:
        given = {name: getattr(options, name, None) for name in DIMENSIONS}
        architecture = make_architecture(given, preset_name=options.preset, vocab_size=options.vocab_size, seq_length=seq_length)
    return check_positions(architecture, seq_length)


def _nothing_legal(task: Task) -> str:
    counts = " or ".join(f"{count:,}" for count in usable_counts(task))
    return (
        f"num_gpus={task.num_gpus}: no layout of this model is legal on so many GPUs with global_batch_size={task.global_batch_size}: "
        f"the ranks that TP, CP and PP leave over must divide the global batch. "
        + (f"Usable near it: {counts}; or change global_batch_size." if counts else "Change global_batch_size.")
    )


def _nothing_fits(task: Task, closest: Estimate, constants: Constants) -> str:
    enough = smallest_that_fits(task, constants, most=min(_MOST_GPUS, 64 * task.num_gpus))
    remedies = [f"on {enough:,} GPUs it fits"] if enough else []
    remedies += ["take a kind with more memory (h200, b200)", "shorten seq_length", "take a smaller model"]
    return (
        f"no layout of {task.architecture.num_parameters / 1e9:,.1f} billion parameters fits {task.num_gpus:,} x {task.gpu.kind}. "
        f"The closest, {layout_in_words(closest)}, misses {closest.missing_bytes / GIB:,.1f} GiB a GPU. "
        f"{parts(closest)[0]}. Ways out: {'; '.join(remedies)}."
    )


def _write(config: PlanConfig, task: Task, ranking: Ranking, shown: Sequence[Estimate]) -> None:
    """Write the settings and the command line of the chosen layout, the whole plan, and the chart."""
    folder, training = config.output.write, config.training
    assert folder is not None, "only called with --write"
    if config.output.choose > len(shown):
        raise ConfigError(f"choose={config.output.choose}: the table has {len(shown)} layouts; choose one of them.")
    chosen = shown[config.output.choose - 1]
    with atomic_folder(folder) as place:
        settings = settings_yaml(
            config.model, task.architecture, chosen, fp8_recipe=task.fp8_recipe, train_tokens=training.train_tokens, lr=training.lr
        )
        script = command_line(chosen, config=str(folder / SETTINGS), checkpoint=needs_checkpoint(config.model, task.architecture))
        with atomic_write(place / SETTINGS) as stream:
            stream.write(f"# {layout_in_words(chosen)}\n# {sentence(chosen, training.train_tokens)} (estimated by tools/plan.py)\n")
            stream.write(settings)
        with atomic_write(place / SCRIPT) as stream:
            stream.write(script)
        (place / SCRIPT).chmod(0o755)
        write_json(place / PLAN, as_json(task, ranking, shown, training.train_tokens))
        write_chart(place / CHART, shown, title=f"{subject(task)} (estimates)")
    if not config.output.json:
        start = script.index("torchrun")
        print(f"\n{folder}: {SETTINGS}, {SCRIPT}, {PLAN}, {CHART}. Layout {config.output.choose} starts with\n{script[start:].rstrip()}")
