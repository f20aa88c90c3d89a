"""train_grpo.py's optimizer step and loop: micro-batches, ranks, skipped groups, failures, clipping."""
import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import grading
import model as decoder
import pack
import parallel
import train_grpo
from grading import Group
from prompts import Prompt
from reward import advantages
from rollout import Response
from train_grpo import LOSSES, prepare, train_step
from world import (
    alone,
    check_two_ranks,
    equal,
    gradient_of,
    gradients,
    load64,
    make_config,
    make_world,
    norm_of,
    open_run,
    plain_decoder,
    read_lines,
    same,
    weights,
    whole,
)


def configure(**flat):
    base = dict(train__grad_clip=1e9, train__steps_per_sync=2, rollout__max_new_tokens=6)
    return make_config(**base | flat)


# --------------------------------------------------------------------------------------- fixed rollouts, fp64

@pytest.fixture(scope="module")
def groups(folders64):
    """Nine groups of four responses. The sampler's log-probs are the policy's plus noise, so that some tokens
    clip. Group 1 has equal rewards, group 2 a failed grading, group 5 nothing but failed gradings."""
    g = torch.Generator().manual_seed(7)
    model, out = load64(folders64[0], trainable=False), []

    def rand(low, high, n):
        return torch.randint(low, high, (n,), generator=g).tolist()

    for b in range(9):
        prompt = rand(0, 250, rand(3, 12, 1)[0])
        tokens = [rand(0, 250, n) for n in rand(1, 7, 4)]
        with torch.no_grad():
            batch = pack.pack([pack.Tree(prompt, [pack.Branch(t, i) for i, t in enumerate(tokens)])])
            logp = pack.logprobs(model, batch)[0]
        noisy = logp + 0.3 * torch.randn(len(logp), generator=g, dtype=torch.float64)
        rewards = [float(r) / 2 for r in rand(0, 9, 4)]
        rewards = {1: [0.1] * 4, 2: [1.0, None, 3.0, 0.5], 5: [None] * 4}.get(b, rewards)
        sampled = zip(tokens, noisy.split([len(t) for t in tokens]))
        responses = [Response(t, x.tolist(), "stop", 1.0, 1.0) for t, x in sampled]
        graded = [SimpleNamespace(reward=reward) for reward in rewards]
        out.append(Group(Prompt(None, prompt), responses, graded))
    failed = out[2].responses[1]
    failed.logprobs = [math.nan] * len(failed.tokens)
    return out


def rewards_of(group):
    return [r.reward for r in group.graded]


def valid(groups):
    responses = [r for group in groups for r in zip(group.responses, rewards_of(group))]
    return [response for response, reward in responses if reward is not None]


def step(run, groups, reference=None, **flat):
    """One optimizer step on this rank's share -> (figures, {parameter: whole gradient}, micro-batches).
    reference: the folder of the KL's reference, where there is one; flat: changes of the config."""
    run.cfg = configure(**flat) if flat else run.cfg
    run.todo = prepare(groups, run)
    if run.cfg.train.tis_cap and run.cfg.train.steps_per_sync > 1:
        train_grpo.rescore(run.model, run.todo, run.cfg)
    reference = reference and load64(reference, trainable=False)
    with gradients(run.model, run.optimizer) as grads:
        figures = train_step(run.model, run.optimizer, run.todo, run.cfg, reference)
    return figures, grads, run.todo.batches


@pytest.fixture
def run(folders64):
    return open_run(folders64[0], configure())


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_micro_batches_do_not_change_the_gradient(run, folders64, groups, loss, aggregation):
    """One, two, four and uneven micro-batches, with KL and entropy on: the same gradient and figures."""
    narrow = {} if loss == "cispo" else {"train__clip_low": 0.1, "train__clip_high": 0.1}
    flat = dict(train__loss=loss, train__aggregation=aggregation, train__kl_coef=0.1,
                train__entropy_coef=0.05)
    results = [step(run, groups, folders64[1], train__tokens_per_microbatch=budget, **flat, **narrow)
               for budget in (10_000, 130, 60, 25, 1)]
    counts = [len(batches) for *_, batches in results]
    assert counts[:2] == [1, 2] and len(set(counts)) == 5, counts
    wanted, gradient, _ = results[0]
    assert 0 < wanted["clip_share"] < 1 and {"ratio", "entropy", "kl", "gap_mean", "gap_max"} <= set(wanted)
    for figures, grads, _ in results[1:]:
        same(grads, gradient)
        assert figures == pytest.approx(wanted, rel=1e-9)


