"""The optimizer step and the loop: micro-batches, ranks, skipping, failures, resume, and what a user may get wrong."""
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

if __name__ == "__main__":  # a rank of the two-rank tests, see `main` at the end
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import checkpoint
import config
import model as decoder
import pack
import parallel
import rollout
import train_grpo
import training
from data import InputError, cli, write_json
from model import Decoder
from test_pack import alone
from train_grpo import LOSSES, Group, prepare, train_step

REPO = Path(__file__).resolve().parent.parent
NAN = math.nan


def make_config(**flat):
    """Dotted keys with __ for the dot -> Config."""
    base = {"run_dir": "unused", "train.grad_clip": 1e9, "rollout.max_new_tokens": 6, "train.steps_per_sync": 2, "train.lr": 1e-2}
    return config.build(base | {k.replace("__", "."): v for k, v in flat.items()})


# ------------------------------------------------------------------------------------------------ fixed rollouts, fp64

@pytest.fixture(scope="module")
def folders(make_checkpoint):
    """Policy and reference: two float64 checkpoints of other weights."""
    return make_checkpoint("qwen2", dtype=torch.float64), make_checkpoint("qwen2", dtype=torch.float64, seed=1)


def load(folder, **how):
    parallel.start()
    return parallel.load_sharded(folder, torch.device("cpu"), torch.float64, **how)


def make_rollouts(folder):
    """Nine groups of four answers. The sampler's log-probs are the policy's plus noise, so that some tokens clip. Group 1 has
    equal rewards, group 2 a failed grading, group 5 nothing but failed gradings."""
    g = torch.Generator().manual_seed(7)
    model = load(folder, trainable=False)
    rand = lambda low, high, n: torch.randint(low, high, (n,), generator=g).tolist()
    groups = []
    for b in range(9):
        prompt = rand(0, 250, rand(3, 12, 1)[0])
        answers = [rand(0, 250, n) for n in rand(1, 7, 4)]
        with torch.no_grad():
            logp = pack.logprobs(model, pack.pack([pack.Tree(prompt, answers, [0, 1, 2, 3])]))[0]
        noisy = (logp + 0.3 * torch.randn(len(logp), generator=g, dtype=torch.float64)).split([len(a) for a in answers])
        rewards = [float(r) / 2 for r in rand(0, 9, 4)]
        rewards = {1: [0.1] * 4, 2: [1.0, NAN, 3.0, 0.5], 5: [NAN] * 4}.get(b, rewards)
        groups.append(dict(prompt=prompt, answers=[dict(tokens=a, logprobs=l.tolist()) for a, l in zip(answers, noisy)],
                           rewards=rewards))
    groups[2]["answers"][1]["logprobs"] = [NAN] * len(groups[2]["answers"][1]["tokens"])
    return groups


@pytest.fixture(scope="module")
def rollouts(folders):
    return make_rollouts(folders[0])


def as_groups(rollouts, temperature=1.0):
    return [Group(r["prompt"], [rollout.Answer(a["tokens"], a["logprobs"], "stop", temperature, 1.0) for a in r["answers"]],
                  r["rewards"]) for r in rollouts]


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def step(model, groups, cfg, reference=None, optimizer=None, rank=0, world=1, on_policy=True):
    """One optimizer step on this rank's share. -> (figures, {parameter: whole gradient before AdamW saw it}, batch)."""
    grads = {}
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    hook = optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: whole(p.grad) for n, p in model.named_parameters()}))
    batch = prepare(groups, cfg, rank, world, torch.device("cpu"), torch.float64)
    if cfg.train.tis_cap and cfg.train.steps_per_sync > 1:
        train_grpo.rescore(model, [batch], cfg)
    run = SimpleNamespace(model=model, optimizer=optimizer, cfg=cfg, device=torch.device("cpu"))
    figures = train_step(run, reference, batch, on_policy)
    hook.remove()
    return figures, grads, batch


def same(a, b, rtol=1e-9, atol=1e-12):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_micro_batches_do_not_change_the_gradient(folders, rollouts, loss, aggregation):
    """One, two, four and uneven micro-batches, with KL and entropy on: the same gradient and the same figures."""
    wide = {"train__clip_low": 0.1, "train__clip_high": 0.1} if loss != "cispo" else {}
    model, reference = load(folders[0]), load(folders[1], trainable=False)
    groups, results, counts = as_groups(rollouts), [], []
    for budget in (10_000, 130, 60, 25, 1):
        cfg = make_config(train__loss=loss, train__aggregation=aggregation, train__kl_coef=0.1, train__entropy_coef=0.05,
                          train__tokens_per_microbatch=budget, **wide)
        figures, grads, batch = step(model, groups, cfg, reference)
        counts.append(len(batch.packed))
        results.append((figures, grads))
    assert counts[0] == 1 and counts[1] == 2 and len(set(counts)) == 5, counts
    assert 0 < results[0][0]["clip_share"] < 1
    for figures, grads in results[1:]:
        same(grads, results[0][1])
        for k in ("loss", "ratio", "clip_share", "entropy", "kl", "gap_mean", "gap_max", "grad_norm", "trained_tokens"):
            assert figures[k] == pytest.approx(results[0][0][k], rel=1e-9), k


