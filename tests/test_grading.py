"""The language model as grader: what it is asked, when and how often, and what becomes of failures; in
training, on one rank and two."""
import json
import os
import sys
import time
from concurrent.futures import Future
from random import Random
from types import SimpleNamespace

import pytest
import yaml

import config
import grading
import llm
import rollout
import run as running
import train_grpo
from asking import QUESTION, TURN, ask
from grading import Grade, Group, Judge, check_failed, grade_one
from metrics import agreement
from prompts import spoken
from records import STOP, InputError, Rollout, explain
from world import LEXICON, REPO, make_config, make_world, metrics, read_lines, timeless

pytestmark = pytest.mark.usefixtures("client")
CANNED = ["How long?", "How long? Any color?", "What color?", "<stop />", "Bye <stop />",
          "How long how long?"]
SCORES = {"How long?": 1.0, "How long? Any color?": 1.0, "What color?": 0.0, "How long how long?": 0.0}


# ---------------------------------------------------------------------------------------------- one response

@pytest.mark.parametrize("score, questions, value", [
    (1, 2, (1.0, 2)), (0.5, 0, (0.5, 0)), (0.0, 1, (0.0, 1)),
    *[(score, 1, None) for score in (True, "1", 0.7, None, [1], float("nan"))],
    *[(1, n, None) for n in (-1, True, "1", 1.5, None)]])
def test_what_is_a_grade(score, questions, value):
    reply = {"score": score, "questions": questions}
    if value:
        grade = Grade.model_validate(reply)
        assert (grade.score, grade.questions) == value and type(grade.score) is float
        reply = {}
    with pytest.raises(ValueError) as error:
        Grade.model_validate(reply)
    assert len(explain(error.value)) <= 200


@pytest.mark.parametrize("reply", [{"score": 1}, {"questions": 1}])
def test_half_a_grade(reply):
    with pytest.raises(ValueError, match="missing|required"):
        Grade.model_validate(reply)


def test_omega_of_three_questions():
    judge = Judge(None, None, make_config(reward__grader="llm", reward__omega="llm").reward)
    assert grade_one(TURN, QUESTION, judge, verdict=Grade(score=1.0, questions=3)).omega == 0.0
    with pytest.raises(InputError, match="reward.omega=llm needs reward.grader=llm"):
        make_config(reward__omega="llm")


# ------------------------------------------------------------------------------------------------ a rationale

WITH_REASON = "prompts/grader_rationale.md"


def test_a_rationale_is_asked_for_by_the_prompt(serve, source_of):
    """Then it stands first in a schema that strict servers take. Else the schema is as it always was: it is a
    part of the cache's key."""
    server = serve(record=True)
    why, plain = source_of(server, prompt=WITH_REASON), source_of(server)
    for source, reason in (why, "By the rules: 1."), (plain, ""), (why, "By the rules: 1."):
        grade = ask(source).result(20)
        assert (grade.score, grade.questions, grade.rationale) == (1, 1, reason)
    first, second = (body["response_format"]["json_schema"]["schema"] for body in server.bodies)
    assert list(first["properties"]) == ["rationale", "score", "questions"] == first["required"]
    assert second == {"additionalProperties": False, "title": "Grade", "type": "object", "properties": {
        "score": {"enum": [0, 0.5, 1], "title": "Score", "type": "number"},
        "questions": {"minimum": 0, "title": "Questions", "type": "integer"}},
        "required": ["score", "questions"]}


def test_a_rationale_without_schemas(serve, source_of):
    """A server that takes no schema gives one by the prompt; a reply without it is repaired; one that nobody
    asked for does no harm."""
    server = serve(schemas=False, script=[None, "text"], texts=['{"score": 1, "questions": 1}'])
    source = source_of(server, prompt=WITH_REASON)
    assert ask(source).result(20).rationale == "By the rules: 1."
    assert source.tally.n["repairs"] == 1 and "rationale is missing" in source.tally.why
    server.script, server.texts = [None, "text"], ['{"rationale": "so", "score": 0, "questions": 1}']
    assert ask(source_of(server), "Why?").result(20).rationale == "so"


@pytest.mark.parametrize("said, kept", [
    ("", None), (" \n", None), (" it asks\n", "it asks"), ("xy" * 400, "xy" * 150)])
