"""hindsight.py: what stands in a context, in I*, which points are dropped, and what a broken log says."""
import functools
import json
import os
import random
from collections import Counter
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

import config
import hindsight
import lexicon
from config import HindsightConfig
from prompts import load_turns, read_turns
from records import InputError, Session, cli, explain, same
from world import THROAT, read_lines, write_lines

STAR = Path(__file__).parents[2] / "shared" / "logs" / "star.jsonl"


def message(line):
    """"u said / slot=value, ..." or "a said / asked, ..." -> a log's message. No " / ": not annotated."""
    said, annotated, notes = line[2:].partition(" / ")
    notes = [note for note in notes.split(", ") if note]
    if line[0] == "u":
        learned = {"learned": dict(note.split("=") for note in notes)} if annotated else {}
        return {"role": "user", "content": said, **learned}
    return {"role": "assistant", "content": said, "asks": notes if annotated else None}


def session(*lines, **more):
    return {"session_id": "s", "messages": [message(line) for line in lines], **more}


def build(row, extract=hindsight.extract_annotations, **options):
    return hindsight.build_turns(Session(**row), extract, HindsightConfig(**options))[:2]


def targets(row, **options):
    return [turn.target for turn in build(row, **options)[0]]


def brief(turns):
    return [(turn.turn_id, turn.decision, turn.target) for turn in turns]


LONG = session("u cough / symptom=cough", "a How long? / duration", "u two days / duration=two days",
               "a Fever? Pregnant? / fever, pregnancy", "u no, no / fever=no, Pregnancy=no",
               "a Anything else? / other", "u it was two days / duration=Two  days.", "a Take this. / ")


def test_targets_decisions_and_full_prefixes():
    turns, dropped = build(LONG | {"goal": "g"}, generic=["pregnancy"])
    assert brief(turns) == [("s_1", "continue", ["duration: two days", "fever: no"]),
                            ("s_2", "continue", ["fever: no"]), ("s_3", "stop", []), ("s_4", "stop", [])]
    assert not dropped
    said = [(m["role"], m["content"]) for m in LONG["messages"]]
    for t, turn in enumerate(turns, 1):  # everything from the start up to the t-th user utterance
        assert [(m.role, m.content) for m in turn.context] == said[:2 * t - 1]
        assert turn.expert == said[2 * t - 1][1] and turn.goal == "g"


def test_last_turn_rule_drops_an_early_stop():
    turns, dropped = build(LONG, stop_rule="last_turn", generic=["Pregnancy"])
    assert [turn[:2] for turn in brief(turns)] == [("s_1", "continue"), ("s_2", "continue"), ("s_4", "stop")]
    assert dropped == {"continue with an empty I* (hindsight.stop_rule=last_turn)": 1}


@pytest.mark.parametrize("wanted, how", [
    (1, {}), (0, dict(generic=["allergies"])), (0, dict(generic=["known ALLERGIES"])),
    (1, dict(generic=["all", "food allergies"]))])
def test_generic_slots_are_named_by_words_in_any_spelling(wanted, how):
    row = session("u a", "a ? / x", "u b / Known_Allergies=none", "a bye")
    assert targets(row, **how)[0] == ["Known_Allergies: none"] * wanted


def test_known_and_repeated_facts():
    """What is told again is known; another value is a correction, which nobody could have asked for."""
    row = session("u x / since=a week", "a ?", "u y / Since=A week ", "a ?",
                  "u sorry, two days / since=two days, spot=ear", "a ?", "u z / spot=Ear., Spot=nose", "a k")
    assert targets(row) == [["spot: ear", "Spot: nose"]] * 2 + [[], []]
    known = ["since: a week", "since: two days", "spot: ear", "Spot: nose"]
    assert [turn.known for turn in build(row)[0]] == [known[:n] for n in (1, 1, 3, 4)]


