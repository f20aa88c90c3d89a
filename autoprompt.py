"""Auto-Prompt: calibrate the prompt of extractor, grader or policy (arXiv 2510.25441, Algorithm 1).

    python autoprompt.py cfg.yaml type=grader [rounds=5] [candidates=8] [anchors=FILE] [match=exact|llm]
    python autoprompt.py margin cfg.yaml type=grader [n=50] [repeats=5]   # what repeated gradings differ on
    python autoprompt.py anchors cfg.yaml type=grader from=FILE [anchors=FILE]   # margin's file, labelled

All three take key=value for the config as well. From the best prompt so far, a language model (llm.writer)
writes half of a round's candidates; it is shown where the prompt went wrong. The other half are mutations by
rule. Each candidate is scored on the calibration part of the examples:

    extractor  mean F1 of the extracted items     anchors: {"session": {a log line}, "items": ["slot: value"]}
    grader     minus mean squared error of R_a    anchors: {"turn": {a turn}, "response": "...", "score": 0.5}
    policy     mean reward under the grader       no anchors: turns of run_dir/turns/train.jsonl

Beyond the paper: the examples are split by session, and a candidate becomes the best prompt only if it is
also better on the held-out half: the 5% quantile of a paired bootstrap is above 0. The three best of a round
are tried in turn. Two rounds without a better prompt end the search. An unusable reply has the worst score,
is counted in a warning, and is asked for again by the next run.

The result goes to prompts/calibrated/TYPE.md, all candidates with scores to run_dir/autoprompt/TYPE.jsonl
and, as a table, TYPE.md. Scores and replies are kept, so an interrupted search goes on where it was.
"""
import json
import sys
from dataclasses import asdict, dataclass
from itertools import combinations, starmap
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator
from tqdm import tqdm

import config
import grading
import hindsight
import llm
import parallel
import reward
import rollout
from eval import evaluate, model_of
from metrics import aligned, cell
from prompts import (
    Prompt,
    chat,
    dump,
    encode_prompt,
    encode_prompts,
    load_prompt,
    load_turns,
    spoken,
)
from records import (
    STOP,
    ExtractorAnchor,
    GraderAnchor,
    InputError,
    Reply,
    Text,
    cli,
    explain,
    f1,
    identity,
    lock,
    read_jsonl,
    write_jsonl,
    write_text,
)

Count = Annotated[int, Field(ge=1)]


class Own(BaseModel):
    """The arguments that are not the config's."""
    type: Literal["extractor", "grader", "policy"] = Field(None, validate_default=True)
    rounds: Count = 5
    candidates: Count = 8  # a round
    anchors: str = ""  # the file of labelled examples; empty: anchors/TYPE.jsonl
    match: Literal["exact", "llm"] = "exact"  # extractor: who says which items were found
    n: Count = 50  # margin: examples listed
    repeats: Count = 5  # margin: how often each is asked
    labelled: str = Field("", alias="from")  # anchors: what margin wrote, with labels


OWN = tuple(f"{name}=" for name in Own.model_json_schema()["properties"])
TESTED = 3  # candidates of a round, the best on calibration first, that may be tried on the held-out part
SHOWN = 4  # examples that the writer is shown; no part of the split holds fewer
POLICY_TURNS = 200  # turns that a policy prompt is scored on
FEWEST = 8  # anchors, without which no prompts can be told apart
ENOUGH = f"{FEWEST} are the fewest, about 100 tell prompts apart"

PURPOSE = {"extractor": "write down what a client reveals in a conversation",
           "grader": "score how well a question asks for what was still to be learned",
           "policy": "ask the next question, or stop"}
PLACEHOLDERS = {"extractor": ("goal", "generic"), "grader": ("goal",), "policy": ("goal",)}
# For the types with anchors: the class of an anchor, its field that is a person's label, a line of the file.
ANCHOR = {"extractor": ExtractorAnchor, "grader": GraderAnchor}
LABEL = {"extractor": "items", "grader": "score"}
LINE = {"extractor": '{"session": {a line of your logs}, "items": ["slot: value", ...]}',
        "grader": '{"turn": {a line of turns/*.jsonl}, "response": "...", "score": 0, 0.5 or 1}'}


