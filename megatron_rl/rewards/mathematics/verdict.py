"""The three answers of a comparison."""

from enum import Enum


class Verdict(Enum):
    """same and different are proven under the conventions; unknown is what neither proof reached."""

    same = "same"
    different = "different"
    unknown = "unknown"

    @staticmethod
    def of(is_same: bool) -> "Verdict":
        """Same or different."""
        return Verdict.same if is_same else Verdict.different

    def and_(self, other: "Verdict") -> "Verdict":
        """Of two parts that must both be the same."""
        if Verdict.different in (self, other):
            return Verdict.different
        return Verdict.unknown if Verdict.unknown in (self, other) else Verdict.same


def all_of(verdicts: "list[Verdict]") -> Verdict:
    """Of parts that must all be the same; of none: same."""
    result = Verdict.same
    for verdict in verdicts:
        result = result.and_(verdict)
    return result
