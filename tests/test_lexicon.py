"""lexicon.py: what is asked for, what is revealed, and what a broken lexicon says."""
import re
import time
from itertools import pairwise

import pytest

import lexicon
import wording
from records import InputError
from world import THROAT


@pytest.fixture
def load(tmp_path):
    """The text of a lexicon file -> Lexicon."""
    def load(text):
        path = tmp_path / "lexicon.yaml"
        path.write_text(text, encoding="utf-8")
        return lexicon.load(path)

    return load


@pytest.fixture
def lex(load):
    return load(THROAT)


@pytest.mark.parametrize("text, wanted", [
    ("How long have you had it?", "duration"),
    ("HOW LONG HAVE YOU HAD IT?", "duration"),
    ("Do you have a fever, and since when?", "fever duration"),
    ("Do you cough? Have you taken any medicine?", "cough medicine"),
    ("Any fever or cough?", "fever cough"),
    ("Okay. And how long have you had it?", "duration"),
    ("I'm really sorry to hear that, do you have a fever?", "fever"),
    ("Is there a fever؟", "fever"),
    ("请问你发烧吗？", "fever"),
    ("好的，你这样多久了？", "duration"),
])
def test_asked_in_a_well_formed_question(lex, text, wanted):
    assert lexicon.asked(text, lex) == wanted.split()


@pytest.mark.parametrize("text", [
    "Have you mistaken it?",
    "Are you feverish?",                                    # no match inside a longer ASCII word
    "How are you?",
    "How long have you had it.",                            # no question mark
    "You have a fever?",                                    # no opener
    "A fever, how long have you had it?",                   # a lead-in that holds a cue
    "How how long have you had it?",
    "How long how long have you had it?",
    "Do you have a fever and do you have a cough and do you smoke?",  # "do you have" twice
    "How long? How long?",
    "How long, fever?",
    "How long, since when, fever, cough?",
    "Any fever cough smoking?",
    "Do you have a fever or cough or smoke and since when is it so?",  # four attributes
    "Fever?",                                               # one word
    "Do you have a fever. How long have you had it?",
    "You have a fever. How long have you had it?",          # a statement with a cue beside the question
    "Do you really really really have a fever?",
    "Do you have a fever" + " or some such thing of the kind" * 6 + "?",  # more than 30 words, and repeats
    "Nice weather for the time of year. " * 30 + "Do you have a fever?",
    "",
])
def test_nothing_is_asked_in_any_other_text(lex, text):
    assert lexicon.asked(text, lex) == []


def test_thirty_words_are_a_question_and_thirty_one_are_not(lex):
    for n, wanted in ((25, ["fever"]), (26, [])):
        filler = " ".join(f"w{i}" for i in range(n))
        assert lexicon.asked(f"Do you have a fever {filler}?", lex) == wanted


def test_a_long_speech_is_no_question(lex):
    speech = " ".join(f"It is now {i} o'clock." for i in range(40))
    assert lexicon.asked(f"{speech[:500]}. Do you have a fever?", lex) == ["fever"]
    assert lexicon.asked(f"{speech} Do you have a fever?", lex) == []


def test_without_openers_a_question_may_begin_with_anything(load):
    lex = load(re.sub("openers: .*", "openers: []", THROAT))
    assert lexicon.asked("You have a fever?", lex) == ["fever"]
    assert lexicon.asked("Fever?", lex) == []


def test_not_strict_reads_an_experts_terse_questions(lex):
    assert lexicon.asked("Fever? Cough? Tell me of any medicine.", lex, strict=False) == ["fever", "cough"]


@pytest.mark.parametrize("wanted, texts", [
    (True, ["Anything else?", "Okay, do you have other symptoms?", "Tell me, whatever, anything else?"]),
    (False, ["Anything else", "Anything else? Fever.", "Anything else anything else?",
             "Anything else? Anything else?", "How are you?"]),
])
def test_generic_questions(lex, wanted, texts):
    for text in texts:
        assert lexicon.asks_generic(text, lex) is wanted, text


