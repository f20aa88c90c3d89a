"""Logs -> turns: at each decision point of a conversation, what was still to be learned, and go on or stop.

    python hindsight.py cfg.yaml [key=value ...]      # writes turns/{train,eval,valid}.jsonl and turns.html

The paper (arXiv 2510.25441) reads a conversation as u_0, x_1, u_1, ..., x_{T-1}, u_{T-1}: the user says u,
the expert x. It labels each point t = 1..T by hindsight. The context C_{t-1} is everything up to u_{t-1}.
I*_t is what the user reveals only later. s*_t is "continue" while something is left to learn and t < T, else
"stop". What the user reveals comes from a language model (hindsight.source: llm), a lexicon (rules) or the
logs' own `learned` fields (annotations). The model reads a session once and names the utterance that reveals
each item, so one call serves all points of a session.

Unlike the reference release, every context is the full prefix, and what the expert says after the user's last
words makes no further point. Sessions and points that teach nothing are left out and counted by reason.
A rerun replaces all its files but marks.jsonl. Logs are streamed: only a window of sessions, with their
extractions in flight, is in memory. At the end the training turns are read whole, as a trainer reads them,
for the page, the strange turns and the marks.
"""
import hashlib
import json
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import suppress
from functools import cache, partial
from itertools import chain, combinations, starmap
from statistics import fmean

import numpy as np
from pydantic import ValidationError, field_validator
from tqdm import tqdm

import config
import lexicon
import llm
import logs
import metrics
import report
from prompts import chat, dump, fill_goal, read_turns, spoken, turns_stamp
from records import (
    STOP,
    InputError,
    Message,
    Reply,
    Session,
    Slot,
    Text,
    Turn,
    as_line,
    cli,
    explain,
    f1,
    file_hash,
    flaw,
    is_named,
    lock,
    nearest,
    read_jsonl,
    read_records,
    same,
    shorten,
    slot_key,
    write_json,
    write_jsonl,
)

SHOWN = 3  # bad lines quoted per reason; the rest are counted
SLOTS = 30  # rows of the table of slots
STRANGE = 5  # turns of a kind to look at first
FILES = "eval.jsonl train.jsonl valid.jsonl self_check.jsonl".split()
BAR = "calls cached invalid failed tokens_in tokens_out".split()  # counts of the extractor beside the bar


# --------------------------------------------------------------------------------------------------- sessions

def is_blank(text):
    """Is there nothing to see: only white space and zero-width characters?"""
    return not any(c.isprintable() and not c.isspace() for c in text)


def unusable(session):
    """-> None, or (kind, detail): why a session teaches nothing."""
    if session.success is False:
        return "success is false", None
    if all(m.role != "user" or is_blank(m.content) for m in session.messages):
        return "no user utterance", "no message of the user holds any text"
    return None


END_MARKERS = config.default("hindsight.end_markers")


def check_session(row, end_markers=END_MARKERS):
    """A line of a log -> (its Session or None, None or (kind, detail): why it cannot be used).

    The Session ends with its first end marker.
    """
    if fault := flaw(row):
        return None, ("bad text", fault)
    try:
        session = Session.model_validate(row)
    except ValidationError as error:
        field, *inner = error.errors()[0]["loc"]
        kind = "annotations" if "learned" in inner or "asks" in inner else field
        hint = " (see data.roles)" if "role" in inner else ""
        return None, (f"bad {kind}", explain(error) + hint)
    for i, m in enumerate(session.messages, 1):
        if m.role == "assistant":
            if m.content.strip() in end_markers:
                del session.messages[i:]
            elif STOP in m.content:
                return None, ("stop marker", f"messages.{i - 1}.content holds {STOP}, which would be "
                                             "imitated: make it a message of its own (hindsight.end_markers)")
    return session, unusable(session)


class Utterance(Message):
    """Consecutive messages of one role."""
    learned: list[str]  # "slot: value" items that it reveals by the log's annotations
    question: bool  # does it ask for something?
    final: bool = False  # did the expert end the session after it?


