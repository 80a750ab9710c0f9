"""Every choice has the probability that the bank gives it, and none depends on another. The ids are fixed, so the tests are too."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

from megatron_instruct.templates.bank import LAYOUTS_OF_SEVERAL, load_bank, shipped_bank
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.sampling import Choices

EXAMPLES = 10_000
BANK = load_bank(shipped_bank("en"))


def chi_square_is_usual(observed: Sequence[float], expected: Sequence[float], degrees: int) -> bool:
    """Whether the sum lies within 4.5 standard deviations, by Wilson and Hilferty's approximation: wrong once in 300,000."""
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in zip(observed, expected, strict=True))
    scale = 2 / (9 * degrees)
    return abs((statistic / degrees) ** (1 / 3) - (1 - scale)) / math.sqrt(scale) < 4.5


def independent(first: Sequence[Hashable], second: Sequence[Hashable]) -> bool:
    rows, columns, cells = Counter(first), Counter(second), Counter(zip(first, second, strict=True))
    keys = list(itertools.product(rows, columns))
    expected = [rows[row] * columns[column] / len(first) for row, column in keys]
    return chi_square_is_usual([cells[key] for key in keys], expected, (len(rows) - 1) * (len(columns) - 1))


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Hashable]]:
    """What is drawn for many examples, by choice; large families in 10 groups."""
    columns: dict[str, list[Hashable]] = {name: [] for name in ("layout", "inverted", "prefix", "bridge", "order", *BANK.families)}
    for number in range(EXAMPLES):
        draws = Draws(BANK, Choices(7, f"example-{number}"))
        columns["layout"].append(draws.layout(2))
        columns["inverted"].append(draws.inverted())
        columns["prefix"].append(draws.has_reading_prefix())
        columns["bridge"].append(draws.has_bridge())
        columns["order"].append(tuple(draws.order(0, 4)))
        for family, styles in BANK.families.items():
            assert draws[family] in styles
            columns[family].append(draws.drawn[family] * min(len(styles), 10) // len(styles))
    return columns


def test_layouts_inversion_prefixes_and_bridges_have_the_banks_probabilities(drawn: dict[str, list[Hashable]]) -> None:
    layouts = Counter(drawn["layout"])
    weights = BANK.probabilities.layouts_of_several
    assert chi_square_is_usual([layouts[name] for name in LAYOUTS_OF_SEVERAL], [weights[name] * EXAMPLES for name in LAYOUTS_OF_SEVERAL], 4)
    for name, probability in (("inverted", 0.05), ("prefix", 0.5), ("bridge", 0.5)):
        count = Counter(drawn[name])[True]
        assert abs(count - probability * EXAMPLES) < 4.5 * math.sqrt(EXAMPLES * probability * (1 - probability)), name


def test_single_pairs_draw_dialogue_one_time_in_twenty() -> None:
    layouts = Counter(Draws(BANK, Choices(7, str(number))).layout(1) for number in range(EXAMPLES))
    assert set(layouts) == {"classic", "dialogue"}
    assert abs(layouts["dialogue"] - 0.05 * EXAMPLES) < 4.5 * math.sqrt(EXAMPLES * 0.05 * 0.95)


@pytest.mark.parametrize("family", BANK.families)
def test_each_style_of_a_family_is_drawn_equally_often(family: str) -> None:
    count = len(BANK.families[family])
    seen = Counter(Choices(3, str(number)).index(family, count) for number in range(EXAMPLES))
    assert set(seen) == set(range(count))
    if count > 1:
        assert chi_square_is_usual([seen[place] for place in range(count)], [EXAMPLES / count] * count, count - 1)


def test_orders_of_options_are_uniform_and_differ_from_pair_to_pair(drawn: dict[str, list[Hashable]]) -> None:
    orders = Counter(drawn["order"])
    assert len(orders) == math.factorial(4)
    assert chi_square_is_usual(list(orders.values()), [EXAMPLES / 24] * 24, 23)
    for one, other, count in ((0, 1, 3), (15, 16, 3), (16, 17, 3)):  # from one output, from two, from one of their own each
        first, second = ([tuple(Choices(7, str(number)).order(pair, count)) for number in range(EXAMPLES)] for pair in (one, other))
        assert independent(first, second)


@pytest.mark.parametrize(("pair", "count"), [(3, 6), (99, 6), (3, 7)])
def test_orders_of_many_options_and_of_late_pairs_are_uniform(pair: int, count: int) -> None:
    orders = [Choices(5, str(number)).order(pair, count) for number in range(EXAMPLES)]
    assert all(sorted(order) == list(range(count)) for order in orders[:100])
    for place in (0, count - 1):
        seen = Counter(order[place] for order in orders)
        assert chi_square_is_usual([seen[option] for option in range(count)], [EXAMPLES / count] * count, count - 1)
    assert independent([order[0] for order in orders], [order[1] > order[2] for order in orders])


def test_all_choices_are_independent_of_each_other(drawn: dict[str, list[Hashable]]) -> None:
    names = [name for name in drawn if len(set(drawn[name])) > 1]
    assert len(names) >= 25
    dependent = [(one, other) for one, other in itertools.combinations(names, 2) if not independent(drawn[one], drawn[other])]
    assert not dependent


def test_inversion_comes_with_every_layout(drawn: dict[str, list[Hashable]]) -> None:
    inverted = Counter(layout for layout, is_inverted in zip(drawn["layout"], drawn["inverted"], strict=True) if is_inverted)
    assert set(inverted) == set(LAYOUTS_OF_SEVERAL)


def test_seed_id_and_name_each_change_the_draw() -> None:
    draws = {
        (seed, example, name): Choices(seed, example).index(name, 10**9)
        for seed in (1, 2, 11, 12)
        for example, name in itertools.product(("1", "2", "12", "21", "\0", "é", "\udc80"), ("bridges", "turns", "options"))
    }
    assert len(set(draws.values())) == len(draws)
    assert Choices(1, "1").index("turns", 10**9) == draws[1, "1", "turns"], "and nothing else does"
    orders = {tuple(Choices(seed, "1").order(pair, 25)) for seed, pair in itertools.product((1, 2, 11, 12), (0, 1, 11, 12))}
    assert len(orders) == 16


def test_a_layout_of_probability_zero_is_never_drawn() -> None:
    weights = {"one": 0.1, "two": 0.2, "three": 0.7 - 1e-12, "never": 0.0}
    assert set(Counter(Choices(1, str(number)).weighted("layout", weights) for number in range(5000))) == {"one", "two", "three"}
