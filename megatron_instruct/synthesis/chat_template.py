"""The chat template of a model's own tokenizer: turns in, token ids out, and the strings that a text must not spell.

What a template does with its turns is found out once, by giving it words that it cannot know: whether it takes a system message, and what
it puts around each turn. Does not know: prompt formats, pairs.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError, MissingPackageError

_PROBES = ("kvasir", "oryzon", "pelmet", "quincunx")
"""System, user, assistant, user: words that no template holds."""
_LONGEST = 40
"""Characters of a string around a turn that may count as its marker; what is longer is prose."""


class ChatTemplate:
    """Writes prompts that end where the assistant is to begin."""

    def __init__(self, folder: Path, arguments: Mapping[str, str | bool | int]) -> None:
        """Raises InputError where there is no tokenizer, ConfigError where it has no template or one that leaves turns out."""
        try:
            import transformers
        except ImportError as error:
            raise MissingPackageError("transformers", extra="synthesis", purpose="a chat prompt format") from error
        try:
            load = transformers.AutoTokenizer.from_pretrained
            self._tokenizer: Any = load(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no tokenizer that transformers can load: {error}") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"{folder} has no chat template; use the format instruction-synthesizer, or an instruct model's folder.")
        self._folder, self._arguments = folder, dict(arguments)
        system, *turns = _PROBES
        self._takes_system = self._shows(_PROBES)
        if not self._takes_system and not self._shows(turns):
            raise ConfigError(f"{folder}: its chat template does not show each turn once, in order; use another model or format.")
        self.markers = self._markers(system if self._takes_system else "", turns)
        """Special tokens, and the strings that the template puts around turns."""

    def encode(self, system: str, turns: Sequence[str]) -> list[int]:
        """Return the ids of a prompt: turns of user and assistant in alternation, the last one the user's.

        system: left out when empty; in front of the first turn where the template takes no system message.
        """
        if system and not self._takes_system:
            system, turns = "", [f"{system}\n\n{turns[0]}", *turns[1:]]
        ids: list[int] = self._tokenizer(self._render(system, turns), add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, system: str, turns: Sequence[str]) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._arguments)
        return text

    def _shows(self, words: Sequence[str]) -> bool:
        """Whether each of these turns, the first a system message where there are four, is in the prompt once, in order."""
        import jinja2

        system, turns = (words[0], words[1:]) if len(words) == len(_PROBES) else ("", words)
        try:
            rendered = self._render(system, turns)
        except jinja2.TemplateError:  # what a template raises about a role it does not take
            return False
        return re.findall("|".join(_PROBES), rendered) == list(words)

    def _markers(self, system: str, turns: Sequence[str]) -> list[str]:
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        special = [token for token in dict.fromkeys([*special, *self._tokenizer.all_special_tokens]) if token.strip()]
        around = re.split("|".join([*_PROBES, *map(re.escape, sorted(special, key=len, reverse=True))]), self._render(system, turns))
        lines = {line.strip() for piece in around for line in piece.splitlines()}
        return special + sorted(line for line in lines if 1 < len(line) <= _LONGEST and not line.isalnum())
