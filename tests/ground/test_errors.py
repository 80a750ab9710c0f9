"""Every error that a user can cause has an exit status of its own and says what to do."""

import pytest

from megatron_instruct import errors
from megatron_instruct.errors import MegatronInstructError, MissingPackageError, did_you_mean


def test_every_error_has_its_own_exit_status_as_the_tree_says() -> None:
    kinds = MegatronInstructError.__subclasses__()
    assert {kind.__name__: kind.exit_status for kind in kinds} == {
        "ConfigError": 2,
        "InputError": 3,
        "MissingPackageError": 4,
        "EngineError": 5,
        "TrainingError": 6,
        "LostProcessError": 7,
    }
    assert MegatronInstructError.exit_status == 1
    for kind in kinds:
        line = next(line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line)
        assert f"(exit status {kind.exit_status})" in line


def test_a_missing_package_names_the_line_that_installs_it() -> None:
    error = MissingPackageError("vllm", extra="synthesis", purpose="the engine 'vllm'")
    assert str(error) == "the engine 'vllm' needs the package vllm; install it with: pip install 'megatron-instruct[synthesis]'"


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lama", ["mistral", "llama"], "; did you mean 'llama'?"),
        ("num_layer", ["num_layers", "num_heads"], "; did you mean 'num_layers'?"),
        ("xyz", ["mistral", "llama"], "; known: llama, mistral."),
        ("xyz", (name for name in ["b", "a"]), "; known: a, b."),
        ("", ["a"], "; known: a."),
    ],
)
def test_the_closest_known_word_is_suggested_or_all_are_listed(word: str, known: list[str], expected: str) -> None:
    assert did_you_mean(word, known) == expected


@pytest.mark.parametrize("known", [["llama"], ["xyz"]])
def test_what_follows_a_suggestion_is_a_sentence_of_its_own(known: list[str]) -> None:
    said = did_you_mean("lama", known, more="Or give a file.")
    assert said in ("; did you mean 'llama'? Or give a file.", "; known: xyz. Or give a file.")