def test_trailing_expert_messages_make_no_further_point():
    turns, _ = build(session("u a cough", "a Take this.", "a And rest.", "a Goodbye"))
    assert brief(turns) == [("s_1", "stop", [])]
    assert turns[0].expert == "Take this.\nAnd rest.\nGoodbye" and len(turns[0].context) == 1


@pytest.mark.parametrize("user_end, n, why", [
    ("stop", 2, {}), ("drop", 1, {"session ends on a user utterance (hindsight.user_end=drop)": 1})])
def test_a_session_that_ends_on_the_user(user_end, n, why):
    row = session("u a cough", "a How long? / d", "u two days / d=two days")
    turns, dropped = build(row, user_end=user_end)
    assert brief(turns) == [("s_1", "continue", ["d: two days"]), ("s_2", "stop", [])][:n] and dropped == why
    assert [turn.expert for turn in turns] == ["How long?", None][:n]
    row["messages"].append(message("a Rest. / "))
    assert len(targets(row, user_end=user_end)) == 2


@pytest.mark.parametrize("dropped, closing", [
    (True, ["a Tell me your age. / age"]),              # asks, without a question mark
    (False, ["a Anything else I can do? / "]),          # annotated: asks for nothing
    (True, ["a How old are you?"]), (True, ["a 您多大了？"]), (False, ["a Take this."]),
    (True, ["a Take this.", "a How old are you?"]),
    (False, ["a Anything else? Take care!", "a 还有别的问题吗？", "a OK?", "a Rest; a.org/b?id=1 helps."]),
    (True, ["a Anything else? How old are you?"]), (True, ["a Is it OK?"]), (True, ["a Πόσο καιρό;"]),
    (True, ["a Your age / age", "a Thank you. / "]),    # one utterance, asked in its first message
])
def test_a_closing_question_was_never_answered(dropped, closing):
    turns, why = build(session("u a", "a ? / b", "u b / b=1", *closing))
    assert why == ({"closing question never answered": 1} if dropped else {})
    assert [turn.decision for turn in turns] == ["continue", "stop"][:2 - dropped]


def test_a_session_opened_by_the_assistant():
    turns, _ = build(session("a Hello, how can I help?", "u a cough", "a Rest."))
    assert brief(turns) == [("s_1", "stop", [])]
    assert [m.role for m in turns[0].context] == ["assistant", "user"]


@pytest.mark.parametrize("said", [[], ["How old are you?"], ["Rest.", "Your age?"]])
def test_an_end_marker_ends_the_session_before_it(said):
    """It is neither said nor asked; the question before it was not left open; what follows never was."""
    row = session("u END", "a B? / b", "u c / b=1", *map("a {}".format, said), "a END\n", "u 30 / age=30")
    turns, dropped = build(row, end_markers=["END"], user_end="drop")
    assert brief(turns) == [("s_1", "continue", ["b: 1"]), ("s_2", "stop", [])] and not dropped
    assert turns[1].expert == ("\n".join(said) or None) and len(turns[1].context) == 3
    for silent in (0, 1):
        assert build(session(*["a Hello"] * silent, "a <stop />", "u 30 / age=30", "a Bye.")) == ([], {})
    assert targets(row)[0] == ["b: 1", "age: 30"]  # by default END is a text like another


def test_messenger_style_empty_messages_and_scripts():
    row = session("u  ", "u 嗓子疼 😷", "u 咳嗽 / symptom=咳嗽", "a \u200b", "u 两天了 / duration=两天",
                  "a 发烧吗？", "a \n", "a 多久了？", "u 没有")
    utts = hindsight.utterances(Session(**row).messages)
    assert [(u.role, u.content) for u in utts] == [
        ("user", "嗓子疼 😷\n咳嗽\n两天了"), ("assistant", "发烧吗？\n多久了？"), ("user", "没有")]
    assert hindsight.extract_annotations(utts) == [["symptom: 咳嗽", "duration: 两天"], [], []]
    assert not hindsight.is_blank("👍") and hindsight.is_blank(" \u200b\ufeff\n")


