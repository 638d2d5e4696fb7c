"""The log-prob heads of the GPU qualification, against the products that they cannot do without, and float64."""

import torch

from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
from megatron_rl.parallel.fused_linear_token_loss import fused_linear_token_loss
from tools.gpu.measure import DEVICE, Figures, peak_bytes, seconds_of

RATE_AIM, BYTES_AIM = 0.70, 10_000
"""Of the log-prob heads at the shape below: the part of the products' rate, and extra memory per token."""


def log_prob_head(quick: bool, tokens: int = 16_384, hidden: int = 4096, vocab: int = 151_936) -> Figures:
    """Forward and backward of both fused heads against the three products that they cannot do without."""
    tokens = tokens // 4 if quick else tokens
    states = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden, device=DEVICE, dtype=torch.bfloat16) * hidden**-0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    main_grad = torch.zeros(vocab, hidden, device=DEVICE, dtype=torch.float32)
    given = dict(group=None, vocab_size=vocab, main_grad=main_grad)

    def two_pass() -> None:
        states.grad = None
        log_probs, entropy = fused_linear_log_probs(states, weight, labels, **given)
        assert entropy is not None
        (log_probs.sum() + entropy.sum()).backward()

    def single_pass() -> None:
        states.grad = None
        loss, *_ = fused_linear_token_loss(states, weight, labels, lambda lp, entropy, t: lp + entropy, **given)
        loss.backward()

    floor = _three_products(states.detach(), weight.detach())
    found: Figures = {"shape": f"{tokens} tokens x {hidden} x {vocab}", "floor_ms": 1e3 * floor}
    # The states' own gradient, which every method makes, is not extra.
    own = states.numel() * states.element_size()
    for name, head in (("two_pass", two_pass), ("single_pass", single_pass)):
        seconds, extra = seconds_of(head), (peak_bytes(head) - own) / tokens
        found |= {
            f"{name}_ms": 1e3 * seconds,
            f"{name}_part_of_product_rate": floor / seconds,
            f"{name}_extra_bytes_per_token": extra,
            f"{name}_aims": f"rate {_met(floor / seconds >= RATE_AIM)}, memory {_met(extra <= BYTES_AIM)}",
        }
    return found | {"logits_would_be_MiB": tokens * vocab * 2 / 2**20, **_head_error()}


def _met(aim: bool) -> str:
    return "met" if aim else "not met"


def _three_products(states: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of the logits, of the states' gradient and of the weight's, as products of whole matrices."""
    logits = torch.randn(len(states), len(weight), device=DEVICE, dtype=states.dtype)

    def products() -> None:
        torch.mm(states, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), states)

    return seconds_of(products)


def _head_error() -> Figures:
    """Largest error of log-probs and of the hidden states' gradient against float64, on a shape that fits it."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(300, 128, generator=generator), torch.randn(1000, 128, generator=generator) / 8
    labels = torch.randint(1000, (300,), generator=generator)
    found = []
    for dtype, device in ((torch.float64, torch.device("cpu")), (torch.float32, DEVICE)):
        h, w = states.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()
        if dtype is torch.float64:
            log_probs = (h @ w.t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
        else:
            log_probs, _ = fused_linear_log_probs(h, w, labels.to(device), group=None, vocab_size=1000)
        log_probs.sum().backward()
        assert h.grad is not None
        found.append((log_probs.detach().cpu().double(), h.grad.cpu().double()))
    (exact, exact_gradient), (head, gradient) = found
    return {
        "log_probs_error_against_float64": float((head - exact).abs().max()),
        "gradient_error_against_float64": float((gradient - exact_gradient).abs().max()),
    }