def by_hand(model, reference, groups, cfg, temperature):
    """The step's GRPO loss, one response at a time, from the formulas of the design. -> (loss, mean KL)"""
    t, total, tokens, responses, kls = cfg.train, 0.0, 0, 0, 0.0
    for group in groups:
        rewards = [r for r in rewards_of(group) if r is not None]
        mean = sum(rewards) / len(rewards) if rewards else 0
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) if len(rewards) > 1 else 0
        for response, reward in zip(group.responses, rewards_of(group)):
            if reward is None:
                continue
            adv = (reward - mean) / (std + 1e-6) if std > 1e-9 else 0.0
            logp, entropy = alone(model, group.prompt.tokens, response.tokens, temperature)
            ref = alone(reference, group.prompt.tokens, response.tokens, temperature)[0].detach()
            r = (logp - torch.tensor(response.logprobs, dtype=torch.float64)).exp()
            x = -torch.minimum(r * adv, r.clamp(1 - t.clip_low, 1 + t.clip_high) * adv)
            if adv < 0:
                x = torch.minimum(x, torch.full_like(x, -t.dual_clip * adv))
            d = logp - ref
            kl = d ** 2 / 2 if t.kl == "k2" else (-d).exp() - 1 + d
            x = x + t.kl_coef * kl - t.entropy_coef * entropy
            kls += d.sum().item()
            total = total + (x.mean() if t.aggregation == "sequence" else x.sum())
            tokens, responses = tokens + len(response.tokens), responses + 1
    length = cfg.rollout.max_new_tokens
    whole = {"token": tokens, "sequence": responses, "constant": responses * length}
    return total / whole[t.aggregation], kls / tokens


@pytest.mark.parametrize("aggregation, kl, temperature",
                         [("token", "k2", 1.0), ("sequence", "k3", 0.8), ("constant", "k2", 1.0)])
def test_a_step_is_what_the_design_says(run, folders64, groups, aggregation, kl, temperature):
    groups = copy.deepcopy(groups)
    for response in (r for group in groups for r in group.responses):
        response.temperature = temperature
    figures, grads, _ = step(
        run, groups, folders64[1], train__aggregation=aggregation, train__kl=kl, train__kl_coef=0.02,
        train__entropy_coef=0.05, train__dual_clip=1.2, train__tokens_per_microbatch=70,
        rollout__temperature=temperature)
    plain, reference = plain_decoder(run.model), plain_decoder(load64(folders64[1]))
    loss, kl = by_hand(plain, reference, groups, run.cfg, temperature)
    want = gradient_of(plain, loss)
    same(grads, want)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert figures["kl"] == pytest.approx(kl, rel=1e-9)
    assert figures["grad_norm"] == pytest.approx(norm_of(want), rel=1e-9)


def test_failed_responses_leave_no_trace(run, folders64, groups):
    """A failed response is in no denominator and no gradient, whatever it holds; NaN does not leak."""
    groups, found = groups[:4], []
    other = copy.deepcopy(groups)
    other[2].responses[1] = Response([1] * 40, [-3.0] * 40, "length", 1.0, 1.0)
    tokens = sum(len(r.tokens) for r in valid(groups))
    for some in (groups, other):
        figures, grads, _ = step(run, some, folders64[1], train__kl_coef=0.1, train__entropy_coef=0.1)
        assert run.todo.responses == 15 == len(valid(groups)) and run.todo.tokens == tokens
        found.append((figures, grads))
    assert found[0][0] == found[1][0] and figures["trained_tokens"] == tokens
    assert equal(found[0][1], grads) and all(g.isfinite().all() for g in grads.values())
    json.dumps(figures, allow_nan=False)


def test_a_kl_needs_groups_without_advantages_too(run, folders64, groups):
    groups = copy.deepcopy(groups[:1])
    for graded in groups[0].graded:
        graded.reward = 1.0
    step(run, groups, folders64[1], train__kl_coef=0.1)
    assert run.todo.skipped == 0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_groups_without_advantages_are_skipped_exactly(run, groups, loss, aggregation):
    """Not computed without KL and entropy, the result is that of computing them, and they count in the
    denominator. (An entropy bonus of 1e-300 computes everything and adds nothing.) A group is computed even
    where most of its advantages are zero."""
    groups, found = copy.deepcopy(groups[:3]), []
    for graded, reward in zip(groups[2].graded, [1.0, None, 3.0, 2.0]):
        graded.reward = reward  # advantages of -1, 0, 1 and 0
    sizes = [sum(len(r.tokens) for r in valid([group])) for group in groups]
    for coef, skipped, trained in ((0.0, 1 / 3, {0, 2}), (1e-300, 0, {0, 1, 2})):
        figures, grads, batches = step(run, groups, train__entropy_coef=coef, train__loss=loss,
                                       train__aggregation=aggregation)
        assert run.todo.skipped == pytest.approx(skipped) and run.todo.tokens == sum(sizes)
        assert {b for batch in batches for b in batch.names} == trained
        assert figures["trained_share"] == sum(sizes[b] for b in trained) / sum(sizes)
        found.append(grads)
    same(*found)