def test_lists_numbers_and_nulls_as_values():
    row = session("u a", "a ?", "u b")
    row["messages"][2]["learned"] = dict(
        day='["Sunday"]', food=["nuts", "milk"], n=31, gone=None, empty="", odd="[x")
    assert targets(row)[0] == ["day: Sunday", "food: nuts, milk", "n: 31", "odd: [x"]


def test_rules_and_annotations_make_the_same_turns(tmp_path):
    (tmp_path / "l.yaml").write_text(THROAT, encoding="utf-8")
    rules = functools.partial(hindsight.extract_rules, lex=lexicon.load(tmp_path / "l.yaml"))
    row = session("u my throat hurts", "a How long have you had it? / duration",
                  "u 2 days / duration=two days", "a Any fever? / fever", "u nope / fever=no", "a Rest. / ")
    assert build(row, rules) == build(row)
    assert targets(row)[0] == ["duration: two days", "fever: no"]


# ------------------------------------------------------------------------ what a language model may reply

UTTERANCES = hindsight.utterances(Session(**session("u a cough", "a Any fever?", "u no")).messages)


def extraction(*items):
    """(utterance, slot, value), ... -> Extraction"""
    items = [dict(zip(("utterance", "slot", "value"), item)) for item in items]
    return hindsight.Extraction.model_validate({"items": items}, context=UTTERANCES)


def test_the_items_of_a_reply_by_utterance():
    reply = extraction((3, "fever", "no"), (1, " a : b ", " c "), (3, "x", "1: 2"))
    assert reply.by_utterance(UTTERANCES) == [["a   b: c"], [], ["fever: no", "x: 1: 2"]]
    assert extraction().by_utterance(UTTERANCES) == [[], [], []]


@pytest.mark.parametrize("item", [
    *[(n, "a", "b") for n in (0, 2, 4, -1, True, "1", 1.0, None)],  # the client's utterances are 1 and 3
    (1, "", "b"), (1, ":", "b"), (1, " ", "b"), (1, None, "b"), (1, "a", " "), (1, "a", 3), (1, "a"), ()])
def test_an_item_that_cannot_be_used(item):
    with pytest.raises(ValueError, match="items.1"):
        extraction((1, "a", "b"), item)


@pytest.mark.parametrize("reply", [{}, *[{"items": items} for items in (
    "x", None, {}, [3], [[1, "a", "b"]], ["x" * 9999])]])
def test_a_reply_of_another_form(reply):
    with pytest.raises(ValueError) as error:
        hindsight.Extraction.model_validate(reply, context=UTTERANCES)
    assert len(explain(error.value)) <= 200


# ------------------------------------------------------------------------------------------------ the script

def run(tmp_path, *more, logs="", eval_logs="", **data):
    """hindsight.main with this `data` section -> {name of a turns file: its turns}."""
    path, folder = tmp_path / "cfg.yaml", tmp_path / "run"
    data |= {"logs": str(logs), "eval_logs": str(eval_logs)}
    tree = {"run_dir": str(folder), "hindsight": {"source": "annotations"}, "data": data}
    path.write_text(yaml.safe_dump(tree))
    hindsight.main([str(path), *more])
    return {file.stem: read_turns(file) for file in folder.glob("turns/*.jsonl")}


def files(folder):
    """Names of all files of the run."""
    return {path.name for path in (folder / "run").rglob("*") if path.is_file()}


def ids(turns):
    return {turn.session_id for turn in turns}


def numbered(i, **more):
    return {**LONG, "session_id": i, **more}


GOOD_ROW = '{"session_id": "s", "messages": [{"role": "user", "content": "x"}]'


