"""Texts and earlier examples -> the token ids of a prompt, and the history cut to what fits.

The ids are made here and not by the engine, so that BOS is there exactly once per example and lengths are true. Texts cannot break a
prompt: markers and special tokens that they spell are made harmless, and given back in what is parsed. Does not know: engines, chains, and
how a chat template works (chat_prompts.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_instruct.errors import ConfigError
from megatron_instruct.prompt_formats.escaping import Escaping
from megatron_instruct.prompt_formats.parsing import write_pairs, written_question
from megatron_instruct.prompt_formats.prompt_format import PromptFormat, fill
from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.synthesis.chat_template import ChatTemplate
from megatron_instruct.tokenizer import Tokenizer


class Prompts(Protocol):
    """Writes prompts in one format for one tokenizer."""

    escaping: Escaping
    """What it makes harmless in texts; a parsed field is to be given to `restore`."""

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        """Return the ids of a prompt that shows `history`, oldest first, and asks for the pairs of `text`."""
        ...

    def encode_question(self, text: str, pair: InstructionPair, history: Sequence[OneShotExample] = ()) -> list[int]:
        """Return the ids of a prompt that shows `history` and the text and asks for the answer to the pair's question alone."""
        ...

    def encode_judgement(self, text: str, pair: InstructionPair) -> list[int]:
        """Return the ids of a prompt that asks whether the pair is right about the text."""
        ...


def load_prompts(prompt_format: PromptFormat, tokenizer: Tokenizer, folder: Path) -> Prompts:
    """Return the writer of a format. folder: of the tokenizer, where its chat template is."""
    return MarkerPrompts(prompt_format, tokenizer) if prompt_format.kind == "markers" else ChatPrompts(prompt_format, folder)


def fit(
    prompts: Prompts, history: Sequence[OneShotExample], text: str, *, most: int, asked: InstructionPair | None = None
) -> tuple[list[int], int] | None:
    """Return the ids of a prompt of at most `most` tokens, and how many examples it shows: the newest, as many as fit.

    asked: ask for the answer to its question alone. None where the text does not fit even without history.
    """
    for skipped in range(len(history) + 1):
        shown = history[skipped:]
        ids = prompts.encode(shown, text) if asked is None else prompts.encode_question(text, asked, shown)
        if len(ids) <= most:
            return ids, len(history) - skipped
    return None


class MarkerPrompts:
    """Plain text between BOS and EOS tokens, as the public synthesizer was trained."""

    def __init__(self, prompt_format: PromptFormat, tokenizer: Tokenizer) -> None:
        if tokenizer.bos is None:
            raise ConfigError(
                f"prompt_format={prompt_format.name} begins every example with BOS, and the tokenizer names no bos_token; "
                "use the synthesizer's own tokenizer, or another format."
            )
        self.escaping = Escaping(prompt_format.markers)
        for marker in prompt_format.markers:
            if len(marker) > 1 and tokenizer.encode(self.escaping.hide(marker)) == tokenizer.encode(marker):
                raise ConfigError(
                    f"prompt_format={prompt_format.name}: the tokenizer drops the invisible character that makes {marker!r} harmless in a "
                    "text; use another tokenizer or other markers."
                )
        self._format, self._tokenizer, self._bos = prompt_format, tokenizer, tokenizer.bos

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        return [*self._shown(history), self._bos, *self._before(self._text(text), self._format.pair.question)]

    def encode_question(self, text: str, pair: InstructionPair, history: Sequence[OneShotExample] = ()) -> list[int]:
        question = written_question(_hidden([pair], self.escaping)[0], self._format.pair)
        asked = f"{self._text(text)}{question}{self._format.pair.separator}{self._format.pair.answer}"
        return [*self._shown(history), self._bos, *self._tokenizer.encode(asked)]

    def encode_judgement(self, text: str, pair: InstructionPair) -> list[int]:
        raise ConfigError(f"filters: judge asks an instruct model, and prompt_format={self._format.name} is not for one; leave it out.")

    def _shown(self, history: Sequence[OneShotExample]) -> list[int]:
        ids: list[int] = []
        for shot in history:
            pairs = write_pairs(_hidden(shot.pairs, self.escaping), self._format.pair)
            ids += [self._bos, *self._tokenizer.encode(self._text(shot.text) + pairs), self._tokenizer.eod]
        return ids

    def _before(self, text: str, following: str) -> list[int]:
        """Return the ids of a text as they are where `following` comes next, as in the examples shown and in training.

        Byte-level tokenizers write a last line break, or two, in another way than the same ones between words.
        """
        flat = self._tokenizer.encode_flat([text + following], ends=True)
        ends = flat.ends
        assert ends is not None, "ends were asked for"
        places = (ends == len(text.encode())).nonzero()[0]
        ids: list[int] = flat.ids[: int(places[-1]) + 1].tolist() if len(places) else self._tokenizer.encode(text)
        return ids

    def _text(self, text: str) -> str:
        return fill(self._format.text, text=self.escaping.hide(text))


