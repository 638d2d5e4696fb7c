"""The KL estimators on samples, against the exact KL, with a stated confidence."""

import math

import pytest
import torch

from megatron_rl.algorithms.kl import exact_kl, kl_estimate

SAMPLES = 200_000
CONFIDENCE = 5.0  # standard errors: by chance one check in 1.7e6 fails
GENERATOR_SEED = 0


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(1)
    return policy, reference


def estimates(name: str) -> torch.Tensor:
    policy, reference = policies()
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    drawn = torch.multinomial(policy.exp(), SAMPLES, replacement=True, generator=generator)
    if name == "inverse":  # (r - 1) - log r with r = policy / reference
        difference = policy[drawn] - reference[drawn]
        return difference.exp() - 1 - difference
    return kl_estimate(policy[drawn], reference[drawn], name)  # type: ignore[arg-type]


def z_score(name: str) -> float:
    values = estimates(name)
    return float((values.mean() - exact_kl(*policies())) / (values.std() / math.sqrt(SAMPLES)))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name: str) -> None:
    assert abs(z_score(name)) < CONFIDENCE


@pytest.mark.parametrize("name", ["k2", "inverse"])
def test_k2_and_k3_of_the_inverse_ratio_are_not(name: str) -> None:
    assert abs(z_score(name)) > CONFIDENCE


def test_k3_has_less_variance_than_k1_and_is_never_negative() -> None:
    assert estimates("k3").std() < 0.85 * estimates("k1").std()  # more so the closer the policies are
    assert (estimates("k3") >= 0).all()
    assert (estimates("k1") < 0).any()


def test_samples_of_the_old_policy_estimate_the_kl_of_the_old_from_the_new() -> None:
    # E_old[log old / new] is KL(old || new), whatever it is called; so is E_old[r - 1 - log r] with r = new / old.
    old, new = policies()
    values = kl_estimate(old, new, "k3")
    ratio = (new - old).exp()
    torch.testing.assert_close(values, ratio - 1 - ratio.log(), atol=1e-14, rtol=0.0)
    forward, backward = exact_kl(old, new), exact_kl(new, old)
    torch.testing.assert_close((old.exp() * values).sum(), forward, atol=1e-14, rtol=0.0)
    assert (forward - backward).abs() > 0.01