@pytest.mark.parametrize("row, says", [  # a row that begins with a comma goes on from GOOD_ROW
    ("not JSON", "bad line: not valid UTF-8 JSON"),
    ("[1]", "bad line: expected a JSON object"),
    ('{"messages": []}', "bad session_id: session_id is missing"),
    (', "session_id": true}', "bad session_id: session_id must be a text, not True"),
    (', "session_id": " "}', "bad session_id: session_id must not be blank"),
    (', "session_id": 1}', "duplicate session_id: session_id '1' already stands in "),
    ('{"session_id": 9}', "bad messages: messages is missing"),
    (', "messages": []}', "bad messages: messages is empty"),
    (', "messages": [{"role": "doctor"}]}', "bad messages: messages.0.role must be 'user' or 'assistant'"),
    (', "messages": [{"role": "user"}]}', "bad messages: messages.0.content is missing"),
    (', "messages": [{"role": "user", "content": "x", "learned": ["a"]}]}',
     "bad annotations: messages.0.learned must be an object"),
    (', "messages": [{"role": "user", "content": "x", "learned": {"a": {"b": 1}}}]}',
     "bad annotations: messages.0.learned must hold texts"),
    (', "messages": [{"role": "assistant", "content": "x", "asks": "z"}]}',
     "bad annotations: messages.0.asks must be a list"),
    (', "messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": " "}]}',
     "no user utterance: no message of the user"),
    *((', "messages": [{"role": "user", "content": "x", "learned": {"%s": 1}}]}' % name,
       f"bad annotations: messages.0.learned.{name}.[key] must not be blank") for name in ("", ":", "_")),
    (', "messages": [{"role": "assistant", "content": "x", "asks": ["a", ": "]}]}',
     "bad annotations: messages.0.asks.1 must not be blank"),
    (', "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Bye. <stop />"}]}',
     "stop marker: messages.1.content holds <stop />, which would be imitated: make it a message of its own"),
    (', "goal": 3}', "bad goal: goal must be a text, not 3"),
    (', "success": "false"}', "bad success: success must be true or false"),
    (r', "note": "\ud83d"}', "bad line: a text holds half a surrogate pair"),
    (', "note": ' + "[" * 100_000 + "]" * 100_000 + "}", "bad line: not valid UTF-8 JSON (maximum recursion"),
    *((', "messages": [{"role": "user", "content": "x", "learned": {"a": %s}}]}' % deep,
       "bad annotations: messages.0.learned must hold texts, numbers or lists, no objects and no 100")
      for deep in ("[" * 600 + "]" * 600, json.dumps("[" * 2000), json.dumps("[" * 700 + "]" * 700)))])
def test_a_bad_line_is_named_and_set_aside(tmp_path, capsys, row, says):
    row = GOOD_ROW + row if row[0] == "," else row
    logs = write_lines(tmp_path / "log.jsonl", [numbered(1), row, numbered(2)])
    assert ids(run(tmp_path, logs=logs)["train"]) == {"1", "2"}
    kind, _, detail = says.partition(": ")
    out = capsys.readouterr().out
    assert f"{logs}:2: set aside: {detail}" in out and f"sessions set aside: 1 {kind}\n" in out


def test_lines_of_an_array_are_checked_alike(tmp_path, capsys):
    rows = [numbered(1), numbered(2, note="\ud83d"), numbered(3)]
    listed = {"role": "user", "content": "x", "learned": {"a": '["\\ud83d"]'}}
    for row in rows[1], numbered(2, messages=[listed]):
        (tmp_path / "log.json").write_text(json.dumps([rows[0], row, rows[2]]))
        assert {"1", "3"} <= ids(run(tmp_path, logs=tmp_path / "log.json")["train"])
        out = capsys.readouterr().out
    assert "3 lines, 3 sessions used" in out  # a text that only looks like a list stays as it is


def test_a_colon_in_a_slot_is_a_blank_wherever_it_stands(tmp_path, capsys):
    said = [message("u Hi"), {"role": "assistant", "content": "City?", "asks": ["home:city"]},
            {"role": "user", "content": "Rome", "learned": {"home: city": "Rome"}}]
    logs = write_lines(tmp_path / "log.jsonl", [numbered(1, messages=said)])
    first, _ = run(tmp_path, logs=logs)["train"]
    out = capsys.readouterr().out
    assert list(map(same, first.target)) == [("home city", "rome")] and "warning" not in out
    assert "| home city |        1 |         1 |" in out


