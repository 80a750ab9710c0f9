"""Sizes stay natural, nothing is swallowed or left undone, modules open with their contract, no path of somebody's machine is kept.

Each rule is a function from files to the places that break it, shown to fail on a small bad file.
"""

import ast
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    file
    for folder in ("megatron_instruct", "tools", "examples", "benchmarks", "requirements")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".svg", ".html", ".json", ".j2", ""}
HOMES = ("home", "root", "Users", "work", "mnt")
"""Top folders under which people's own files lie."""


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def long_files(files: Sequence[Path], limit: int) -> list[str]:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return [f"{file}:1: {length} lines, above {limit}" for file, length in lengths.items() if length > limit]


def long_functions(files: Sequence[Path], limit: int) -> list[str]:
    found = []
    for file, node in nodes(files):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{file}:{node.lineno}: {node.name} has {length} lines, above {limit}"] if length > limit else []
    return found


def swallowed_exceptions(files: Sequence[Path]) -> list[str]:
    """Report each bare `except`, and each of Exception or BaseException, that neither raises nor hands it to another process or thread."""
    return [
        f"{file}:{node.lineno}: a bare or broad except swallows what it caught"
        for file, node in nodes(files)
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not any(passes_on(inner, node.name) for inner in ast.walk(node))
    ]


def passes_on(node: ast.AST, caught: str | None) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("send", "put"):
        return any(isinstance(inner, ast.Name) and inner.id == caught for inner in ast.walk(node))
    return isinstance(node, ast.Raise)


def is_broad(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names)


def unfinished_work(files: Sequence[Path]) -> list[str]:
    marks = re.compile(r"\b(TODO|FIXME|NotImplementedError|NotImplemented)\b")
    return [f"{file}:{number}: {match[0]}" for file, number, line in lines(files) if (match := marks.search(line))]


def modules_without_contract(files: Sequence[Path]) -> list[str]:
    trees = {file: parsed(file) for file in files}
    return [f"{file}:1: no module docstring" for file, tree in trees.items() if tree.body and ast.get_docstring(tree) is None]


def machine_paths(files: Sequence[Path]) -> list[str]:
    path = re.compile(rf"(?<![\w.:/~$}}-])/(?:{'|'.join(HOMES)})/[\w.-]+")
    return [f"{file}:{number}: {match[0]}" for file, number, line in lines(files) if (match := path.search(line))]


def broken_links(documents: Sequence[Path]) -> list[str]:
    """Report relative links and pictures of Markdown files that lead nowhere."""
    return [
        f"{file}:{number}: {target} does not exist"
        for file, number, line in lines(documents)
        for target in re.findall(r"\]\(([^)#\s]+)", line)
        if ":" not in target and not (file.parent / target).exists()
    ]


def nodes(files: Sequence[Path]) -> Iterator[tuple[Path, ast.AST]]:
    for file in files:
        yield from ((file, node) for node in ast.walk(parsed(file)))


def lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, str]]:
    for file in files:
        yield from ((file, number, line) for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1))


def text_files(root: Path) -> list[Path]:
    """Return the text files of a checkout, without what set-up, builds and runs put there."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name == ".ci" or not (name.startswith((".", "__pycache__")) or name.endswith(".egg-info"))
        ]
        folders[:] = [name for name in folders if not (Path(folder) == root and name in ("build", "dist", "runs"))]
        found += [Path(folder) / name for name in names if Path(name).suffix in TEXT_SUFFIXES and not name.startswith(".coverage")]
    return sorted(found)


def test_no_file_is_above_500_lines() -> None:
    assert long_files([*CODE, *TESTS], 500) == []


def test_no_function_is_above_80_lines() -> None:
    assert long_functions([*CODE, *TESTS], 80) == []


def test_no_script_under_tools_is_above_60_lines() -> None:
    assert TOOLS
    assert long_files(TOOLS, 60) == []


def test_no_exception_is_swallowed() -> None:
    assert swallowed_exceptions(CODE) == []


def test_no_work_is_left_undone() -> None:
    assert unfinished_work(CODE) == []


def test_every_module_opens_with_its_contract() -> None:
    assert modules_without_contract([*CODE, *TESTS]) == []


def test_no_path_of_a_machine_is_kept() -> None:
    found = text_files(ROOT)
    assert {"pyproject.toml", "test_rules.py", "run", "Makefile"} <= {file.name for file in found}
    assert machine_paths(found) == []


def test_links_between_documents_lead_somewhere() -> None:
    assert broken_links([file for file in text_files(ROOT) if file.suffix == ".md"]) == []


BAD: list[tuple[Callable[[Sequence[Path]], list[str]], str, list[int]]] = [
    (lambda files: long_files(files, 3), "a\n" * 4, [1]),
    (lambda files: long_files(files, 4), "a\n" * 4, []),
    (lambda files: long_functions(files, 3), "x = 1\ndef f():\n    a\n    b\n", []),
    (lambda files: long_functions(files, 3), "x = 1\nclass A:\n    async def f():\n        a\n        b\n        c\n", [3]),
    (swallowed_exceptions, "try:\n    a\nexcept:\n    pass\n", [3]),
    (swallowed_exceptions, "try:\n    a\nexcept (OSError, Exception) as error:\n    print(error)\n", [3]),
    (swallowed_exceptions, "try:\n    a\nexcept Exception as error:\n    pipe.send('failed')\n", [3]),
    (swallowed_exceptions, "try:\n    a\nexcept Exception as error:\n    pipe.send((False, f'{error}'))\n", []),
    (swallowed_exceptions, "try:\n    a\nexcept Exception as error:\n    queue.put(None)\n", [3]),
    (swallowed_exceptions, "try:\n    a\nexcept Exception as error:\n    queue.put((1, error))\n", []),
    (swallowed_exceptions, "try:\n    a\nexcept BaseException:\n    b\n    raise\n", []),
    (swallowed_exceptions, "try:\n    a\nexcept OSError:\n    pass\n", []),
    (unfinished_work, "a\n# TODO later\n", [2]),
    (unfinished_work, "raise NotImplementedError\n", [1]),
    (unfinished_work, "todo = 'METHODOLOGY'\n", []),
    (modules_without_contract, "a = 1\n", [1]),
    (modules_without_contract, '"""In, out."""\na = 1\n', []),
    (modules_without_contract, "", []),
    (machine_paths, "a\nsee " + "/home" + "/ada/data\n", [2]),
    (machine_paths, 'x = "' + "/root" + '/.cache"\n', [1]),
    (machine_paths, "https://example.org/home/page.html, ../work/a and $HOME/work/a\n", []),
    (broken_links, "[here](file.txt)\n[there](missing.md) ![p](missing.svg)\n[web](https://a.b/c) [part](#part)\n", [2, 2]),
]


@pytest.mark.parametrize(("rule", "text", "bad_lines"), BAD)
def test_each_rule_can_fail(tmp_path: Path, rule: Callable[[Sequence[Path]], list[str]], text: str, bad_lines: list[int]) -> None:
    file = tmp_path / "file.txt"
    file.write_text(text)
    found = rule([file])
    assert [int(place.split(":")[1]) for place in found] == bad_lines
