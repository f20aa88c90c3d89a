"""Algorithm 1: mutations, split, acceptance, the search with ledger and resume, anchors and margin; with
sources in this process whose competence follows the rules that a prompt states."""
import json
import random
import re
import sqlite3
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import autoprompt
import config
import llm
from records import ExtractorAnchor, GraderAnchor, InputError, write_jsonl
from world import REPO, make_world, read_lines, write_lines

RULES = {"told": "- KNOWN: what was told scores 0.", "related": "- HALF: a related question scores 0.5.",
         "keywords": "- FORM: keywords score 0."}
POOR = "Grade for {goal}.\n- Be fair.\n- Be quick.\n{\"score\": 1}"
SCORE = {"good": 1.0, "told": 0.0, "related": 0.5, "keywords": 0.0}


class Fake:
    """A source that replies at once by a function of (messages, seed), and notes what it is asked."""

    def __init__(self, reply, prompt_file=None, temperature=0.0):
        self.reply, self.prompt_file, self.asked = reply, prompt_file, []
        self.prompt = prompt_file.read_text().strip() if prompt_file else ""
        self.settings = SimpleNamespace(concurrency=4, temperature=temperature)
        self.tally, self.drain = llm.Tally(), lambda: None

    def submit(self, messages, reply_class, seed=0, context=None):
        self.asked.append((json.dumps(messages), seed))
        future = Future()
        try:
            reply = self.reply(messages, seed)
            future.set_result(reply_class.model_validate(reply, context=context))
        except ValueError:
            future.set_result(None)
        return future


def grade(messages, seed):
    """Right where the prompt states the rule, or quotes the very candidate; else all questions get a 1."""
    prompt, user = (m["content"] for m in messages)
    candidate = json.loads(user.rpartition("Candidate: ")[2])
    kind = candidate.split()[0]
    for line in prompt.splitlines():
        if line.startswith(f"Example: {candidate} -> "):
            return {"score": float(line.rpartition(" ")[2]), "questions": 1}
    if "GARBLE" in prompt:
        return {"score": 7}
    return {"score": SCORE[kind] if RULES.get(kind, "") in prompt else 1, "questions": 1}


def write_variant(messages, seed):
    """By the seed: memorise the examples, drop the placeholder, or add a rule that is missing."""
    asked = json.loads(messages[-1]["content"])
    best = asked["instructions"]
    assert asked["purpose"] and "{goal}" in messages[0]["content"]
    if seed % 100 == 0:
        examples = [f"\nExample: {e['candidate']} -> {e['wanted']}" for e in asked["examples"]]
        return {"prompt": best + "".join(examples)}
    if seed % 100 == 1:
        return {"prompt": best.replace("{goal}", "the goal")}
    missing = [rule for rule in RULES.values() if rule not in best] or ["- Again."]
    return {"prompt": best + "\n" + missing[seed % len(missing)]}


def anchors(n):
    rng = random.Random(0)
    turn = dict(goal="g", context=[{"role": "user", "content": "cough"}], known=[], target=["duration: two"],
                decision="continue")
    rows = []
    for i in range(n):
        kind = rng.choice(list(SCORE))
        rows.append({"turn": turn | {"turn_id": f"{i}_1", "session_id": str(i)},
                     "response": f"{kind} question {i}?", "score": SCORE[kind]})
    return [GraderAnchor.model_validate(row) for row in rows]


def rows(n, **changed):
    return [anchor.dump() | changed for anchor in anchors(n)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """call: autoprompt.py with these arguments; sources by role; folder; ledger: its lines."""
    (tmp_path / "poor.md").write_text(POOR)
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path}/run\n"
                                     "llm: {grader: {model: m}, writer: {model: m}}\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "anchors").mkdir()
    for name in ("variants.md", "match.md"):
        (tmp_path / "prompts" / name).write_text((REPO / "prompts" / name).read_text())
    write_jsonl(tmp_path / "anchors" / "grader.jsonl", anchors(120))
    sources = {"grader": Fake(grade, tmp_path / "poor.md"), "writer": Fake(write_variant)}
    monkeypatch.setattr(llm, "open_source", lambda role, cfg: sources[role])
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        for source in sources.values():
            source.asked.clear()
        monkeypatch.setattr(sys, "argv", ["autoprompt.py", *argv])
        autoprompt.main()

    folder = tmp_path / "run" / "autoprompt"
    return SimpleNamespace(call=call, sources=sources, folder=tmp_path, out=folder,
                           ledger=lambda kind="grader": read_lines(folder / f"{kind}.jsonl"))


