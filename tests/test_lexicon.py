"""The rules source: what is asked for, what is revealed, and what a broken lexicon says."""
import doctest
import time

import pytest

import lexicon
from data import InputError

LEXICON = r"""
goal: Find out what matters before recommending a remedy.
yes: [yes, yeah, 是的, "👍"]
no: [no, nope, not at all]
openers: [how, what, do, does, did, is, are, have, any, since, on, 请问, 你]
generic_questions: ["anything else", "other symptoms"]
attributes:
  duration:
    asks: ["how long", "since when", 多久]
    values: {two days: ["two days", "2 days", 两天], a week: ["a week"]}
  fever:
    yes_no: true
    asks: [fever, temperature, 发烧]
    values: {yes: [fever, 我发烧], no: ["no fever", "don't have a fever", 没有发烧]}
  cough:
    yes_no: true
    asks: ["cough(?:ing)?"]
    values: {yes: ["a cough"], no: ["no cough"]}
  medicine:
    asks: ["taken", "medicine"]
    values: {aspirin: [aspirin], none: ["took nothing"]}
  smoking:
    asks: ["smok\\w*"]
    values: {yes: ["i smoke"], no: ["never smoked"]}
complaints:
  sore throat: {cues: ["sore throat", "throat hurts", 喉咙], attributes: [duration, fever, medicine]}
  cough: {cues: [cough], attributes: [duration, cough, smoking]}
"""


@pytest.fixture(scope="session")
def lex(tmp_path_factory):
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.yaml"
    path.write_text(LEXICON, encoding="utf-8")
    return lexicon.load(path)


def test_docstring_examples():
    assert doctest.testmod(lexicon) == (0, 3)


@pytest.mark.parametrize("text, wanted", [
    ("How long have you had it?", ["duration"]),
    ("HOW LONG HAVE YOU HAD IT?", ["duration"]),
    ("Do you have a fever, and since when?", ["fever", "duration"]),
    ("Do you cough? Have you taken any medicine?", ["cough", "medicine"]),
    ("Okay. And how long have you had it?", ["duration"]),
    ("I'm really sorry to hear that, do you have a fever?", ["fever"]),
    ("Is there a fever؟", ["fever"]),
    ("请问你发烧吗？", ["fever"]),
    ("好的，你这样多久了？", ["duration"]),
    ("Have you mistaken it?", []),
    ("Are you feverish?", []),                                    # no match inside a longer ASCII word
    ("How are you?", []),
    ("How long have you had it.", []),                            # no question mark
    ("You have a fever?", []),                                    # no opener
    ("A fever, how long have you had it?", []),                   # a lead-in that holds a cue
    ("How how long have you had it?", []),
    ("How long how long have you had it?", []),
    ("Do you have a fever and do you have a cough and do you smoke?", []),  # "do you have" twice
    ("How long? How long?", []),
    ("How long, fever?", []),
    ("How long, since when, fever, cough?", []),
    ("Any fever cough smoking?", []),
    ("Do you have a fever or cough or smoke and since when is it so?", []),  # four attributes
    ("Fever?", []),                                               # one word
    ("Do you have a fever. How long have you had it?", []),
    ("You have a fever. How long have you had it?", []),          # a statement with a cue beside the question
    ("Do you " + "really " * 3 + "have a fever?", []),
    ("Do you have a fever" + " or some such thing of the kind" * 6 + "?", []),  # more than 30 words, and repeats
    ("Nice weather for the time of year. " * 30 + "Do you have a fever?", []),
    ("", []),
])
def test_asked_only_in_well_formed_questions(lex, text, wanted):
    assert lexicon.asked(text, lex) == wanted


def test_thirty_words_are_a_question_and_thirty_one_are_not(lex):
    filler = [f"w{i}" for i in range(40)]
    assert lexicon.asked("Do you have a fever " + " ".join(filler[:25]) + "?", lex) == ["fever"]
    assert lexicon.asked("Do you have a fever " + " ".join(filler[:26]) + "?", lex) == []


def test_a_long_speech_is_no_question(lex):
    speech = " ".join(f"It is now {i} o'clock." for i in range(40))
    assert lexicon.asked(speech[:500] + ". Do you have a fever?", lex) == ["fever"]
    assert lexicon.asked(speech + " Do you have a fever?", lex) == []


