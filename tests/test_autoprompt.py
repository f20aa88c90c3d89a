"""Algorithm 1: mutations, split, acceptance, the search with ledger and resume, anchors and margin; in process, with sources
whose competence follows the rules a prompt states. test_llm_server.py runs it behind a server."""
import doctest
import json
import random
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import autoprompt
import config
import llm
from data import InputError, write_jsonl
from test_train import REPO, make_world

RULES = {"KNOWN": "- KNOWN: what was told scores 0.", "HALF": "- HALF: a related question scores 0.5.", "FORM": "- FORM: keywords score 0."}
POOR = "Grade for {goal}.\n- Be fair.\n- Be quick.\n{\"score\": 1}"
SCORE = {"good": 1.0, "told": 0.0, "related": 0.5, "keywords": 0.0}


class Fake:
    """A source that answers at once by a function of (messages, seed), and counts what it is asked."""

    def __init__(self, reply, prompt_file, temperature=0.0):
        self.reply, self.prompt_file, self.asked = reply, prompt_file, []
        self.prompt = open(prompt_file).read().strip() if prompt_file else ""
        self.s, self.tally = SimpleNamespace(concurrency=4, temperature=temperature, model="fake"), llm.Tally()

    def submit(self, messages, schema, check, seed=0):
        self.asked.append((json.dumps(messages), seed))
        future = Future()
        try:
            future.set_result(check(self.reply(messages, seed)))
        except ValueError:
            future.set_result(None)
        return future

    def drain(self):
        pass


def grade(messages, seed):
    """Right where the prompt states the rule, or quotes the very candidate; else every question is worth 1."""
    prompt, candidate = messages[0]["content"], json.loads(messages[-1]["content"].rpartition("Candidate: ")[2])
    kind = candidate.split()[0]
    for line in prompt.splitlines():
        if line.startswith(f"Example: {candidate} -> "):
            return {"score": float(line.rpartition(" ")[2]), "questions": 1}
    rule = {"told": "KNOWN", "related": "HALF", "keywords": "FORM"}.get(kind)
    if "GARBLE" in prompt:
        return {"score": 7}
    return {"score": SCORE[kind] if rule is None or RULES[rule] in prompt else 1, "questions": 1}


def write_variant(messages, seed):
    """By the seed: memorise the examples, drop the placeholder, or add a rule that is missing."""
    asked = json.loads(messages[-1]["content"])
    best = asked["instructions"]
    assert asked["purpose"] and "{goal}" in messages[0]["content"]
    if seed % 100 == 0:
        return {"prompt": best + "".join(f"\nExample: {e['candidate']} -> {e['wanted']}" for e in asked["examples"])}
    if seed % 100 == 1:
        return {"prompt": best.replace("{goal}", "the goal")}
    missing = [r for r in RULES.values() if r not in best]
    return {"prompt": best + "\n" + (missing or ["- Again."])[seed % len(missing or [1])]}


def anchors(n, kinds=tuple(SCORE)):
    rng = random.Random(0)
    for i in range(n):
        kind = rng.choice(kinds)
        yield {"turn": {"turn_id": f"{i}_1", "session_id": str(i), "goal": "g", "context": [{"role": "user", "content": "cough"}],
                        "target": ["duration: two"], "decision": "continue"}, "response": f"{kind} question {i}?", "score": SCORE[kind]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """-> (call autoprompt.py, {role: source}, folder)"""
    (tmp_path / "poor.md").write_text(POOR)
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path}/run\nllm: {{grader: {{model: m}}, writer: {{model: m}}}}\n")
    (tmp_path / "prompts").mkdir()
    for name in ("variants.md", "match.md"):
        (tmp_path / "prompts" / name).write_text((REPO / "prompts" / name).read_text())
    write_jsonl(tmp_path / "anchors" / "grader.jsonl", anchors(120))
    sources = {"grader": Fake(grade, tmp_path / "poor.md"), "writer": Fake(write_variant, None)}
    monkeypatch.setattr(llm, "open_source", lambda role, cfg: sources[role])
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["autoprompt.py", *argv])
        autoprompt.main()
    return call, sources, tmp_path