# --------------------------------------------------------------------------------------------- pure functions

def mutate(prompt, rng):
    """A mutation by rule: drop, swap, or repeat at the end one of the prompt's list items. -> (how, text)"""
    lines = prompt.splitlines()
    items = [i for i, line in enumerate(lines) if line.lstrip().startswith("- ")]
    how = rng.choice(["drop", "swap", "repeat"])
    if len(items) < 2:
        return "stress", prompt + "\n\nBe strict: apply every rule above to the letter."
    a, b = rng.sample(items, 2)
    if how == "drop":
        del lines[a]
    elif how == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    else:
        lines.insert(items[-1] + 1, lines[a].replace("- ", "- Above all: ", 1))
    return how, "\n".join(lines)


def split(examples, seed):
    """Anchors or turns -> (calibration, held out), about half each, by a seeded hash of their session.

    Raises InputError where one of the two is too small to tell prompts apart.
    """
    parts = [], []
    for example in examples:
        about = getattr(example, "session", None) or getattr(example, "turn", example)
        parts[hindsight.by_hash(about.session_id, seed)[0] % 2].append(example)
    fewer = min(map(len, parts))
    if fewer < FEWEST // 2:
        raise InputError(f"split by session, one part has only {fewer} of the {len(examples)} examples; "
                         f"label more sessions ({ENOUGH})")
    return parts


def better(new, old, seed=0):
    """Paired bootstrap of the mean difference -> (difference, its 5% quantile); better where that is above 0.

    >>> better([1.0, 1.0, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5])
    (0.375, 0.125)
    """
    d = np.array(new) - np.array(old)
    drawn = d[np.random.default_rng(seed).integers(len(d), size=(2000, len(d)))].mean(1)
    return float(d.mean()), float(np.quantile(drawn, 0.05))


# ----------------------------------------------------------- the three types of prompt, and what each scores

class Variant(Reply):
    """What the writer replies: a new prompt."""
    prompt: Text


class Matches(Reply):
    """What the matching model replies: the numbers of the wanted items that were found.

    It is validated with the number of wanted items as pydantic's context.
    """
    matched: list[int]

    @field_validator("matched")
    @classmethod
    def in_range(cls, numbers, info):
        if not all(1 <= i <= info.context for i in numbers):
            raise ValueError(f"must list numbers from 1 to {info.context}")
        return numbers


def readings(kind, source, cfg, prompt, anchors, seeds=(0,)):
    """Yield each anchor with what extractor or grader say about it: a reading for each seed, None where the
    reply was unusable."""
    def ask(anchor):
        if kind == "grader":
            question = grading.grader_question(prompt, anchor.turn, anchor.response)
            return [source.submit(*question, seed) for seed in seeds]
        return hindsight.ask(source, prompt, anchor.session, cfg, seeds)

    bar = tqdm(anchors, desc=kind, unit=" anchors", leave=False, disable=None)
    for anchor, replies in llm.in_order(source, bar, ask):
        yield anchor, [reply and (reply.score if kind == "grader" else list(map(str, reply.items)))
                       for reply in replies]


def shown(kind, example, said, cfg):
    """An example, and what was said about it, as the writer sees them."""
    if kind == "grader":
        return {"conversation": spoken(example.turn.context), "targets": example.turn.target,
                "candidate": example.response, "wanted": example.score, "given": said}
    if kind == "extractor":
        utts = hindsight.utterances(example.session.messages, cfg.hindsight.end_markers)
        return {"conversation": spoken(utts), "wanted": example.items, "given": said}
    return {"conversation": spoken(example.context), "to_be_learned": example.target,
            "right": example.decision, "answers": said}


