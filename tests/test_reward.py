"""R_a, R_s, Omega and their fusion; attacks on the rules grader."""
import doctest
import itertools

import pytest

import config
import lexicon
import reward
from test_lexicon import LEXICON

STOP = "<stop />"


@pytest.fixture(scope="module")
def lex(tmp_path_factory):
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.yaml"
    path.write_text(LEXICON, encoding="utf-8")
    return lexicon.load(path)


def cfg(**keys):
    return config.build({"run_dir": "x", **{f"reward.{k}": v for k, v in keys.items()}})


def turn(*said, target=("duration: two days", "fever: no"), decision="continue"):
    roles = ("user", "assistant") * len(said)
    return {"turn_id": "s_1", "session_id": "s", "target": list(target) if decision == "continue" else [],
            "decision": decision, "context": [{"role": r, "content": c} for r, c in zip(roles, said)]}


# sore throat: duration, fever and medicine belong to it; I* is duration and fever; medicine is known
TURN = turn("My throat hurts", "Have you taken anything?", "aspirin")


def test_docstring_examples():
    assert doctest.testmod(reward) == (0, 3)


@pytest.mark.parametrize("response, r_a, omega", [
    ("How long have you had it?", 1.0, 1.0),
    ("Okay, do you have a fever?", 1.0, 1.0),
    ("Do you have a fever? Since when?", 1.0, 0.5),
    ("Since when do you have a fever?", 1.0, 0.5),               # one mark, two attributes
    ("请问你发烧吗？", 1.0, 1.0),
    ("Anything else?", 0.5, 1.0),
    ("Do you have a fever? Do you smoke?", 0.5, 0.5),            # one in I*, one beside the point
    ("Have you taken any medicine?", 0.0, 1.0),                  # already answered
    ("Do you smoke?", 0.0, 1.0),                                 # not this complaint's
    ("How are you?", 0.0, 1.0),
    ("Take some rest.", 0.0, 0.0),
    # attacks
    ("Do you have a fever", 0.0, 0.0),
    ("You have a fever.", 0.0, 0.0),
    ("You have a fever?", 0.0, 1.0),
    ("fever duration how long temperature?", 0.0, 0.5),
    ("How long, since when, fever?", 0.0, 0.5),
    ("Fever? How long? Cough?", 0.0, 0.0),
    ("How how long have you had it?", 0.0, 1.0),
    ("How long have you had it? How long have you had it?", 0.0, 0.5),
    ("How long have you had it? Fever.", 0.0, 1.0),
    ("Your fever comes from a flu. How long have you had it?", 0.0, 1.0),
    ("Do you have a fever or have you taken medicine, and how long, or do you smoke, or cough?", 0.0, 0.0),
    ("Anything else? fever, how long", 0.0, 1.0),
    ("The score is 1. Grade: 1.0", 0.0, 0.0),
    ("", 0.0, 0.0), ("?", 0.0, 0.0), ("?" * 100_000, 0.0, 0.0),
    ("How long have you had it? " * 4000, 0.0, 0.0),
    ("blah " * 20_000 + "Do you have a fever?", 0.0, 1.0),
])
def test_rules_grader(lex, response, r_a, omega):
    record = reward.grade_one(TURN, response, cfg(), lex)
    assert (record["r_a"], record["omega"], record["decision"]) == (r_a, omega, "continue")
    assert record["reward"] == 1 + 2 * r_a + omega


def test_relevant_but_not_wanted_is_half(lex):
    assert reward.grade_rules(turn("My throat hurts"), "Have you taken any medicine?", lex) == 0.5
    assert reward.grade_rules(turn("My throat hurts"), "Do you smoke?", lex) == 0.0
    assert reward.grade_rules(turn("Hello", "How can I help?", "My throat hurts"), "Any medicine so far?", lex) == 0.5
    assert reward.grade_rules(turn("I feel bad"), "Do you smoke?", lex) == 0.5  # no complaint named: all may matter
    answered = turn("My throat hurts, no fever", target=["duration: two days"])
    assert reward.grade_rules(answered, "Do you have a fever?", lex) == 0.0
    bare = turn("My throat hurts", "Do you have a fever?", "no", target=["duration: two days"])
    assert reward.grade_rules(bare, "Do you have a fever?", lex) == 0.0


def test_slots_of_the_target_are_compared_normalised(lex):
    assert reward.grade_rules(turn("My throat hurts", target=["Fever : high"]), "Do you have a fever?", lex) == 1.0


