"""Policy optimisation of Learn-to-Ask (arXiv 2510.25441): GRPO, CISPO and GSPO on hindsight turns.

    torchrun --nproc_per_node=8 train_grpo.py configs/grpo_7b.yaml [key=value ...]      (python train_grpo.py: one process)

Each phase samples G answers to the prompts of the next `steps_per_sync` steps from the current weights, grades them
against the turns' (I*, s*), and takes one optimizer step on each step's prompts. With steps_per_sync > 1 the later steps
are off-policy, which is where the three losses part; with steps_per_sync = 1 the ratio is exactly 1, no clip ever acts,
and they differ by aggregation alone. The reference release syncs every 10 steps, and so do the Table 1 presets.

To change the loss, change the function; to add one, write it beside the others and name it in LOSSES.
Departures: old log-probs are the sampler's own (no second pass); groups whose advantages are all zero are not computed
where nothing else (KL, entropy) needs them, but their tokens still count in the denominator.

Letters: B groups, G samples, M answer tokens of a micro-batch, S its answers, V vocabulary.
"""
import hashlib
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import eval as evaluation
import hindsight
import lexicon
import model as decoder
import pack
import parallel
import rollout
from data import InputError, cli, encode_prompts, load_prompt, load_tokenizer, load_turns


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


LOSSES = {"grpo": grpo_loss, "cispo": cispo_loss, "gspo": gspo_loss}


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
    packed = [pack.pack(bin, device) for bin in pack.balance(trees, world, t.tokens_per_microbatch)[rank]]

    def per_token(values):  # one list of values per answer, or one value per answer -> [M]
        return [torch.tensor([v for b, g in p.index for v in values(b, g)] or [0.0], device=device, dtype=dtype) for p in packed]

    sampled = per_token(lambda b, g: groups[b].answers[g].logprobs)
    per_answer = per_token(lambda b, g: [adv[b][g]] * len(groups[b].answers[g].tokens))
    return Batch(packed, list(sampled), sampled, per_answer, max(tokens, 1), max(answers, 1), skipped, len(groups))


def train_step(model, reference, optimizer, batch, cfg, on_policy, device):
    """One optimizer step on this rank's micro-batches. -> dict of global figures (sums over all tokens of the step).

    on_policy: no step was taken since the rollout; then old is the detached current log-prob where a sync brings a single
    step (the ratio is exactly 1), and the sampler/trainer gap is measured.
    """
    t = cfg.train
    sums, worst = defaultdict(float), 0.0
    optimizer.zero_grad(set_to_none=True)
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

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()

    names = ["loss", "trained_tokens", "ratio", "clip_share", "entropy", "gap"] + ["kl"] * (reference is not None)
    total = dict(zip(names, parallel.all_sum([sums[n] for n in names], device)))
    n = total["trained_tokens"]
    out = {k: v if k in ("loss", "trained_tokens") else v / n if n else None for k, v in total.items()}
    gap = out.pop("gap")  # only before the first step after a rollout do both sides have the same weights
    out |= {"gap_mean": gap if on_policy else None,
            "gap_max": max(parallel.all_gather(worst)) if on_policy and n else None, "grad_norm": norm}
    # null: nothing was computed, or it is not finite (JSON has no NaN)
    out = {k: v if v is not None and math.isfinite(v) else None for k, v in out.items()}
    return out | {"finite": finite, "skipped_groups": batch.skipped / batch.groups}


def lr_at(step, total, t):
    """Learning rate of step 0 .. total - 1: linear warm-up, then constant, linear or cosine to zero."""
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, total - t.warmup_steps)
    return t.lr * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[t.schedule]


# ------------------------------------------------------------------------------------------------------------ the loop

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient


