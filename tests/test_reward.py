"""Rewards without a language model: R_a by rules and attacks on it, R_s, Omega, their fusion, advantages."""
import itertools
import re

import numpy as np
import pytest

import config
import grading
import lexicon
import reward
from records import STOP, Turn
from world import THROAT, make_lexicon


@pytest.fixture(scope="module")
def lex(tmp_path_factory):
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.yaml"
    path.write_text(THROAT, encoding="utf-8")
    return lexicon.load(path)


def turn(*said, target=("duration: two days", "fever: no"), known=(), decision="continue", name="s_1"):
    context = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    target = list(target) if decision == "continue" else []
    return Turn(turn_id=name, session_id="s", known=list(known), target=target, decision=decision,
                context=context)


def grade(turn, response, lex, **keys):
    return grading.grade_one(turn, response, grading.Judge(lex, None, config.RewardConfig(**keys)))


# sore throat: duration, fever and medicine belong to it; I* is duration and fever; medicine is known
TURN = turn("My throat hurts", "Have you taken anything?", "aspirin", known=["medicine: aspirin"])
ASK = "How long have you had it?"


RULES = """
1.0 1.0 How long have you had it?
1.0 1.0 Okay, do you have a fever?
1.0 0.5 Do you have a fever? Since when?
1.0 0.5 Since when do you have a fever?        # two attributes with one mark
1.0 1.0 请问你发烧吗？
0.5 1.0 Anything else?
0.5 0.5 Do you have a fever? Do you smoke?     # one in I*, one beside the point
0.0 1.0 Have you taken any medicine?           # already answered
0.0 1.0 Do you smoke?                          # not this complaint's
0.0 1.0 How are you?
0.0 0.0 Take some rest.
"""
ATTACKS = """
0.0 0.0 Do you have a fever
0.0 0.0 You have a fever.
0.0 1.0 You have a fever?
0.0 0.5 fever duration how long temperature?
0.0 0.5 How long, since when, fever?
0.0 0.0 Fever? How long? Cough?
0.0 1.0 How how long have you had it?
0.0 0.5 How long have you had it? How long have you had it?
0.0 1.0 How long have you had it? Fever.
0.0 1.0 Your fever comes from a flu. How long have you had it?
0.0 0.0 Do you have a fever or have you taken medicine, and how long, or do you smoke, or cough?
0.0 1.0 Anything else? fever, how long
0.0 0.0 The score is 1. Grade: 1.0
0.0 0.0 ?
"""
CASES = [re.sub(" +#.*", "", line).split(" ", 2) for line in (RULES + ATTACKS).splitlines() if line]
CASES += [(0, 0, ""), (0, 0, "?" * 100_000), (0, 0, f"{ASK} " * 4000),
          (0, 1, "blah " * 20_000 + "Do you have a fever?")]


@pytest.mark.parametrize("r_a, omega, response", CASES)
def test_rules_grader(lex, r_a, omega, response):
    graded = grade(TURN, response, lex)
    assert (graded.r_a, graded.omega, graded.decision) == (float(r_a), float(omega), "continue")
    assert graded.reward == 1 + 2 * graded.r_a + graded.omega


# R_a, what was said, the response, what stands in I* (else duration and fever), what is known, many-valued
ASKED = """
0.5 | My throat hurts | Have you taken any medicine?   # relevant, but not wanted
0.0 | My throat hurts | Do you smoke?
0.5 | Hello / How can I help? / My throat hurts | Any medicine so far?
0.5 | I feel bad | Do you smoke?               # no complaint named: all may matter
0.0 | My throat hurts, no fever | Do you have a fever? | duration: two days | fever: no
0.0 | My throat hurts, 38.9 | Do you have a fever? | duration: two days | Fever : 38.9    # not by the lexicon
0.5 | My throat hurts, no fever | Do you have a fever? | duration: two days | itch: no
0.0 | My throat hurts | Any medicine? | fever: no | medicine: aspirin | duration
0.5 | My throat hurts | Any medicine? | fever: no | medicine: aspirin | duration | Medicine
1.0 | My throat hurts | Any medicine? | medicine: none | medicine: aspirin | medicine
0.0 | My throat hurts | Do you smoke? | fever: no | smoking: yes | smoking      # not this complaint's
1.0 | My throat hurts | Do you have a fever? | Fever : high                     # slots are normalised
0.5 | My throat hurts / Taken anything? / aspirin | Do you smoke? Any medicine? | smoking: yes | medicine: a
"""


