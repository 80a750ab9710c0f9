"""Every error that a user can cause.

    MegatronInstructError
    ├── ConfigError             a setting breaks a rule, or two settings contradict each other   (exit status 2)
    ├── InputError              a file or folder is missing, broken, empty or not what it claims (exit status 3)
    ├── MissingPackageError     an optional package is not installed                             (exit status 4)
    ├── EngineError             an inference engine failed or died                               (exit status 5)
    ├── TrainingError           a training run cannot go on                                      (exit status 6)
    └── LostProcessError        a process of a training run is gone; the same command goes on    (exit status 7)

Messages name the field or file, the value, the rule and the remedy. An `assert` marks a mistake of ours, never of the user's.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class MegatronInstructError(Exception):
    """Base of all errors that a user can cause; tools print them as one message and exit with `exit_status`."""

    exit_status = 1


class ConfigError(MegatronInstructError):
    """A setting breaks a rule, or two settings contradict each other."""

    exit_status = 2


class InputError(MegatronInstructError):
    """A file or folder is missing, broken, empty or not what it claims to be."""

    exit_status = 3


class MissingPackageError(MegatronInstructError):
    """An optional package is needed and not installed."""

    exit_status = 4

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'megatron-instruct[{extra}]'")


class EngineError(MegatronInstructError):
    """An inference engine failed or died."""

    exit_status = 5


class TrainingError(MegatronInstructError):
    """A training run cannot go on."""

    exit_status = 6


class LostProcessError(MegatronInstructError):
    """A process of a training run is gone or silent; the same command goes on."""

    exit_status = 7


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to another process. As text, since an exception's own arguments need not survive the way."""

    kind: type[Exception]
    message: str

    def error(self, *, of: str = "") -> Exception:
        """Return the error. of: what is put before its message, such as the name of the process that failed."""
        # not called, since a class may take other arguments than its message
        return self.kind.__new__(self.kind, of + self.message)


def did_you_mean(word: str, known: Iterable[str], *, more: str = "") -> str:
    """Return "; did you mean 'x'?" for the closest of `known`, or the whole list when none is close: the end of a sentence.

    more: a sentence to follow.
    """
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    end = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}."
    return f"{end} {more}" if more else end