# ------------------------------------------------------------------------------------------------- the search

def test_calibration_finds_the_rules(desk, capsys):
    """From a prompt without any rule to one with all three; every candidate is in the ledger."""
    desk.call("c.yaml", "type=grader", "rounds=6", "candidates=10")
    best = (desk.folder / "prompts" / "calibrated" / "grader.md").read_text()
    assert all(rule in best for rule in RULES.values()) and "{goal}" in best
    lines = desk.ledger()
    accepted = [x for x in lines if x["accepted"]]
    assert len(accepted) == 3 and accepted[-1]["held_out"] == 0
    assert all(x["low"] > 0 and x["held_out"] > x["best_held_out"] for x in accepted)
    assert [x["round"] for x in lines] == sorted([1, 2, 3, 4, 5] * 10)  # two dry rounds end it
    assert any(x["note"] == "lacks goal" and x["calibration"] is None for x in lines)
    assert {x["origin"] for x in lines} >= {"writer", "drop", "swap"}
    assert list(lines[0]) == ("round candidate origin calibration held_out best_held_out low accepted note "
                              "prompt").split()
    table = (desk.out / "grader.md").read_text()
    assert table.count(" accepted |") == 3 and len(table.splitlines()) == len(lines) + 2
    held_out = autoprompt.split(anchors(120), 0)[1]
    start = sum(-(1 - a.score) ** 2 for a in held_out) / len(held_out)
    assert f"held out: {start:.4f} -> 0.0000" in capsys.readouterr().out


def test_an_over_fitted_prompt_is_rejected_on_the_held_out_part(desk):
    """A writer that only memorises: better on calibration, the same on the rest."""
    desk.sources["writer"].reply = lambda messages, seed: write_variant(messages, 0)
    desk.call("c.yaml", "type=grader", "rounds=5", "candidates=2")
    lines = desk.ledger()
    tried = [x for x in lines if x["held_out"] is not None]
    assert tried and not any(x["accepted"] for x in lines) and {x["round"] for x in lines} == {1, 2}
    for x in tried:
        assert x["note"] == "better on calibration only" and x["held_out"] == x["best_held_out"]
    assert not (desk.folder / "prompts" / "calibrated").exists()


def test_an_interrupted_search_goes_on(desk, monkeypatch):
    """Killed after some candidates, then run again: nothing scored twice, and the ledger of an uninterrupted
    run."""
    args, grader = ("c.yaml", "type=grader", "rounds=4", "candidates=6"), desk.sources["grader"]
    submit = grader.submit

    def limited(*ask):
        if len(grader.asked) >= 900:
            raise KeyboardInterrupt
        return submit(*ask)

    with monkeypatch.context() as patch:
        patch.setattr(grader, "submit", limited)
        with pytest.raises(KeyboardInterrupt):
            desk.call(*args)
    with sqlite3.connect(desk.out / "scores.sqlite") as db:
        before, = db.execute("SELECT count(*) FROM reply").fetchone()
    first = {messages for messages, _ in grader.asked[:before * 50]}
    desk.call(*args)
    resumed, again = desk.ledger(), {messages for messages, _ in grader.asked}
    assert before > 3 and len(first & again) < len(first) / 5  # only the candidate under way is asked again
    desk.call(*args)
    assert not grader.asked and desk.ledger() == resumed
    for path in desk.out.iterdir():
        path.unlink()
    desk.call(*args)
    assert desk.ledger() == resumed


def test_kept_scores_are_those_of_these_settings(desk):
    """Another goal, generic list, server or lexicon scores otherwise: nothing that was kept may be used."""
    asked, grader = [], desk.sources["grader"]
    for text, *other in (["a"], ["a"], ["a", "data.goal=another"], ["a", "hindsight.generic=[age]"],
                         ["a", "llm.grader.concurrency=3", "llm.auditor.base_url=x", "train.lr=1"],
                         ["a", "llm.grader.base_url=http://x/v1"], ["b"]):
        (desk.folder / "lex.yaml").write_text(text)
        desk.call("c.yaml", "type=grader", "rounds=1", "candidates=2", "data.lexicon=lex.yaml", *other)
        asked.append(bool(grader.asked))
    assert asked == [True, False, True, True, False, True, True]