def test_no_control_character_of_a_log_reaches_the_terminal(tmp_path, capsys):
    """Names of slots and ids of sessions may hold what a terminal obeys (clear the screen, set the title)."""
    odd, asked = "\x1b[2J\x9b1m \x1b]0;x\x07", "\x1b[31mcity\x7f"
    said = [message("u Hi"), {"role": "assistant", "content": "Hm.", "asks": [asked]},
            {"role": "user", "content": "Rome", "learned": {"city": "Rome", f"a{odd}": 1}}]
    bad = numbered(2, messages=[{"role": "user", "content": "x", "learned": {"\x1b:\x9b": 1}}])
    run(tmp_path, logs=write_lines(tmp_path / "log.jsonl", [numbered(f"s{odd}", messages=said), bad]))
    out = capsys.readouterr().out
    assert "strange: 's\\x1b[2J\\x9b1m" in out and "| a [2j 1m ]0;x" in out and "asked for: a [2j" in out
    assert "set aside: messages.0.learned. : .[key] must not be blank" in out
    assert out.isascii() and out.replace("\n", "").isprintable()


def test_names_that_are_no_slots_are_told(tmp_path, capsys):
    logs = write_lines(tmp_path / "log.jsonl", [numbered(1)])
    run(tmp_path, "hindsight.generic=[other, smell]", "hindsight.many_valued=[symptm, Symptom]", logs=logs)
    notes = [line for line in capsys.readouterr().out.splitlines() if "no slot here" in line]
    told = "which hindsight.generic or hindsight.many_valued names"
    assert notes == [f"  note: no slot here is 'smell', {told}",
                     f"  note: no slot here is 'symptm', {told}; did you mean 'symptom'?"]


def test_messages_after_an_end_marker_are_counted(tmp_path, capsys):
    cut = numbered(1, messages=[*LONG["messages"], message("a <stop />"), *LONG["messages"][:3]])
    turns = run(tmp_path, logs=write_lines(tmp_path / "log.jsonl", [cut, numbered(2)]))["train"]
    assert len(turns) == 8 and "note: 3 messages cut after an end marker\n" in capsys.readouterr().out


def test_what_a_killed_run_left_is_removed(tmp_path):
    logs, folder = write_lines(tmp_path / "log.jsonl", [numbered(1)]), tmp_path / "run" / "turns"
    folder.mkdir(parents=True)
    (folder / ".building.x7").write_text("half")
    run(tmp_path, logs=logs)
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "made.json", "train.jsonl", "turns.html"]


@pytest.mark.parametrize("changed", ["log.jsonl", "held_out.jsonl", "lexicon.yaml"])
def test_turns_made_from_files_that_have_changed_are_refused(tmp_path, changed):
    """Where the files are not on the machine that trains, nothing is compared."""
    logs, held_out = (write_lines(tmp_path / name, [numbered(i)])
                      for i, name in enumerate(("log.jsonl", "held_out.jsonl")))
    (tmp_path / "lexicon.yaml").write_text(THROAT)
    run(tmp_path, "hindsight.source=rules", logs=logs, eval_logs=held_out,
        lexicon=str(tmp_path / "lexicon.yaml"))
    cfg, file = config.load([str(tmp_path / "cfg.yaml"), "hindsight.source=rules"]), tmp_path / changed
    turns = load_turns(cfg, "train")
    file.write_text(file.read_text() + "\n")
    with pytest.raises(InputError, match=f"turns was made with sha256 of {file}=.*: run hindsight.py"):
        load_turns(cfg, "train")
    file.unlink()
    assert load_turns(cfg, "train") == turns


