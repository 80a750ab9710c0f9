"""Phases of a run: until which step it is fed with which blend, and what the learning rate does meanwhile.

Comes in: the setting `phases`. Goes out: small frozen values, and the learning rate of a step, by pure functions. Does not know: data,
torch. Mixing better data into the phase in which the learning rate falls: arXiv:2404.06395 (WSD), 2407.21783 (annealing).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_instruct.errors import ConfigError, did_you_mean

_KEYS = ("until", "data_path", "lr", "min_lr", "lr_decay_style")
_STYLES = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A learning rate of the phase's own, from its first step to its end, instead of the run's schedule."""

    lr: float
    min_lr: float
    style: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, as the settings tell of it."""

    until: int | str | None
    """Last step; "80%" of train_iters; "decay": the last step before WSD's learning rate falls; None: the end of the run."""
    data_path: tuple[str, ...]
    stage: Stage | None


@dataclass(frozen=True, kw_only=True)
class PlacedPhase:
    """One phase, in steps."""

    number: int
    """From 1."""
    start: int
    """Steps before it."""
    end: int
    """Its last step."""
    data_path: tuple[str, ...]
    stage: Stage | None

    def to_json(self) -> dict[str, Any]:
        """Return what decides the result, but for the content of the data."""
        stage = None if self.stage is None else [self.stage.lr, self.stage.min_lr, self.stage.style]
        return {"start": self.start, "end": self.end, "lr": stage}


def parse_phases(texts: Sequence[str]) -> tuple[Phase, ...]:
    """Read phases, each a YAML mapping. Raises ConfigError that names the phase, the key and the remedy."""
    return tuple(_parse(number, text) for number, text in enumerate(texts, start=1))


def place_phases(phases: Sequence[Phase], *, train_iters: int, decay_start: int | None) -> tuple[PlacedPhase, ...]:
    """Turn `until` into steps. decay_start: steps before WSD's learning rate falls; None under another schedule.

    Raises ConfigError for phases that are empty, out of order, or do not fill the run.
    """
    if not phases:
        return ()
    ends = [_end(number, phase, len(phases), train_iters, decay_start) for number, phase in enumerate(phases, start=1)]
    for number, (before, end) in enumerate(itertools.pairwise([0, *ends]), start=1):
        if end <= before:
            raise ConfigError(f"phases: phase {number} ends at step {end}, and begins after step {before}; give it a later until.")
    if ends[-1] != train_iters:
        raise ConfigError(
            f"phases: the last one ends at step {ends[-1]}, and train_iters={train_iters}; leave out its until, or make them equal."
        )
    return tuple(
        PlacedPhase(number=number, start=start, end=end, data_path=phase.data_path, stage=phase.stage)
        for number, (start, end, phase) in enumerate(zip([0, *ends[:-1]], ends, phases, strict=True), start=1)
    )


def phase_of(phases: Sequence[PlacedPhase], iteration: int) -> PlacedPhase | None:
    """Return the phase of a step, counted from 1; None where there are no phases."""
    return next((phase for phase in phases if phase.start < iteration <= phase.end), None)


def own_rate(phases: Sequence[PlacedPhase], iteration: int) -> float | None:
    """Return the learning rate of a step whose phase has one of its own."""
    phase = phase_of(phases, iteration)
    if phase is None or phase.stage is None:
        return None
    done = (iteration - 1 - phase.start) / (phase.end - phase.start)
    left = (1 + math.cos(math.pi * done)) / 2 if phase.stage.style == "cosine" else 1 - done
    return phase.stage.min_lr + (phase.stage.lr - phase.stage.min_lr) * left


def set_rate(groups: Iterable[dict[str, Any]], rate: float | None, *, highest: float) -> None:
    """Give an optimizer's groups of parameters the learning rate of a phase; None leaves them as the schedule has them.

    highest: the run's `lr`; a group with another highest rate keeps the ratio.
    """
    for group in groups if rate is not None else ():
        group["lr"] = rate * group.get("max_lr", highest) / highest


def with_free_phases(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, iteration: int, where: str) -> dict[str, Any]:
    """Return the settings that a run was saved with, its phases that have not begun after so many steps taken from what is wanted now.

    Raises ConfigError where a phase that has begun is changed.
    """
    before, now = saved.get("phases"), wanted["phases"]
    if before is None or now is None:
        return dict(saved)
    for number, phase in enumerate(phase for phase in before if phase["start"] < iteration):
        other = now[number] if number < len(now) else None
        if other != phase:
            change = "it is left out" if other is None else ", ".join(_changes(phase, other))
            raise ConfigError(
                f"{where} has done {iteration} steps, and phase {number + 1}, which has begun, is changed: {change}; restore it. "
                f"Only phases that begin after step {iteration} can be changed."
            )
    return {**saved, "phases": now}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = {"data": "the content of its data or the weights of its blend differ"}
    return [names.get(key, f"{key} was {old[key]!r} and is {new.get(key)!r}") for key in old if old[key] != new.get(key)]


def _parse(number: int, text: str) -> Phase:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"phases: phase {number} is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"phases: phase {number} is {text!r}; give a mapping such as {{until: 80%, data_path: 0.7 web 0.3 books}}.")
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"phases: phase {number} has an unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    words = given.get("data_path")
    words = words.split() if isinstance(words, str) else [str(word) for word in words] if isinstance(words, list) else []
    if not words:
        raise ConfigError(f"phases: phase {number} has data_path={given.get('data_path')!r}; give WEIGHT PREFIX pairs, or prefixes.")
    return Phase(until=_until(number, given.get("until")), data_path=tuple(words), stage=_stage(number, given))


def _until(number: int, value: object) -> int | str | None:
    if value is None or value == "decay" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.endswith("%"):
        try:
            share = float(value[:-1])
        except ValueError:
            share = math.nan
        if 0.0 < share <= 100.0:
            return value
    raise ConfigError(f"phases: phase {number} has until={value!r}; give a step, a share of the run such as 80%, or decay.")


def _stage(number: int, given: Mapping[str, Any]) -> Stage | None:
    if "lr" not in given:
        if "min_lr" in given or "lr_decay_style" in given:
            raise ConfigError(f"phases: phase {number} has min_lr or lr_decay_style without lr; give lr too, or leave them out.")
        return None
    style = given.get("lr_decay_style", "linear")
    try:
        lr = float(given["lr"])
        min_lr = float(given.get("min_lr", lr))
    except (TypeError, ValueError):
        lr = min_lr = math.nan
    if not 0.0 <= min_lr <= lr < math.inf or lr == 0.0:
        raise ConfigError(f"phases: phase {number} has lr={given['lr']!r}, min_lr={given.get('min_lr')!r}; 0 <= min_lr <= lr must hold.")
    if style not in _STYLES:
        raise ConfigError(f"phases: phase {number} has lr_decay_style={style!r}{did_you_mean(str(style), _STYLES)}")
    return Stage(lr=lr, min_lr=min_lr, style=style)


def _end(number: int, phase: Phase, count: int, train_iters: int, decay_start: int | None) -> int:
    if phase.until is None:
        if number < count:
            raise ConfigError(f"phases: phase {number} of {count} has no until; only the last one runs to the end of the run.")
        return train_iters
    if phase.until == "decay":
        if decay_start is None:
            raise ConfigError(f"phases: phase {number} has until=decay, which needs lr_decay_style=WSD; set it, or give a step.")
        return decay_start
    if isinstance(phase.until, str):
        return round(float(phase.until[:-1]) / 100 * train_iters)
    return phase.until