def stream(n, start, stop, seed):
    """Turn indices at positions start .. stop - 1 of the endless stream of shuffled epochs."""
    order = {e: np.random.default_rng([seed, 2, e]).permutation(n) for e in range(start // n, (stop - 1) // n + 1)}
    return [int(order[i // n][i % n]) for i in range(start, stop)]


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


def due(every, before, after, total):
    return every is not None and (before // every != after // every or after == total)


def policy_prompt(cfg):
    return cfg.data.prompt_no_stop if cfg.reward.mode == "no_rs" else cfg.data.prompt


def load_training_turns(cfg, tokenizer):
    """-> (turns, prompts) to train on, and (turns, prompts) for evaluation during training."""
    folder, no_rs = Path(cfg.run_dir) / "turns", cfg.reward.mode == "no_rs"
    held_out = folder / ("valid.jsonl" if cfg.data.valid_sessions else "eval.jsonl")
    for path in [folder / "train.jsonl"] + [held_out] * (cfg.train.eval_every is not None):
        if not path.is_file():
            raise InputError(f"{path} does not exist: run hindsight.py with this config first")
    hindsight.check_made(cfg)
    turns = load_turns(folder / "train.jsonl")
    if no_rs:  # without R_s: continue turns only, and a prompt that never mentions stopping
        turns = [t for t in turns if t["decision"] == "continue"]
    if not turns:
        raise InputError(f"{folder / 'train.jsonl'} holds no continue turns, and reward.mode=no_rs trains on nothing else")
    system = load_prompt(policy_prompt(cfg))
    limits = cfg.rollout.max_prompt_tokens, cfg.data.long_prompts
    train = encode_prompts(tokenizer, system, turns, *limits)
    if cfg.train.eval_every is None:
        return train, None
    return train, encode_prompts(tokenizer, load_prompt(cfg.data.prompt), load_turns(held_out), *limits)


def main():
    cfg = config.load(sys.argv[1:], __doc__)
    config.need(cfg, "model.path", "data.lexicon")
    t, run = cfg.train, Path(cfg.run_dir)
    rank, world, device = parallel.start()
    dtype = parallel.compute_dtype(cfg.model.dtype, device)
    checkpoint.open_run(cfg, rank)
    folder = decoder.resolve(cfg.model.path)
    tokenizer = load_tokenizer(folder)
    ends, lex = rollout.end_ids(folder, tokenizer), lexicon.load(cfg.data.lexicon)
    (turns, prompts), held_out = load_training_turns(cfg, tokenizer)
    total = t.steps or t.epochs * len(turns) // t.prompts_per_step
    if total == 0:
        raise InputError(f"{len(turns)} turns x {t.epochs} epochs do not fill one step of train.prompts_per_step="
                         f"{t.prompts_per_step}")

    model = parallel.load_sharded(folder, device, dtype)
    reference = parallel.load_sharded(folder, device, dtype, trainable=False) if t.kl_coef else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, betas=tuple(t.betas), weight_decay=t.weight_decay)
    step, bad, found = 0, 0, checkpoint.all_checkpoints(run / "checkpoints")
    sources = [run / "turns" / "train.jsonl", cfg.data.lexicon, policy_prompt(cfg)]
    inputs = hashlib.sha256(b"".join(Path(p).read_bytes() for p in sources)).hexdigest()
    if found:
        state = checkpoint.load(found[-1], model, optimizer)
        step, bad = state["step"], state["bad_steps"]
        if state["inputs"] != inputs:
            raise InputError(f"the training turns, the lexicon or the policy prompts have changed since {found[-1]} was written: "
                             f"bring them back, or start in a new run_dir")
    else:
        checkpoint.fresh_moments(model, optimizer)
    log = checkpoint.Log(cfg, step, total, rank)

    def evaluate():
        records = evaluation.evaluate(model, tokenizer, *held_out, cfg, lex, ends)
        return evaluation.metrics(records)

    if step == 0 and held_out:
        log.write({"step": 0, "eval": evaluate()})
    while step < total:
        # Sample and grade the prompts of the next steps_per_sync steps, all from the same weights.
        before, steps = step, min(t.steps_per_sync, total - step)
        positions = range(step * t.prompts_per_step, (step + steps) * t.prompts_per_step)
        indices = stream(len(turns), positions.start, positions.stop, cfg.seed)
        answers, graded, seconds = rollout.sample_graded(
            model, tokenizer, [turns[i] for i in indices], [prompts[i] for i in indices], [(0, p) for p in positions], cfg,
            lex, ends, samples=cfg.rollout.samples, temperature=cfg.rollout.temperature, leave=False)
        groups = [Group(prompts[i], a, [math.nan if g["reward"] is None else g["reward"] for g in records])
                  for i, a, records in zip(indices, answers, graded)]
        of_step = [slice(i * t.prompts_per_step, (i + 1) * t.prompts_per_step) for i in range(steps)]
        batches = [prepare(groups[s], cfg, rank, world, device, torch.promote_types(dtype, torch.float32)) for s in of_step]
        if t.tis_cap and t.steps_per_sync > 1:
            rescore(model, batches, cfg)

        for i, (batch, s) in enumerate(zip(batches, of_step)):
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = lr = lr_at(step, total, t)
            trained = train_step(model, reference, optimizer, batch, cfg, i == 0, device)
            step += 1
            bad = 0 if trained["finite"] else bad + 1
            record = {"step": step, "epoch": step * t.prompts_per_step / len(turns), "lr": lr,
                      **figures_of(graded[s], groups[s]), **trained,
                      **{k: v / steps for k, v in seconds.items()}, "train_s": time.perf_counter() - start}
            if i == steps - 1 and held_out and due(t.eval_every, before, step, total):
                start = time.perf_counter()
                record |= {"eval": evaluate(), "eval_s": time.perf_counter() - start}
            log.write(record)
            if bad == MAX_BAD_STEPS:
                raise InputError(f"{bad} steps in a row had a non-finite gradient (last: step {step}): lower train.lr and "
                                 f"start in a new run_dir (copy turns/ there, and checkpoints/ to go on from the last)")
        if due(t.checkpoint_every, before, step, total):
            checkpoint.save(run / "checkpoints", step, model, optimizer, {"bad_steps": bad, "inputs": inputs},
                            t.keep_checkpoints)

    log.close()
    decoder.export(model, folder, run / "export")
    if rank == 0:
        print(f"trained {total} steps; model: {run / 'export'}, metrics: {run / 'metrics.jsonl'}")
    parallel.stop()


if __name__ == "__main__":
    cli(main)
