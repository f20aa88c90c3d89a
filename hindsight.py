"""Logs -> turns: at each decision point of a real conversation, what was still to be learned (I*), and go on or stop.

    python hindsight.py cfg.yaml [key=value ...]      # writes run_dir/turns/{train,eval,valid}.jsonl

The paper (arXiv 2510.25441) reads a conversation as u_0, x_1, u_1, ..., x_{T-1}, u_{T-1} and labels each point t = 1..T
by hindsight: the context C_{t-1} is everything up to u_{t-1}; I*_t is what the user reveals only later; s*_t is
"continue" while there is something left to learn and t < T, else "stop". What the user reveals comes from a language model
(hindsight.source: llm), a lexicon (rules) or the logs' own `learned` fields (annotations). The model reads a session once and
names the utterance that reveals each item, so that one call serves all points of a session.

Unlike the reference release, every context is the full prefix, and what the expert says after the user's last words
makes no further point. Sessions and points that teach nothing are left out and counted by reason; a rerun replaces
all its files. Logs are streamed: a window of sessions is in memory, their extractions in flight, written in input order.
"""
import functools
import hashlib
import itertools
import json
import sys
import tempfile
import unicodedata
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

import config
import lexicon
import llm
from data import InputError, check_messages, cli, read_jsonl, whole_file, write_json, write_jsonl

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


def spoken(messages):
    """Messages as a language model is shown them."""
    return [{"by": "client" if m["role"] == "user" else "expert", "text": m["content"]} for m in messages]


EXTRACT = llm.object_schema(items={"type": "array", "items": llm.object_schema(
    utterance={"type": "integer"}, slot={"type": "string"}, value={"type": "string"})})


def extractor_messages(prompt, utts, goal, generic):
    """The conversation as JSON lines, one a numbered utterance, so that no text can pass for another line."""
    prompt = prompt.replace("{goal}", goal).replace("{generic}", ", ".join(generic) or "none")
    lines = [llm.dump({"utterance": i, **u}) for i, u in enumerate(spoken(utts), 1)]
    return [{"role": "system", "content": prompt}, {"role": "user", "content": "\n".join(lines)}]


def check_items(reply, utts):
    """The extractor's reply -> for each utterance, the items it reveals; ValueError where it is not such a list.

    >>> check_items({"items": [{"utterance": 1, "slot": "fever", "value": "no"}]}, [{"role": "user"}, {"role": "assistant"}])
    [['fever: no'], []]
    """
    out, items = [[] for _ in utts], reply.get("items")
    if not isinstance(items, list):
        raise ValueError("'items' is missing or not a list")
    for item in items:
        n, slot, value = (item.get(k) for k in ("utterance", "slot", "value")) if isinstance(item, dict) else (None,) * 3
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(utts) or utts[n - 1]["role"] != "user":
            raise ValueError(f"'utterance' must be the number of an utterance of the client, not {n!r}"[:200])
        if not (isinstance(slot, str) and slot.strip() and isinstance(value, str) and value.strip()):
            raise ValueError(f"'slot' and 'value' must be non-empty texts, not {slot!r} and {value!r}"[:200])
        out[n - 1].append(f"{slot.replace(':', ' ').strip()}: {value.strip()}")
    return out


def f1(found, wanted):
    """Normalised exact match of two lists of items -> F1; both empty: 1.

    >>> f1(["Fever: no", "age: 3"], ["fever: No."])
    0.6666666666666666
    """
    found, wanted = {same(i) for i in found}, {same(i) for i in wanted}
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0


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

def extractor(cfg, lex):
    """-> (submit(utterances, goal, seed) -> future of the items of each utterance, None where it failed; llm source or None)"""
    def at_once(extract):
        def submit(utts, goal, seed):
            future = Future()
            future.set_result(extract(utts))
            return future
        return submit

    if cfg.hindsight.source == "rules":
        return at_once(functools.partial(extract_rules, lex=lex)), None
    if cfg.hindsight.source == "annotations":
        return at_once(extract_annotations), None
    source = llm.open_source("extractor", cfg)

    def submit(utts, goal, seed):
        messages = extractor_messages(source.prompt, utts, goal, cfg.hindsight.generic)
        return source.submit(messages, EXTRACT, functools.partial(check_items, utts=utts), seed)
    return submit, source


