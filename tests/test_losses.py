"""Advantages, the losses, KL and the aggregator against formulas written out in float64, and the identities of the field."""
import doctest
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_grpo
import training
from train_grpo import advantages, aggregate, cispo_loss, gspo_loss, grpo_loss, kl_estimate, sequence_mean
from training import lr_at, stream

NAN = float("nan")
SEQ = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])  # four answers of 3, 1, 4 and 2 tokens
LENGTHS = (3, 1, 4, 2)


def config(**changed):
    t = dict(clip_low=0.2, clip_high=0.25, dual_clip=None, is_floor=0.0, is_cap=1.28, cispo_drop=False)
    return SimpleNamespace(**t | changed)


def case(seed, spread=0.6):
    """logp and old [M] with ratios on both sides of every clip, and advantages of both signs and zero."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(len(SEQ), generator=g, dtype=torch.float64) - 1
    logp = old + spread * torch.randn(len(SEQ), generator=g, dtype=torch.float64)
    adv = torch.tensor([1.3, -0.7, 0.0, -2.0], dtype=torch.float64)[torch.randperm(4, generator=g)][SEQ]
    return logp.requires_grad_(), old, adv


def clip(x, low, high):
    return min(max(x, low), high)


# Each formula for one token (or answer): ratio r, advantage a, log-prob l, config t.

def plain_grpo(r, a, l, t):
    surrogate = min(r * a, clip(r, 1 - t.clip_low, 1 + t.clip_high) * a)
    return -max(surrogate, t.dual_clip * a) if t.dual_clip and a < 0 else -surrogate


def plain_cispo(r, a, l, t):
    dropped = t.cispo_drop and a > 0 and r > t.is_cap
    return 0.0 if dropped else -clip(r, t.is_floor, t.is_cap) * a * l


def per_token(formula, logp, old, adv, t):
    return [formula(math.exp(l - o), a, l, t) for l, o, a in zip(logp.tolist(), old.tolist(), adv.tolist())]


def plain_gspo(logp, old, adv, t):
    out = []
    for s in range(4):
        at = [i for i in range(len(SEQ)) if SEQ[i] == s]
        ratio = math.exp(sum(float(logp.detach()[i] - old[i]) for i in at) / len(at))
        out += [plain_grpo(ratio, float(adv[i]), 0, SimpleNamespace(**vars(t) | {"dual_clip": None})) for i in at]
    return out


GRPO, DUAL = config(), config(dual_clip=1.5)
CISPO, FLOOR, DROP = config(), config(is_floor=0.9), config(cispo_drop=True)
GSPO = config(clip_low=0.1, clip_high=0.12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [GRPO, DUAL], ids=["plain", "dual"])
def test_grpo_formula_and_gradient(t, seed):
    logp, old, adv = case(seed)
    loss, figures = grpo_loss(logp, old, adv, SEQ, t)
    torch.testing.assert_close(loss, torch.tensor(per_token(plain_grpo, logp, old, adv, t), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, adv, SEQ, t)[0], (logp,), eps=1e-7, atol=1e-6)
    g, = torch.autograd.grad(loss.sum(), logp)
    r = (logp - old).exp()
    torch.testing.assert_close(figures["ratio"], r)
    # Zero exactly on the clipped side, -r A elsewhere; clip_share counts exactly those tokens.
    zero = ((adv > 0) & (r > 1 + t.clip_high)) | ((adv < 0) & (r < 1 - t.clip_low))
    if t.dual_clip:
        zero |= (adv < 0) & (r > t.dual_clip)
    assert zero.any() and (~zero & (adv != 0)).any()
    assert torch.equal(g, torch.where(zero, 0.0, -r * adv)) or torch.allclose(g, torch.where(zero, 0.0, -r * adv), rtol=1e-12)
    assert (g[zero] == 0).all() and (g[~zero & (adv != 0)] != 0).all()
    assert torch.equal(figures["clip_share"], zero)


def test_dual_clip_bounds_the_loss_of_a_bad_answer():
    logp, old, adv = torch.tensor([0.0, 2.0]), torch.zeros(2), -torch.ones(2)
    seq = torch.tensor([0, 0])
    assert torch.allclose(grpo_loss(logp, old, adv, seq, config())[0], torch.tensor([1.0, math.e ** 2]))
    assert torch.allclose(grpo_loss(logp, old, adv, seq, config(dual_clip=3.0))[0], torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [CISPO, FLOOR, DROP], ids=["plain", "floor", "drop"])
def test_cispo_formula_and_gradient(t, seed):
    logp, old, adv = case(seed)
    loss, figures = cispo_loss(logp, old, adv, SEQ, t)
    torch.testing.assert_close(loss, torch.tensor(per_token(plain_cispo, logp, old, adv, t), dtype=torch.float64))
    r = (logp - old).exp().detach()
    weight = r.clamp(t.is_floor, t.is_cap)
    if t.cispo_drop:
        weight = torch.where((adv > 0) & (r > t.is_cap), 0.0, weight)
    g, = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(g, -weight * adv, rtol=1e-12, atol=0)  # min(r, cap) A and no gradient through the weight
    torch.testing.assert_close(figures["ratio"], r)
    assert torch.equal(figures["clip_share"], (r > t.is_cap) | (r < t.is_floor)) and figures["clip_share"].any()
    # The weight is a constant: finite differences of the loss with the weight held agree.
    assert torch.autograd.gradcheck(lambda x: -weight * adv * x, (logp,))


@pytest.mark.parametrize("seed", range(4))
def test_gspo_formula_and_gradient(seed):
    logp, old, adv = case(seed, spread=0.25)
    loss, figures = gspo_loss(logp, old, adv, SEQ, GSPO)
    torch.testing.assert_close(loss, torch.tensor(plain_gspo(logp, old, adv, GSPO), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: gspo_loss(x, old, adv, SEQ, GSPO)[0], (logp,), eps=1e-7, atol=1e-6)
    s = figures["ratio"]
    clipped = ((adv > 0) & (s > 1 + GSPO.clip_high)) | ((adv < 0) & (s < 1 - GSPO.clip_low))
    assert torch.equal(figures["clip_share"], clipped)
    for answer in range(4):  # one ratio per answer
        assert len(s[SEQ == answer].unique()) == 1


def test_gspo_clips_and_does_not_depend_on_the_other_answers():
    logp, old, adv = case(1, spread=0.25)
    whole, figures = gspo_loss(logp, old, adv, SEQ, GSPO)
    assert figures["clip_share"].any() and not figures["clip_share"].all()
    for answer in range(4):
        at = SEQ == answer
        alone, _ = gspo_loss(logp[at], old[at], adv[at], torch.zeros(int(at.sum()), dtype=torch.long), GSPO)
        torch.testing.assert_close(alone, whole[at], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_formulas(kind):
    logp, ref, _ = case(0)
    want = [(l - r) ** 2 / 2 if kind == "k2" else math.exp(r - l) - 1 - (r - l) for l, r in zip(logp.tolist(), ref.tolist())]
    torch.testing.assert_close(kl_estimate(logp, ref, kind), torch.tensor(want, dtype=torch.float64))
    assert (kl_estimate(logp, ref, kind) >= 0).all()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, kind), (logp,))


def test_expected_gradients_of_the_kl_estimators():
    """Over the whole vocabulary: k2's expected gradient is that of KL(policy || reference), k1's is zero, k3's is that of
    KL(reference || policy)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    p = logp.exp().detach()

    def grad(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    kl = grad((logp.exp() * (logp - ref)).sum())
    assert kl.abs().max() > 0.05
    torch.testing.assert_close(grad((p * kl_estimate(logp, ref, "k2")).sum()), kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad((p * (logp - ref)).sum()), torch.zeros_like(kl), rtol=0, atol=1e-12)
    reverse = grad((ref.exp() * (ref - logp)).sum())
    torch.testing.assert_close(grad((p * kl_estimate(logp, ref, "k3")).sum()), reverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_aggregate_against_its_formula_and_additive_over_microbatches(mode):
    x = torch.randn(len(SEQ), generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    tokens, answers, length = 17, 6, 8  # the step holds more than this micro-batch
    per_answer = [x.detach()[SEQ == s] for s in range(4)]
    want = {"token": sum(float(a.sum()) for a in per_answer) / 17,
            "sequence": sum(float(a.mean()) for a in per_answer) / 6,
            "constant": sum(float(a.sum()) for a in per_answer) / (6 * 8)}[mode]
    got = aggregate(x, SEQ, mode, tokens, answers, length)
    assert got.item() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda y: aggregate(y, SEQ, mode, tokens, answers, length), (x,))
    parts = [aggregate(x[:4], SEQ[:4], mode, tokens, answers, length), aggregate(x[4:], SEQ[4:] - 2, mode, tokens, answers, length)]
    assert sum(parts).item() == pytest.approx(want, rel=1e-12)


def test_sequence_mean():
    x = torch.arange(10.0, dtype=torch.float64)
    assert sequence_mean(x, SEQ).tolist() == [1.0, 3.0, 5.5, 8.5]


def test_identities_at_ratio_one():
    """On policy GRPO = CISPO (token mean) and GRPO = GSPO (sequence mean) in gradient."""
    logp, _, adv = case(2)
    old = logp.detach()

    def grad(loss, mode):
        return torch.autograd.grad(aggregate(loss(logp, old, adv, SEQ, config())[0], SEQ, mode, 10, 4, 5), logp)[0]

    token, sequence = grad(grpo_loss, "token"), grad(grpo_loss, "sequence")
    assert token.abs().max() > 0 and not torch.allclose(token, sequence)
    torch.testing.assert_close(token, grad(cispo_loss, "token"), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sequence, grad(gspo_loss, "sequence"), rtol=1e-12, atol=1e-15)
    for loss in (grpo_loss, cispo_loss, gspo_loss):
        figures = loss(logp, old, adv, SEQ, config())[1]
        assert not figures["clip_share"].any() and (figures["ratio"] == 1).all()


@pytest.mark.parametrize("far", [-1000.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_log_ratios_stay_finite(far, dtype):
    old = torch.full((10,), -2.0, dtype=dtype)
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[SEQ]
    for loss in (grpo_loss, cispo_loss, gspo_loss):
        logp = (old + far).requires_grad_()
        value, _ = loss(logp, old, adv, SEQ, config())
        g, = torch.autograd.grad(value.sum(), logp)
        assert value.isfinite().all() and g.isfinite().all()
    for kind in ("k2", "k3"):
        logp = (old + far).requires_grad_()
        value = kl_estimate(logp, old, kind)
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), logp)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------- advantages

def test_advantages_formulas():
    rewards = torch.tensor([[1.0, 4.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    for row, std, mean in zip(rewards.tolist(), advantages(rewards, "std").tolist(), advantages(rewards, "mean").tolist()):
        centred = [r - sum(row) / 4 for r in row]
        assert mean == pytest.approx(centred)
        assert std == pytest.approx([c / (np.std(row, ddof=1) + 1e-6) for c in centred], rel=1e-12)


@pytest.mark.parametrize("mode", ["std", "mean"])
def test_advantages_where_gradings_failed(mode):
    rewards = torch.tensor([[1.0, NAN, 4.0, 2.5], [NAN, NAN, NAN, 2.0], [NAN] * 4, [2.0, 2.0, NAN, 2.0]], dtype=torch.float64)
    got = advantages(rewards, mode)
    want = advantages(torch.tensor([[1.0, 4.0, 2.5]], dtype=torch.float64), mode)[0]
    assert torch.equal(got[0, [0, 2, 3]], want) and got[0, 1] == 0  # siblings as if the failed one had never been
    assert (got[1:] == 0).all()


@pytest.mark.parametrize("mode", ["std", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(mode, dtype):
    for value in (0.1, 0.7, 3.3, -0.2):
        for n in (2, 3, 5, 7):
            assert (advantages(torch.full((1, n), value, dtype=dtype), mode) == 0).all()


def test_advantages_of_one_group_ignore_the_others():
    a = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    both = advantages(torch.cat([a, torch.tensor([[100.0, NAN, 3.0]], dtype=torch.float64)]))
    assert torch.equal(both[:1], advantages(a))


# -------------------------------------------------------------------------------------------- schedule, data order, due

def test_learning_rates():
    def lrs(schedule, warmup, total=10):
        t = SimpleNamespace(lr=2.0, warmup_steps=warmup, schedule=schedule)
        return [lr_at(s, total, t) for s in range(total)]

    assert lrs("constant", 0) == [2.0] * 10
    assert lrs("constant", 4) == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6
    assert lrs("linear", 0) == pytest.approx([2 * (1 - s / 10) for s in range(10)])
    assert lrs("linear", 2) == pytest.approx([1.0, 2.0] + [2 * (1 - s / 8) for s in range(8)])
    assert lrs("cosine", 2) == pytest.approx([1.0, 2.0] + [1 + math.cos(math.pi * s / 8) for s in range(8)])
    assert lrs("cosine", 20) == pytest.approx([(s + 1) / 10 for s in range(10)])  # still warming up at the end


def test_stream_visits_every_turn_once_an_epoch_however_it_is_cut():
    n, whole = 11, stream(11, 0, 44, seed=5)
    epochs = [whole[i:i + n] for i in range(0, 44, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    for size in (1, 3, 4, 11, 25):
        assert [i for a in range(0, 44, size) for i in stream(n, a, min(a + size, 44), seed=5)] == whole
    assert stream(n, 0, 44, seed=6) != whole
    assert stream(1, 0, 3, seed=0) == [0, 0, 0]


def test_due():
    due = training.due
    assert not due(None, 0, 100, 100)
    assert [s for s in range(1, 13) if due(4, s - 1, s, 12)] == [4, 8, 12]
    assert [s for s in range(5, 31, 5) if due(7, s - 5, s, 100)] == [10, 15, 25, 30]  # at the next sync boundary
    assert due(50, 8, 10, 10)  # always at the end


def test_docstring_examples():
    assert doctest.testmod(train_grpo).failed == 0 and doctest.testmod(train_grpo).attempted > 0
