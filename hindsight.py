"""Logs -> turns: at each decision point of a real conversation, what was still to be learned (I*), and go on or stop.

    python hindsight.py cfg.yaml [key=value ...]      # writes run_dir/turns/{train,eval,valid}.jsonl

The paper (arXiv 2510.25441) reads a conversation as u_0, x_1, u_1, ..., x_{T-1}, u_{T-1} and labels each point t = 1..T
by hindsight: the context C_{t-1} is everything up to u_{t-1}; I*_t is what the user reveals only later; s*_t is
"continue" while there is something left to learn and t < T, else "stop". What the user reveals comes from a lexicon
(hindsight.source: rules) or from the logs' own `learned` fields (annotations).

Unlike the reference release, every context is the full prefix, and what the expert says after the user's last words
makes no further point. Sessions and points that teach nothing are left out and counted by reason; a rerun replaces
all its files.
"""
import functools
import hashlib
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import config
import lexicon
from data import InputError, check_messages, cli, read_jsonl, write_json, write_jsonl

SHOWN = 3  # bad lines quoted per reason; the rest are counted


# ---------------------------------------------------------------------------------------------- pure functions

def slot_key(slot):
    """A slot's name as it is compared: "Code_Type " and "code type" are one."""
    return " ".join(unicodedata.normalize("NFKC", str(slot)).casefold().replace("_", " ").split())


def same(item):
    """An item as it is compared.

    >>> same("start_time: 8  PM.") == same("Start time:８ pm")
    True
    """
    slot, _, value = item.partition(":")
    return slot_key(slot), " ".join(unicodedata.normalize("NFKC", value).casefold().split()).strip(" .,!")


def value_text(value):
    """A slot's value as text; lists, also those written as JSON in a string, are joined.

    >>> value_text('["Sunday"]'), value_text(["nuts", "milk"]), value_text(31)
    ('Sunday', 'nuts, milk', '31')
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()


def is_blank(text):
    """Nothing to see: empty, white space, zero-width characters."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def utterances(messages):
    """Drop blank messages, merge consecutive ones of a role -> alternating list of
    {"role", "content", "learned": [(slot, value)], "question": does it ask for something?}.

    An assistant message asks if its `asks` is not empty; where it has none, if it holds a question mark.

    >>> utterances([{"role": "user", "content": "Hi"}, {"role": "user", "content": " "},
    ...             {"role": "user", "content": "a cough", "learned": {"symptom": "cough"}}])
    [{'role': 'user', 'content': 'Hi\\na cough', 'learned': [('symptom', 'cough')], 'question': False}]
    """
    out = []
    for m in messages:
        if is_blank(m["content"]):
            continue
        asks = m.get("asks")
        question = lexicon.questions(m["content"]) > 0 if asks is None else bool(asks)
        learned = [(slot, value_text(v)) for slot, v in (m.get("learned") or {}).items() if v is not None]
        if not out or out[-1]["role"] != m["role"]:
            out.append({"role": m["role"], "content": m["content"], "learned": learned, "question": question})
            continue
        out[-1]["content"] += "\n" + m["content"]
        out[-1]["learned"] += learned
        out[-1]["question"] |= question
    return out


def extract_rules(utts, lex):
    """For each utterance, the items ("slot: value") it reveals by the lexicon."""
    return [[f"{slot}: {value}" for slot, value in found.items()] for found in lexicon.facts(utts, lex)]


def extract_annotations(utts):
    """For each utterance, the items ("slot: value") its `learned` fields hold."""
    return [[f"{slot}: {value}" for slot, value in u["learned"] if value] if u["role"] == "user" else [] for u in utts]


