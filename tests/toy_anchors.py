"""Anchors for Auto-Prompt on the toy pharmacy, with the generator's truth in the place of a person's labels.

    python tests/toy_anchors.py --world runs/toy/world --config configs/toy/base.yaml --out runs/toy/anchors

extractor.jsonl: sessions of the training logs with what their `learned` fields hold, generic slots left out. grader.jsonl: answers
of the base to validation turns, with the rules grader's R_a, about as many of each score. No test session is among them.
"""
import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autoprompt
import config
import hindsight
import lexicon
import reward
import toy
from data import read_jsonl, write_jsonl


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("world", "config", "out"):
        p.add_argument(f"--{name}", type=Path, required=True)
    p.add_argument("--n", type=int, default=120, help="anchors of each kind")
    a = p.parse_args()
    rng, rows = random.Random(0), []
    sessions = [s for _, s in read_jsonl(a.world / "train.jsonl") if not hindsight.check_session(s)]
    for s in rng.sample(sessions, a.n):
        items = [i for found in hindsight.extract_annotations(hindsight.utterances(s["messages"])) for i in found]
        messages = [{"role": m["role"], "content": m["content"]} for m in s["messages"]]
        rows.append({"session": {"session_id": s["session_id"], "goal": s["goal"], "messages": messages},
                     "items": [i for i in dict.fromkeys(items) if i.split(":")[0] not in toy.GENERIC]})
    write_jsonl(a.out / "extractor.jsonl", rows)
    cfg, rows = config.load([str(a.config)]), []
    lex = lexicon.load(cfg.data.lexicon)
    graded = [{**e, "score": reward.grade_rules(e["turn"], e["response"], lex)} for e in autoprompt.sampled_answers(cfg, 10 ** 6)]
    for score in (0, 0.5, 1):
        rows += rng.sample([e for e in graded if e["score"] == score], a.n // 3)
    write_jsonl(a.out / "grader.jsonl", rows)
    print(f"wrote {a.out / 'extractor.jsonl'} and {a.out / 'grader.jsonl'}: {a.n} anchors each")


if __name__ == "__main__":
    main()