def scorer(kind, cfg, match="exact"):
    """-> (score, file of the first prompt, further files that the scores depend on)

    score(prompt, examples) -> (the score of each example, what was said about each: None where no usable
    reply came)
    """
    if kind == "policy":
        return policy_scorer(cfg), cfg.data.prompt, [model_of(cfg)]
    source = llm.open_source(kind, cfg)

    def score(prompt, anchors):
        said = [reading for _, (reading,) in readings(kind, source, cfg, prompt, anchors)]
        print(f"{kind}: {llm.report(source)}")
        if kind == "grader":
            return [-1.0 if s is None else -(s - a.score) ** 2 for s, a in zip(said, anchors)], said
        scores = [0.0 if s is None else f1(s, a.items) for s, a in zip(said, anchors)]
        if match == "llm":
            match_items(source, said, anchors, scores)
        return scores, said

    return score, source.prompt_file, ["prompts/match.md"] if match == "llm" else []


def match_items(source, said, anchors, scores):
    """Ask which wanted items were found, whatever the words, and set the scores by the replies."""
    system, asked = load_prompt("prompts/match.md", ()), {}
    for i, (found, anchor) in enumerate(zip(said, anchors)):
        if found and anchor.items:
            pair = dump({"found": found, "wanted": dict(enumerate(anchor.items, 1))})
            asked[i] = source.submit(chat(system, pair), Matches, context=len(anchor.items))
    source.drain()
    for i, future in asked.items():
        if reply := future.result():
            scores[i] = 2 * len(set(reply.matched)) / (len(said[i]) + len(anchors[i].items))
        else:  # the exact match stands
            said[i] = None


def load_policy(cfg):
    """The policy that eval.py would evaluate."""
    device = parallel.start()[-1]
    return rollout.load_policy(model_of(cfg), device, parallel.compute_dtype(cfg.model.dtype, device))


def policy_scorer(cfg):
    """As scorer: -> score, by the rewards of what the policy responds."""
    policy, judge = load_policy(cfg), grading.open_judge(cfg)

    def score(prompt, turns):
        """The mean reward at each turn; 0 where this prompt makes the conversation too long."""
        prompts = [Prompt(turn, encode_prompt(policy.tokenizer, prompt, turn)) for turn in turns]
        fit = [p for p in prompts if len(p.tokens) <= cfg.rollout.max_prompt_tokens]
        graded, scores, said = evaluate(policy, judge, fit, cfg, desc="policy"), [], []
        for turn in turns:
            group = [g for g in graded if g.turn_id == turn.turn_id]
            given = [g.reward for g in group if g.reward is not None]
            scores.append(fmean(given or [0.0]))
            said.append([g.response for g in group] or ["(the prompt is too long)"])
            if len(given) < len(group):
                said[-1] = None
        return scores, said

    return score


# ------------------------------------------------------------------------------------------------ the search

@dataclass
class Candidate:
    """A line of the ledger."""
    round: int
    candidate: int  # its number in the round
    origin: str  # the writer, or a mutation
    calibration: float = None  # mean score; None: not scored
    held_out: float = None  # mean score; None: not tried
    best_held_out: float = None  # that of the best prompt before
    low: float = None  # 5% quantile of the difference
    accepted: bool = False
    note: str = ""
    prompt: str = ""


def kept_scores(score, path, made):
    """score() that computes nothing twice: what it gives is kept in a file, by all that it depends on.

    Scores with an example that lacked a usable reply are not kept: the fault may be the server's, of one day.
    """
    cache = llm.Cache(path)

    def scores(prompt, examples):
        what = [prompt, [example.dump() for example in examples], made]
        kept = cache.get(what)
        if kept is None:
            found = score(prompt, examples)
            kept = json.dumps(found)
            if missing := found[1].count(None):
                print(f"warning: {missing} of {len(examples)} examples lacked a usable reply, on which may "
                      "hang what is accepted; these scores are not kept: run it again")
            else:
                cache.put(what, kept)
        return json.loads(kept)

    return scores


