"""Texts and earlier examples -> the token ids of a prompt, and the history cut to what fits.

The ids are made here and not by the engine, so that BOS is there exactly once per example and lengths are true. Texts cannot break a
prompt: markers and special tokens that they spell are made harmless, and given back in what is parsed. Does not know: engines, chains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_instruct.errors import ConfigError, InputError, MissingPackageError
from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.synthesis.escaping import Escaping
from megatron_instruct.synthesis.parsing import write_pairs
from megatron_instruct.synthesis.prompt_format import PromptFormat
from megatron_instruct.tokenizer import Tokenizer


class Prompts(Protocol):
    """Writes prompts in one format for one tokenizer."""

    escaping: Escaping
    """What it makes harmless in texts; a parsed field is to be given to `restore`."""

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        """Return the ids of a prompt that shows `history`, oldest first, and asks for the pairs of `text`."""
        ...


def load_prompts(prompt_format: PromptFormat, tokenizer: Tokenizer, folder: Path) -> Prompts:
    """Return the writer of a format. folder: of the tokenizer, where its chat template is."""
    return MarkerPrompts(prompt_format, tokenizer) if prompt_format.kind == "markers" else ChatPrompts(prompt_format, folder)


def fit(prompts: Prompts, history: Sequence[OneShotExample], text: str, *, most: int) -> tuple[list[int], int] | None:
    """Return the ids of a prompt of at most `most` tokens, and how many examples it shows: the newest, as many as fit.

    None where the text does not fit even without history.
    """
    for skipped in range(len(history) + 1):
        ids = prompts.encode(history[skipped:], text)
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
        self.escaping = Escaping(prompt_format.hide, where=f"prompt format {prompt_format.name}")
        self._format, self._tokenizer, self._bos = prompt_format, tokenizer, tokenizer.bos

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        ids: list[int] = []
        for shot in history:
            pairs = write_pairs(_hidden(shot.pairs, self.escaping), self._format.pair)
            ids += [self._bos, *self._tokenizer.encode(self._text(shot.text) + pairs), self._tokenizer.eod]
        return [*ids, self._bos, *self._tokenizer.encode(self._text(text))]

    def _text(self, text: str) -> str:
        return self._format.text.replace("{text}", self.escaping.hide(text))


class ChatPrompts:
    """Turns of the model's own chat template: a text is the user's, its pairs are the assistant's."""

    def __init__(self, prompt_format: PromptFormat, folder: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingPackageError("transformers", extra="synthesis", purpose="a chat prompt format") from error
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{folder} has no chat template; use the format instruction-synthesizer, or an instruct model's folder.")
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self.escaping = Escaping([*special, *self._tokenizer.all_special_tokens, *prompt_format.hide], where=f"tokenizer {folder}")
        self._format = prompt_format

    def encode(self, history: Sequence[OneShotExample], text: str) -> list[int]:
        messages = [{"role": "system", "content": self._format.system}] if self._format.system else []
        for shot in (*self._format.examples, *history):
            pairs = write_pairs(_hidden(shot.pairs, self.escaping), self._format.pair)
            messages += [self._request(shot.text), {"role": "assistant", "content": pairs}]
        messages.append(self._request(text))
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _request(self, text: str) -> dict[str, str]:
        return {"role": "user", "content": self._format.request.replace("{text}", self.escaping.hide(text))}


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
