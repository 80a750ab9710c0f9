"""Random choices that depend on nothing but the seed, the example's id and the choice's name (arXiv:2406.14491, appendix on templates).

Every choice has bits of its own. Those of which each document needs at most one are the words of one SHAKE-256 output over seed and id,
64 bits each, always at the same place; any other choice has an output of its own, over seed, id and name. No choice knows another, so
none is correlated with it, and the result depends neither on the order of the examples nor on who renders them.
"""

import hashlib
import struct
from collections.abc import Mapping

from megatron_instruct.templates.bank import FAMILIES

_RANGE = 1 << 64
_PLACES = {name: place for place, name in enumerate(("layout", "inversion", "has_reading_prefix", "has_bridge", *FAMILIES))}
_WORDS = struct.Struct(f">{len(_PLACES)}Q")


class Choices:
    """The choices for one example."""

    __slots__ = ("_key", "_words")

    def __init__(self, seed: int, example_id: str) -> None:
        self._key = f"{seed}\0{example_id}\0".encode("utf-8", "surrogatepass")
        self._words = _WORDS.unpack(hashlib.shake_256(self._key).digest(_WORDS.size))

    def _draw(self, name: str) -> int:
        """Return an integer that is uniform on [0, 2^64)."""
        place = _PLACES.get(name)
        return self._own_bits(name, 8) if place is None else self._words[place]

    def _own_bits(self, name: str, size: int) -> int:
        assert name, "the empty name is that of the common words"
        return int.from_bytes(hashlib.shake_256(self._key + name.encode()).digest(size), "big")

    def index(self, name: str, count: int) -> int:
        """Return one of 0 … count - 1, each with the same probability."""
        return self._draw(name) * count >> 64

    def chance(self, name: str, probability: float) -> bool:
        return self._draw(name) < probability * _RANGE

    def weighted(self, name: str, weights: Mapping[str, float]) -> str:
        """Return one of the keys, with the probability that is its value; the values add up to 1."""
        left = self._draw(name) / _RANGE
        for key, weight in weights.items():
            if left < weight:
                return key
            left -= weight
        return [key for key, weight in weights.items() if weight > 0][-1]

    def order(self, name: str, count: int) -> list[int]:
        """Return 0 … count - 1 in an order drawn uniformly (Fisher and Yates)."""
        order = list(range(count))
        bits = self._own_bits(name, 8 + 2 * count)  # 64 bits more than count! has, so that no order is likelier than another
        for last in range(count - 1, 0, -1):
            bits, other = divmod(bits, last + 1)
            order[last], order[other] = order[other], order[last]
        return order
