"""What grading by a language model costs a training step.

    python -m bench.grading configs/toy/grpo.yaml [key=value ...]

Counts the calls against one per response, and the prompt tokens that a server with a prefix cache does
not compute again because the candidate stands last. Samples one step's groups (train.prompts_per_step x
rollout.samples) from run_dir/export or model.path at the first training turns, counts with that model's
tokenizer, and ends in one JSON line. No server is needed: nothing is asked.
"""
import json
import sys
from collections import Counter
from dataclasses import replace

import config
import eval as evaluation
import grading
import parallel
import run
from prompts import apply_template, load_prompt
from records import cli
from rollout import load_policy

NOISE = 6  # a stream of its own, beside config.Stream's


def count(texts, turn, tokenizer, prompt):
    """Tokens of the calls about a turn's responses -> (all, the instructions', the shared part's)."""
    def length(messages):
        return len(apply_template(tokenizer, messages))

    asks = [grading.grader_question(prompt, turn, text)[0] for text in texts]
    instructions, request = asks[0]
    shared = {"role": "user", "content": request["content"].rpartition("Candidate: ")[0]}
    return sum(map(length, asks)), length([instructions]), length([instructions, shared])


def main():
    cfg = config.load(sys.argv[1:], __doc__)
    _, _, device = parallel.start()
    folder = evaluation.model_of(cfg)
    policy = load_policy(folder, device, parallel.compute_dtype(cfg.model.dtype, device))
    n, grader = cfg.train.prompts_per_step, load_prompt("prompts/grader.md")
    prompts = run.training_prompts(cfg, policy.tokenizer)[:n]
    judge = grading.open_judge(cfg)
    sampling = grading.sampling_of(cfg)
    groups, _ = grading.sample_graded(policy, judge, prompts, [(NOISE, i) for i in range(n)], sampling)
    asking = replace(judge, reward=judge.reward.model_copy(update={"grader": "llm"}))
    tokens = Counter()
    first = 0
    for group in groups:
        turn = group.prompt.turn
        texts = list(dict.fromkeys(g.response for g in group.graded
                                   if grading.needs_grader(turn.decision, g.response, asking)))
        if not texts:
            continue
        whole, instructions, shared = count(texts, turn, policy.tokenizer, grader)
        first = first or instructions  # the same for all turns of a goal: computed once
        tokens["asked"] += len(texts)
        tokens["whole"] += whole
        tokens["candidate last"] += whole - (len(texts) - 1) * shared - first
        tokens["candidate first"] += whole - len(texts) * first
    responses, asked = n * cfg.rollout.samples, tokens["asked"]
    last, reversed_ = tokens["candidate last"] + first, tokens["candidate first"] + first
    print(f"{responses} responses to {n} prompts: {asked} calls ({1 - asked / responses:.0%} fewer than one "
          f"per response)")
    print(f"prompt tokens of these calls: {tokens['whole']}; computed with a prefix cache: {last} as ordered "
          f"(shared part first), {reversed_} were the candidate first")
    print(json.dumps({"bench": "grading", "model": str(folder), "answers": responses, "calls": asked,
                      "prompt_tokens": tokens["whole"], "computed_candidate_last": last,
                      "computed_candidate_first": reversed_, "ratio": reversed_ / last}))
    parallel.stop()


if __name__ == "__main__":
    cli(main)
