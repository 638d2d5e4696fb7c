"""The order of the training rows, as a pure function of how many have been drawn.

Nothing is kept between draws: a run's place in its data is one integer, the number of rows drawn since its start, and
a resumed run continues with exactly the rows that an uninterrupted one would have drawn, also with another batch size.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .files import DataError


@dataclass(frozen=True)
class DataOrder:
    """Epoch after epoch over `num_rows` rows, each in an order of its own drawn from (seed, epoch).

    Args:
        num_rows: rows of the dataset, at least 1.
        seed: of the run, not negative.
        shuffle: False keeps the file's order in every epoch.
    """

    num_rows: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError(f"a dataset must have at least one row, this one has {self.num_rows}")
        if self.seed < 0:
            raise DataError(f"seed: {self.seed} is given, it must not be negative")

    def rows(self, position: int, count: int) -> list[int]:
        """Row numbers of the `count` draws from the position-th on (both in rows); may straddle epochs."""
        assert min(position, count) >= 0, (position, count)
        drawn: list[int] = []
        while len(drawn) < count:
            epoch, start = divmod(position + len(drawn), self.num_rows)
            stop = min(start + count - len(drawn), self.num_rows)
            drawn.extend(_epoch(self.num_rows, self.seed, epoch)[start:stop] if self.shuffle else range(start, stop))
        return drawn


@lru_cache(maxsize=2)
def _epoch(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch: rows sorted by a 64-bit random key each.

    NumPy keeps the raw streams of SeedSequence and PCG64 the same in all versions, which it does not promise for
    `Generator.permutation` (NEP 19): an order must not change when a run is resumed under a newer NumPy.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    permutation: list[int] = np.argsort(keys, kind="stable").tolist()
    return permutation