def by_hand(model, reference, groups, t, length, temperature):
    """The step's GRPO loss, one answer at a time, from the formulas of the design."""
    total, tokens, answers = 0.0, 0, 0
    for group in groups:
        valid = [r for r in group.rewards if not math.isnan(r)]
        mean = sum(valid) / len(valid) if valid else 0
        std = math.sqrt(sum((r - mean) ** 2 for r in valid) / (len(valid) - 1)) if len(valid) > 1 else 0
        for a, reward in zip(group.answers, group.rewards):
            if math.isnan(reward):
                continue
            adv = (reward - mean) / (std + 1e-6) if std > 1e-9 else 0.0
            logp, entropy = alone(model, group.prompt, a.tokens, temperature)
            ref = alone(reference, group.prompt, a.tokens, temperature)[0].detach()
            r = (logp - torch.tensor(a.logprobs, dtype=torch.float64)).exp()
            x = -torch.minimum(r * adv, r.clamp(1 - t.clip_low, 1 + t.clip_high) * adv)
            if adv < 0:
                x = torch.minimum(x, torch.full_like(x, -t.dual_clip * adv))
            d = logp - ref
            x = x + t.kl_coef * (d ** 2 / 2 if t.kl == "k2" else (-d).exp() - 1 + d) - t.entropy_coef * entropy
            total = total + (x.mean() if t.aggregation == "sequence" else x.sum())
            tokens, answers = tokens + len(a.tokens), answers + 1
    return total / {"token": tokens, "sequence": answers, "constant": answers * length}[t.aggregation]


@pytest.mark.parametrize("aggregation, kl, temperature", [("token", "k2", 1.0), ("sequence", "k3", 0.8), ("constant", "k2", 1.0)])
def test_a_step_is_what_the_design_says(folders, rollouts, aggregation, kl, temperature):
    cfg = make_config(train__aggregation=aggregation, train__kl=kl, train__kl_coef=0.02, train__entropy_coef=0.05,
                      train__dual_clip=1.2, rollout__temperature=temperature, train__tokens_per_microbatch=70)
    model, reference = load(folders[0]), load(folders[1], trainable=False)
    groups = as_groups(rollouts, temperature)
    figures, grads, _ = step(model, groups, cfg, reference)
    plain, plain_ref = plain_decoder(model), plain_decoder(reference)
    loss = by_hand(plain, plain_ref, groups, cfg.train, cfg.rollout.max_new_tokens, temperature)
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-9)
    want = {n: p.grad for n, p in plain.named_parameters()}
    same(grads, want)
    assert figures["grad_norm"] == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in want.values())), rel=1e-9)


def plain_decoder(model):
    """The same weights in a decoder without FSDP."""
    out = Decoder(model.shape).double()
    out.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
    return out


def test_failed_answers_leave_no_trace(folders, rollouts):
    """A failed answer is in no denominator and no gradient, whatever it holds; NaN does not leak."""
    cfg = make_config(train__kl_coef=0.1, train__entropy_coef=0.1)
    model, reference = load(folders[0]), load(folders[1], trainable=False)
    groups, other = as_groups(rollouts[:4]), as_groups(rollouts[:4])
    other[2].answers[1] = rollout.Answer([1] * 40, [-3.0] * 40, "length", 1.0, 1.0)
    (figures, grads, batch), (figures2, grads2, batch2) = (step(model, g, cfg, reference) for g in (groups, other))
    valid = [a for g in groups for a, r in zip(g.answers, g.rewards) if not math.isnan(r)]
    assert len(valid) == 15 == batch.answers == batch2.answers
    assert batch.tokens == batch2.tokens == sum(len(a.tokens) for a in valid) == figures["trained_tokens"]
    same(grads, grads2, rtol=0, atol=0)
    assert all(g.isfinite().all() for g in grads.values())
    assert all(v is None or math.isfinite(v) for v in figures.values()) and figures["loss"] == figures2["loss"]


def test_groups_without_advantages_are_skipped_exactly(folders, rollouts, monkeypatch):
    """Not computed without KL and entropy, the result is that of computing them, and they count in the denominator."""
    cfg = make_config()
    model, groups = load(folders[0]), as_groups(rollouts[:3])
    figures, grads, batch = step(model, groups, cfg)
    assert batch.skipped == 1 and figures["skipped_groups"] == pytest.approx(1 / 3)
    assert {b for p in batch.packed for b, _ in p.index} == {0, 2}
    assert batch.tokens == sum(len(a.tokens) for g in groups for a, r in zip(g.answers, g.rewards) if r == r)
    cfg.train.entropy_coef = 1e-300  # computes everything, adds nothing
    _, computed, batch_all = step(model, groups, cfg)
    assert {b for p in batch_all.packed for b, _ in p.index} == {0, 1, 2} and batch_all.tokens == batch.tokens
    same(grads, computed)


