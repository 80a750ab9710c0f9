"""Files, folders and glob patterns -> the files of a corpus, in order.

Comes in: what a user names. Goes out: regular files of known suffixes, each once. A folder that the library datasets saved
(`save_to_disk`) stands for the .arrow files that its state.json lists.
"""

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.formats import FORMATS, format_of
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import read_json
from megatron_instruct.workspace import plan_of

REJECTS = "rejects.jsonl"
"""End of the names of files that hold what a stage set aside."""
_KNOWN = f"known suffixes: {', '.join(FORMATS)}"


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Resolve files, folders and glob patterns to a list without repeats; what a folder or a pattern holds is sorted.

    Of a folder, every file of a known suffix is taken, those in its folders too, links are followed; hidden names and the rejects of
    earlier stages are not taken. What is named itself is always taken. A file named twice, by a link too, is read once, and that is said.
    Raises InputError for an input that names nothing, a file of unknown suffix, or a link to nothing.
    """
    found: dict[Path, Path] = {}
    repeated: list[str] = []
    for given in inputs:
        files = _resolve(given)
        if files != [Path(given)]:
            _require_finished(files)
        for file in files:
            first = found.setdefault(file.resolve(), file)
            if first is not file:
                repeated.append(f"{file} (as {first})" if file != first else str(file))
        _require_names(files)
    if repeated:
        more = f" and {len(repeated) - 3:,} more" if len(repeated) > 3 else ""
        print(f"Input files named twice are read once: {', '.join(repeated[:3])}{more}.")
    return list(found.values())


def _require_finished(files: Iterable[Path]) -> None:
    """Raise InputError where a folder or a pattern takes in what an unfinished run holds: parts, which its result holds once more."""
    for folder in sorted({above for file in files for above in (file.parent, file.parent.parent)}):
        if plan_of(folder) is not None:
            raise InputError(f"{folder} is unfinished work of a run: let its command finish it, or name the files that are to be read.")


def _require_names(files: Iterable[Path]) -> None:
    """Raise InputError where a name cannot be written down in a manifest."""
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise InputError(f"input {str(file)!r}: the name is not UTF-8, so that no manifest could hold it; rename the file.") from None


def require_outside(inputs: Iterable[str], output: Path, files: Sequence[str] = ()) -> None:
    """Raise ConfigError where an input, a folder or a pattern, takes in what is written to `output`: the next run would read it.

    files: names below `output` that are written. An input file that is named itself may lie anywhere.
    """
    for given in inputs:
        if given and _takes_in(given, output.resolve(), files):  # find_files refuses an empty one
            raise ConfigError(f"output {output} lies in the input {given}, so that its own files would be read; choose another output.")


def _takes_in(given: str, output: Path, files: Sequence[str]) -> bool:
    path, parts = Path(given), Path(given).absolute().parts
    plain = len(parts) if path.exists() else sum(1 for _ in itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    base, pattern = Path(*parts[:plain]).resolve(), parts[plain:]
    if path.is_file() or not output.is_relative_to(base):
        return False
    inside = output.relative_to(base).parts
    if any(name.startswith(".") for name in inside):  # neither walked nor matched
        return False
    walked_or_matched = [inside[:depth] for depth in range(len(inside) + 1)] + [(*inside, *Path(file).parts) for file in files]
    return any(_matches(names, pattern) for names in walked_or_matched)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Say whether a path without hidden names matches a pattern as glob means it."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _resolve(given: str) -> list[Path]:
    if not given:
        raise InputError("an input is empty, as a variable that is not set would be; name a file, a folder or a pattern.")
    path = Path(given)
    if path.is_dir():
        return _of_folder(path)
    if path.exists() or path.is_symlink():
        return [_checked(path)]
    pattern = path
    while pattern.name == "**":  # all that a folder holds, as the folder itself does
        pattern = pattern.parent
    matches = [Path(name) for name in sorted(_glob(pattern)) if pattern == path or Path(name).is_dir()]
    _require_readable(path, given)
    files = [file for match in matches for file in (_of_folder(match) if match.is_dir() else [match]) if not file.name.endswith(REJECTS)]
    if not files:
        bracket = "; in a pattern, [[] stands for a bracket" if "[" in given else ""
        raise InputError(f"input {given}: no such file, folder or pattern{bracket}; {_KNOWN}.")
    return [_checked(file) for file in dict.fromkeys(files)]  # a pattern may match a folder and what is in it


def _glob(pattern: Path) -> set[str]:
    """Return what a pattern matches, as glob.glob does, which follows links to a folder above until the system has enough of it."""
    if "**" not in pattern.parts:
        return set(glob.glob(str(pattern)))
    place = pattern.parts.index("**")
    head, tail = Path(*pattern.parts[:place]), [*itertools.dropwhile("**".__eq__, pattern.parts[place:])]
    folders = [folder for start in _glob(head) if Path(start).is_dir() for folder in _folders(Path(start), above=frozenset())]
    return {match for folder in folders for match in (_glob(Path(glob.escape(str(folder)), *tail)) if tail else [str(folder)])}


def _folders(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield a folder and those below it that are not hidden. above: as in _walk."""
    yield folder
    above |= {folder.resolve()}
    for entry in folder.iterdir() if os.access(folder, os.R_OK | os.X_OK) else ():
        if not entry.name.startswith(".") and entry.is_dir() and entry.resolve() not in above:
            yield from _folders(entry, above)


