"""records.py: what a line may hold, what is said of a fault, files read and written whole."""
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tqdm import tqdm

import faulty
import records
from records import ExtractorAnchor, GraderAnchor, InputError, Pair, Reply, Session, Turn, explain
from world import REPO

SAID = [{"role": "user", "content": "Hi"}]
TURN = dict(turn_id="a_1", session_id="a", context=SAID, known=[], target=[], decision="stop")
SESSION = dict(session_id="a", messages=SAID)
GOOD = {Turn: TURN, Session: SESSION, Pair: dict(turn_id="a_1", context=SAID, chosen="How?", rejected="Red?"),
        GraderAnchor: dict(turn=TURN, response="How?", score=0.5),
        ExtractorAnchor: dict(session=SESSION, items=["fever: no"])}
FAULTS = """
Turn | {"context": []} | context is empty
Turn | {"context": ["Hi"]} | context.0 must be an object, not 'Hi'
Turn | {"context": [{"role": "user"}]} | context.0.content is missing
Turn | {"context": [{"role": "users"}]} | context.0.role must be 'user' or 'assistant', not 'users'; did you
Turn | {"decision": "go"} | decision must be 'continue' or 'stop', not 'go'
Turn | {"turn_id": 3} | turn_id must be a text, not 3
Turn | {"target": "fever: no"} | target must be a list, not 'fever: no'
Session | {"session_id": true} | session_id must be a text, not True
Session | {"session_id": " "} | session_id must not be blank
Session | {"success": "false"} | success must be true or false, not 'false'
Session | {"messages": [{USER, "content": [LONG]}]} | messages.0.content must be a text, not ['xxxxxxxxxxxx...
Session | {"messages": [{USER, "asks": "z"}]} | messages.0.asks must be a list, not 'z'
Session | {"messages": [{USER, "learned": {"a": {}}}]} | messages.0.learned must hold texts, numbers or lists
Pair | {"rejected": " "} | rejected must not be blank
Pair | {"chosen": 7} | chosen must be a text, not 7
GraderAnchor | {"score": 2} | score must be 0, 0.5 or 1, not 2.0
GraderAnchor | {"score": true} | score must be a number, not True
GraderAnchor | {"turn": {}} | turn.turn_id is missing
ExtractorAnchor | {"items": [": no"]} | items.0 must be of the form "slot: value", not ': no'
ExtractorAnchor | {"items": ["fever"]} | items.0 must be of the form "slot: value", not 'fever'
"""


@pytest.mark.parametrize("fault", FAULTS.strip().splitlines())
def test_a_fault_is_one_line(tmp_path, fault):
    kind, change, said = map(str.strip, fault.split("|"))
    kind, path = getattr(records, kind), tmp_path / "x.jsonl"
    for short, long in (("LONG", json.dumps("x" * 999)), ("USER", '"role": "user", "content": "x"')):
        change = change.replace(short, long)
    bad = GOOD[kind] | json.loads(change)
    path.write_text(json.dumps(GOOD[kind]) + "\n\n" + json.dumps(bad) + "\n")
    lines = records.read_records(path, kind, "; mend it")
    assert next(lines) == (1, kind.model_validate(GOOD[kind]))
    with pytest.raises(InputError) as error:
        next(lines)
    told = str(error.value)
    assert told.startswith(f"{path}:3: {said}") and told.endswith("; mend it") and len(told) < 300


@pytest.mark.parametrize("kind", list(GOOD))
def test_a_missing_field_is_named(kind):
    for name in GOOD[kind]:
        with pytest.raises(ValidationError) as error:
            kind.model_validate({k: v for k, v in GOOD[kind].items() if k != name})
        assert explain(error.value) == f"{name} is missing"


def test_what_a_record_keeps():
    """Whole numbers name sessions; unknown keys are no fault; what was given is written, in order."""
    said = [SAID[0] | {"mood": 1, "learned": {"age": 3}}]
    log = {"messages": said, "session_id": 7, "goal": None, "more": [1]}
    session = Session.model_validate(log)
    assert session.session_id == "7" and session.dump() == log | {"session_id": "7"}
    assert list(Turn.model_validate({"x": 1, **dict(reversed(TURN.items()))}).dump()) == list(TURN)


def test_a_reply_is_exactly_its_fields():
    class Twin(Reply):
        same: bool

    assert Twin.model_validate_json('{"same": true}').same
    for text, line in (('{"same": 1}', "same must be true or false, not 1"), ("{}", "same is missing"),
                       ('{"same": true, "why": "x"}', "unknown key why")):
        with pytest.raises(ValidationError) as error:
            Twin.model_validate_json(text)
        assert explain(error.value) == line
    assert Twin.model_json_schema()["additionalProperties"] is False


def test_items_are_compared_normalised():
    assert records.same("Start_time : 8  PM.") == records.same("start time:８ pm") == ("start time", "8 pm")
    assert records.same("a: b: c!") == ("a", "b: c") and records.same("no value") == ("no value", "")
    for found, wanted, score in ((["a: 1", "b: 2"], ["A: 1.", "c: 3", "d: 4"], 0.4), ([], [], 1),
                                 (["a: 1"] * 2, ["a: 1"], 1), (["a: 1"], ["a: 2"], 0), (["a: 1"], [], 0)):
        assert records.f1(found, wanted) == pytest.approx(score)


