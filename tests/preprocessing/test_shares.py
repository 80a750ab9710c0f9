"""The same parts on several machines: shares in one folder, an array of Slurm jobs, a Ray cluster; always the bytes of one machine."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_instruct import fingerprints
from megatron_instruct.cluster import ray_cluster
from megatron_instruct.corpora.parts import plan_parts
from megatron_instruct.errors import ConfigError, MegatronInstructError
from megatron_instruct.manifest import record
from megatron_instruct.preprocessing import on_ray
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.documents import render_options
from megatron_instruct.preprocessing.encode import EncodeJob, EncodeOptions
from megatron_instruct.preprocessing.run import run
from megatron_instruct.shares import Share, at_work
from megatron_instruct.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def settings(corpus: Path, tokenizer_folder: Path) -> dict[str, Any]:
    return {
        "input": (str(corpus),),
        "tokenizer_model": tokenizer_folder,
        "append_eod": True,
        "partitions": 9,
        "workers": 1,
        "shuffle_seed": 1,
        "fast_tokenizer": "none",
    }


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shares_in_any_order_end_with_the_bytes_of_one_machine(tmp_path: Path, settings: dict[str, Any]) -> None:
    run(PreprocessConfig(output_prefix=tmp_path / "one" / "a", **settings))
    shared = tmp_path / "shared" / "a"
    for share in ("2/3", "0/3"):
        assert run(PreprocessConfig(output_prefix=shared, share=share, **settings)) == {}
    assert not shared.with_name("a_text_document.bin").exists()
    run(PreprocessConfig(output_prefix=shared, **settings))  # the share that is missing, and the merge
    assert content(tmp_path / "shared") == content(tmp_path / "one")
    again = run(PreprocessConfig(output_prefix=shared, share="1/3", **settings))
    assert again["text"].counts["documents"] > 0, "finished already"


def test_a_large_input_is_fingerprinted_once_for_all_shares(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(PreprocessConfig(output_prefix=tmp_path / "one" / "a", **settings))
    monkeypatch.setattr(fingerprints, "_BATCH_BYTES", 1)
    monkeypatch.setattr(fingerprints, "_SETTLED_NANOSECONDS", -(10**18))
    read: list[Path] = []
    monkeypatch.setattr(fingerprints, "record", lambda path: [read.append(path), record(path)][1])
    shared = tmp_path / "shared" / "a"
    for share in ("0/2", "1/2", None):
        run(PreprocessConfig(output_prefix=shared, share=share, **settings))
        assert shared.with_name("a.fingerprints").exists() == (share is not None)
    assert read == [Path(settings["input"][0])]
    assert content(tmp_path / "shared") == content(tmp_path / "one")


def test_a_run_that_only_merges_proves_nothing_and_starts_no_worker(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["fast_tokenizer"] = "auto"
    run(PreprocessConfig(output_prefix=tmp_path / "one" / "a", **settings))
    for share in ("0/2", "1/2"):
        run(PreprocessConfig(output_prefix=tmp_path / "shared" / "a", share=share, **settings))
    for name in ("with_fast_backend", "started_team"):
        monkeypatch.delattr(f"megatron_instruct.preprocessing.run.{name}")
    run(PreprocessConfig(output_prefix=tmp_path / "shared" / "a", **settings))
    assert content(tmp_path / "shared") == content(tmp_path / "one")


def test_a_share_that_is_at_work_and_other_settings_beside_it_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    prefix = tmp_path / "a"
    run(PreprocessConfig(output_prefix=prefix, share="0/2", **settings))
    with at_work(tmp_path / "a.parts", Share(0, 2), lambda alone: alone):
        with pytest.raises(ConfigError, match=r"share 0/2 of .* is at work already"):
            run(PreprocessConfig(output_prefix=prefix, share="0/2", **settings))
        with pytest.raises(ConfigError, match="another run is writing to"):
            run(PreprocessConfig(output_prefix=prefix, **settings))
        with pytest.raises(ConfigError, match=r"another share is at work in .* with other inputs or settings"):
            run(PreprocessConfig(output_prefix=prefix, share="1/2", **{**settings, "append_eod": False}))
        run(PreprocessConfig(output_prefix=prefix, share="1/2", **settings))
    run(PreprocessConfig(output_prefix=prefix, **settings))
    assert not (tmp_path / "a.parts").exists()


def test_an_array_of_slurm_jobs_is_the_shares(tmp_path: Path, settings: dict[str, Any]) -> None:
    """srun is stood in for by a script that runs its words: what the example makes of Slurm's variables is tried."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    flags = ["--input", settings["input"][0], "--tokenizer-model", settings["tokenizer_model"], "--append-eod"]
    flags += ["--fast-tokenizer", "none", "--partitions", "9", "--shuffle-seed", "1", "--workers", "1"]
    command = ["bash", ROOT / "examples" / "slurm" / "preprocess.sbatch", *flags, "--output-prefix", tmp_path / "array" / "a"]
    array = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
    for variables in ({**array, "SLURM_ARRAY_TASK_ID": "4"}, {**array, "SLURM_ARRAY_TASK_ID": "5"}, {}):
        words = list(map(str, command))
        result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**environment, **variables}, check=False)
        assert result.returncode == 0, result.stderr
    assert "9 of 9 parts are finished already" in result.stdout
    run(PreprocessConfig(output_prefix=tmp_path / "one" / "a", **settings))
    assert content(tmp_path / "array") == content(tmp_path / "one")


