"""Logs -> turns: at each decision point of a conversation, what was still to be learned, and go on or stop.

    python hindsight.py cfg.yaml [key=value ...]      # writes run_dir/turns/{train,eval,valid}.jsonl

The paper (arXiv 2510.25441) reads a conversation as u_0, x_1, u_1, ..., x_{T-1}, u_{T-1}: the user says u,
the expert x. It labels each point t = 1..T by hindsight. The context C_{t-1} is everything up to u_{t-1}.
I*_t is what the user reveals only later. s*_t is "continue" while something is left to learn and t < T, else
"stop". What the user reveals comes from a language model (hindsight.source: llm), a lexicon (rules) or the
logs' own `learned` fields (annotations). The model reads a session once and names the utterance that reveals
each item, so one call serves all points of a session.

Unlike the reference release, every context is the full prefix, and what the expert says after the user's last
words makes no further point. Sessions and points that teach nothing are left out and counted by reason.
A rerun replaces all its files. Logs are streamed: only a window of sessions, with their extractions in
flight, is in memory.
"""
import hashlib
import json
import sys
import tempfile
from collections import Counter, defaultdict
from functools import cache, partial
from itertools import chain, combinations, starmap
from pathlib import Path

from pydantic import ValidationError, field_validator
from tqdm import tqdm

import config
import lexicon
import llm
from prompts import chat, dump, spoken
from records import (
    InputError,
    Message,
    Reply,
    Session,
    Text,
    Turn,
    as_line,
    cli,
    explain,
    f1,
    file_hash,
    is_named,
    lock,
    nearest,
    read_jsonl,
    same,
    slot_key,
    whole_file,
    write_json,
    write_jsonl,
)

SHOWN = 3  # bad lines quoted per reason; the rest are counted


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
    try:
        as_line(row).encode()
        session = Session.model_validate(row)
    except UnicodeEncodeError:
        return None, ("bad text", "a text holds half a surrogate pair (a cut emoji), which is not UTF-8")
    except ValidationError as error:
        field, *inner = error.errors()[0]["loc"]
        kind = "bad annotations" if "learned" in inner or "asks" in inner else f"bad {field}"
        return None, ("no session_id" if field == "session_id" else kind, explain(error))
    for i, m in enumerate(session.messages, 1):
        if m.role == "assistant" and m.content.strip() in end_markers:
            del session.messages[i:]
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
        try:
            value = json.loads(value)
        except ValueError:
            pass
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()


def annotated(message):
    """The "slot: value" items that a user's message reveals by its own annotation."""
    if message.role != "user" or not message.learned:
        return []
    return [f"{slot.replace(':', ' ')}: {text}" for slot, value in message.learned.items()
            if value is not None and (text := value_text(value))]


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
    prompt = prompt.replace("{goal}", goal).replace("{generic}", ", ".join(generic) or "none")
    return chat(prompt, "\n".join(dump({"utterance": i, **said}) for i, said in enumerate(spoken(utts), 1)))


class Item(Reply):
    """Something that the client reveals."""
    utterance: int  # the number of the utterance that reveals it, from 1
    slot: Text
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


class Extractor:
    """Reads sessions as hindsight.source says."""

    def __init__(self, cfg):
        self.settings = how = cfg.hindsight
        lex = lexicon.load(cfg.data.lexicon) if cfg.data.lexicon else None
        self.goal = cfg.data.goal or (lex.goal if lex else "")
        self.source = llm.open_source("extractor", cfg) if how.source == "llm" else None
        self.at_once = partial(extract_rules, lex=lex) if how.source == "rules" else extract_annotations

    def read(self, sessions):
        """Yield (session, readings) in input order. Each reading is a function: utterances -> items of each.

        There are hindsight.self_check readings, without those that the language model failed at.
        """
        if not self.source:
            for session in sessions:
                yield session, [self.at_once]
            return
        for session, replies in llm.in_order(self.source, sessions, self.ask):
            yield session, [reply.by_utterance for reply in replies if reply]

    def ask(self, session):
        utts = utterances(session.messages, self.settings.end_markers)
        messages = extractor_messages(self.source.prompt, utts, session.goal, self.settings.generic)
        return [self.source.submit(messages, Extraction, seed, utts)
                for seed in range(self.settings.self_check)]