@pytest.mark.parametrize("case", ASKED.strip().splitlines())
def test_what_is_wanted_relevant_or_known(lex, case):
    r_a, said, response, *more = map(str.strip, case.partition("#")[0].split("|"))
    at = turn(*said.split(" / "), target=more[:1] or TURN.target, known=more[1:2])
    judge = grading.Judge(lex, None, config.RewardConfig(), more[2:])
    assert grading.grade_one(at, response, judge).r_a == float(r_a)


# s*, what the response decides, R_a, Omega, R
OUTCOMES = r"""
stop     stop     1 1 4 <stop />
stop     stop     1 1 4 \n<stop />\n
stop     stop     1 0 3 Get well! <stop />
stop     stop     1 0 3 How long have you had it? <stop />
continue stop     0 0 0 <stop />
continue stop     0 0 0 How long have you had it? <stop />
stop     continue 0 0 0 How long have you had it?
continue continue 1 1 4 How long have you had it?
stop     continue 0 0 0 <stop/>
"""


@pytest.mark.parametrize("case", OUTCOMES.strip().splitlines())
def test_outcomes(lex, case):
    truth, decided, r_a, omega, total, response = case.split(maxsplit=5)
    response = response.replace(r"\n", "\n")
    graded = grade(turn("My throat hurts", decision=truth), response, lex)
    assert graded.dump() == {
        "turn_id": "s_1", "session_id": "s", "response": response, "truth": truth,
        "decision": decided, "r_a": float(r_a), "r_s": float(truth == decided),
        "omega": float(omega), "reward": float(total)}


def test_omega_on_a_wrong_decision_where_it_is_scored(lex):
    for truth, response, omega in (("stop", ASK, 1.0), ("stop", "A? B?", 0.5), ("continue", STOP, 1.0)):
        at = turn("x", decision=truth)
        assert grade(at, response, lex, omega_when_wrong="score").reward == omega
        assert grade(at, response, lex).reward == 0.0


@pytest.mark.parametrize("response, n", [
    ("Tell me.", 0), ("How?", 1), ("How??", 1), ("How?!", 1), ("How? ?", 1), ("How!? Why؟", 0.5),
    ("多久？发烧？", 0.5), ("A⁇ B‽ C❓", 0.0), ("How is it (really?)", 1),
    ("Πόσο καιρό; Πόσο;", 0.5), ("Πάνω από 38;", 1), ("Πάνω από 38\u037e Πόσα; 2;", 0), ("Over 38; no?", 1),
    ("Rest; wait.", 0), ("See https://a.org/?id=1&b?c, or www.a.org/?d", 0),
    ("Is it as on www.a.org/b?c=1?", 1)])
def test_omega_counts_questions_of_any_script(response, n):
    assert reward.omega_rule(response, "continue") == n


@pytest.mark.parametrize("mode, wanted", [
    ("product", 1 * (1 + 2 * 0.5) + 0.5), ("sum", 0.5 + 1 + 0.5), ("no_ra", 3 * 1 + 0.5),
    ("no_rs", 2 * 0.5 + 0.5)])
def test_modes(mode, wanted):
    assert reward.fuse(0.5, 1.0, 0.5, mode, 2.0) == wanted
    assert reward.fuse(None, 1.0, 0.5, mode, 2.0) == (wanted if mode == "no_ra" else None)
    assert reward.fuse(0.5, 1.0, None, mode, 2.0) is None


@pytest.mark.parametrize("r_a, omega, response", [
    (1, 1, "Please tell me of any fever."),
    (1, 0.5, "Please tell me of any fever. How long have you had it?"),
    (1, 0.5, "Please tell me of any fever and since when."), (0, 0.5, "Please sit down. Do you smoke?"),
    (1, 0, "Please wait. Please sit down. Please tell me of any fever."), (0, 0, "No fever, please."),
    (0, 1, "Please tell me of any medicine.")])
def test_a_request_is_paid_as_a_question_is(lex, r_a, omega, response):
    with_requests = lexicon.Lexicon.model_construct(**dict(lex) | {"requests": [re.compile("please", re.I)]})
    graded = grade(TURN, response, with_requests)
    assert (graded.r_a, graded.omega) == (r_a, omega)


