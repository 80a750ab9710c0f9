"""Random choices that depend on nothing but the seed, the example's id and the choice's name (arXiv:2406.14491, appendix on templates).

Every choice has a stream of its own: a hash of the three. No choice knows another, so none is correlated with it, and the result
depends neither on the order of the examples nor on who renders them.
"""

import hashlib
from collections.abc import Mapping

_RANGE = 1 << 64


class Choices:
    """The choices for one example."""

    def __init__(self, seed: int, example_id: str) -> None:
        self._state = hashlib.sha256(f"{seed}\0{example_id}\0".encode("utf-8", "surrogatepass"))

    def _draw(self, name: str) -> int:
        """Return an integer that is uniform on [0, 2^64)."""
        state = self._state.copy()
        state.update(name.encode())
        return int.from_bytes(state.digest()[:8], "big")

    def index(self, name: str, count: int) -> int:
        """Return one of 0 … count - 1, each with the same probability."""
        return self._draw(name) * count // _RANGE

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
        for last in range(count - 1, 0, -1):
            other = self.index(f"{name}/{last}", last + 1)
            order[last], order[other] = order[other], order[last]
        return order