def value_text(value):
    """A slot's value as text; lists, also those written as JSON in a string, are joined.

    >>> value_text('["Sunday"]'), value_text(["nuts", "milk"]), value_text(31), value_text(" a week ")
    ('Sunday', 'nuts, milk', '31', 'a week')
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            found = json.loads(value)
            value = value if flaw(found) else found
    if isinstance(value, list):
        return ", ".join(str(one) for one in value if one is not None)
    return str(value).strip()


def annotated(message):
    """The "slot: value" items that a user's message reveals by its own annotation."""
    if message.role != "user" or not message.learned:
        return []
    return [f"{slot.replace(':', ' ')}: {text}" for slot, value in message.learned.items()
            if value is not None and value == value and (text := value_text(value))]  # NaN is not itself


def utterances(messages, end_markers=END_MARKERS):
    """Drop blank messages and merge consecutive ones of a role -> list of Utterance, roles alternating.

    An assistant message asks if its `asks` is not empty; without `asks`, if it holds a question, courtesies
    ("Anything else?") apart. One that is nothing but an end marker ends the session, and is left out with all
    that follows.

    >>> session = Session(session_id="s", messages=[
    ...     {"role": "user", "content": "Hi"}, {"role": "user", "content": " "},
    ...     {"role": "user", "content": "a cough", "learned": {"symptom": "cough"}}])
    >>> utterances(session.messages)
    [Utterance(role='user', content='Hi\\na cough', learned=['symptom: cough'], question=False, final=False)]
    """
    out = []
    for m in messages:
        if is_blank(m.content):
            continue
        if m.role == "assistant" and m.content.strip() in end_markers:
            if out:
                out[-1].final = True
            break
        question = lexicon.expects_answer(m.content) if m.asks is None else bool(m.asks)
        if not out or out[-1].role != m.role:
            out.append(Utterance(role=m.role, content=m.content, learned=annotated(m), question=question))
            continue
        last = out[-1]
        last.content += "\n" + m.content
        last.learned += annotated(m)
        last.question |= question
    return out


# -------------------------------------------------------------------- what each utterance reveals, three ways

def extract_rules(utts, lex):
    """For each utterance, the items ("slot: value") it reveals by the lexicon."""
    return [[f"{slot}: {value}" for slot, value in found.items()] for found in lexicon.facts(utts, lex)]


def extract_annotations(utts):
    """For each utterance, the items ("slot: value") its messages are annotated with."""
    return [u.learned for u in utts]


def extractor_messages(prompt, utts, goal, generic):
    """The conversation as JSON lines, one a numbered utterance, so that no text can pass for another line."""
    prompt = fill_goal(prompt.replace("{generic}", ", ".join(generic) or "none"), goal)
    return chat(prompt, "\n".join(dump({"utterance": i, **said}) for i, said in enumerate(spoken(utts), 1)))


class Item(Reply):
    """Something that the client reveals."""
    utterance: int  # the number of the utterance that reveals it, from 1
    slot: Slot
    value: Text

    def __str__(self):
        return f"{self.slot.replace(':', ' ').strip()}: {self.value.strip()}"

    @field_validator("utterance")
    @classmethod
    def of_the_client(cls, number, info):
        utts = info.context
        if not 1 <= number <= len(utts) or utts[number - 1].role != "user":
            raise ValueError(f"must be the number of an utterance of the client, not {number}")
        return number


class Extraction(Reply):
    """What a session reveals. It is validated with the utterances as pydantic's context."""
    items: list[Item]

    def by_utterance(self, utts):
        """For each utterance, the items ("slot: value") it reveals."""
        out = [[] for _ in utts]
        for item in self.items:
            out[item.utterance - 1].append(str(item))
        return out


def ask(source, prompt, session, cfg, seeds):
    """Ask a language model what a session reveals, once for each seed. -> futures of Extractions"""
    how = cfg.hindsight
    utts = utterances(session.messages, how.end_markers)
    messages = extractor_messages(prompt, utts, session.goal or cfg.data.goal, how.generic)
    return [source.submit(messages, Extraction, seed, utts) for seed in seeds]


