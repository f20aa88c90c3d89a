"""hindsight.py with a language model as extractor: behind a server that works, fails or dies, and locally."""
import logging
import re
import sqlite3
import subprocess
import sys
import time

import pytest

import config
import hindsight
import llm
from asking import turns_of, write_config, write_logs
from prompts import turns_file
from records import InputError, Session, Turn
from toy import world
from world import REPO, make_config, read_lines, write_lines

pytestmark = pytest.mark.usefixtures("client")
FAULTS = "429", "500", "drop", "cut", "prose", "types", "range", "empty", "html", "nojson", "list"


@pytest.fixture
def build(capsys):
    """build(config, *overrides) -> what hindsight.py says"""
    def build(path, *overrides):
        capsys.readouterr()
        hindsight.main([str(path), *overrides])
        return capsys.readouterr().out

    return build


def numbers(pattern, text):
    """All whole numbers that a pattern finds."""
    return [int(n) for n in re.findall(pattern, text)]


@pytest.mark.slow
def test_the_extractor_makes_the_turns_of_the_rules(tmp_path, lexicon_file, build, serve):
    """On toy sessions, with replies out of order: the same files to the letter."""
    logs, held = write_logs(tmp_path, 300), write_logs(tmp_path, 40, "test")
    how = dict(data__eval_logs=str(held), data__valid_sessions=30, hindsight__end_markers=["I see."])
    server = serve(delay=(0, 0.02))
    path, rules = (write_config(tmp_path, lexicon_file, server.url, logs, source,
                                hindsight__source=source, **how) for source in ("llm", "rules"))
    told = build(path)
    every = r"extractor: (\d+) asks: \1 answered, 0 with unusable replies, 0 unanswered; \1 calls"
    assert re.search(every, told), told
    assert "extractor: " not in build(rules)
    turns = turns_of(path)
    assert turns == turns_of(rules) and set(turns) == {"train.jsonl", "valid.jsonl", "eval.jsonl"}
    assert 300 < server.requests < 340 and 4 < server.most <= 64  # sessions set aside are never asked for


@pytest.mark.slow
def test_faults_lose_no_turn(tmp_path, lexicon_file, build, serve):
    """30% of the requests go wrong: every point is a turn, dropped as before, or counted as failed."""
    logs = write_logs(tmp_path, 150)
    server = serve()
    clean = write_config(tmp_path, lexicon_file, server.url, logs, "clean")
    told_clean = build(clean)
    server.faults, server.kinds = 0.3, FAULTS
    how = dict(llm__extractor__retries=1, llm__extractor__concurrency=16, hindsight__max_failed=1.0)
    faulty = write_config(tmp_path, lexicon_file, server.url, logs, "faulty", **how)
    told = build(faulty)
    old, new = (read_lines(tmp_path / name / "turns" / "train.jsonl") for name in ("clean", "faulty"))
    ids = {turn["turn_id"] for turn in new}
    assert new == [turn for turn in old if turn["turn_id"] in ids] and 0 < len(new) < len(old)
    failed, = numbers(r"sessions set aside: (\d+) no usable extraction", told)
    used = [numbers(r"(\d+) sessions used", text)[0] for text in (told_clean, told)]
    assert used[0] == used[1] + failed
    asks, answered, invalid, unanswered = map(int, re.search(
        r"extractor: (\d+) asks: (\d+) answered, (\d+) with unusable replies, (\d+) unanswered",
        told).groups())
    assert asks == answered + invalid + unanswered and invalid > 0 and unanswered > 0
    assert failed == invalid + unanswered and len(ids) == len(new)
    assert len({turn["session_id"] for turn in new}) == answered
    server.faults = 0.0
    told = build(faulty)  # the server is well again: what was not answered is asked once more
    assert numbers(r"; (\d+) calls", told) == [unanswered + invalid]
    assert turns_of(faulty) == turns_of(clean)