def ledger(folder, kind="grader"):
    return [json.loads(line) for line in (folder / "run" / "autoprompt" / f"{kind}.jsonl").read_text().splitlines()]


def test_docstring_examples():
    assert doctest.testmod(autoprompt).failed == 0 and doctest.testmod(autoprompt).attempted == 1


def test_calibration_finds_the_rules(world, capsys):
    """From a prompt without any rule to one with all three; held-out error falls; every candidate is in the ledger."""
    call, sources, folder = world
    call("c.yaml", "type=grader", "rounds=6", "candidates=10")
    best = (folder / "prompts" / "calibrated" / "grader.md").read_text()
    assert all(rule in best for rule in RULES.values()) and "{goal}" in best
    lines = ledger(folder)
    accepted = [x for x in lines if x["accepted"]]
    assert len(accepted) == 3 and accepted[-1]["held_out"] == 0 and all(x["low"] > 0 and x["held_out"] > x["best_held_out"] for x in accepted)
    rounds = {x["round"] for x in lines}
    assert [sum(x["round"] == r for x in lines) for r in sorted(rounds)] == [10] * len(rounds) and rounds == {1, 2, 3, 4, 5}  # two dry rounds end it
    assert any(x["note"] == "lacks goal" and x["calibration"] is None for x in lines)
    assert {x["origin"] for x in lines} >= {"writer", "drop", "swap"}
    out, table = capsys.readouterr().out, (folder / "run" / "autoprompt" / "grader.md").read_text()
    assert "held out: -0." in out and "-> 0.0000" in out and table.count(" accepted |") == 3 and len(table.splitlines()) == len(lines) + 2
    truth = list(anchors(120))
    parts = autoprompt.split(truth, 0)
    start = sum(-(1 - a["score"]) ** 2 for a in parts[1]) / len(parts[1])
    assert f"held out: {start:.4f} -> 0.0000" in out


def test_an_over_fitted_prompt_is_rejected_on_the_held_out_part(world):
    """A writer that only memorises: better on calibration, the same on the rest."""
    call, sources, folder = world
    sources["writer"].reply = lambda messages, seed: write_variant(messages, 0)
    call("c.yaml", "type=grader", "rounds=5", "candidates=2")
    lines = ledger(folder)
    tried = [x for x in lines if x["held_out"] is not None]
    assert tried and not any(x["accepted"] for x in lines) and not (folder / "prompts" / "calibrated").exists()
    assert all(x["note"] == "better on calibration only" and x["held_out"] == x["best_held_out"] for x in tried)
    assert {x["round"] for x in lines} == {1, 2}


def test_an_interrupted_search_goes_on(world, monkeypatch):
    """Killed after some candidates, then run again: nothing scored twice, and the ledger of an uninterrupted run."""
    call, sources, folder = world
    args = ("c.yaml", "type=grader", "rounds=4", "candidates=6")
    submit, n = Fake.submit, 900
    def limited(self, *rest, **how):
        if self is sources["grader"] and len(self.asked) >= n:
            raise KeyboardInterrupt
        return submit(self, *rest, **how)
    with monkeypatch.context() as m:
        m.setattr(Fake, "submit", limited)
        with pytest.raises(KeyboardInterrupt):
            call(*args)
    before = len((folder / "run" / "autoprompt" / "grader_scores.jsonl").read_text().splitlines())
    first = {k for k, _ in sources["grader"].asked[:before * 50]}
    sources["grader"].asked.clear()
    call(*args)
    resumed, again = ledger(folder), {k for k, _ in sources["grader"].asked}
    assert before > 3 and len(first & again) < len(first) / 5  # only the candidate under way is asked for again
    sources["grader"].asked.clear()
    call(*args)
    assert not sources["grader"].asked and ledger(folder) == resumed
    for path in (folder / "run" / "autoprompt").iterdir():
        path.unlink()
    call(*args)
    assert ledger(folder) == resumed


