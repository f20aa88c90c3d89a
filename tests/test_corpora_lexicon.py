"""corpora/lexicon.py: a lexicon mined from labelled logs, and one checked against logs held out."""
import re

import pytest
import yaml

import corpora.lexicon as miner
import hindsight
import lexicon
from world import REPO, read_lines, write_lines

NAMES = ["Ada", "Bob", "Cid"]


def asks(text, *slots):
    return {"role": "assistant", "content": text, "asks": list(slots)}


def says(text, **learned):
    return {"role": "user", "content": text, "learned": learned}


def ride(i):
    """A ride is booked: where to asks for the destination. The name comes by a request."""
    who, days = NAMES[i % 3], i % 5 + 2
    what = "Okay, what's your full name?" if i < 100 else "Tell me, what's the name?"
    name = ["Please tell me your name.", what, "Please give me your name."][i % 3]
    where = ["Where to?", "Great. Where to, then?"][i % 2]
    return [says("A ride"), asks(name, "name"), says(f"{who}", name=who),
            asks(where, "destination"), says("To Rome (centre)", destination="Rome (centre)"),
            asks(f"In {days} days?", "Days_Ahead"), says("Yes", Days_Ahead=["yes", "no"][i % 2]),
            asks("Please wait for your driver."), says("Where is he? Where is Rome?")]


def flight(i):
    """Where to asks for the arrival."""
    return [says("A flight"), asks(["Where to?", "So, where to?"][i % 2], "arrival"),
            says("Rome", arrival="Rome"), asks("Is there anything else to tell?", *()),
            says("Rome it is", arrival="Rome"), asks("Any wishes, or is there anything else?"),
            says("no", arrival="Rome")]


def log(path, n, first=0, goals=("Book a ride (now).", "Book a flight.")):
    rows = [{"session_id": f"{kind.__name__}{i}", "goal": goal, "messages": kind(i)}
            for i in range(first, first + n) for kind, goal in zip((ride, flight), goals)]
    return write_lines(path, rows)


@pytest.fixture
def config_file(tmp_path):
    log(tmp_path / "train.jsonl", 20)
    log(tmp_path / "test.jsonl", 6, first=100)
    tree = {"run_dir": str(tmp_path / "run"), "hindsight": {"source": "rules"},
            "data": {"logs": str(tmp_path / "train.jsonl"), "eval_logs": str(tmp_path / "test.jsonl"),
                     "lexicon": str(tmp_path / "lexicon.yaml")}}
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "cfg.yaml"


def test_a_mined_lexicon(config_file, call, capsys):
    call(miner, "mine", config_file)
    path = config_file.parent / "lexicon.yaml"
    lex, tree = lexicon.load(path), yaml.safe_load(path.read_text())
    assert tree["requests"] == ["please give", "please tell"]
    assert "anything" in tree["generic_questions"]
    found, here = tree["attributes"], [r"Book a ride \(now\)\."]
    assert all(found[slot]["goals"] == here for slot in ("name", "days ahead", "destination"))
    assert found["name"]["asks"] == ["name"] and found["arrival"]["asks"] == ["where"]
    assert found["name"]["values"] == {n.lower(): [n.lower()] for n in NAMES} and not found["name"]["yes_no"]
    assert found["days ahead"]["yes_no"] and found["days ahead"]["values"] == {}
    assert found["destination"]["values"] == {"rome (centre)": [r"rome \(centre\)"]}
    assert {"in", "is", "where"} <= {*tree["openers"]}
    for said, wanted in (("Where to?", ["destination"]), ("Please tell me your name.", ["name"]),
                         ("Please wait for your driver.", []), ("In 9 days?", ["days ahead"])):
        assert lexicon.asked(said, lex.at("Book a ride (now)."), strict=False) == wanted, said
    told = capsys.readouterr().out
    assert "all texts: precision 1.000 (22 of 22), recall " in told
    assert "unseen texts: precision nan (0 of 0), recall 0.000 (0 of 2)" in told
    assert "     2 missed name: Tell me, what's the name?" in told