@pytest.mark.parametrize("response, truth, decided, r_a, omega, total", [
    (STOP, "stop", "stop", 1.0, 1.0, 4.0),
    (f"\n{STOP} ", "stop", "stop", 1.0, 1.0, 4.0),
    (f"Get well! {STOP}", "stop", "stop", 1.0, 0.0, 3.0),
    (STOP, "continue", "stop", 0.0, 0.0, 0.0),
    (f"How long have you had it? {STOP}", "continue", "stop", 0.0, 0.0, 0.0),
    (f"How long have you had it? {STOP}", "stop", "stop", 1.0, 0.0, 3.0),
    ("How long have you had it?", "stop", "continue", 0.0, 0.0, 0.0),
    ("How long have you had it?", "continue", "continue", 1.0, 1.0, 4.0),
    ("<stop/>", "stop", "continue", 0.0, 0.0, 0.0),
])
def test_outcomes(lex, response, truth, decided, r_a, omega, total):
    record = reward.grade_one(turn("My throat hurts", decision=truth), response, cfg(), lex)
    assert record == {"turn_id": "s_1", "sample": 0, "response": response, "truth": truth, "decision": decided,
                      "r_a": r_a, "r_s": float(truth == decided), "omega": omega, "reward": total}


def test_omega_on_a_wrong_decision_where_it_is_scored(lex):
    score = cfg(omega_when_wrong="score")
    for truth, response, omega in (("stop", "How long?", 1.0), ("stop", "A? B?", 0.5), ("continue", STOP, 1.0)):
        assert reward.grade_one(turn("x", decision=truth), response, score, lex)["reward"] == omega
        assert reward.grade_one(turn("x", decision=truth), response, cfg(), lex)["reward"] == 0.0


@pytest.mark.parametrize("response, n", [
    ("Tell me.", 0), ("How?", 1), ("How??", 1), ("How?!", 1), ("How? ?", 1), ("How!? Why؟", 0.5), ("多久？发烧？", 0.5),
    ("A⁇ B‽ C❓", 0.0), ("How is it (really?)", 1)])
def test_omega_counts_questions_of_any_script(response, n):
    assert reward.omega_rule(response, "continue") == n


@pytest.mark.parametrize("mode, wanted", [
    ("product", 1 * (1 + 2 * 0.5) + 0.5), ("sum", 0.5 + 1 + 0.5), ("no_ra", 3 * 1 + 0.5), ("no_rs", 2 * 0.5 + 0.5)])
def test_modes(mode, wanted):
    assert reward.fuse(0.5, 1.0, 0.5, mode, 2.0) == wanted
    assert reward.fuse(None, 1.0, 0.5, mode, 2.0) is None and reward.fuse(0.5, 1.0, None, mode, 2.0) is None


def test_range_and_beta():
    assert reward.fuse(1.0, 1.0, 1.0) == 4.0 and reward.fuse(1.0, 0.0, 0.0) == 0.0
    assert reward.fuse(1.0, 1.0, 0.0, "product", 3.0) == 4.0


@pytest.mark.parametrize("wrong", ["zero", "score"])
def test_sum_is_product_with_beta_one(lex, wrong):
    responses = ["How long have you had it?", "Anything else?", "Do you smoke?", "Do you have a fever? Since when?",
                 "A? B? C?", "", STOP, f"Bye {STOP}"]
    seen = set()
    for truth, response in itertools.product(("continue", "stop"), responses):
        both = [reward.grade_one(turn("My throat hurts", decision=truth), response, c, lex) for c in
                (cfg(mode="sum", omega_when_wrong=wrong), cfg(mode="product", beta=1.0, omega_when_wrong=wrong))]
        assert both[0] == both[1]
        seen.add((both[0]["r_s"], both[0]["r_a"]))
    assert seen == {(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)}


def test_a_batch_keeps_its_order_and_grades_identical_candidates_once(lex, monkeypatch):
    calls, grader = [], reward.grade_rules
    monkeypatch.setattr(reward, "grade_rules", lambda t, r, x: calls.append((t["turn_id"], r)) or grader(t, r, x))
    turns = [{**TURN, "turn_id": "a_1"}, {**TURN, "turn_id": "b_1"}, {**turn("x", decision="stop"), "turn_id": "c_1"}]
    ask, other = "How long have you had it?", "Do you smoke?"
    records = reward.grade(turns, [[ask, other, ask, STOP], [ask] * 2, [STOP, ask]], cfg(), lex)
    assert [(r["turn_id"], r["sample"], r["response"], r["reward"]) for r in records] == [
        ("a_1", 0, ask, 4.0), ("a_1", 1, other, 2.0), ("a_1", 2, ask, 4.0), ("a_1", 3, STOP, 0.0),
        ("b_1", 0, ask, 4.0), ("b_1", 1, ask, 4.0), ("c_1", 0, STOP, 4.0), ("c_1", 1, ask, 0.0)]
    assert calls == [("a_1", ask), ("a_1", other), ("b_1", ask)]  # none for a wrong or a stop decision
