"""Preference pairs for train_dpo.py, a step of its own: look at them before anything learns from them.

    python pairs.py cfg.yaml [key=value ...]      # turns/train.jsonl -> run_dir/pairs.jsonl, one pair a line

chosen    what the expert did: the next utterance at a continue turn, exactly <stop /> at a stop turn
rejected  an utterance irrelevant to anything in the conversation. A language model (llm.writer) writes it, as
          in the paper (arXiv 2510.25441). Where llm.writer.model is not set, it is an expert's question from
          another session about another complaint. No attribute it asks for matters to this complaint, is
          mentioned in this conversation (up to this turn or after it), or is generic.

A turn gets no pair and is counted where the lexicon does not recognise its complaint, where nothing
irrelevant was ever asked, or where the model failed.
"""
import sys
from collections import Counter
from itertools import chain

import numpy as np
from tqdm import tqdm

import config
import lexicon
import llm
from prompts import chat, dump, expert_response, fill_goal, load_turns, spoken, turns_file
from records import (
    InputError,
    Pair,
    Reply,
    Text,
    cli,
    file_hash,
    is_named,
    lock,
    read_json,
    same,
    slot_key,
    write_json,
    write_jsonl,
)


def pair_of(turn, rejected, rejected_from):
    return Pair(**dict(turn), chosen=expert_response(turn), rejected=rejected, rejected_from=rejected_from)


def build_pairs(turns, lex, generic, seed=0):
    """-> (pairs, Counter of turns left out by reason). The same turns and seed give the same pairs."""
    pairs, left_out = [], Counter()
    complaints = [lexicon.complaint_in(turn, lex) for turn in turns]
    pool = []  # what experts asked: (turn, its complaint, the utterance, slot keys of what it asks for)
    for turn, complaint in zip(turns, complaints):
        if complaint and turn.decision == "continue":
            text = expert_response(turn)
            if asks := set(map(slot_key, lexicon.asked(text, lex))):
                pool.append((turn, complaint, text, asks))
    dull = [attribute for attribute in lex.attributes if is_named(attribute, generic)]
    turns = tqdm(turns, "pairs", unit=" turns", disable=None)
    for i, (turn, complaint) in enumerate(zip(turns, complaints)):
        if not complaint:
            left_out["no complaint recognised"] += 1
            continue
        wanted = {same(item)[0] for item in turn.known + turn.target}
        named = chain(lex.complaints[complaint].attributes, dull, *lexicon.facts(turn.context, lex))
        relevant = wanted.union(map(slot_key, named))  # what a rejected response must not ask for
        rng = np.random.default_rng([seed, config.Stream.PAIRS, i])
        tries = rng.integers(len(pool), size=200) if pool else ()
        for other, about, text, asks in chain((pool[k] for k in tries), pool):  # at random, else the first
            if other.session_id != turn.session_id and about != complaint and not asks & relevant:
                pairs.append(pair_of(turn, text, other.turn_id))
                break
        else:
            left_out["no irrelevant utterance in the logs"] += 1
    return pairs, left_out


class Written(Reply):
    """A response that is irrelevant to the conversation."""
    utterance: Text


def written_pairs(turns, source):
    """The same with rejected responses that a language model writes."""
    def ask(turn):
        messages = chat(fill_goal(source.prompt, turn.goal), dump({"conversation": spoken(turn.context)}))
        return [source.submit(messages, Written)]

    pairs, left_out = [], Counter()
    turns = tqdm(turns, "pairs", unit=" turns", disable=None)
    for turn, (reply,) in llm.in_order(source, turns, ask):
        text = reply and reply.utterance.strip()
        if not text:
            left_out["the language model failed"] += 1
        elif text == expert_response(turn):
            left_out["it wrote what the expert said"] += 1
        else:
            pairs.append(pair_of(turn, text, source.settings.model))
    print(f"  writer: {llm.report(source)}")
    return pairs, left_out


def stamp_of(cfg):
    """What the pairs are made with: the settings, and the turns as they are now."""
    return config.made_with(cfg, "pairs") | {"turns": file_hash(turns_file(cfg, "train"))}


def same_made(cfg):
    """Were run_dir's pairs made with this config from these turns? Those made by hand carry no stamp."""
    made = stamp_of(cfg)
    return read_json(cfg.run_path / "pairs_made.json", made) == made


def main():
    cfg = config.load(sys.argv[1:], __doc__)
    lock(cfg.run_path)
    made, turns, out = stamp_of(cfg), load_turns(cfg, "train"), cfg.run_path / "pairs.jsonl"
    if cfg.llm.writer.model:
        pairs, left_out = written_pairs(turns, llm.open_source("writer", cfg))
    else:
        config.need(cfg, "data.lexicon")
        pairs, left_out = build_pairs(turns, lexicon.load(cfg.data.lexicon), cfg.hindsight.generic, cfg.seed)
    for reason, n in left_out.most_common():
        print(f"  turns left out: {n} {reason}")
    if not pairs:
        raise InputError(f"{cfg.llm.writer.model or cfg.data.lexicon} gives no pair for any of {len(turns)} "
                         f"turns: see the reasons above")
    write_jsonl(out, pairs)
    write_json(out.with_name("pairs_made.json"), made)
    for pair in pairs[:3]:
        print(f"  {pair.context[-1].content!r} -> {pair.chosen!r} rather than {pair.rejected!r}")
    print(f"wrote {out}: {len(pairs)} pairs of {len(turns)} turns")


if __name__ == "__main__":
    cli(main)