@pytest.mark.parametrize("question, answer, wanted", [
    (None, "I have a fever, for two days", {"fever": "yes", "duration": "two days"}),
    (None, "no fever", {"fever": "no"}),                          # the longest match, not "no" or "fever"
    (None, "I don’t have a fever", {"fever": "no"}),              # a curly apostrophe
    (None, "没有发烧，两天了", {"fever": "no", "duration": "two days"}),
    (None, "yes", {}),
    ("Do you have a fever?", "Yes.", {"fever": "yes"}),
    ("Do you have a fever?", "yes, for two days", {"fever": "yes", "duration": "two days"}),
    ("Do you have a fever?", "nope 🙂", {"fever": "no"}),
    ("Do you have a fever?", "👍", {"fever": "yes"}),
    ("你发烧吗？", "是的。", {"fever": "yes"}),
    ("Do you have a fever?", "no idea", {}),                      # not a bare no
    ("Do you have a fever?", "not sure", {}),
    ("How long have you had it?", "no", {}),                      # not a yes/no attribute
    ("You may have a fever.", "yes", {}),                         # nothing was asked
    ("Any fever? Any cough?", "no", {"fever": "no", "cough": "no"}),
    ("Any fever? Any cough?", "no, yes", {"fever": "no", "cough": "yes"}),
    ("Any fever? Any cough?", "yes, no cough", {"fever": "yes", "cough": "no"}),
    ("Any fever?", "no, yes", {}),                                # who knows
    (None, "a week, sorry, two days", {"duration": "two days"}),
])
def test_revealed(lex, question, answer, wanted):
    assert lexicon.revealed(question, answer, lex) == wanted


def test_a_tie_goes_to_the_attribute_just_asked(load):
    lex = load("goal: g\nyes: [yes]\nno: [no]\nopeners: [when]\ngeneric_questions: []\ncomplaints: {}\n"
               "attributes:\n  start: {asks: [begin], values: {ten: ['10 pm']}}\n"
               "  end: {asks: [stop], values: {ten: ['10 pm']}}\n")
    assert lexicon.revealed("When does it stop?", "10 pm", lex) == {"end": "ten"}
    assert lexicon.revealed("When does it begin?", "10 pm", lex) == {"start": "ten"}


def test_complaint(lex):
    assert lexicon.complaint_of("Hi, my throat hurts and I cough", lex) == "sore throat"
    assert lexicon.complaint_of("我喉咙疼", lex) == "sore throat"
    assert lexicon.complaint_of("coughs", lex) is None


def test_yaml_words_that_yaml_reads_as_booleans_stay_words(lex):
    assert "yes" in lex.yes[0].pattern and any("on" in p.pattern for p in lex.openers)
    assert list(lex.attributes["fever"].values) == ["yes", "no"]


@pytest.mark.parametrize("old, new, says", [
    ("goal: Find", "gaol: Find", "goal is missing"),
    ("openers:", "opener:", "openers is missing"),
    ("    asks: [fever", "    ask: [fever", "attributes.fever.asks is missing"),
    ("    values: {two days: [\"two days\", \"2 days\", 两天], a week: [\"a week\"]}\n", "",
     "attributes.duration: values is missing"),
    ("  fever:", "  fe:ver:", "attributes.fe:ver: an attribute's name cannot hold a colon"),
    ("  fever:", "  '_ ':", "attributes._ .[key] must not be blank"),
    ("yes_no: true", "yes_no: maybe", "attributes.fever.yes_no must be 'true' or 'false', not 'maybe'"),
    ("\"how long\"", "\"how (long\"", "attributes.duration.asks.0: bad regex 'how (long'"),
    ("\"a week\"", "\"a week)\"", "attributes.duration.values.a week.0: bad regex 'a week)'"),
    ("[yes, yeah", "['', yeah", "yes.0 must not be empty"),
    ("cues: [cough]", "cues: cough", "complaints.cough.cues must be a list"),
    ("[duration, cough, smoking]", "[rash]", "complaints.cough.attributes: no attribute is called 'rash'"),
    ("complaints:", "more: 1\ncomplaints:", "unknown key 'more'; it may hold goal, yes, no, openers, "),
    ("yes_no: true", "yes_no: true\n    no: [x]", "attributes.fever: unknown key 'no'; it may hold asks, "),
    ("goal: Find", "goal: [Find", "not valid YAML"),
    ("goal: Find", f"goal: {'[' * 1500} Find", "not valid YAML: maximum recursion depth exceeded"),
    ("asks: [fever", "asks: ['a{99999999999}'", "attributes.fever.asks.0: bad regex 'a{99999999999}' (the"),
    ("goal: Find", "goal: [&a [x]" + "".join(f", &{b} [{f'*{a}, ' * 9}]" for a, b in pairwise("abcdefghijk"))
     + "]\nGoal: Find", "goal must be a text, not [['x'], [["),  # aliases of aliases: huge if written out
    ("  medicine:", "  cough:", "not valid YAML: 'cough' stands twice below line"),
    (THROAT, "[]", "must be an object, not []"),
])
def test_a_broken_lexicon_names_file_and_key(load, tmp_path, old, new, says):
    with pytest.raises(InputError) as error:
        load(THROAT.replace(old, new, 1))
    line = str(error.value)
    assert line.startswith(f"lexicon {tmp_path}/lexicon.yaml: {says}") and "\n" not in line