def test_a_step_of_skipped_groups_runs(folders, rollouts):
    model = load(folders[0])
    for groups in (as_groups([rollouts[1]]), as_groups([rollouts[5]]), as_groups([rollouts[1], rollouts[5]])):
        figures, grads, batch = step(model, groups, make_config())
        assert batch.skipped == len(groups) and figures["skipped_groups"] == 1 and figures["finite"]
        assert figures["grad_norm"] == 0 and figures["loss"] == 0 and all((g == 0).all() for g in grads.values())
        json.dumps(figures, allow_nan=False)
        # Nothing was computed, so there is nothing to say: 0 would read as a collapsed entropy, a ratio of 0.
        assert figures["ratio"] is None and figures["entropy"] is None and figures["gap_max"] is None
    figures, _, batch = step(model, as_groups([rollouts[5]]), make_config(train__entropy_coef=0.1))  # nothing valid at all
    assert figures["grad_norm"] == 0 and figures["finite"]


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.95}, {"temperature": 0}])
def test_another_sampling_distribution_is_refused(rollouts, change):
    groups = as_groups(rollouts[:2])
    answer = groups[1].answers[3]
    groups[1].answers[3] = SimpleNamespace(**vars(answer) | change)
    with pytest.raises(ValueError, match="temperature"):
        prepare(groups, make_config(), 0, 1, torch.device("cpu"))
    groups[1].answers[3] = answer
    with pytest.raises(ValueError, match="temperature"):
        prepare(groups, make_config(rollout__temperature=0.9), 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_one_step_per_sync_has_ratio_one(folders, rollouts, loss):
    """old is then the current log-prob: the sampler's own differ by rounding, and no clip may act on that."""
    model = load(folders[0])
    figures, grads, _ = step(model, as_groups(rollouts), make_config(train__loss=loss, train__steps_per_sync=1))
    assert figures["ratio"] == 1.0 and figures["clip_share"] == 0.0 and figures["grad_norm"] > 0
    figures, _, _ = step(model, as_groups(rollouts), make_config(train__loss=loss))  # against the sampler's: clips
    assert figures["ratio"] != 1.0 and figures["clip_share"] > 0 and figures["gap_max"] > 0.1
    off, _, _ = step(model, as_groups(rollouts), make_config(train__loss=loss), on_policy=False)
    assert off["gap_mean"] is None and off["gap_max"] is None  # the gap means something at the rollout's weights only


def test_importance_weight(folders, rollouts):
    """tis_cap multiplies each token's loss by min(pi_trainer / pi_sampler, cap), both at the rollout's weights."""
    model, groups = load(folders[0]), as_groups(rollouts[:1])
    plain = plain_decoder(model)
    adv = train_grpo.advantages(torch.tensor([groups[0].rewards], dtype=torch.float64))[0].tolist()
    tokens = sum(len(a.tokens) for a in groups[0].answers)
    want, weights = 0.0, []
    for a, value in zip(groups[0].answers, adv):
        logp = alone(plain, groups[0].prompt, a.tokens, 1.0)[0]
        weight = (logp.detach() - torch.tensor(a.logprobs, dtype=torch.float64)).exp()
        weights += weight.tolist()
        want = want - (weight.clamp(max=1.1) * (logp - logp.detach()).exp() * value).sum() / tokens
    want.backward()
    assert min(weights) < 1.1 < max(weights)
    for steps_per_sync in (1, 2):
        cfg = make_config(train__tis_cap=1.1, train__steps_per_sync=steps_per_sync)
        figures, grads, _ = step(model, groups, cfg)
        same(grads, {n: p.grad for n, p in plain.named_parameters()})


def test_gradient_clipping(folders, rollouts):
    model, groups = load(folders[0]), as_groups(rollouts)
    free, grads, _ = step(model, groups, make_config())
    cut, cut_grads, _ = step(model, groups, make_config(train__grad_clip=free["grad_norm"] / 4))
    assert cut["grad_norm"] == pytest.approx(free["grad_norm"])  # the norm logged is the one before clipping
    same(cut_grads, {n: g / 4 for n, g in grads.items()}, rtol=1e-4)


@pytest.mark.parametrize("compute, master", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                             (torch.float64, torch.float64)])
def test_master_weights_are_at_least_float32(folders, rollouts, compute, master):
    parallel.start()
    model = parallel.load_sharded(folders[0], torch.device("cpu"), compute)
    step(model, as_groups(rollouts[:1]), make_config())
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {master}
    frozen = parallel.load_sharded(folders[0], torch.device("cpu"), compute, trainable=False)
    assert {p.dtype for p in frozen.parameters()} == {compute} and not any(p.requires_grad for p in frozen.parameters())


# ------------------------------------------------------------------------------------------------------ one rank or two

COMBOS = {  # name: (config, with a reference model)
    "grpo": (dict(train__dual_clip=1.2, train__grad_clip=0.05, train__tokens_per_microbatch=30), False),
    "gspo": (dict(train__loss="gspo", train__clip_low=0.1, train__clip_high=0.1, train__aggregation="constant",
                  train__entropy_coef=0.02, train__tokens_per_microbatch=25), False),
    "cispo_kl": (dict(train__loss="cispo", train__aggregation="sequence", train__kl_coef=0.1, train__kl="k3",
                      train__entropy_coef=0.05, train__tokens_per_microbatch=30), True),
    "tis": (dict(train__tis_cap=1.1, train__tokens_per_microbatch=30), False),
}
STEPS = [slice(0, 3), slice(3, 6), slice(6, 9)]


def three_steps(name, folders, rollouts, rank, world):
    """-> ({tensor: value}, {figures of each step, micro-batches of this rank}, model, optimizer)."""
    how, with_reference = COMBOS[name]
    cfg = make_config(**how)
    model = load(folders[0])
    reference = load(folders[1], trainable=False) if with_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoint.fresh_moments(model, optimizer)
    tensors, figures, counts, groups = {}, [], [], as_groups(rollouts)
    for i, s in enumerate(STEPS):
        out, grads, batch = step(model, groups[s], cfg, reference, optimizer, rank, world, on_policy=i == 0)
        tensors |= {f"grad{i}:{n}": g for n, g in grads.items()}
        figures.append(out)
        counts.append(sum(bool(p.index) for p in batch.packed))
    tensors |= {f"weight:{n}": whole(p) for n, p in model.named_parameters()}
    tensors |= {f"moment:{n}": whole(optimizer.state[p]["exp_avg_sq"]) for n, p in model.named_parameters()}
    return tensors, dict(figures=figures, counts=counts), model, optimizer