@pytest.mark.parametrize("failed", [2, 3])
def test_too_many_failed_extractions_write_nothing(tmp_path, lexicon_file, build, serve, failed):
    """hindsight.max_failed is 0.2, of ten sessions."""
    rows = [row for i in range(30) if (row := world.session(1, "train", i)).get("success") is not False]
    path = write_config(tmp_path, lexicon_file, serve(script=["500"] * failed).url,
                        write_lines(tmp_path / "logs.jsonl", rows[:10]),
                        llm__extractor__concurrency=1, llm__extractor__retries=0)
    if failed == 3:
        with pytest.raises(InputError, match="for 3 of 10 sessions, over hindsight.max_failed=0.2"):
            build(path)
        assert not turns_of(path)
    told = build(path)  # failed ones are asked again
    assert "sessions set aside: 2 no usable extraction" in told or "10 sessions used" in told and failed == 3


@pytest.mark.slow
def test_kill_and_rerun_ask_nothing_twice(tmp_path, lexicon_file, build, serve):
    logs = write_logs(tmp_path, 200)
    server = serve(delay=(0.005, 0.02))
    path = write_config(tmp_path, lexicon_file, server.url, logs, llm__extractor__concurrency=8)
    run = subprocess.Popen([sys.executable, "hindsight.py", str(path)], cwd=REPO, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while len(server.answered) < 70:
        assert run.poll() is None and time.time() < deadline, run.communicate()[0][-2000:]
        time.sleep(0.002)
    run.kill()
    run.wait()
    time.sleep(0.1)  # replies still under way end
    with sqlite3.connect(tmp_path / "run" / "llm_cache.sqlite") as db:
        kept, = db.execute("SELECT count(*) FROM reply").fetchone()
    before, turns = server.requests, tmp_path / "run" / "turns" / "train.jsonl"
    assert before - 8 <= kept <= before < 150 and not turns.exists()
    build(path)
    assert server.requests == before + len(server.answered) - kept
    # only what was on its way when it was killed is asked twice
    assert max(server.answered.values()) <= 2
    assert sum(n > 1 for n in server.answered.values()) == before - kept
    rules = write_config(tmp_path, lexicon_file, "", logs, "rules", hindsight__source="rules")
    build(rules)
    assert turns_of(path) == turns_of(rules)


def test_the_window_is_bounded(tmp_path, lexicon_file, serve):
    """Never more than 4 x concurrency sessions are read ahead, however slow the first reply is."""
    session, read = Session.model_validate(world.session(1, "train", 0)), []

    def sessions():
        for i in range(60):
            read.append(i)
            yield session

    server = serve(delay=(0.005, 0.01))
    path = write_config(tmp_path, lexicon_file, server.url, "", llm__extractor__concurrency=3)
    extractor = hindsight.Extractor(config.load([str(path)]))
    ahead = [len(read) - n for n, _ in enumerate(extractor.read(sessions()))]
    assert server.most <= 3
    assert len(ahead) == 60 and 8 <= max(ahead) <= 12


@pytest.mark.slow
def test_self_check(tmp_path, lexicon_file, build, serve):
    """Three extractions with other seeds; the turns are the first one's, the agreement of all three is
    written and reported."""
    logs = write_logs(tmp_path, 60)
    server = serve(noise=0.15)
    path = write_config(tmp_path, lexicon_file, server.url, logs, hindsight__self_check=3)
    told, folder = build(path), tmp_path / "run" / "turns"
    three, checks = turns_of(path), read_lines(folder / "self_check.jsonl")
    ids = [turn["turn_id"] for turn in read_lines(folder / "train.jsonl")]
    build(path, "hindsight.self_check=1")
    assert turns_of(path) == {"train.jsonl": three["train.jsonl"]}  # no stale self_check.jsonl
    asked, server.noise = server.requests, 0.0
    assert "mean F1 of I* 1.000" in build(path, f"llm.cache={tmp_path / 'c'}")
    assert server.requests == 2 * asked
    assert [c["turn_id"] for c in checks if c["turn_id"] in set(ids)] == ids
    assert all(len(c["decisions"]) == len(c["targets"]) <= 3 for c in checks)
    mean, alike = sum(c["f1"] for c in checks) / len(checks), sum(c["same_decision"] for c in checks)
    assert 0.3 < mean < 0.97 and 0 < alike < len(checks)
    assert f"mean F1 of I* {mean:.3f}, the same s* at {alike} of {len(checks)}" in told
    with pytest.raises(InputError, match="hindsight.self_check has no effect"):
        make_config(hindsight__self_check=3)


def test_agreement():
    def turn(name, decision, *target):
        return Turn.model_construct(turn_id=name, decision=decision, target=list(target))

    first = turn("a", "continue", "x: 1", "y: 2"), turn("b", "stop")
    second = turn("a", "continue", "x: 1"), turn("b", "continue", "z: 3")
    a, b = hindsight.agreement([first, second, second[:1]])
    assert a == {"turn_id": "a", "decisions": ["continue"] * 3, "same_decision": True,
                 "targets": [["x: 1", "y: 2"], ["x: 1"], ["x: 1"]],
                 "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}
    assert b == {"turn_id": "b", "decisions": ["stop", "continue"], "targets": [[], ["z: 3"]], "f1": 0.0,
                 "same_decision": False}
    assert list(hindsight.agreement([[turn("a", "stop")], []])) == [
        {"turn_id": "a", "decisions": ["stop"], "targets": [[]], "f1": None, "same_decision": False}]


def test_a_dead_server_keeps_the_old_turns(tmp_path, lexicon_file, monkeypatch, build, serve):
    monkeypatch.setattr(llm, "GIVE_UP", 5)
    server = serve()
    logs = write_logs(tmp_path, 30)
    path = write_config(tmp_path, lexicon_file, server.url, logs, llm__extractor__retries=0)
    build(path)
    before = turns_of(path)
    server.faults, server.kinds = 1.0, ("500",)
    with pytest.raises(InputError, match="llm.extractor.*500"):
        build(path, "llm.extractor.temperature=0.5")
    assert turns_of(path) == before and not list((tmp_path / "run" / "turns").glob(".building*"))
    assert turns_file(config.load([str(path)]), "train").is_file()  # they are still what made.json says
    with pytest.raises(InputError, match="llm.extractor.temperature=0.0, this config has 0.5"):
        turns_file(config.load([str(path), "llm.extractor.temperature=0.5"]), "train")


def test_the_key_appears_nowhere(tmp_path, lexicon_file, caplog, capfd, client, serve):
    caplog.set_level(logging.DEBUG)
    server = serve(script=["429", "500", "types", None, "401"])
    logs = write_logs(tmp_path, 3)
    path = write_config(tmp_path, lexicon_file, server.url, logs, llm__extractor__concurrency=1)
    with pytest.raises(InputError) as error:
        hindsight.main([str(path)])
    assert "401" in str(error.value) and "***" in str(error.value)
    hindsight.main([str(path)])
    told = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert client not in told and "http" in caplog.text.lower()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 4 and not [p for p in files if client.encode() in p.read_bytes()]


def test_a_local_extractor(tmp_path, tiny_checkpoint, lexicon_file, capsys):
    local = dict(source="local", model=str(tiny_checkpoint), max_tokens=5)
    path = write_config(tmp_path, lexicon_file, "", write_logs(tmp_path, 4), rollout__max_rows=8,
                        **{f"llm__extractor__{key}": value for key, value in local.items()})
    with pytest.raises(InputError, match="no usable extraction for 4 of 4 sessions"):
        hindsight.main([str(path)])
    told = capsys.readouterr().out
    assert "set aside: 4 no usable extraction" in told
    assert "4 asks: 0 answered, 4 with unusable replies, 0 unanswered" in told
    assert "8 calls (4 repairs asked for)" in told
