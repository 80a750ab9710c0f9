"""Whether files are still what they were when somebody noted their SHA-256: our manifests, and what Hugging Face's hub client leaves.

A flipped bit in a tensor's values makes another number, which nothing else can tell from the right one.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_instruct.errors import InputError
from megatron_instruct.manifest import FileRecord, Manifest, check_stage_outputs

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_known(folder: Path, weights: Iterable[Path], inputs: Iterable[FileRecord]) -> None:
    """Compare the weights of a Hugging Face folder with the checksums that are known of them. Raises InputError that names the file.

    Known are: a manifest.json that this project wrote beside them; the hub client's notes in .cache/huggingface/download; and, in the
    hub's own cache, the name of the file that a link leads to.
    """
    found: Mapping[str, FileRecord] = {item.path: item for item in inputs}
    for file in sorted(weights):
        known = found[str(file.absolute())]
        check_stage_outputs([file], [known])
        noted = _noted(folder, file)
        if noted is not None and noted != known.sha256:
            raise InputError(
                f"{file} is not what was downloaded: its SHA-256 is {known.sha256[:12]}…, and {noted[:12]}… was noted; download it again."
            )


def check_manifest(path: Path, manifest: Manifest, found: Mapping[Path, FileRecord]) -> None:
    """Compare every file of a checkpoint with its manifest, which was read from `path`. found: what the files hold, under full names."""
    for output in manifest.outputs:
        if found[path / output.path].sha256 != output.sha256:
            raise InputError(
                f"{path / output.path} was changed or damaged after the stage {manifest.stage!r} wrote it; "
                "copy the checkpoint again, or give another iteration."
            )


def _noted(folder: Path, file: Path) -> str | None:
    note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"  # commit, etag, time
    if note.is_file():
        lines = note.read_text(encoding="utf-8").splitlines()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1].strip()):  # of a large file, the etag is its SHA-256
            return lines[1].strip()
    if file.is_symlink() and _SHA256.fullmatch(file.resolve().name):
        return file.resolve().name
    return None