def test_a_prompt_whose_replies_are_unusable_scores_worst(world):
    call, sources, folder = world
    score, _ = autoprompt.scorer("grader", config.load(["c.yaml"]), "exact")
    examples = list(anchors(10))
    assert score(POOR + "GARBLE", examples)[0] == [-1.0] * 10
    assert score(POOR, examples)[0] == [-(1 - a["score"]) ** 2 for a in examples]


# ----------------------------------------------------------------------------------------------------------- the parts

def test_mutations_keep_what_is_no_list_item():
    rng, seen = random.Random(1), set()
    text = "Head {goal}\n- a\n- b\n- c\nTail"
    for _ in range(60):
        out, how = autoprompt.mutate(text, rng)
        seen.add(how)
        lines = out.splitlines()
        assert lines[0] == "Head {goal}" and lines[-1] == "Tail"
        items = [line for line in lines if line.startswith("- ")]
        assert {"drop": len(items) == 2, "swap": sorted(items) == ["- a", "- b", "- c"] and items != ["- a", "- b", "- c"],
                "repeat": items[:3] == ["- a", "- b", "- c"] and items[3].startswith("- Above all: ")}[how]
    assert seen == {"drop", "swap", "repeat"}
    assert autoprompt.mutate("No list.", rng)[1] == "stress"


def test_the_split_is_by_session_and_seed():
    examples = [{**a, "response": f"{a['response']} {k}"} for a in anchors(60) for k in range(3)]
    first, second = autoprompt.split(examples, 0)
    sessions = [{a["turn"]["session_id"] for a in part} for part in (first, second)]
    assert not sessions[0] & sessions[1] and 20 < len(sessions[0]) < 40 and len(first) + len(second) == 180
    assert autoprompt.split(examples, 1)[0] != first and autoprompt.split(examples, 0)[0] == first


def test_acceptance_is_paired():
    rng = random.Random(3)
    old = [rng.random() for _ in range(50)]
    better, worse = [x + 0.01 for x in old], [x + rng.gauss(0, 1) for x in old]
    assert autoprompt.better(better, old)[1] == pytest.approx(0.01) and autoprompt.better(worse, old)[1] < 0
    noise = [[x + rng.gauss(0, 1) for x in old] for _ in range(200)]
    assert sum(autoprompt.better(n, old, draws=500)[1] > 0 for n in noise) < 24  # about 5% by chance


SESSION = {"session_id": 1, "messages": [{"role": "user", "content": "cough"}, {"role": "assistant", "content": "Since when?"},
                                         {"role": "user", "content": "two days"}]}


def test_extractor_scores(world):
    call, sources, folder = world
    replies = {"a": {"items": [{"utterance": 3, "slot": "Duration", "value": "Two days."}]}, "b": {"items": []}, "c": {"items": 5}}
    sources["extractor"] = Fake(lambda messages, seed: {"matched": [1, 2]} if "wanted" in messages[-1]["content"] else replies[messages[0]["content"][0]],
                                folder / "poor.md")
    examples = [{"session": SESSION, "items": ["duration: two days", "symptom: cough"]}]
    score = autoprompt.scorer("extractor", config.load(["c.yaml"]), "exact")[0]
    assert score("a", examples) == ([pytest.approx(2 / 3)], [["Duration: Two days."]])
    assert score("b", examples)[0] == [0.0] and score("c", examples) == ([0.0], [None])
    assert score("b", [{"session": SESSION, "items": []}])[0] == [1.0]
    score = autoprompt.scorer("extractor", config.load(["c.yaml"]), "llm")[0]
    assert score("a", examples)[0] == [pytest.approx(2 * 2 / 3)]  # the matcher says so
    assert score("b", examples)[0] == [0.0]


