"""Structured output: a grammar, in the Lark form that llguidance reads, that a completion must follow.

`form` forces question and answer into the layout of the prompt format. `extractive` moreover takes every answer from the text, as one of
its sentences: the synthesizer chooses the sentence and writes the question. The sentences are divided among the pairs in the order of the
text, so that no answer comes twice. Does not know: engines.
"""

import itertools
import json
import re
from collections.abc import Sequence

from megatron_instruct.prompt_formats.parsing import PairLayout
from megatron_instruct.prompt_formats.prompt_format import PromptFormat, Structure
from megatron_instruct.synthesis.sentences import statements


def grammar_of(prompt_format: PromptFormat, text: str) -> str | None:
    """Return the grammar for the pairs of one text, or None where the format leaves the form free.

    Raises NoStatementError where answers are to come from the text, and no sentence of it can stand alone.
    """
    layout, structure = prompt_format.pair, prompt_format.structure
    if prompt_format.structured_output == "none":
        return None
    if prompt_format.structured_output == "form":
        return _form(layout, structure)
    sentences = [
        sentence
        for sentence in statements(text, shortest=structure.shortest, longest=structure.longest)
        if not sentence.startswith(structure.no_answer) and sentence.isprintable()
        if not any(marker in sentence for marker in (layout.question, layout.answer, layout.end))
    ]
    if not sentences:
        raise NoStatementError
    choices = [" | ".join(_literal(sentence) for sentence in group) for group in divide(sentences, structure.pairs)]
    return _grammar(layout, structure, choices)


class NoStatementError(Exception):
    """No sentence of the text can be an answer."""


def divide(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Divide items in order into at most `parts` groups, as even as can be, none empty."""
    parts = min(parts, len(items))
    bounds = [part * len(items) // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(bounds)]


def _form(layout: PairLayout, structure: Structure) -> str:
    """One regular expression for all, since llguidance would let an answer of its own swallow what stands behind it."""
    pairs = []
    asks, answers = _quoted(layout.question + layout.blank), _quoted(layout.separator + layout.answer + layout.blank)
    for number in range(structure.pairs):
        question = structure.questions[min(number, len(structure.questions) - 1)]
        pairs.append(f"{asks}({question}){answers}({structure.answer}){_quoted(layout.before_end + layout.end)}")
    return f"start: /{_regex(_quoted(layout.between).join(pairs))}/\n"


def _quoted(text: str) -> str:
    """Return the regular expression that only `text` matches."""
    return re.sub(r"[\\.+*?()|\[\]{}^$]", lambda match: "\\" + match[0], text).replace("\n", "\\n")


def _grammar(layout: PairLayout, structure: Structure, answers: Sequence[str]) -> str:
    """answers: for each pair the right-hand side of its answer."""
    rules = [f"answer_{number}: {answer}" for number, answer in enumerate(answers)]
    pairs = []
    asks, replies = _literal(layout.question + layout.blank), _literal(layout.separator + layout.answer + layout.blank)
    for number in range(len(answers)):
        rules.append(f"question_{number}: /{_regex(structure.questions[min(number, len(structure.questions) - 1)])}/")
        pairs.append(f"{asks} question_{number} {replies} answer_{number} {_literal(layout.before_end + layout.end)}")
    between = f" {_literal(layout.between)} " if layout.between else " "
    return "\n".join([f"start: {between.join(pairs)}", *rules, ""])


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(pattern: str) -> str:
    return pattern.replace("/", r"\/")