def _require_readable(pattern: Path, given: str) -> None:
    """Raise InputError for a folder that may not be read, which a pattern passes over as if it were empty."""
    for above, name in zip(pattern.parents, (pattern, *pattern.parents), strict=False):
        needed = os.R_OK | os.X_OK if glob.has_magic(name.name) else os.X_OK
        for folder in sorted(_glob(above)):
            if Path(folder).is_dir() and not os.access(folder, needed):
                raise InputError(f"input {given}: the folder {folder} may not be read; make it readable, or narrow the pattern.")


def _checked(path: Path) -> Path:
    if format_of(path) is None:
        raise InputError(f"input {path}: unknown suffix; {_KNOWN}.")
    if not path.exists():
        raise InputError(f"input {path} is a link to {path.readlink()}, which does not exist.")
    if not path.is_file():
        raise InputError(f"input {path} is no regular file; it is read more than once, so write a pipe's content to a file first.")
    return path


def _of_folder(folder: Path) -> list[Path]:
    files = list(_walk(folder, above=frozenset()))
    if not files:
        raise InputError(f"input {folder}: the folder holds no file of a known suffix that is not hidden; {_KNOWN}.")
    return files


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the corpus files of a folder in order. above: the real folders that it lies in, so that a link to one is not followed."""
    saved = _saved_dataset(folder)
    if saved is not None:
        yield from map(_checked, saved)
        return
    above |= {folder.resolve()}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.resolve() not in above:
                yield from _walk(entry, above)
        elif format_of(entry) is not None and not entry.name.endswith(REJECTS):
            yield _checked(entry)


def _saved_dataset(folder: Path) -> list[Path] | None:
    """Return the files of a data set that datasets saved in `folder`; None where there is none."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise InputError(
                f"input {folder} holds the splits {', '.join(map(str, splits))}; name those to be read, such as {folder / str(splits[0])}."
            )
        folder = folder / str(splits[0])
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    files = _listed(folder / "state.json", "_data_files")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    for name in names:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise InputError(f"input {folder}: state.json lists the file {name!r}, which is not there; save or copy the data set again.")
    return [folder / str(name) for name in names]


def _listed(path: Path, key: str) -> list[Any]:
    content = read_json(path)
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not values:
        raise InputError(f"input {path}: the list {key!r} is missing or empty; save the data set again with datasets' save_to_disk.")
    return values
