"""The metrics: by hand, against the paper's Table 2, their intervals, and the command line."""
import doctest
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
import eval as evaluation
import hindsight
from data import InputError, cli, write_jsonl

ROOT = Path(__file__).parents[1]


def rollout(truth, decision, r_a=0.0, omega=0.0, turn_id="a_1", response="q", **more):
    return {"turn_id": turn_id, "sample": 0, "response": response, "truth": truth, "decision": decision, "r_a": r_a,
            "r_s": float(truth == decision), "omega": omega, "reward": 99.0, **more}


HAND = [rollout("continue", "continue", 1.0, 1.0), rollout("continue", "continue", 0.5, 0.5, "a_2", " q "),
        rollout("continue", "continue", None, None, "a_2"), rollout("continue", "stop", 0.0, 0.0, "a_2", "<stop />"),
        rollout("stop", "stop", 1.0, 0.0, "b_1"), rollout("stop", "continue", 0.0, 1.0, "b_2")]


def test_docstring_examples():
    assert doctest.testmod(evaluation).failed == 0
    assert evaluation.score_matrix([rollout("continue", "continue", 0.5, 1.0)])[0].tolist() == pytest.approx(
        [0.5, 0, 1, math.nan, 1, 1, 3, 0.5], nan_ok=True)


def test_by_hand():
    m = evaluation.metrics(HAND)
    assert m == pytest.approx({
        "wa": 0.75, "wa_gh": 0.5, "wc": 3 / 4, "ws": 1 / 2, "aa": 4 / 6, "fc": 2.5 / 5, "wa_all": 1.5 / 3,
        "tr": (4 + 2.5 + 0 + 3 + 1) / 5,  # the stored reward (99) is not trusted; the failed one is left out, not 0
        "n": 6, "failed": 1, "top_share": 3 / 4, "distinct": 2})


def test_failed_grading_with_a_known_omega():
    m = evaluation.metrics([rollout("continue", "continue", None, 0.5), rollout("continue", "continue", 1.0, 1.0)])
    assert (m["wa"], m["fc"], m["tr"], m["failed"], m["wc"]) == (1.0, 0.75, 4.0, 1, 1.0)


@pytest.mark.parametrize("graded, none", [
    ([], ["wa", "wa_gh", "wc", "ws", "aa", "fc", "tr", "wa_all", "top_share"]),
    ([rollout("stop", "stop", 1.0, 1.0)], ["wa", "wa_gh", "wc", "wa_all", "top_share"]),
    ([rollout("continue", "stop")], ["wa", "wa_gh", "ws"]),
    ([rollout("continue", "continue", None, None)], ["wa", "wa_gh", "ws", "fc", "tr", "wa_all"])])
def test_empty_denominators_are_none(graded, none, recwarn):
    m, ci = evaluation.metrics(graded), evaluation.intervals(graded, n_boot=50)
    assert [k for k, v in m.items() if v is None] == [k for k in m if k in none]
    assert [k for k, v in ci.items() if v is None] == [k for k in ci if k in none]
    assert not recwarn.list and m["n"] == len(graded)


TABLE_2 = {  # WA WA-GH WC WS AA FC TR
    "7B base": (.501, .132, .975, .155, .751, .629, 2.174), "7B original": (.665, .413, .944, .926, .939, .915, 3.272),
    "7B optimized": (.641, .399, .949, .910, .938, .894, 3.214),
    "32B base": (.503, .134, .915, .521, .807, .670, 2.431),
    "32B original": (.640, .365, .933, .877, .918, .880, 3.145),
    "32B optimized": (.634, .366, .925, .916, .923, .889, 3.166)}


@pytest.mark.parametrize("row", TABLE_2)
def test_table_2_follows_from_the_definitions(row):
    """Rollouts with the row's WA, WA-GH, WC, WS and FC have its AA and TR, with p = 0.727 truth-continue turns."""
    wa, gh, wc, ws, aa, fc, tr = TABLE_2[row]
    n = 20_000
    asked, quiet = round(0.727 * n), n - round(0.727 * n)
    right, stopped = round(wc * asked), round(ws * quiet)
    ones, halves = round(gh * right), round(2 * (wa - gh) * right)
    r_a = [1.0] * ones + [0.5] * halves + [0.0] * (right - ones - halves)
    graded = [rollout("continue", "continue", a) for a in r_a] + [rollout("continue", "stop")] * (asked - right)
    graded += [rollout("stop", "stop", 1.0)] * stopped + [rollout("stop", "continue")] * (quiet - stopped)
    good = [i for i, g in enumerate(graded) if g["r_s"]]
    for i in good[:round(fc * n)]:  # Omega is 0 on a wrong decision, so FC cannot exceed AA
        graded[i] = {**graded[i], "omega": 1.0}
    assert round(fc * n) <= len(good)
    m = evaluation.metrics(graded)
    given = dict(zip(("wa", "wa_gh", "wc", "ws", "fc"), (wa, gh, wc, ws, fc)))
    assert {k: m[k] for k in given} == pytest.approx(given, abs=2e-4)
    assert m["aa"] == pytest.approx(aa, abs=0.002) and m["tr"] == pytest.approx(tr, abs=0.002)
    assert m["wa_all"] == pytest.approx(wa * wc, abs=3e-4)