def main():
    """What each rank of `two_ranks` runs: every combination, its results written as soon as it is done."""
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world, _ = parallel.start()
    out = Path(job["out"])
    for name in COMBOS:
        tensors, figures, model, optimizer = three_steps(name, job["folders"], job["rollouts"], rank, world)
        if name == "grpo":
            checkpoint.save(out / "checkpoints", 3, model, optimizer, {"bad_steps": 1}, 2)
        if rank == 0:
            torch.save(tensors, out / f"{name}.pt")
        write_json(out / f"{name}_{rank}.json", figures)
    torch.distributed.destroy_process_group()


def torchrun(*args, **how):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, args)],
                            cwd=REPO, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)


def kill_tree(process):
    """SIGKILL to a torchrun and all its ranks (which it starts in sessions of their own), all stopped first."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for pid in family:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:
                pass
    process.communicate()
    return family


@pytest.fixture(scope="module")
def two_ranks(folders, rollouts, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    (out / "job.json").write_text(json.dumps(dict(folders=[str(f) for f in folders], rollouts=rollouts, out=str(out))))
    process = torchrun(__file__, out / "job.json")
    try:
        log = process.communicate(timeout=40)[0]
    except subprocess.TimeoutExpired:  # ranks whose collectives do not pair up wait for ever
        kill_tree(process)
        log = "the two ranks hung"
    return out, log


@pytest.mark.parametrize("name", list(COMBOS))
def test_two_ranks_equal_one(two_ranks, folders, rollouts, name):
    """Three steps on fixed rollouts: gradients, their norm, the figures and the weights, with micro-batches that the two
    ranks do not have in equal number."""
    out, log = two_ranks
    assert (out / f"{name}_0.json").is_file() and (out / f"{name}_1.json").is_file(), log[-2000:]
    ranks = [json.loads((out / f"{name}_{r}.json").read_text()) for r in (0, 1)]
    assert ranks[0]["figures"] == ranks[1]["figures"]
    assert any(a != b for a, b in zip(ranks[0]["counts"], ranks[1]["counts"])), "no unequal counts: the case shows nothing"
    one, figures, _, _ = three_steps(name, folders, rollouts, 0, 1)
    for got, want in zip(ranks[0]["figures"], figures["figures"]):
        assert got.keys() == want.keys()
        for k in got:
            assert got[k] == want[k] or got[k] == pytest.approx(want[k], rel=1e-9, abs=1e-12), k
    two = torch.load(out / f"{name}.pt", weights_only=True)
    same(two, one, rtol=1e-7, atol=1e-10)
    assert any((whole(p) - one[f"weight:{n}"]).abs().max() > 1e-3 for n, p in load(folders[0]).named_parameters())


def test_checkpoint_of_two_ranks_read_by_one(two_ranks, folders):
    out, log = two_ranks
    path = out / "checkpoints" / "step_000003"
    assert path.is_dir(), log[-2000:]
    model = load(folders[1])  # other weights: everything has to come from the checkpoint
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = checkpoint.load(path, model, optimizer)
    assert state["step"] == 3 and state["updates"] == 3 and state["bad_steps"] == 1
    files = [load_file(path / f"rank_{r:05d}.safetensors") for r in (0, 1)]
    written = torch.load(out / "grpo.pt", weights_only=True)
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        assert float(moments["step"]) == 3
        for key, tensor in ((name, p), (f"{name}:exp_avg", moments["exp_avg"]), (f"{name}:exp_avg_sq", moments["exp_avg_sq"])):
            assert torch.equal(whole(tensor), torch.cat([f[key] for f in files])), key
            assert all(f[key].numel() < tensor.numel() for f in files), key  # really shared out
        assert torch.equal(whole(p), written[f"weight:{name}"])
        assert torch.equal(whole(moments["exp_avg_sq"]), written[f"moment:{name}"])


# -------------------------------------------------------------------------------------------------------- the whole loop

LEXICON = dict(goal="g", yes=["yes"], no=["no"], openers=[], generic_questions=["else"],
               attributes=dict(duration=dict(asks=["how long"], values={"two": ["two"]})),
               complaints=dict(cough=dict(cues=["cough"], attributes=["duration"])))


def make_world(folder, checkpoint_folder, **changed):
    """A run with turns under `folder` -> path of its config. changed: dotted keys with __ for the dot."""
    run = folder / "run"
    (run / "turns").mkdir(parents=True)
    for name, n in (("train", 20), ("eval", 3)):
        rows = [dict(turn_id=f"{i}_0", session_id=str(i), goal="g", context=[dict(role="user", content="cough " * (1 + i % 4))],
                     expert="How long?", target=["duration: two"] if i % 3 else [], decision="continue" if i % 3 else "stop")
                for i in range(n)]
        (run / "turns" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompt.md").write_text("{goal}")
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(LEXICON))
    flat = {"run_dir": str(run), "model.path": str(checkpoint_folder), "data.lexicon": str(folder / "lexicon.yaml"),
            "data.prompt": str(folder / "prompt.md"), "data.prompt_no_stop": str(folder / "prompt.md"),
            "rollout.samples": 4, "rollout.max_new_tokens": 8, "rollout.max_prompt_tokens": 200, "eval.samples": 1,
            "train.lr": 1e-3, "train.prompts_per_step": 4, "train.steps_per_sync": 2, "train.steps": 4,
            "train.checkpoint_every": 2, "train.eval_every": None, "train.tokens_per_microbatch": 250}
    flat |= {k.replace("__", "."): v for k, v in changed.items()}
    tree = {}
    for name, value in flat.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def marks_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model, made to write "?" often: rewards then differ within a group (Omega counts questions)."""
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("marks") / "base"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("?") - 33] *= 2.5  # the byte-level alphabet starts at "!"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(monkeypatch, config_path, *overrides):
    """train_grpo.main() in this process, one rank. -> its metrics lines."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", str(config_path), *overrides])
    train_grpo.main()
    return metrics(config_path)


def metrics(config_path):
    return [json.loads(line) for line in (config_path.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def exported(config_path):
    return load_file(config_path.parent / "run" / "export" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def grouped_by(lines, key):
    return [m[key] for m in lines if m["step"]]


KEYS = {"step", "epoch", "lr", "reward", "wa", "wa_gh", "wc", "ws", "aa", "fc", "tr", "wa_all", "n", "failed", "top_share",
        "distinct", "length", "cut_off", "loss", "trained_tokens", "ratio", "clip_share", "entropy", "gap_mean", "gap_max",
        "grad_norm", "finite", "skipped_groups", "rollout_s", "grade_s", "train_s"}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_clipping_acts_off_policy_and_only_there(monkeypatch, tmp_path, marks_checkpoint, loss):
    path = make_world(tmp_path, marks_checkpoint, train__loss=loss, train__lr=0.03, train__entropy_coef=0.01, train__steps=8)
    lines = train(monkeypatch, path)
    on, off = grouped_by(lines, "clip_share")[::2], grouped_by(lines, "clip_share")[1::2]
    assert sum(x > 0 for x in off) >= 2 and all(abs(r - 1) > 1e-4 for r in grouped_by(lines, "ratio")[1::2])
    if loss != "gspo":  # at the rollout's weights the ratio is 1 but for rounding, which GSPO's narrow clip may just see
        assert all(x == 0 for x in on)
    assert all(m["gap_max"] is not None and m["gap_max"] < 1e-4 for m in lines[::2])
    shutil.copytree(tmp_path / "run" / "turns", tmp_path / "other" / "turns")
    train(monkeypatch, path, "train.steps_per_sync=1", f"run_dir={tmp_path / 'other'}")
    lines = [json.loads(x) for x in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert grouped_by(lines, "ratio") == [1.0] * 8 and grouped_by(lines, "clip_share") == [0.0] * 8
    assert all(m["gap_max"] is not None for m in lines)


def test_longer_runs_keys_and_kept_checkpoints(monkeypatch, tmp_path, marks_checkpoint):
    """4 steps, then 8 by train.steps=8, is 8 steps on the same turns; the folder says what the README says."""
    seen, sample = [], rollout.sample_graded

    def recorded(model, tokenizer, turns, prompts, keys, *rest, **how):
        seen.extend((key, turn["turn_id"]) for key, turn in zip(keys, turns) if key[0] == 0)  # 1: evaluation
        return sample(model, tokenizer, turns, prompts, keys, *rest, **how)

    monkeypatch.setattr(rollout, "sample_graded", recorded)
    short, straight = (make_world(tmp_path / x, marks_checkpoint, train__eval_every=4, train__keep_checkpoints=2) for x in "ab")
    train(monkeypatch, short)
    with open(short.parent / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "half a line')
    (short.parent / "run" / "checkpoints" / ".step_000006.tmp").mkdir()  # a checkpoint that was being written
    (short.parent / "run" / "checkpoints" / "step_000007").mkdir()
    lines = train(monkeypatch, short, "train.steps=8")
    resumed, seen[:] = seen[:], []
    train(monkeypatch, straight, "train.steps=8")
    assert equal(exported(short), exported(straight)) and seen == resumed
    assert len({key for key, _ in seen}) == 32 and len({turn for _, turn in seen[:20]}) == 20  # an epoch is 5 steps
    assert [m["step"] for m in lines] == list(range(9)) and [m["step"] for m in lines if "eval" in m] == [0, 4, 8]
    assert all(set(m) >= KEYS for m in lines[1:])
    kept = sorted(p.name for p in (straight.parent / "run" / "checkpoints").iterdir())
    assert kept == ["step_000006", "step_000008"]
    before = exported(straight)
    assert train(monkeypatch, straight, "train.steps=8") == metrics(straight) and equal(exported(straight), before)
    assert config.load([str(straight.parent / "run" / "config.yaml")]).train.steps == 8


STEPS_2N, EVERY = 36, 6


@pytest.fixture(scope="module")
def two_rank_runs(marks_checkpoint, tmp_path_factory):
    """The same 2N steps on two ranks: uninterrupted, and killed -9 on the way and started again. -> their configs."""
    paths = []
    for name in ("straight", "killed"):
        paths.append(make_world(tmp_path_factory.mktemp(name), marks_checkpoint, train__steps=STEPS_2N, train__entropy_coef=0.01,
                                train__checkpoint_every=EVERY, train__eval_every=12, train__tokens_per_microbatch=120))
    run = torchrun("train_grpo.py", paths[0])
    log = run.communicate(timeout=120)[0]
    assert run.returncode == 0, log[-3000:]
    run = torchrun("train_grpo.py", paths[1])
    written = paths[1].parent / "run" / "metrics.jsonl"
    deadline = time.time() + 60
    while not (written.is_file() and written.read_bytes().count(b"\n") > STEPS_2N // 3 + 1):
        assert run.poll() is None and time.time() < deadline, run.communicate()[0][-3000:]
        time.sleep(0.005)
    assert len(kill_tree(run)) >= 3
    return paths, len(metrics(paths[1]))


def test_kill_and_resume_on_two_ranks(two_rank_runs):
    (straight, killed), written = two_rank_runs
    run = killed.parent / "run"
    assert not (run / "export").exists() and written < STEPS_2N, "it was not killed on the way"
    found = checkpoint.all_checkpoints(run / "checkpoints")
    assert found and (run / "checkpoints" / found[-1].name / "rank_00001.safetensors").is_file()
    again = torchrun("train_grpo.py", killed)
    log = again.communicate(timeout=120)[0]
    assert again.returncode == 0, log[-3000:]
    assert equal(exported(straight), exported(killed))
    timeless = lambda lines: [{k: v for k, v in m.items() if not k.endswith("_s")} for m in lines]
    assert [m["step"] for m in metrics(killed)] == list(range(STEPS_2N + 1))  # each step once
    assert timeless(metrics(killed)) == timeless(metrics(straight))


def test_a_finished_two_rank_run(two_rank_runs, monkeypatch, marks_checkpoint):
    """Its files, and what happens when it is started again, here on one rank."""
    straight = two_rank_runs[0][0]
    lines, before = metrics(straight), exported(straight)
    assert [m["step"] for m in lines] == list(range(STEPS_2N + 1))
    assert set(lines[0]) == {"step", "eval"} and all(set(m) >= KEYS for m in lines[1:])
    assert [m["step"] for m in lines if "eval" in m] == [0, 12, 24, 36]
    assert max(m["grad_norm"] for m in lines[1:]) > 0 and 0 < max(m["clip_share"] for m in lines[1:])
    from transformers import AutoModelForCausalLM, AutoTokenizer
    hf = AutoModelForCausalLM.from_pretrained(straight.parent / "run" / "export")
    assert AutoTokenizer.from_pretrained(straight.parent / "run" / "export").chat_template
    assert torch.equal(hf.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    assert not torch.equal(before["model.embed_tokens.weight"],
                           load_file(marks_checkpoint / "model.safetensors")["model.embed_tokens.weight"])
    monkeypatch.setattr(train_grpo, "train_step", lambda *_: pytest.fail("a finished run trains again"))
    assert train(monkeypatch, straight) == lines and equal(exported(straight), before)


# ------------------------------------------------------------------------------------------------------ bad numbers

def poison(monkeypatch, steps):
    """Make the policy loss NaN in these calls (one micro-batch a step, so calls are steps)."""
    calls = []

    def loss(*args):
        calls.append(0)
        value, figures = train_grpo.grpo_loss(*args)
        return (value * NAN if len(calls) in steps else value), figures

    monkeypatch.setitem(LOSSES, "grpo", loss)


def test_a_step_with_a_bad_gradient_changes_nothing(folders, rollouts, monkeypatch):
    model = load(folders[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoint.fresh_moments(model, optimizer)
    before = {n: whole(p) for n, p in model.named_parameters()}
    poison(monkeypatch, [1])
    out, _, _ = step(model, as_groups(rollouts), make_config(), optimizer=optimizer)
    assert out["finite"] is False and out["grad_norm"] is None
    same({n: whole(p) for n, p in model.named_parameters()}, before, rtol=0, atol=0)
    assert all(float(s["step"]) == 0 and (whole(s["exp_avg"]) == 0).all() for s in optimizer.state.values())
    out, _, _ = step(model, as_groups(rollouts), make_config(), optimizer=optimizer)
    assert out["finite"] and out["grad_norm"] > 0


def test_bad_steps_are_counted_and_the_run_goes_on(monkeypatch, tmp_path, marks_checkpoint):
    path = make_world(tmp_path, marks_checkpoint, train__entropy_coef=0.01, train__tokens_per_microbatch=10_000,
                      train__steps=10, train__lr=1e-2)
    poison(monkeypatch, [2, 3, 4, 5, 7])  # four in a row are forgiven
    lines = train(monkeypatch, path)
    assert [m["step"] for m in lines if not m["finite"]] == [2, 3, 4, 5, 7] and len(lines) == 10
    assert all(m["grad_norm"] is None and m["loss"] is None for m in lines if not m["finite"])
    state = json.loads((path.parent / "run" / "checkpoints" / "step_000010" / "state.json").read_text())
    assert state["bad_steps"] == 0 and state["updates"] == 5


def test_five_bad_steps_in_a_row_end_the_run(monkeypatch, tmp_path, marks_checkpoint, capsys):
    path = make_world(tmp_path, marks_checkpoint, train__entropy_coef=0.01, train__tokens_per_microbatch=10_000, train__steps=12)
    poison(monkeypatch, range(4, 13))
    line = refused(monkeypatch, capsys, path)
    assert "5 steps in a row" in line and "step 8" in line
    assert len(metrics(path)) == 8 and not (path.parent / "run" / "export").exists()


# -------------------------------------------------------------------------------------------------------- bad input

def refused(monkeypatch, capsys, *argv):
    """train_grpo.py with these arguments ends with exit code 2 and one line of error, which is returned."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli(train_grpo.main)
    text = capsys.readouterr().err
    errors = text[text.index("error: "):].splitlines()
    assert end.value.code == 2 and len(errors) == 1 and "Traceback" not in text
    return errors[0]


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, "train_grpo.py", str(tmp_path / "none.yaml")], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: no such config: {tmp_path / 'none.yaml'}\n" and done.stdout == ""