class Extractor:
    """Reads sessions as hindsight.source says."""

    def __init__(self, cfg):
        self.cfg, how = cfg, cfg.hindsight
        read = cfg.data.lexicon and how.source != "annotations"  # they come before a lexicon that is mined
        self.lexicon = lexicon.load(cfg.data.lexicon) if read else None  # always there for the rules
        self.goal = cfg.data.goal or (self.lexicon.goal if self.lexicon else "")
        self.source = llm.open_source("extractor", cfg) if how.source == "llm" else None

    def read(self, sessions):
        """Yield (session, readings) in input order. Each reading is a function: utterances -> items of each.

        There are hindsight.self_check readings, without those that the language model failed at.
        """
        if self.source:
            asked = partial(ask, self.source, self.source.prompt, cfg=self.cfg,
                            seeds=range(self.cfg.hindsight.self_check))
            for session, replies in llm.in_order(self.source, sessions, asked):
                yield session, [reply.by_utterance for reply in replies if reply]
        else:
            for session in sessions:
                lex = self.lexicon and self.lexicon.at(session.goal)
                yield session, [partial(extract_rules, lex=lex) if lex else extract_annotations]


# -------------------------------------------------------------------------------------------- decision points

def each_once(facts):
    """What utterances reveal -> {item as it is compared: the item where it stands first}."""
    first = {}
    for item in chain(*facts):
        first.setdefault(same(item), item)
    return first


def build_turns(session, extract, how):
    """A session -> (its turns, Counter of dropped points by reason, the items that each utterance reveals).

    extract: utterances -> items ("slot: value") of each; how: cfg.hindsight. Each user utterance is a point.
    Turns are numbered from 1 as in the paper; dropped points leave a gap.

    cough | since when? | two days, no fever | any allergies? | none | thanks, take this
    facts [["symptom: cough"], [], ["duration: two days", "fever: no"], [], ["allergies: none"], []], generic
    allergies. Point 1 wants duration and fever: continue. Point 2 wants nothing, as allergies are generic:
    stop (stop_rule last_turn: dropped). Point 3 is the last: stop. Had the user said "three days" at point 3,
    it would be a correction, which nobody could have asked for: a target only if duration is many-valued.
    """
    utts = utterances(session.messages, how.end_markers)
    facts, turns, dropped = extract(utts), [], Counter()
    ends = [i for i, u in enumerate(utts, 1) if u.role == "user"]
    for t, end in enumerate(ends, 1):
        known = each_once(facts[:end])
        answered = {slot for slot, _ in known}
        target = [item for (slot, value), item in each_once(facts[end:]).items()
                  if (slot, value) not in known and not is_named(slot, how.generic)
                  and (slot not in answered or is_named(slot, how.many_valued))]
        last, expert = end == ends[-1], utts[end] if end < len(utts) else None
        broken_off = last and not utts[-1].final
        if broken_off and not expert and how.user_end == "drop":
            dropped["session ends on a user utterance (hindsight.user_end=drop)"] += 1
        elif broken_off and expert and expert.question:
            dropped["closing question never answered"] += 1
        elif not last and not target and how.stop_rule == "last_turn":
            dropped["continue with an empty I* (hindsight.stop_rule=last_turn)"] += 1
        else:
            turns.append(Turn(
                turn_id=f"{session.session_id}_{t}", session_id=session.session_id, goal=session.goal,
                context=utts[:end], expert=expert and expert.content, known=list(known.values()),
                target=target, decision="continue" if target and not last else "stop"))
    return turns, dropped, facts


def agreement(results):
    """Turns of a session by several extractions (lists of turns) -> yield a dict a turn.

    f1 is the mean F1 of all pairs of targets; same_decision says whether all extractions have one decision.
    """
    by_id = defaultdict(list)
    for turn in chain(*results):
        by_id[turn.turn_id].append(turn)
    for turn_id, found in by_id.items():
        decisions, targets = [turn.decision for turn in found], [turn.target for turn in found]
        scores = list(starmap(f1, combinations(targets, 2)))
        yield {"turn_id": turn_id, "decisions": decisions, "targets": targets,
               "f1": fmean(scores) if scores else None,
               "same_decision": len(found) == len(results) and len(set(decisions)) == 1}


# ----------------------------------------------------------------------------------------------- file by file

@cache
def unknown_key(kind, name):
    return f"times the unknown key {name!r}{nearest(name, kind.model_fields)}"


