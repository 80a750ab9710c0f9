"""Random choices that depend on nothing but the seed, the example's id and the choice's name (arXiv:2406.14491, appendix on templates).

Every choice has bits of its own. Those that nearly every document needs are the words of one SHAKE-128 output over seed and id, 32 bits
each, always at the same place: one for each choice by name, and one for the order of the options of each of the first pairs. Any other
order has an output of its own, over seed, id and the pair's number. No choice knows another, so none is correlated with it, and the
result depends neither on the order of the examples nor on who renders them. Among n possibilities, none is likelier than another by
more than n parts in 2^32.
"""

import hashlib
import itertools
import sys
from array import array
from collections.abc import Mapping

from megatron_instruct.templates.bank import FAMILIES

SAMPLING_VERSION = 3
"""Part of the settings of whatever is rendered: raised when the same seed and bank give other documents than before."""
_RANGE = 1 << 32
_PLACES = {name: place for place, name in enumerate(("layout", "inversion", "has_reading_prefix", "has_bridge", *FAMILIES))}
_WORDS = 42  # as many as one round of SHAKE-128 gives
_FIRST_ORDER = len(_PLACES)
_FEW_OPTIONS = 6
_ORDERS = [tuple(itertools.permutations(range(count))) for count in range(_FEW_OPTIONS + 1)]
"""All orders of few options."""


class Choices:
    """The choices for one example."""

    __slots__ = ("_key", "_words")

    def __init__(self, seed: int, example_id: str) -> None:
        self._key = f"{seed}\0{example_id}\0".encode("utf-8", "surrogatepass")
        self._words = array("I", hashlib.shake_128(self._key).digest(4 * _WORDS))
        if sys.byteorder == "little":
            self._words.byteswap()

    def index(self, name: str, count: int) -> int:
        """Return one of 0 … count - 1, each with the same probability."""
        return self._words[_PLACES[name]] * count >> 32

    def chance(self, name: str, probability: float) -> bool:
        return self._words[_PLACES[name]] < probability * _RANGE

    def weighted(self, name: str, weights: Mapping[str, float]) -> str:
        """Return one of the keys, with the probability that is its value; the values add up to 1."""
        left = self._words[_PLACES[name]] / _RANGE
        for key, weight in weights.items():
            if left < weight:
                return key
            left -= weight
        return [key for key, weight in weights.items() if weight > 0][-1]

    def order(self, pair: int, count: int) -> tuple[int, ...]:
        """Return 0 … count - 1 in an order drawn uniformly. pair: number of the pair in its example, from 0."""
        place = _FIRST_ORDER + pair
        if count <= _FEW_OPTIONS and place < _WORDS:
            orders = _ORDERS[count]
            return orders[self._words[place] * len(orders) >> 32]
        return self._shuffled(pair, count)

    def _shuffled(self, pair: int, count: int) -> tuple[int, ...]:
        """Return an order by Fisher and Yates."""
        size = 8 + 2 * count  # 64 bits more than count! has, so that no order is likelier than another
        bits = int.from_bytes(hashlib.shake_128(self._key + b"%d" % pair).digest(size), "big")
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            bits, other = divmod(bits, last + 1)
            order[last], order[other] = order[other], order[last]
        return tuple(order)
