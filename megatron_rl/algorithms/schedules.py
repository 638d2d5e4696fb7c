"""Coefficients over the steps of a run: learning rate, weight decay, and whatever else is to change with time.

Two formulas are often printed loosely. The cosine schedule is half a wave, (1 + cos(pi t / T)) / 2 (SGDR,
arXiv:1608.03983), not the quarter cos(pi t / 2T), which is steepest at its end. And lambda |theta|^2 added to the loss
is not weight decay under Adam, which rescales it with the gradient; decay is decoupled, theta <- theta - lr lambda
theta (arXiv:1711.05101), as Megatron's optimizer does it.
"""

import math
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "exponential"]


def warmup_decay(
    step: float, *, peak: float, end: float, warmup_steps: int, decay_steps: int, style: DecayStyle, start: float = 0.0
) -> float:
    """Value after `step` steps: from start to peak in a line, then from peak to end in a style, then end.

    With p = (step - warmup_steps) / (decay_steps - warmup_steps), bounded by 1:

        constant     peak, to the end of the run
        linear       end + (peak - end) (1 - p)
        cosine       end + (peak - end) (1 + cos(pi p)) / 2
        exponential  peak (end / peak)^p

    Args:
        step: steps done, >= 0.
        peak: value after warm-up.
        end: value after decay_steps; > 0 for 'exponential'.
        warmup_steps: length of the line.
        decay_steps: steps until end, warm-up included; > warmup_steps.
        style: of the decay.
        start: value at step 0, if there is a warm-up.

    Returns:
        The value, in the unit of peak.

    Raises:
        ValueError: unknown style, or numbers outside their range.
    """
    if decay_steps <= warmup_steps:
        raise ValueError(f"decay_steps is {decay_steps}; must be more than warmup_steps = {warmup_steps}")
    if style == "exponential" and not (peak > 0 and end > 0):
        raise ValueError(f"an exponential decay needs peak and end > 0, got {peak} and {end}")
    if warmup_steps > 0 and step <= warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (decay_steps - warmup_steps))
    if style == "constant":
        return peak
    if style == "linear":
        return end + (peak - end) * (1 - progress)
    if style == "cosine":
        return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
    if style == "exponential":
        return float(peak * (end / peak) ** progress)
    raise ValueError(f"unknown style {style!r}; one of 'constant', 'linear', 'cosine', 'exponential'")


def ramp(step: float, *, start: float, end: float, num_steps: int, style: DecayStyle) -> float:
    """Value of a coefficient that goes from start to end in num_steps, up or down: weight decay, entropy, KL.

        constant     start (end must be equal)           cosine       start + (end - start) (1 - cos(pi p)) / 2
        linear       start + (end - start) p             exponential  start (end / start)^p

    Arguments and errors as `warmup_decay`, without a warm-up; p = step / num_steps, bounded by 1.
    """
    if style == "constant" and start != end:
        raise ValueError(f"a constant cannot go from {start} to {end}")
    return warmup_decay(step, peak=start, end=end, warmup_steps=0, decay_steps=num_steps, style=style)
