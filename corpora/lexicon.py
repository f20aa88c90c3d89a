"""A lexicon from labelled logs, and how well a lexicon reads the questions of sessions held out.

    python -m corpora.lexicon mine cfg.yaml [key=value ...] [--out FILE] [--force]
    python -m corpora.lexicon check cfg.yaml [key=value ...]

`mine` reads the training sessions: `asks` (the slots that an expert's message asks for) and `learned` (what
a user's message reveals). It writes data.lexicon, or FILE, for a person to edit. `check` compares what a
lexicon finds in the experts' messages of held-out sessions with `asks`. docs/lexicon.md explains both.

A slot gets `goals`, those of the sessions in which it occurs, unless these are all or hardly come back. A cue
is a run of up to three words of a question, without digits and marks. Of the sentences with it, at the slot's
goals, 90% must be of messages that ask for the slot. The first cue of a slot stands in most of its sentences;
each further one adds most of those left, two at least. What is said more than once counts twice. These
numbers are fixed: nothing is tuned on the logs.
"""
import argparse
import re
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from textwrap import indent

import numpy as np
import yaml
from tqdm import tqdm

import config
import hindsight
import lexicon
import metrics
from records import InputError, cli, same, slot_key, write_text
from wording import LEAD_IN, split

SHARE = 0.9  # of the sentences with a cue, those that must ask for its slot
MOST = 40  # values of a slot; lines of a list in the report
SCOPES = {"all texts": 2, "all, well-formed": 6, "unseen texts": 0, "unseen, well-formed": 4}  # in report
FRAME = """
goal: Find out what is needed.
'yes': ['yes', yeah, yep, sure]
'no': ['no', nope, not really]
requests: []
openers: []
generic_questions: []
complaints: {}
attributes: {}
"""


# ------------------------------------------------------------------------------------------------------- mine

def runs(text):
    """Runs of up to three words of a text, as they stand there, without digits and marks."""
    words = [match.span() for match in lexicon.WORD.finditer(text)]
    return {run for i, (start, _) in enumerate(words) for _, end in words[i:i + 3]
            if not re.search(r"[^\w\s'’-]|\d", run := text[start:end])}


def without_lead_in(text):
    """"Right, and your name?" without "Right, ", where three words are left: not "Your name, please?"."""
    rest = LEAD_IN.sub("", text)
    return rest if len(rest.split()) > 2 else text


def openings(text):
    """Those with which it begins."""
    return {*filter(text.startswith, runs(text))}


def cover(units, slot="", least=1):
    """[(runs of a sentence, is it wanted?)] -> (runs in those wanted and in few others, wanted units left).

    Each run adds `least` sentences, or all that there are. Of runs that add as many the best is in the slot's
    name, else has fewest words, else is longest.
    """
    wanted = [found for found, is_wanted in units if is_wanted]
    held, cues, least = Counter(chain(*(found for found, _ in units))), [], min(least, len(wanted) or 1)
    precise = [run for run, n in Counter(chain(*wanted)).items() if n >= SHARE * held[run]]
    while True:
        adds = Counter(chain(*wanted))
        best = max(precise, key=lambda run: (adds[run], run in slot, -run.count(" "), len(run), run),
                   default="")
        if adds[best] < least:
            return cues
        cues.append(best)
        wanted = [found for found in wanted if best not in found]


def regexes(texts):
    """Each text as a regex."""
    return [re.sub(r"[\\.^$*+?{}()|\[\]]", r"\\\g<0>", text) for text in texts]


def gather(sessions):
    """-> ({(goal, text of an expert): Counter of slots}, {slot: Counter of values}, {slot: its goals}).

    A message that asks for no slot, but whose answer reveals something, asks a generic question: the slot "".
    """
    said, values, goals = defaultdict(Counter), defaultdict(Counter), defaultdict(set)
    for s in sessions:
        revealed = []
        for m in reversed(s.messages):
            if m.asks is not None and m.role == "assistant":
                slots = [*map(slot_key, m.asks or [""] * bool(revealed))]
                said[s.goal, m.content.lower()].update([None, *slots])  # None: how often it is said
            revealed = [same(item) for item in hindsight.annotated(m)]
            for slot, value in revealed:
                values[slot][value] += 1
            for slot in ("", *(m.asks or ()), *dict(revealed)):
                goals[slot_key(slot)].add(s.goal)
    if 5 * len(goals[""]) > len(sessions) or not all(goals[""]):  # goals that hardly come back tell nothing
        goals = dict.fromkeys(goals, goals[""])
    return said, values, goals