def test_what_is_kept_of_a_rationale(said, kept):
    """It is cut, not refused; identical responses share it; without one a line is what it always was."""
    judge, verdict = Judge(None, "grader", make_config(reward__grader="llm").reward), Future()
    verdict.set_result(Grade(rationale=said, score=1.0, questions=1))
    verdicts = {("grader", TURN.turn_id, QUESTION): verdict}
    graded = grading.grade(TURN, [QUESTION, STOP, QUESTION], judge, verdicts)
    assert [r.rationale for r in graded] == [kept, None, kept]
    names = "turn_id session_id sample response truth decision r_a r_s omega reward".split()
    assert list(graded[1].dump()) == names
    assert list(graded[0].dump()) == names + ["rationale"] * bool(kept)


# ------------------------------------------------------------------------------------------------ in training

@pytest.fixture(scope="module")
def lexicon_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "lexicon.yaml"
    path.write_text(yaml.safe_dump(LEXICON))
    return path


@pytest.fixture
def world_of(tmp_path, marks_checkpoint):
    """world_of(url, name, **keys): a run whose grader is at the url -> path of its config"""
    def make(url, name="", **more):
        grader = dict(reward__grader="llm", llm__grader__model="toy", llm__grader__base_url=url,
                      llm__grader__timeout_s=5.0)
        return make_world(tmp_path / name, marks_checkpoint, **grader | more)

    return make


@pytest.mark.parametrize("samples, greedy, rows", [(3, False, 192), (3, True, 64), (10, False, 320)])
def test_an_evaluation_holds_no_more_prompts_at_once_than_training(samples, greedy, rows):
    cfg = config.Config(run_dir="run", eval=config.EvalConfig(samples=samples))  # in training 64 x 5 rows
    assert (grading.sampling_of(cfg).max_rows, grading.sampling_of(cfg, True, greedy).max_rows) == (320, rows)


@pytest.fixture
def canned(monkeypatch):
    """Responses are read as one of CANNED, so that all branches are met and texts repeat within a group.
    -> [(turn, texts, their Rollouts)] of all that is graded"""
    calls, grade = [], grading.grade

    def noted(turn, texts, *rest):
        calls.append((turn, texts, grade(turn, texts, *rest)))
        return calls[-1][-1]

    monkeypatch.setattr(rollout.Policy, "text", lambda _, tokens: CANNED[sum(tokens) % len(CANNED)])
    monkeypatch.setattr(grading, "grade", noted)
    return calls


@pytest.fixture
def prepared(monkeypatch):
    """-> the groups that are trained on"""
    groups, prepare = [], train_grpo.prepare
    monkeypatch.setattr(train_grpo, "prepare", lambda part, run: groups.extend(part) or prepare(part, run))
    return groups


def rollouts(calls):
    return [rollout for _, _, graded in calls for rollout in graded]


def right(rollout):
    return rollout.truth == rollout.decision


def candidates_in(bodies):
    """-> [(conversation, candidate)] of requests to the grader."""
    pairs = [body["messages"][1]["content"].partition("\n\nCandidate: ") for body in bodies]
    return [(shared, json.loads(candidate)) for shared, _, candidate in pairs]


def test_training_asks_the_grader(train, canned, prepared, serve, world_of):
    """What is asked, once each; what is not asked; what comes back; what is logged."""
    server = serve(record=True)
    path = world_of(server.url, train__eval_every=4, data__lexicon="")
    lines = train(train_grpo, path)
    asked = candidates_in(server.bodies)
    wanted = set()
    for turn, texts, _ in canned:
        shared = json.dumps({"conversation": spoken(turn.context), "known": [], "targets": turn.target})
        if turn.decision == "continue":
            wanted |= {(shared, text) for text in texts if "<stop />" not in text}
    assert set(asked) == wanted and server.requests == len(asked) <= 20  # some of its turns are alike
    assert {text for _, text in asked} == set(SCORES)
    before = server.requests
    train(train_grpo, path)  # once more, with nothing left to do: every reply from the cache
    assert server.requests == before
    for r in rollouts(canned):  # the grades are the server's
        assert r.r_a == (0.0 if not right(r) else 1.0 if r.truth == "stop" else SCORES[r.response]), r
    assert sum(r.truth == r.decision == "continue" for r in rollouts(canned)) > 2 * len(asked)
    graded = {(r.turn_id, r.sample, r.response): r for r in rollouts(canned)}
    trained = [r for group in prepared for r in group.graded]  # what a step trains on are these grades
    assert len(trained) == 64 and all(r == graded[r.turn_id, r.sample, r.response] for r in trained)
    steps = lines[1:]
    for m in steps:
        assert m["grade_asks"] == m["grade_answered"] == m["grade_calls"] + m["grade_cached"] > 0
        failures = [m[name] for name in ("grade_failed", "grade_invalid", "grade_repairs", "failed")]
        assert not any(failures) and m["grade_tokens_in"] > 0
        assert m["grade_calls"] == 0 or 0 < m["grade_p50_s"] <= m["grade_p95_s"]
    assert sum(m["grade_asks"] for m in steps) >= sum(m["grade_calls"] for m in steps) > 0
    assert "wc" in lines[0]["eval"] and lines[0]["eval"]["failed"] == 0