def test_what_had_no_usable_reply_is_asked_again(desk, capsys):
    """A server's bad day is no mark of the prompt's: a rerun comes to what a first run would have come to."""
    args, grader = ("c.yaml", "type=grader", "rounds=2", "candidates=2"), desk.sources["grader"]
    desk.call(*args)
    clean = desk.ledger()
    (desk.out / "scores.sqlite").unlink()
    grader.reply = lambda messages, seed: grade(messages, seed) if len(grader.asked) % 3 else {}
    desk.call(*args)
    assert desk.ledger() != clean
    told = capsys.readouterr().out
    lost = re.findall(r"^warning: (\d+) of (\d+) examples lacked .* run it again$", told, re.M)
    assert len(lost) > 3 and all(0.3 < int(n) / int(of) < 0.4 for n, of in lost)
    grader.reply = grade
    desk.call(*args)
    told = capsys.readouterr().out
    assert grader.asked and desk.ledger() == clean and "grader: 0 asks: 0 answered" in told
    assert "warning" not in told


# -------------------------------------------------------------------------------------------------- the parts

def test_mutations_keep_what_is_no_list_item():
    rng, seen, before = random.Random(1), set(), ["- a", "- b", "- c"]
    for _ in range(60):
        how, text = autoprompt.mutate("Head {goal}\n- a\n- b\n- c\nTail", rng)
        seen.add(how)
        head, *items, tail = text.splitlines()
        assert (head, tail) == ("Head {goal}", "Tail")
        if how == "repeat":
            assert items[:3] == before and items[3].startswith("- Above all: ")
        else:
            assert len(items) == 2 if how == "drop" else sorted(items) == before != items
    assert seen == {"drop", "swap", "repeat"}
    assert autoprompt.mutate("No list.", rng)[0] == "stress"


def test_the_split_is_by_session_and_seed():
    examples = [a.model_copy(update={"response": str(k)}) for a in anchors(60) for k in range(3)]
    parts = autoprompt.split(examples, 0)
    first, second = ({a.turn.session_id for a in part} for part in parts)
    assert not first & second and 20 < len(first) < 40 and sum(map(len, parts)) == 180
    assert autoprompt.split(examples, 1)[0] != parts[0] and autoprompt.split(examples, 0) == parts


def test_acceptance_is_paired():
    rng = random.Random(3)
    old = [rng.random() for _ in range(50)]
    better, worse = [x + 0.01 for x in old], [x + rng.gauss(0, 1) for x in old]
    assert autoprompt.better(better, old)[1] == pytest.approx(0.01)
    assert autoprompt.better(worse, old)[1] < 0
    noise = [[x + rng.gauss(0, 1) for x in old] for _ in range(200)]
    assert sum(autoprompt.better(n, old)[1] > 0 for n in noise) < 24  # about 5% by chance


def test_grader_scores(desk):
    """A prompt whose replies are unusable has the worst score."""
    (score, *_), examples = autoprompt.scorer("grader", config.load(["c.yaml"])), anchors(10)
    assert score(POOR + "GARBLE", examples)[0] == [-1.0] * 10
    assert score(POOR, examples)[0] == [-(1 - a.score) ** 2 for a in examples]


SESSION = {"session_id": "1", "messages": [
    {"role": "user", "content": "cough"}, {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "two days"}, {"role": "assistant", "content": "END"},
    {"role": "user", "content": "never"}]}


MARKED = ["hindsight.end_markers=[END]"]


def found(value):
    return {"items": [{"utterance": 3, "slot": "Duration", "value": value}]}


def test_extractor_scores(desk):
    replies = {"a": found("Two days."), "b": {"items": []}, "c": {"items": 5}}
    matched = [1, 2]

    def reply(messages, seed):
        system, user = (m["content"] for m in messages)
        return {"matched": matched} if "wanted" in user else replies[system[0]]

    desk.sources["extractor"] = Fake(reply, desk.folder / "poor.md")
    wanted, cfg = ["duration: two days", "symptom: cough"], config.load(["c.yaml", *MARKED])
    examples = [ExtractorAnchor.model_validate({"session": SESSION, "items": wanted})]
    exact, by_model = (autoprompt.scorer("extractor", cfg, match)[0] for match in ("exact", "llm"))
    assert exact("a", examples) == ([pytest.approx(2 / 3)], [["Duration: Two days."]])
    assert exact("b", examples)[0] == [0.0] and exact("c", examples) == ([0.0], [None])
    nothing = ExtractorAnchor.model_validate({"session": SESSION, "items": []})
    assert exact("b", [nothing])[0] == [1.0]
    assert by_model("a", examples)[0] == [pytest.approx(2 * 2 / 3)]  # the matcher says so
    assert by_model("b", examples)[0] == [0.0] and "never" not in str(desk.sources["extractor"].asked)
    told = autoprompt.shown("extractor", examples[0], [], cfg)["conversation"]
    assert [line["text"] for line in told] == ["cough", "Since when?", "two days"]  # as it was read
    matched = [1, 3]  # there is no third: exact match decides
    assert by_model("a", examples) == ([pytest.approx(2 / 3)], [None])  # and is not kept


