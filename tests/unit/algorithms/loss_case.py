"""What every loss is tested with: literal numbers, planted bugs, and random batches in every packing.

A `Case` names a loss, its inputs, a few literal rows, and mutated copies of it that those rows must tell from it. The
properties that hold for all losses are tested over all cases in test_every_loss.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
Columns = dict[str, list[float]]

LENGTHS = [4, 3, 2, 2]
"""Of the sequences of a random batch."""
MASKS = [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
"""Their loss masks: a gap, a prompt, a sequence that is not trained on, one that is whole."""


@dataclass(frozen=True)
class Case:
    """A loss, and how to call it."""

    name: str
    loss: Loss
    """Takes the inputs by name, and the options; by_sequence: loss_mask and cu_seqlens, too."""
    inputs: dict[str, str]
    """Name of each per-token input, and what it is: 'log_prob', 'real', 'unit' (in [0, 1]) or 'bool'."""
    trained: tuple[str, ...]
    """Inputs that carry the gradient; no other may."""
    literal: Columns
    """The inputs by name, then 'loss', and 'd_<input>': the gradient of sum_t mask_t loss_t by each trained input."""
    mutants: dict[str, Loss]
    """Wrong copies, by what is wrong about them."""
    options: dict[str, Any] = field(default_factory=dict)
    by_sequence: bool = False
    """Its per-token value depends on the other tokens of the sequence; the literal has loss_mask and lengths."""
    stops_gradient: bool = False
    """It is no antiderivative of its gradient: finite differences do not apply, the literal gradients do."""

    def __str__(self) -> str:
        return self.name

    def call(self, batch: dict[str, Tensor], loss: Loss | None = None) -> Tensor:
        """[T] per-token losses of a packed batch, by this loss or another one in its place."""
        names = [*self.inputs, *(["loss_mask", "cu_seqlens"] if self.by_sequence else [])]
        return (loss or self.loss)(**{name: batch[name] for name in names}, **self.options)


def check_literal(case: Case, loss: Loss | None = None) -> None:
    """AssertionError where the loss (of the case, or another) has not the literal values and gradients."""
    rows = {name: torch.tensor(column, dtype=torch.float64) for name, column in case.literal.items()}
    batch = {name: rows[name].clone() for name in case.inputs}
    for name, kind in case.inputs.items():
        if kind == "bool":
            batch[name] = batch[name].bool()
    mask = rows.get("loss_mask", torch.ones(len(rows["loss"])))
    batch["loss_mask"] = mask
    if "lengths" in rows:
        batch["cu_seqlens"] = torch.cat([torch.zeros(1), rows["lengths"]]).cumsum(0).to(torch.int32)
    for name in case.trained:
        batch[name].requires_grad_()
    losses = case.call(batch, loss)
    # float64 through a few exponentials; the literals have ten digits or more.
    exact: Any = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(losses[mask > 0], rows["loss"][mask > 0], **exact)
    torch.where(mask > 0, losses, 0.0).sum().backward()
    for name in case.trained:
        gradient = batch[name].grad
        assert gradient is not None, name
        torch.testing.assert_close(gradient, rows[f"d_{name}"], **exact)


def draw(case: Case, seed: int = 0) -> list[dict[str, Tensor]]:
    """The sequences of a random batch, float64; by_sequence cases' advantages are one number per sequence."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length, mask in zip(LENGTHS, MASKS, strict=True):
        sequence = {"loss_mask": torch.tensor(mask, dtype=torch.float64)}
        for name, kind in case.inputs.items():
            value = torch.randn(length, generator=generator, dtype=torch.float64)
            if name == "advantages" and case.by_sequence:
                value = value[:1].expand(length).clone()
            if kind == "log_prob":
                value = -1.0 - value.abs()
            elif kind == "unit":
                value = value.sigmoid()
            elif kind == "bool":
                value = value > 0
            sequence[name] = value
        sequences.append(sequence)
    return sequences


def pack(sequences: Sequence[dict[str, Tensor]], padding: int = 0, garbage: float = 0.0) -> dict[str, Tensor]:
    """One micro-batch; padding tokens, which belong to no sequence, hold garbage and have mask 0."""
    micro_batch = {}
    for name in sequences[0]:
        filler = torch.full((padding,), 0.0 if name == "loss_mask" else garbage, dtype=torch.float64)
        micro_batch[name] = torch.cat(
            [sequence[name] for sequence in sequences] + [filler.to(sequences[0][name].dtype)]
        )
    lengths = torch.tensor([0] + [len(sequence["loss_mask"]) for sequence in sequences])
    micro_batch["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    return micro_batch
