"""The set-up script says in one line what is missing, and does nothing where all is there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("bash", "dirname", "cat", "sha256sum", "cut", "df", "awk", "grep", "rm", "head")
COMPILED = "megatron_instruct/tokenizer/_segments.c"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that set-up reads, and a PATH with the usual commands but no Python."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("setup.py", COMPILED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in COMMANDS:
        found = shutil.which(name)
        assert found is not None, f"the machine has no {name}"
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def install(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(project / "bin"), "HOME": str(project), **variables}
    command = [str(project / "bin" / "bash"), str(project / "requirements" / "install.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_no_python_is_said_in_one_line_with_ways_to_get_one(project: Path) -> None:
    done = install(project, "cpu")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: error: no Python 3.12 or 3.13 with venv found; install one (apt-get install python3.12-venv")
    assert len(done.stderr.splitlines()) == 1
    assert not (project / ".venv").exists()


def test_an_older_python_is_not_taken(project: Path) -> None:
    older = project / "bin" / "python3"
    older.write_text("#!/bin/bash\nexit 1\n")  # as a Python answers whose version does not fit
    older.chmod(0o755)
    done = install(project, "cpu", PYTHON=str(older))
    assert done.returncode == 1
    assert "no Python 3.12 or 3.13" in done.stderr


def test_a_machine_with_gpus_is_set_up_for_them_however_many_it_has(project: Path) -> None:
    smi = project / "bin" / "nvidia-smi"
    smi.write_text('#!/bin/bash\nfor ((gpu = 0; gpu < 10000; gpu++)); do echo "GPU $gpu: a device"; done\n')  # more than a pipe holds
    smi.chmod(0o755)
    (project / ".venv").mkdir()  # asks for no room on the disk
    done = install(project, PYTHON="/bin/true")
    assert done.stdout.splitlines()[-2].endswith("(gpu)")


def test_an_unknown_profile_is_refused(project: Path) -> None:
    done = install(project, "tpu")
    assert done.returncode == 1
    assert done.stderr == "setup: error: profile 'tpu' is unknown; use cpu or gpu.\n"


def test_a_finished_set_up_is_left_alone(project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to("/bin/false")
    stamp = subprocess.run(
        [
            "bash",
            "-c",
            f"cat requirements/base.txt requirements/cpu.txt requirements/install.sh setup.py {COMPILED} | sha256sum | cut -d' ' -f1",
        ],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    ).stdout.strip()
    (project / ".venv" / ".complete").write_text(f"cpu {stamp} {project}\n")
    done = install(project, "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (project / "requirements" / "cpu.txt").write_text("-r base.txt\nanother==1\n")
    assert install(project, "cpu").returncode == 1, "other requirements need another set-up"
