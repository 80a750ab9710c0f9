#!/usr/bin/env python
"""Debian documentation packages -> JSON lines of real English text, of any size, for benchmarks.

Comes in: nothing but Debian's package archive, through `apt-get download`. Goes out, in the cache folder: text-{N}mb.jsonl, one document
per line ({"text": ...}), N megabytes (10^6 bytes) of text in UTF-8; and, with --short, text-{N}mb-short.jsonl: the same text, byte for
byte, cut between words into documents of about 90 characters. The last line is JSON with counts and the SHA-256 of each file: the
packages' versions change, so a result is pinned by content.

Where the packages hold less than N megabytes, they are repeated. So that no text occurs twice, copy C puts the paragraphs of each
document into another order and respells one word in 16 (of five letters or more; which ones depends on C; its vowels move on: kernel ->
kirnil): new words keep turning up, as they do in a larger corpus, which a tokenizer that remembers words would else never meet.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import os
import random
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOC = "usr/share/doc"
PACKAGES = {
    "linux-doc-6.1": f"{DOC}/linux-doc-6.1/Documentation/**/*.gz",
    "python3.11-doc": f"{DOC}/python3.11/html/**/*.html",
    "postgresql-doc-15": f"{DOC}/postgresql-doc-15/html/*.html",
    "anarchism": f"{DOC}/anarchism/html/*.html",
    "cmake-doc": f"{DOC}/cmake-data/html/**/*.html",
    "perl-doc": "usr/share/perl/5.*/**/*.pod",
    "dict-wn": "usr/share/dictd/wn.dict.dz",
    "dict-gcide": "usr/share/dictd/gcide.dict.dz",
    "dict-foldoc": "usr/share/dictd/foldoc.dict.dz",
}
"""Package, and where its text is."""
SHORTEST = 200
"""Characters; what is shorter is no document of its own."""
DICTIONARY_PAGE = 2000
"""Characters of dictionary entries that make a document."""
SHORT_DOCUMENT = 90
"""Characters, rounded up to the end of a word."""
SPECIAL = ("<s>", "</s>", "<unk>", "\0")
"""Documents that hold one of these are left out: the tools that are compared do not agree about what it becomes, or ours refuses it."""
_BLOCKS = frozenset(["p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "pre", "dt", "dd", "br", "table", "ul", "ol", "section"])
_VOWELS = str.maketrans("aeiouAEIOU", "eiouaEIOUA")
_WORD = re.compile(r"[A-Za-z]{5,}")


class TextOfPage(html.parser.HTMLParser):
    """The text of an HTML page's body."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style", "head")
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= self._hidden > 0 and tag in ("script", "style", "head")
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def unpacked(package: str, cache: Path) -> Path:
    """Return the folder of a package's files, after downloading and unpacking it where that was not done yet."""
    folder = cache / "packages" / package
    if not folder.is_dir():
        temporary = folder.with_name(package + ".partial")
        temporary.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=temporary, check=True, stderr=subprocess.DEVNULL)
        (archive,) = temporary.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=temporary, check=True)
        archive.unlink()
        temporary.rename(folder)
    return folder


def texts_of(package: str, cache: Path) -> Iterator[str]:
    """Yield the documents of a package in the order of their paths."""
    folder = unpacked(package, cache)
    files = [file for file in sorted(folder.glob(PACKAGES[package])) if file.is_file() and not file.is_symlink()]
    if not files:
        raise SystemExit(f"package {package} has no file {PACKAGES[package]}; its layout changed.")
    for file in files:
        content = gzip.decompress(file.read_bytes()) if file.suffix in (".gz", ".dz") else file.read_bytes()
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        if ".html" in file.suffixes:
            page = TextOfPage()
            page.feed(text)
            text = re.sub(r"[ \t]+\n", "\n", "".join(page.pieces))
        if file.suffix == ".dz":
            yield from pages_of_entries(text)
        else:
            yield re.sub(r"\n{3,}", "\n\n", text).strip()