class Tally:
    """What became of the conversations of data.logs or data.eval_logs, and why."""

    def __init__(self, files, seen):
        self.files = ", ".join(files)
        self.seen = seen  # session_id: where it stands
        self.sessions = 0  # used
        self.turns = {}  # id of a session that gave turns: how many
        self.aside, self.dropped, self.notes = Counter(), Counter(), Counter()
        self.slots = defaultdict(Counter)  # what is done with slots: how often with each
        self.wanted = Counter()  # continue turns by the size of I*
        self.shown = []  # what is said of single lines
        self.checks = []  # see agreement

    def set_aside(self, place, kind, detail):
        self.aside[kind] += 1
        if detail and self.aside[kind] <= SHOWN:
            self.shown.append(f"  {place}: set aside: {detail}")

    def add(self, session, turns, facts, generic):
        if turns:
            self.turns[session.session_id] = len(turns)
        self.wanted.update(len(turn.target) for turn in turns if turn.decision == "continue")
        revealed = [same(item)[0] for item in chain(*facts)]
        for what, slots in {
                "revealed": revealed,
                "asked for": [slot_key(slot) for m in session.messages for slot in m.asks or ()],
                "in I*": [same(item)[0] for turn in turns for item in turn.target],
                "left out as generic": [slot for slot in revealed if is_named(slot, generic)]}.items():
            self.slots[what].update(slots)
        for record in (session, *session.messages):
            self.notes.update(unknown_key(type(record), name) for name in record.model_extra)
        self.notes["blank messages left out"] += sum(is_blank(m.content) for m in session.messages)
        self.notes["sessions without a goal (set data.goal)"] += not session.goal

    def report(self, source, how):
        """What is to be said of the logs -> yield lines. how: cfg.hindsight"""
        turns, going_on, items = sum(self.turns.values()), self.wanted.total(), self.slots["in I*"].total()
        stops = turns and 1 - going_on / turns
        yield (f"{self.files}: {self.sessions + self.aside.total()} lines, {self.sessions} sessions used, "
               f"{turns} turns ({stops:.1%} stop)")
        for what, counts in {"sessions set aside": self.aside, "turns dropped": self.dropped,
                             "note": self.notes}.items():
            for kind, count in (+counts).most_common():
                yield f"  {what}: {count} {kind}"
        if source:
            yield f"  extractor: {llm.report(source)}"
        yield from self.shown
        if turns and not 0.02 <= stops <= 0.8:
            yield f"  warning: {stops:.1%} of the turns are stops: is everything found that users reveal?"
        revealed, asked = self.slots["revealed"], self.slots["asked for"]
        for what, slots in (("revealed and never asked for", revealed.keys() - asked),
                            ("asked for and never revealed", asked.keys() - revealed)):
            if asked and revealed and slots:
                yield f"  warning: {what}: {', '.join(sorted(slots))}"
        for name in how.generic + how.many_valued:
            if not any(is_named(slot, [name]) for slot in chain(revealed, asked)):
                yield (f"  note: no slot here is {name!r}, which hindsight.generic or hindsight.many_valued "
                       f"names{nearest(slot_key(name), revealed)}")
        if revealed:
            yield metrics.aligned([["slot", *self.slots]] + [
                [slot, *(str(counts[slot]) for counts in self.slots.values())]
                for slot, _ in revealed.most_common(SLOTS)])
        sizes = ", ".join(f"{n} of {size}" for size, n in sorted(self.wanted.items()))
        yield f"  continue turns by the size of I* (mean {items / max(going_on, 1):.2f}): {sizes}"

    def check(self, how):
        """Raise InputError where the turns cannot be right, or where there are none."""
        failed = self.aside["no usable extraction"]
        asked = failed + self.sessions
        if failed > how.max_failed * asked:
            raise InputError(f"{self.files}: no usable extraction for {failed} of {asked} sessions, over "
                             f"hindsight.max_failed={how.max_failed}: a rerun asks again")
        if not self.turns:
            raise InputError(f"{self.files} gave no turns: nothing was written (see above; data.fields and "
                             "data.roles tell what your logs call our fields and roles)")
        if not self.wanted:
            raise InputError(f"{self.files}: all turns would be stops, as no user reveals anything after the "
                             f"first message: see what hindsight.source={how.source} reads, and data.roles")


