"""A row of task data -> the document that a synthesizer is tuned on, in the text of its prompt format, with the role of every character.

The text is the one that synthesis prompts with and parses: format file, escaping and layout of pairs are shared with it. What stands around
the context is context; a question with its marker is instruction; an answer with its markers is response. BOS and end of document are put
around each document by preprocessing. An example that is longer than a sequence has its context cut at a word. Does not know: files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.prompt_formats.escaping import Escaping
from megatron_instruct.prompt_formats.parsing import Dropped, parse_pairs, write_pairs, written_question
from megatron_instruct.prompt_formats.prompt_format import PromptFormat, fill
from megatron_instruct.records import AugmentedText, InstructionPair, Role
from megatron_instruct.tokenizer import Tokenizer
from megatron_instruct.tuning.rows import TaskRow

_AROUND = 2
"""BOS and end of document."""
_LAST_WORD = re.compile(r"\s+\S*\Z")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a row."""

    document: AugmentedText | None
    """None where nothing of the row can be learnt."""
    dropped: tuple[Dropped, ...] = ()
    """Pairs left out; without a document, why there is none comes last."""
    tokens: int = 0
    """Of the document, BOS and end of document included."""
    pairs: int = 0
    cut: bool = False


class DocumentWriter:
    """Writes documents in one format for one tokenizer and sequence length."""

    def __init__(
        self, prompt_format: PromptFormat, tokenizer: Tokenizer, *, seq_length: int, long_contexts: Literal["cut", "reject"]
    ) -> None:
        if prompt_format.kind != "markers":
            raise ConfigError(
                f"prompt_format={prompt_format.name} is a chat format; "
                "a synthesizer is tuned in one of kind markers, such as instruction-synthesizer."
            )
        self._format, self._tokenizer = prompt_format, tokenizer
        self._escaping = Escaping(prompt_format.markers)
        self._seq_length, self._long_contexts = seq_length, long_contexts

    def write(self, row: TaskRow) -> Written:
        """Write the document of a row."""
        pairs, dropped = self._pairs(row)
        if not pairs:
            return Written(document=None, dropped=(*dropped, Dropped(reason="no pair left", content=row.context)))
        context = self._escaping.hide(row.context)
        document = self._document(row, context, pairs)
        tokens = self._tokens(document.text)
        if tokens <= self._seq_length:
            return Written(document=document, dropped=tuple(dropped), tokens=tokens, pairs=len(pairs))
        too_long = Dropped(reason="too long", content=row.context, detail=f"{tokens} tokens, above {self._seq_length}")
        if self._long_contexts == "reject":
            return Written(document=None, dropped=(*dropped, too_long))
        return self._cut(row, context, pairs, dropped) or Written(document=None, dropped=(*dropped, too_long))

    def _pairs(self, row: TaskRow) -> tuple[list[InstructionPair], list[Dropped]]:
        """Return the pairs that synthesis would parse from what is written of them, each with its markers hidden, and the others."""
        hidden = [InstructionPair(question=self._escaping.hide(q.strip()), answer=self._escaping.hide(a.strip())) for q, a in row.pairs]
        parsed = parse_pairs(write_pairs(hidden, self._format.pair), self._format.pair, stopped=True)
        dropped = [one for one in parsed.dropped if one.reason != "empty completion"]
        return list(parsed.pairs), dropped

    def _cut(self, row: TaskRow, context: str, pairs: list[InstructionPair], dropped: list[Dropped]) -> Written | None:
        """Cut the context to what the pairs leave it, at least half a sequence; a pair whose answer is cut off with it goes, too."""
        while self._room(row, pairs) < self._seq_length // 2 and len(pairs) > 1:
            *pairs, last = pairs
            dropped = [*dropped, Dropped(reason="pairs too long", content=last.question)]
        room = self._room(row, pairs)
        while pairs and room > 0 and (shorter := self._beginning(context, room)):
            kept = [pair for pair in pairs if pair.answer not in context or pair.answer in shorter]
            if len(kept) < len(pairs):
                dropped = [*dropped, *(Dropped(reason="answer cut off", content=pair.question) for pair in pairs if pair not in kept)]
                pairs, room = kept, self._room(row, kept)
                continue
            document = self._document(row, shorter, pairs)
            tokens = self._tokens(document.text)
            if tokens <= self._seq_length:
                return Written(document=document, dropped=tuple(dropped), tokens=tokens, pairs=len(pairs), cut=True)
            room -= tokens - self._seq_length  # what meets at the seams
        return None

    def _room(self, row: TaskRow, pairs: Sequence[InstructionPair]) -> int:
        """Return the tokens that the pairs leave for the context."""
        return self._seq_length - self._tokens(self._document(row, "", pairs).text)

    def _beginning(self, text: str, tokens: int) -> str:
        """Return the beginning of a text of at most so many tokens: whole words, but for one that is most of it, as without blanks."""
        ends = self._tokenizer.encode_flat([text], ends=True).ends
        assert ends is not None, "ends were asked for"
        if len(ends) <= tokens:
            return text
        beginning = text.encode()[: int(ends[tokens - 1])].decode(errors="ignore")
        whole = _LAST_WORD.sub("", beginning)
        return (whole if 2 * len(whole) >= len(beginning) else beginning).rstrip()

    def _document(self, row: TaskRow, context: str, pairs: Sequence[InstructionPair]) -> AugmentedText:
        layout, written = self._format.pair, ""
        ends: list[int] = []
        roles: list[Role] = []

        def add(text: str, role: Role) -> None:
            nonlocal written
            written += text
            ends.append(len(written))
            roles.append(role)

        add(fill(self._format.text, text=context), "context")
        for number, pair in enumerate(pairs):
            question, whole = written_question(pair, layout), write_pairs([pair], layout)
            add((layout.between if number else "") + question, "instruction")
            add(whole[len(question) :], "response")
        provenance = {"data_set": row.data_set, "prompt_format": self._format.name}
        return AugmentedText(id=row.id, text=written, ends=tuple(ends), roles=tuple(roles), provenance=provenance)

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text)) + _AROUND