def test_a_step_of_skipped_groups_changes_nothing(folders64, groups):
    """Nothing was computed, so there is nothing to say: 0 would read as a collapsed entropy, a ratio of 0.
    And there is nothing to learn: neither momentum nor weight decay move the weights."""
    run = open_run(folders64[0], configure(), lr=1e-2)
    step(run, groups)
    before = weights(run.model)
    for some in ([1], [5], [1, 5]):
        figures, grads, _ = step(run, [groups[i] for i in some])
        assert run.todo.skipped == 1 and figures["finite"] and figures["grad_norm"] == 0 == figures["loss"]
        assert not grads and equal(weights(run.model), before)
        json.dumps(figures, allow_nan=False)
        assert figures["ratio"] is figures["entropy"] is figures["gap_mean"] is figures["gap_max"] is None
    figures, _, _ = step(run, [groups[5]], train__entropy_coef=0.1)  # nothing valid at all
    assert figures["grad_norm"] == 0 and figures["finite"]


@pytest.mark.parametrize("change, temperature", [({"temperature": 0.7}, 1.0), ({"top_p": 0.95}, 1.0),
                                                 ({"temperature": 0}, 1.0), ({}, 0.9)])
def test_another_sampling_distribution_is_refused(groups, change, temperature):
    groups = copy.deepcopy(groups[:2])
    vars(groups[1].responses[3]).update(change)
    with pytest.raises(ValueError, match="cannot be trained on: the loss scores temperature"):
        prepare(groups, SimpleNamespace(cfg=configure(rollout__temperature=temperature)))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_one_step_per_sync_has_ratio_one(run, groups, loss):
    """old is then the current log-prob: the sampler's own differ by rounding, and no clip may act on that."""
    figures, _, _ = step(run, groups, train__loss=loss, train__steps_per_sync=1)
    assert figures["ratio"] == 1.0 and figures["clip_share"] == 0.0 and figures["grad_norm"] > 0
    figures, _, _ = step(run, groups, train__loss=loss)  # against the sampler's: clips
    assert figures["ratio"] != 1.0 and figures["clip_share"] > 0 and figures["gap_max"] > 0.1


@pytest.mark.parametrize("steps_per_sync", [1, 2])
def test_gspo_clips_against_the_trainers_own_old_log_probs(folders64, groups, steps_per_sync):
    """Its clip is finer than what sampler and trainer differ in. So at the first step after a sync the ratio
    is 1, to the bit; `outside` tells which share of the tokens the clip would reach by the sampler's."""
    cfg = configure(train__loss="gspo", train__clip_low=0.1, train__clip_high=0.2,
                    train__steps_per_sync=steps_per_sync)
    run, far = open_run(folders64[0], cfg, lr=1e-2), []
    plain, todo = plain_decoder(run.model), prepare(groups[6:], run)
    for group in groups[6:]:
        for response in group.responses:
            logp, _ = alone(plain, group.prompt.tokens, response.tokens)
            s = (logp - torch.tensor(response.logprobs)).mean().exp()
            far += [not 0.9 <= s <= 1.2] * len(logp)
    if steps_per_sync > 1:
        train_grpo.rescore(run.model, todo, cfg)
        assert all(torch.equal(pack.logprobs(run.model, batch)[0], batch.old) for batch in todo.batches)
    first, second = (train_step(run.model, run.optimizer, todo, cfg) for _ in range(2))
    assert first["ratio"] == 1.0 and 0 < sum(far) < len(far)
    assert first["outside"] == pytest.approx(sum(far) / len(far))
    if steps_per_sync > 1:  # the later step still compares the weights that sampled
        assert second["ratio"] != 1.0 and second["outside"] == first["outside"]


