"""Auto-Prompt: calibrate the extractor's, the grader's or the policy's prompt (arXiv 2510.25441, Algorithm 1).

    python autoprompt.py cfg.yaml type=grader [rounds=5] [candidates=8] [anchors=FILE] [match=exact|llm] [key=value ...]
    python autoprompt.py margin cfg.yaml type=grader [n=50] [repeats=5]      # what repeated gradings disagree on most
    python autoprompt.py anchors cfg.yaml type=grader from=FILE [anchors=FILE]     # margin's file, labelled -> anchors

From the best prompt so far, half of a round's candidates are written by a language model (llm.writer, which is shown where the
prompt went wrong), half are mutations by rule. Each is scored on the calibration part of the examples:

    extractor   mean F1 of the extracted items          anchors: {"session": {a log line}, "items": ["slot: value", ...]}
    grader      minus the mean squared error of R_a     anchors: {"turn": {a turn}, "response": "...", "score": 0 | 0.5 | 1}
    policy      mean reward under the grader            no anchors: turns of run_dir/turns/train.jsonl

Beyond the paper: a candidate becomes the best prompt only if it is also better on examples held out by session (half of them),
with a paired bootstrap's 5% quantile above 0; a round's three best are tried in turn. The result goes to
prompts/calibrated/TYPE.md, every candidate with its scores to run_dir/autoprompt/TYPE.jsonl and, for people, TYPE.md. Scores and
replies are kept, so an interrupted run goes on where it was. A reply that cannot be used counts as the worst score. Two rounds
without a better prompt end the search.
"""
import hashlib
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import eval as evaluation
import hindsight
import llm
import model as decoder
import parallel
import reward
import rollout
from data import (STOP, InputError, cli, encode_prompt, encode_prompts, identity, load_prompt, load_tokenizer, load_turns, read_jsonl,
                  write_jsonl, write_text)

OWN = {"type": None, "rounds": 5, "candidates": 8, "anchors": None, "match": "exact", "n": 50, "repeats": 5, "from": None}
PURPOSE = {"extractor": "write down what a client reveals in a conversation", "policy": "ask the next question, or stop",
           "grader": "score how well a question asks for what was still to be learned"}
PLACEHOLDERS = {"extractor": ("goal", "generic"), "grader": ("goal",), "policy": ("goal",)}
TESTED = 3  # candidates of a round, the best on calibration first, that may be tried on the held-out part
FEWEST, POLICY_TURNS = 8, 200  # anchors without which nothing can be told apart; turns that a policy prompt is scored on


# -------------------------------------------------------------------------------------------------------- pure functions

def mutate(prompt, rng):
    """A mutation by rule: drop, swap, or repeat at the end one of the prompt's list items. -> (text, what was done)"""
    lines = prompt.splitlines()
    items = [i for i, line in enumerate(lines) if line.lstrip().startswith("- ")]
    how = rng.choice(["drop", "swap", "repeat"])
    if len(items) < 2:
        return prompt + "\n\nBe strict: apply every rule above to the letter.", "stress"
    a, b = rng.sample(items, 2)
    if how == "drop":
        del lines[a]
    elif how == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    else:
        lines.insert(items[-1] + 1, lines[a].replace("- ", "- Above all: ", 1))
    return "\n".join(lines), how


def split(examples, seed):
    """Examples -> (calibration, held out), about half each, by a seeded hash of their session."""
    parts = [], []
    for e in examples:
        session = str(e["session"]["session_id"] if "session" in e else (e.get("turn") or e)["session_id"])
        parts[hashlib.sha256(f"{seed}:{session}".encode()).digest()[0] % 2].append(e)
    return parts


def better(new, old, seed=0, draws=2000):
    """Paired bootstrap of the mean difference -> (difference, its 5% quantile); better where that is above 0.

    >>> better([1.0, 1.0, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5])
    (0.375, 0.125)
    """
    d = np.array(new) - np.array(old)
    drawn = d[np.random.default_rng(seed).integers(len(d), size=(draws, len(d)))].mean(1)
    return float(d.mean()), float(np.quantile(drawn, 0.05))


