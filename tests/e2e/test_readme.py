"""The commands of the README do what it says, in the order it shows them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(block: str) -> list[str]:
    """Return the commands of a block, each on one line, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def step_by_step() -> list[str]:
    (block,) = [block for block in BLOCKS if "tools/pretrain.py" in block]
    return commands(block)


def test_every_make_command_names_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = [words[1] for block in BLOCKS for command in commands(block) if (words := command.split())[0] == "make"]
    assert {"quickstart", "test", "setup"} <= set(named)
    assert set(named) <= targets


def test_every_tool_is_in_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for tool in (ROOT / "tools").glob("*.py"):
        assert f"| `tools/{tool.name}` |" in readme, tool.name


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


@pytest.mark.filterwarnings("default")
def test_step_by_step_from_texts_to_an_evaluated_model(tmp_path: Path, smollm2_folder: Path) -> None:
    """Run every command of the section in a folder that looks like the project's after the quick start."""
    for name in ("tools", "examples", "megatron_instruct"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "base").symlink_to(smollm2_folder)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    activate, *rest = step_by_step()
    assert activate == "source .venv/bin/activate"
    for command in rest:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    examples = [json.loads(line) for line in (tmp_path / "work" / "examples" / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    shots = [shot for example in examples for shot in example["shots"]]
    assert any(shot["pairs"] for shot in shots), "the real engine wrote pairs"
    assert all(pair["answer"] in shot["text"] and pair["question"].endswith("?") for shot in shots for pair in shot["pairs"])
    assert any(len(example["shots"]) == 2 for example in examples), "the second round saw the first"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "model").config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "work" / "model")("hacker")["input_ids"]
    assert (tmp_path / "work" / "evaluation" / "results.json").is_file()
