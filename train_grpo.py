"""Policy optimisation of Learn-to-Ask (arXiv 2510.25441): GRPO, CISPO and GSPO on hindsight turns.

    torchrun --nproc_per_node=8 train_grpo.py configs/table1/7b/grpo.yaml [key=value ...]
    python train_grpo.py ...      (one process)

Each phase samples G responses to the prompts of the next `steps_per_sync` steps from the current weights,
grades them against the turns' (I*, s*), and takes one optimizer step on each step's prompts. With
steps_per_sync > 1 the later steps are off-policy, and there the three losses differ. With steps_per_sync =
1 the ratio is exactly 1, no clip ever acts, and they differ by aggregation alone. The reference release
syncs every 10 steps, and so do the Table 1 presets.

To change the loss, change the function. To add one, write it beside the others and name it in LOSSES.
Departures: old log-probs are the sampler's own (no second pass, but for gspo and tis_cap); groups whose
advantages are all zero are not computed where nothing else (KL, entropy) needs them, but their tokens count
in the denominator.

Letters: B groups, G samples, M response tokens of a micro-batch, S its responses, V vocabulary.
"""
from dataclasses import dataclass

import torch

import grading
import llm
import metrics
import pack
import run as running
from config import Stream
from prompts import turns_file
from records import InputError, cli
from reward import advantages

# ------------------------------------------------------------------------------------------------- the losses

def ratio(logp, old):
    """pi / pi_old; the log-ratio is clamped before exp so that it cannot overflow."""
    return (logp - old).clamp(-20.0, 20.0).exp()


# A loss takes logp, old, adv [M] (one advantage per response, repeated over its tokens), seq [M] (the
# response to which each token belongs) and the train config. It returns the per-token loss [M] and
# per-token figures [M], whose means are logged.

def clipped_surrogate(r, adv, t):
    """-min(r A, clip(r, 1 - low, 1 + high) A), and where the clip took the gradient away."""
    loss = -torch.minimum(r * adv, r.clamp(1 - t.clip_low, 1 + t.clip_high) * adv)
    return loss, ((adv > 0) & (r > 1 + t.clip_high)) | ((adv < 0) & (r < 1 - t.clip_low))


def grpo_loss(logp, old, adv, seq, t):
    """-min(r A, clip(r, 1 - low, 1 + high) A).

    Where A < 0, it is optionally bounded by c A (dual clip, arXiv 1912.09729).
    """
    r = ratio(logp, old)
    loss, clipped = clipped_surrogate(r, adv, t)
    if t.dual_clip:
        clipped = clipped | ((adv < 0) & (r > t.dual_clip))
        loss = torch.where(adv < 0, torch.minimum(loss, -t.dual_clip * adv), loss)
    return loss, {"ratio": r, "clip_share": clipped}


def cispo_loss(logp, old, adv, seq, t):
    """-stopgrad(clip(r, floor, cap)) A log pi (MiniMax-M1, arXiv 2506.13585). No token loses its gradient."""
    r = ratio(logp, old).detach()
    loss = -r.clamp(t.is_floor, t.is_cap) * adv * logp
    clipped = (adv != 0) & ((r > t.is_cap) | (r < t.is_floor))
    if t.cispo_drop:
        loss = torch.where((adv > 0) & (r > t.is_cap), 0.0, loss)
    return loss, {"ratio": r, "clip_share": clipped}


def gspo_loss(logp, old, adv, seq, t):
    """-min(s A, clip(s, 1 - low, 1 + high) A) (arXiv 2507.18071).

    s = exp(mean of logp - old over the response).
    """
    s = ratio(sequence_mean(logp - old, seq), 0.0)[seq]
    loss, clipped = clipped_surrogate(s, adv, t)
    return loss, {"ratio": s, "clip_share": clipped}


LOSSES = {"grpo": grpo_loss, "cispo": cispo_loss, "gspo": gspo_loss}  # by train.loss


def kl_estimate(logp, ref, kind):
    """KL(policy || reference) per token, d = logp - ref: k2 = d^2 / 2, whose gradient is that of the KL;
    k3 = e^-d - 1 + d (DeepSeekMath), for d between -20 and 20."""
    d = logp - ref
    if kind == "k2":
        return d.pow(2) / 2
    d = d.clamp(-20.0, 20.0)
    return (-d).exp() - 1 + d


def sequence_mean(x, seq):
    """x [M], seq [M] -> mean over each response's tokens [S] (every response has at least one token)."""
    total = x.new_zeros(int(seq.max()) + 1).index_add(0, seq, x)
    return total / seq.bincount()


