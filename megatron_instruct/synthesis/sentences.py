"""Where sentences end, and texts cut there.

Comes in: a text. Goes out: pieces that give the text back when joined. Does not know: any tokenizer; whoever cuts says how long a piece is.
"""

import re
from collections.abc import Callable, Sequence

_ABBREVIATIONS = ("vs.", "e.g.", "i.e.", "cf.", "esp.", "orig.", "approx.", "prob.", "abbrev.", "syn.", "Mr.", "Dr.", "St.", "No.")
_WHOLE = "".join(rf"(?<!\b{re.escape(word)})" for word in _ABBREVIATIONS)
_END = re.compile(_WHOLE + r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-z])|(?<=[。！？])[”’」』]*\s*|\n\s*\n\s*")
"""After a full stop before something that is no small letter; after a full stop of Chinese or Japanese; at a blank line."""
_LABELS = re.compile(r"^(?:\[[^\]]{1,80}\]\s*|\d{1,2}[.)]\s+|(?:n|v|vt|vi|adj|adv|pl\.n|obs|interj)\.[\s,]*)+")
"""What dictionaries put in front of a sentence: its number, its usage, its part of speech."""


def split_sentences(text: str) -> list[str]:
    """Cut `text` after each sentence; the pieces keep their white space, so that joined they are the text."""
    pieces: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if match.end() > start:
            pieces.append(text[start : match.end()])
            start = match.end()
    return [*pieces, text[start:]] if start < len(text) else pieces


def statements(text: str, *, shortest: int, longest: int) -> list[str]:
    """Return the sentences of `text` that can stand alone as an answer: `shortest` to `longest` characters, whole, begun with a capital.

    Labels of a dictionary entry in front of a sentence are left out; each sentence comes once.
    """
    found: dict[str, None] = {}
    for piece in split_sentences(text):
        sentence = _LABELS.sub("", piece.strip())
        if "\n" in sentence or not shortest <= len(sentence) <= longest:
            continue
        if sentence[0].isalnum() and not sentence[0].islower() and sentence[-1] in ".!?。！？" and _balanced(sentence):
            found[sentence] = None
    return list(found)


def _balanced(sentence: str) -> bool:
    return all(sentence.count(opening) == sentence.count(closing) for opening, closing in ("()", "[]", "“”", "「」", "（）"))


def split_to_fit(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut `text` at sentence ends into pieces that fit, each as long as it can be.

    fits: whether a piece can be used; a longer piece must never fit where a shorter beginning of it does not.
    A single sentence that does not fit becomes a piece of its own, for the caller to set aside. Joined, the pieces are the text.
    """
    sentences = split_sentences(text)
    pieces: list[str] = []
    start = 0
    while start < len(sentences):
        end = _last_that_fits(sentences, start, fits)
        pieces.append("".join(sentences[start:end]))
        start = end
    return pieces


def _last_that_fits(sentences: Sequence[str], start: int, fits: Callable[[str], bool]) -> int:
    """Return the largest end for which sentences[start:end] fits, at least start + 1: doubled steps, then halved ones."""
    good, step = start + 1, 1
    while good < len(sentences) and fits("".join(sentences[start : min(good + step, len(sentences))])):
        good = min(good + step, len(sentences))
        step *= 2
    while good < len(sentences) and (step := step // 2):
        candidate = min(good + step, len(sentences))
        if fits("".join(sentences[start:candidate])):
            good = candidate
    return good