def test_a_ray_cluster_gives_the_bytes_of_one_machine(tmp_path: Path, settings: dict[str, Any], start: Start) -> None:
    pytest.importorskip("ray", reason="needs the extra 'cluster'")
    run(PreprocessConfig(output_prefix=tmp_path / "one" / "a", **settings))
    flags = ["--input", settings["input"][0], "--tokenizer-model", settings["tokenizer_model"], "--append-eod"]
    flags += ["--fast-tokenizer", "none", "--partitions", 9, "--shuffle-seed", 1, "--executor", "ray"]
    process = start("preprocess_data.py", *flags, "--output-prefix", tmp_path / "ray" / "a")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_on_ray_paths_are_those_of_the_folder_that_the_run_is_started_in(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts processes in a folder of its own, where other files may bear the same names."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder, text in ((there, "the right text"), (elsewhere, "another one, of other length")):
        folder.mkdir()
        (folder / "c.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (there / "tokenizer").symlink_to(settings["tokenizer_model"])
    job = EncodeJob(
        tokenizer_path=Path("tokenizer"),
        fingerprint=load_tokenizer(settings["tokenizer_model"]).fingerprint,
        fast_form=None,
        options=EncodeOptions(
            json_keys=("text",),
            append_eod=False,
            prepend_bos=False,
            split_sentences=None,
            min_document_tokens=None,
            max_document_tokens=None,
            long_documents="split",
            render=render_options(seed=1, language=None, bank=None, extend_bank=None),
            on_error="stop",
        ),
        log_interval=1,
    )
    monkeypatch.chdir(there)
    (part,) = plan_parts([Path("c.jsonl")], part_bytes=1 << 20)
    monkeypatch.chdir(elsewhere)
    assert on_ray._encode(pickle.dumps(job), part, Path("parts/000000"), there) == 1
    assert [path.name for path in elsewhere.iterdir()] == ["c.jsonl"]
    ids = np.fromfile(there / "parts" / "000000" / "text.bin", dtype=np.uint16).tolist()
    assert load_tokenizer(settings["tokenizer_model"]).decode(ids) == "the right text"


def test_a_machine_of_the_cluster_that_lacks_a_package_is_not_said_to_lack_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra 'cluster'")

    def get(reference: object) -> object:
        raise ray.exceptions.RayTaskError("_encode", "a traceback", ImportError("No module named 'msgspec'"))

    (part,) = plan_parts([Path(settings["input"][0])], part_bytes=1 << 20)
    with pytest.raises(
        MegatronInstructError, match=r"corpus.jsonl cannot be encoded on the Ray cluster: No module named 'msgspec'; all its"
    ):
        on_ray._outcome(SimpleNamespace(get=get, exceptions=ray.exceptions), None, part)


def test_a_cluster_that_was_once_started_on_this_machine_is_not_joined_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps its address in a file, and waits for it where it was killed."""
    ray = pytest.importorskip("ray", reason="needs the extra 'cluster'")
    asked: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda *, address, **others: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        for given in (None, address):
            with ray_cluster(given):
                pass
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
        with ray_cluster(None):
            pass
    assert asked == ["local", address, f"ray://{address}"]


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_at_which_nothing_listens_is_named_at_once(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Ray tries for minutes."""
    ray = pytest.importorskip("ray", reason="needs the extra 'cluster'")
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was asked"))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = form.format(f"127.0.0.1:{gone.getsockname()[1]}")
    with (
        pytest.raises(ConfigError, match=rf"ray_address='{address}': no Ray cluster answers there \(.*Connection refused\)"),
        ray_cluster(address),
    ):
        pass


def test_an_address_that_is_none_is_named() -> None:
    pytest.importorskip("ray", reason="needs the extra 'cluster'")
    with (
        pytest.raises(ConfigError, match=r"ray_address='head': no Ray cluster answers there \(Invalid address format: head\)"),
        ray_cluster("head"),
    ):
        pass


@pytest.mark.parametrize("stage", ["preprocess", "synthesize"])
def test_an_array_with_gaps_is_told_what_to_give(stage: str) -> None:
    """--array=3,7: no job of it knows that it is the second."""
    variables = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "7"}
    command = ["bash", str(ROOT / "examples" / "slurm" / f"{stage}.sbatch")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    assert (result.returncode, "--array has gaps; give one range, such as --array=0-1," in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": "2/2"}, "share=2/2: shares of 2 are numbered from 0 to 1"),
        ({"share": "one"}, "share='one' is not of the form I/N"),
        ({"ray_address": "auto"}, "ray_address=auto needs executor=ray"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessConfig(output_prefix=tmp_path / "a", **settings, **given)