def break_json(path):
    turns = path.parent / "run" / "turns" / "train.jsonl"
    turns.write_text(turns.read_text().replace('"turn_id": "2_0"', '"turn_id": 2_0'))


def rewrite_turns(change):
    def how(path):
        turns = path.parent / "run" / "turns" / "train.jsonl"
        rows = [json.loads(line) for line in turns.read_text().splitlines()]
        turns.write_text("".join(json.dumps(r) + "\n" for r in rows if change(r) is not False))
    return how


def without(*names):
    """A copy of the model folder that lacks these files."""
    def how(path):
        tree = yaml.safe_load(path.read_text())
        folder = path.parent / "lame"
        shutil.copytree(tree["model"]["path"], folder)
        for name in names:
            (folder / name).unlink()
        tree["model"]["path"] = str(folder)
        path.write_text(yaml.safe_dump(tree))
    return how


BAD = {  # name: (what is done to a good run, overrides, what the line must say)
    "yaml": (lambda p: p.write_text("train: {lr: 1\n  x: ["), [], ["run.yaml", "not valid YAML"]),
    "list": (lambda p: p.write_text("- a\n"), [], ["run.yaml", "mapping"]),
    "base of another type": (lambda p: p.write_text("base: [3]\n"), [], ["run.yaml", "base"]),
    "base": (lambda p: p.write_text("base: none.yaml\n"), [], ["none.yaml"]),
    "unknown key": (None, ["train.learning=1"], ["unknown key 'train.learning'"]),
    "nearest key": (None, ["train.step_per_sync=1"], ["did you mean 'train.steps_per_sync'"]),
    "value": (None, ["train.lr=fast"], ["train.lr must be float", "'fast'"]),
    "no turns": (lambda p: (p.parent / "run" / "turns" / "train.jsonl").unlink(), [], ["train.jsonl", "hindsight.py"]),
    "no eval turns": (lambda p: (p.parent / "run" / "turns" / "eval.jsonl").unlink(), ["train.eval_every=2"],
                      ["eval.jsonl", "hindsight.py"]),
    "empty turns": (lambda p: (p.parent / "run" / "turns" / "train.jsonl").write_text("\n"), [], ["train.jsonl", "no turns"]),
    "json": (break_json, [], ["train.jsonl:3:", "JSON"]),
    "decision": (rewrite_turns(lambda r: r.update(decision="go")), [], ["train.jsonl:1:", "'go'"]),
    "lexicon": (None, ["data.lexicon=none.yaml"], ["lexicon none.yaml"]),
    "no lexicon": (None, ["data.lexicon="], ["data.lexicon is not set"]),
    "prompt": (None, ["data.prompt=none.md"], ["none.md"]),
    "model folder": (None, ["model.path=/none/such"], ["model.path", "/none/such"]),
    "tokenizer": (without("tokenizer.json", "tokenizer_config.json"), [], ["model.path", "tokenizer", "lame"]),
    "weights": (without("model.safetensors"), [], ["model.path", "lame", "safetensors"]),
    "long prompts": (None, ["rollout.max_prompt_tokens=50"], ["5 of 20 prompts", "longer than rollout.max_prompt_tokens=50", "data.long_prompts=drop"]),
    "all too long": (None, ["rollout.max_prompt_tokens=5", "data.long_prompts=drop"], ["20 of 20 prompts"]),
    "too few turns": (None, ["train.steps=null", "train.epochs=1", "train.prompts_per_step=21"], ["train.prompts_per_step=21"]),
    "no continue turns": (rewrite_turns(lambda r: r["decision"] == "stop"), ["reward.mode=no_rs"], ["no_rs", "continue"]),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    path = make_world(tmp_path, tiny_checkpoint)
    spoil, overrides, say = BAD[name]
    if spoil:
        spoil(path)
    line = refused(monkeypatch, capsys, path, *overrides)
    assert all(text in line for text in say), line


def test_long_prompts_can_be_dropped(monkeypatch, tmp_path, tiny_checkpoint):
    path = make_world(tmp_path, tiny_checkpoint, data__long_prompts="drop", rollout__max_prompt_tokens=44, train__steps=2)
    lines = train(monkeypatch, path)  # the prompts of three and four coughs are too long: 10 turns are left
    assert lines[-1]["epoch"] == pytest.approx(8 / 10)


# ------------------------------------------------------------------------------------------- run_dir of another config

OTHER = {"float": lambda v: (v or 0.5) * 1.5, "int": lambda v: (v or 1) + 1, "bool": lambda v: not v, "str": lambda v: v + "x"}


@pytest.mark.parametrize("name", [n for n in config.FIELDS if n != "run_dir"])
def test_run_dir_of_another_config(name, tmp_path):
    """Only what cannot bend the run may differ, and the line names the key, both values and the way out."""
    asks = {"grader": {"reward.grader": "llm"}, "extractor": {"hindsight.source": "llm"}, "writer": {"train.loss": "dpo"}}
    role = name.split(".")[1] if name.startswith("llm.") else None
    cfg = config.build({"run_dir": str(tmp_path), "model.path": "m", **asks.get(role, {})})
    checkpoint.open_run(cfg, 0)
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint.open_run(cfg, 0)  # the same once more
    *sections, leaf = name.split(".")
    owner, field = functools.reduce(getattr, sections, cfg), config.FIELDS[name]
    old = getattr(owner, leaf)
    new = next((c for c in field.metadata["choices"] or () if c != old), None)
    if new is None:
        new = old[::-1] + [0.5] if isinstance(old, list) else None
    if new is None:
        kind = type(old).__name__ if old is not None else ("int" if "int" in str(field.type) else "float")
        new = OTHER[kind](old)
    if isinstance(new, list) and leaf == "betas":
        new = [0.8, 0.9]
    if isinstance(new, list) and leaf == "generic":
        new = ["other"]
    setattr(owner, leaf, new)
    free = {"train.steps", "train.epochs", "train.checkpoint_every", "train.keep_checkpoints", "train.eval_every",
            "train.tokens_per_microbatch", "train.activation_checkpointing", "train.compile", "rollout.max_rows", "reward.max_failed",
            "plan", "gpus", "gpu_gib"}
    own = (".source", ".model", ".prompt", ".temperature", ".max_tokens")  # which model it is, where this run's data depend on it
    if name in free or name.startswith(("eval.", "wandb.")) or name.startswith("llm.") and not name.endswith(own):
        checkpoint.open_run(cfg, 0)
        return
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
        checkpoint.open_run(cfg, 0)
    assert repr(old) in str(error.value) and repr(new) in str(error.value) and str(tmp_path) in str(error.value)


def test_a_run_that_never_started_holds_no_one_to_its_config(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    """A typo found at start can be mended in place: nothing was trained, and removing run_dir would remove the turns."""
    path = make_world(tmp_path, tiny_checkpoint, train__steps=2)
    refused(monkeypatch, capsys, path, "model.path=/none/such")
    assert len(train(monkeypatch, path)) == 2


def test_what_turns_and_prompts_are_trained_on(tmp_path, tiny_checkpoint, tiny_tokenizer):
    """reward.mode no_rs: continue turns only, with the prompt without stopping; evaluation always with the other."""
    path = make_world(tmp_path, tiny_checkpoint, train__eval_every=2)
    (tmp_path / "no_stop.md").write_text("Never stop. {goal}")
    shutil.copy(tmp_path / "run" / "turns" / "train.jsonl", tmp_path / "run" / "turns" / "valid.jsonl")
    base = [str(path), f"data.prompt_no_stop={tmp_path / 'no_stop.md'}"]

    def read(*more):
        cfg = config.load([*base, *more])
        return training.training_turns(cfg, tiny_tokenizer), training.held_out_turns(cfg, tiny_tokenizer)

    (turns, prompts), (held, held_prompts) = read()
    assert len(turns) == 20 and len(held) == 3 and not any("Never stop" in tiny_tokenizer.decode(p) for p in prompts + held_prompts)
    (turns, prompts), (held, held_prompts) = read("reward.mode=no_rs")
    assert {t["decision"] for t in turns} == {"continue"} and all("Never stop" in tiny_tokenizer.decode(p) for p in prompts)
    assert len(held) == 3 and not any("Never stop" in tiny_tokenizer.decode(p) for p in held_prompts)
    assert len(read("data.valid_sessions=5")[1][0]) == 20  # the validation turns in place of the held-out ones
    assert read("train.eval_every=null")[1] is None


# ---------------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
def test_cuda_one_fsdp_step_equals_the_cpus(one_rank, folders, rollouts):
    """bfloat16 under FSDP2 on one GPU against float64 on the CPU: the figures and the direction of the gradient; AdamW, fused, moves
    the weights, and a checkpoint's moments and step can be made and read on the device."""
    groups, cfg = as_groups(rollouts), make_config(train__entropy_coef=0.05, train__tokens_per_microbatch=60, train__steps_per_sync=1)
    exact = decoder.load(folders[0], "cpu", torch.float64).requires_grad_(True)
    want, grads, _ = step(exact, groups, cfg)
    model = parallel.load_sharded(folders[0], one_rank, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    checkpoint.fresh_moments(model, optimizer)
    batch, before = prepare(groups, cfg, 0, 1, one_rank), {n: whole(p) for n, p in model.named_parameters()}
    got = train_step(SimpleNamespace(model=model, optimizer=optimizer, cfg=cfg, device=one_rank), None, batch, True)
    assert got["finite"] and got["loss"] == pytest.approx(want["loss"], rel=0.05, abs=1e-3)
    assert got["entropy"] == pytest.approx(want["entropy"], rel=0.05) and got["trained_tokens"] == want["trained_tokens"]
    for name, p in model.named_parameters():
        a, b = whole(p.grad).double().cpu().flatten(), grads[name].flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98, name
        assert not torch.equal(whole(p), before[name]), name
        assert optimizer.state[p]["step"].is_cuda and int(optimizer.state[p]["step"]) == 1


if __name__ == "__main__":
    main()