def test_intervals_are_resampled_by_session():
    rng = random.Random(0)
    graded = []
    for s in range(60):  # sessions that are all right or all wrong: 10 turns tell no more than one
        said, r_a = rng.choice([("stop", 1.0), ("continue", 0.0)])
        graded += [rollout("stop", said, r_a, turn_id=f"x_{s}_{t}") for t in range(10)]
    aa = evaluation.metrics(graded)["aa"]
    low, high = evaluation.intervals(graded)["aa"]
    by_session = 2 * 1.96 * math.sqrt(aa * (1 - aa) / 60)
    assert low < aa < high and high - low == pytest.approx(by_session, rel=0.15)  # by turn: a third of that
    assert evaluation.intervals(graded) == evaluation.intervals(graded) != evaluation.intervals(graded, seed=1)
    assert evaluation.intervals(graded[:10], n_boot=20)["aa"] == [graded[0]["r_s"]] * 2  # one session: no spread


def test_intervals_agree_with_a_plain_loop():
    rng = random.Random(1)
    graded = [rollout("continue", "continue", rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 1.0]), f"{s}_{t}")
              for s in range(30) for t in range(rng.randint(1, 8))]
    sessions = {}
    for g in graded:
        sessions.setdefault(g["turn_id"].split("_")[0], []).append(g["r_a"])
    draws = []
    for _ in range(2000):
        drawn = [a for s in rng.choices(list(sessions), k=30) for a in sessions[s]]
        draws.append(sum(drawn) / len(drawn))
    draws.sort()
    assert evaluation.intervals(graded)["wa"] == pytest.approx([draws[50], draws[1949]], abs=0.015)


def test_table_is_aligned_markdown():
    lines = evaluation.table({"base": evaluation.metrics(HAND), "a longer name": evaluation.metrics([])}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:8] == ["WA", "WA-GH", "WC", "WS", "AA", "FC", "TR"]
    assert cells[2][:4] == ["base", "0.750", "0.500", "0.750"] and cells[3][1] == "-"


# ------------------------------------------------------------------------------------------------ command line

def test_graded_file_gives_the_table_and_one_json_line(tmp_path):
    path = tmp_path / "graded.jsonl"
    path.write_text("\n".join(map(json.dumps, HAND)), encoding="utf-8")
    done = subprocess.run([sys.executable, "eval.py", "--graded", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    assert shown[0].split()[2:10] == ["WA", "|", "WA-GH", "|", "WC", "|", "WS", "|"] and "0.750" in shown[2]
    last = json.loads(last)
    intervals = last.pop("intervals")
    assert last == evaluation.metrics(HAND) and intervals == evaluation.intervals(HAND)


@pytest.mark.parametrize("change, says", [
    ({"r_a": "1"}, "r_a must be a number from 0 to 1, not '1'"), ({"r_a": math.nan}, "r_a must be a number"),
    ({"r_a": True}, "r_a must be a number"), ({"omega": 2}, "omega must be a number"),
    ({"r_s": None}, "r_s must be a number"),
    ({"r_s": 0.0}, "r_s is 0.0 though truth"), ({"truth": "go"}, "truth 'go'"), ({"decision": None}, "decision None"),
    ({"turn_id": 3}, "'turn_id' is missing"), ({"response": None}, "'response' is missing"),
    ({"truth": "stop", "decision": "stop", "r_a": None}, "r_a is null, which only")])
def test_a_bad_line_names_file_and_line(tmp_path, change, says):
    path = tmp_path / "graded.jsonl"
    good = rollout("continue", "continue", 1.0, 1.0)
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(InputError) as error:
        evaluation.load_graded(path)
    assert str(error.value).startswith(f"{path}:2: ") and says in str(error.value)


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text("{}\n{")
    for name, says in (("none", "no such file"), ("empty.jsonl", "no graded"), ("bad.jsonl", "bad.jsonl:1: 'turn_id'")):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--graded", str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            cli(evaluation.main)
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and says in err and err.count("\n") == 1 and not out


# ------------------------------------------------------------------------------------------- a model's figures, and runs

LEXICON = """
goal: advise
yes: ["yes"]
no: ["no"]
openers: [how]
generic_questions: ["else"]
attributes: {duration: {asks: ["how long"], values: {two days: ["two days"]}}}
complaints: {cough: {cues: ["cough"], attributes: [duration]}}
"""


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    """A run folder with three turns of two sessions, its config's arguments, and no training yet."""
    (tmp_path / "lexicon.yaml").write_text(LEXICON)
    opening = {"role": "user", "content": "a cough"}
    told = [opening, {"role": "assistant", "content": "How long?"}, {"role": "user", "content": "two days"}]
    turns = [{"turn_id": f"{s}_{i}", "session_id": s, "goal": "advise", "context": c, "expert": None, "target": t, "decision": d}
             for s, i, c, t, d in (("a", 1, [opening], ["duration: two days"], "continue"), ("a", 2, told, [], "stop"),
                                   ("b", 1, [opening], ["duration: two days"], "continue"))]
    write_jsonl(tmp_path / "run" / "turns" / "eval.jsonl", turns)
    config = tmp_path / "cfg.yaml"
    config.write_text("rollout: {max_new_tokens: 4, max_rows: 8}\neval: {samples: 3, temperature: 0.7, top_p: 0.9}\n")
    return tmp_path / "run", [str(config), f"run_dir={tmp_path / 'run'}", f"model.path={tiny_checkpoint}",
                              f"data.lexicon={tmp_path / 'lexicon.yaml'}"]


def call(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, argv)])
    evaluation.main()


