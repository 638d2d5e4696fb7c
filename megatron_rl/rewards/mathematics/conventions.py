"""What mathematics leaves open and data sets settle: options of a comparison, with their defaults."""

from dataclasses import dataclass

DECIMALS = ("exact", "rounded")
UNITS = ("optional", "required")
LOG_BASES = (None, "e", "10")


@dataclass(frozen=True)
class Conventions:
    """Options of `same`, all symmetric in the two answers."""

    decimals: str = "exact"
    """exact: 0.333 is 333/1000. rounded: a decimal of at least `rounded_digits` significant digits also stands for
    what rounds to it, so that 0.333 = 1/3 and 3.14 = pi."""
    rounded_digits: int = 3
    """With decimals rounded."""
    relative_tolerance: float = 0.0
    """Numbers a and b are the same if |a - b| <= this * max(|a|, |b|); 0: exactly equal."""
    percent_sign_optional: bool = False
    """10 % is 0.1; with True also 10."""
    units: str = "optional"
    """optional: 5 cm and $5 are also 5, as where the question names the unit. Two units must agree: 5 cm = 0.05 m."""
    log_base: str | None = None
    r"""Of \log without a base: 'e', '10', or None, where \log 2 equals itself alone."""

    def __post_init__(self) -> None:
        for key, allowed in (("decimals", DECIMALS), ("units", UNITS), ("log_base", LOG_BASES)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: given {getattr(self, key)!r}, allowed: {', '.join(map(repr, allowed))}")
        if self.rounded_digits < 1 or self.relative_tolerance < 0:
            raise ValueError("rounded_digits: at least 1; relative_tolerance: at least 0")
