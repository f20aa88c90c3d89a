"""Preference pairs for train_dpo.py, a step of its own so that they can be looked at before anything learns from them.

    python pairs.py cfg.yaml [key=value ...]      # turns/train.jsonl -> run_dir/pairs.jsonl, one pair a line

chosen    what the expert did: the next utterance at a continue turn, exactly <stop /> at a stop turn
rejected  an utterance irrelevant to anything in the conversation: written by a language model (llm.writer), as in the paper
          (arXiv 2510.25441); or, where llm.writer.model is not set, an expert's question from another session about another
          complaint, none of whose attributes matters to this complaint, is mentioned in this conversation (up to this turn
          or after it), or is generic

Turns whose complaint the lexicon does not recognise, for which nothing irrelevant was ever asked, or for which the model failed,
get no pair and are counted.
"""
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import hindsight
import lexicon
import llm
from data import InputError, cli, expert_answer, load_turns, write_json, write_jsonl
from hindsight import same, slot_key, spoken


def complaint_in(turn, lex):
    """The complaint a conversation is about: the first that its user names, or None."""
    named = (lexicon.complaint_of(m["content"], lex) for m in turn["context"] if m["role"] == "user")
    return next(filter(None, named), None)


def questions_asked(turns, complaints, lex):
    """The experts' utterances that ask for an attribute -> [(session, complaint, text, attributes asked for, turn_id)]."""
    out = []
    for turn, complaint in zip(turns, complaints):
        if complaint and turn["decision"] == "continue":
            text = expert_answer(turn)
            asked = frozenset(slot_key(a) for a in lexicon.asked(text, lex))
            if asked:
                out.append((turn["session_id"], complaint, text, asked, turn["turn_id"]))
    return out


def pair_of(turn, rejected, origin):
    return {**{k: turn[k] for k in ("turn_id", "session_id", "goal", "context", "decision") if k in turn},
            "chosen": expert_answer(turn), "rejected": rejected, "rejected_from": origin}


def build_pairs(turns, lex, generic=(), seed=0):
    """-> (pairs, Counter of turns left out by reason). The same turns and seed give the same pairs."""
    pairs, left_out = [], Counter()
    complaints = [complaint_in(turn, lex) for turn in turns]
    pool = questions_asked(turns, complaints, lex)
    for i, (turn, complaint) in enumerate(zip(tqdm(turns, desc="pairs", unit=" turns", disable=None), complaints)):
        if not complaint:
            left_out["no complaint recognised"] += 1
            continue
        mentioned = {a for found in lexicon.facts(turn["context"], lex) for a in found} | {same(i)[0] for i in turn["target"]}
        relevant = {slot_key(a) for a in (*lex.complaints[complaint], *generic, *mentioned)}
        found = None
        tries = np.random.default_rng([seed, 4, i]).integers(len(pool), size=200) if pool else ()
        for k in itertools.chain(tries, range(len(pool))):  # at random; where that fails, the first of all that fits
            session, other, text, asked, turn_id = pool[k]
            if session != turn["session_id"] and other != complaint and not asked & relevant:
                found = text, turn_id
                break
        if not found:
            left_out["no irrelevant utterance in the logs"] += 1
            continue
        pairs.append(pair_of(turn, *found))
    return pairs, left_out


def check_utterance(reply):
    if not isinstance(reply.get("utterance"), str) or not reply["utterance"].strip():
        raise ValueError("'utterance' must be a non-empty text")
    return reply["utterance"].strip()


def written_pairs(turns, source):
    """Pairs whose rejected answer a language model writes -> (pairs, Counter of turns left out by reason)."""
    def ask(turn):
        shown = llm.dump({"conversation": spoken(turn["context"])})
        return [source.submit([{"role": "system", "content": source.prompt.replace("{goal}", turn.get("goal") or "")},
                               {"role": "user", "content": shown}], llm.object_schema(utterance={"type": "string"}), check_utterance)]

    pairs, left_out = [], Counter()
    for turn, (text,) in llm.in_order(source, tqdm(turns, desc="pairs", unit=" turns", disable=None), ask):
        if text in (None, expert_answer(turn)):
            left_out["the language model failed" if text is None else "it wrote what the expert said"] += 1
        else:
            pairs.append(pair_of(turn, text, source.s.model))
    print(f"  writer: {llm.report(source)}")
    return pairs, left_out


def made_with(cfg):
    """The config keys that decide what the pairs are, beside those of the turns."""
    w = cfg.llm.writer
    return {"seed": cfg.seed, "hindsight.generic": cfg.hindsight.generic, "data.lexicon": cfg.data.lexicon,
            **({f"llm.writer.{k}": getattr(w, k) for k in ("model", "prompt", "temperature", "max_tokens")} if w.model else {})}


def same_made(cfg):
    """Were run_dir's pairs made with this config? Pairs made by hand carry no stamp and will do."""
    path = Path(cfg.run_dir) / "pairs_made.json"
    return not path.is_file() or json.loads(path.read_text(encoding="utf-8")) == made_with(cfg)


def main():
    cfg = config.load(sys.argv[1:], __doc__)
    turns, out = load_turns(hindsight.turns_file(cfg, "train")), Path(cfg.run_dir) / "pairs.jsonl"
    if cfg.llm.writer.model:
        pairs, left_out = written_pairs(turns, llm.open_source("writer", cfg))
    else:
        config.need(cfg, "data.lexicon")
        pairs, left_out = build_pairs(turns, lexicon.load(cfg.data.lexicon), cfg.hindsight.generic, cfg.seed)
    for reason, n in left_out.most_common():
        print(f"  turns left out: {n} {reason}")
    if not pairs:
        raise InputError(f"{cfg.llm.writer.model or cfg.data.lexicon} gives no pair for any of {len(turns)} turns: see the reasons "
                         f"above")
    write_jsonl(out, pairs)
    write_json(Path(cfg.run_dir) / "pairs_made.json", made_with(cfg))
    for pair in pairs[:3]:
        print(f"  {pair['context'][-1]['content']!r} -> {pair['chosen']!r} rather than {pair['rejected']!r}")
    print(f"wrote {out}: {len(pairs)} pairs of {len(turns)} turns")


if __name__ == "__main__":
    cli(main)
