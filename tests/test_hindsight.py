"""Logs -> turns: what stands in a context, in I*, which points are dropped, and what a broken log says."""
import doctest
import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

import hindsight
import lexicon
from data import InputError, load_turns
from test_lexicon import LEXICON

STAR = Path(__file__).parents[2] / "shared" / "logs" / "star.jsonl"


def user(text, **learned):
    return {"role": "user", "content": text, "learned": learned}


def expert(text, *asks):
    return {"role": "assistant", "content": text, "asks": list(asks)}


def plain(*texts):
    """u / a prefixed texts -> messages without annotations."""
    return [{"role": {"u": "user", "a": "assistant"}[t[0]], "content": t[2:]} for t in texts]


def session(*messages, **more):
    return {"session_id": "s", "messages": list(messages), **more}


def build(s, **options):
    return hindsight.build_turns(s, hindsight.extract_annotations, **options)


def brief(turns):
    return [(t["turn_id"], t["decision"], t["target"]) for t in turns]


LONG = session(user("cough", symptom="cough"), expert("How long?", "duration"), user("two days", duration="two days"),
               expert("Fever? Pregnant?", "fever", "pregnancy"), user("no, no", fever="no", Pregnancy="no"),
               expert("Anything else?", "other"), user("it was two days", duration="Two  days."), expert("Take this."))


def test_docstring_examples():
    assert doctest.testmod(hindsight) == (0, 5)


def test_targets_decisions_and_full_prefixes():
    turns, dropped = build(LONG, goal="g", generic=["pregnancy"])
    assert brief(turns) == [("s_1", "continue", ["duration: two days", "fever: no"]),
                            ("s_2", "continue", ["fever: no"]), ("s_3", "stop", []), ("s_4", "stop", [])]
    assert not dropped
    for t, turn in enumerate(turns, 1):  # everything from the start of the session up to the t-th user utterance
        said = LONG["messages"][:2 * t - 1]
        assert turn["context"] == [{"role": m["role"], "content": m["content"]} for m in said]
    assert [t["expert"] for t in turns] == ["How long?", "Fever? Pregnant?", "Anything else?", "Take this."]
    assert {t["goal"] for t in turns} == {"g"}


def test_last_turn_rule_drops_an_early_stop():
    turns, dropped = build(LONG, stop_rule="last_turn", generic=["Pregnancy"])
    assert [(t["turn_id"], t["decision"]) for t in turns] == [("s_1", "continue"), ("s_2", "continue"), ("s_4", "stop")]
    assert dropped == {"continue with an empty I* (hindsight.stop_rule=last_turn)": 1}


def test_generic_slots_are_named_in_any_spelling():
    s = session(user("a"), expert("?", "x"), user("b", Known_Allergies="none"), expert("bye"))
    assert build(s, generic=["known allergies"])[0][0]["decision"] == "stop"
    assert build(s, generic=["allergies"])[0][0]["target"] == ["Known_Allergies: none"]


def test_known_and_repeated_facts():
    s = session(user("x", day="Monday"), expert("?"), user("y", Day="monday "), expert("?"),
                user("z", day="Tuesday", time="8"), expert("?"), user("w", day="tuesday", time="9"), expert("done"))
    assert build(s)[0][0]["target"] == ["day: Tuesday", "time: 8", "time: 9"]
    assert build(s)[0][2]["target"] == ["time: 9"]


def test_trailing_expert_messages_make_no_further_point():
    s = session(*plain("u a cough", "a Take this.", "a And rest.", "a Goodbye"))
    turns, _ = build(s)
    assert brief(turns) == [("s_1", "stop", [])]
    assert turns[0]["expert"] == "Take this.\nAnd rest.\nGoodbye" and len(turns[0]["context"]) == 1


@pytest.mark.parametrize("user_end, ids, why", [
    ("stop", ["s_1", "s_2"], {}), ("drop", ["s_1"], {"session ends on a user utterance (hindsight.user_end=drop)": 1})])
def test_a_session_that_ends_on_the_user(user_end, ids, why):
    s = session(user("a cough"), expert("How long?", "d"), user("two days", d="two days"))
    turns, dropped = build(s, user_end=user_end)
    assert [t["turn_id"] for t in turns] == ids and dropped == why and turns[0]["target"] == ["d: two days"]
    s["messages"].append(expert("Rest."))
    assert [t["turn_id"] for t in build(s, user_end=user_end)[0]] == ["s_1", "s_2"]
    assert user_end == "drop" or (turns[1]["decision"], turns[1]["expert"]) == ("stop", None)


