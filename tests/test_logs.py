"""logs.py, and what hindsight.py makes of any form of logs, holds out, and shows of what it found."""
import json
import re
import sys

import numpy as np
import pytest
import yaml

import config
import grading
import hindsight
import logs
from prompts import load_turns
from records import InputError, Session
from world import make_config, make_lexicon, read_lines, write_lines

# One conversation under other names, nested ones too, with a message of a third role.
FOREIGN = {"meta": {"id": 7}, "about": "rashes", "talk": [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "I itch", "notes": {"symptom": "itch"}},
    {"from": "bot", "value": "Where?", "wants": ["place"]},
    {"from": "human", "value": "My arm", "notes": {"place": "arm"}}]}
OURS = {"session_id": 7, "goal": "rashes", "messages": [
    {"role": "user", "content": "I itch", "learned": {"symptom": "itch"}},
    {"role": "assistant", "content": "Where?", "asks": ["place"]},
    {"role": "user", "content": "My arm", "learned": {"place": "arm"}}]}
FIELDS = ("{session_id: meta.id, goal: about, messages: talk, role: from, content: value, learned: notes, "
          "asks: wants}")
TERMS = [f"data.fields={FIELDS}", "data.roles={user: human, assistant: [agent, bot], ignore: system}"]


def read(*files, **more):
    return list(logs.rows(make_config(data__logs=[str(file) for file in files], **more)))


