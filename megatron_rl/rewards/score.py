"""What a reward function returns that has more to say than a number."""

from collections.abc import Mapping


class Score(float):
    """A reward with notes that are logged with the sample, and counted where they are verdicts.

    The note 'verdict' is a word of a small set, such as same, different, unknown; the share of each is a metric.
    """

    notes: dict[str, str]

    def __new__(cls, value: float, notes: Mapping[str, str] | None = None) -> "Score":
        """A float with notes."""
        score = super().__new__(cls, value)
        score.notes = dict(notes or {})
        return score