@pytest.mark.parametrize("closing, dropped", [
    ([expert("Tell me your age.", "age")], 1),                      # asks, without a question mark
    ([expert("Anything else I can do?")], 0),                       # annotated: asks for nothing
    (plain("a How old are you?"), 1), (plain("a 您多大了？"), 1), (plain("a Take this."), 0),
    (plain("a Take this.", "a How old are you?"), 1),
    ([expert("Your age", "age"), expert("Thank you.")], 1),         # one utterance, asked in its first message
])
def test_a_closing_question_was_never_answered(closing, dropped):
    turns, why = build(session(user("a"), expert("?", "b"), user("b", b="1"), *closing))
    assert why == ({"closing question never answered": 1} if dropped else {}) and len(turns) == 2 - dropped
    assert turns[0]["decision"] == "continue"


def test_a_session_opened_by_the_assistant():
    turns, _ = build(session(*plain("a Hello, how can I help?", "u a cough", "a Rest.")))
    assert [m["role"] for m in turns[0]["context"]] == ["assistant", "user"] and brief(turns) == [("s_1", "stop", [])]


def test_messenger_style_empty_messages_and_scripts():
    s = session(*plain("u  ", "u 嗓子疼 😷", "u 咳嗽", "a \u200b", "u 两天了", "a 发烧吗？", "a \n", "a 多久了？", "u 没有"))
    s["messages"][2]["learned"], s["messages"][4]["learned"] = {"symptom": "咳嗽"}, {"duration": "两天"}
    utts = hindsight.utterances(s["messages"])
    assert [(u["role"], u["content"]) for u in utts] == [
        ("user", "嗓子疼 😷\n咳嗽\n两天了"), ("assistant", "发烧吗？\n多久了？"), ("user", "没有")]
    assert hindsight.extract_annotations(utts) == [["symptom: 咳嗽", "duration: 两天"], [], []]
    assert not hindsight.is_blank("👍") and hindsight.is_blank(" \u200b\ufeff\n")


def test_lists_numbers_and_nulls_as_values():
    s = session(user("a"), expert("?"),
                user("b", day='["Sunday"]', food=["nuts", "milk"], n=31, gone=None, empty="", odd="[x"))
    assert build(s)[0][0]["target"] == ["day: Sunday", "food: nuts, milk", "n: 31", "odd: [x"]


def test_a_sessions_own_goal_wins():
    assert build(session(user("a"), goal="mine"), goal="given")[0][0]["goal"] == "mine"


def test_rules_and_annotations_make_the_same_turns(tmp_path):
    (tmp_path / "l.yaml").write_text(LEXICON, encoding="utf-8")
    rules = functools.partial(hindsight.extract_rules, lex=lexicon.load(tmp_path / "l.yaml"))
    s = session(user("my throat hurts"), expert("How long have you had it?", "duration"),
                user("2 days", duration="two days"), expert("Any fever?", "fever"), user("nope", fever="no"),
                expert("Rest."))
    assert hindsight.build_turns(s, rules) == build(s)
    assert build(s)[0][0]["target"] == ["duration: two days", "fever: no"]


# ------------------------------------------------------------------------------------------------------ the script

def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def run(tmp_path, *more, logs=None, eval_logs="", **data):
    path = tmp_path / "cfg.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "hindsight": {"source": "annotations"},
                                    "data": {"logs": logs or "", "eval_logs": eval_logs, **data}}))
    hindsight.main([str(path), *more])
    return {p.stem: load_turns(p) for p in (tmp_path / "run" / "turns").glob("*.jsonl")}


def numbered(i, **more):
    return {**LONG, "session_id": i, **more}


@pytest.mark.parametrize("row, says", [
    ("not JSON", "not valid UTF-8 JSON"), ("[1]", "expected a JSON object"),
    ({"messages": LONG["messages"]}, "session_id"), ({"session_id": True, "messages": LONG["messages"]}, "session_id"),
    ({"session_id": 9}, "'messages' is missing"),
    (session({"role": "doctor", "content": "x"}), "role 'doctor'"),
    (session({"role": "user", "content": "x", "learned": ["a"]}), "'learned' must be an object"),
    (session(user("x", a={"b": 1})), "is an object"),
    (session(user("x"), {"role": "assistant", "content": "y", "asks": "z"}), "'asks' must be a list"),
    (session(*plain("a x", "u  ")), "no message of the user"),
    (session(user("x"), goal=3), "'goal' must be a text"),
    (session(user("x"), success="false"), "'success' must be true or false"),
    (session(user("\ud83d")), "surrogate")])