def test_a_run_that_never_trained_is_its_base_model(run, monkeypatch, capsys, tiny_checkpoint):
    folder, args = run
    call(monkeypatch, *args)
    shown = capsys.readouterr().out
    assert "temperature 0.7, top-p 0.9" in shown and "greedy" in shown and "95% from" in shown
    result = json.loads((folder / "eval.json").read_text())
    graded = evaluation.load_graded(folder / "graded.jsonl")
    assert result["model"] == str(tiny_checkpoint) and result["n"] == len(graded) == 9 and result["greedy"]["n"] == 3
    assert [(g["turn_id"], g["sample"]) for g in graded] == [(t, s) for t in ("a_1", "a_2", "b_1") for s in range(3)]
    assert {k: result[k] for k in evaluation.metrics(graded)} == evaluation.metrics(graded)
    assert len({g["response"] for g in graded if g["turn_id"] == "a_1"}) == 3  # samples differ from each other ...
    twins = [[g["response"] for g in graded if g["turn_id"] == t] for t in ("a_1", "b_1")]
    assert twins[0] != twins[1]  # ... and from those of another turn with the same prompt
    before = (folder / "graded.jsonl").read_bytes()
    call(monkeypatch, *args)
    assert (folder / "graded.jsonl").read_bytes() == before  # the same noise again


def test_the_export_is_evaluated_where_there_is_one(run, monkeypatch, make_checkpoint):
    folder, args = run
    (folder / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="has not come to its end"):
        call(monkeypatch, *args)
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="has not come to its end"):
        call(monkeypatch, *args)
    shutil.copytree(make_checkpoint("qwen2", seed=5), folder / "export")
    os.utime(folder / "export")
    call(monkeypatch, *args)
    assert json.loads((folder / "eval.json").read_text())["model"] == str(folder / "export")
    os.utime(folder / "checkpoints" / "step_000002", (2e9, 2e9))  # training went on after that export
    with pytest.raises(InputError, match="has not come to its end"):
        call(monkeypatch, *args)


def test_runs_side_by_side_with_conversations(run, monkeypatch, capsys):
    folder, args = run
    call(monkeypatch, *args)
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    capsys.readouterr()
    call(monkeypatch, "--table", folder, other)
    (folder.parent / "table.json").rename(folder.parent / "renamed.json")  # a glob names files beside the runs: no runs
    capsys.readouterr()
    call(monkeypatch, "--table", folder, other, folder.parent / "renamed.json", "--sessions", 1)
    shown = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| **")]
    assert rows == ["**run**", "**other**"] * 2 and "Sampled (temperature 0.7, top-p 0.9)" in shown
    assert shown.count("session a") == 1 and "session b" not in shown
    assert shown.index("user   | a cough") < shown.index("expert | How long?") < shown.index("user   | two days")
    assert shown.count("           run: ") == shown.count("           other: ") == 2
    with pytest.raises(InputError, match="nowhere/eval.json does not exist"):
        call(monkeypatch, "--table", "nowhere")


def test_evaluation_needs_turns(run, monkeypatch):
    folder, args = run
    shutil.rmtree(folder / "turns")
    with pytest.raises(InputError, match="run hindsight.py with this config first"):
        call(monkeypatch, *args)


def test_evaluation_does_not_depend_on_the_training_reward(run, monkeypatch):
    folder, args = run
    call(monkeypatch, *args)
    plain = (folder / "graded.jsonl").read_bytes()
    call(monkeypatch, *args, "reward.mode=no_rs", "reward.beta=7", "reward.omega_when_wrong=score")
    assert (folder / "graded.jsonl").read_bytes() == plain


def test_turns_made_with_another_config_are_refused(run, monkeypatch):
    folder, args = run
    made = hindsight.made_with(config.load([*args, "hindsight.stop_rule=last_turn"]))
    write_jsonl(folder / "turns" / "made.json", [made])
    with pytest.raises(InputError, match="hindsight.stop_rule='last_turn', this config has 'paper'"):
        call(monkeypatch, *args)
    call(monkeypatch, *args, "hindsight.stop_rule=last_turn")