def aggregate(loss, seq, mode, tokens, responses, length):
    """Per-token losses [M] -> this micro-batch's share of the step's loss.

    tokens, responses: the GLOBAL counts of the optimizer step, over all micro-batches and ranks, so that
    shares add up. token: sum / tokens; sequence: sum of per-response means / responses; constant: sum /
    (responses * length), Dr.GRPO's.
    """
    if mode == "token":
        return loss.sum() / tokens
    if mode == "sequence":
        return sequence_mean(loss, seq).sum() / responses
    return loss.sum() / (responses * length)


# ----------------------------------------------------------------------------------------- one optimizer step

@dataclass
class Step:
    """What this rank trains on in one optimizer step."""
    batches: list[pack.MicroBatch]
    tokens: int  # global denominators: over all ranks, groups that are not computed included
    responses: int
    skipped: float  # share of groups that are not computed, their advantages all zero


def prepare(groups, run):
    """The groups of a step (the same on every rank) -> Step: advantages, denominators, this rank's share."""
    cfg, t = run.cfg, run.cfg.train
    need_all = t.kl_coef > 0 or t.entropy_coef > 0
    trees, tokens, responses = [], 0, 0
    for b, group in enumerate(groups):
        for r in group.responses:
            if r.temperature != cfg.rollout.temperature or r.top_p != 1.0:
                raise ValueError(f"responses sampled at temperature {r.temperature}, top_p {r.top_p} cannot "
                                 "be trained on: the loss scores temperature "
                                 f"{cfg.rollout.temperature}, top_p 1")
        adv = advantages([graded.reward for graded in group.graded], t.advantage)
        branches = [pack.Branch(r.tokens, b, r.logprobs, adv[g]) for g, r in enumerate(group.responses)
                    if group.graded[g].reward is not None]
        tokens += sum(len(branch.tokens) for branch in branches)
        responses += len(branches)
        if branches and (need_all or any(adv)):
            trees.append(pack.Tree(group.prompt.tokens, branches))
    parts = [part for tree in trees for part in pack.split_tree(tree, t.tokens_per_microbatch)]
    return Step(list(running.pack_mine(run, parts)), max(tokens, 1), max(responses, 1),
                (len(groups) - len(trees)) / len(groups))


def batch_loss(logp, entropy, batch, ref, step, cfg):
    """One micro-batch's share of the step's loss, and per-token figures. logp, entropy, ref (or None) [M]."""
    t = cfg.train
    old = logp.detach() if t.steps_per_sync == 1 else batch.old
    loss, figures = LOSSES[t.loss](logp, old, batch.adv, batch.seq, t)
    if t.tis_cap:  # the sampler's distribution differs from the trainer's: truncated importance weight
        loss = loss * ratio(old, batch.sampled).clamp(max=t.tis_cap)
    if ref is not None:
        loss = loss + t.kl_coef * kl_estimate(logp, ref, t.kl)
        figures["kl"] = logp - ref  # k1: unbiased as a figure, useless as a loss
    if t.entropy_coef:
        loss = loss - t.entropy_coef * entropy
    length = cfg.rollout.max_new_tokens
    return aggregate(loss, batch.seq, t.aggregation, step.tokens, step.responses, length), figures


def train_step(model, optimizer, step, cfg, reference=None):
    """One optimizer step on this rank's micro-batches -> {name: number}.

    Means are over the tokens of all ranks that are trained on: those of skipped groups (trained_share tells
    how many) are in none. gspo: outside is the share outside its clip by the sampler's log-probs.
    """
    t, temperature = cfg.train, cfg.rollout.temperature
    two = torch.zeros(2)
    _, named = LOSSES[t.loss](two, two, two, two.long(), t)  # ranks without responses must know the names too
    means = ([*named, "entropy", "gap_mean"] + ["kl"] * (reference is not None)
             + ["outside"] * (t.loss == "gspo"))
    sums = running.zeros(model, ["loss", *means, "trained_tokens", "gap_max"])
    optimizer.zero_grad()
    for batch in step.batches:
        logp, entropy = pack.logprobs(model, batch, temperature, entropy=t.entropy_coef > 0)
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref, _ = pack.logprobs(reference, batch, temperature)
        if not batch.names:  # a dummy keeps FSDP's collectives paired
            (logp.sum() * 0.0).backward()
            continue
        loss, figures = batch_loss(logp, entropy, batch, ref, step, cfg)
        loss.backward()
        with torch.no_grad():
            gap = (logp - batch.sampled).abs()
            figures |= {"loss": loss, "entropy": entropy, "gap_mean": gap}
            if t.loss == "gspo":
                trainer = logp if t.steps_per_sync == 1 else batch.old
                s = gspo_loss(trainer, batch.sampled, batch.adv, batch.seq, t)[1]["ratio"]
                figures["outside"] = (s < 1 - t.clip_low) | (s > 1 + t.clip_high)
            for name, figure in figures.items():
                sums[name] += figure.sum()
            sums["trained_tokens"] += len(logp)
            sums["gap_max"] = torch.maximum(sums["gap_max"], gap.max())
    out = running.optimizer_step(model, optimizer, t.grad_clip, sums, maxima=["gap_max"])
    n = out["trained_tokens"]
    out |= {"gap_max": out["gap_max"] if n else None, "trained_share": n / step.tokens}
    return out | {name: out[name] / n if n else None for name in means}