# -------------------------------------------------------------------------------------------- decision points

def each_once(facts):
    """What utterances reveal -> {item as it is compared: the item where it stands first}."""
    first = {}
    for item in chain(*facts):
        first.setdefault(same(item), item)
    return first


def decision_points(utts, facts, how):
    """Yield (end, known, target, decision, dropped) for each user utterance.

    The context is utts[:end], known and target (I*) are "slot: value" items, decision is s*. dropped says why
    no turn is made of the point, or is None. facts: for each utterance, the items it reveals. how:
    cfg.hindsight.

    cough | since when? | two days, no fever | any allergies? | none | thanks, take this
    facts [["symptom: cough"], [], ["duration: two days", "fever: no"], [], ["allergies: none"], []], generic
    allergies. Point 1 wants duration and fever: continue. Point 2 wants nothing, as allergies are generic:
    stop (stop_rule last_turn: dropped). Point 3 is the last: stop. Had the user said "three days" at point 3,
    it would be a correction, which nobody could have asked for: a target only if duration is many-valued.
    """
    ends = [i for i, u in enumerate(utts, 1) if u.role == "user"]
    for end in ends:
        known = each_once(facts[:end])
        answered = {slot for slot, _ in known}
        target = [item for (slot, value), item in each_once(facts[end:]).items()
                  if (slot, value) not in known and not is_named(slot, how.generic)
                  and (slot not in answered or is_named(slot, how.many_valued))]
        last = end == ends[-1]
        broken_off, dropped = last and not utts[-1].final, None
        if broken_off and end == len(utts) and how.user_end == "drop":
            dropped = "session ends on a user utterance (hindsight.user_end=drop)"
        elif broken_off and end < len(utts) and utts[end].question:
            dropped = "closing question never answered"
        elif not last and not target and how.stop_rule == "last_turn":
            dropped = "continue with an empty I* (hindsight.stop_rule=last_turn)"
        yield end, list(known.values()), target, "continue" if target and not last else "stop", dropped


def build_turns(session, extract, how):
    """A session -> (its turns, Counter of dropped points by reason, the items that each utterance reveals).

    extract: utterances -> items of each; how: cfg.hindsight. Turns are numbered from 1 as in the paper;
    dropped ones leave a gap.
    """
    utts = utterances(session.messages, how.end_markers)
    turns, dropped = [], Counter()
    facts = extract(utts)
    for t, (end, known, target, decision, why) in enumerate(decision_points(utts, facts, how), 1):
        if why:
            dropped[why] += 1
            continue
        turns.append(Turn(
            turn_id=f"{session.session_id}_{t}", session_id=session.session_id, goal=session.goal,
            context=utts[:end], expert=utts[end].content if end < len(utts) else None,
            known=known, target=target, decision=decision))
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
               "f1": sum(scores) / len(scores) if scores else None,
               "same_decision": len(found) == len(results) and len(set(decisions)) == 1}


# ----------------------------------------------------------------------------------------------- file by file

@cache
def unknown_key(kind, name):
    return f"times the unknown key {name!r}{nearest(name, kind.model_fields)}"