def decision_points(utts, facts, stop_rule="paper", user_end="stop", generic=()):
    """-> [(end, target, decision, reason)] for each user utterance: the context is utts[:end], `target` is I*, and
    `decision` is None where the point is dropped for `reason` (else reason is None).

    user: cough | which since when? | user: two days, no fever | any allergies? | user: none | thanks, take this
    facts [["symptom: cough"], [], ["duration: two days", "fever: no"], [], ["allergies: none"], []], generic allergies:
    point 1 wants duration and fever -> continue; point 2 wants nothing (allergies are generic) -> stop, by
    stop_rule last_turn dropped; point 3 is the last -> stop.
    """
    ends = [i + 1 for i, u in enumerate(utts) if u["role"] == "user"]
    left_out, points = {slot_key(slot) for slot in generic}, []
    for end in ends:
        seen, target = {same(item) for items in facts[:end] for item in items}, []
        for item in (item for items in facts[end:] for item in items):
            if same(item) not in seen and same(item)[0] not in left_out:
                seen.add(same(item))
                target.append(item)
        reason = None
        if end == ends[-1] and end == len(utts) and user_end == "drop":
            reason = "session ends on a user utterance (hindsight.user_end=drop)"
        elif end == ends[-1] and end < len(utts) and utts[end]["question"]:
            reason = "closing question never answered"
        elif end != ends[-1] and not target and stop_rule == "last_turn":
            reason = "continue with an empty I* (hindsight.stop_rule=last_turn)"
        decision = "continue" if target and end != ends[-1] else "stop"
        points.append((end, target, None if reason else decision, reason))
    return points


def build_turns(session, extract, goal="", stop_rule="paper", user_end="stop", generic=()):
    """One checked session -> (its turns, Counter of dropped points by reason). `extract(utterances)` gives the items
    of each utterance; turns are numbered from 1 as in the paper, dropped ones leave a gap."""
    utts = utterances(session["messages"])
    session_id, goal = str(session["session_id"]), session.get("goal") or goal
    context = [{"role": u["role"], "content": u["content"]} for u in utts]
    turns, dropped = [], Counter()
    points = decision_points(utts, extract(utts), stop_rule, user_end, generic)
    for t, (end, target, decision, reason) in enumerate(points, 1):
        if reason:
            dropped[reason] += 1
            continue
        turns.append({"turn_id": f"{session_id}_{t}", "session_id": session_id, "goal": goal, "context": context[:end],
                      "expert": context[end]["content"] if end < len(context) else None,
                      "target": target, "decision": decision})
    return turns, dropped


