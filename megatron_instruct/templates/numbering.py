"""Numbers of questions and labels of options, without an upper end: 1 2 3, A B C … Z AA AB, i ii iii, 一 二 三."""

from collections.abc import Callable
from functools import lru_cache

_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"), (9, "ix"), (5, "v"))
_ROMAN_ONES = ((4, "iv"), (1, "i"))
_CHINESE_DIGITS = "零一二三四五六七八九"
_CHINESE_UNITS = ((1000, "千"), (100, "百"), (10, "十"))


def letters(number: int, symbols: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    """Return a … z, aa, ab, … (columns of a spreadsheet) for 1, 2, …; with other `symbols`, those in the same way."""
    name = ""
    while number:
        number, place = divmod(number - 1, len(symbols))
        name = symbols[place] + name
    return name


def roman(number: int) -> str:
    """Return the Roman numeral in lower case; thousands are repeated."""
    numeral = ""
    for value, symbol in (*_ROMAN, *_ROMAN_ONES):
        count, number = divmod(number, value)
        numeral += symbol * count
    return numeral


def chinese(number: int) -> str:
    """Return the Chinese numeral (十二, 一百零五); from 10,000 on, the digits one by one."""
    if number >= 10_000:
        return "".join(_CHINESE_DIGITS[int(digit)] for digit in str(number))
    numeral, skipped = "", False
    for value, unit in _CHINESE_UNITS:
        digit, number = divmod(number, value)
        if digit:
            numeral += ("零" if skipped else "") + _CHINESE_DIGITS[digit] + unit
        skipped = bool(numeral) and not digit
    if number:
        numeral += ("零" if skipped else "") + _CHINESE_DIGITS[number]
    return numeral.removeprefix("一") if numeral.startswith("一十") else numeral


def _unnumbered(number: int) -> str:
    return ""


NUMBERINGS: dict[str, Callable[[int], str]] = {
    "digits": str,
    "upper_letters": lambda number: letters(number).upper(),
    "lower_letters": letters,
    "upper_roman": lambda number: roman(number).upper(),
    "lower_roman": roman,
    "greek": lambda number: letters(number, "αβγδεζηθικλμνξοπρστυφχψω"),
    "chinese": chinese,
    "heavenly_stems": lambda number: letters(number, "甲乙丙丁戊己庚辛壬癸"),
    "none": _unnumbered,
}
"""By name: the numeral of 1, 2, 3, …"""


@lru_cache(maxsize=4096)
def numerals(name: str, count: int) -> tuple[str, ...]:
    """Return the numerals of 1 … count; few names and counts come up, so they are kept."""
    return tuple(map(NUMBERINGS[name], range(1, count + 1)))
