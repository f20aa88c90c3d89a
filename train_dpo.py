"""Direct preference optimisation (arXiv 2305.18290), the DPO baseline of Table 1 of arXiv 2510.25441.

    python pairs.py configs/table1/7b/dpo.yaml      # builds the pairs; look at them
    torchrun --nproc_per_node=8 train_dpo.py configs/table1/7b/dpo.yaml [key=value ...]

The chosen response is the expert's (or <stop />), the rejected one irrelevant. A pair shares its prompt as
one prefix. The base model's log-probs of all responses are computed once, before the first step, and kept
in run_dir/reference.json. Unlike the reference release, whose sums run over a whole micro-batch
(right only for one pair at a time), every pair has sums of its own.
"""
import gc

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import pack
import parallel
import run as running
from pairs import same_made
from prompts import encode_prompts, load_turns
from records import InputError, Pair, cli, identity, read_json, read_records, write_json


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Summed log-probs of n pairs under policy and reference -> loss [n], implicit rewards [n], [n].

    -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), equation 7 of arXiv 2305.18290.

    >>> x = torch.tensor
    >>> dpo_loss(x([-1.0]), x([-5.0]), x([-2.0]), x([-4.0]), 0.5)
    (tensor([0.3133]), tensor([0.5000]), tensor([-0.5000]))
    """
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def pair_sums(logp, batch):
    """Log-probs of a micro-batch of pairs [M] -> their sums over each response [n, 2]: chosen, rejected."""
    return logp.new_zeros(len(batch.names)).index_add(0, batch.seq, logp).view(-1, 2)


def train_step(model, optimizer, batches, reference, pairs, t):
    """One optimizer step on this rank's micro-batches of pairs -> {name: number}: means over the pairs.

    reference: {pair: (chosen, rejected)} log-probs; pairs: how many all ranks have; t: the train config.
    """
    names = ["loss", "chosen_reward", "rejected_reward", "accuracy", "chosen_logp"]
    sums = running.zeros(model, names)
    optimizer.zero_grad()
    for batch in batches:
        logp, _ = pack.logprobs(model, batch)  # [M]
        if not batch.names:  # a dummy keeps FSDP's collectives paired
            (logp.sum() * 0.0).backward()
            continue
        logp = pair_sums(logp, batch)  # [n, 2]
        ref = logp.new_tensor([reference[pair] for pair in batch.names[::2]])
        loss, chosen, rejected = dpo_loss(*logp.unbind(1), *ref.unbind(1), t.dpo_beta)
        (loss.sum() / pairs).backward()
        with torch.no_grad():
            for name, value in zip(names, (loss, chosen, rejected, chosen > rejected, logp[:, 0])):
                sums[name] += value.sum()
    out = running.optimizer_step(model, optimizer, t.grad_clip, sums)
    out |= {name: out[name] / pairs for name in names}
    return out | {"margin": out["chosen_reward"] - out["rejected_reward"]}


def reference_logprobs(run, trees, inputs):
    """Log-probs of all pairs under the base model -> {pair: (chosen, rejected)} (collective).

    They are read from run_dir/reference.json where they were computed before from the same inputs (any JSON).
    """
    path = run.dir / "reference.json"
    try:
        kept = read_json(path, {})
    except InputError:  # it is torn
        kept = {}
    if kept.get("inputs") == inputs:
        return dict(kept["logprobs"])
    model, found = running.base_model(run), []
    at_once = 64 * run.world
    bar = tqdm(total=len(trees), desc="reference log-probs", unit=" pairs", disable=run.rank > 0)
    with torch.no_grad(), bar:
        for first in range(0, len(trees), at_once):
            some = trees[first:first + at_once]
            for batch in running.pack_mine(run, some):
                logp, _ = pack.logprobs(model, batch)
                if batch.names:
                    found += zip(batch.names[::2], pair_sums(logp, batch).tolist())
            bar.update(len(some))
    del model
    gc.collect()  # FSDP's modules refer to each other: without this the shards would stay beside the policy's
    found = sum(parallel.all_gather(found), [])  # of all ranks
    if run.rank == 0:
        write_json(path, {"inputs": inputs, "logprobs": found})
    return dict(found)


def load_pairs(path, turns):
    """Read pairs.jsonl and check it against the turns from which it must have been built."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run pairs.py with this config first")
    contexts, pairs = {turn.turn_id: turn.context for turn in turns}, []
    for n, pair in read_records(path, Pair):
        if contexts.get(pair.turn_id) != pair.context:
            raise InputError(f"{path}:{n}: turn {pair.turn_id!r} is not among this run's training turns: "
                             "build the pairs again with pairs.py")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path} holds no pairs: run pairs.py with this config again")
    return pairs


def main():
    run = running.start(__doc__, "train_dpo.py")
    cfg, path = run.cfg, run.dir / "pairs.jsonl"
    if not same_made(cfg):
        raise InputError(f"{path} was made with other settings or from other turns than this config's: run "
                         "pairs.py again")
    pairs = load_pairs(path, load_turns(cfg, "train"))
    prompts = encode_prompts(run.policy.tokenizer, pairs, cfg)
    trees = running.encode_trees(run, prompts, [[p.turn.chosen, p.turn.rejected] for p in prompts])
    running.load(run, len(trees), [path, cfg.data.prompt])
    inputs = [config.made_with(cfg, "reference"), str(run.dtype), identity(run.folder), run.inputs]
    reference = reference_logprobs(run, trees, inputs)
    for step, tokens, batches in running.steps(run, trees):
        figures = train_step(run.model, run.optimizer, batches, reference, len(step), cfg.train)
        running.end_step(run, figures | {"trained_tokens": tokens})
    running.finish(run)


if __name__ == "__main__":
    cli(main)