class ChatPrompts:
    """Turns of the model's own chat template: a text is the user's, its pairs are the assistant's."""

    def __init__(self, prompt_format: PromptFormat, folder: Path) -> None:
        self._format, self._template = prompt_format, ChatTemplate(folder, prompt_format.template_arguments)
        self.escaping = Escaping([*self._template.markers, *prompt_format.markers])

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        turns = self._turns((*self._format.examples, *history))
        return self._template.encode(self._format.system, [*turns, self._request(text)])

    def encode_question(self, text: str, pair: InstructionPair, history: Sequence[OneShotExample] = ()) -> list[int]:
        hidden = _hidden([pair], self.escaping)[0]
        question = written_question(hidden, self._format.pair, marker=False)
        request = fill(
            self._needed(self._format.second_answer, "second_answer", "question_key"), text=self.escaping.hide(text), question=question
        )
        return self._template.encode("", [*self._turns(history), request])

    def encode_judgement(self, text: str, pair: InstructionPair) -> list[int]:
        hidden = _hidden([pair], self.escaping)[0]
        question = written_question(hidden, self._format.pair, marker=False)
        answer = hidden.answer if hidden.rationale is None else f"{hidden.rationale}\n{hidden.answer}"
        request = "" if self._format.judge is None else self._format.judge.request
        values = {"text": self.escaping.hide(text), "question": question, "answer": answer}
        return self._template.encode("", [fill(self._needed(request, "judge", "filters: judge"), **values)])

    def _turns(self, shots: Sequence[OneShotExample]) -> list[str]:
        turns: list[str] = []
        for shot in shots:
            turns += [self._request(shot.text), write_pairs(_hidden(shot.pairs, self.escaping), self._format.pair)]
        return turns

    def _needed(self, request: str, key: str, setting: str) -> str:
        """setting: what asks with the words of this key, to be named where the format has none."""
        if not request:
            raise ConfigError(
                f"{setting} needs the key {key!r} in the prompt format, and prompt_format={self._format.name} has none; "
                "add it, use another format, or leave the setting out."
            )
        return request

    def _request(self, text: str) -> str:
        return fill(self._format.request, text=self.escaping.hide(text))


def restored(pair: InstructionPair, escaping: Escaping, **provenance: Any) -> InstructionPair:
    """Return the pair with its markers as the text has them, and with what is given as its provenance."""
    return _changed(pair, escaping.restore, provenance)


def _hidden(pairs: Sequence[InstructionPair], escaping: Escaping) -> list[InstructionPair]:
    return [_changed(pair, escaping.hide, pair.provenance) for pair in pairs]


def _changed(pair: InstructionPair, change: Any, provenance: Any) -> InstructionPair:
    return InstructionPair(
        question=change(pair.question),
        answer=change(pair.answer),
        kind=pair.kind,
        options=tuple(change(option) for option in pair.options),
        rationale=None if pair.rationale is None else change(pair.rationale),
        provenance=provenance,
    )