def test_every_figure_of_a_loss_is_logged_and_no_other(run, groups, monkeypatch):
    def mine(logp, old, adv, seq, t):
        return -adv * logp, {"twice": 2 * torch.ones_like(logp)}

    monkeypatch.setitem(LOSSES, "mine", mine)
    figures, _, _ = step(run, groups, train__loss="mine")
    assert figures["twice"] == 2.0 and not {"ratio", "clip_share", "outside"} & set(figures)


def test_importance_weight(run, groups):
    """tis_cap multiplies each token's loss by min(pi_trainer / pi_sampler, cap), at the rollout's weights."""
    group, plain = groups[0], plain_decoder(run.model)
    tokens = sum(len(r.tokens) for r in group.responses)
    want, ratios = 0.0, []
    for response, adv in zip(group.responses, advantages(rewards_of(group))):
        logp, _ = alone(plain, group.prompt.tokens, response.tokens)
        ratio = (logp.detach() - torch.tensor(response.logprobs, dtype=torch.float64)).exp()
        ratios += ratio.tolist()
        want = want - (ratio.clamp(max=1.1) * (logp - logp.detach()).exp() * adv).sum() / tokens
    assert min(ratios) < 1.1 < max(ratios)
    want = gradient_of(plain, want)
    for steps_per_sync in (1, 2):
        same(step(run, [group], train__tis_cap=1.1, train__steps_per_sync=steps_per_sync)[1], want)


def test_gradient_clipping(run, groups):
    free, grads, _ = step(run, groups)
    cut, cut_grads, _ = step(run, groups, train__grad_clip=free["grad_norm"] / 4)
    assert cut["grad_norm"] == pytest.approx(free["grad_norm"])  # the norm logged is the one before clipping
    same(cut_grads, {n: g / 4 for n, g in grads.items()}, rtol=1e-4)


@pytest.mark.parametrize("compute, master", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                             (torch.float64, torch.float64)])
def test_master_weights_are_at_least_float32(run, folders64, groups, compute, master):
    run.model = parallel.load_sharded(folders64[0], run.device, compute)
    step(run, groups[:1])
    trained = list(run.model.parameters())
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {master}
    frozen = list(parallel.load_sharded(folders64[0], run.device, compute, trainable=False).parameters())
    assert {p.dtype for p in frozen} == {compute} and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("spoil", [lambda x: (x - x.detach()).sqrt(), lambda x: x + math.inf],
                         ids=["no gradient", "no loss"])
def test_a_step_with_a_bad_loss_or_gradient_changes_nothing(folders64, groups, monkeypatch, spoil):
    run = open_run(folders64[0], configure(), lr=1e-2)
    checkpoint.fresh_moments(run.model, run.optimizer)
    before = weights(run.model)
    with monkeypatch.context() as m:
        m.setitem(LOSSES, "grpo", lambda *args: (spoil(train_grpo.grpo_loss(*args)[0]), {}))
        out, _, _ = step(run, groups)
    assert out["finite"] is False and out["grad_norm"] is None and equal(weights(run.model), before)
    states = run.optimizer.state.values()
    assert all(float(s["step"]) == 0 and (whole(s["exp_avg"]) == 0).all() for s in states)
    out, _, _ = step(run, groups)
    assert out["finite"] and out["grad_norm"] > 0


COMBOS = {  # name: config; with train.kl_coef there is a reference model
    "grpo": dict(train__dual_clip=1.2, train__grad_clip=0.05, train__tokens_per_microbatch=30),
    "gspo": dict(train__loss="gspo", train__clip_low=0.1, train__clip_high=0.1, train__aggregation="constant",
                 train__entropy_coef=0.02, train__tokens_per_microbatch=25),
    "cispo_kl": dict(train__loss="cispo", train__aggregation="sequence", train__kl_coef=0.1, train__kl="k3",
                     train__entropy_coef=0.05, train__tokens_per_microbatch=30),
    "tis": dict(train__tis_cap=1.1, train__tokens_per_microbatch=30)}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMBOS))
def test_two_ranks_equal_one(run_ranks, folders64, groups, name):
    """Three steps on fixed rollouts, with micro-batches that the two ranks do not have in equal number."""
    cfg, parts = configure(**COMBOS[name]), [groups[:3], groups[3:6], groups[6:]]
    reference = folders64[1] if name == "cispo_kl" else None
    counts, other = check_two_ranks(run_ranks, step, folders64[0], cfg, parts, reference)
    assert counts != other, "no unequal counts: the case shows nothing"


# --------------------------------------------------------------------------------------------------- the loop

