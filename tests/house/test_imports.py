"""Imports point down the layers, stages never import each other, and no two files import each other; read with ast, nothing is run.

Each rule is a function from a package's folder to the places that break it, shown to fail on a small bad package.
"""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_instruct"
STAGE_LAYER = 3
LAYERS = {
    **dict.fromkeys(
        (
            "errors",
            "config",
            "records",
            "manifest",
            "files",
            "progress",
            "shares",
            "threads",
            "fingerprints",
            "cluster",
            "pages",
            "index_format",
            "workspace",
        ),
        0,
    ),
    **dict.fromkeys(("corpora", "prompt_formats", "templates", "tokenizer", "platform"), 1),
    **dict.fromkeys(("models", "planning"), 2),
    **dict.fromkeys(("tuning", "synthesis", "preprocessing", "training", "conversion", "evaluation"), STAGE_LAYER),
}
"""The layer of everything right below the package, as docs/architecture.md draws it."""


def modules(package: Path) -> dict[str, Path]:
    """Return the Python files of a package by dotted module name."""
    found: dict[str, Path] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def parsed_nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports_between(package: Path, *, tables: bool = True) -> list[tuple[str, str, str]]:
    """Return (importing module, imported module, place) for every import inside the package, also those inside functions.

    tables: count the entries of lazy tables, "package.module:object", as well.
    """
    known = modules(package)
    found: list[tuple[str, str, str]] = []
    for name, file in known.items():
        for node in parsed_nodes(file):
            targets = [*imported(node, name, file, known), *(named_in_a_table(node, known) if tables else ())]
            found += [(name, target, f"{file}:{getattr(node, 'lineno', 0)}") for target in targets if target != name]
    return found


def imported(node: ast.AST, name: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that one node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        parents = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        above = parents[: len(parents) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield from [target for target in (f"{base}.{alias.name}", base) if target in known][:1]


def named_in_a_table(node: ast.AST, known: Mapping[str, Path]) -> list[str]:
    """Return the module of a string "package.module:object"."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+:\w+", node.value)):
        return []
    return [target for target in (node.value.partition(":")[0],) if target in known]


def part_of(module: str) -> str:
    """Return the name right below the package: "synthesis" for megatron_instruct.synthesis.run; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward_imports(package: Path, layers: Mapping[str, int]) -> list[str]:
    """Report arrows that point up, arrows between stages, and whatever has no layer."""
    broken = [f"{file}: {part_of(name)} has no layer" for name, file in modules(package).items() if part_of(name) not in {"", *layers}]
    for importer, target, place in imports_between(package):
        here, there = part_of(importer), part_of(target)
        if here == there or there not in layers:
            continue
        if here not in layers:
            broken.append(f"{place}: the package itself imports {there}" if here == "" else f"{place}: {here} has no layer")
        elif layers[there] > layers[here]:
            broken.append(f"{place}: {here} (layer {layers[here]}) imports {there} (layer {layers[there]})")
        elif layers[here] == layers[there] == STAGE_LAYER:
            broken.append(f"{place}: the stage {here} imports the stage {there}; stages meet on disk")
    return broken


def import_cycles(package: Path) -> list[str]:
    """Report chains of files that import each other, the imports inside functions included.

    An entry of a lazy table is none: that a seam names what stands behind it, and is known to it, is what such a table is for.
    """
    arrows: dict[str, set[str]] = {}
    for importer, target, _ in imports_between(package, tables=False):
        arrows.setdefault(importer, set()).add(target)
    broken: list[str] = []
    left: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            broken.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in left:
            for target in sorted(arrows.get(module, ())):
                visit(target, [*path, module])
            left.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return broken


def write_package(folder: Path, files: Mapping[str, str]) -> Path:
    package = folder / "house"
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return package


def test_imports_point_down_and_stages_never_import_each_other() -> None:
    assert upward_imports(PACKAGE, LAYERS) == []


def test_no_two_files_import_each_other() -> None:
    assert import_cycles(PACKAGE) == []


def test_the_arrows_of_the_real_package_are_seen() -> None:
    arrows = {(importer, target) for importer, target, _ in imports_between(PACKAGE)}
    assert ("megatron_instruct.config", "megatron_instruct.errors") in arrows
    assert ("megatron_instruct.preprocessing.run", "megatron_instruct.preprocessing.config") in arrows


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("errors.py", "import house.models.build", "errors (layer 0) imports models (layer 2)"),
        ("errors.py", "def late():\n    from house.models import build", "errors (layer 0) imports models (layer 2)"),
        ("models/build.py", "from ..training.run import main", "models (layer 2) imports training (layer 3)"),
        ("models/build.py", "from .. import training", "models (layer 2) imports training (layer 3)"),
        ("models/build.py", 'TABLE = {"a": "house.training.run:main"}', "models (layer 2) imports training (layer 3)"),
        ("training/run.py", "from house.evaluation.run import main", "the stage training imports the stage evaluation"),
        ("cellar.py", "", "cellar has no layer"),
        ("__init__.py", "from house.training.run import main", "the package itself imports training"),
    ],
)
def test_an_arrow_that_points_up_is_named(tmp_path: Path, file: str, text: str, reason: str) -> None:
    good = dict.fromkeys(
        ("__init__.py", "errors.py", "models/build.py", "training/__init__.py", "training/run.py", "evaluation/run.py"), ""
    )
    good["training/run.py"] = "from house.models import build\nfrom house.errors import Wrong\nfrom house.training import *\nimport torch"
    assert upward_imports(write_package(tmp_path / "good", good), LAYERS) == []
    bad = upward_imports(write_package(tmp_path / "bad", {**good, file: text}), LAYERS)
    assert len(bad) == 1
    assert reason in bad[0]
    assert file in bad[0]


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("import house.b", "import house.a", ""),
        ("import house.b", "def late():\n    from house import a", ""),
        ("from house.b import x", "from .c import x", "from . import a"),
    ],
)
def test_files_that_import_each_other_are_named(tmp_path: Path, a: str, b: str, c: str) -> None:
    bad = import_cycles(write_package(tmp_path, {"__init__.py": "", "a.py": a, "b.py": b, "c.py": c, "d.py": "import house.a"}))
    assert bad == ["house.a -> house.b -> house.c -> house.a" if c else "house.a -> house.b -> house.a"]