class Tally:
    """What became of the lines of one log file, and why."""

    def __init__(self, path):
        self.path = path
        self.seen = {}  # session_id: its line
        self.sessions = 0  # used
        self.turns = {}  # id of a session that gave turns: how many
        self.wanted = []  # sizes of I* at the continue turns
        self.aside, self.dropped, self.notes = Counter(), Counter(), Counter()
        self.revealed, self.asked = set(), set()  # slots, as they are compared
        self.shown = []  # what is said of single lines
        self.checks = []  # see agreement

    def set_aside(self, line, kind, detail):
        self.aside[kind] += 1
        if detail and self.aside[kind] <= SHOWN:
            self.shown.append(f"  {self.path}:{line}: set aside: {detail}")

    def add(self, session, turns, facts, generic):
        if turns:
            self.turns[session.session_id] = len(turns)
        for item in chain(*facts):
            slot = same(item)[0]
            self.revealed.add(slot)
            self.notes[f"items left out of I*: the slot {slot!r} is generic"] += is_named(slot, generic)
        for m in session.messages:
            self.asked.update(map(slot_key, m.asks or ()))
        for record in (session, *session.messages):
            self.notes.update(unknown_key(type(record), name) for name in record.model_extra)
        self.wanted += [len(turn.target) for turn in turns if turn.decision == "continue"]
        self.notes["blank messages left out"] += sum(is_blank(m.content) for m in session.messages)
        self.notes["sessions without a goal (set data.goal)"] += not session.goal

    def report(self, source):
        turns = sum(self.turns.values())
        told = f"{self.sessions + self.aside.total()} lines, {self.sessions} sessions used, {turns} turns"
        if turns:
            rate, size = len(self.wanted) / turns, sum(self.wanted) / max(len(self.wanted), 1)
            told += f" ({rate:.1%} continue, {1 - rate:.1%} stop), mean size of I* where continue {size:.2f}"
        print(f"{self.path}: {told}")
        for what, counts in zip(("sessions set aside", "turns dropped", "note"),
                                (self.aside, self.dropped, self.notes)):
            for kind, count in (+counts).most_common():
                print(f"  {what}: {count} {kind}")
        if source:
            print(f"  extractor: {llm.report(source)}")
        for line in self.shown:
            print(line)
        if turns and not 0.02 <= 1 - rate <= 0.8:
            print(f"  warning: {1 - rate:.1%} of the turns are stops: is everything found that users reveal?")
        for what, slots in (("revealed and never asked for", self.revealed - self.asked),
                            ("asked for and never revealed", self.asked - self.revealed)):
            if self.asked and self.revealed and slots:
                print(f"  warning: {what}: {', '.join(sorted(slots))}")

    def check(self, how):
        """Raise InputError where the turns cannot be right, or where there are none."""
        failed = self.aside["no usable extraction"]
        if failed > how.max_failed * (failed + self.sessions):
            raise InputError(f"{self.path}: no usable extraction for {failed} of {failed + self.sessions} "
                             f"sessions, over hindsight.max_failed={how.max_failed}; a rerun asks again")
        if not self.turns:
            raise InputError(f"{self.path} gave no turns, so nothing was written (see above)")
        if not self.revealed:
            raise InputError(f"{self.path}: no user reveals anything, so all turns would be stops: see what "
                             f"hindsight.source={how.source} reads (learned, lexicon, extractor)")


def usable(rows, tally, not_in, extractor):
    """Rows of a log -> yield the sessions to learn from, each with a goal. The others are set aside."""
    for line, row in rows:
        session, why = check_session(row, extractor.settings.end_markers)
        if not why or why[0] not in ("bad text", "no session_id"):
            session_id = str(row["session_id"])
            first = tally.seen.setdefault(session_id, line)
            if first != line:
                why = "duplicate session_id", f"session_id {session_id!r} already stands in line {first}"
            elif session_id in not_in:
                why = "also in the training logs", f"session_id {session_id!r} is also in the training logs"
        if why:
            tally.set_aside(line, *why)
        else:
            session.goal = session.goal or extractor.goal
            yield session


