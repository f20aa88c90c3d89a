"""The losses of train_grpo.py, KL and the aggregator against formulas in float64, and known identities."""
import math
from types import SimpleNamespace

import pytest
import torch

from train_grpo import LOSSES, aggregate, cispo_loss, grpo_loss, gspo_loss, kl_estimate, sequence_mean

SEQ = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])  # four responses of 3, 1, 4 and 2 tokens
AT = [SEQ == s for s in range(4)]


def config(**changed):
    t = dict(clip_low=0.2, clip_high=0.25, dual_clip=None, is_floor=0.0, is_cap=1.28, cispo_drop=False)
    return SimpleNamespace(**t | changed)


def case(seed, spread=0.6):
    """logp and old [M] with ratios on both sides of every clip, and advantages of both signs and zero."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(len(SEQ), generator=g, dtype=torch.float64) - 1
    logp = old + spread * torch.randn(len(SEQ), generator=g, dtype=torch.float64)
    adv = torch.tensor([0.8, -0.7, 0.0, -2.0], dtype=torch.float64)[torch.randperm(4, generator=g)][SEQ]
    return logp.requires_grad_(), old, adv


def clip(x, low, high):
    return min(max(x, low), high)


# Each formula for one token (or response): ratio r, advantage a, log-prob l, config t.

def plain_grpo(r, a, l, t):  # noqa: E741
    surrogate = min(r * a, clip(r, 1 - t.clip_low, 1 + t.clip_high) * a)
    return -max(surrogate, t.dual_clip * a) if t.dual_clip and a < 0 else -surrogate


def plain_cispo(r, a, l, t):  # noqa: E741
    dropped = t.cispo_drop and a > 0 and r > t.is_cap
    return 0.0 if dropped else -clip(r, t.is_floor, t.is_cap) * a * l


def per_token(formula, ratios, adv, logp, t):
    return torch.tensor([formula(*x, t) for x in zip(ratios.tolist(), adv.tolist(), logp.tolist())],
                        dtype=torch.float64)


def check_gradient(loss, logp, old, adv, t):
    """The loss's gradient is that of finite differences. -> gradient of the sum."""
    assert torch.autograd.gradcheck(lambda x: loss(x, old, adv, SEQ, t)[0], (logp,), eps=1e-7, atol=1e-6)
    return torch.autograd.grad(loss(logp, old, adv, SEQ, t)[0].sum(), logp)[0]


GSPO = config(clip_low=0.1, clip_high=0.12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [config(), config(dual_clip=1.5)], ids=["plain", "dual"])
def test_grpo_formula_and_gradient(t, seed):
    logp, old, adv = case(seed)
    loss, figures = grpo_loss(logp, old, adv, SEQ, t)
    r = (logp - old).exp()
    torch.testing.assert_close(loss, per_token(plain_grpo, r, adv, logp, t))
    torch.testing.assert_close(figures["ratio"], r)
    # Zero exactly on the clipped side, -r A elsewhere; clip_share counts exactly those tokens.
    zero = ((adv > 0) & (r > 1 + t.clip_high)) | ((adv < 0) & (r < 1 - t.clip_low))
    if t.dual_clip:
        zero |= (adv < 0) & (r > t.dual_clip)
    assert zero.any() and (~zero & (adv != 0)).any() and torch.equal(figures["clip_share"], zero)
    g = check_gradient(grpo_loss, logp, old, adv, t)
    torch.testing.assert_close(g, torch.where(zero, 0.0, -r * adv), rtol=1e-12, atol=0)
    assert (g[zero] == 0).all() and (g[~zero & (adv != 0)] != 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [config(), config(is_floor=0.9), config(cispo_drop=True)])
def test_cispo_formula_and_gradient(t, seed):
    logp, old, adv = case(seed)
    loss, figures = cispo_loss(logp, old, adv, SEQ, t)
    r = (logp - old).exp().detach()
    torch.testing.assert_close(loss, per_token(plain_cispo, r, adv, logp, t))
    weight = r.clamp(t.is_floor, t.is_cap)
    if t.cispo_drop:
        weight = torch.where((adv > 0) & (r > t.is_cap), 0.0, weight)
    g, = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(g, -weight * adv, rtol=1e-12, atol=0)  # the weight has none
    torch.testing.assert_close(figures["ratio"], r)
    clipped = (adv != 0) & ((r > t.is_cap) | (r < t.is_floor))
    assert torch.equal(figures["clip_share"], clipped) and clipped.any()