# ------------------------------------------------------------------------------------------------------ files

def test_lines_are_read_with_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    first = '\ufeff{"a": "是"}'.encode()
    path.write_bytes(b"\n".join([first, b"", b" ", b"[1]", b'{"a": ', b"\xff", b"[" * 9999, b'{"c": 2}']))
    told = []
    assert list(records.read_jsonl(path, lambda *why: told.append(why))) == [(1, {"a": "是"}), (8, {"c": 2})]
    assert [n for n, _ in told] == [4, 5, 6, 7] and told[0][1] == "expected a JSON object, got list"
    assert all(reason.startswith("not valid UTF-8 JSON (") for _, reason in told[1:])
    with pytest.raises(InputError, match=r"x.jsonl:4: expected a JSON object, got list"):
        list(records.read_jsonl(path))
    with pytest.raises(InputError, match="no such file: .*none"):
        list(records.read_jsonl(tmp_path / "none"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    records.write_jsonl(path, [Turn(**TURN), {"é": 1}])
    before = path.read_text(encoding="utf-8")
    assert before == json.dumps(TURN) + '\n{"é": 1}\n'
    with pytest.raises(KeyboardInterrupt):
        with records.whole_file(path) as f:
            f.write("half")
            raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == before and list(path.parent.iterdir()) == [path]


def test_identity_tells_files_and_folders_apart(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    folder, one = records.identity(tmp_path), records.identity(tmp_path / "a")
    assert one != records.identity(tmp_path / "b") != folder and folder == records.identity(str(tmp_path))
    (tmp_path / "b").write_text("1")
    assert records.identity(tmp_path / "b") == one and records.identity(tmp_path) != folder


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.write_json(path, {"a": 1})
    monkeypatch.setattr(records.os, "fsync", lambda _: faulty.full())
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        records.write_json(path, {"b": 2})
    assert records.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="is a folder: name a file"):
        records.write_text(tmp_path, "")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    records.lock(tmp_path)
    told = f"warning: {tmp_path / '.lock'} cannot be locked ([Errno 95] Operation not supported): see that no"
    assert capsys.readouterr().out.startswith(told)


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")  # opened to write alone, it would wait for a reader
    command = f"import records; records.cli(lambda: records.lock({str(tmp_path)!r}))"
    command = [sys.executable, "-c", command]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: File or stream is not seekable.\n")


def test_library_errors_about_files_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        records.cli(lambda: save_file({"a": torch.zeros(2)}, "/none/such"))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: Error while serializing: I/O ")


def test_an_error_shows_no_control_character(capsys):
    def bad():
        raise InputError("turn \x1b]0;x\x07\x9b2J_1: bad")

    with pytest.raises(SystemExit):
        records.cli(bad)
    assert capsys.readouterr().err == "error: turn \ufffd]0;x\ufffd\ufffd2J_1: bad\n"


def test_an_error_does_not_stand_amid_a_progress_bar(capsys, monkeypatch):
    """One line and exit code 2; other ranks of a node say it later, when torchrun should have ended them."""
    def main():
        bar = tqdm(total=3, desc="work")  # held by its name while the error passes
        bar.update()
        raise InputError("bad")

    def lost():
        raise RuntimeError("[pair.cc] Connection closed by peer [::1]:9")

    waits = []
    monkeypatch.setattr(records.time, "sleep", waits.append)
    for rank, work, said in (("0", main, "\nerror: bad\n"), ("1", main, "\nerror: bad\n"),
                             ("1", lost, "error: another process of this run has ended, for the reason")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            records.cli(work)
        text = capsys.readouterr().err
        assert end.value.code == 2 and said in text and text.count("\n") == 1 + (work == main)
    assert waits == [0, 2, 7]
    with pytest.raises(RuntimeError, match="a bug"):
        records.cli(lambda: exec('raise RuntimeError("a bug")'))


def test_ctrl_c_is_one_line_also_while_a_rank_waits(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def bad():
        raise InputError("bad")

    monkeypatch.setattr(records.time, "sleep", interrupted)
    for work in interrupted, bad:
        with pytest.raises(SystemExit) as end:
            records.cli(work)
        assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted: started again, ")


def test_what_needs_no_torch_loads_none():
    code = ("import sys, records, config, lexicon, reward, metrics\n"
            "print([name for name in sys.modules if 'torch' in name])")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("streams", ["", ">&-"])
def test_a_terminal_that_is_not_utf8_or_is_closed_costs_no_work(tmp_path, streams):
    script = "import records, tqdm; records.cli(lambda: [print(chr(0x54b3)) for _ in tqdm.tqdm([1])])"
    line = f"PYTHONIOENCODING=latin-1 {sys.executable} -c '{script}' {streams}"
    done = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr
    assert done.stdout == ("" if streams.startswith(">") else "\\u54b3\n")


def test_a_reader_that_stops_reading_ends_a_script_quietly():
    """`--help | head` and the like: no traceback, and no exit code of success for what was not printed."""
    script = "import records; records.cli(lambda: print(list(range(10 ** 5))))"
    line = f"{sys.executable} -c '{script}' | head -c 9; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True)
    assert (done.returncode, len(done.stdout), done.stderr) == (141, 9, b"")