def test_a_missing_lexicon(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        lexicon.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("unit", [
    "how long? ", "!", ".", "?", "a", "fever, ", "发", " ", "and ", "\n", "'", "-", "1", "a.", "/", "α;", ",",
    "_", "\u200b", "http://!", "\u00a0", "no ", "{", "\\"])
def test_long_texts_take_no_time(lex, unit):
    start, text = time.perf_counter(), unit * (40_000 // len(unit))
    for text in (text, f"no {text} a?"):
        lexicon.asked(text, lex)
        lexicon.asks_generic(text, lex)
        lexicon.expects_answer(text)
        lexicon.revealed("Any fever?", text, lex)
        wording.questions_in(text, lex)
    assert time.perf_counter() - start < 3


def test_the_longest_match_stays():
    """Though another starts before it, and whatever lies free beside it."""
    patterns = [(text, re.compile(text)) for text in ("low back", "back pain now", "pain")]
    assert lexicon.find("low back pain now, pain", patterns) == [(4, 17, "back pain now"), (19, 23, "pain")]


def test_an_experts_careless_question_gives_a_no_its_meaning(lex):
    assert lexicon.revealed("And the fever and the fever?", "no", lex) == {"fever": "no"}


# ---------------------------------------------------------------------------------------- requests and goals

REQUESTS = THROAT.replace("\nattributes:", "\nrequests: [please, tell me, 请告诉我]\nattributes:")


@pytest.mark.parametrize("text, wanted", [
    ("Please tell me how long you have had it.", "duration"),
    ("Okay, tell me of any fever. Please name the medicine!", "fever medicine"),
    ("Well, so please tell me how long", "duration"),
    ("Tell me how long and whether you smoke.", "duration smoking"),
    ("请告诉我多久了。", "duration"),
    ("You may tell me of any fever.", ""),  # it begins otherwise
    ("We please you with medicine.", ""),
])
def test_a_request_asks_without_a_question_mark(load, text, wanted):
    with_requests, without = load(REQUESTS), load(THROAT)
    for strict in (True, False):
        assert lexicon.asked(text, with_requests, strict) == wanted.split()
        assert lexicon.asked(text, without, strict) == []
    assert lexicon.questions(text, without) == lexicon.questions(text) == 0


@pytest.mark.parametrize("text", [
    "Please how long how long.", "Tell me how long, fever, cough.", "Fever, tell me how long.",
    "Please tell me how long. How long have you had it.",
    "Tell me of a fever, how long, the medicine or whether you smoke."])
def test_a_request_is_held_to_the_form_of_a_question(load, text):
    assert lexicon.asked(text, load(REQUESTS)) == []
    assert lexicon.questions(text, load(REQUESTS)) == (not text.startswith("Fever"))


def test_a_request_may_be_generic(load):
    lex = load(REQUESTS.replace("[\"anything else\"", "[\"anything else\", tell me more"))
    assert lexicon.asks_generic("Okay, tell me more.", lex) and not lexicon.asks_generic("More of it.", lex)
    assert not lexicon.asks_generic("Okay, tell me more.", load(THROAT))


def test_what_is_said_after_a_request_answers_it(load):
    assert lexicon.revealed("Please tell me of any fever.", "no", load(REQUESTS)) == {"fever": "no"}
    assert lexicon.revealed("Please tell me of any fever.", "no", load(THROAT)) == {}


def test_long_texts_without_a_request_take_no_time(load):
    lex, start = load(REQUESTS), time.perf_counter()
    for unit in ("a", "a ", "and ", "fever, ", ": ", "发"):
        lexicon.asked(unit * (100_000 // len(unit)), lex, strict=False)
    assert time.perf_counter() - start < 3


RIDES = """
goal: g
yes: ["yes"]
no: ["no"]
openers: []
generic_questions: []
attributes:
  destination: {asks: [where to], values: {Rome: [rome]}, goals: [book a ride, "taxi's"]}
  arrival: {asks: [where to], values: {Rome: [rome]}, goals: ["book a flight\\\\."]}
  day: {asks: [day], values: {}}
complaints: {}
"""


def test_an_attribute_counts_at_its_goals_alone(load):
    lex = load(RIDES)
    for goal, wanted in (("Book a ride.", ["destination"]), ("The taxi’s way.", ["destination"]),
                         ("We book a flight.", ["arrival"]), ("book a flights", []), ("", []), (None, [])):
        here = lex.at(goal)
        assert lexicon.asked("Where to and on what day?", here) == [*wanted, "day"], goal
        assert lexicon.revealed("Where to?", "Rome", here) == dict.fromkeys(wanted, "Rome")
    assert list(lex.attributes) == ["destination", "arrival", "day"]
    assert lex.at("Book a ride.") is lex.at("Book a ride.")  # built once
