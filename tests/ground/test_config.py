"""Settings: defaults < YAML < flags, unknown names refused, --print-config and --help, one clear message and status 2 for a mistake."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_instruct.config import as_yaml, flat, parse, run_tool
from megatron_instruct.errors import ConfigError, EngineError, InputError, MissingPackageError, TrainingError


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How the weights move."""

    lr: float = 3e-4
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Turn something into something else."""

    input: tuple[str, ...]
    """Files to read."""
    output: Path
    """Folder to write."""
    keys: tuple[str, ...] = ("text",)
    """Keys to take."""
    batch_size: int = 8
    """Texts in one batch."""
    limit: int | None = 5
    """Most texts to read (default: all)."""
    shuffle: bool = True
    """Mix the order."""
    verbose: bool = False
    """Say more."""
    tie: bool | None = None
    """Tie the embeddings (default: as the preset says)."""
    kind: Literal["plain", "fancy"] = "plain"
    """Kind of output."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each source."""
    extra: dict[str, str] = field(default_factory=dict)
    """Anything else."""
    cache: Path | None = None
    """Folder of the cache."""
    note: str = ""
    """A remark."""
    optimizer: Optimizer = field(default_factory=Optimizer)


NEEDED = ("--input", "a.jsonl", "--output", "out")


def resolved(*arguments: object) -> Stage:
    config = parse(Stage, [str(argument) for argument in arguments], prog="stage.py")
    assert config is not None
    return config


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def failure(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> tuple[int, str]:
    """Run a tool that must not get as far as its stage; return its exit status and message, without line breaks and frames."""
    try:
        status = run_tool(Stage, lambda config: pytest.fail("the stage was run"), [str(word) for word in arguments], prog="stage.py")
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    assert printed.out == ""
    return status, " ".join(printed.err.replace("│", " ").split())


def test_defaults_hold_where_nothing_is_given() -> None:
    config = resolved(*NEEDED)
    assert config == Stage(input=("a.jsonl",), output=Path("out"))
    assert (config.keys, config.limit, config.optimizer.betas) == (("text",), 5, (0.9, 0.95))


def test_flags_override_the_file_and_the_file_overrides_defaults(written: Callable[[str], Path]) -> None:
    file = written("input: [a.jsonl, b.jsonl]\noutput: out\nbatch_size: 16\nkeys: [title, text]\nlr: 1e-3\nweights: {web: 0.5, code: 2}")
    config = resolved("--config", file)
    assert (config.input, config.batch_size, config.keys, config.optimizer.lr) == (("a.jsonl", "b.jsonl"), 16, ("title", "text"), 1e-3)
    assert config.weights == {"web": 0.5, "code": 2.0}
    config = resolved("--batch-size", 32, f"--config={file}", "--keys", "body", "--lr", 0.5, "--weights", "web", 1)
    assert (config.input, config.batch_size, config.keys, config.optimizer.lr) == (("a.jsonl", "b.jsonl"), 32, ("body",), 0.5)
    assert config.weights == {"web": 1.0}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("shuffle: false", "shuffle", False),
        ("verbose: true", "verbose", True),
        ("tie: true", "tie", True),
        ("tie: false", "tie", False),
        ("tie: null", "tie", None),
        ("limit: null", "limit", None),
        ("limit:", "limit", None),
        ("cache: null", "cache", None),
        ("cache: some/folder", "cache", Path("some/folder")),
        ("keys: text", "keys", ("text",)),
        ("keys: []", "keys", ()),
        ("keys: ['', 'a b', '-5']", "keys", ("", "a b", "-5")),
        ("weights: {}", "weights", {}),
        ("weights: {a: 1.0e-5}", "weights", {"a": 1e-5}),
        ("extra: {eps: 1.0e-05, flag: true, n: -3}", "extra", {"eps": "1.0e-05", "flag": "True", "n": "-3"}),
        ("note: '--not a flag'", "note", "--not a flag"),
        ("note: 'two\n\n  lines: ü 漢'", "note", "two\nlines: ü 漢"),
        ("limit: -3", "limit", -3),
    ],
)
def test_yaml_values_of_every_shape(written: Callable[[str], Path], text: str, name: str, value: Any) -> None:
    assert getattr(resolved(*NEEDED, "--config", written(text)), name) == value