def check_session(session):
    """-> None, or (kind, detail): why a log line cannot be used."""
    try:
        json.dumps(session, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "bad text", "a text holds half a surrogate pair (a cut emoji), which is not UTF-8"
    session_id = session.get("session_id")
    if not isinstance(session_id, (str, int)) or isinstance(session_id, bool) or not str(session_id).strip():
        return "no session_id", f"'session_id' must be a text or a whole number, not {session_id!r}"
    bad = check_messages(session.get("messages"))
    if bad:
        return "bad messages", bad
    for i, m in enumerate(session["messages"]):
        learned, asks = m.get("learned"), m.get("asks")
        if learned is not None and not isinstance(learned, dict):
            return "bad annotations", f"message {i}: 'learned' must be an object {{slot: value}}, not {learned!r}"
        if any(isinstance(v, dict) for v in (learned or {}).values()):
            return "bad annotations", f"message {i}: a value in 'learned' is an object; expected a text, number or list"
        if asks is not None and not (isinstance(asks, list) and all(isinstance(a, str) for a in asks)):
            return "bad annotations", f"message {i}: 'asks' must be a list of slot names, not {asks!r}"
    if not isinstance(session.get("goal", ""), (str, type(None))):
        return "bad goal", f"'goal' must be a text, not {session['goal']!r}"
    if not isinstance(session.get("success", True), (bool, type(None))):
        return "bad success", f"'success' must be true or false, not {session['success']!r}"
    if session.get("success") is False:
        return "success is false", None
    if not any(m["role"] == "user" and not is_blank(m["content"]) for m in session["messages"]):
        return "no user utterance", "no message of the user holds any text"
    return None


# ------------------------------------------------------------------------------------------------------ file by file

def build_file(path, extract, hindsight, goal="", not_in=frozenset()):
    """All sessions of a log file -> (turns, ids seen, report lines). Sessions in `not_in` are set aside."""
    turns, seen, aside, dropped, notes, shown = [], {}, Counter(), Counter(), Counter(), []

    def set_aside(line, kind, detail):
        aside[kind] += 1
        if detail and aside[kind] <= SHOWN:
            shown.append(f"  {path}:{line}: set aside: {detail}")

    for line, session in tqdm(read_jsonl(path, lambda line, why: set_aside(line, "bad line", why)),
                              desc=str(path), unit=" sessions", disable=None):
        bad, session_id = check_session(session), str(session.get("session_id"))
        if bad and bad[0] in ("bad text", "no session_id"):
            set_aside(line, *bad)
            continue
        first = seen.setdefault(session_id, line)
        if first != line:
            bad = "duplicate session_id", f"session_id {session_id!r} already stands in line {first}"
        elif session_id in not_in:
            bad = "also in the training logs", f"session_id {session_id!r} also stands in the training logs"
        if bad:
            set_aside(line, *bad)
            continue
        made, why = build_turns(session, extract, goal, hindsight.stop_rule, hindsight.user_end, hindsight.generic)
        turns += made
        dropped += why
        notes["blank messages left out"] += sum(is_blank(m["content"]) for m in session["messages"])
        notes["sessions without a goal (set data.goal)"] += not (session.get("goal") or goal)
        notes["sessions"] += 1
    used = notes.pop("sessions", 0)
    wanted = [len(t["target"]) for t in turns if t["decision"] == "continue"]
    report = [f"{path}: {used + sum(aside.values())} lines, {used} sessions used, {len(turns)} turns"]
    if turns:
        report[0] += (f" ({len(wanted) / len(turns):.1%} continue, {1 - len(wanted) / len(turns):.1%} stop), "
                      f"mean size of I* where continue {sum(wanted) / max(len(wanted), 1):.2f}")
    for what, counts in (("sessions set aside", aside), ("turns dropped", dropped), ("note", notes)):
        report += [f"  {what}: {n} {kind}" for kind, n in counts.most_common() if n]
    return turns, set(seen), report + shown


def split_valid(turns, n, seed):
    """Take n whole sessions out, chosen by a seeded hash of their ids (whatever their order) -> (rest, taken)."""
    ids = sorted({t["session_id"] for t in turns}, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    taken = set(ids[:n])
    return [t for t in turns if t["session_id"] not in taken], [t for t in turns if t["session_id"] in taken]


def made_with(cfg):
    """The config keys that decide what the turns are. They lie beside the turns, and later stages compare (check_made)."""
    return {name: value for name, value in config.flatten(cfg).items() if name == "seed" or name.startswith("hindsight.")
            or name in ("data.logs", "data.eval_logs", "data.valid_sessions", "data.goal", "data.lexicon")}


def check_made(cfg):
    """Refuse turns that were made with other keys than this config's (turns made by hand carry no made.json)."""
    path = Path(cfg.run_dir) / "turns" / "made.json"
    if path.is_file():
        made = json.loads(path.read_text(encoding="utf-8"))
        for name, value in made_with(cfg).items():
            if made.get(name, value) != value:
                raise InputError(f"{path.parent} was made with {name}={made[name]!r}, this config has {value!r}: run hindsight.py "
                                 f"with this config again")


def main(argv=None):
    cfg = config.load(sys.argv[1:] if argv is None else argv, __doc__)
    rules = cfg.hindsight.source == "rules"
    config.need(cfg, "data.logs", *(["data.lexicon"] if rules else []))
    lex = lexicon.load(cfg.data.lexicon) if cfg.data.lexicon else None
    extract = functools.partial(extract_rules, lex=lex) if rules else extract_annotations
    goal = cfg.data.goal or (lex.goal if lex else "")
    files, ids = {"train": [], "eval": [], "valid": []}, frozenset()
    for name, path in (("train", cfg.data.logs), ("eval", cfg.data.eval_logs)):
        if not path:
            continue
        files[name], seen, report = build_file(path, extract, cfg.hindsight, goal, not_in=ids)
        ids = ids | seen
        print("\n".join(report))
        if not files[name]:
            raise InputError(f"{path} gave no turns, so nothing was written; the lines above say what was set aside")
    if cfg.data.valid_sessions:
        files["train"], files["valid"] = split_valid(files["train"], cfg.data.valid_sessions, cfg.seed)
        if not files["train"]:
            raise InputError(f"data.valid_sessions={cfg.data.valid_sessions} leaves no session of {cfg.data.logs} to "
                             f"train on; lower it")
    write_json(Path(cfg.run_dir) / "turns" / "made.json", made_with(cfg))
    for name, turns in files.items():
        path = Path(cfg.run_dir) / "turns" / f"{name}.jsonl"
        if turns:
            write_jsonl(path, turns)
            print(f"wrote {path}: {len(turns)} turns of {len({t['session_id'] for t in turns})} sessions")
        else:
            path.unlink(missing_ok=True)  # what an earlier run with other settings left would mix with this one's


if __name__ == "__main__":
    cli(main)