def load(tmp_path, *overrides):
    """A config of these keys alone."""
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path / 'run'}\nhindsight: {{source: annotations}}")
    return config.load([str(tmp_path / "c.yaml"), *overrides])


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_fields_and_roles_of_other_names(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", [FOREIGN])
    (place, row), = logs.rows(load(tmp_path, f"data.logs={path}", *TERMS))
    assert place == f"{path}:1" and row == OURS  # what is read from it is no unknown key
    sessions, held_out = hindsight.sessions(load(tmp_path, f"data.logs={path}", *TERMS))
    assert [s.session_id for s in sessions] == ["7"] and not held_out
    assert sessions[0].messages[1].asks == ["place"]


def test_roles_may_change_places(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", [OURS])
    (_, row), = read(path, data__roles={"user": ["assistant"], "assistant": ["user"]})
    assert [m["role"] for m in row["messages"]] == ["assistant", "user", "assistant"]


@pytest.mark.parametrize("row", [{"session_id": 1}, {"messages": None}, {"messages": ["Hi"]},
                                 {"messages": [{"content": "no role"}]}, {"messages": [{"role": ["user"]}]},
                                 {"messages": [], "meta": "text"}])
def test_a_malformed_row_is_bad_where_it_is_mapped_and_else_left_for_the_check(tmp_path, row):
    path, bad = write_lines(tmp_path / "log.jsonl", [row]), []
    assert [found for _, found in read(path)] == [row]
    how = dict(data__roles={"user": ["human"]}, data__fields={"goal": "meta.x"})
    mapped = make_config(data__logs=[str(path)], **how)
    with pytest.raises(InputError, match="data.logs: nothing stands under data.fields.goal=meta.x"):
        list(logs.rows(mapped, "logs", lambda place, why: bad.append((place, why))))
    assert [place for place, _ in bad] == [f"{path}:1"] and "not as data.fields says" in bad[0][1]


@pytest.mark.parametrize("name, text", [
    ("a.json", json.dumps([OURS, OURS], indent=1)), ("b.json", f"{json.dumps(OURS)}\n{json.dumps(OURS)}\n"),
    ("c.txt", f"{json.dumps(OURS)}\n\n{json.dumps(OURS)}")])
def test_an_array_or_lines(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [row for _, row in read(tmp_path / name)] == [OURS, OURS]


def test_several_files_are_one_log(tmp_path, capsys, call):
    """They are read in order; a session that stands in both is told with both places."""
    paths = [write_lines(tmp_path / f"{x}.jsonl", [OURS | {"session_id": i} for i in (x, 9)]) for x in (1, 2)]
    files = f"[{', '.join(map(str, paths))}]"
    call(hindsight, tmp_path / "c.yaml" if load(tmp_path) else None, f"data.logs={files}")
    out = capsys.readouterr().out
    assert f"{paths[1]}:2: set aside: session_id '9' already stands in {paths[0]}:2" in out
    turns = read_lines(tmp_path / "run" / "turns" / "train.jsonl")
    assert {turn["session_id"] for turn in turns} == {"1", "2", "9"}


BAD = [  # data.logs, other overrides; what the error says
    ("gone.jsonl", "", "data.logs: no such file: gone.jsonl"),
    ("tests", "", "data.logs: tests is a folder: name its files (corpora/ has readers of public corpora)"),
    ("FILE", "data.eval_logs=gone.jsonl", "data.eval_logs: no such file: gone.jsonl"),
    ("FILE", "data.fields={session: id}", "data.fields.session"),
    ("FILE", "data.roles={human: user}", "data.roles.human"),
    ("FILE", "data.split=2", "data.split must be at most 1"),
    ("FILE", "data.fields={session_id: id}", "data.logs: nothing stands under data.fields.session_id=id"),
    ("FILE", "data.roles={assistant: bot, ignore: [x, bot]}", "data.roles names one role twice"),
    ("TORN", "", "begins like one JSON array, but is none"), ("NUMBERS", "", "gave no turns"),
    ("SWAPPED", "data.roles={user: assistant, assistant: user}", "all turns would be stops"),
    ("FILE", "data.split=1", "data.split=1.0 and data.valid_sessions=0 leave none of 1 sessions for "
     "turns/train.jsonl: change them"),
    ("FILE", "data.split=1e-9", "for turns/eval.jsonl: change them"),
    ("EMPTY", "", "gave no turns"), ("ROLES", "", "gave no turns"),
    ("PLAIN", "", "gave no turns: nothing was written (see above; data.fields and data.roles tell what your "
     "logs call our fields and roles)")]


@pytest.mark.parametrize("source, more, says", BAD)
def test_wrong_input_ends_in_one_line(tmp_path, refused, source, more, says):
    load(tmp_path)
    files = {"FILE": [OURS], "EMPTY": [], "ROLES": [FOREIGN | OURS | {"messages": FOREIGN["talk"]}],
             "PLAIN": [OURS | {"messages": [without(m, "learned", "asks") for m in OURS["messages"]]}],
             "TORN": ["[{}, {"], "NUMBERS": ["[1, 2]"], "SWAPPED": [OURS]}
    if source in files:
        source = write_lines(tmp_path / "log.jsonl", files[source])
    assert says in refused(hindsight, tmp_path / "c.yaml", f"data.logs={source}", *filter(None, [more]))
    assert not list((tmp_path / "run").glob("turns/*.jsonl"))


def test_a_role_of_another_name_is_told_with_its_key(tmp_path, capsys, refused):
    load(tmp_path)
    row = {"session_id": 1, "messages": [{"role": "expert", "content": ""}]}
    path = write_lines(tmp_path / "log.jsonl", [row])
    with pytest.raises(InputError):
        hindsight.main([str(tmp_path / "c.yaml"), f"data.logs={path}"])
    out = capsys.readouterr().out
    assert "messages.0.role must be 'user' or 'assistant', not 'expert' (see data.roles)" in out


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_of_another_coding_is_told_so(tmp_path, refused, coding):
    load(tmp_path)
    path = write_lines(tmp_path / "log.jsonl", [OURS])
    path.write_bytes(path.read_text().encode(coding))
    line = refused(hindsight, tmp_path / "c.yaml", f"data.logs={path}", "data.fields={session_id: id}")
    assert line.startswith(f"error: data.logs: {path} is UTF-16, not UTF-8: convert it (")


def test_what_needs_datasets_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="hf:a/b:train needs the datasets library: pip install datasets"):
        read("hf:a/b:train")


@pytest.mark.extras
def test_parquet_and_a_data_set(tmp_path):
    """Parquet fills missing keys with null; the hub's loader reads a local folder too."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / "train.parquet"
    datasets.Dataset.from_list([OURS, OURS | {"session_id": 8}]).to_parquet(path)
    config_of = make_config(data__logs=[str(path)], hindsight__source="annotations")
    sessions, _ = hindsight.sessions(config_of)
    assert [hindsight.utterances(s.messages)[0].learned for s in sessions] == [["symptom: itch"]] * 2
    assert sessions[0].messages[0].asks is None and sessions[0].messages[1].asks == ["place"]
    assert len(read(f"hf:{folder}:train")) == 2
    with pytest.raises(InputError, match="hf:.*:test cannot be read .* [Uu]nknown split"):
        read(f"hf:{folder}:test")
    with pytest.raises(InputError, match="cannot be read .the forms are FILE.parquet and hf:OWNER/NAME:S"):
        read(f"hf:{folder}")


def test_the_held_out_share(tmp_path):
    """By session, stable: further logs, another order or another seed move no session."""
    def parts(ids, **more):
        path = write_lines(tmp_path / "log.jsonl", [OURS | {"session_id": i} for i in ids])
        cfg = make_config(data__logs=[str(path)], **more)
        return [{s.session_id for s in part} for part in hindsight.sessions(cfg)]

    train, held_out = parts(range(400), data__split=0.2)
    assert not train & held_out and len(train | held_out) == 400 and 60 < len(held_out) < 100
    more = parts(reversed(range(600)), data__split=0.2, seed=3)
    assert train <= more[0] and held_out <= more[1]
    assert held_out <= parts(range(400), data__split=0.3)[1]
    eval_logs = write_lines(tmp_path / "eval.jsonl", [OURS | {"session_id": i} for i in ("x", 2)])
    assert parts(range(4), data__split=0.9, data__eval_logs=[str(eval_logs)]) == [{"0", "1", "2", "3"}, {"x"}]


def test_split_and_valid_sessions_divide_the_turns(tmp_path, call):
    path = write_lines(tmp_path / "log.jsonl", [OURS | {"session_id": i} for i in range(40)])
    cfg = load(tmp_path, f"data.logs={path}", "data.split=0.3", "data.valid_sessions=5")
    call(hindsight, tmp_path / "c.yaml", f"data.logs={path}", "data.split=0.3", "data.valid_sessions=5",
         f"data.turns={tmp_path / 'shared'}")
    found = {name: {t["session_id"] for t in read_lines(tmp_path / "shared" / f"{name}.jsonl")}
             for name in ("train", "valid", "eval")}
    assert len(found["valid"]) == 5 and sum(map(len, found.values())) == 40
    assert found["eval"] == {s.session_id for s in hindsight.sessions(cfg)[1]}
    assert not (tmp_path / "run" / "turns").exists()  # the turns are where data.turns says


# ----------------------------------------------------------------------------------- what hindsight.py shows

def logged(i, *said):
    """A session of user and expert by turns; after " / " stands what is learned ("slot=value") or asked."""
    messages = []
    for k, line in enumerate(said):
        text, _, note = line.partition(" / ")
        slot, _, value = note.partition("=")
        notes = {"learned": {slot: value} if slot else {}} if k % 2 == 0 else {"asks": [slot] if slot else []}
        messages.append({"role": ("user", "assistant")[k % 2], "content": text, **notes})
    return {"session_id": str(i), "goal": "g", "messages": messages}


def shown(tmp_path, capsys, *overrides, rows=None):
    """hindsight.py on a few sessions -> what it prints."""
    rows = rows or [*(logged(i, "a cough / symptom=cough", "How long? / duration", "a week / duration=week",
                             "Take this.") for i in range(5)),
                    logged(7, "a rash / symptom=rash", "Hm.", "a week / duration=week", "Is it red? / colour",
                           "yes / colour=yes", "Any pets? Bye."),
                    logged(8, "hello", "What is it?", "a cold / symptom=cold", "OK.")]
    path = write_lines(tmp_path / "log.jsonl", rows)
    load(tmp_path)
    hindsight.main([str(tmp_path / "c.yaml"), f"data.logs={path}", "hindsight.generic=[colour]", *overrides])
    return capsys.readouterr().out


def test_the_table_of_slots_and_the_strange_turns(tmp_path, capsys):
    out = shown(tmp_path, capsys)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line[:1] == "|"}
    assert [list(map(int, rows[slot])) for slot in ("symptom", "duration", "colour")] == [
        [7, 0, 1, 0], [6, 5, 6, 0], [1, 1, 0, 1]]  # revealed, asked for, in I*, generic
    assert "  continue turns by the size of I* (mean 1.00): 7 of 1\n" in out
    strange = [line for line in out.splitlines() if "strange:" in line]
    for says in ("expert asks nothing: 'a rash' -> 'Hm.', I* ['duration: week']",
                 "s* is stop, the expert asks on: 'a week' -> 'Is it red?', I* []"):
        assert [line for line in strange if says in line]
    assert len(strange) == 1 + 2


def test_the_page_of_turns(tmp_path, capsys):
    rows = [logged(i, "<b>cough</b> / symptom=cough", "Hm.", "a week / duration=week", "Ok.")
            for i in range(200)]
    assert f"wrote {tmp_path / 'run' / 'turns' / 'turns.html'}" in shown(tmp_path, capsys, rows=rows)
    text = (tmp_path / "run" / "turns" / "turns.html").read_text()
    assert "<h1>300 of 400 training turns</h1>" in text and text.count("<details") == 300
    assert text.index('"all|continue|strange"') < text.index('"all|stop"') and "strange 5</button>" in text
    assert "&lt;b&gt;cough" in text and "<b>cough" not in text and "| duration |" in text


def test_marks_of_a_person(tmp_path, capsys):
    """They are counted where the turn is still the same; the file stays; the interval is Jeffreys'."""
    out = shown(tmp_path, capsys, "hindsight.sample=10")
    path = tmp_path / "run" / "turns" / "marks.jsonl"
    assert f"wrote {path}: replace null by true or false" in out
    marks = read_lines(path)
    assert len(marks) == 10 and len({m["turn_id"] for m in marks}) == 10
    assert all(m["target_right"] is m["decision_right"] is None for m in marks)
    for i, mark in enumerate(marks):
        mark |= {"target_right": i > 0, "decision_right": True if i < 4 else None}
    marks[-1]["target"] = ["no: longer so"]
    write_lines(path, marks)
    before = path.read_bytes()
    out = shown(tmp_path, capsys, "hindsight.sample=3")
    assert path.read_bytes() == before
    p = np.linspace(0, 1, 200_001)[1:-1]
    mass = np.cumsum(p ** (8 - 0.5) * (1 - p) ** (1 - 0.5))
    low, high = (p[np.searchsorted(mass, q * mass[-1])] for q in (0.025, 0.975))
    assert f"{path}: 1 turns in it are no longer so, and do not count" in out
    assert f"{path}: target_right at 8 of 9 turns (95% interval " in out
    found = [float(x) for x in re.search(r"8 of 9 .*?(\d+)% to (\d+)%", out).groups()]
    assert found == pytest.approx([100 * low, 100 * high], abs=1.5)
    assert "decision_right at 4 of 4 turns" in out


def test_turns_are_not_shared_by_accident(tmp_path):
    """data.turns made with other settings are refused like a run's own."""
    path = write_lines(tmp_path / "log.jsonl", [logged(i, "a / s=1", "B? / s", "c / d=2") for i in range(5)])
    shared, other = f"data.turns={tmp_path / 'shared'}", tmp_path / "run"
    load(tmp_path)
    hindsight.main([str(tmp_path / "c.yaml"), f"data.logs={path}", shared])
    cfg = load(tmp_path, f"data.logs={path}", shared, f"run_dir={tmp_path / 'another'}")
    assert len(load_turns(cfg, "train")) == 10 and not (other / "turns").exists()
    with pytest.raises(InputError, match="shared was made with hindsight.user_end='stop', this config has"):
        load_turns(load(tmp_path, f"data.logs={path}", shared, "hindsight.user_end=drop"), "train")


def test_sessions_without_annotations_teach_no_stops(tmp_path, capsys):
    """In half annotated logs they are set aside and counted; `learned: {}` says that nothing is revealed."""
    plain = logged(20, "a cough", "How long?", "a week", "Ok.")
    plain["messages"] = [without(m, "learned", "asks") for m in plain["messages"]]
    full = [logged(i, "a cough / symptom=cough", "How long? / duration", "a week / duration=week", "Ok.")
            for i in range(3)]
    out = shown(tmp_path, capsys, rows=[*full, plain, logged(30, "hello", "Bye.")])
    assert "sessions set aside: 1 without annotations (no message has 'learned')" in out
    ids = {turn["session_id"] for turn in read_lines(tmp_path / "run" / "turns" / "train.jsonl")}
    assert ids == {"0", "1", "2", "30"}


def test_what_is_no_value_reveals_nothing():
    """null, NaN (an empty cell of a table) and null in a list."""
    said = Session(session_id="s", messages=[{"role": "user", "content": "x", "learned": {
        "a": None, "b": float("nan"), "c": ["two", None], "d": [None], "e": 0}}])
    assert hindsight.utterances(said.messages)[0].learned == ["c: two", "e: 0"]


def test_files_that_are_not_turns_are_not_replaced(tmp_path, refused):
    path = write_lines(tmp_path / "train.jsonl", [OURS])
    before = path.read_bytes()
    load(tmp_path)
    says = refused(hindsight, tmp_path / "c.yaml", f"data.logs={path}", f"data.turns={tmp_path}")
    assert f"{tmp_path} holds other files of these names" in says and path.read_bytes() == before


def test_a_lexicon_of_other_logs_is_refused(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", [logged(i, "a / s=1", "B? / d", "c / d=2") for i in range(5)])
    for name in ("d", "e"):
        lexicon = make_lexicon({name: dict(asks=["b"], values={})}, {})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(lexicon))
    load(tmp_path)
    hindsight.main([str(tmp_path / "c.yaml"), f"data.logs={path}"])
    cfg = load(tmp_path, f"data.logs={path}", f"data.lexicon={tmp_path / 'd.yaml'}")
    assert grading.open_judge(cfg).lexicon
    with pytest.raises(InputError, match=r"e.yaml has none of the slots of the turns \(d, ...\)"):
        grading.open_judge(load(tmp_path, f"data.logs={path}", f"data.lexicon={tmp_path / 'e.yaml'}"))