def candidates(kind, best, number, n, writer, reached, wrong):
    """-> n pairs (origin, prompt): variants by the writer, each shown other examples, then mutations."""
    rng, written = Random(f"{number} {best}"), []
    if writer:
        braces = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS[kind])
        system = load_prompt("prompts/variants.md", ("placeholders",)).replace("{placeholders}", braces)
        asked = []
        for k in range((n + 1) // 2):
            user = dump({"instructions": best, "purpose": PURPOSE[kind], "score": reached,
                         "examples": rng.sample(wrong, SHOWN)})
            asked.append(writer.submit(chat(system, user), Variant, seed=100 * number + k))
        writer.drain()
        written = [("writer", reply.prompt.strip()) for future in asked if (reply := future.result())]
    return written + [mutate(best, rng) for _ in range(n - len(written))]


def lacking(kind, prompt):
    """-> names of what a prompt must hold and does not."""
    lacks = [name for name in PLACEHOLDERS[kind] if f"{{{name}}}" not in prompt]
    if kind == "policy" and STOP not in prompt:
        lacks.append(STOP)
    return lacks


def search(kind, cfg, own, scores, best, parts):
    """Algorithm 1: from the first prompt to the best. The ledger is written after every round.

    scores: see kept_scores. parts: see split.
    """
    calibration, held_out = parts
    folder = cfg.run_path / "autoprompt"
    writer = llm.open_source("writer", cfg) if cfg.llm.writer.model else None
    ledger, tried, dry = [], {best}, 0
    for number in range(1, own.rounds + 1):
        now, said = scores(best, calibration)
        reached, ahead = fmean(now), []
        worst = np.argsort(now, kind="stable")[:max(SHOWN, len(now) // 4)]
        wrong = [shown(kind, calibration[i], said[i], cfg) for i in worst]
        proposed = candidates(kind, best, number, own.candidates, writer, reached, wrong)
        for k, (origin, prompt) in enumerate(proposed, 1):
            c = Candidate(number, k, origin, prompt=prompt)
            ledger.append(c)
            if lacks := lacking(kind, prompt):
                c.note = f"lacks {', '.join(lacks)}"
            elif prompt in tried:
                c.note = "tried before"
            else:
                tried.add(prompt)
                c.calibration = fmean(scores(prompt, calibration)[0])
                print(f"round {number}, candidate {k} ({origin}): {c.calibration:.4f} on calibration, the "
                      f"best so far {reached:.4f}")
                if c.calibration > reached:
                    ahead.append(c)
        dry += 1
        for c in sorted(ahead, key=lambda c: -c.calibration)[:TESTED]:
            try_held_out(c, scores(c.prompt, held_out)[0], scores(best, held_out)[0], cfg.seed)
            if c.accepted:
                best, dry = c.prompt, 0
                break
        write_jsonl(folder / f"{kind}.jsonl", map(asdict, ledger))
        write_text(folder / f"{kind}.md", as_table(ledger))
        if dry == 2:
            break
    return best


def try_held_out(c, new, old, seed):
    """Is a candidate also better on the held-out part? new, old: its scores there, and those of the best."""
    difference, c.low = better(new, old, seed)
    c.held_out, c.best_held_out = fmean(new), fmean(old)
    c.accepted = c.low > 0
    if not c.accepted:
        c.note = "better on calibration only"
    print(f"round {c.round}: candidate {c.candidate} held out {c.held_out:.4f}, the best so far "
          f"{c.best_held_out:.4f}, difference {difference:+.4f}, 5% quantile {c.low:+.4f}: "
          f"{'accepted' if c.accepted else 'rejected'}")


def as_table(ledger):
    """The ledger as a Markdown table."""
    head = "round,candidate,origin,calibration,held out,best so far,5% of the difference,,begins"
    rows = [head.split(",")]
    for c in ledger:
        *known, accepted, note, prompt = vars(c).values()
        cells = ["" if value is None else cell(value, ".4f") for value in known]
        rows.append([*cells, "accepted" if accepted else note, prompt[:60].splitlines()[0]])
    return aligned(rows) + "\n"


# --------------------------------------------------------------------------------------------------- anchors

def read_anchors(path, kind, skip_null=False):
    """A file of anchors -> list, without the lines whose label is null, or with an error for them as for any
    other bad line: InputError."""
    anchors = []
    for n, row in read_jsonl(path):
        if skip_null and row.get(LABEL[kind]) is None:
            continue
        try:
            anchor = ANCHOR[kind].model_validate(row)
        except ValidationError as error:
            raise InputError(f"{path}:{n}: {explain(error)}; a line is {LINE[kind]}")
        why = hindsight.unusable(anchor.session) if kind == "extractor" else None
        if why:
            raise InputError(f"{path}:{n}: {why[1] or why[0]}")
        anchors.append(anchor)
    return anchors


def key_of(anchor):
    """What an anchor is about, whatever its label."""
    return anchor.model_dump_json(exclude={"score", "items"}, exclude_unset=True)


def by_key(path, kind):
    """{key: anchor} of a file of anchors, which may be missing."""
    anchors = read_anchors(path, kind) if Path(path).is_file() else []
    return {key_of(anchor): anchor for anchor in anchors}


def sampled_responses(cfg, n):
    """The policy's questions at n continue turns of sessions that it is not tested on: validation turns, or
    training turns where there are none. -> list of GraderAnchor without a score, each once"""
    valid = cfg.turns_path / "valid.jsonl"
    turns = [t for t in load_turns(cfg, "valid" if valid.is_file() else "train") if t.decision == "continue"]
    turns = Random(cfg.seed).sample(turns, min(n, len(turns)))
    policy, cfg = load_policy(cfg), cfg.model_copy(deep=True)
    cfg.data.long_prompts = "drop"
    prompts = encode_prompts(policy.tokenizer, turns, cfg)
    sampling = grading.sampling_of(cfg, evaluation=True)
    responses = rollout.generate(policy.model, [p.tokens for p in prompts], policy.ends, sampling)
    anchors = []
    for prompt, group in zip(prompts, responses):
        for text in dict.fromkeys(policy.text(r.tokens) for r in group):
            if reward.decision(text) == "continue":
                anchors.append(GraderAnchor.model_construct(turn=prompt.turn, response=text))
    return anchors


def sessions(cfg):
    """The usable sessions of the training logs -> list of ExtractorAnchor without items."""
    config.need(cfg, "data.logs")
    return [ExtractorAnchor.model_construct(session=session) for session in hindsight.sessions(cfg)[0]]


# --------------------------------------------------------------------------------------------- commands

def margin(kind, cfg, own):
    """The examples on which repeated readings disagree most -> run_dir/autoprompt/margin_TYPE.jsonl."""
    source, label = llm.open_source(kind, cfg), LABEL[kind]
    path = cfg.run_path / "autoprompt" / f"margin_{kind}.jsonl"
    if source.settings.temperature == 0:
        raise InputError(f"llm.{kind}.temperature is 0, so repeated results would not differ: set it to "
                         f"about 0.7 for this command")
    if path.is_file() and any(row.get(label) is not None for _, row in read_jsonl(path)):
        raise InputError(f"{path} holds labels: make anchors of them first (python autoprompt.py anchors ... "
                         f"from={path}), then remove it")
    known = by_key(own.anchors, kind)
    examples = sampled_responses(cfg, 5 * own.n) if kind == "grader" else sessions(cfg)
    examples = [e for e in examples if key_of(e) not in known]
    Random(cfg.seed).shuffle(examples)
    repeated, rows = "scores" if kind == "grader" else "extractions", []
    some = examples[:20 * own.n]
    for example, said in readings(kind, source, cfg, source.prompt, some, range(own.repeats)):
        said = [s for s in said if s is not None]
        if len(said) > 1:
            spread = pstdev(said) if kind == "grader" else 1 - fmean(starmap(f1, combinations(said, 2)))
            rows.append({**example.dump(), repeated: said, label: None, "disagreement": spread})
    rows.sort(key=lambda row: -row["disagreement"])
    write_jsonl(path, rows[:own.n])
    print(f"{llm.report(source)}\nwrote {path}: {min(own.n, len(rows))} of {len(rows)} examples. Fill "
          f"in {label} and run: python autoprompt.py anchors ... from={path}")


def add_anchors(kind, cfg, own):
    """Labelled lines of a margin file -> the anchors, each once, a later label in place of an earlier one."""
    if not own.labelled:
        raise InputError("name the labelled file: from=FILE (what `margin` wrote)")
    known, labelled = by_key(own.anchors, kind), read_anchors(own.labelled, kind, skip_null=True)
    labels = {key_of(anchor): anchor for anchor in labelled}
    changed = sum(known.get(key, anchor) != anchor for key, anchor in labels.items())
    together = known | labels
    write_jsonl(own.anchors, together.values())
    unlabelled = len(list(read_jsonl(own.labelled))) - len(labelled)
    print(f"wrote {own.anchors}: {len(known)} anchors as before, {len(together) - len(known)} new, {changed} "
          f"with another label; {unlabelled} lines of {own.labelled} have no label yet")


def calibrate(kind, cfg, own):
    """Search for a better prompt -> prompts/calibrated/TYPE.md, where one was found."""
    if kind == "policy":
        examples = load_turns(cfg, "train")
        examples = Random(cfg.seed).sample(examples, min(POLICY_TURNS, len(examples)))
    elif not Path(own.anchors).is_file():
        raise InputError(f"{own.anchors} does not exist: it holds a person's labels, one {LINE[kind]} a "
                         f"line; {ENOUGH}. `python autoprompt.py margin` lists what to label first")
    else:
        examples = read_anchors(own.anchors, kind)
        if len(examples) < FEWEST:
            raise InputError(f"{own.anchors} holds {len(examples)} anchors; {ENOUGH}")
    print(f"{len(examples)} examples for the {kind} prompt")
    score, file, files = scorer(kind, cfg, own.match)
    first, parts = load_prompt(file, PLACEHOLDERS[kind]), split(examples, cfg.seed)
    made = [config.made_with(cfg, "scores"), *map(identity, filter(None, [cfg.data.lexicon, *files]))]
    folder = cfg.run_path / "autoprompt"
    scores = kept_scores(score, folder / "scores.sqlite", made)
    best = search(kind, cfg, own, scores, first, parts)
    for name, part in zip(("calibration", "held out"), parts):
        before, after = (fmean(scores(prompt, part)[0]) for prompt in (first, best))
        print(f"{name}: {before:.4f} -> {after:.4f}")
    if best == first:
        print("no candidate was better on the held-out part: the prompt stays as it is")
        return
    out = Path("prompts/calibrated") / f"{kind}.md"
    write_text(out, best + "\n")
    key = "data.prompt" if kind == "policy" else f"llm.{kind}.prompt"
    print(f"wrote {out} (use it: {key}={out}); every candidate: {folder / kind}.md")


COMMANDS = {"margin": margin, "anchors": add_anchors}


def main():
    argv = sys.argv[1:]
    command = COMMANDS[argv.pop(0)] if argv and argv[0] in COMMANDS else calibrate
    cfg = config.load([a for a in argv if not a.startswith(OWN)], __doc__)
    try:
        own = Own.model_validate(dict(a.split("=", 1) for a in argv if a.startswith(OWN)))
    except ValidationError as error:
        raise InputError(f"command line: {explain(error)}")
    lock(cfg.run_path)
    own.anchors = own.anchors or f"anchors/{own.type}.jsonl"
    if own.type == "policy" and command is not calibrate:
        raise InputError("type=policy has no anchors: label examples for type=extractor or type=grader")
    command(own.type, cfg, own)


if __name__ == "__main__":
    cli(main)