def test_a_policy_prompt_must_keep_goal_and_marker(desk):
    first = "Goal {goal}: ask or <stop />.\n- be short\n- be kind"
    variants = "Goal {goal}: only ask.", "Goal {goal}: ask or <stop />, BEST"
    desk.sources["writer"].reply = lambda messages, seed: {"prompt": variants[seed % 2]}

    def score(prompt, turns):
        return [float("BEST" in prompt)] * len(turns), [["x"]] * len(turns)

    parts = autoprompt.split([a.turn for a in anchors(30)], 0)
    own = SimpleNamespace(rounds=1, candidates=4)
    best = autoprompt.search("policy", config.load(["c.yaml"]), own, score, first, parts)
    lines = desk.ledger("policy")
    accepted, = (x for x in lines if x["accepted"])
    assert best == variants[1] and (accepted["best_held_out"], accepted["held_out"]) == (0.0, 1.0)
    assert any(x["note"] == "lacks <stop />" for x in lines)


def test_policy_scores(tmp_path, monkeypatch, tiny_checkpoint, one_rank):
    """A prompt that makes the conversation too long has no reward."""
    path = make_world(tmp_path, tiny_checkpoint)
    monkeypatch.chdir(REPO)
    cfg = config.load([str(path)])
    turns = autoprompt.load_turns(cfg, "train")[:3]
    score, file, _ = autoprompt.scorer("policy", cfg)
    scores, said = score(autoprompt.load_prompt(file), turns)
    assert all(s >= 0 for s in scores) and [len(group) for group in said] == [cfg.eval.samples] * 3
    assert score("Goal {goal}. " * 9999, turns) == ([0.0] * 3, [["(the prompt is too long)"]] * 3)
    graded = [SimpleNamespace(turn_id=t.turn_id, response="x", reward=r) for t in turns for r in (1.0, 2.0)]
    graded[2].reward = graded[4].reward = graded[5].reward = None  # the grader was down: not kept
    monkeypatch.setattr(autoprompt, "evaluate", lambda *_, **how: graded)
    assert score("{goal}", turns) == ([1.5, 2.0, 0.0], [["x", "x"], None, None])


# -------------------------------------------------------------------------------------------- margin, anchors

def test_margin_then_labels_then_anchors(desk, capsys, monkeypatch):
    """The candidates that repeated gradings disagree on come first; a person's labels become anchors, once,
    and are never lost."""
    def reply(messages, seed):
        candidate = messages[-1]["content"]
        score = seed % 2 if '"q7"' in candidate else 0.5 if '"q2"' in candidate and seed else 1
        return {"score": score, "questions": 1}

    candidates = [GraderAnchor.model_construct(turn=a.turn, response=f"q{i}")
                  for i, a in enumerate(anchors(12))]
    monkeypatch.setattr(autoprompt, "sampled_responses", lambda cfg, n: list(candidates))
    grader = desk.sources["grader"] = Fake(reply, desk.folder / "poor.md", temperature=0.7)
    args, path = ("margin", "c.yaml", "type=grader", "n=3", "repeats=4"), desk.out / "margin_grader.jsonl"
    labelled = desk.folder / "anchors" / "grader.jsonl"
    desk.call(*args)
    lines = read_lines(path)
    assert [line["response"] for line in lines[:2]] == ["q7", "q2"] and lines[0]["scores"] == [0, 1, 0, 1]
    assert list(lines[0]) == ["turn", "response", "scores", "score", "disagreement"]
    assert [line["score"] for line in lines] == [None] * 3 and lines[0]["disagreement"] == 0.5
    assert len(grader.asked) == 48
    lines[0]["score"], lines[1]["score"] = 0.5, 1
    write_lines(path, lines)
    with pytest.raises(InputError, match="holds labels"):
        desk.call(*args)
    labelled.unlink()
    for new, changed, score in ((2, 0, 0.5), (0, 0, 0.5), (0, 1, 0)):
        lines[0]["score"] = score
        write_lines(path, lines)
        capsys.readouterr()
        desk.call("anchors", "c.yaml", "type=grader", f"from={path}")
        assert f"{new} new, {changed} with another label; 1 lines" in capsys.readouterr().out
    made = read_lines(labelled)
    assert [(a["response"], a["score"]) for a in made] == [("q7", 0), ("q2", 1)]
    assert all(set(a) == {"turn", "response", "score"} for a in made)
    path.unlink()
    desk.call(*args)  # what has a label is not listed again
    assert not {"q7", "q2"} & {line["response"] for line in read_lines(path)}


