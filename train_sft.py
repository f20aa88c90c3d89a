"""Behavioural cloning, the SFT baseline of Table 1 (arXiv 2510.25441): say what the expert said next, or stop.

    torchrun --nproc_per_node=8 train_sft.py configs/table1/7b/sft.yaml [key=value ...]      (python train_sft.py: one process)

The target is the expert's next utterance at a continue turn and exactly <stop /> at a stop turn, under the policy's prompt.
The loss is the mean of -log pi over the response tokens, the end token included, of all turns of a step (global over
micro-batches and ranks); prompt tokens carry none.
"""
import sys
import time
from pathlib import Path

import config
import pack
import parallel
import training
from data import cli, expert_answer


def train_step(run, trees):
    """One optimizer step on these trees (the same list on every rank). -> global figures."""
    t, tokens, sums = run.cfg.train, sum(len(answer) for tree in trees for answer in tree.answers), [0.0, 0.0]
    run.optimizer.zero_grad(set_to_none=True)
    for part in pack.balance(trees, run.world, t.tokens_per_microbatch)[run.rank]:
        packed = pack.pack(part, run.device)
        logp, entropy = pack.logprobs(run.model, packed)  # [M]
        loss = -logp.sum() / tokens
        if not packed.index:  # a dummy keeps FSDP's collectives paired
            loss = loss * 0.0
        loss.backward()
        if packed.index:
            sums = [sums[0] + loss.item(), sums[1] + entropy.sum().item()]
    figures = training.optimizer_step(run)
    loss, entropy = parallel.all_sum(sums, run.device)
    return {"loss": loss, "entropy": entropy / tokens, "trained_tokens": tokens, **figures}


def main():
    cfg = config.load(sys.argv[1:], __doc__, may_plan=True)
    run = training.start(cfg, "train_sft.py")
    turns, prompts = training.training_turns(cfg, run.tokenizer)
    trees = training.encode_trees(run, prompts, [[expert_answer(turn)] for turn in turns])
    training.load(run, len(trees), [Path(cfg.run_dir) / "turns" / "train.jsonl", cfg.data.prompt])
    while run.step < run.total:
        began, at = time.perf_counter(), run.positions()
        training.set_lr(run)
        figures = train_step(run, [trees[i] for i in training.stream(len(trees), at.start, at.stop, cfg.seed)])
        training.end_step(run, {**figures, "train_s": time.perf_counter() - began})
    training.finish(run)


if __name__ == "__main__":
    cli(main)