def test_without_openers_a_question_may_begin_with_anything(tmp_path):
    path = tmp_path / "l.yaml"
    path.write_text("\n".join("openers: []" if line.startswith("openers:") else line for line in LEXICON.split("\n")))
    lex = lexicon.load(path)
    assert lexicon.asked("You have a fever?", lex) == ["fever"] and lexicon.asked("Fever?", lex) == []


def test_not_strict_reads_an_experts_terse_questions(lex):
    assert lexicon.asked("Fever? Cough? Tell me about any medicine.", lex, strict=False) == ["fever", "cough"]


@pytest.mark.parametrize("text, wanted", [
    ("Anything else?", True), ("Okay, do you have other symptoms?", True), ("Anything else", False),
    ("Anything else? Fever.", False), ("Anything else anything else?", False),
    ("Anything else? Anything else?", False), ("Tell me, whatever, anything else?", True), ("How are you?", False)])
def test_generic_questions(lex, text, wanted):
    assert lexicon.asks_generic(text, lex) is wanted


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


def test_a_tie_goes_to_the_attribute_just_asked(tmp_path):
    path = tmp_path / "l.yaml"
    path.write_text("goal: g\nyes: [yes]\nno: [no]\nopeners: [when]\ngeneric_questions: []\ncomplaints: {}\n"
                    "attributes:\n  start: {asks: [begin], values: {ten: ['10 pm']}}\n"
                    "  end: {asks: [stop], values: {ten: ['10 pm']}}\n")
    lex = lexicon.load(path)
    assert lexicon.revealed("When does it stop?", "10 pm", lex) == {"end": "ten"}
    assert lexicon.revealed("When does it begin?", "10 pm", lex) == {"start": "ten"}


def test_complaint(lex):
    assert lexicon.complaint_of("Hi, my throat hurts and I cough", lex) == "sore throat"
    assert lexicon.complaint_of("我喉咙疼", lex) == "sore throat"
    assert lexicon.complaint_of("coughs", lex) is None


def test_yaml_words_that_yaml_reads_as_booleans_stay_words(lex):
    assert [p.pattern for p in lex.yes][0].find("yes") > 0 and any("on" in p.pattern for p in lex.openers)
    assert {v for (a, v), _ in lex.values if a == "fever"} == {"yes", "no"}


@pytest.mark.parametrize("old, new, says", [
    ("goal: Find", "gaol: Find", "missing key 'goal'"),
    ("openers:", "opener:", "missing key 'openers'"),
    ("    asks: [fever", "    ask: [fever", "attributes.fever: missing key 'asks'"),
    ("yes_no: true", "yes_no: maybe", "attributes.fever.yes_no must be true or false, not 'maybe'"),
    ("\"how long\"", "\"how (long\"", "attributes.duration.asks: bad regex 'how (long'"),
    ("\"a week\"", "\"a week)\"", "attributes.duration.values.a week: bad regex 'a week)'"),
    ("cues: [cough]", "cues: cough", "complaints.cough.cues must be a list"),
    ("[duration, cough, smoking]", "[coughs]", "complaints.cough.attributes: no attribute is called 'coughs'"),
    ("complaints:\n", "complaints: []\nmore:\n", "unknown key 'more'"),
    ("goal: Find", "goal: [Find", "not valid YAML"),
])
def test_a_broken_lexicon_names_file_and_key(tmp_path, old, new, says):
    path = tmp_path / "broken.yaml"
    path.write_text(LEXICON.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as error:
        lexicon.load(path)
    assert str(path) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_lexicon(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        lexicon.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("unit", ["how long? ", "!", ".", "?", "a", "fever, ", "发", " ", "and ", "\n", "'"])
def test_long_texts_take_no_time(lex, unit):
    start, text = time.perf_counter(), unit * (100_000 // len(unit))
    lexicon.asked(text, lex)
    lexicon.asks_generic(text, lex)
    lexicon.questions(text)
    lexicon.revealed("Any fever?", text, lex)
    assert time.perf_counter() - start < 3