def test_rules_read_a_session_by_the_lexicon_of_its_goal(config_file, call):
    call(miner, "mine", config_file)
    call(hindsight, config_file)
    turns = read_lines(config_file.parent / "run" / "turns" / "eval.jsonl")
    by_id = {turn["turn_id"]: turn["target"] for turn in turns}
    assert by_id["ride101_1"] == ["name: cid", "destination: rome (centre)", "days ahead: yes"]
    assert by_id["flight101_1"] == ["arrival: rome"]


LEXICON = """
goal: g
yes: ["yes"]
no: ["no"]
openers: [what]
generic_questions: []
attributes:
  name: {asks: [name], values: {}}
  destination: {asks: [where], values: {}}
complaints: {}
"""


def test_the_report_by_hand(config_file, call, capsys):
    """Of 6 rides 2 ask for the name with a mark, 6 where to; so do 6 flights. Where opens nothing."""
    path = config_file.parent / "lexicon.yaml"
    path.write_text(LEXICON)
    call(miner, "check", config_file)
    told = capsys.readouterr().out
    assert "all texts: precision 1.000 (2 of 2), recall 0.083 (2 of 24)" in told
    assert "unseen texts: precision 1.000 (2 of 2), recall 1.000 (2 of 2)" in told
    assert "     3 missed arrival: So, where to?" in told and "     2 missed name: Please tell me" in told
    path.write_text(LEXICON.replace("openers: [what]", "openers: []"))
    call(miner, "check", config_file)
    told = capsys.readouterr().out
    assert "all texts: precision 0.571 (8 of 14), recall 0.333 (8 of 24)" in told
    assert "     3 false  destination: So, where to?" in told


def test_a_file_that_somebody_may_have_edited_stays(config_file, refused, call):
    path = config_file.parent / "lexicon.yaml"
    path.write_text("mine")
    assert "exists, perhaps edited: remove it" in refused(miner, "mine", config_file)
    assert path.read_text() == "mine"
    other = config_file.parent / "other.yaml"
    call(miner, "mine", config_file, f"data.lexicon={other}")
    path.unlink()
    call(miner, "mine", config_file)
    assert path.read_text() == other.read_text()


def test_the_command_is_named_first(config_file, refused):
    for arguments in ([], [config_file], ["mined", config_file]):
        assert "the first argument is mine or check" in refused(miner, *arguments)


def test_slots_with_a_colon_are_those_of_the_annotations(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    for row in rows:
        row["messages"] += [asks("Which seat?", "my:seat"), says("Aisle", **{"my:seat": "aisle"})]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    found = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())["attributes"]["my seat"]
    assert found["asks"] == ["seat"] and found["values"] == {"aisle": ["aisle"]}


def test_a_slot_that_requests_alone_ask_for(tmp_path, config_file, call):
    """A question that begins like a request is no evidence against it."""
    rows = read_lines(tmp_path / "train.jsonl")
    for row in rows:
        row["messages"] += [asks("Please name your seat.", "seat"), says("Aisle", seat="aisle"),
                            asks("Please name your row?", "row"), says("Nine", row="nine")]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    lex = lexicon.load(tmp_path / "lexicon.yaml")
    assert lexicon.asked("Please name your seat.", lex.at(None)) == ["seat"]


def test_logs_without_asks_are_refused(config_file, refused):
    path = config_file.parent / "train.jsonl"
    rows = read_lines(path)
    for m in (m for row in rows for m in row["messages"]):
        m.pop("asks", 0)
    write_lines(path, rows)
    assert "no training session, or no held-out one, has `asks`" in refused(miner, "mine", config_file)
    assert not (config_file.parent / "lexicon.yaml").exists()


def test_without_held_out_sessions_nothing_is_checked(config_file, refused):
    assert "or no held-out one, has `asks`" in refused(miner, "mine", config_file, "data.eval_logs=[]")
    assert "data.lexicon is not set" in refused(miner, "check", config_file, "data.lexicon=")