def test_an_empty_file_changes_nothing(written: Callable[[str], Path]) -> None:
    assert resolved(*NEEDED, "--config", written("# nothing yet\n")) == resolved(*NEEDED)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--no-shuffle",), "shuffle", False),
        (("--no_shuffle",), "shuffle", False),
        (("--verbose", "--no-verbose"), "verbose", False),
        (("--tie", "False"), "tie", False),
        (("--limit", "None"), "limit", None),
        (("--batch_size", "3"), "batch_size", 3),
        (("--batch-size=3", "--batch-size=4"), "batch_size", 4),
        (("--note=--odd",), "note", "--odd"),
        (("--extra", "a", "1", "b", "x=y"), "extra", {"a": "1", "b": "x=y"}),
    ],
)
def test_flags_of_every_shape(arguments: Sequence[str], name: str, value: Any) -> None:
    assert getattr(resolved(*NEEDED, *arguments), name) == value


def test_a_flag_undoes_what_the_file_switched(written: Callable[[str], Path]) -> None:
    file = written("shuffle: false\nverbose: true\ncache: x")
    config = resolved(*NEEDED, "--config", file, "--shuffle", "--no-verbose", "--cache", "None")
    assert (config.shuffle, config.verbose, config.cache) == (True, False, None)


def test_print_config_gives_what_config_reads(written: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    given_flags = (
        *NEEDED,
        "--limit",
        "None",
        "--no-shuffle",
        "--tie",
        "False",
        "--weights",
        "a",
        "1e-5",
        "--betas",
        0,
        "-1e-7",
        "--note",
        "ü: 1",
    )
    expected = resolved(*given_flags)
    assert parse(Stage, [*map(str, given_flags), "--print-config"], prog="stage.py") is None
    printed = capsys.readouterr().out
    names = [one.name for one in dataclasses.fields(Stage)]
    assert list(yaml.safe_load(printed)) == [*names[:-1], "lr", "betas"]
    assert resolved("--config", written(printed)) == expected


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
WORD = TEXT.filter(lambda text: not text.startswith("-"))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    note=TEXT,
    keys=st.lists(WORD, max_size=3),
    limit=st.none() | st.integers(),
    weights=st.dictionaries(WORD, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    lr=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    tie=st.none() | st.booleans(),
)
def test_any_settings_survive_the_way_through_yaml(tmp_path: Path, **values: Any) -> None:
    config = Stage(
        input=("a",),
        output=Path("b"),
        optimizer=Optimizer(lr=values.pop("lr")),
        **{**values, "keys": tuple(values["keys"])},
    )
    (tmp_path / "settings.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert resolved("--config", tmp_path / "settings.yaml") == config


def test_flat_settings_are_json_types() -> None:
    assert flat(resolved(*NEEDED, "--cache", "c"))["cache"] == "c"
    assert flat(resolved(*NEEDED))["betas"] == [0.9, 0.95]


def test_help_shows_groups_texts_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        resolved("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert text.startswith("usage: stage.py [-h] [OPTIONS] Turn something into something else.")
    assert "optimizer options" in text
    assert "How the weights move." in text
    assert "--batch-size INT Texts in one batch. (default: 8)" in text
    assert "--output PATH Folder to write. (required)" in text
    assert "--kind {plain,fancy} Kind of output. (default: plain)" in text
    assert "--lr FLOAT Highest learning rate. (default: 0.0003)" in text
    assert "stage." not in text.removeprefix("usage: stage.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NEEDED, "--bacth-size", 3), "unknown flag --bacth-size; did you mean '--batch-size'?"),
        (("--inptu", "a", "--output", "b"), "unknown flag --inptu; did you mean '--input'?"),
        ((*NEEDED, "--no-shufle"), "unknown flag --no-shufle; did you mean '--no-shuffle'?"),
        ((*NEEDED, "--confg=a.yaml"), "unknown flag --confg; did you mean '--config'?"),
        ((*NEEDED, "--batch-size", "four"), "Error parsing --batch-size: invalid literal for int() with base 10: 'four'"),
        ((*NEEDED, "--kind", "odd"), "invalid choice 'odd' for argument '--kind'. Expected one of ('plain', 'fancy')"),
        ((*NEEDED, "--betas", 0.5), "Missing value for argument '--betas'. Expected 2 values."),
        ((*NEEDED, "--weights", "web"), "Error parsing --weights"),
        (("--input", "a"), "Missing from stage.py: --output PATH Folder to write. (required)"),
        ((*NEEDED, "--batch-size", 3, "stray"), "Unrecognized options: stray"),
        ((*NEEDED, "--config"), "Missing value for argument '--config'"),
        ((*NEEDED, "--config", "a.yaml", "--config=b.yaml"), "--config is given 2 times: a.yaml, b.yaml"),
        ((*NEEDED, "--lr", 0), "lr=0.0 must be above 0."),
        ((*NEEDED, "--lr", "nan"), "lr=nan must be finite; give a number, or leave the setting out for its default."),
        ((*NEEDED, "--lr", "inf"), "lr=inf must be finite"),
        ((*NEEDED, "--betas", 0.5, "-inf"), "betas=[0.5, -inf] must be finite"),
        ((*NEEDED, "--weights", "web", "nan"), "weights={'web': nan} must be finite"),
        ((*NEEDED, "--lr", "nan", "--print-config"), "lr=nan must be finite"),
    ],
)
def test_a_wrong_flag_is_one_message_that_names_it(capsys: pytest.CaptureFixture[str], arguments: Sequence[object], message: str) -> None:
    status, text = failure(capsys, arguments)
    assert status == 2
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bacth_size: 3", "unknown setting 'bacth_size'; did you mean 'batch_size'?"),
        ("batch-size: 3", "unknown setting 'batch-size'; did you mean 'batch_size'?"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("optimizer: {lr: 1}", "unknown setting 'optimizer'"),
        ("3: 4", "unknown setting 3"),
        ("- input", "holds a list; the file must be a mapping"),
        ("batch_size: 1\nbatch_size: 2", "'batch_size' is set 2 times"),
        ("batch_size: null", "batch_size=None: null is no value of this setting"),
        ("shuffle: null", "shuffle=None: null is no value of this setting"),
        ("shuffle: 'no'", "shuffle='no' is neither true nor false"),
        ("tie: 1", "tie=1 is neither true nor false"),
        ("batch_size: true", "batch_size=True is true or false"),
        ("note: yes", "note=True is true or false, which is no value of this setting; put text such as 'yes' in quotes."),
        ("batch_size: [1, 2]", "batch_size=[1, 2] is a list"),
        ("weights: [a, 1]", "weights=['a', 1] is a list"),
        ("keys: {a: b}", "keys={'a': 'b'} is a list or a mapping"),
        ("keys: [[a]]", "keys=[['a']]: ['a'] inside it is no plain value"),
        ("keys: [null]", "None inside it is no plain value"),
        ("weights: {a: {b: 1}}", "{'b': 1} inside it is no plain value"),
        ("keys: [--batch-size]", "'--batch-size' begins with '-', so it would be read as a flag"),
        ("batch_size: four", "Error parsing --batch-size"),
        ("lr: .nan", "lr=nan must be finite"),
        ("weights: {web: .inf}", "weights={'web': inf} must be finite"),
    ],
)
def test_a_wrong_file_is_one_message_that_names_the_setting(
    capsys: pytest.CaptureFixture[str], written: Callable[[str], Path], content: str, message: str
) -> None:
    status, text = failure(capsys, [*NEEDED, "--config", written(content)])
    assert status == 2
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"), [(b"a: [1", "is not valid YAML"), (b"\xff\xfe\xfa", "is not valid YAML"), (None, "no such file")]
)
def test_a_file_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    status, text = failure(capsys, [*NEEDED, "--config", path])
    assert status == 3
    assert f"--config {path}" in text
    assert message in text


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a=1 must be even."), 2, "stage.py: error: a=1 must be even."),
        (InputError("x: no such file."), 3, "stage.py: error: x: no such file."),
        (MissingPackageError("vllm", extra="synthesis", purpose="the engine"), 4, "pip install 'megatron-instruct[synthesis]'"),
        (EngineError("died"), 5, "stage.py: error: died"),
        (TrainingError("loss is not finite"), 6, "stage.py: error: loss is not finite"),
        (OSError(28, "No space left on device", "out/a"), 1, "No space left on device: 'out/a'; finished work is kept"),
        (BrokenPipeError(32, "a process is gone"), 1, "a process is gone; finished work is kept"),
        (KeyboardInterrupt(), 130, "interrupted; finished work is kept"),
    ],
)
def test_an_error_of_a_stage_is_one_line_and_its_own_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    def stage(config: Stage) -> None:
        raise error

    assert run_tool(Stage, stage, NEEDED, prog="stage.py") == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden() -> None:
    def stage(config: Stage) -> Mapping[str, Any]:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_tool(Stage, stage, NEEDED, prog="stage.py")


def test_a_stage_that_succeeds_has_status_0_and_its_settings() -> None:
    seen: list[Stage] = []
    assert run_tool(Stage, seen.append, [*NEEDED, "--batch-size", "2"], prog="stage.py") == 0
    assert [config.batch_size for config in seen] == [2]


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    done = subprocess.run([sys.executable, tool, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
