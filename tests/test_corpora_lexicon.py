"""corpora/lexicon.py: a lexicon mined from labelled logs, and one checked against logs held out."""
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
    text, lex, tree = path.read_text(), lexicon.load(path), yaml.load(path.read_text(), lexicon.TextLoader)
    assert sorted(tree["requests"]) == ["please give", "please tell"]
    assert tree["generic_questions"] == ["anything"]
    found = tree["attributes"]
    ride = {"goals": [r"Book a ride \(now\)\."]}
    assert found["name"] == ride | {"asks": ["name"], "values": {n.lower(): [n.lower()] for n in NAMES}}
    assert found["days ahead"] == ride | {"asks": ["days"], "yes_no": "true"}
    rome = {"rome (centre)": [r"rome \(centre\)"]}
    assert found["destination"] == ride | {"asks": ["where"], "values": rome}
    assert found["arrival"]["asks"] == ["where"] and found["arrival"]["goals"] == [r"Book a flight\."]
    assert "  name:  # asked for 20 times\n" in text
    here = lex.at("Book a ride (now).")
    for said, wanted in (("Where to?", ["destination"]), ("Please tell me your name.", ["name"]),
                         ("Please wait for your driver.", []), ("In 9 days?", ["days ahead"])):
        assert lexicon.asked(said, here) == wanted, said
    told = capsys.readouterr().out.splitlines()
    assert text.splitlines()[:6] == [f"# {line}" for line in told[:6]]
    assert told[2].split("|")[2:6] == [" 1.000 [1.000, 1.000] "] * 2 + ["    24 "] * 2
    assert [*map(str.strip, told[4].split("|"))][2:6] == ["1.000 [1.000, 1.000]"] * 2 + ["2", "2"]


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
    rows = [[*map(str.strip, line.split("|"))][1:-1] for line in told.splitlines() if line.startswith("|")]
    found = {row[0]: row[1:] for row in rows}
    assert found["all texts"][2:] == ["14", "24"] and found["all, well-formed"][2:] == ["2", "24"]
    assert found["all texts"][0].startswith("0.571 [") and found["all texts"][1].startswith("0.333 [")
    assert found["unseen texts"] == ["1.000 [1.000, 1.000]"] * 2 + ["2", "2"]
    assert found["name"] == ["2", "4", "0"] and found["destination"] == ["6", "0", "6"]
    assert found["arrival"] == ["0", "6", "0"]
    missed, false = told.split("missed:")[1].split("false:")
    assert "     3 arrival: So, where to?" in missed and "     2 name: Please tell me your name." in missed
    assert "     3 destination: So, where to?" in false
    assert path.read_text() == LEXICON


def test_a_file_that_somebody_may_have_edited_stays(config_file, refused, call):
    path = config_file.parent / "lexicon.yaml"
    path.write_text("mine")
    assert "exists, perhaps edited: --force" in refused(miner, "mine", config_file)
    assert path.read_text() == "mine"
    other = config_file.parent / "other.yaml"
    call(miner, "mine", config_file, "--out", other)
    call(miner, "mine", config_file, "--force")
    assert path.read_text() == other.read_text() != "mine"


@pytest.mark.parametrize("change, says_", [
    (lambda row: [m.pop("asks", 0) for m in row["messages"]], "have no `asks`, and a lexicon is mined"),
    (lambda row: [m.pop("learned", 0) for m in row["messages"]], "have no `learned`, and"),
    (lambda row: row["messages"][1]["asks"].append("a:b"), "the slot 'a:b' holds a colon"),
])
def test_logs_that_no_lexicon_can_be_made_from(config_file, refused, change, says_):
    path = config_file.parent / "train.jsonl"
    rows = read_lines(path)
    for row in rows:
        change(row)
    write_lines(path, rows)
    assert says_ in refused(miner, "mine", config_file)
    assert not (config_file.parent / "lexicon.yaml").exists()


def test_without_held_out_sessions_nothing_is_checked(config_file, refused):
    assert "no held-out session has `asks`" in refused(miner, "mine", config_file, "data.eval_logs=[]")
    assert "data.lexicon is not set" in refused(miner, "check", config_file, "data.lexicon=")


def test_a_slot_of_all_goals_has_none(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    for row in rows:
        row["messages"] += [asks("Which day?", "day"), says("Monday", day='["Monday"]')]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    tree = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())
    assert tree["attributes"]["day"] == {"asks": ["day"], "values": {"monday": ["monday"]}}


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
    call(miner, "mine", config_file, "--force")
    assert (tmp_path / "lexicon.yaml").read_text() == before


def test_what_is_said_or_revealed_once_is_no_evidence(tmp_path, config_file, call):
    rows = read_lines(tmp_path / "train.jsonl")
    texts = ["Which shade?", "Which shade?", "Paint it how?"]
    for row, text, shade in zip(rows[::2], texts, ["red", "red", "blue"]):
        row["messages"] += [asks(text, "colour"), says(shade, colour=shade), says("...", colour=".")]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    found = yaml.safe_load((tmp_path / "lexicon.yaml").read_text())
    colour = found["attributes"]["colour"]
    assert (colour["asks"], colour["values"]) == (["which"], {"red": ["red"]})
    assert "what's" in found["openers"] and not {"okay", "tell"} & {*found["openers"]}


@pytest.mark.parametrize("goal", ["Goal {}", ""])
def test_goals_that_hardly_come_back_or_are_missing_are_not_used(tmp_path, config_file, call, goal):
    rows = read_lines(tmp_path / "train.jsonl")
    rows = [row | {"goal": goal.format(i)} if goal or i < 3 else row for i, row in enumerate(rows)]
    write_lines(tmp_path / "train.jsonl", rows)
    call(miner, "mine", config_file)
    assert "goals:" not in (tmp_path / "lexicon.yaml").read_text()


def test_cues_in_a_script_without_spaces():
    assert miner.runs("多久了") == {"多", "久", "了", "多久", "久了", "多久了"}
    assert miner.runs("a cup, at 5 o'clock") == {"a", "cup", "at", "o'clock", "a cup"}


def test_a_cover_by_hand():
    """b and c stand in two wanted ones each, d in the third alone; a and e stand in another, too."""
    units = [(set("ab"), True), (set("bc"), True), (set("cde"), True), (set("ae"), False)]
    assert miner.cover(units) == ["c", "b"] and miner.cover(units, "b") == ["b", "d"]
    assert miner.cover(units, "b", least=2) == miner.cover([(set("ab"), True)], least=2) == ["b"]
    assert miner.cover([(set("a"), False)], least=2) == miner.cover([]) == []
    mixed = [(set("a"), True)] * 9 + [(set("a"), False)]
    assert miner.cover(mixed) == ["a"] and miner.cover(mixed[1:]) == []


def test_a_lead_in_is_no_cue_but_a_short_question_is_no_lead_in():
    assert miner.without_lead_in("right, and your pin please") == "and your pin please"
    for text in ("your pin, please", "where to, then"):
        assert miner.without_lead_in(text) == text


def test_the_example_of_the_page(tmp_path):
    page = (REPO / "docs" / "lexicon.md").read_text(encoding="utf-8")
    (tmp_path / "lexicon.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    lex = lexicon.load(tmp_path / "lexicon.yaml")
    for goal, wanted in (("Book a ride.", ["destination"]), ("Book a flight.", ["arrival"])):
        assert lexicon.asked("Where to? Please tell me of your bags.", lex.at(goal)) == [*wanted, "luggage"]