def test_a_bad_line_is_named_and_set_aside(tmp_path, capsys, row, says):
    logs = write(tmp_path / "log.jsonl", numbered(1), row, numbered(2))
    assert {t["session_id"] for t in run(tmp_path, logs=logs)["train"]} == {"1", "2"}
    out = capsys.readouterr().out
    assert f"{logs}:2: set aside:" in out and says in out and "sessions set aside: 1 " in out


def test_summary_counts_everything(tmp_path, capsys):
    logs = write(tmp_path / "log.jsonl", *[numbered(i) for i in range(3)], numbered("1"), numbered(7, success=False),
                 *["bad"] * 9, numbered(8, messages=LONG["messages"] + [expert("Age?", "age")]))
    turns = run(tmp_path, logs=logs)["train"]
    out = capsys.readouterr().out
    assert len(turns) == 15 and "15 lines, 4 sessions used, 15 turns (53.3% continue, 46.7% stop)" in out
    assert "mean size of I* where continue 1.50" in out  # two at the first point, one at the second
    assert "1 success is false" in out and "9 bad line" in out and out.count("not valid UTF-8 JSON") == hindsight.SHOWN
    assert "log.jsonl:4: set aside: session_id '1' already stands in line 2" in out
    assert "turns dropped: 1 closing question never answered" in out
    assert "4 sessions without a goal" in out


def test_eval_sessions_never_stand_in_training(tmp_path, capsys):
    logs, held = write(tmp_path / "a", *map(numbered, range(3))), write(tmp_path / "b", *map(numbered, range(2, 5)))
    files = run(tmp_path, logs=logs, eval_logs=held)
    assert {t["session_id"] for t in files["eval"]} == {"3", "4"} and len(files["train"]) == 12
    assert "1 also in the training logs" in capsys.readouterr().out


def test_valid_split_is_by_session_seeded_and_replaced_by_a_rerun(tmp_path):
    logs = write(tmp_path / "log.jsonl", *map(numbered, range(20)))
    ids = lambda turns: {t["session_id"] for t in turns}  # noqa: E731
    first, again = (run(tmp_path, logs=logs, valid_sessions=5) for _ in range(2))
    assert first == again and len(ids(first["valid"])) == 5 and not ids(first["valid"]) & ids(first["train"])
    assert len(first["valid"]) + len(first["train"]) == 80
    assert ids(run(tmp_path, "seed=1", logs=logs, valid_sessions=5)["valid"]) != ids(first["valid"])
    assert set(run(tmp_path, logs=logs)) == {"train"}  # no stale valid.jsonl, whose sessions are trained on again
    with pytest.raises(InputError, match="valid_sessions=20 leaves no session"):
        run(tmp_path, logs=logs, valid_sessions=20)


def test_nothing_is_written_where_nothing_can_be_taught(tmp_path):
    logs = write(tmp_path / "log.jsonl", numbered(1, success=False))
    good = write(tmp_path / "good.jsonl", numbered(1))
    for options in (dict(logs=logs), dict(logs=good, eval_logs=logs), dict(logs=good, eval_logs=good)):
        with pytest.raises(InputError, match="gave no turns"):
            run(tmp_path, **options)
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


@pytest.mark.parametrize("more, says", [
    ([], "data.logs is not set"), (["data.logs=nowhere.jsonl"], "no such file: nowhere.jsonl"),
    (["hindsight.source=rules", "data.logs=x"], "data.lexicon is not set"),
    (["data.lexicon=none.yaml", "data.logs=x"], "lexicon none.yaml cannot be read"),
    (["hindsight.stop_rul=paper"], "did you mean 'hindsight.stop_rule'")])