def usable(cfg, name, tally, goal):
    """The conversations of data.NAME -> yield the sessions to learn from. The others are set aside.

    goal: of sessions that name none.
    """
    for place, row in logs.rows(cfg, name, lambda place, why: tally.set_aside(place, "bad line", why)):
        session, why = check_session(row, cfg.hindsight.end_markers)
        if not why or why[0] not in ("bad text", "bad session_id"):
            session_id = str(row["session_id"])
            if first := tally.seen.get(session_id):
                why = "duplicate session_id", f"session_id {session_id!r} already stands in {first}"
            else:
                tally.seen[session_id] = place
        if why:
            tally.set_aside(place, *why)
        else:
            tally.notes["messages cut after an end marker"] += len(row["messages"]) - len(session.messages)
            session.goal = session.goal or goal
            yield session


def sessions(cfg):
    """-> (training sessions, held-out sessions) of a config, those that hindsight.py uses."""
    tally, goal, parts = Tally([], {}), cfg.data.goal, ([], [])
    for session in usable(cfg, "logs", tally, goal):
        parts[logs.is_held_out(session.session_id, cfg.data)].append(session)
    parts[1].extend(usable(cfg, "eval_logs", tally, goal))
    return parts


def build_file(cfg, name, out, extractor, seen):
    """The sessions of data.NAME -> turns, written to the open file `out` in input order. -> Tally

    seen: where sessions stand by their ids; one that is there is set aside. InputError: there are no turns.
    """
    how, source, tally = cfg.hindsight, extractor.source, Tally(getattr(cfg.data, name), seen)
    bar = tqdm(usable(cfg, name, tally, extractor.goal), tally.files, unit=" sessions", disable=None)
    for session, readings in extractor.read(bar):
        if how.source == "annotations" and all(m.learned is None for m in session.messages):
            tally.aside["without annotations (no message has 'learned')"] += 1
            tally.add(session, [], [], how.generic)
            continue
        results = [build_turns(session, items_of, how) for items_of in readings]
        if not results:
            tally.aside["no usable extraction"] += 1
            continue
        tally.sessions += 1
        turns, dropped, facts = results[0]
        out.writelines(map(as_line, turns))
        tally.add(session, turns, facts, how.generic)
        tally.dropped.update(dropped)
        if how.self_check > 1:
            tally.checks += agreement([made for made, *_ in results])
        if source:
            bar.set_postfix({kind: source.tally.n[kind] for kind in BAR}, refresh=False)
    tally.told = "\n".join(tally.report(source, how))
    print(tally.told)
    tally.check(how)
    return tally