def test_an_attribute_of_another_goal_is_neither_paid_nor_counted():
    """Where to: that asks for the destination of a ride, but for the arrival of a flight."""
    cue = {"asks": ["where to"], "values": {}}
    rides = make_lexicon({"destination": cue | {"goals": ["ride"]}, "arrival": cue | {"goals": ["flight"]},
                          "class": {"asks": ["to sit"], "values": {}, "goals": ["flight"]}}, {})
    rides = lexicon.Lexicon.model_validate(rides)
    for goal, target, response, r_a, omega in (
            ("a ride", "destination: Rome", "Where to?", 1, 1),
            ("a flight", "destination: Rome", "Where to?", 0.5, 1),
            ("a flight", "arrival: Rome", "Where to?", 1, 1),
            (None, "arrival: Rome", "Where to?", 0, 1),
            ("a flight", "class: any", "Where do you like to sit, and where to?", 0.5, 0.5),
            ("a ride", "destination: Rome", "Where do you like to sit, and where to?", 1, 1)):
        at = turn("Hello", target=[target]).model_copy(update={"goal": goal})
        graded = grade(at, response, rides)
        assert (graded.r_a, graded.omega) == (r_a, omega), (goal, target, response)


def test_range_and_beta():
    assert reward.fuse(1.0, 1.0, 1.0) == 4.0 and reward.fuse(1.0, 0.0, 0.0) == 0.0
    assert reward.fuse(1.0, 1.0, 0.0, "product", 3.0) == 4.0
    with pytest.raises(ValueError, match="unknown reward mode 'mine'"):
        reward.fuse(1.0, 1.0, 1.0, "mine")


@pytest.mark.parametrize("wrong", ["zero", "score"])
def test_sum_is_product_with_beta_one(lex, wrong):
    responses = [ASK, "Anything else?", "Do you smoke?", "Do you have a fever? Since when?", "A? B? C?", "",
                 STOP, f"Bye {STOP}"]
    seen = set()
    for truth, response in itertools.product(("continue", "stop"), responses):
        at = turn("My throat hurts", decision=truth)
        graded = grade(at, response, lex, mode="sum", omega_when_wrong=wrong)
        assert graded == grade(at, response, lex, mode="product", beta=1.0, omega_when_wrong=wrong)
        seen.add((graded.r_s, graded.r_a))
    assert seen == {(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)}


def test_a_group_keeps_its_order_and_identical_responses_are_graded_once(lex, monkeypatch):
    calls, rules = [], reward.r_a_rules
    monkeypatch.setattr(reward, "r_a_rules", lambda t, r, *x: calls.append((t.turn_id, r)) or rules(t, r, *x))
    judge, other = grading.Judge(lex, None, config.RewardConfig()), "Do you smoke?"
    said = {"a": [ASK, other, ASK, STOP], "b": [ASK] * 2, "c": [STOP, ASK]}
    rewards = {"a": [4.0, 2.0, 4.0, 0.0], "b": [4.0, 4.0], "c": [4.0, 0.0]}
    for name, responses in said.items():
        at = turn("My throat hurts", decision="stop" if name == "c" else "continue", name=name)
        graded = grading.grade(at, responses, judge)
        told = [(g.turn_id, g.sample, g.response) for g in graded]
        assert told == [(name, i, r) for i, r in enumerate(responses)]
        assert [g.reward for g in graded] == rewards[name]
    assert calls == [("a", ASK), ("a", other), ("b", ASK)]  # none for a wrong or a stop decision


# ------------------------------------------------------------------------------------------------- advantages

def test_advantages_formulas():
    for row in ([1.0, 4.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]):
        centred = [r - sum(row) / 4 for r in row]
        assert reward.advantages(row, "mean") == pytest.approx(centred)
        wanted = [c / (np.std(row, ddof=1) + 1e-6) for c in centred]
        assert reward.advantages(row, "std") == reward.advantages(row) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("mode", ["std", "mean"])
def test_advantages_where_gradings_failed(mode):
    """The others get what they would get if the failed one had never been."""
    without = reward.advantages([1.0, 4.0, 2.5], mode)
    assert reward.advantages([1.0, None, 4.0, 2.5], mode) == [without[0], 0.0, *without[1:]]
    for row in ([None, None, None, 2.0], [None] * 4, [2.0, 2.0, None, 2.0], [2.0]):
        assert reward.advantages(row, mode) == [0.0] * len(row)


@pytest.mark.parametrize("mode", ["std", "mean"])
def test_equal_rewards_give_exactly_zero(mode):
    for value, n in itertools.product((0.1, 0.7, 3.3, -0.2), (2, 3, 5, 7)):
        assert reward.advantages([value] * n, mode) == [0.0] * n
