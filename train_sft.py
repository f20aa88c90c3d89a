"""Behavioural cloning, the SFT baseline of Table 1 (arXiv 2510.25441): say what the expert said, or stop.

    torchrun --nproc_per_node=8 train_sft.py configs/table1/7b/sft.yaml [key=value ...]
    python train_sft.py ...      (one process)

The target is the expert's next utterance at a continue turn and exactly <stop /> at a stop turn, under the
policy's prompt. The loss is the mean of -log pi over the response tokens of all turns of a step, the end
token included (global over micro-batches and ranks). Prompt tokens carry none.
"""

import pack
import run as running
from prompts import expert_response, turns_file
from records import cli


def train_step(model, optimizer, batches, tokens, grad_clip):
    """One optimizer step on this rank's micro-batches -> {name: number}. tokens: in all ranks' responses."""
    sums = running.zeros(model, ["loss", "entropy"])
    optimizer.zero_grad()
    for batch in batches:
        logp, entropy = pack.logprobs(model, batch)  # [M]
        loss = -logp.sum() / tokens
        if not batch.names:  # a dummy keeps FSDP's collectives paired
            (loss * 0.0).backward()
            continue
        loss.backward()
        sums["loss"] += loss.detach()
        sums["entropy"] += entropy.sum()
    out = running.optimizer_step(model, optimizer, grad_clip, sums)
    return {**out, "entropy": out["entropy"] / tokens, "trained_tokens": tokens}


def main():
    run = running.start(__doc__, "train_sft.py")
    cfg = run.cfg
    prompts = running.training_prompts(cfg, run.policy.tokenizer)
    trees = running.encode_trees(run, prompts, [[expert_response(prompt.turn)] for prompt in prompts])
    running.load(run, len(trees), [turns_file(cfg, "train"), cfg.data.prompt])
    for _, tokens, batches in running.steps(run, trees):
        running.end_step(run, train_step(run.model, run.optimizer, batches, tokens, cfg.train.grad_clip))
    running.finish(run)


if __name__ == "__main__":
    cli(main)