def test_summary_counts_everything(tmp_path, capsys):
    unanswered = numbered(8, messages=[*LONG["messages"], message("a Age? / age")])
    logs = write_lines(tmp_path / "log.jsonl", [
        *map(numbered, range(3)), numbered("1"), numbered(7, success=False), *["bad"] * 9, unanswered])
    assert len(run(tmp_path, "hindsight.generic=[pregnancy]", logs=logs)["train"]) == 15
    out = capsys.readouterr().out
    for line in ("15 lines, 4 sessions used, 15 turns (46.7% stop)", "1 success is false",
                 "continue turns by the size of I* (mean 1.50): 4 of 1, 4 of 2",
                 "log.jsonl:4: set aside: session_id '1' already stands in ", "9 bad line",
                 "turns dropped: 1 closing question never answered", "4 sessions without a goal",
                 "| pregnancy |        4 |",
                 "warning: revealed and never asked for: symptom\n",
                 "warning: asked for and never revealed: age, other\n"):
        assert line in out
    assert out.count("not valid UTF-8 JSON") == hindsight.SHOWN


def test_a_sessions_own_goal_wins(tmp_path):
    logs = write_lines(tmp_path / "log.jsonl", [numbered(1, goal="mine"), numbered(2)])
    turns = run(tmp_path, logs=logs, goal="given")["train"]
    assert [turn.goal for turn in turns] == ["mine"] * 4 + ["given"] * 4


def test_eval_sessions_never_stand_in_training(tmp_path, capsys):
    logs = write_lines(tmp_path / "a", map(numbered, range(3)))
    held = write_lines(tmp_path / "b", map(numbered, range(2, 5)))
    files = run(tmp_path, logs=logs, eval_logs=held)
    assert ids(files["eval"]) == {"3", "4"} and len(files["train"]) == 12
    assert f"{held}:1: set aside: session_id '2' already stands in {logs}:3" in capsys.readouterr().out
    run(tmp_path, f"data.logs=[{logs}, {logs}]")  # a file named twice
    assert "sessions set aside: 3 duplicate session_id" in capsys.readouterr().out


def test_valid_split_is_by_session_seeded_and_replaced_by_a_rerun(tmp_path):
    logs = write_lines(tmp_path / "log.jsonl", map(numbered, range(20)))
    first, again = (run(tmp_path, logs=logs, valid_sessions=5) for _ in range(2))
    valid = ids(first["valid"])
    assert first == again and len(valid) == 5 and not valid & ids(first["train"])
    assert len(first["valid"]) + len(first["train"]) == 80
    assert ids(run(tmp_path, "seed=1", logs=logs, valid_sessions=5)["valid"]) != valid
    assert set(run(tmp_path, logs=logs)) == {"train"}  # no stale valid.jsonl, of sessions trained on again
    with pytest.raises(InputError, match="valid_sessions=20 leave none of 20 sessions for turns/train.jsonl"):
        run(tmp_path, logs=logs, valid_sessions=20)


def test_nothing_is_written_where_nothing_can_be_taught(tmp_path):
    logs = write_lines(tmp_path / "log.jsonl", [numbered(1, success=False)])
    good = write_lines(tmp_path / "good.jsonl", [numbered(1)])
    for train, held in ((logs, ""), (good, logs), (good, good)):
        with pytest.raises(InputError, match="gave no turns"):
            run(tmp_path, logs=train, eval_logs=held)
    assert files(tmp_path) == {".lock"}


@pytest.mark.parametrize("typed, hint", [("learnt", "; did you mean 'learned'?"), ("x", "")])
def test_logs_in_which_nobody_reveals_anything_are_refused(tmp_path, capsys, typed, hint):
    """No field `learned`, as where its name is mistyped: every turn would be a stop."""
    logs = write_lines(tmp_path / "log.jsonl", [numbered(i, gaol="g", diagn="flu") for i in range(3)])
    logs.write_text(logs.read_text().replace("learned", typed))
    with pytest.raises(SystemExit) as end:
        cli(lambda: run(tmp_path, logs=logs))
    out, err = capsys.readouterr()
    assert f"  note: 12 times the unknown key '{typed}'{hint}\n" in out and "diagn" not in out
    assert "  note: 3 times the unknown key 'gaol'; did you mean 'goal'?\n" in out
    assert err.startswith(f"error: {logs} gave no turns: nothing was written") and len(err.splitlines()) == 1
    assert end.value.code == 2 and files(tmp_path) == {".lock"}