@pytest.mark.slow
@pytest.mark.parametrize("loss, tis_cap", [*((loss, None) for loss in LOSSES), ("grpo", 2.0)])
def test_clipping_acts_off_policy_and_only_there(
        train, monkeypatch, tmp_path, marks_checkpoint, loss, tis_cap):
    """gspo and tis_cap have old log-probs of the trainer, and nobody else needs them."""
    rescore, rescored = train_grpo.rescore, []
    monkeypatch.setattr(train_grpo, "rescore", lambda *args: (rescored.append(args), rescore(*args)))
    path = make_world(tmp_path, marks_checkpoint, train__loss=loss, train__lr=0.03, train__entropy_coef=0.01,
                      train__steps=8, train__tis_cap=tis_cap)
    lines = train(train_grpo, path)
    own = loss == "gspo" or tis_cap is not None
    on, off = lines[::2], lines[1::2]
    assert sum(m["clip_share"] > 0 for m in off) >= 2 and all(abs(m["ratio"] - 1) > 1e-4 for m in off)
    assert all(m["clip_share"] == 0 and (m["ratio"] == 1.0 or not own) for m in on)
    assert all(m["gap_max"] < 1e-4 for m in on) and all(m["gap_max"] is None is m["gap_mean"] for m in off)
    shutil.copytree(tmp_path / "run" / "turns", tmp_path / "other" / "turns")
    train(train_grpo, path, "train.steps_per_sync=1", f"run_dir={tmp_path / 'other'}")
    lines = read_lines(tmp_path / "other" / "metrics.jsonl")
    assert [(m["ratio"], m["clip_share"]) for m in lines] == [(1.0, 0.0)] * 8
    assert all(m["gap_max"] is not None for m in lines) and len(rescored) == 8 * own


def test_what_is_logged_of_the_rollouts(train, monkeypatch, tmp_path, marks_checkpoint):
    groups, sample_graded = [], grading.sample_graded

    def watched(*args):
        found, figures = sample_graded(*args)
        groups.extend(found)
        return found, figures

    monkeypatch.setattr(grading, "sample_graded", watched)
    lines = train(train_grpo, make_world(tmp_path, marks_checkpoint, rollout__temperature=2.0))
    for i, line in enumerate(lines):
        tokens, logps, rewards, cut_off = 0, 0.0, 0.0, 0
        for group in groups[4 * i:4 * i + 4]:
            for r, g in zip(group.responses, group.graded):
                tokens += len(r.tokens)
                logps += sum(r.logprobs)
                rewards += g.r_s * (1 + 2 * g.r_a) + g.omega
                cut_off += r.tokens[-1] != 258
        want = [rewards / 16, logps / tokens, cut_off / 16, tokens / 16]
        assert [line[k] for k in ("reward", "logp", "cut_off", "length")] == pytest.approx(want)
        assert "kl" not in line  # no reference, no figure
    assert len({line["cut_off"] for line in lines}) > 1, "every response was cut off"


# -------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
def test_cuda_one_fsdp_step_equals_the_cpus(one_rank, folders64, groups):
    """bfloat16 under FSDP2 on one GPU against float64 on the CPU: the figures, the direction of the gradient.
    AdamW, fused, moves the weights; a checkpoint's moments and step can be made and read on the device."""
    flat = dict(train__entropy_coef=0.05, train__tokens_per_microbatch=60, train__steps_per_sync=1)
    exact = decoder.load(folders64[0], "cpu", torch.float64).requires_grad_(True)
    optimizer = torch.optim.AdamW(exact.parameters(), lr=0.0)
    cpu = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float64, model=exact,
                          optimizer=optimizer)
    want, grads, _ = step(cpu, groups, **flat)
    model = parallel.load_sharded(folders64[0], one_rank, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    checkpoint.fresh_moments(model, optimizer)
    run = SimpleNamespace(rank=0, world=1, device=one_rank, dtype=torch.bfloat16, model=model,
                          optimizer=optimizer)
    before = weights(model)
    got, found, _ = step(run, groups, **flat)
    assert got["finite"] and got["loss"] == pytest.approx(want["loss"], rel=0.05, abs=1e-3)
    assert got["entropy"] == pytest.approx(want["entropy"], rel=0.05)
    assert got["trained_tokens"] == want["trained_tokens"]
    for name, p in model.named_parameters():
        a, b = found[name].double().cpu().flatten(), grads[name].flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98, name
        assert not torch.equal(whole(p), before[name]), name
        assert optimizer.state[p]["step"].is_cuda and int(optimizer.state[p]["step"]) == 1
