"""What one document draws from a bank: each style once, at first use, and on record."""

from megatron_instruct.templates.bank import Bank, Style
from megatron_instruct.templates.sampling import Choices


class Draws:
    """Styles for one document. `drawn` names all that was used, by its place in the bank's family (from 0)."""

    __slots__ = ("_bank", "_choices", "_styles", "drawn", "none_of_these")

    def __init__(self, bank: Bank, choices: Choices) -> None:
        self._bank, self._choices = bank, choices
        self._styles: dict[str, Style] = {}
        self.drawn: dict[str, int] = {}
        self.none_of_these = bank.none_of_these

    def style(self, family: str) -> Style:
        style = self._styles.get(family)
        if style is None:
            styles = self._bank.families[family]
            place = self.drawn[family] = self._choices.index(family, len(styles))
            style = self._styles[family] = styles[place]
        return style

    def text(self, family: str) -> str:
        """Return the text of a family whose styles are plain texts without slots."""
        return self.style(family)["text"].text

    def filled(self, family: str, **names: str) -> str:
        """Return the text of a family whose styles are plain texts, with its slots filled."""
        return self.style(family)["text"].fill(names)

    def layout(self, smallest_pair_count: int) -> str:
        """Draw the layout for one-shot examples that have at least so many pairs each."""
        probabilities = self._bank.probabilities
        weights = probabilities.layouts_of_one if smallest_pair_count == 1 else probabilities.layouts_of_several
        return self._choices.weighted("layout", weights)

    def inverted(self) -> bool:
        return self._choices.chance("inversion", self._bank.probabilities.inversion)

    def has_reading_prefix(self) -> bool:
        return self._choices.chance("has_reading_prefix", self._bank.probabilities.reading_prefix)

    def has_bridge(self) -> bool:
        return self._choices.chance("has_bridge", self._bank.probabilities.bridge)

    def order(self, name: str, count: int) -> list[int]:
        return self._choices.order(name, count)