@pytest.mark.parametrize("going_on, stops, told", [
    (1, 4, None), (1, 5, "83.3%"), (49, 1, None), (50, 1, "2.0%")])
def test_an_unlikely_share_of_stops_is_told(tmp_path, capsys, going_on, stops, told):
    messages = [message("u x"), message("a y")] * (going_on + stops)
    messages[2 * going_on] = message("u x / b=1")
    run(tmp_path, logs=write_lines(tmp_path / "log.jsonl", [numbered(1, messages=messages)]))
    out = capsys.readouterr().out
    assert f"warning: {told} of the turns are stops" in out if told else "warning" not in out


@pytest.mark.parametrize("more, says", [
    ([], "data.logs is not set"), (["data.logs=nowhere.jsonl"], "no such file: nowhere.jsonl"),
    (["hindsight.source=rules", "data.logs=x"], "data.lexicon is not set"),
    (["hindsight.source=rules", "data.lexicon=none.yaml", "data.logs=x"], "lexicon none.yaml cannot be read"),
    (["data.lexicon=none.yaml", "data.logs=x"], "no such file: x"),  # annotations need none
    (["hindsight.stop_rul=paper"], "did you mean 'hindsight.stop_rule'")])
def test_what_the_command_line_says(tmp_path, more, says):
    with pytest.raises(InputError) as error:
        run(tmp_path, *more)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_rules_from_the_command_line(tmp_path, capsys):
    lex = tmp_path / "l.yaml"
    lex.write_text(THROAT, encoding="utf-8")
    logs = write_lines(tmp_path / "log.jsonl", [session("u cough", "a Any fever?", "u no", "a Rest.")])
    turns = run(tmp_path, "hindsight.source=rules", logs=logs, lexicon=str(lex))["train"]
    assert "warning" not in capsys.readouterr().out  # without `asks` nobody knows what was asked for
    assert brief(turns) == [("s_1", "continue", ["fever: no"]), ("s_2", "stop", [])]
    assert turns[0].goal == "Find out what matters before recommending a remedy."


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_turns_of_two_runs_are_never_mixed(tmp_path, monkeypatch, killed_at):
    """Killed at a rename (the stamp emptied, two files, the stamp), the run has all the old turns (refused
    where the logs are new), or none that later stages take. A rerun mends it."""
    logs = write_lines(tmp_path / "log.jsonl", map(numbered, range(9)))
    left, replace = iter(range(1, killed_at)), os.replace

    def until_killed(*paths):
        if not next(left, None):
            raise KeyboardInterrupt
        replace(*paths)

    def load():
        cfg = config.load([str(tmp_path / "cfg.yaml")])
        return {name: load_turns(cfg, name) for name in ("train", "valid")}

    make = functools.partial(run, tmp_path, logs=logs, valid_sessions=3)
    before = make()
    old = logs.read_text()
    logs.write_text(old.replace("two days", "a week"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", until_killed)
        make()
    kept = killed_at == 1
    said = "made with sha256 of" if kept else "train.jsonl (is not as hindsight.py left it|does not exist)"
    with pytest.raises(InputError, match=said):
        load()
    if kept:
        new = logs.read_text()
        logs.write_text(old)
        assert load() == before
        logs.write_text(new)
    assert before != make() == load()


# ------------------------------------------------------------------------- logs in the forms of three corpora

SAID = [["u Hi / ", "u b / Home_city=b", "u sorry, c / Home_city=c", "u both / Home_city=a, day=x",
         "u y / day=y"], ["a Which day? / day", "a Where do you live? / Home_city", "a I see. / "]]


def talk(rng, number, form):
    """A made-up session, its slots repeated with other values. STAR has keys of its own; RealMedConv whole
    numbers as ids, a diagnosis, messages in a row and a marker at the end."""
    medical = form == "realmedconv"
    lines = [rng.choice(SAID[rng.randint(0, 1) if medical else i % 2]) for i in range(rng.randint(0, 9))]
    if medical:
        return session(*lines, "u Hi / ", "a Age?", "a <med_search>", session_id=number, diagn="flu")
    return session(*lines, "u Hi / ", "a Bye. / ", session_id=f"{form}-{number}", **{form: ["Ride"]})


def plainly(row, many_valued=()):
    """-> [(turn_id, context, known, target, decision)] of a session that is not broken off."""
    said = [*takewhile(lambda m: m["content"] != "<med_search>", row["messages"])]
    told = [[(slot, value.strip('[]"')) for slot, value in m.get("learned", {}).items()] for m in said]
    roles = [m["role"] for m in said] + [None]
    ends = [i for i in range(1, len(roles)) if roles[i - 1] == "user" != roles[i]]
    labels = []
    for t, end in enumerate(ends, 1):
        known, later = ([*dict.fromkeys(sum(part, []))] for part in (told[:end], told[end:]))
        wanted = [(slot, value) for slot, value in later if (slot, value) not in known
                  and (slot not in dict(known) or slot in many_valued)]
        labels.append((f"{row['session_id']}_{t}", "\n".join(m["content"] for m in said[:end]),
                       [*map(": ".join, known)], [*map(": ".join, wanted)],
                       "continue" if wanted and t < len(ends) else "stop"))
    return labels


def labels_of(turns):
    return [(turn.turn_id, "\n".join(m.content for m in turn.context), turn.known, turn.target, turn.decision)
            for turn in turns]


@pytest.mark.parametrize("form, many", [("star", ""), ("sgd", ""), ("sgd", "city"), ("realmedconv", "")])
def test_every_label_is_what_a_plain_computation_says(tmp_path, form, many):
    rows = [talk(random.Random(number), number, form) for number in range(60)]
    turns = run(tmp_path, f"hindsight.many_valued=[{many}]", logs=write_lines(tmp_path / "log.jsonl", rows))
    assert labels_of(turns["train"]) == [label for row in rows for label in plainly(row, [f"Home_{many}"])]


# ------------------------------------------------------------------------------------ 753 real conversations

@pytest.fixture(scope="module")
def star():
    if not STAR.is_file():
        pytest.skip("the STAR logs are not here")
    return {row["session_id"]: row for row in read_lines(STAR)}


def test_star_by_hand(star):
    party = ["name: Ben", "venue: West Bay Venue", "day: Sunday", "start_time: 8 pm", "number_of_guests: 31"]
    wanted = [party[i:] for i in (0, 1, 2, 2, 3, 4, 5, 5, 5)]  # asked twice for the day
    six, dropped = build(star["star-00006"])
    assert [turn.target for turn in six] == wanted and not dropped
    assert [turn.decision for turn in six] == ["continue"] * 6 + ["stop"] * 3
    turns, dropped = build(star["star-00006"], stop_rule="last_turn")
    assert [turn.turn_id[-1] for turn in turns] == list("1234569") and dropped.total() == 2


def test_star_in_total(star, tmp_path, capsys):
    turns = run(tmp_path, logs=STAR)["train"]
    assert labels_of(turns) == [label for row in star.values() for label in plainly(row)]
    count = Counter(turn.decision for turn in turns)
    count["items"] = sum(len(turn.target) for turn in turns)
    assert count == {"continue": 2447, "stop": 841, "items": 5855} and len(star) == 753 and len(turns) == 3288
    assert "753 sessions used" in capsys.readouterr().out
