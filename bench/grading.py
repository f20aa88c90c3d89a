"""What grading by a language model costs a training step: calls against one per answer, and prompt tokens that a server with a prefix
cache does not compute again because the candidate stands last.

    python bench/grading.py configs/toy/grpo.yaml [key=value ...]

Samples one step's groups (train.prompts_per_step x rollout.samples) from run_dir/export or model.path at the first training turns,
counts with that model's tokenizer, and ends in one JSON line. No server is needed: nothing is asked.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import eval as evaluation
import model as decoder
import parallel
import reward
import rollout
import training
from data import apply_template, cli, load_prompt, load_tokenizer


def main():
    cfg = config.load(sys.argv[1:], __doc__)
    _, _, device = parallel.start()
    folder = evaluation.model_of(cfg)
    tokenizer = load_tokenizer(folder)
    n, prompt = cfg.train.prompts_per_step, load_prompt("prompts/grader.md")
    turns, prompts = (part[:n] for part in training.training_turns(cfg, tokenizer))
    model, ends = decoder.load(folder, device, parallel.compute_dtype(cfg.model.dtype, device)), rollout.end_ids(folder, tokenizer)
    _, graded, _ = rollout.sample_graded(model, tokenizer, turns, prompts, [(6, i) for i in range(n)], cfg, reward.judges(cfg)[0], ends,
                                         samples=cfg.rollout.samples, temperature=cfg.rollout.temperature)
    cfg.reward.grader, asked, whole, ordered, reversed_ = "llm", 0, 0, 0, 0
    instructions = None
    for turn, group in zip(turns, graded):
        texts = dict.fromkeys(g["response"] for g in group if reward.needs_grader(turn, g["response"], cfg))
        lengths = []
        for text in texts:
            messages = reward.grader_messages(prompt, turn, text)
            lengths.append(len(apply_template(tokenizer, messages)))
            head = messages[1]["content"].rpartition("Candidate: ")[0]
            shared = len(apply_template(tokenizer, [messages[0], {"role": "user", "content": head}]))
            system = len(apply_template(tokenizer, [messages[0]]))
        if not texts:
            continue
        instructions = instructions or system  # the same for all turns of a goal
        asked += len(texts)
        whole += sum(lengths)
        ordered += sum(lengths) - (len(texts) - 1) * shared - instructions
        reversed_ += sum(lengths) - len(texts) * instructions
    answers = n * cfg.rollout.samples
    print(f"{answers} answers to {n} prompts: {asked} calls ({1 - asked / answers:.0%} fewer than one per answer)")
    print(f"prompt tokens of these calls: {whole}; computed with a prefix cache: {ordered + instructions} as ordered (shared part first), "
          f"{reversed_ + instructions} were the candidate first")
    print(json.dumps({"bench": "grading", "model": str(folder), "answers": answers, "calls": asked, "prompt_tokens": whole,
                      "computed_candidate_last": ordered + instructions, "computed_candidate_first": reversed_ + instructions,
                      "ratio": (reversed_ + instructions) / (ordered + instructions)}))
    parallel.stop()


if __name__ == "__main__":
    cli(main)
