"""Direct preference optimisation (arXiv 2305.18290), the DPO baseline of Table 1 of arXiv 2510.25441.

    python pairs.py configs/table1/7b/dpo.yaml                                 # builds the pairs; look at them
    torchrun --nproc_per_node=8 train_dpo.py configs/table1/7b/dpo.yaml [key=value ...]

The chosen answer is the expert's (or <stop />), the rejected one irrelevant. A pair shares its prompt as one prefix. The
base model's log-probs of all answers are computed once, before the first step, and kept in run_dir/reference.safetensors.
Unlike the reference release, whose sums run over a whole micro-batch (right only for one pair at a time), every pair has
sums of its own.
"""
import gc
import hashlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import config
import hindsight
import pack
import parallel
import training
from data import InputError, check_messages, cli, encode_prompts, identity, load_prompt, load_turns, read_jsonl
from pairs import same_made


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Summed log-probs of the answers [n] under policy and reference -> per-pair loss [n] and implicit rewards [n], [n].

    -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), equation 7 of arXiv 2305.18290.

    >>> x = torch.tensor
    >>> dpo_loss(x([-1.0]), x([-5.0]), x([-2.0]), x([-4.0]), 0.5)
    (tensor([0.3133]), tensor([0.5000]), tensor([-0.5000]))
    """
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def pair_logprobs(model, packed):
    """Summed log-probs of a micro-batch of pairs -> [n, 2]: chosen, rejected."""
    logp, _ = pack.logprobs(model, packed)  # [M]
    return logp.new_zeros(int(packed.seq[-1]) + 1).index_add(0, packed.seq, logp).view(-1, 2)


def train_step(run, trees, reference):
    """One optimizer step on these pairs (the same list on every rank); reference: {pair: (chosen, rejected)} log-probs."""
    t, sums = run.cfg.train, torch.zeros(5, dtype=torch.float64, device=run.device)
    run.optimizer.zero_grad(set_to_none=True)
    for part in pack.balance(trees, run.world, t.tokens_per_microbatch)[run.rank]:
        packed = pack.pack(part, run.device)
        if not part:  # a dummy keeps FSDP's collectives paired
            (pack.logprobs(run.model, packed)[0].sum() * 0.0).backward()
            continue
        logp = pair_logprobs(run.model, packed)  # [n, 2]
        ref = logp.new_tensor([reference[pair] for pair, which in packed.index if which == 0])
        loss, chosen, rejected = dpo_loss(*logp.unbind(1), *ref.unbind(1), t.dpo_beta)
        (loss.sum() / len(trees)).backward()
        with torch.no_grad():
            sums += torch.stack([loss.sum(), chosen.sum(), rejected.sum(), (chosen > rejected).sum(), logp[:, 0].sum()])
    figures = training.optimizer_step(run)
    loss, chosen, rejected, right, logp = (x / len(trees) for x in parallel.all_sum(sums.tolist(), run.device))
    return {"loss": loss, "chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected, "accuracy": right,
            "chosen_logp": logp, "trained_tokens": sum(len(a) for tree in trees for a in tree.answers), **figures}


def reference_logprobs(run, trees, inputs):
    """Log-probs of all pairs under the base model -> {pair: (chosen, rejected)}; read from run_dir where they were computed
    before from the same `inputs`."""
    path = Path(run.cfg.run_dir) / "reference.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as f:
            if f.metadata()["inputs"] == inputs:
                return dict(zip(f.get_tensor("pairs").tolist(), f.get_tensor("logprobs").tolist()))
    model, found = parallel.load_sharded(run.folder, run.device, run.dtype, trainable=False), {}
    budget, at_once = run.cfg.train.tokens_per_microbatch, 64 * run.world
    with torch.no_grad(), tqdm(total=len(trees), desc="reference log-probs", unit=" pairs", disable=run.rank > 0) as bar:
        for first in range(0, len(trees), at_once):
            for part in pack.balance(trees[first:first + at_once], run.world, budget)[run.rank]:
                packed = pack.pack(part, run.device)
                if not part:
                    pack.logprobs(model, packed)
                    continue
                found.update(zip([tree.index[0][0] for tree in part], pair_logprobs(model, packed).tolist()))
            bar.update(len(trees[first:first + at_once]))
    del model
    gc.collect()  # FSDP's modules refer to each other: without this the shards would stay beside the policy's
    found = {pair: values for share in parallel.all_gather(found) for pair, values in share.items()}
    if run.rank == 0:
        tensors = {"pairs": torch.tensor(list(found)), "logprobs": torch.tensor(list(found.values()), dtype=torch.float64)}
        aside = path.with_suffix(".tmp")
        save_file(tensors, aside, metadata={"inputs": inputs})
        aside.replace(path)
    return found


def load_pairs(path, turns):
    """Read pairs.jsonl, checked against the turns it must have been built from."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: run pairs.py with this config first")
    by_id, pairs = {t["turn_id"]: t for t in turns}, []
    for n, pair in read_jsonl(path):
        bad = check_messages(pair.get("context"))
        for name in ("turn_id", "chosen", "rejected"):
            if not isinstance(pair.get(name), str) or not pair[name].strip():
                bad = bad or f"{name!r} is missing, empty or not a text"
        if not bad and by_id.get(pair["turn_id"], {}).get("context") != pair["context"]:
            bad = f"turn {pair['turn_id']!r} is not among this run's training turns: build the pairs again with pairs.py"
        if bad:
            raise InputError(f"{path}:{n}: {bad}")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path} holds no pairs: run pairs.py with this config again")
    return pairs


def main():
    cfg = config.load(sys.argv[1:], __doc__, may_plan=True)
    run = training.start(cfg, "train_dpo.py")
    path = Path(cfg.run_dir) / "pairs.jsonl"
    if path.is_file() and not same_made(cfg):
        raise InputError(f"{path} was made with other settings than this config's: run pairs.py again")
    pairs, prompts = encode_prompts(run.tokenizer, load_prompt(cfg.data.prompt),
                                    load_pairs(path, load_turns(hindsight.turns_file(cfg, "train"))),
                                    cfg.rollout.max_prompt_tokens, cfg.data.long_prompts)
    trees = training.encode_trees(run, prompts, [[pair["chosen"], pair["rejected"]] for pair in pairs])
    training.load(run, len(trees), [path, cfg.data.prompt])
    made_of = f"{identity(run.folder)} {run.dtype} {cfg.rollout.max_prompt_tokens} {cfg.rollout.max_new_tokens} {run.inputs}"
    reference = reference_logprobs(run, trees, hashlib.sha256(made_of.encode()).hexdigest())
    while run.step < run.total:
        began, at = time.perf_counter(), run.positions()
        training.set_lr(run)
        indices = training.stream(len(trees), at.start, at.stop, cfg.seed)
        figures = train_step(run, [trees[i] for i in indices], reference)
        training.end_step(run, {**figures, "train_s": time.perf_counter() - began})
    training.finish(run)


if __name__ == "__main__":
    cli(main)