def pages_of_entries(text: str) -> Iterator[str]:
    page = ""
    for entry in re.split(r"(?<=\n)(?=\S)", text):  # an entry begins at the left margin
        page += entry
        if len(page) > DICTIONARY_PAGE:
            yield page.strip()
            page = ""
    yield page.strip()


def real_documents(cache: Path) -> list[str]:
    """Return every document of the packages once, in an order that mixes the packages and is always the same."""
    texts = dict.fromkeys(text for package in PACKAGES for text in texts_of(package, cache) if len(text) >= SHORTEST)
    documents = [text for text in texts if not any(spelling in text for spelling in SPECIAL)]
    random.Random(0).shuffle(documents)
    return documents


def copied(text: str, copy: int, respelt: dict[str, str]) -> str:
    """Return the text as copy number `copy` has it. respelt: the words of this copy so far."""
    if copy == 0:
        return text
    paragraphs = text.split("\n\n")
    random.Random(f"{copy} {text[:100]}").shuffle(paragraphs)

    def respell(match: re.Match[str]) -> str:
        word = match[0]
        if word not in respelt:
            respelt[word] = word.translate(_VOWELS) if zlib.crc32(f"{copy} {word}".encode()) % 16 == 0 else word
        return respelt[word]

    return _WORD.sub(respell, "\n\n".join(paragraphs).strip())


def documents_of_size(documents: list[str], size: int) -> Iterator[str]:
    """Yield documents of `size` bytes of text, the last one cut to fit."""
    copy, left = 0, size
    while True:
        respelt: dict[str, str] = {}
        for document in documents:
            text = copied(document, copy, respelt)
            content = text.encode()
            if len(content) >= left:
                yield content[:left].decode("utf-8", "ignore")
                return
            left -= len(content)
            yield text
        copy += 1


def short_documents(text: str) -> Iterator[str]:
    """Cut a text between words; the pieces make up the text, and none is white space alone."""
    start = 0
    while start < len(text):
        end = start + SHORT_DOCUMENT
        while end < len(text) and not (text[end - 1].isspace() and not text[end].isspace()):
            end += 1
        yield text[start:end]
        start = end


class Output:
    """One file of JSON lines, whole or absent."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(path.name + ".partial")
        self._stream = self._temporary.open("wb")  # closed by finish
        self._hash = hashlib.sha256()
        self.documents = self.text_bytes = 0

    def write(self, texts: list[str]) -> None:
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
        self._stream.write(content)
        self._hash.update(content)
        self.documents += len(texts)
        self.text_bytes += sum(len(text.encode()) for text in texts)

    def finish(self) -> dict[str, Any]:
        self._stream.close()
        os.replace(self._temporary, self._path)
        counts = {"documents": self.documents, "text_bytes": self.text_bytes, "file_bytes": self._path.stat().st_size}
        return {"file": self._path.name, **counts, "sha256": self._hash.hexdigest()}


def make(cache: Path, documents: list[str], megabytes: int, *, short: bool) -> list[dict[str, Any]]:
    """Write the files of one size and return what they hold."""
    outputs = [Output(cache / f"text-{megabytes}mb.jsonl"), *([Output(cache / f"text-{megabytes}mb-short.jsonl")] if short else [])]
    for text in documents_of_size(documents, megabytes * 10**6):
        outputs[0].write([text])
        if short:
            outputs[1].write(list(short_documents(text)))
    return [output.finish() for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for packages and results, outside the repository")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100], help="sizes to make, in 10^6 bytes of text")
    parser.add_argument("--short", action="store_true", help="write the variants of short documents, too")
    options = parser.parse_args()
    documents = real_documents(options.cache)
    print(f"{len(documents):,} documents, {sum(len(text.encode()) for text in documents) / 1e6:.1f} MB without repetition", flush=True)
    made = [row for size in options.megabytes for row in make(options.cache, documents, size, short=options.short)]
    print(json.dumps(made))


if __name__ == "__main__":
    main()
