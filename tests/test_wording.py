"""wording.py: which questions are garbled, and what the rules grader pays for them."""
import math
import random

import pytest
import yaml

import config
import grading
import lexicon
import wording
from records import Turn
from toy import world as toy
from world import LEXICON, coughs, make_world, write_lines


def test_a_score_by_hand():
    """a b, said twice: 0.4 for each word less of context, then a word's share; an unknown one's 1 / words."""
    score = wording.trigrams([("a", "b")] * 2)
    assert score(("a", "b")) == (0, 0)
    assert score(("b",)) == pytest.approx((math.log(0.16 / 3), math.log(0.4)))
    assert score(("z",))[0] == pytest.approx(math.log(0.16 / 2))


def test_shuffled_and_broken_off_questions_are_told_from_the_experts_own():
    rng = random.Random(0)
    own, held_out = ([f"{text}?" for i in range(n) for m in toy.session(0, split, i)["messages"]
                      for text, asks in lexicon.sentences(m["content"]) if asks and m["role"] == "assistant"]
                     for split, n in (("train", 400), ("test", 200)))
    assert wording.learn(own[:699]) is None and wording.learn(own[:700])
    garbled, spoilt = wording.learn(own), []
    for words in (text[:-1].split() for text in held_out):
        if len(words) > 3:
            spoilt += rng.sample(words, len(words)), words[:rng.randint(1, len(words) - 1)]
    assert sum(map(garbled, held_out)) <= 0.025 * len(held_out)
    assert sum(garbled(" ".join(words) + "?") for words in spoilt) >= 0.95 * len(spoilt) > 500


@pytest.mark.parametrize("r_a, text", [
    (1, "How long have you had the 丁?"), (1, "Well, how long have you had the 丁?"),
    (1, "How long have you had the cough?"),  # a word of the user's
    (0, "How long have you had the fever?"),  # of nobody's
    (0, "How long have you had the 丁? How long have you?"),
    (0, "How long have you hadixople?"), (0, "How long have you?"), (0, "You the how long have had 丁?")])
def test_a_garbled_question_earns_nothing_by_the_rules(tmp_path, r_a, text):
    path = make_world(tmp_path, tmp_path)
    rows = [row | {"expert": f"How long have you had the {chr(ord('一') + i)}?"}  # each word once: 一, 丁
            for i, row in enumerate(coughs(700))]
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", rows)
    for on in (True, False):
        judge = grading.open_judge(config.load([str(path), f"reward.wording={on}"]))
        assert grading.grade_one(Turn(**rows[1]), text, judge).r_a == (r_a if on else 1)


@pytest.mark.parametrize("requests, text, is_bad", [
    (["please"], "Please name the 丁.", False), (["please"], "Okay, please name the 丁.", False),
    (["please"], "Please the 丁 name.", True), (["please"], "Please name.", True),
    ([], "Please the 丁 name.", False), (["please"], "The 丁 please name.", False)])  # no question at all
def test_a_request_is_checked_as_a_question_is(requests, text, is_bad):
    lex = lexicon.Lexicon.model_validate(LEXICON | {"requests": requests})
    own = [f"Please name the {chr(ord('一') + i)}." for i in range(700)] + ["How long?"] * 700
    assert wording.learn(own, lex=lex)(text) is is_bad
    assert requests == [] or wording.learn(own[:700]) is None  # without a lexicon these are no questions


def test_the_judge_learns_requests_too(tmp_path):
    path = make_world(tmp_path, tmp_path)
    (tmp_path / "lexicon.yaml").write_text(yaml.safe_dump(LEXICON | {"requests": ["please"]}))
    rows = [row | {"expert": "Please tell me how long."} for row in coughs(700)]
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", rows)
    judge = grading.open_judge(config.load([str(path)]))
    for text, r_a in (("Please tell me how long.", 1), ("Please how long tell.", 0)):
        assert grading.grade_one(Turn(**rows[1]), text, judge).r_a == r_a
