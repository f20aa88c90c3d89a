"""Anchors for Auto-Prompt on the toy pharmacy, with the generator's truth in the place of a person's labels.

    python -m toy.anchors --world runs/toy/world --config configs/toy/base.yaml --out runs/toy/anchors

extractor.jsonl: sessions of the training logs with what their `learned` fields hold, generic slots left out.
grader.jsonl: responses of the base model to validation turns, with R_a by the rules, as many of each score.
No test session is among them.
"""
import argparse
import random
from pathlib import Path

import autoprompt
import config
import hindsight
import lexicon
import reward
from records import cli, read_jsonl, write_jsonl
from toy import world


def extractor_anchor(session):
    """A session with its items, without the generator's annotations."""
    items = [item for found in hindsight.utterances(session.messages) for item in found.learned]
    items = [item for item in dict.fromkeys(items) if item.split(":")[0] not in world.GENERIC]
    messages = [{"role": m.role, "content": m.content} for m in session.messages]
    return {"session": {"session_id": session.session_id, "goal": session.goal, "messages": messages},
            "items": items}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("world", "config", "out"):
        p.add_argument(f"--{name}", type=Path, required=True)
    p.add_argument("--n", type=int, default=120, help="anchors of each kind")
    a = p.parse_args()
    rng, cfg = random.Random(0), config.load([str(a.config)])
    logs = [hindsight.check_session(row) for _, row in read_jsonl(a.world / "train.jsonl")]
    sessions = [session for session, why in logs if not why]
    write_jsonl(a.out / "extractor.jsonl", map(extractor_anchor, rng.sample(sessions, a.n)))
    lex, graded = lexicon.load(cfg.data.lexicon), {0: [], 0.5: [], 1: []}
    for anchor in autoprompt.sampled_responses(cfg, 10 ** 6):
        anchor.score = reward.r_a_rules(anchor.turn, anchor.response, lex)
        graded[anchor.score].append(anchor)
    rows = [anchor for anchors in graded.values() for anchor in rng.sample(anchors, a.n // 3)]
    write_jsonl(a.out / "grader.jsonl", rows)
    print(f"wrote {a.out / 'extractor.jsonl'} and {a.out / 'grader.jsonl'}: {a.n} anchors each")


if __name__ == "__main__":
    cli(main)