# --------------------------------------------------------------------------------------------------- the loop

def rescore(model, step, cfg):
    """Old log-probs as the trainer computes them, at the rollouts' weights.

    For the importance weight, and for gspo, whose clip is finer than what sampler and trainer differ in. The
    gradient stays on, so that the same kernels give the same bits as in the step.
    """
    for batch in step.batches:
        batch.old = pack.logprobs(model, batch, cfg.rollout.temperature)[0].detach()
    model.reshard()  # FSDP keeps the root gathered after a forward without a backward


def figures_of(groups):
    """What a step's rollouts looked like, all of them: mean training reward, the seven metrics, the sampler's
    mean log-prob of a token, lengths."""
    graded = [rollout for group in groups for rollout in group.graded]
    responses = [response for group in groups for response in group.responses]
    rewards = [rollout.reward for rollout in graded if rollout.reward is not None]
    logprobs = [logprob for response in responses for logprob in response.logprobs]
    return {"reward": sum(rewards) / len(rewards) if rewards else None, **metrics.metrics(graded),
            "logp": sum(logprobs) / len(logprobs), "length": len(logprobs) / len(responses),
            "cut_off": sum(r.finish == "length" for r in responses) / len(responses)}


def sample_and_grade(run, prompts, steps):
    """The groups of the next steps, all from the same weights -> ([B] groups, figures of the phase)."""
    keys = [(Stream.ROLLOUT, position) for position in run.positions(steps)]
    asked = [prompts[i] for i in run.next_examples(steps)]
    try:
        groups, phase = grading.sample_graded(run.policy, run.judge, asked, keys,
                                              grading.sampling_of(run.cfg))
        grading.check_failed(groups, run.judge, f"after step {run.step}", "the same command goes on from "
                             f"here; with another prompt or model, a new run_dir with train.from={run.dir}")
    except llm.Unanswered:  # on all ranks
        if run.step:
            running.save(run)
        raise
    # Seconds and counts are shared out over the steps of the phase, quantiles are not.
    return groups, {name: x if name.startswith("grade_p") else x / steps for name, x in phase.items()}


def main():
    run = running.start(__doc__, "train_grpo.py")
    cfg, t = run.cfg, run.cfg.train
    if t.loss not in LOSSES:
        raise InputError(f"train.loss={t.loss}: LOSSES in train_grpo.py has {', '.join(LOSSES)} (sft and dpo "
                         "belong to train_sft.py and train_dpo.py)")
    prompts = running.training_prompts(cfg, run.policy.tokenizer)
    running.load(run, len(prompts), [turns_file(cfg, "train"), running.policy_prompt(cfg), cfg.data.lexicon,
                                     run.judge.grader and run.judge.grader.prompt_file])
    reference = running.base_model(run) if t.kl_coef else None
    while run.step < run.total:
        steps = min(t.steps_per_sync, run.total - run.step)
        groups, phase = sample_and_grade(run, prompts, steps)
        parts = [groups[i * t.prompts_per_step:(i + 1) * t.prompts_per_step] for i in range(steps)]
        todo = [prepare(part, run) for part in parts]  # advantages, packing
        if t.steps_per_sync > 1 and (t.tis_cap or t.loss == "gspo"):
            for step in todo:
                rescore(run.model, step, cfg)
        for i, (part, step) in enumerate(zip(parts, todo)):
            sampled = figures_of(part)
            running.begin_step(run)
            trained = train_step(run.model, run.optimizer, step, cfg, reference)
            if i:  # only before the first step after a rollout do sampler and trainer have the same weights
                trained |= {"gap_mean": None, "gap_max": None}
            record = {**trained, **sampled, "skipped_groups": step.skipped, **phase}
            running.end_step(run, record, boundary=i == steps - 1)
    running.finish(run)


if __name__ == "__main__":
    cli(main)
