"""docs/architecture.md describes the house as it is: its paths exist, its walks are walks, its tables agree with the code."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from megatron_instruct.errors import MegatronInstructError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_instruct"
HOPS = 6


def place(name: str, root: Path) -> Path:
    """Return the file or folder that a document names: from the root, or from the package as documents write it for short."""
    return root / name if (root / name).exists() else root / "megatron_instruct" / name


def missing_paths(text: str, root: Path) -> list[str]:
    """Return the paths in code marks that lead nowhere; names in capitals stand for something to choose."""
    names = re.findall(r"`([\w-]+/[\w./-]*)(?::\w+)?`", text)
    return sorted({name for name in names if not re.search(r"[A-Z]{3}|^iter_|^tokenizer/", name) and not place(name, root).exists()})


def walks_of(text: str) -> dict[str, list[str]]:
    found = re.findall(r"^- \*\*(\w+)\*\*: (.*?)(?=^- \*\*|\n\n)", text, flags=re.MULTILINE | re.DOTALL)
    return {name: re.findall(r"`([^`]+)`", hops) for name, hops in found if "→" in hops}


def broken_hops(hops: list[str], root: Path) -> list[str]:
    """Return the hops whose function is not defined in its file, or is used in no file before it on the walk."""
    broken: list[str] = []
    before = place(hops[0], root).read_text(encoding="utf-8")
    for hop in hops[1:]:
        name, _, function = hop.partition(":")
        text = place(name, root).read_text(encoding="utf-8") if place(name, root).is_file() else ""
        defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if function not in defined:
            broken.append(f"{name} defines no {function}")
        module = name.removesuffix(".py").replace("/", ".")
        starts = hop == hops[1] and f"{module} import main" in before and function in ("main", "run")
        if not starts and not re.search(rf"(?<!def )\b{function}\(", before):
            broken.append(f"no earlier hop uses {function}")
        before += text
    return broken


@pytest.fixture(scope="module")
def architecture() -> str:
    return (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_in_a_document_exists(document: str) -> None:
    assert missing_paths((ROOT / document).read_text(encoding="utf-8"), ROOT) == []


def test_every_tool_that_is_a_stage_has_a_walk(architecture: str) -> None:
    stages = {"synthesize", "render", "preprocess", "plan", "tune", "pretrain", "convert", "evaluate"}
    assert set(walks_of(architecture)) == stages


@pytest.mark.parametrize("stage", ["synthesize", "render", "preprocess", "plan", "tune", "pretrain", "convert", "evaluate"])
def test_a_walk_has_few_hops_and_each_leads_on(architecture: str, stage: str) -> None:
    hops = walks_of(architecture)[stage]
    assert 3 <= len(hops) - 1 <= HOPS
    assert broken_hops(hops, ROOT) == []


def test_the_layers_are_those_that_the_imports_are_held_to(architecture: str) -> None:
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", architecture, flags=re.MULTILINE)
    written = {part: int(layer) for layer, parts in rows for part in re.findall(r"`([a-z_]+)`", parts)}
    assert written == runpy.run_path(str(ROOT / "tests" / "house" / "test_imports.py"))["LAYERS"]
    here = {path.stem for path in PACKAGE.iterdir() if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("__")}
    assert set(written) == here


def test_the_exit_statuses_are_those_of_the_errors(architecture: str) -> None:
    written = re.findall(r"^\| (\d) \| `(\w+)`: ", architecture, flags=re.MULTILINE)
    kinds = [kind for kind in MegatronInstructError.__subclasses__() if kind.__module__ == "megatron_instruct.errors"]
    assert {name: int(status) for status, name in written} == {kind.__name__: kind.exit_status for kind in kinds}


def test_the_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"check", "test", "test-slow", "bench"} <= named <= targets


def test_a_path_or_a_hop_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    for name, text in (("tools/a.py", "from x.b import main"), ("megatron_instruct/x/b.py", "def main():\n    step()\ndef step(): ...")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    text = "`tools/a.py`, `x/b.py:main`, `x/c.py`, `megatron_instruct/y/`, `OUT/a.py`"
    assert missing_paths(text, tmp_path) == ["megatron_instruct/y/", "x/c.py"]
    assert broken_hops(["tools/a.py", "x/b.py:main", "x/b.py:step"], tmp_path) == []
    assert broken_hops(["tools/a.py", "x/b.py:step"], tmp_path) == ["no earlier hop uses step"]
    assert broken_hops(["tools/a.py", "x/b.py:main", "x/b.py:leap"], tmp_path) == ["x/b.py defines no leap", "no earlier hop uses leap"]
    assert walks_of("- **go**: `a` → `b` →\n  `c`\n- **rest**: `d`\n\nend") == {"go": ["a", "b", "c"]}