def agreement(results):
    """Turns of a session by several extractions (lists of turns) -> a record a turn: the decisions and targets, the mean F1 of
    all pairs of targets, and whether all decisions are one."""
    by_id = [{t["turn_id"]: t for t in turns} for turns in results]
    for turn_id in dict.fromkeys(i for turns in by_id for i in turns):
        found = [turns[turn_id] for turns in by_id if turn_id in turns]
        pairs = [f1(a["target"], b["target"]) for a, b in itertools.combinations(found, 2)]
        yield {"turn_id": turn_id, "decisions": [t["decision"] for t in found], "targets": [t["target"] for t in found],
               "f1": sum(pairs) / len(pairs) if pairs else None,
               "same_decision": len(found) == len(results) and len({t["decision"] for t in found}) == 1}


def build_file(path, out, checks, submit, source, h, goal="", not_in=frozenset()):
    """All sessions of a log file -> turns, written to the open file `out` in input order. Sessions in `not_in` are set aside.
    -> (ids seen, ids that gave turns, number of turns, report lines); with h.self_check > 1 agreement records go to `checks`."""
    seen, used, aside, dropped, notes, shown, n = {}, [], Counter(), Counter(), Counter(), [], Counter()

    def set_aside(line, kind, detail):
        aside[kind] += 1
        if detail and aside[kind] <= SHOWN:
            shown.append(f"  {path}:{line}: set aside: {detail}")

    def sessions(lines):
        for line, session in lines:
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
            yield session

    def extract(session):
        utts = utterances(session["messages"])
        return [submit(utts, session.get("goal") or goal, seed) for seed in range(h.self_check)]

    lines = read_jsonl(path, lambda line, why: set_aside(line, "bad line", why))
    bar = tqdm(lines, desc=str(path), unit=" sessions", disable=None)
    for session, extracted in llm.in_order(source, sessions(bar), extract):
        n["sessions"] += 1
        results = [build_turns(session, lambda _: facts, goal, h.stop_rule, h.user_end, h.generic)
                   for facts in extracted if facts is not None]
        if not results:
            dropped["extraction failed"] += sum(u["role"] == "user" for u in utterances(session["messages"]))
            continue
        made, why = results[0]
        out.writelines(json.dumps(turn, ensure_ascii=False) + "\n" for turn in made)
        checks.extend(agreement([turns for turns, _ in results]) if h.self_check > 1 else ())
        used.extend([str(session["session_id"])] if made else [])
        dropped.update(why)
        wanted = [len(t["target"]) for t in made if t["decision"] == "continue"]
        n.update(turns=len(made), go_on=len(wanted), wanted=sum(wanted))
        notes["blank messages left out"] += sum(is_blank(m["content"]) for m in session["messages"])
        notes["sessions without a goal (set data.goal)"] += not (session.get("goal") or goal)
        if source:
            t = source.tally.n
            bar.set_postfix_str(f"{t['calls']} calls, {t['cached']} cached, {t['invalid'] + t['failed']} failed, "
                                f"{(t['tokens_in'] + t['tokens_out']) / 1e6:.2f}M tokens", refresh=False)
    report = [f"{path}: {n['sessions'] + sum(aside.values())} lines, {n['sessions']} sessions used, {n['turns']} turns"]
    if n["turns"]:
        report[0] += (f" ({n['go_on'] / n['turns']:.1%} continue, {1 - n['go_on'] / n['turns']:.1%} stop), "
                      f"mean size of I* where continue {n['wanted'] / max(n['go_on'], 1):.2f}")
    for what, counts in (("sessions set aside", aside), ("turns dropped", dropped), ("note", notes)):
        report += [f"  {what}: {k} {kind}" for kind, k in counts.most_common() if k]
    if source:
        report.append(f"  extractor: {llm.report(source)}")
    return set(seen), used, n["turns"], report + shown