def test_grading_starts_while_sampling_goes_on(monkeypatch, train, serve, world_of):
    """The question about a response goes out as it ends, the first long before the last response is there."""
    ended, at, sampled = [0], [], []
    generate, submit = grading.generate, llm.Endpoint.submit

    def watched(model, prompts, ends, sampling, keys, on_response):
        def noted(i, response):
            ended[0] += 1
            on_response(i, response)

        result = generate(model, prompts, ends, sampling, keys, noted)
        sampled.append(time.perf_counter())
        return result

    monkeypatch.setattr(grading, "generate", watched)
    monkeypatch.setattr(llm.Endpoint, "submit", lambda self, *a: at.append(ended[0]) or submit(self, *a))
    server = serve(record=True)
    how = dict(rollout__max_rows=4, rollout__max_new_tokens=40, train__steps=2)
    train(train_grpo, world_of(server.url, **how))
    assert sum(t < sampled[0] for t in server.times) >= 4, "no request arrived before sampling ended"
    assert at[0] <= 8 and ended[0] == 32  # 8 groups of 4
    assert at == sorted(at) and len(set(at)) == len(at) > 10  # one at a time, as responses end


@pytest.mark.parametrize("omega", ["rule", "llm"])
def test_a_failed_grading_is_left_out(train, canned, prepared, omega, serve, world_of):
    """None, never 0: in the records, in what is trained on, in the figures."""
    def fault(key, attempt, body):  # by the candidate: one is never answered, one never usable
        text = body["messages"][1]["content"]
        return "500" if text.endswith('"How long?"') else "types" if text.endswith('"What color?"') else None

    server = serve()
    server.fault = fault
    how = dict(reward__max_failed=1.0, reward__omega=omega, llm__grader__retries=0)
    lines = train(train_grpo, world_of(server.url, **how))
    records = rollouts(canned)
    failed = [r for r in records if r.reward is None]
    assert 0 < len(failed) < len(records) and {r.response for r in failed} == {"How long?", "What color?"}
    for r in failed:
        assert r.truth == r.decision == "continue" and r.r_a is None and r.r_s == 1.0
        assert (r.omega is None) == (omega == "llm")
    assert [r for group in prepared for r in group.graded] == records
    assert sum(m["failed"] for m in lines) == len(failed)
    assert sum(m["grade_failed"] for m in lines) > 0 and sum(m["grade_invalid"] for m in lines) > 0
    first = [r.r_a for r in records[:16] if r.truth == r.decision == "continue" and r.r_a is not None]
    assert lines[0]["wa"] == pytest.approx(sum(first) / len(first))  # the first step has four groups
    for m in lines:
        ends = [m[f"grade_{end}"] for end in ("answered", "invalid", "failed")]
        assert m["grade_asks"] == pytest.approx(sum(ends)) and (m["reward"] is None or 0 <= m["reward"] <= 4)


def test_omega_from_the_grader(train, canned, serve, world_of):
    """reward.omega=llm: Omega is the server's count of questions, also where the rule counts otherwise."""
    texts = ['{"score": 0.5, "questions": 2}'] * 999
    server = serve(script=["text"] * 999, texts=texts)
    train(train_grpo, world_of(server.url, reward__omega="llm"))
    got = {(right(r), r.response): (r.r_a, r.omega) for r in rollouts(canned)}
    assert got[True, "How long?"] == got[True, "How long how long?"] == (0.5, 0.5)
    assert got[True, "<stop />"] == (1.0, 1.0) and got[True, "Bye <stop />"] == (1.0, 0.0)
    assert got[False, "How long?"] == (0.0, 0.0)


# --------------------------------------------------------------------------------------------- a second judge

def audit_of(url, share=0.5, **more):
    """Keys of a run that has a share of its gradings audited by the model "other" at the url."""
    auditor = dict(model="other", base_url=url, retries=0, timeout_s=5.0)
    return {"reward__grader": "rules", "reward__audit": share,
            **{f"llm__auditor__{key}": value for key, value in auditor.items()}, **more}


def unaudited(lines):
    return [{k: v for k, v in line.items() if not k.startswith("audit_")} for line in timeless(lines)]


