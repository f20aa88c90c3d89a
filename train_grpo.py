"""Policy optimisation of Learn-to-Ask (arXiv 2510.25441): GRPO, CISPO and GSPO on hindsight turns.

    torchrun --nproc_per_node=8 train_grpo.py configs/table1/7b/grpo.yaml [key=value ...]   (python train_grpo.py: one process)

Each phase samples G answers to the prompts of the next `steps_per_sync` steps from the current weights, grades them
against the turns' (I*, s*), and takes one optimizer step on each step's prompts. With steps_per_sync > 1 the later steps
are off-policy, which is where the three losses part; with steps_per_sync = 1 the ratio is exactly 1, no clip ever acts,
and they differ by aggregation alone. The reference release syncs every 10 steps, and so do the Table 1 presets.

To change the loss, change the function; to add one, write name_loss beside the others and set train.loss: name.
Departures: old log-probs are the sampler's own (no second pass); groups whose advantages are all zero are not computed
where nothing else (KL, entropy) needs them, but their tokens still count in the denominator.

Letters: B groups, G samples, M answer tokens of a micro-batch, S its answers, V vocabulary.
"""
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import eval as evaluation
import llm
import pack
import parallel
import rollout
import training
from data import InputError, cli


# ----------------------------------------------------------------------------------------------- advantages and losses

