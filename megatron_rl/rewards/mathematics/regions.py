"""Unions of intervals on the real line."""

from dataclasses import replace
from functools import cmp_to_key

from megatron_rl.rewards.mathematics.expression import Answer, Collection, Interval, Region, Unreadable, Value
from megatron_rl.rewards.mathematics.numbers import Numbers
from megatron_rl.rewards.mathematics.verdict import Verdict, all_of


def as_region(answer: Answer) -> Region | None:
    """(1, 2) and [1, 2] as intervals, sets of numbers as points; None: it is no set of numbers."""
    if isinstance(answer, Region):
        return answer
    if not isinstance(answer, Collection) or not all(
        isinstance(item, Value) and item.unit is None for item in answer.items
    ):
        return None
    expressions = [item.expression for item in answer.items if isinstance(item, Value)]
    if answer.kind in ("tuple", "list") and len(expressions) == 2:
        is_closed = answer.kind == "list"
        return Region((Interval(expressions[0], expressions[1], is_closed, is_closed),), answer.name)
    if answer.kind == "set":
        return Region(tuple(Interval(point, point, True, True) for point in expressions), answer.name)
    return None


def same_region(left: Region, right: Region, numbers: Numbers) -> Verdict:
    """Whether two unions hold the same numbers; unknown where the order of two ends is not decided."""
    try:
        parts = [_merged(region.parts, numbers) for region in (left, right)]
    except _Undecided:
        return Verdict.unknown
    if len(parts[0]) != len(parts[1]):
        return Verdict.different
    verdicts = []
    for one, other in zip(*parts, strict=True):
        if (one.low_closed, one.high_closed) != (other.low_closed, other.high_closed):
            return Verdict.different
        verdicts += [numbers.same(one.low, other.low), numbers.same(one.high, other.high)]
    return all_of(verdicts)


class _Undecided(Exception):
    """The order of two ends is not known."""


def _merged(parts: tuple[Interval, ...], numbers: Numbers) -> list[Interval]:
    """Disjoint intervals in order, none empty, none touching the next."""

    def order(one: Interval, other: Interval) -> int:
        lows = numbers.order(one.low, other.low)
        if lows is None:
            raise _Undecided
        return lows or (other.low_closed - one.low_closed)

    kept = []
    for part in parts:
        ends = numbers.order(part.low, part.high) if len(parts) > 1 or part.low == part.high else -1
        if ends is None:
            raise _Undecided
        if ends > 0:
            raise Unreadable("an interval whose ends are in the wrong order")
        if ends < 0 or (part.low_closed and part.high_closed):
            kept.append(part)
    merged: list[Interval] = []
    for part in sorted(kept, key=cmp_to_key(order)):
        if merged and _touch(merged[-1], part, numbers):
            merged[-1] = _joined(merged[-1], part, numbers)
        else:
            merged.append(part)
    return merged


def _touch(one: Interval, other: Interval, numbers: Numbers) -> bool:
    gap = numbers.order(one.high, other.low)
    if gap is None:
        raise _Undecided
    return gap > 0 or (gap == 0 and (one.high_closed or other.low_closed))


def _joined(one: Interval, other: Interval, numbers: Numbers) -> Interval:
    highs = numbers.order(one.high, other.high)
    if highs is None:
        raise _Undecided
    last = one if highs > 0 or (highs == 0 and one.high_closed) else other
    return replace(one, high=last.high, high_closed=last.high_closed)