def test_policy_examples_and_placeholders(world, monkeypatch):
    """A policy prompt must keep the goal and the marker."""
    call, sources, folder = world
    cfg, turns = config.load(["c.yaml", "data.prompt=policy.md"]), [a["turn"] for a in anchors(30)]
    (folder / "policy.md").write_text("Goal {goal}: ask or <stop />.\n- be short\n- be kind")
    sources["writer"].reply = lambda messages, seed: {"prompt": ["Goal {goal}: only ask.", "Goal {goal}: ask or <stop />, BEST"][seed % 2]}
    monkeypatch.setattr(autoprompt.evaluation, "model_of", lambda cfg: folder / "anchors")

    def score(prompt, examples):
        return [float("BEST" in prompt)] * len(examples), [["x"]] * len(examples)
    own = dict(autoprompt.OWN, type="policy", rounds=1, candidates=4)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(autoprompt, "policy_scorer", lambda cfg: score)
        first, best, summary = autoprompt.search("policy", cfg, own, turns)
    assert best == "Goal {goal}: ask or <stop />, BEST" and summary["held_out"] == [0.0, 1.0]
    assert any(x["note"] == "lacks <stop />" for x in ledger(folder, "policy"))


# ------------------------------------------------------------------------------------------------------ margin, anchors

def test_margin_then_labels_then_anchors(world, capsys, monkeypatch):
    """The candidates that repeated gradings disagree on come first; a person's labels become anchors, once, and are never lost."""
    call, sources, folder = world
    turns = [dict(a["turn"]) for a in anchors(12)]
    monkeypatch.setattr(autoprompt, "sampled_answers", lambda cfg, n: [{"turn": t, "response": f"q{i}"} for i, t in enumerate(turns)])
    sources["grader"].s.temperature = 0.7
    sources["grader"].reply = lambda messages, seed: {"score": [0, 1][seed % 2] if '"q7"' in messages[-1]["content"] else
                                                      [0.5, 1][seed == 0] if '"q2"' in messages[-1]["content"] else 1, "questions": 1}
    args = ("margin", "c.yaml", "type=grader", "n=3", "repeats=4")
    call(*args)
    path = folder / "run" / "autoprompt" / "margin_grader.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["response"] for r in rows[:2]] == ["q7", "q2"] and len(rows) == 3 and rows[0]["scores"] == [0, 1, 0, 1]
    assert rows[0]["disagreement"] == 0.5 and all(r["score"] is None for r in rows) and len(sources["grader"].asked) == 48
    rows[0]["score"], rows[1]["score"] = 0.5, 1
    write_jsonl(path, rows)
    with pytest.raises(InputError, match="holds labels"):
        call(*args)
    (folder / "anchors" / "grader.jsonl").unlink()
    capsys.readouterr()
    for new, changed, score in ((2, 0, 0.5), (0, 0, 0.5), (0, 1, 0)):
        rows[0]["score"] = score
        write_jsonl(path, rows)
        call("anchors", "c.yaml", "type=grader", f"from={path}")
        assert f"{new} new, {changed} with another label; 1 lines" in capsys.readouterr().out
    made = [json.loads(line) for line in (folder / "anchors" / "grader.jsonl").read_text().splitlines()]
    assert [(a["response"], a["score"], set(a)) for a in made] == [(f"q{i}", s, {"turn", "response", "score"}) for i, s in ((7, 0), (2, 1))]
    path.unlink()
    call(*args)  # what has a label is not listed again
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not {"q7", "q2"} & {r["response"] for r in rows}


def test_answers_to_label_come_from_no_test_session(tmp_path, monkeypatch, tiny_checkpoint, one_rank):
    """Validation turns where there are any, else training turns."""
    path = make_world(tmp_path, tiny_checkpoint)
    monkeypatch.chdir(REPO)
    turns, seen = tmp_path / "run" / "turns", lambda: {e["turn"]["turn_id"] for e in autoprompt.sampled_answers(config.load([str(path)]), 99)}
    lines = (turns / "train.jsonl").read_text().splitlines(True)
    (turns / "eval.jsonl").write_text("".join(line.replace('"turn_id": "', '"turn_id": "test_') for line in lines[:6]))
    assert seen() <= {json.loads(line)["turn_id"] for line in lines} and seen()
    (turns / "valid.jsonl").write_text("".join(line.replace('"turn_id": "', '"turn_id": "valid_') for line in lines[:6]))
    assert seen() and all(i.startswith("valid_") for i in seen())