def test_margin_of_the_extractor(desk):
    write_lines(desk.folder / "logs.jsonl", [SESSION | {"session_id": i} for i in range(4)])
    desk.sources["extractor"] = Fake(lambda messages, seed: found(str(seed)), desk.folder / "poor.md", 1.0)
    desk.call("margin", "c.yaml", "type=extractor", "n=2", "repeats=3", "data.logs=logs.jsonl")
    lines = read_lines(desk.out / "margin_extractor.jsonl")
    assert len(lines) == 2 and lines[0]["disagreement"] == 1 and lines[0]["items"] is None
    assert lines[0]["extractions"] == [[f"Duration: {seed}"] for seed in range(3)]


def test_responses_to_label_come_from_no_test_session(tmp_path, monkeypatch, tiny_checkpoint, one_rank):
    """Validation turns where there are any, else training turns."""
    path = make_world(tmp_path, tiny_checkpoint)
    monkeypatch.chdir(REPO)
    turns, cfg = tmp_path / "run" / "turns", config.load([str(path)])
    train = read_lines(turns / "train.jsonl")

    def seen():
        return {a.turn.turn_id for a in autoprompt.sampled_responses(cfg, 99)}

    for name in ("eval", "valid"):
        before = seen()
        assert before and before <= {turn["turn_id"] for turn in train}
        write_lines(turns / f"{name}.jsonl", [t | {"turn_id": name + t["turn_id"]} for t in train[:6]])
    assert seen() and all(i.startswith("valid") for i in seen())


GRADER = ["c.yaml", "type=grader"]
ONE_SESSION = [row | {"turn": row["turn"] | {"session_id": "1"}} for row in rows(9)]


@pytest.mark.parametrize("argv, lines, says", [
    (["c.yaml"], None, "type must be 'extractor', 'grader' or 'policy', not None"),
    (["c.yaml", "type=judge"], None, "not 'judge'"),
    ([*GRADER, "rounds=0"], None, "rounds must be at least 1, not '0'"),
    ([*GRADER, "rounds=x"], None, "rounds"),
    ([*GRADER, "match=fuzzy"], None, "match must be 'exact' or 'llm', not 'fuzzy'"),
    ([*GRADER, "anchors=none.jsonl"], None, "none.jsonl does not exist"),
    (GRADER, rows(7), "holds 7 anchors; 8 are the fewest"),
    (GRADER, rows(9, score=2), "grader.jsonl:1: score must be 0, 0.5 or 1, not 2"),
    (GRADER, rows(9, score=None), "grader.jsonl:1: score must be a number, not None; a line is {"),
    (GRADER, ONE_SESSION, "label more sessions"),
    (["margin", *GRADER], None, "llm.grader.temperature is 0"),
    (["margin", "c.yaml", "type=policy"], None, "type=extractor"),
    (["anchors", *GRADER], None, "from=FILE"),
    ([*GRADER, "llm.grader.modle=x"], None, "did you mean 'llm.grader.model'")])
def test_bad_input(desk, argv, lines, says):
    if lines:
        write_lines(desk.folder / "anchors" / "grader.jsonl", lines)
    with pytest.raises(InputError) as error:
        desk.call(*argv)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, says", [
    ({"success": False}, "success is false"),
    ({"messages": SESSION["messages"][1:2]}, "no message of the user")])
def test_a_session_that_teaches_nothing_is_no_anchor(desk, change, says):
    write_lines(desk.folder / "anchors" / "extractor.jsonl", [{"session": SESSION | change, "items": []}] * 9)
    with pytest.raises(InputError, match=f"extractor.jsonl:1: .*{says}"):
        desk.call("c.yaml", "type=extractor")
