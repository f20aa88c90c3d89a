"""A lexicon from labelled logs, and how well a lexicon reads the questions of sessions held out.

    python -m corpora.lexicon mine cfg.yaml [key=value ...]     # writes data.lexicon, then checks it
    python -m corpora.lexicon check cfg.yaml [key=value ...]    # checks any lexicon

`mine` reads the training sessions: `asks` (the slots that an expert's message asks for) and `learned` (what
a user's message reveals). A person may edit the file. `check` compares what a lexicon finds in the experts'
messages of held-out sessions, each read as a response is graded, with `asks`. docs/lexicon.md explains both.

A slot gets `goals`, those of the sessions in which it occurs, unless these are all or hardly come back. A cue
is a run of up to three words of a question, that which most questions for the slot share. Of the sentences
with it, at the slot's goals, 90% must be of messages that ask for the slot, and two at least. These numbers
are fixed: nothing is tuned on the logs.
"""
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml

import config
import hindsight
import lexicon
from records import InputError, cli, same, slot_key, write_text
from wording import split

YES_NO = {"yes", "no", "true", "false"}  # values that a bare yes or no gives
HEAD = """goal: Find out what is needed.
'yes': ['yes', yeah, yep, sure]
'no': ['no', nope, not really]
complaints: {}
"""


def read(sessions):
    """-> ([(goal, text, slots)] of the experts' messages with `asks`, [(slot, value, goal)]: what users
    reveal, and slots that are asked for, with no value).

    A message that asks for no slot, but whose answer reveals something, asks a generic question: the slot "".
    """
    said, told = [], []
    for s in sessions:
        answer = []
        for m in reversed(s.messages):
            if m.role == "assistant" and m.asks is not None:
                slots = {*map(slot_key, m.asks or [""] * bool(answer))}
                said.append((s.goal, m.content, slots))
                told += [(slot, "", s.goal) for slot in slots]
            answer = [(*same(item), s.goal) for item in hindsight.annotated(m)]
            told += answer
    if not said:
        raise InputError("no training session, or no held-out one, has `asks`: label the logs, and hold some "
                         "out (data.split, data.eval_logs)")
    return said, told


def runs(text, first=None):
    """Runs of up to three words without marks between them, as they stand there; first=1: at the start."""
    text = text.lower().replace("’", "'")
    words = [*lexicon.WORD.finditer(text)]
    return {run for i, word in enumerate(words[:first]) for last in words[i:i + 3]
            if re.fullmatch(r"[\w\s'-]+", run := text[word.start():last.end()])}


def regex(text):
    """A text as a regex that a person can read."""
    return re.escape(text).replace(r"\ ", " ")


def cues(units, slot=""):
    """[(runs of a sentence, is it wanted?)] -> regexes for the best run of each sentence that is wanted.

    A run is the better the more such sentences hold it. One that is not wanted counts against nine: of the
    sentences with a cue 90% are wanted. Of runs as good it is one in the slot's name, then the shortest.
    """
    score = Counter()
    for found, wanted in units:
        for run in found:
            score[run] += 1 if wanted else -9

    def rank(run):
        return score[run], run in slot, -run.count(" "), len(run), run

    best = {max(found, key=rank) for found, wanted in units if wanted and found}
    return sorted(run for run in best if score[run] > 1)


def mine(sessions):
    """Training sessions -> the text of a lexicon file."""
    said, told = read(sessions)
    requests, openers, units = [], [], []
    for goal, text, slots in said:
        requested = any(slots) and not lexicon.questions(text)
        for sentence, has_mark in lexicon.sentences(text):
            first = runs(sentence, 1)
            openers.append((first, has_mark))
            if not has_mark:
                requests.append((first, requested))
            if has_mark or requested:
                units.append((goal, slots, runs(sentence)))
    everywhere = {s.goal for s in sessions}
    rare = 5 * len(everywhere) > len(sessions) or "" in everywhere  # goals that hardly come back say nothing
    attributes = {}
    for slot, rows in groupby(sorted(told), lambda row: row[0]):
        _, values, goals = zip(*rows)
        here = everywhere if rare else {*goals}
        often = {value for value, n in Counter(values).items() if value and n > 1}
        attributes[slot] = {
            "asks": cues([(found, slot in slots) for goal, slots, found in units if goal in here], slot),
            "goals": [regex(goal) for goal in sorted(here) if here < everywhere],
            "yes_no": bool(often & YES_NO),
            "values": {value: [regex(value)] for value in often - YES_NO}}
    return HEAD + yaml.safe_dump({
        "requests": cues(requests),
        "openers": cues(openers),
        "generic_questions": attributes.pop("", {"asks": []})["asks"],
        "attributes": attributes}, allow_unicode=True, width=108, default_flow_style=None)


def main():
    what, *rest = sys.argv[1:] or [""]
    if what not in ("mine", "check"):
        raise InputError("the first argument is mine or check, the second a config file (mine --help)")
    cfg = config.load(rest, __doc__)
    config.need(cfg, "data.logs", "data.lexicon")
    path = cfg.data.lexicon
    sessions, held_out = hindsight.sessions(cfg)
    said, _ = read(held_out)
    if what == "mine":
        if Path(path).exists():
            raise InputError(f"{path} exists, perhaps edited: remove it, or name another (data.lexicon=FILE)")
        write_text(path, mine(sessions))
    lex = lexicon.load(path)
    seen = {split(m.content) for s in sessions for m in s.messages}
    counts = np.zeros((2, 3), int)  # all texts, unseen ones; right, found, asked
    faults = Counter()
    for goal, text, slots in said:
        asked = slots - {""}
        found = set(map(slot_key, lexicon.asked(text, lex.at(goal))))
        counts[:1 if split(text) in seen else 2] += len(found & asked), len(found), len(asked)
        faults.update(f"missed {slot}: {text}" for slot in asked - found)
        faults.update(f"false  {slot}: {text}" for slot in found - asked)
    for name, (right, found, asked) in zip(("all", "unseen"), counts):
        with np.errstate(invalid="ignore"):  # 0 of 0 is nan
            print(f"{name} texts: precision {right / found:.3f} ({right} of {found}), "
                  f"recall {right / asked:.3f} ({right} of {asked})")
    for fault, n in faults.most_common(40):
        print(f"{n:6} {fault}")


if __name__ == "__main__":
    cli(main)