def test_a_slot_of_all_goals_has_none(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    for row in rows:
        row["messages"] += [asks("Which day?", "day"), says("Monday", day='["Monday"]')]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    tree = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())
    day = tree["attributes"]["day"]
    assert day["asks"] == ["day"] and day["goals"] == [] and day["values"] == {"monday": ["monday"]}


def test_empty_annotations_change_nothing(tmp_path, config_file, call):
    call(miner, "mine", config_file)
    before = (tmp_path / "lexicon.yaml").read_text()
    for name in ("train", "test"):
        rows = read_lines(tmp_path / f"{name}.jsonl")
        for m in (m for row in rows for m in row["messages"]):
            m |= {"asks": []} if m["role"] == "user" else {"learned": {}}
            if m["role"] == "user":
                m["learned"] |= {"wish": None}
        write_lines(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "lexicon.yaml").unlink()
    call(miner, "mine", config_file)
    assert (tmp_path / "lexicon.yaml").read_text() == before


def test_what_is_said_or_revealed_once_is_no_evidence(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    texts = "Which shade?", "Which shade?", "Paint it how?"
    for row, text, shade in zip(rows, texts, ["red", "red", "blue"]):
        row["messages"] += [asks(text, "colour"), says(shade, colour=shade), says("...", colour=".")]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    found = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())
    colour = found["attributes"]["colour"]
    assert colour["asks"] == ["which"] and colour["values"] == {"red": ["red"]}


@pytest.mark.parametrize("goal", ["Goal {}", ""])
def test_goals_that_hardly_come_back_or_are_missing_are_not_used(tmp_path, config_file, call, goal):
    rows = read_lines(tmp_path / "train.jsonl")
    rows = [row | {"goal": goal.format(i)} if goal or i < 3 else row for i, row in enumerate(rows)]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    found = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())["attributes"]
    assert not any(entry["goals"] for entry in found.values())


def test_runs_and_a_script_without_spaces():
    assert miner.runs("A cup, at 5") == {"a", "cup", "a cup", "at", "5", "at 5"}
    assert miner.runs("A cup of tea", first=1) == {"a", "a cup", "a cup of"}
    chinese = [(miner.runs("多久了"), True)] * 2 + [(miner.runs("久坐了多"), False)] * 2
    assert [bool(re.search(cue, "你多久了")) for cue in miner.cues(chinese)] == [True]


def test_cues_by_hand():
    """b and c stand in two wanted ones each; a and e stand in another, too."""
    units = [({"a", "b"}, True), ({"b", "c"}, True), ({"c", "d", "e"}, True), ({"a", "e"}, False)]
    assert miner.cues(units) == ["b", "c"] and miner.cues(units, "a b") == ["b", "c"]
    assert miner.cues([({"a"}, True)]) == miner.cues([({"a"}, False)]) == miner.cues([]) == []
    mixed = [({"a"}, True)] * 11 + [({"a"}, False)]
    assert miner.cues(mixed) == ["a"] and miner.cues(mixed[3:]) == []
    assert miner.cues([({"the pin", "pin"}, True)] * 2, "the pin") == ["pin"]
    assert miner.cues([({"pin", "please"}, True)] * 2, "pin") == ["pin"]


def test_a_question_that_begins_with_an_emoji_or_holds_no_plain_word(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    for row in rows:
        row["messages"] += [asks("🙂 Which seat?", "seat"), says("Aisle", seat="aisle"), asks("5€?", "price")]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    found = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())["attributes"]
    assert found["seat"]["asks"] == ["seat"] and found["price"]["asks"] == []


def test_the_example_of_the_page(tmp_path):
    page = (REPO / "docs" / "lexicon.md").read_text(encoding="utf-8")
    (tmp_path / "lexicon.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    lex = lexicon.load(tmp_path / "lexicon.yaml")
    for goal, wanted in (("Book a ride.", ["destination"]), ("Book a flight.", ["arrival"])):
        assert lexicon.asked("Where to? Please tell me of your bags.", lex.at(goal)) == [*wanted, "luggage"]