def test_an_audit_is_logged_and_rewards_nothing(train, canned, serve, world_of):
    """Each step's own responses are counted, though a phase holds two steps. What is drawn hangs on turn and
    response alone; a failure is counted."""
    server = serve(record=True, noise=0.5, models=["other"])  # a server of another opinion than the rules
    plain = train(train_grpo, world_of("", "plain", reward__grader="rules"))
    assert not any("audit" in r.model_fields_set for r in rollouts(canned))
    canned.clear()
    lines = train(train_grpo, world_of("", "audited", **audit_of(server.url)))
    assert unaudited(lines) == unaudited(plain) and all("audit_n" not in m for m in plain)
    tried = []
    for r in rollouts(canned):
        drawn = Random(f"{r.turn_id} {r.response}").random() < 0.5
        assert ("audit" in r.model_fields_set) == (drawn and r.truth == r.decision == "continue")
        tried.append((r.r_a, r.audit) if "audit" in r.model_fields_set else None)
    for i, m in enumerate(lines):
        want = agreement([pair for pair in tried[16 * i:16 * (i + 1)] if pair])
        assert {k: m[k] for k in want} == pytest.approx(want) and m["audit_n"] > 1 and m["audit_failed"] == 0
    assert any(m["audit_error"] for m in lines)
    assert len(server.bodies) == len(set(map(json.dumps, candidates_in(server.bodies))))  # once each
    for fault in "401", "types":  # it is down, or of no use
        url = serve(models=["other"], script=[fault] * 999).url
        bad = train(train_grpo, world_of("", fault, **audit_of(url, 1.0)))
        assert unaudited(bad) == unaudited(plain)
        for m in bad:
            assert m["audit_failed"] > m["audit_n"] == 0 and m["audit_kappa"] is m["audit_error"] is None


def test_an_audit_of_a_language_model(train, canned, refused, serve, world_of):
    """Both ask the same server here: they agree. The evaluations are audited too; reasons and second scores
    are in the files."""
    url = serve(models=["toy", "other"]).url
    how = dict(reward__grader="llm", llm__grader__prompt=WITH_REASON, train__eval_every=4)
    path = world_of(url, **audit_of(url, 1.0, **how))
    lines = train(train_grpo, path)
    assert len(lines) == 5
    for m in [lines[0]["eval"], *lines[1:]]:
        assert m["audit_n"] > 0 == m["audit_failed"] and m["audit_kappa"] in (None, 1)
        assert not m["audit_error"]
    assert any(m["audit_kappa"] == 1 for m in lines[1:])
    shown = read_lines(path.parent / "run" / "groups_after.jsonl")
    asked = [r for group in shown for r in group["graded"] if r["truth"] == r["decision"] == "continue"]
    assert asked and all(r["audit"] == r["r_a"] for r in asked)
    assert all(r["rationale"] == f"By the rules: {r['r_a']:g}." for r in asked)
    assert "By the rules: 1." in (path.parent / "run" / "report.html").read_text()
    assert refused(train_grpo, path, "llm.auditor.model=").startswith("error: llm.auditor.model is not set")


def break_in_phase(monkeypatch, server, number, how):
    """From rollout phase `number` (counted from 1) on the server behaves as `how` says."""
    phases, sample = [], grading.sample_graded

    def sampled(*args, **kw):
        phases.append(0)
        if len(phases) == number:
            vars(server).update(how)
        return sample(*args, **kw)

    monkeypatch.setattr(grading, "sample_graded", sampled)


DOWN = dict(faults=1.0, kinds=("500",))


@pytest.mark.slow
@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("case", [
    (DOWN, 40, ["gradings failed after step 4", "reward.max_failed=0.2", "(toy)"]),
    (DOWN, 2, ["llm.grader", "500"]), (dict(script=["401"] * 99), 40, ["llm.grader", "401"])])
def test_too_many_failed_gradings_stop_training(monkeypatch, train, refused, case, serve, world_of):
    """One line, at a checkpoint; the same command goes on when the server is well, to what would have come
    out anyway."""
    how, give_up, words = case
    monkeypatch.setattr(llm, "GIVE_UP", give_up)
    more = dict(train__steps=8, train__checkpoint_every=50, llm__grader__retries=0)
    server = serve()
    straight, path = (world_of(server.url, x, **more) for x in "ab")
    train(train_grpo, straight)
    with monkeypatch.context() as patch:
        break_in_phase(patch, server, 3, how)
        told = refused(train_grpo, path)
    assert all(word in told for word in words), told
    run = path.parent / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000004"]
    assert not (run / "export").exists() and len(metrics(path)) == 4
    server.faults, server.script = 0.0, []
    lines = [{k: v for k, v in m.items() if not k.startswith("grade_")}
             for x in (train(train_grpo, path), metrics(straight)) for m in timeless(x)]
    assert lines[:8] == lines[8:] and [m["step"] for m in lines[:8]] == list(range(1, 9))


