"""Metrics that can be added up in any order: each knows how two of it combine.

A micro-batch, a data-parallel rank or a step reports `Metric`s; `parallel.reductions` combines them over ranks. Means
carry (sum, count), so that the reduced mean is the mean over the whole batch and does not depend on how it was split.
What is no mean carries the sums that it is a function of: a variance is not the mean of variances (`Moments`), and an
effective sample size not the sum of sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["mean", "sum", "min", "max", "explained_variance", "effective_sample_size"]


@dataclass(frozen=True)
class Metric:
    """A number with its rule of combination.

    `value` is the sum for kind 'mean' and 'sum'; `count` is used by 'mean' alone. Of a row both may be scalars on its
    device, which `on_host` reads: a GPU would be waited for at every number.
    """

    kind: Kind
    value: float | Tensor
    count: float | Tensor = 1.0

    def __add__(self, other: "Metric") -> "Metric":
        if self.kind != other.kind:
            raise ValueError(f"cannot combine a {self.kind} with a {other.kind} metric")
        if self.kind in ("mean", "sum"):
            return Metric(self.kind, self.value + other.value, self.count + other.count)
        return Metric(self.kind, (min if self.kind == "min" else max)(self.value, other.value))

    def result(self) -> float:
        """The combined number; a mean over nothing is nan."""
        if self.kind == "mean":
            return float(self.value / self.count) if self.count else float("nan")
        return float(self.value)


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of a set of numbers; those of two sets add up to those of their union.

        n = n_a + n_b     delta = mean_b - mean_a
        mean = mean_a + delta n_b / n     m2 = m2_a + m2_b + delta^2 n_a n_b / n

    Not sums of squares: they lose all digits of a variance that is small beside the mean, while here equal numbers have
    m2 exactly 0. Source: Chan, Golub, LeVeque 1979, Stanford CS-79-773, eq. 2.1.
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of the squared deviations from the mean."""

    @staticmethod
    def of(values: Tensor, mask: Tensor) -> "Moments":
        """Of values [T] where mask [T] is not 0, each counted mask times; float64. Masked values may be anything."""
        weights = mask.double()
        kept = torch.where(mask != 0, values.detach(), 0.0).double()
        count = float(weights.sum())
        if count == 0:
            return Moments()
        mean = float((kept * weights).sum()) / count
        return Moments(count, mean, float(((kept - mean).square() * weights).sum()))

    def __add__(self, other: "Moments") -> "Moments":
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count, delta = self.count + other.count, other.mean - self.mean
        mean = self.mean + delta * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * self.count * other.count / count)

    @property
    def variance(self) -> float:
        """The population's: m2 / count; 0 of nothing."""
        return self.m2 / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Square root of the variance."""
        return float(self.variance**0.5)


@dataclass(frozen=True)
class ExplainedVariance(Metric):
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant, negative for worse than that.

    nan where the returns do not vary.
    """

    kind: Kind = "explained_variance"
    value: float = 0.0
    returns: Moments = Moments()
    residuals: Moments = Moments()

    def __add__(self, other: Metric) -> "ExplainedVariance":
        if not isinstance(other, ExplainedVariance):
            raise ValueError(f"cannot combine a {self.kind} with a {other.kind} metric")
        return ExplainedVariance(returns=self.returns + other.returns, residuals=self.residuals + other.residuals)

    def result(self) -> float:
        """The explained part of the returns' variance."""
        return 1 - self.residuals.variance / self.returns.variance if self.returns.m2 > 0 else float("nan")


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """(sum w)^2 / (n sum w^2) of importance weights, in [1/n, 1]: which part of the samples carries the estimate.

    Source: Kish 1965, Survey Sampling, section 8.2. nan over nothing; 0 where all weights are 0.
    """

    kind: Kind = "effective_sample_size"
    value: float | Tensor = 0.0
    """sum w."""
    count: float | Tensor = 0.0
    """n."""
    sum_of_squares: float | Tensor = 0.0
    """sum w^2."""

    def __add__(self, other: Metric) -> "EffectiveSampleSize":
        if not isinstance(other, EffectiveSampleSize):
            raise ValueError(f"cannot combine a {self.kind} with a {other.kind} metric")
        return EffectiveSampleSize(
            value=self.value + other.value,
            count=self.count + other.count,
            sum_of_squares=self.sum_of_squares + other.sum_of_squares,
        )

    def result(self) -> float:
        """The effective part of the samples."""
        if self.count == 0:
            return float("nan")
        return float(self.value**2 / (self.count * self.sum_of_squares)) if self.sum_of_squares > 0 else 0.0


def masked_mean(values: Tensor, mask: Tensor) -> Metric:
    """Mean of values [T] where mask [T] is 1; values under mask 0 may be anything, also nan."""
    kept = torch.where(mask > 0, values.detach(), 0.0).double()
    return Metric("mean", (kept * mask).sum(), mask.double().sum())


def masked_max(values: Tensor, mask: Tensor) -> Metric:
    """Largest of values [T] where mask [T] is 1; -inf over nothing."""
    return Metric("max", torch.where(mask > 0, values.detach(), float("-inf")).max() if len(values) else float("-inf"))


def masked_min(values: Tensor, mask: Tensor) -> Metric:
    """Smallest of values [T] where mask [T] is 1; inf over nothing."""
    return Metric("min", torch.where(mask > 0, values.detach(), float("inf")).min() if len(values) else float("inf"))


def on_host(of_rows: Sequence[dict[str, Metric]]) -> list[dict[str, Metric]]:
    """The same metrics as Python's numbers, all read from the device at once."""

    def scalars(metric: Metric) -> dict[str, Tensor]:
        return {name: number for name, number in vars(metric).items() if isinstance(number, Tensor)}

    found = [number.double() for row in of_rows for metric in row.values() for number in scalars(metric).values()]
    read = iter(torch.stack(found).tolist() if found else [])

    def of(metric: Metric) -> Metric:
        return replace(metric, **{name: next(read) for name in scalars(metric)})

    return [{name: of(metric) for name, metric in of_row.items()} for of_row in of_rows]


def combine(into: dict[str, Metric], more: dict[str, Metric]) -> dict[str, Metric]:
    """Both dictionaries' metrics, those of equal name combined."""
    merged = dict(into)
    for name, metric in more.items():
        merged[name] = merged[name] + metric if name in merged else metric
    return merged