def advantages(rewards, mode="std"):
    """Group-relative advantages. rewards [B, G], NaN where grading failed -> [B, G].

    (R - mean) / (std + 1e-6) within the group, sample std (DeepSeekMath, arXiv 2402.03300); mode "mean": centred only
    (Dr.GRPO, arXiv 2503.20783). A failed grading gets 0 and stays out of its group's mean and std; a group with fewer
    than two valid rewards gets 0 throughout.

    >>> advantages(torch.tensor([[1.0, 3.0, float("nan")], [2.0, 2.0, 2.0]]), "mean")
    tensor([[-1.,  1.,  0.],
            [ 0.,  0.,  0.]])
    """
    valid = ~rewards.isnan()  # [B, G]
    n = valid.sum(1, keepdim=True)
    mean = rewards.nansum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid, rewards - mean, 0.0)
    if mode == "std":
        std = (centred.pow(2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-6)
    low, high = rewards.nan_to_num(torch.inf).amin(1, keepdim=True), rewards.nan_to_num(-torch.inf).amax(1, keepdim=True)
    return torch.where(low < high, centred, 0.0)  # equal rewards teach nothing: exactly 0, not the mean's rounding error


def ratio(logp, old):
    """pi / pi_old; the log-ratio is clamped before exp so that it cannot overflow."""
    return (logp - old).clamp(-20.0, 20.0).exp()


# A loss takes logp, old, adv [M] (one advantage per answer, repeated over its tokens), seq [M] (which answer each token
# belongs to) and the train config; it returns the per-token loss [M] and per-token figures to log [M].

def clipped_surrogate(r, adv, t):
    """-min(r A, clip(r, 1 - low, 1 + high) A), and where the clip took the gradient away."""
    loss = -torch.minimum(r * adv, r.clamp(1 - t.clip_low, 1 + t.clip_high) * adv)
    return loss, ((adv > 0) & (r > 1 + t.clip_high)) | ((adv < 0) & (r < 1 - t.clip_low))


def grpo_loss(logp, old, adv, seq, t):
    """-min(r A, clip(r, 1 - low, 1 + high) A), optionally bounded by c A where A < 0 (dual clip, arXiv 1912.09729)."""
    r = ratio(logp, old)
    loss, clipped = clipped_surrogate(r, adv, t)
    if t.dual_clip:
        clipped = clipped | ((adv < 0) & (r > t.dual_clip))
        loss = torch.where(adv < 0, torch.minimum(loss, -t.dual_clip * adv), loss)
    return loss, {"ratio": r, "clip_share": clipped}


def cispo_loss(logp, old, adv, seq, t):
    """-stopgrad(clip(r, floor, cap)) A log pi (MiniMax-M1, arXiv 2506.13585): every token keeps its gradient."""
    r = ratio(logp, old).detach()
    loss = -r.clamp(t.is_floor, t.is_cap) * adv * logp
    clipped = (r > t.is_cap) | (r < t.is_floor)
    if t.cispo_drop:
        loss = torch.where((adv > 0) & (r > t.is_cap), 0.0, loss)
    return loss, {"ratio": r, "clip_share": clipped}


def gspo_loss(logp, old, adv, seq, t):
    """-min(s A, clip(s, 1 - low, 1 + high) A) with s = exp(mean over the answer of logp - old) (arXiv 2507.18071)."""
    s = ratio(sequence_mean(logp - old, seq), 0.0)[seq]
    loss, clipped = clipped_surrogate(s, adv, t)
    return loss, {"ratio": s, "clip_share": clipped}


LOSSES = {name[:-5]: f for name, f in globals().items() if name.endswith("_loss")}  # train.loss: x is the function x_loss


def kl_estimate(logp, ref, kind):
    """KL(policy || reference) per token: k2 = (logp - ref)^2 / 2, whose gradient is the KL's; k3 = e^-d - 1 + d (GRPO's)."""
    d = logp - ref
    return d.pow(2) / 2 if kind == "k2" else (-d).clamp(-20.0, 20.0).exp() - 1 + d


def sequence_mean(x, seq):
    """x [M], seq [M] -> mean over each answer's tokens [S] (every answer has at least one token)."""
    total = x.new_zeros(int(seq.max()) + 1).index_add(0, seq, x)
    return total / seq.bincount()


def aggregate(loss, seq, mode, tokens, answers, length):
    """Per-token losses [M] -> this micro-batch's share of the step's loss.

    tokens, answers: the GLOBAL counts of the optimizer step, over all micro-batches and ranks, so shares simply add up.
    token: sum / tokens; sequence: sum of per-answer means / answers; constant: sum / (answers * length) (Dr.GRPO).
    """
    if mode == "token":
        return loss.sum() / tokens
    if mode == "sequence":
        return sequence_mean(loss, seq).sum() / answers
    return loss.sum() / (answers * length)


# ------------------------------------------------------------------------------------------------- one optimizer step

@dataclass
class Group:
    """One prompt of a step with its sampled answers and their rewards (NaN: grading failed)."""
    prompt: list
    answers: list  # rollout.Answer
    rewards: list


@dataclass
class Batch:
    """What a step trains on: packed micro-batches of this rank and what goes with each answer token."""
    packed: list  # pack.Packed
    old: list  # [M] each: log-probs the ratio is taken against
    sampled: list  # [M] each: log-probs the sampler recorded
    adv: list  # [M] each
    tokens: int  # global denominators
    answers: int
    skipped: int  # groups not computed, their advantages all zero
    groups: int


def prepare(groups, cfg, rank, world, device, dtype=torch.float32):
    """Advantages, denominators, and this rank's share of the groups, packed. The same call on every rank."""
    t, need_all = cfg.train, cfg.train.kl_coef > 0 or cfg.train.entropy_coef > 0
    adv = advantages(torch.tensor([g.rewards for g in groups], dtype=torch.float64), t.advantage).tolist()
    trees, tokens, answers, skipped = [], 0, 0, 0
    for b, group in enumerate(groups):
        for a in group.answers:
            if a.temperature != cfg.rollout.temperature or a.top_p != 1.0:
                raise ValueError(f"answers sampled at temperature {a.temperature}, top_p {a.top_p} cannot be trained on: the "
                                 f"loss scores temperature {cfg.rollout.temperature}, top_p 1")
        valid = [g for g, r in enumerate(group.rewards) if not math.isnan(r)]
        tokens += sum(len(group.answers[g].tokens) for g in valid)
        answers += len(valid)
        if valid and (need_all or any(adv[b][g] for g in valid)):
            trees.append(pack.Tree(group.prompt, [group.answers[g].tokens for g in valid], [(b, g) for g in valid]))
        else:
            skipped += 1
    parts = [part for tree in trees for part in pack.split_tree(tree, t.tokens_per_microbatch)]
    packed = [pack.pack(bin, device) for bin in pack.balance(parts, world, t.tokens_per_microbatch)[rank]]

    def per_token(values):  # one list of values per answer, or one value per answer -> [M]
        return [torch.tensor([v for b, g in p.index for v in values(b, g)] or [0.0], device=device, dtype=dtype) for p in packed]

    sampled = per_token(lambda b, g: groups[b].answers[g].logprobs)
    per_answer = per_token(lambda b, g: [adv[b][g]] * len(groups[b].answers[g].tokens))
    return Batch(packed, list(sampled), sampled, per_answer, max(tokens, 1), max(answers, 1), skipped, len(groups))


def train_step(run, reference, batch, on_policy):
    """One optimizer step on this rank's micro-batches. -> dict of global figures (sums over all tokens of the step).

    on_policy: no step was taken since the rollout; then old is the detached current log-prob where a sync brings a single
    step (the ratio is exactly 1), and the sampler/trainer gap is measured.
    """
    model, cfg, t = run.model, run.cfg, run.cfg.train
    sums, worst = defaultdict(float), 0.0
    run.optimizer.zero_grad(set_to_none=True)
    for packed, old, sampled, adv in zip(batch.packed, batch.old, batch.sampled, batch.adv):
        logp, entropy = pack.logprobs(model, packed, cfg.rollout.temperature, entropy=t.entropy_coef > 0)
        if not packed.index:  # a dummy keeps FSDP's collectives paired
            if reference is not None:
                with torch.no_grad():
                    pack.logprobs(reference, packed, cfg.rollout.temperature)
            (logp.sum() * 0.0).backward()
            continue
        if t.steps_per_sync == 1:
            old = logp.detach()
        loss, figures = LOSSES[t.loss](logp, old, adv, packed.seq, t)
        if t.tis_cap:  # what the sampler drew from differs from what the trainer computes: importance weight, truncated
            loss = loss * ratio(old, sampled).clamp(max=t.tis_cap)
        if reference is not None:
            with torch.no_grad():
                ref, _ = pack.logprobs(reference, packed, cfg.rollout.temperature)
            loss = loss + t.kl_coef * kl_estimate(logp, ref, t.kl)
            figures["kl"] = logp - ref  # k1: unbiased as a figure, useless as a loss
        if t.entropy_coef:
            loss = loss - t.entropy_coef * entropy
        loss = aggregate(loss, packed.seq, t.aggregation, batch.tokens, batch.answers, cfg.rollout.max_new_tokens)
        loss.backward()
        with torch.no_grad():
            gap = (logp - sampled).abs()
            worst = max(worst, gap.max().item())
            sums["loss"] += loss.item()
            sums["trained_tokens"] += len(logp)
            for name, value in {**figures, "entropy": entropy, "gap": gap}.items():
                sums[name] += value.sum().item()

    stepped = training.optimizer_step(run)
    names = ["loss", "trained_tokens", "ratio", "clip_share", "entropy", "gap"] + ["kl"] * (reference is not None)
    total = dict(zip(names, parallel.all_sum([sums[n] for n in names], run.device)))
    n = total["trained_tokens"]
    out = {k: v if k in ("loss", "trained_tokens") else v / n if n else None for k, v in total.items()}
    gap = out.pop("gap")  # only before the first step after a rollout do both sides have the same weights
    return {**out, "gap_mean": gap if on_policy else None, "gap_max": max(parallel.all_gather(worst)) if on_policy and n else None,
            **stepped, "skipped_groups": batch.skipped / batch.groups}


# ------------------------------------------------------------------------------------------------------------ the loop

def rescore(model, batches, cfg):
    """Old log-probs as the trainer computes them, at the weights the rollouts came from (for the importance weight)."""
    with torch.no_grad():
        for batch in batches:
            batch.old = [pack.logprobs(model, p, cfg.rollout.temperature)[0] for p in batch.packed]
    model.reshard()  # FSDP keeps the root gathered after a forward without a backward


def figures_of(graded, groups):
    """What a step's rollouts looked like: mean training reward, the seven metrics, lengths."""
    flat = [g for records in graded for g in records]
    answers = [a for g in groups for a in g.answers]
    rewards = [g["reward"] for g in flat if g["reward"] is not None]
    return {"reward": sum(rewards) / len(rewards) if rewards else None, **evaluation.metrics(flat),
            "length": sum(len(a.tokens) for a in answers) / len(answers),
            "cut_off": sum(a.finish == "length" for a in answers) / len(answers)}


def main():
    cfg = config.load(sys.argv[1:], __doc__, may_plan=True)
    t = cfg.train
    run = training.start(cfg, "train_grpo.py")
    if t.loss not in LOSSES:
        raise InputError(f"train.loss={t.loss}: train_grpo.py has no function {t.loss}_loss (it has {', '.join(LOSSES)}; sft and "
                         f"dpo are train_sft.py's and train_dpo.py's)")
    turns, prompts = training.training_turns(cfg, run.tokenizer)
    sources = [Path(cfg.run_dir) / "turns" / "train.jsonl", training.policy_prompt(cfg), cfg.data.lexicon]
    training.load(run, len(turns), [s for s in [*sources, run.grader and run.grader.prompt_file] if s])
    reference = parallel.load_sharded(run.folder, run.device, run.dtype, trainable=False) if t.kl_coef else None
    while run.step < run.total:
        # Sample and grade the prompts of the next steps_per_sync steps, all from the same weights.
        steps = min(t.steps_per_sync, run.total - run.step)
        positions = run.positions(steps)
        indices = training.stream(len(turns), positions.start, positions.stop, cfg.seed)
        try:
            answers, graded, phase = rollout.sample_graded(
                run.model, run.tokenizer, [turns[i] for i in indices], [prompts[i] for i in indices], [(0, p) for p in positions],
                cfg, run.lex, run.ends, run.grader, samples=cfg.rollout.samples, temperature=cfg.rollout.temperature, leave=False)
        except llm.Unanswered:  # on all ranks
            if run.step:
                training.save(run)
            raise
        training.check_failed(run, graded)
        groups = [Group(prompts[i], a, [math.nan if g["reward"] is None else g["reward"] for g in records])
                  for i, a, records in zip(indices, answers, graded)]
        of_step = [slice(i * t.prompts_per_step, (i + 1) * t.prompts_per_step) for i in range(steps)]
        batches = [prepare(groups[s], cfg, run.rank, run.world, run.device, torch.promote_types(run.dtype, torch.float32))
                   for s in of_step]
        if t.tis_cap and t.steps_per_sync > 1:
            rescore(run.model, batches, cfg)

        for i, (batch, s) in enumerate(zip(batches, of_step)):
            began = time.perf_counter()
            training.set_lr(run)
            trained = train_step(run, reference, batch, i == 0)
            shared = {k: v if k.startswith("grade_p") else v / steps for k, v in phase.items()}  # by the steps of the phase
            training.end_step(run, {**figures_of(graded[s], groups[s]), **trained, **shared,
                                    "train_s": time.perf_counter() - began}, boundary=i == steps - 1)
    training.finish(run)


if __name__ == "__main__":
    cli(main)