def test_a_few_failed_gradings_do_not_stop_training():
    """The share counts the gradings that were to be made, wrong decisions and stops aside."""
    def made(reward, truth="continue", response="x?"):
        return Rollout.model_construct(reward=reward, truth=truth, response=response)

    def check(*groups, most=0.5):
        cfg = make_config(reward__grader="llm", reward__max_failed=most)
        source = SimpleNamespace(tally=SimpleNamespace(why="cut"))
        source.settings = cfg.llm.grader
        check_failed([Group(None, [], list(graded)) for graded in groups], Judge(None, source, cfg.reward),
                     "after step 0", "go on")

    failed, good = made(None), made(2.0)
    stops = made(0.0, response="<stop />"), made(4.0, "stop", "<stop />"), made(0.0, "stop")
    check([failed, good, *stops * 9], [])
    with pytest.raises(InputError, match="2 of 3 gradings failed after step 0"):
        check([failed, good], [failed, *stops * 9])
    check(stops)
    check([good], most=0.0)


def test_an_outage_during_an_evaluation_keeps_the_step(monkeypatch):
    """The step is logged and saved, then the error goes on."""
    done = []
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], zero_grad=lambda **_: None)
    log = SimpleNamespace(write=lambda record: done.append(record["step"]))
    run = SimpleNamespace(cfg=make_config(train__eval_every=1), step=3, synced=3, bad=0, total=9, size=10,
                          began=0.0, held_out=[0], optimizer=optimizer, log=log)

    def down(run):
        raise llm.Unanswered("down")

    monkeypatch.setattr(running, "save", lambda run: done.append("saved"))
    monkeypatch.setattr(running, "evaluate", down)
    with pytest.raises(llm.Unanswered):
        running.end_step(run, {"finite": True, "loss": 1.0})
    assert done == [4, "saved"]


@pytest.mark.slow
def test_a_local_grader(marks_checkpoint, train, world_of):
    local = dict(llm__grader__source="local", llm__grader__model=str(marks_checkpoint),
                 llm__grader__max_tokens=4)
    path = world_of("", reward__max_failed=1.0,
                        train__steps=2, data__lexicon="", **local)
    for m in train(train_grpo, path):
        assert m["grade_invalid"] == m["grade_asks"] > 0 and m["failed"] > 0
        assert m["wa"] is None and m["grade_s"] > 0


def train_on_a_rank(*runs):
    """Several trainings in turn, in one process group -> "trained" or the error of each."""
    import parallel
    parallel.stop = lambda: None
    os.chdir(REPO)
    ends = []
    for argv in runs:
        sys.argv = ["train_grpo.py", *argv]
        try:
            train_grpo.main()
            ends.append("trained")
        except InputError as error:
            ends.append(str(error))
    return ends


@pytest.mark.slow
def test_two_ranks(marks_checkpoint, train, run_ranks, serve, world_of):
    """Both ranks grade their own share: what one rank alone does. A grader that is down for one rank ends
    both with one message."""
    server = serve(record=True)
    audit = audit_of(serve(noise=0.5, models=["other"]).url, reward__grader="llm")
    one, two, down, local = (world_of(server.url, x, **audit)
                             for x in ("one", "two", "down", "local"))
    lines = train(train_grpo, one)
    asked, server.bodies = candidates_in(server.bodies), []
    how = ["llm.grader.source=local", f"llm.grader.model={marks_checkpoint}", "reward.max_failed=1",
           "llm.grader.max_tokens=4", "train.steps=2"]
    once = ["403"]
    server.fault = lambda key, n, body: once.pop() if body["max_tokens"] == 511 and once else None
    first, second = run_ranks(train_on_a_rank, 2, [str(two)], [str(local), *how],
                              [str(down), "llm.grader.max_tokens=511"])
    assert first == second and first[:2] == ["trained"] * 2 and "403" in first[2]
    # the same rollouts, so the same questions
    assert set(candidates_in(server.bodies[:len(asked)])) == set(asked)
    for a, b in zip(lines, metrics(two), strict=True):
        names = ("reward", "wa", "wc", "failed", "grade_asks", "audit_n", "audit_kappa", "audit_error")
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names])
        assert b["grade_asks"] == b["grade_answered"] > 0
    for m in metrics(local):
        assert m["grade_invalid"] == m["grade_asks"] == m["grade_repairs"] > 0 and m["failed"] > 0
