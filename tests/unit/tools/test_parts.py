"""Parts of the tests are disjoint, complete and of about equal length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parts import in_part, parse_part, split


@given(costs=st.dictionaries(st.text(min_size=1), st.floats(0.01, 100.0)), num_parts=st.integers(1, 7))
def test_split(costs: dict[str, float], num_parts: int) -> None:
    """Nothing twice, nothing lost, the same at every order; no part is longer than the mean and one more unit."""
    parts = split(costs, num_parts)
    assert sorted(name for part in parts for name in part) == sorted(costs)
    assert split(dict(reversed(costs.items())), num_parts) == parts
    longest = max(sum(costs[name] for name in part) for part in parts)
    assert longest <= 1.001 * (sum(costs.values()) / num_parts + max(costs.values(), default=0.0))


def test_all_tests_of_this_session(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    parts = [in_part(items, part, 3) for part in (1, 2, 3)]
    assert sum(map(len, parts)) == len({item.nodeid for item in items})
    assert set.union(*parts) == {item.nodeid for item in items}


def test_part_as_text() -> None:
    assert parse_part("2/6") == (2, 6)
    for text in ("", "0/6", "7/6", "2", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError):
            parse_part(text)