def pick_valid(ids, n, seed):
    """n whole sessions, chosen by a seeded hash of their ids, whatever their order."""
    return set(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:n])


def made_with(cfg):
    """The config keys that decide what the turns are. They lie beside the turns, and later stages compare (check_made)."""
    prefixes = ["hindsight."] + ["llm.extractor."] * (cfg.hindsight.source == "llm")
    aside = ("self_check", "base_url", "api_key_env", "concurrency", "timeout_s", "retries")
    return {name: value for name, value in config.flatten(cfg).items() if name == "seed"
            or name.startswith(tuple(prefixes)) and not name.endswith(aside)
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


def turns_file(cfg, name):
    """The path of run_dir/turns/NAME.jsonl, which must be there and made with this config."""
    path = Path(cfg.run_dir) / "turns" / f"{name}.jsonl"
    if not path.is_file():
        hint = " (data.eval_logs must be set)" if name == "eval" else ""
        raise InputError(f"{path} does not exist: run hindsight.py with this config first{hint}")
    check_made(cfg)
    return path


def main(argv=None):
    cfg = config.load(sys.argv[1:] if argv is None else argv, __doc__)
    config.need(cfg, "data.logs", *(["data.lexicon"] if cfg.hindsight.source == "rules" else []))
    lex = lexicon.load(cfg.data.lexicon) if cfg.data.lexicon else None
    submit, source = extractor(cfg, lex)
    goal, folder = cfg.data.goal or (lex.goal if lex else ""), Path(cfg.run_dir) / "turns"
    ids, sessions, checks = frozenset(), {}, []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building.", dir=folder) as aside:
        for name, path in (("train", cfg.data.logs), ("eval", cfg.data.eval_logs)):
            if not path:
                continue
            with open(Path(aside) / name, "w", encoding="utf-8") as out:
                seen, sessions[name], n, report = build_file(path, out, checks, submit, source, cfg.hindsight, goal, not_in=ids)
            ids = ids | seen
            print("\n".join(report))
            if not n:
                raise InputError(f"{path} gave no turns, so nothing was written; the lines above say what was set aside")
        valid = pick_valid(sessions["train"], cfg.data.valid_sessions, cfg.seed)
        if valid and len(valid) == len(sessions["train"]):
            raise InputError(f"data.valid_sessions={cfg.data.valid_sessions} leaves no session of {cfg.data.logs} to "
                             f"train on; lower it")
        with whole_file(folder / "train.jsonl") as train, whole_file(folder / "valid.jsonl") as held_out, \
                open(Path(aside) / "train", encoding="utf-8") as lines:
            for line in lines:
                (held_out if json.loads(line)["session_id"] in valid else train).write(line)
        if "eval" in sessions:
            (Path(aside) / "eval").replace(folder / "eval.jsonl")
    for name, there in (("valid", valid), ("eval", "eval" in sessions), ("self_check", checks)):
        if not there:  # what an earlier run with other settings left would mix with this one's
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    write_json(folder / "made.json", made_with(cfg))  # last: turns that it does not describe are refused
    if checks:
        write_jsonl(folder / "self_check.jsonl", checks)
        scored = [c["f1"] for c in checks if c["f1"] is not None]
        print(f"self-check over {cfg.hindsight.self_check} extractions: mean F1 of I* {sum(scored) / max(len(scored), 1):.3f}, the "
              f"same s* at {sum(c['same_decision'] for c in checks)} of {len(checks)} turns; {folder / 'self_check.jsonl'}")
    for name in ("train", "eval", "valid"):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            of = Counter(turn["session_id"] for _, turn in read_jsonl(path))
            print(f"wrote {path}: {of.total()} turns of {len(of)} sessions")


if __name__ == "__main__":
    cli(main)