@pytest.mark.parametrize("seed", range(4))
def test_gspo_formula_and_gradient(seed):
    logp, old, adv = case(seed, spread=0.25)
    loss, figures = gspo_loss(logp, old, adv, SEQ, GSPO)
    s = torch.stack([(logp - old).detach()[at].mean().exp() for at in AT])[SEQ]  # one ratio per response
    torch.testing.assert_close(loss, per_token(plain_grpo, s, adv, logp, GSPO))
    torch.testing.assert_close(figures["ratio"], s)
    check_gradient(gspo_loss, logp, old, adv, GSPO)
    clipped = ((adv > 0) & (s > 1 + GSPO.clip_high)) | ((adv < 0) & (s < 1 - GSPO.clip_low))
    assert torch.equal(figures["clip_share"], clipped) and (seed != 1 or clipped.any() and not clipped.all())
    for at in AT:  # and it does not depend on the other responses
        alone, _ = gspo_loss(logp[at], old[at], adv[at], torch.zeros_like(SEQ[at]), GSPO)
        torch.testing.assert_close(alone, loss[at], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_formulas(kind):
    logp, ref, _ = case(0)
    d = (logp - ref).tolist()
    want = [x ** 2 / 2 if kind == "k2" else math.exp(-x) - 1 + x for x in d]
    kl = kl_estimate(logp, ref, kind)
    torch.testing.assert_close(kl, torch.tensor(want, dtype=torch.float64))
    assert (kl >= 0).all() and torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, kind), (logp,))


def test_k3_is_flat_where_its_exponential_would_overflow():
    """Never a gradient of the wrong sign: it would push the policy further from the reference."""
    for d in (-1e3, -20.5, -19.5, 19.5, 20.5, 1e3):
        logp = torch.tensor([d], dtype=torch.float64, requires_grad=True)
        kl, near = kl_estimate(logp, torch.zeros_like(logp), "k3"), clip(d, -20, 20)
        kl.backward()
        assert kl.item() == pytest.approx(math.exp(-near) - 1 + near)
        assert logp.grad.item() == pytest.approx(1 - math.exp(-d) if near == d else 0)


def test_expected_gradients_of_the_kl_estimators():
    """Over the vocabulary: k2's expected gradient is that of KL(policy || reference), k1's is zero, k3's
    is that of KL(reference || policy)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    p = logp.exp().detach()

    def grad(x):
        return torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]

    kl, reverse = grad(logp.exp() * (logp - ref)), grad(ref.exp() * (ref - logp))
    assert kl.abs().max() > 0.05
    for estimate, want in ((kl_estimate(logp, ref, "k2"), kl), (logp - ref, torch.zeros_like(kl)),
                           (kl_estimate(logp, ref, "k3"), reverse)):
        torch.testing.assert_close(grad(p * estimate), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_aggregate_against_its_formula_and_additive_over_microbatches(mode):
    x, _, _ = case(3)
    counts = 17, 6, 8  # tokens, responses, length: the step holds more than this micro-batch
    per_response = [x.detach()[at] for at in AT]
    want = {"token": sum(float(a.sum()) for a in per_response) / 17,
            "sequence": sum(float(a.mean()) for a in per_response) / 6,
            "constant": sum(float(a.sum()) for a in per_response) / (6 * 8)}[mode]
    assert aggregate(x, SEQ, mode, *counts).item() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda y: aggregate(y, SEQ, mode, *counts), (x,))
    parts = aggregate(x[:4], SEQ[:4], mode, *counts), aggregate(x[4:], SEQ[4:] - 2, mode, *counts)
    assert sum(parts).item() == pytest.approx(want, rel=1e-12)


def test_sequence_mean():
    assert sequence_mean(torch.arange(10.0, dtype=torch.float64), SEQ).tolist() == [1.0, 3.0, 5.5, 8.5]


def test_identities_at_ratio_one():
    """On policy GRPO = CISPO (token mean) and GRPO = GSPO (sequence mean) in gradient; the narrowest of clips
    clips nothing."""
    logp, _, adv = case(2)
    narrow = config(clip_low=0.0, clip_high=0.0, is_floor=1.0, is_cap=1.0)

    def grad(name, mode):
        loss, figures = LOSSES[name](logp, logp.detach(), adv, SEQ, narrow)
        assert not figures["clip_share"].any() and (figures["ratio"] == 1).all()
        return torch.autograd.grad(aggregate(loss, SEQ, mode, 10, 4, 5), logp)[0]

    token, sequence = grad("grpo", "token"), grad("grpo", "sequence")
    assert token.abs().max() > 0 and not torch.allclose(token, sequence)
    torch.testing.assert_close(token, grad("cispo", "token"), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sequence, grad("gspo", "sequence"), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("far", [-1000.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_log_ratios_stay_finite(far, dtype):
    old = torch.full((10,), -2.0, dtype=dtype)
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[SEQ]
    logp = (old + far).requires_grad_()
    ratio = grpo_loss(logp, old, adv, SEQ, config())[1]["ratio"]
    torch.testing.assert_close(ratio, torch.full_like(old, math.exp(math.copysign(20, far))))
    for value in [*(loss(logp, old, adv, SEQ, config())[0] for loss in LOSSES.values()),
                  *(kl_estimate(logp, old, kind) for kind in ("k2", "k3"))]:
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), logp)[0].isfinite().all()