def build_file(path, out, extractor, not_in=()):
    """The sessions of a log file -> turns, written to the file `out` in input order. -> Tally

    not_in: ids of sessions to be set aside. Raises InputError where there are no turns.
    """
    how, source, tally = extractor.settings, extractor.source, Tally(path)
    bar = tqdm(read_jsonl(path, lambda line, why: tally.set_aside(line, "bad line", why)), path,
               unit=" sessions", disable=None)
    with open(out, "w", encoding="utf-8") as lines:
        for session, readings in extractor.read(usable(bar, tally, not_in, extractor)):
            results = [build_turns(session, items_of, how) for items_of in readings]
            if not results:
                tally.aside["no usable extraction"] += 1
                continue
            tally.sessions += 1
            turns, dropped, facts = results[0]
            lines.writelines(map(as_line, turns))
            tally.add(session, turns, facts, how.generic)
            tally.dropped.update(dropped)
            if how.self_check > 1:
                tally.checks += agreement([made for made, *_ in results])
            if source:
                n = source.tally.n
                failed, tokens = n["invalid"] + n["failed"], (n["tokens_in"] + n["tokens_out"]) / 1e6
                bar.set_postfix_str(f"{n['calls']} calls, {n['cached']} cached, {failed} failed, "
                                    f"{tokens:.2f}M tokens", refresh=False)
    tally.report(source)
    tally.check(how)
    return tally


def pick_valid(ids, n, seed):
    """n whole sessions, chosen by a seeded hash of their ids, whatever their order."""
    return set(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:n])


def split(path, folder, valid):
    """The turns in a file -> folder/train.jsonl, those of the sessions in `valid` -> folder/valid.jsonl."""
    with whole_file(folder / "train.jsonl") as train, whole_file(folder / "valid.jsonl") as held_out, \
            open(path, encoding="utf-8") as lines:
        for line in lines:
            (held_out if json.loads(line)["session_id"] in valid else train).write(line)


def write_checks(path, checks, n):
    """Write and sum up how far n extractions agree."""
    write_jsonl(path, checks)
    scores = [check["f1"] for check in checks if check["f1"] is not None]
    mean, alike = sum(scores) / max(len(scores), 1), sum(check["same_decision"] for check in checks)
    print(f"self-check over {n} extractions: mean F1 of I* {mean:.3f}, "
          f"the same s* at {alike} of {len(checks)} turns; {path}")


def main(argv=None):
    cfg = config.load(argv or sys.argv[1:], __doc__)
    config.need(cfg, "data.logs")
    if cfg.hindsight.source == "rules":
        config.need(cfg, "data.lexicon")
    lock(cfg.run_path)
    extractor = Extractor(cfg)
    folder = cfg.run_path / "turns"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building.", dir=folder) as aside:
        aside = Path(aside)
        train = build_file(cfg.data.logs, aside / "train", extractor)
        checks = train.checks
        if cfg.data.eval_logs:
            checks += build_file(cfg.data.eval_logs, aside / "eval", extractor, train.seen).checks
        valid = pick_valid(train.turns, cfg.data.valid_sessions, cfg.seed)
        if valid and len(valid) == len(train.turns):
            raise InputError(f"data.valid_sessions={cfg.data.valid_sessions} leaves no session of "
                             f"{cfg.data.logs} to train on; lower it")
        write_json(folder / "made.json", {"files": {}})  # until the end the files do not belong together
        for path in folder.glob("*.jsonl"):
            path.unlink()
        split(aside / "train", folder, valid)
        if not valid:
            (folder / "valid.jsonl").unlink()
        if cfg.data.eval_logs:
            (aside / "eval").replace(folder / "eval.jsonl")
    files = {}
    for path in sorted(folder.glob("*.jsonl")):
        of = Counter(turn["session_id"] for _, turn in read_jsonl(path))
        print(f"wrote {path}: {of.total()} turns of {len(of)} sessions")
        files[path.name] = file_hash(path)
    write_json(folder / "made.json", {**config.made_with(cfg, "turns"), "files": files})
    if checks:
        write_checks(folder / "self_check.jsonl", checks, cfg.hindsight.self_check)


if __name__ == "__main__":
    cli(main)
