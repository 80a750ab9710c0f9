"""What one document draws from a bank: each style once, at first use, and on record."""

from megatron_instruct.templates.bank import Bank, Style
from megatron_instruct.templates.sampling import Choices


class Draws(dict[str, Style]):
    """Styles for one document, by family: draws["bridges"] draws one when it is first asked for.

    `drawn` names all that was used, by its place in the bank's family (from 0).
    """

    __slots__ = ("_choices", "_families", "bank", "drawn", "order")

    def __init__(self, bank: Bank, choices: Choices) -> None:
        super().__init__()
        self.bank, self._families, self._choices = bank, bank.families, choices
        self.drawn: dict[str, int] = {}
        self.order = choices.order

    def __missing__(self, family: str) -> Style:
        styles = self._families[family]
        place = self.drawn[family] = self._choices.index(family, len(styles))
        style = self[family] = styles[place]
        return style

    def text(self, family: str) -> str:
        """Return the text of a family whose styles are plain texts without slots."""
        return self[family]["text"].text

    def filled(self, family: str, **names: str) -> str:
        """Return the text of a family whose styles are plain texts, with its slots filled."""
        return self[family]["text"].fill(names)

    def layout(self, smallest_pair_count: int) -> str:
        """Draw the layout for one-shot examples that have at least so many pairs each."""
        probabilities = self.bank.probabilities
        weights = probabilities.layouts_of_one if smallest_pair_count == 1 else probabilities.layouts_of_several
        return self._choices.weighted("layout", weights)

    def inverted(self) -> bool:
        return self._choices.chance("inversion", self.bank.probabilities.inversion)

    def has_reading_prefix(self) -> bool:
        return self._choices.chance("has_reading_prefix", self.bank.probabilities.reading_prefix)

    def has_bridge(self) -> bool:
        return self._choices.chance("has_bridge", self.bank.probabilities.bridge)
