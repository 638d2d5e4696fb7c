"""Metrics that can be added up in any order: each knows how two of it combine.

A micro-batch, a data-parallel rank or a step reports `Metric`s; `parallel.reductions` combines them over ranks. Means
carry (sum, count), so that the reduced mean is the mean over the whole batch and does not depend on how it was split.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True)
class Metric:
    """A number with its rule of combination.

    `value` is the sum for kind 'mean' and 'sum'; `count` is used by 'mean' alone.
    """

    kind: Kind
    value: float
    count: float = 1.0

    def __add__(self, other: "Metric") -> "Metric":
        if self.kind != other.kind:
            raise ValueError(f"cannot combine a {self.kind} with a {other.kind} metric")
        if self.kind in ("mean", "sum"):
            return Metric(self.kind, self.value + other.value, self.count + other.count)
        return Metric(self.kind, (min if self.kind == "min" else max)(self.value, other.value))

    def result(self) -> float:
        """The combined number; a mean over nothing is nan."""
        if self.kind == "mean":
            return self.value / self.count if self.count else float("nan")
        return self.value


def masked_mean(values: Tensor, mask: Tensor) -> Metric:
    """Mean of values [T] where mask [T] is 1; values under mask 0 may be anything, also nan."""
    kept = torch.where(mask > 0, values.detach(), 0.0).double()
    return Metric("mean", float((kept * mask).sum()), float(mask.double().sum()))


def masked_max(values: Tensor, mask: Tensor) -> Metric:
    """Largest of values [T] where mask [T] is 1; -inf over nothing."""
    return Metric(
        "max", float(torch.where(mask > 0, values.detach(), float("-inf")).max()) if len(values) else float("-inf")
    )


def masked_min(values: Tensor, mask: Tensor) -> Metric:
    """Smallest of values [T] where mask [T] is 1; inf over nothing."""
    return Metric(
        "min", float(torch.where(mask > 0, values.detach(), float("inf")).min()) if len(values) else float("inf")
    )


def combine(into: dict[str, Metric], more: dict[str, Metric]) -> dict[str, Metric]:
    """Both dictionaries' metrics, those of equal name combined."""
    merged = dict(into)
    for name, metric in more.items():
        merged[name] = merged[name] + metric if name in merged else metric
    return merged