def check_prompt(reply):
    if not isinstance(reply.get("prompt"), str) or not reply["prompt"].strip():
        raise ValueError("'prompt' must be a non-empty text")
    return reply["prompt"].strip()


def check_matches(reply, n):
    """The matcher's reply -> how many of n wanted items were found."""
    found = reply.get("matched")
    if not isinstance(found, list) or not all(isinstance(i, int) and 1 <= i <= n for i in found):
        raise ValueError(f"'matched' must list numbers from 1 to {n}")
    return len(set(found))


# --------------------------------------------------------------------------------- one prompt's scores on some examples

def ask_grader(source, prompt, example, seed=0):
    messages = reward.grader_messages(prompt, example["turn"], example["response"])
    return source.submit(messages, reward.GRADE, reward.check_grade, seed)


def ask_extractor(source, prompt, example, cfg, seed=0):
    session = example["session"]
    utts = hindsight.utterances(session["messages"])
    messages = hindsight.extractor_messages(prompt, utts, session.get("goal") or cfg.data.goal, cfg.hindsight.generic)
    return source.submit(messages, hindsight.EXTRACT, lambda reply: hindsight.check_items(reply, utts), seed)


def results(kind, source, prompt, examples, cfg, seeds=(0,)):
    """What extractor or grader say with this prompt -> for each example, a result per seed; None where a reply was unusable."""
    def ask(example):
        if kind == "grader":
            return [ask_grader(source, prompt, example, s) for s in seeds]
        return [ask_extractor(source, prompt, example, cfg, s) for s in seeds]

    for _, found in llm.in_order(source, examples, ask):
        yield [f and f[0] if kind == "grader" else f and [i for items in f for i in items] for f in found]


def ask_match(source, found, wanted):
    """A language model decides which wanted items were found, whatever the words. -> future of their number"""
    shown = llm.dump({"found": found, "wanted": {str(i): w for i, w in enumerate(wanted, 1)}})
    messages = [{"role": "system", "content": load_prompt("prompts/match.md", ())}, {"role": "user", "content": shown}]
    return source.submit(messages, None, lambda reply: check_matches(reply, len(wanted)))


def item_scores(source, said, examples, match):
    """F1 of the extracted items of each anchor; exact match where the matching model is not used, or failed."""
    pairs = [(found, e["items"]) for found, e in zip(said, examples)]
    asked = {i: ask_match(source, *p) for i, p in enumerate(pairs) if match == "llm" and all(p)}
    source.drain()
    n = {i: future.result() for i, future in asked.items()}
    return [0.0 if found is None else hindsight.f1(found, wanted) if n.get(i) is None else 2 * n[i] / (len(found) + len(wanted))
            for i, (found, wanted) in enumerate(pairs)]


def scorer(kind, cfg, match):
    """-> score(prompt, examples): (scores, what was said) per example; and the llm source, None for the policy."""
    if kind == "policy":
        return policy_scorer(cfg), None
    source = llm.open_source(kind, cfg)

    def score(prompt, examples):
        bar = tqdm(examples, desc=kind, unit=" anchors", leave=False, disable=None)
        said = [r[0] for r in results(kind, source, prompt, bar, cfg)]
        if kind == "grader":
            return [-1.0 if s is None else -(s - e["score"]) ** 2 for s, e in zip(said, examples)], said
        return item_scores(source, said, examples, match), said
    return score, source


def policy(cfg):
    """-> the policy that eval.py would evaluate: tokenizer, model, end tokens."""
    _, _, device = parallel.start()
    folder = evaluation.model_of(cfg)
    tokenizer = load_tokenizer(folder)
    return tokenizer, decoder.load(folder, device, parallel.compute_dtype(cfg.model.dtype, device)), rollout.end_ids(folder, tokenizer)