def by_hash(name, seed):
    """A seeded hash, to sort names or to share them out by: their order does not matter."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def divide(ids, data, seed):
    """Ids of sessions that gave turns -> {id: "train", "valid" or "eval"}. data: cfg.data"""
    part = {i: "eval" if logs.is_held_out(i, data) else "train" for i in ids}
    rest = sorted((i for i in ids if part[i] == "train"), key=partial(by_hash, seed=seed))
    part |= dict.fromkeys(rest[:data.valid_sessions], "valid")
    wanted = {"train"} if data.eval_logs or not data.split else {"train", "eval"}
    for name in wanted.difference(part.values()):
        raise InputError(f"data.split={data.split} and data.valid_sessions={data.valid_sessions} leave none "
                         f"of {len(ids)} sessions for turns/{name}.jsonl: change them")
    return part


# ------------------------------------------------------------------------------------ for a person to look at

def strangest(turns):
    """Print up to ten turns where s* and what the expert did differ. -> {turn_id: why}"""
    strange = {}
    for turn in turns:
        asks_on = lexicon.expects_answer(turn.expert or "")
        why = f"s* is {turn.decision}, the expert asks {'on' if asks_on else 'nothing'}"
        if asks_on != (turn.decision == "continue") and list(strange.values()).count(why) < STRANGE:
            strange[turn.turn_id] = why
            print(f"  strange: {turn.turn_id!r}: {why}: {shorten(turn.context[-1].content)} "
                  f"-> {shorten(turn.expert)}, I* {turn.target}")
    return strange


class Mark(Turn):
    """A turn for a person to judge: are I* and s* right? null: not judged."""
    target_right: bool | None = None
    decision_right: bool | None = None


def report_marks(path, turns):
    """Print how often a person who marked turns found I* and s* right. Turns that have changed do not count.

    The 95% interval is Jeffreys', of a binomial proportion.
    """
    now = {turn.turn_id: (turn.decision, turn.target, turn.context) for turn in turns}
    found = {mark.turn_id: mark for _, mark in read_records(path, Mark)}
    marks = [mark for turn_id, mark in found.items()
             if now.get(turn_id) == (mark.decision, mark.target, mark.context)]
    if len(marks) < len(found):
        print(f"{path}: {len(found) - len(marks)} turns in it are no longer so, and do not count")
    for name in ("target_right", "decision_right"):
        said = [getattr(mark, name) for mark in marks]
        right, wrong = said.count(True), said.count(False)
        low, high = metrics.interval(np.random.default_rng(0).beta(right + 0.5, wrong + 0.5, 10_000))
        print(f"{path}: {name} at {right} of {right + wrong} turns (95% interval {low:.0%} to {high:.0%})")


def show(cfg, told):
    """Print the strangest training turns, write a page of turns, and turns for a person to mark.

    told: what was printed of the logs, for the page. A file of marks that is there stays.
    """
    folder, n = cfg.turns_path, cfg.hindsight.sample
    path = folder / "marks.jsonl"
    turns = sorted(read_turns(folder / "train.jsonl"), key=lambda turn: by_hash(turn.turn_id, cfg.seed))
    page = report.write_turns(folder / "turns.html", told, turns, strangest(turns))
    print(f"wrote {page}: look at the labels before you train on them")
    if path.is_file():
        report_marks(path, turns)
    elif n:
        unmarked = {"target_right": None, "decision_right": None}
        write_jsonl(path, [unmarked | turn.dump() for turn in turns[:n]])
        print(f"wrote {path}: replace null by true or false, and run hindsight.py again")


def main(argv=None):
    cfg = config.load(argv or sys.argv[1:], __doc__)
    config.need(cfg, "data.logs")
    if cfg.hindsight.source == "rules":
        config.need(cfg, "data.lexicon")
    folder = cfg.turns_path
    lock(cfg.run_path)
    lock(folder)
    stamp = turns_stamp(cfg)  # the logs may grow meanwhile
    extractor = Extractor(cfg)
    for left in folder.glob(".building.*"):  # by a run that was killed
        left.unlink()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix=".building.", dir=folder) as made:
        train = build_file(cfg, "logs", made, extractor, {})
        part, turns, checks = divide(train.turns, cfg.data, cfg.seed), train.turns, train.checks
        if cfg.data.eval_logs:
            held_out = build_file(cfg, "eval_logs", made, extractor, train.seen)
            part |= dict.fromkeys(held_out.turns, "eval")
            turns |= held_out.turns
            checks += held_out.checks
        made.flush()
        if not (folder / "made.json").is_file() and any((folder / name).is_file() for name in FILES):
            raise InputError(f"data.turns: {folder} holds other files of these names ({', '.join(FILES)}), "
                             "which would be replaced: name another folder, or remove them")
        write_json(folder / "made.json", {"files": {}})  # until the end the files do not belong together
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        files = {}
        for name in sorted({*part.values()}):
            path = folder / f"{name}.jsonl"
            write_jsonl(path, (turn for _, turn in read_jsonl(made.name) if part[turn["session_id"]] == name))
            counts = [n for session_id, n in turns.items() if part[session_id] == name]
            print(f"wrote {path}: {sum(counts)} turns of {len(counts)} sessions")
            files[path.name] = file_hash(path)
    write_json(folder / "made.json", {**stamp, "files": files})
    if checks:
        mean = fmean([check["f1"] for check in checks if check["f1"] is not None] or [0])
        alike = sum(check["same_decision"] for check in checks)
        write_jsonl(folder / "self_check.jsonl", checks)
        print(f"self-check: mean F1 of I* {mean:.3f}, the same s* at {alike} of {len(checks)} turns")
    show(cfg, train.told)


if __name__ == "__main__":
    cli(main)