def mine(sessions):
    """Training sessions -> the text of a lexicon file."""
    said, values, goals = gather(sessions)
    asked, tree = sum(said.values(), Counter()), yaml.safe_load(FRAME)
    if not any(asked) or not values:
        raise InputError(f"data.logs: the training sessions have no `{'learned' if any(asked) else 'asks'}`, "
                         "and a lexicon is mined from both; docs/lexicon.md shows how to write one by hand")

    def pieces(lex=None):
        return [(goal, slots, text, without_lead_in(piece), asks) for (goal, text), slots in said.items()
                for piece, asks in lexicon.sentences(text, lex) * min(2, slots[None])]

    tree["requests"] = cover([(openings(piece), any(slots) and not lexicon.questions(text))
                                 for _, slots, text, piece, asks in pieces() if not asks])
    found = pieces(lexicon.Lexicon.model_validate(tree))
    tree["openers"] = cover([(openings(piece), asks) for *_, piece, asks in found])
    units = [(goal, slots, runs(piece)) for goal, slots, _, piece, asks in found if asks]
    for slot in tqdm(sorted(goals, key=lambda slot: (-asked[slot], slot)), "slots", disable=None):
        if ":" in slot:
            raise InputError(f"data.logs: the slot {slot!r} holds a colon, as an attribute cannot: rename it")
        here = [(held, slot in slots) for goal, slots, held in units if goal in goals[slot]]
        tree["attributes"][slot] = entry = {"asks": cover(here, slot, 2)}
        if goals[slot] < goals[""]:
            entry["goals"] = regexes(sorted(goals[slot]))
        often = [value for value, n in values[slot].most_common(MOST) if value and n > 1]
        if often and {*values[slot]} <= {"yes", "no", "true", "false"}:
            entry["yes_no"] = True
        else:
            entry["values"] = {value: regexes([value]) for value in often}
    tree["generic_questions"] = tree["attributes"].pop("")["asks"]
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=108)
    for slot, n in asked.items():
        text = text.replace(f"\n  {slot}:\n", f"\n  {slot}:  # asked for {n} times\n")
    return text


# ------------------------------------------------------------------------------------------------------ check

def report(lex, sessions, seen):
    """Print what a lexicon finds in experts' messages beside their `asks` -> the table of its figures.

    seen: the texts of the training sessions, as wording.split has them. Slots and texts count in any form.
    """
    part = np.zeros((2, len(sessions), 2, 2, 2))  # right or all, session, form, texts, precision or recall
    texts = {kind: Counter() for kind in ("right", "missed", "false")}
    for i, s in enumerate(sessions):
        for m in s.messages:
            if m.asks is None or m.role == "user":
                continue
            asked = {*map(slot_key, m.asks)}
            for strict in (1, 0):
                found = {*map(slot_key, lexicon.asked(m.content, lex.at(s.goal), strict))}
                part[:, i, strict, int(split(m.content) in seen):] += (
                    [[len(found & asked)] * 2], [[len(found), len(asked)]])
            for kind, slots in zip(texts, (found & asked, asked - found, found - asked)):
                texts[kind].update((slot, m.content) for slot in slots)
    part = part.reshape(2, -1, 8)
    (drawn,), (right, of) = metrics.bootstrap(part), part.sum(1)
    cells = [metrics.cell(hits / n if n else None, interval=metrics.interval(column))
             for hits, n, column in zip(right, of, drawn.T)]
    grid = [["held-out sessions", "precision", "recall", "found", "asked"]]
    for name, k in SCOPES.items():
        grid.append([name, *cells[k:k + 2], *(f"{n:.0f}" for n in of[k:k + 2])])
    figures = metrics.aligned(grid)
    counts = [Counter(slot for slot, _ in found.elements()) for found in texts.values()]
    slots = [[slot, *(str(n[slot]) for n in counts)] for slot in sorted(set().union(*counts))]
    print(figures, metrics.aligned([["slot", *texts], *slots]), sep="\n\n")
    for kind in ("missed", "false"):
        print(f"\n{kind}:", *(f"{n:6} {slot}: {text}" for (slot, text), n in texts[kind].most_common(MOST)),
              sep="\n")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["mine", "check"])
    parser.add_argument("config", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    cfg = config.load(args.config)
    path = cfg.data.lexicon = args.out or cfg.data.lexicon
    config.need(cfg, "data.logs", "data.lexicon")
    sessions, held_out = hindsight.sessions(cfg)
    if not any(m.asks for s in held_out for m in s.messages):
        raise InputError("no held-out session has `asks`: set data.split, or data.eval_logs to labelled logs")
    seen = {split(m.content) for s in sessions for m in s.messages}
    if args.what == "check":
        report(lexicon.load(path), held_out, seen)
        return
    if Path(path).exists() and not args.force:
        raise InputError(f"{path} exists, perhaps edited: --force replaces it, --out names another file")
    text = mine(sessions)
    lex = lexicon.Lexicon.model_validate(yaml.load(text, lexicon.TextLoader))
    write_text(path, indent(report(lex, held_out, seen), "# ") + "\n" + text)


if __name__ == "__main__":
    cli(main)
