"""What is loaded when: the package and every --help answer without torch, and the data stages work where torch cannot be imported."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_instruct.records import InstructionPair, MShotExample, OneShotExample

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "transformers", "megatron", "lm_eval")
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.stem != "launch")  # that one is torchrun, with its flags
DATA_PARTS = (
    "errors",
    "config",
    "records",
    "manifest",
    "files",
    "progress",
    "corpora",
    "templates",
    "tokenizer",
    "preprocessing",
    "synthesis",
)
"""What works without torch; a synthesis engine imports its library when it is made."""

PROBE = """
import json, runpy, sys
sys.argv = sys.argv[1:]
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
print("\\nPROBE " + json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} must not be needed here", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(*arguments: object, path: Sequence[Path] = (ROOT,)) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with only `path` added to where it finds modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def loaded_by_help(script: Path) -> tuple[int, set[str], str]:
    """Return the exit status of SCRIPT --help, the top-level modules it loaded and what it printed."""
    done = python("-c", PROBE, script, "--help")
    found = re.search(r"^PROBE (.*)$", done.stdout, flags=re.MULTILINE)
    assert found is not None, done.stdout + done.stderr
    status, modules = json.loads(found[1])
    return status, set(modules), done.stdout


def without(folder: Path, *blocked: str) -> list[Path]:
    """Return a module path on which `blocked` cannot be imported, in child processes neither."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    return [folder, ROOT]


def modules_of(parts: Sequence[str]) -> list[str]:
    package = ROOT / "megatron_instruct"
    files = [file for part in parts for file in (*package.glob(f"{part}.py"), *(package / part).rglob("*.py"))]
    return sorted({".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files})


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = python("-c", "import sys, megatron_instruct; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "megatron_instruct" in done.stdout.split()
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_answers_help_without_anything_heavy(tool: Path) -> None:
    status, modules, printed = loaded_by_help(tool)
    assert status == 0
    assert f"usage: {tool.name}" in printed
    assert "--config" in printed
    assert not modules & set(HEAVY)


def test_a_tool_that_loads_something_heavy_or_fails_is_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import wave, sys\nsys.exit(7)")
    status, modules, _ = loaded_by_help(bad)
    assert status == 7
    assert "wave" in modules


def test_data_parts_are_imported_where_torch_is_missing(tmp_path: Path) -> None:
    names = modules_of(DATA_PARTS)
    assert {"megatron_instruct.preprocessing.run", "megatron_instruct.config"} <= set(names)
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print('all there')"
    done = python("-c", code, *names, path=without(tmp_path, *HEAVY))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all there\n"


def test_a_blocked_module_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "needs_torch.py").write_text("def late():\n    import torch.nn\n")
    done = python("-c", "import needs_torch; needs_torch.late()", path=without(tmp_path, *HEAVY))
    assert done.returncode == 1
    assert "torch must not be needed here" in done.stderr


def test_rendering_and_preprocessing_run_where_torch_is_missing(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = without(tmp_path, *HEAVY)
    pair = InstructionPair(question="What is a bug?", answer="A mistake in a program.")
    shots = (OneShotExample(id="1", text="A bug is a mistake in a program.", pairs=(pair,)),)
    (tmp_path / "examples.jsonl").write_text(json.dumps(MShotExample(id="1", shots=shots).to_json()) + "\n")
    render = ("--input", tmp_path / "examples.jsonl", "--output-dir", tmp_path / "rendered")
    done = python(ROOT / "tools" / "render_templates.py", *render, path=path)
    assert done.returncode == 0, done.stderr
    encode = ("--input", tmp_path / "rendered" / "augmented.jsonl", "--output-prefix", tmp_path / "data" / "a", "--append-eod")
    done = python(ROOT / "tools" / "preprocess_data.py", *encode, "--tokenizer-model", tokenizer_folder, "--workers", 1, path=path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "a_text_document.bin").stat().st_size > 0


def test_workers_take_no_modules_from_the_folder_they_are_started_in(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    for name in ("numpy", "random", "msgspec"):
        (tmp_path / f"{name}.py").write_text('raise RuntimeError("a script of the user")\n')
    monkeypatch.chdir(tmp_path)
    files = ("--input", "a.jsonl", "--output-prefix", "data/a", "--tokenizer-model", tokenizer_folder)
    done = python(ROOT / "tools" / "preprocess_data.py", *files, "--workers", 1)
    assert done.returncode == 0, done.stderr


def test_every_installed_command_has_its_function() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    tools = dict(re.findall(r'^    "(\w+)": "([\w.]+)",$', text, flags=re.MULTILINE))
    assert len(tools) >= 7
    for module in tools.values():
        assert callable(importlib.import_module(f"megatron_instruct.{module}").main), module