def test_kept_scores_are_those_of_these_settings(world):
    """Another goal, generic list or lexicon fills the prompt or scores otherwise: nothing kept may be used."""
    call, sources, folder = world
    (folder / "lex.yaml").write_text("a")
    args = ("c.yaml", "type=grader", "rounds=1", "candidates=2", "data.lexicon=lex.yaml")
    asked = []
    for other in ((), (), ("data.goal=another",), ("hindsight.generic=[age]",), ("llm.grader.concurrency=3", "train.lr=1")):
        sources["grader"].asked.clear()
        call(*args, *other)
        asked.append(len(sources["grader"].asked))
    (folder / "lex.yaml").write_text("b")
    sources["grader"].asked.clear()
    call(*args)
    assert [n > 0 for n in (*asked, len(sources["grader"].asked))] == [True, False, True, True, False, True]


def test_margin_of_the_extractor(world):
    call, sources, folder = world
    (folder / "logs.jsonl").write_text("".join(json.dumps({**SESSION, "session_id": i}) + "\n" for i in range(4)))
    item = lambda value: {"items": [{"utterance": 3, "slot": "duration", "value": value}]}
    sources["extractor"] = Fake(lambda messages, seed: item(str(seed)), folder / "poor.md", temperature=1.0)
    call("margin", "c.yaml", "type=extractor", "n=2", "repeats=3", f"data.logs={folder}/logs.jsonl")
    rows = [json.loads(line) for line in (folder / "run" / "autoprompt" / "margin_extractor.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["disagreement"] == 1 and rows[0]["items"] is None and len(rows[0]["extractions"]) == 3


BAD = {
    "no type": (["c.yaml"], None, "type= must be one of extractor, grader, policy, not None"),
    "type": (["c.yaml", "type=judge"], None, "not judge"),
    "rounds": (["c.yaml", "type=grader", "rounds=0"], None, "rounds=0 must be a whole number above 0"),
    "match": (["c.yaml", "type=grader", "match=fuzzy"], None, "match= must be one of exact, llm, not fuzzy"),
    "missing": (["c.yaml", "type=grader", "anchors=none.jsonl"], None, "none.jsonl does not exist"),
    "few": (["c.yaml", "type=grader"], list(anchors(7)), "holds 7 anchors; 8 are the fewest"),
    "score": (["c.yaml", "type=grader"], [{**a, "score": 2} for a in anchors(9)], "grader.jsonl:1: 'score' must be 0, 0.5 or 1, not 2"),
    "unlabelled": (["c.yaml", "type=grader"], [{**a, "score": None} for a in anchors(9)], "grader.jsonl:1: 'score' must be"),
    "one session": (["c.yaml", "type=grader"], [{**a, "turn": {**a["turn"], "session_id": "1"}} for a in anchors(9)], "label more sessions"),
    "cold": (["margin", "c.yaml", "type=grader"], None, "llm.grader.temperature is 0"),
    "margin policy": (["margin", "c.yaml", "type=policy"], None, "type= must be one of extractor, grader, not policy"),
    "from": (["anchors", "c.yaml", "type=grader"], None, "from=FILE"),
    "key": (["c.yaml", "type=grader", "llm.grader.modle=x"], None, "did you mean 'llm.grader.model'"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(world, name):
    call, _, folder = world
    argv, rows, say = BAD[name]
    if rows:
        write_jsonl(folder / "anchors" / "grader.jsonl", rows)
    with pytest.raises(InputError) as error:
        call(*argv)
    assert say in str(error.value) and "\n" not in str(error.value)