def policy_scorer(cfg):
    (tokenizer, model, ends), (lex, grader) = policy(cfg), reward.judges(cfg)

    def score(prompt, turns):
        """The mean reward at each turn; 0 where this prompt makes the conversation too long."""
        prompts = [encode_prompt(tokenizer, prompt, turn) for turn in turns]
        fit = [i for i, ids in enumerate(prompts) if len(ids) <= cfg.rollout.max_prompt_tokens]
        scores, said = [0.0] * len(turns), [["(the prompt is too long)"]] * len(turns)
        records = evaluation.evaluate(model, tokenizer, [turns[i] for i in fit], [prompts[i] for i in fit], cfg, lex, ends, grader,
                                      desc="policy") if fit else []
        for k, i in enumerate(fit):
            group = records[k * cfg.eval.samples:(k + 1) * cfg.eval.samples]
            values = [g["reward"] for g in group if g["reward"] is not None]
            scores[i], said[i] = sum(values) / len(values) if values else 0.0, [g["response"] for g in group]
        return scores, said
    return score


# -------------------------------------------------------------------------------------------------------------- the search

def candidates_of(best, kind, n, number, writer, worst):
    """n candidates: mutations by rule, and variants that the writer makes, each shown other examples -> [(text, origin)]"""
    rng, asked = random.Random(f"{number} {best}"), []
    system, schema = load_prompt("prompts/variants.md", ("placeholders",)), llm.object_schema(prompt={"type": "string"})
    braces = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS[kind])
    for k in range((n + 1) // 2 if writer else 0):
        shown = llm.dump({"instructions": best, "purpose": PURPOSE[kind], "score": worst["score"],
                          "examples": rng.sample(worst["examples"], min(4, len(worst["examples"])))})
        asked.append(writer.submit([{"role": "system", "content": system.replace("{placeholders}", braces)},
                                    {"role": "user", "content": shown}], schema, check_prompt, seed=100 * number + k))
    if writer:
        writer.drain()
    written = [(text, "writer") for f in asked if (text := f.result())]
    return written + [mutate(best, rng) for _ in range(n - len(written))]


def shown_example(kind, example, said):
    if kind == "grader":
        return {"conversation": hindsight.spoken(example["turn"]["context"]), "targets": example["turn"]["target"],
                "candidate": example["response"], "wanted": example["score"], "given": said}
    if kind == "extractor":
        utts = hindsight.utterances(example["session"]["messages"])
        return {"conversation": hindsight.spoken(utts), "wanted": example["items"], "given": said}
    return {"conversation": hindsight.spoken(example["context"]), "to_be_learned": example["target"],
            "right": example["decision"], "answers": said}


def search(kind, cfg, own, examples):
    """The rounds of Algorithm 1. -> (first prompt, best prompt, {part: [score of the first, of the best]}); the ledger is
    written after every round."""
    folder = Path(cfg.run_dir) / "autoprompt"
    score, source = scorer(kind, cfg, own["match"])
    writer = llm.open_source("writer", cfg) if cfg.llm.writer.model else None
    first = load_prompt(cfg.data.prompt if kind == "policy" else source.prompt_file, PLACEHOLDERS[kind])
    parts = dict(zip(("calibration", "held_out"), split(examples, cfg.seed)))
    for name, part in parts.items():
        if len(part) < FEWEST // 2:
            raise InputError(f"only {len(part)} of {len(examples)} examples fall into the {name} part; label more sessions (about 100 "
                             f"anchors tell prompts apart, {FEWEST} are the fewest)")
    kept = folder / f"{kind}_scores.jsonl"
    aside = ("run_dir", "wandb.", "train.", "llm.cache", "llm.writer.", "data.logs", "data.eval_logs", "data.prompt")
    where = (".base_url", ".api_key_env", ".concurrency", ".timeout_s", ".retries")
    settings = {k: v for k, v in config.flatten(cfg).items() if not k.startswith(aside) and not k.endswith(where)}
    files = [cfg.data.lexicon] * bool(cfg.data.lexicon) + [evaluation.model_of(cfg)] * (kind == "policy")
    settings["files"] = [identity(f) for f in [*files, *(["prompts/match.md"] if own["match"] == "llm" else [])]]
    memo = {m["key"]: (m["scores"], m["said"]) for _, m in read_jsonl(kept)} if kept.is_file() else {}

    def scores(prompt, part):
        key = hashlib.sha256(json.dumps([prompt, parts[part], settings, own["match"]], sort_keys=True).encode()).hexdigest()
        if key not in memo:
            memo[key] = score(prompt, parts[part])
            write_jsonl(kept, [{"key": k, "scores": s, "said": said} for k, (s, said) in memo.items()])
        return memo[key]

    best, ledger, since, tried = first, [], 0, {first}
    for number in range(1, own["rounds"] + 1):
        now, said = scores(best, "calibration")
        order = sorted(range(len(now)), key=lambda i: now[i])[:max(4, len(now) // 4)]
        wrong = [shown_example(kind, parts["calibration"][i], said[i]) for i in order]
        worst = {"score": statistics.fmean(now), "examples": wrong}
        lines = []
        for k, (text, origin) in enumerate(candidates_of(best, kind, own["candidates"], number, writer, worst), 1):
            line = {"round": number, "candidate": k, "origin": origin, "calibration": None, "held_out": None,
                    "best_held_out": None, "low": None, "accepted": False, "note": "", "prompt": text}
            lines.append(line)
            lacks = [p for p in PLACEHOLDERS[kind] if f"{{{p}}}" not in text]
            lacks += [STOP] if kind == "policy" and STOP not in text else []
            if lacks or text in tried:
                line["note"] = f"lacks {', '.join(lacks)}" if lacks else "tried before"
                continue
            tried.add(text)
            line["calibration"] = statistics.fmean(scores(text, "calibration")[0])
            print(f"round {number}, candidate {k} ({origin}): {line['calibration']:.4f} on calibration, the best so far "
                  f"{worst['score']:.4f}")
        ahead = [line for line in lines if line["calibration"] is not None and line["calibration"] > worst["score"]]
        accepted = None
        for line in sorted(ahead, key=lambda line: -line["calibration"])[:TESTED]:
            new, old = scores(line["prompt"], "held_out")[0], scores(best, "held_out")[0]
            difference, line["low"] = better(new, old, cfg.seed)
            line |= {"held_out": statistics.fmean(new), "best_held_out": statistics.fmean(old), "accepted": line["low"] > 0}
            print(f"round {number}: candidate {line['candidate']} held out {line['held_out']:.4f}, the best so far "
                  f"{line['best_held_out']:.4f}, difference {difference:+.4f}, 5% quantile {line['low']:+.4f}: "
                  f"{'accepted' if line['accepted'] else 'rejected'}")
            if line["accepted"]:
                accepted = line["prompt"]
                break
            line["note"] = "better on calibration only"
        ledger += lines
        since = 0 if accepted else since + 1
        best = accepted or best
        write_jsonl(folder / f"{kind}.jsonl", ledger)
        write_text(folder / f"{kind}.md", as_table(ledger))
        if since == 2:
            break
    summary = {part: [statistics.fmean(scores(p, part)[0]) for p in (first, best)] for part in parts}
    return first, best, summary


def as_table(ledger):
    """The ledger for people, in Markdown."""
    def show(value):
        return "" if value is None else f"{value:.4f}"
    head = ["round", "candidate", "origin", "calibration", "held out", "best so far", "5% of the difference", "", "begins"]
    return evaluation.aligned([head] + [
        [str(r["round"]), str(r["candidate"]), r["origin"], *(show(r[k]) for k in ("calibration", "held_out", "best_held_out", "low")),
         "accepted" if r["accepted"] else r["note"], r["prompt"][:60].splitlines()[0]] for r in ledger]) + "\n"


# ------------------------------------------------------------------------------------------------- anchors, and commands

def load_anchors(path, kind):
    """Read labelled examples, checked. Unlabelled lines (null) raise like any other bad line."""
    form = {"grader": '{"turn": {a line of turns/*.jsonl}, "response": "...", "score": 0, 0.5 or 1}',
            "extractor": '{"session": {a line of your logs}, "items": ["slot: value", ...]}'}[kind]
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: it holds a person's labels, one {form} a line; about 100 tell prompts apart, {FEWEST} "
                         f"are the fewest. `python autoprompt.py margin` lists what to label first")
    out = []
    for n, a in read_jsonl(path):
        bad = check_anchor(a, kind)
        if bad:
            raise InputError(f"{path}:{n}: {bad}; a line is {form}")
        out.append(a)
    if len(out) < FEWEST:
        raise InputError(f"{path} holds {len(out)} anchors; {FEWEST} are the fewest, about 100 tell prompts apart")
    return out


def check_anchor(a, kind):
    """-> None, or why this is not a labelled example."""
    if kind == "grader":
        turn = a.get("turn")
        if not isinstance(turn, dict) or not isinstance(turn.get("context"), list) or not isinstance(turn.get("target"), list) \
                or not isinstance(turn.get("session_id"), str) or not isinstance(a.get("response"), str):
            return "'turn' must be a turn and 'response' a text"
        good = a.get("score") in (0, 0.5, 1) and not isinstance(a["score"], bool)
        return None if good else f"'score' must be 0, 0.5 or 1, not {a.get('score')!r}"
    bad = hindsight.check_session(a["session"]) if isinstance(a.get("session"), dict) else ("", "'session' must be a log line")
    if bad:
        return bad[1] or bad[0]
    ok = isinstance(a.get("items"), list) and all(isinstance(i, str) and ":" in i for i in a["items"])
    return None if ok else "'items' must be a list of \"slot: value\" texts"


LABEL = {"grader": "score", "extractor": "items"}


def key_of(a):
    """What an example is about, whatever its label."""
    return json.dumps([a.get("turn"), a.get("response"), a.get("session")], sort_keys=True)


def sampled_answers(cfg, n):
    """The policy's questions at continue turns of sessions it is not tested on: validation turns where there are, else training
    turns. -> [{"turn", "response"}], each once"""
    valid = Path(cfg.run_dir) / "turns" / "valid.jsonl"
    turns = load_turns(hindsight.turns_file(cfg, "valid" if valid.is_file() else "train"))
    turns = [t for t in turns if t["decision"] == "continue"]
    turns = random.Random(cfg.seed).sample(turns, min(n, len(turns)))
    tokenizer, model, ends = policy(cfg)
    turns, prompts = encode_prompts(tokenizer, load_prompt(cfg.data.prompt), turns, cfg.rollout.max_prompt_tokens, "drop")
    answers = rollout.generate(model, prompts, samples=cfg.eval.samples, max_new_tokens=cfg.rollout.max_new_tokens, ends=ends,
                               temperature=cfg.eval.temperature, top_p=cfg.eval.top_p, seed=cfg.seed, max_rows=cfg.rollout.max_rows)
    found = []
    for turn, group in zip(turns, answers):
        texts = dict.fromkeys(rollout.text_of(tokenizer, a, ends) for a in group)
        found += [{"turn": turn, "response": text} for text in texts if reward.decision(text) == "continue"]
    return found


def margin(kind, cfg, own, anchors):
    """The examples on which repeated results disagree most -> run_dir/autoprompt/margin_TYPE.jsonl, labels left null."""
    source, path = llm.open_source(kind, cfg), Path(cfg.run_dir) / "autoprompt" / f"margin_{kind}.jsonl"
    if source.s.temperature == 0:
        raise InputError(f"llm.{kind}.temperature is 0, so repeated results would not differ: set it to about 0.7 for this command")
    if path.is_file() and any(a.get(LABEL[kind]) is not None for _, a in read_jsonl(path)):
        raise InputError(f"{path} holds labels: make anchors of them first (python autoprompt.py anchors ... from={path}), then remove it")
    known = {key_of(a) for _, a in read_jsonl(anchors)} if Path(anchors).is_file() else set()
    if kind == "grader":
        examples = sampled_answers(cfg, 5 * own["n"])
    else:
        config.need(cfg, "data.logs")
        examples = [{"session": s} for _, s in read_jsonl(cfg.data.logs, lambda n, why: None) if not hindsight.check_session(s)]
    examples = [e for e in examples if key_of(e) not in known]
    random.Random(cfg.seed).shuffle(examples)
    examples = examples[:20 * own["n"]]
    found, bar = [], tqdm(examples, desc="margin", unit=" examples", disable=None)
    for example, said in zip(examples, results(kind, source, source.prompt, bar, cfg, range(own["repeats"]))):
        said = [s for s in said if s is not None]
        if len(said) > 1 and kind == "grader":
            found.append((statistics.pstdev(said), {**example, "scores": said, "score": None}))
        elif len(said) > 1:
            f = [hindsight.f1(a, b) for i, a in enumerate(said) for b in said[:i]]
            found.append((1 - statistics.fmean(f), {**example, "extractions": said, "items": None}))
    found.sort(key=lambda x: -x[0])
    write_jsonl(path, [{**record, "disagreement": d} for d, record in found[:own["n"]]])
    print(f"{llm.report(source)}\nwrote {path}: {min(own['n'], len(found))} of {len(found)} examples. Fill in "
          f"{'score (0, 0.5 or 1)' if kind == 'grader' else 'items'} and run: python autoprompt.py anchors ... from={path}")


def add_anchors(kind, own, path):
    """Labelled lines of a margin file -> the anchors, each once, a later label in place of an earlier one."""
    known = {key_of(a): a for _, a in read_jsonl(path)} if Path(path).is_file() else {}
    label, before, changed, unlabelled = LABEL[kind], len(known), 0, 0
    for n, a in read_jsonl(own["from"]):
        if a.get(label) is None:
            unlabelled += 1
            continue
        if bad := check_anchor(a, kind):
            raise InputError(f"{own['from']}:{n}: {bad}")
        changed += known.get(key_of(a), a)[label] != a[label]
        known[key_of(a)] = {k: a[k] for k in ("turn", "response", "session", label) if k in a}
    write_jsonl(path, known.values())
    print(f"wrote {path}: {before} anchors as before, {len(known) - before} new, {changed} with another label; {unlabelled} lines of "
          f"{own['from']} have no label yet")


def main():
    argv = sys.argv[1:]
    command = argv.pop(0) if argv[:1] in (["margin"], ["anchors"]) else "calibrate"
    own, rest = dict(OWN), []
    for a in argv:
        name, eq, value = a.partition("=")
        if not (eq and name in OWN):
            rest.append(a)
            continue
        number = isinstance(OWN[name], int)
        if number and not (value.isdigit() and int(value) > 0):
            raise InputError(f"{name}={value} must be a whole number above 0")
        own[name] = int(value) if number else value
    cfg = config.load(rest, __doc__)
    kind, kinds = own["type"], ("extractor", "grader", "policy") if command == "calibrate" else ("extractor", "grader")
    for name, choices in (("type", kinds), ("match", ("exact", "llm"))):
        if own[name] not in choices:
            raise InputError(f"{name}= must be one of {', '.join(choices)}, not {own[name]}")
    anchors = own["anchors"] or f"anchors/{kind}.jsonl"
    if command == "margin":
        return margin(kind, cfg, own, anchors)
    if command == "anchors":
        if not own["from"]:
            raise InputError("name the labelled file: from=FILE (what `margin` wrote)")
        return add_anchors(kind, own, anchors)
    if kind == "policy":
        examples = load_turns(hindsight.turns_file(cfg, "train"))
        examples = random.Random(cfg.seed).sample(examples, min(POLICY_TURNS, len(examples)))
    else:
        examples = load_anchors(anchors, kind)
    print(f"{len(examples)} examples for the {kind} prompt")
    first, best, summary = search(kind, cfg, own, examples)
    for part, (before, after) in summary.items():
        print(f"{part.replace('_', ' ')}: {before:.4f} -> {after:.4f}")
    if best == first:
        print("no candidate was better on the held-out part: the prompt stays as it is")
        return
    out = Path("prompts/calibrated") / f"{kind}.md"
    write_text(out, best + "\n")
    key = "data.prompt" if kind == "policy" else f"llm.{kind}.prompt"
    print(f"wrote {out} (use it: {key}={out}); every candidate: {Path(cfg.run_dir) / 'autoprompt' / kind}.md")


if __name__ == "__main__":
    cli(main)