def test_what_the_command_line_says(tmp_path, more, says):
    with pytest.raises(InputError) as error:
        run(tmp_path, *more)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_rules_from_the_command_line(tmp_path):
    (tmp_path / "l.yaml").write_text(LEXICON, encoding="utf-8")
    logs = write(tmp_path / "log.jsonl", session(*plain("u cough", "a Any fever?", "u no", "a Rest.")))
    turns = run(tmp_path, "hindsight.source=rules", logs=logs, lexicon=str(tmp_path / "l.yaml"))["train"]
    assert brief(turns) == [("s_1", "continue", ["fever: no"]), ("s_2", "stop", [])]
    assert turns[0]["goal"] == "Find out what matters before recommending a remedy."


# --------------------------------------------------------------------------------------- 753 real conversations

@pytest.fixture(scope="module")
def star():
    if not STAR.is_file():
        pytest.skip("the STAR logs are not here")
    return {s["session_id"]: s for s in map(json.loads, STAR.read_text(encoding="utf-8").splitlines())}


def test_star_by_hand(star):
    two = build(star["star-00002"])[0]
    facts = ["rank: Chief Engineer", "name: Han", "code: 639431", "code_type: Access Code"]
    assert [(t["decision"], t["target"]) for t in two] == [
        ("continue", facts), ("continue", facts[1:]), ("continue", facts[2:]), ("continue", facts[3:]), ("stop", [])]
    assert two[3]["expert"] == "Please specify the code type." and len(two[4]["context"]) == 9

    party = ["name: Ben", "venue: West Bay Venue", "day: Sunday", "start_time: 8 pm", "number_of_guests: 31"]
    wanted = [party, party[1:], party[2:], party[2:], party[3:], party[4:], [], [], []]  # asked twice for the day
    six, dropped = build(star["star-00006"])
    assert [t["target"] for t in six] == wanted and not dropped
    assert [t["decision"] for t in six] == ["continue"] * 6 + ["stop"] * 3
    turns, dropped = build(star["star-00006"], stop_rule="last_turn")
    assert [t["turn_id"][-1] for t in turns] == list("1234569") and dropped.total() == 2

    guests = [t["target"] for t in build(star["star-00013"])[0]]  # venue and name stand in the first message
    rest = ["host: Ben", "arrival_time: 10 pm", "number_of_guests: 4", "parking: No"]
    assert guests == [rest, rest[1:], rest[2:], rest[3:], [], []]


def test_star_in_total(star, tmp_path, capsys):
    turns = run(tmp_path, logs=str(STAR))["train"]
    count = Counter()
    for s in star.values():  # counted backwards, without utterances: the logs alternate and end on the expert
        later = set()
        said = [m["learned"].items() for m in s["messages"] if m["role"] == "user"]
        told = [{(k, v.lower().strip('[]" ')) for k, v in learned} for learned in said]
        before = [set().union(*told[:i + 1]) for i in range(len(told))]
        for i in reversed(range(len(told))):
            fresh = later - before[i]
            count["items"] += len(fresh) if i + 1 < len(told) else 0
            count["continue" if fresh else "stop"] += 1
            later |= told[i]
    assert len(star) == 753 and len(turns) == 3288 == count["continue"] + count["stop"]
    assert Counter(t["decision"] for t in turns) == {"continue": count["continue"], "stop": count["stop"]}
    assert sum(len(t["target"]) for t in turns) == count["items"]
    assert count == {"continue": 2447, "stop": 841, "items": 5855}
    assert "753 sessions used" in capsys.readouterr().out
    firsts = {t["session_id"]: t["context"][0]["content"] for t in turns}
    assert all(t["context"][0]["content"] == firsts[t["session_id"]] for t in turns)


def test_turns_are_vouched_for_only_when_all_are_written(tmp_path, monkeypatch):
    """Interrupted between the turns and made.json, the stamp of before stands, and later stages refuse the new turns."""
    logs = write(tmp_path / "log.jsonl", numbered(1))
    run(tmp_path, logs=logs)
    stamp = tmp_path / "run" / "turns" / "made.json"
    before = stamp.read_text()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hindsight, "whole_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "hindsight.user_end=drop", logs=logs)
    assert stamp.read_text() == before and '"hindsight.user_end": "stop"' in before


def test_an_error_does_not_stand_amid_a_progress_bar(capsys):
    from tqdm import tqdm

    from data import cli

    def main():
        bar = tqdm(total=3, desc="work")  # held by its name while the error passes
        bar.update()
        raise InputError("bad")

    with pytest.raises(SystemExit):
        cli(main)
    assert "\nerror: bad\n" in capsys.readouterr().err
