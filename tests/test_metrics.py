"""The metrics: by hand, against the paper's Table 2, intervals, paired differences, files of rollouts."""
import math
import random

import numpy as np
import pytest

import metrics
from metrics import MEANS, intervals, paired
from records import InputError, Rollout
from world import write_lines


def rollout(truth, decision, r_a=0.0, omega=0.0, turn_id="a_1", response="q"):
    return Rollout(turn_id=turn_id, sample=0, response=response, truth=truth, decision=decision, r_a=r_a,
                   r_s=float(truth == decision), omega=omega, reward=99.0)


def asked(r_a, omega=1.0, turn_id="a_1"):
    """A question at a turn whose truth is continue."""
    return rollout("continue", "continue", r_a, omega, turn_id)


HAND = [asked(1.0), rollout("continue", "continue", 0.5, 0.5, "a_2", " q "), asked(None, None, "a_2"),
        rollout("continue", "stop", 0.0, 0.0, "a_2", "<stop />"), rollout("stop", "stop", 1.0, 0.0, "b_1"),
        rollout("stop", "continue", 0.0, 1.0, "b_2")]


def test_by_hand():
    row = metrics.score_matrix([asked(0.5)])[0].tolist()
    assert row == pytest.approx([0.5, 0, 1, math.nan, 1, 1, 3, 0.5], nan_ok=True)
    assert metrics.metrics(HAND) == pytest.approx({
        "wa": 0.75, "wa_gh": 0.5, "wc": 3 / 4, "ws": 1 / 2, "aa": 4 / 6, "fc": 2.5 / 5, "wa_all": 1.5 / 3,
        "tr": (4 + 2.5 + 0 + 3 + 1) / 5,  # the stored reward (99) is not trusted; the failed one is left out
        "n": 6, "failed": 1, "top_share": 3 / 4, "distinct": 2})


def test_failed_grading_with_a_known_omega():
    m = metrics.metrics([asked(None, 0.5), asked(1.0)])
    assert (m["wa"], m["fc"], m["tr"], m["failed"], m["wc"]) == (1.0, 0.75, 4.0, 1, 1.0)


@pytest.mark.parametrize("graded, none", [
    ([], {*MEANS, "top_share"}),
    ([rollout("stop", "stop", 1.0, 1.0)], {"wa", "wa_gh", "wc", "wa_all", "top_share"}),
    ([rollout("continue", "stop")], {"wa", "wa_gh", "ws"}),
    ([asked(None, None)], {"wa", "wa_gh", "ws", "fc", "tr", "wa_all"})])
def test_empty_denominators_are_none(graded, none, recwarn):
    m = metrics.metrics(graded)
    assert {k for k, v in m.items() if v is None} == none
    if graded:
        assert {k for k, v in intervals(graded).items() if v is None} == none - {"top_share"}
    assert not recwarn.list and m["n"] == len(graded)


def weighted_kappa(pairs):
    """Cohen 1968 as written there: from the 3 x 3 table of scores, its margins, and the weights (i - j)^2."""
    observed = np.zeros((3, 3))
    for a, b in pairs:
        observed[int(2 * a), int(2 * b)] += 1 / len(pairs)
    chance = np.outer(observed.sum(1), observed.sum(0))
    weights = np.subtract.outer(np.arange(3), np.arange(3)) ** 2
    return 1 - (weights * observed).sum() / (weights * chance).sum()


def test_agreement_by_hand():
    """Pairs (0, 0), (0.5, 1), (1, 1), (1, 0.5). In units of 0.25: observed (0 + 1 + 0 + 1) / 4 = 8 / 16,
    by chance, with margins 1, 1, 2 of four, (1 * 1 + 4 * 2 + 1 * 2) * 2 / 16 = 22 / 16."""
    pairs = [(0, 0), (0.5, 1), (1, 1), (1, 0.5), (1, None), (None, 0.5), (None, None)]
    assert metrics.agreement(pairs) == pytest.approx({
        "audit_n": 4, "audit_failed": 2, "audit_kappa": 7 / 11, "audit_error": 0.125})


def test_agreement_is_the_weighted_kappa():
    rng = random.Random(0)
    for _ in range(50):
        pairs = [(rng.choice((0, 0.5, 1)), rng.choice((0, 0.5, 0.5, 1))) for _ in range(rng.randint(4, 40))]
        pairs += [(0, 1)]  # not all alike
        found = metrics.agreement(pairs)
        assert found["audit_kappa"] == pytest.approx(weighted_kappa(pairs))
        assert found["audit_error"] == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("pairs, kappa, error", [
    ([(0, 0), (1, 1)], 1, 0), ([(0, 1), (1, 0)], -1, 1), ([(0.5, 0), (0.5, 1), (0.5, 0)], 0, 0.25),
    ([(0.5, 0.5)] * 7, None, 0), ([(0, 1)] * 3, 0, 1), ([(0, 1)], None, None), ([(0, None)] * 2, None, None)])
def test_the_ends_of_agreement(pairs, kappa, error, recwarn):
    """Full, reversed, by chance alone; undefined where all is one score, or where there is no second pair."""
    found = metrics.agreement(pairs)
    assert (found["audit_kappa"], found["audit_error"]) == (kappa, error) and not recwarn.list


def test_metrics_tell_of_an_audit_where_there_was_one():
    audited = [g.model_copy(update={"audit": x}) for g, x in zip(HAND[:2], (0.5, None))]
    m, plain = metrics.metrics(audited + HAND[2:]), metrics.metrics(HAND)
    assert (m["audit_n"], m["audit_failed"]) == (1, 1)
    assert plain == {name: value for name, value in m.items() if not name.startswith("audit_")}


TABLE_2 = """
7B  base       WA .501  WA-GH .132  WC .975  WS .155  AA .751  FC .629  TR 2.174
7B  original   WA .665  WA-GH .413  WC .944  WS .926  AA .939  FC .915  TR 3.272
7B  optimized  WA .641  WA-GH .399  WC .949  WS .910  AA .938  FC .894  TR 3.214
32B base       WA .503  WA-GH .134  WC .915  WS .521  AA .807  FC .670  TR 2.431
32B original   WA .640  WA-GH .365  WC .933  WS .877  AA .918  FC .880  TR 3.145
32B optimized  WA .634  WA-GH .366  WC .925  WS .916  AA .923  FC .889  TR 3.166
"""


@pytest.mark.parametrize("row", TABLE_2.strip().splitlines())
def test_table_2_follows_from_the_definitions(row):
    """Rollouts with the row's WA, WA-GH, WC, WS and FC have its AA and TR, with p = 0.727 continue turns."""
    wa, gh, wc, ws, aa, fc, tr = map(float, row.split()[3::2])
    n = 20_000
    asks = round(0.727 * n)
    quiet = n - asks
    right, stopped = round(wc * asks), round(ws * quiet)
    ones, halves = round(gh * right), round(2 * (wa - gh) * right)
    good = [asked(1.0, 0.0)] * ones + [asked(0.5, 0.0)] * halves + [asked(0.0, 0.0)] * (right - ones - halves)
    good += [rollout("stop", "stop", 1.0)] * stopped
    wrong = [rollout("continue", "stop")] * (asks - right) + [rollout("stop", "continue")] * (quiet - stopped)
    formed = round(fc * n)
    assert formed <= len(good)  # Omega is 0 on a wrong decision, so FC cannot exceed AA
    graded = [g.model_copy(update={"omega": 1.0}) for g in good[:formed]] + good[formed:] + wrong
    m = metrics.metrics(graded)
    given = {"wa": wa, "wa_gh": gh, "wc": wc, "ws": ws, "fc": fc}
    assert {k: m[k] for k in given} == pytest.approx(given, abs=2e-4)
    assert (m["aa"], m["tr"]) == pytest.approx((aa, tr), abs=0.002)
    assert m["wa_all"] == pytest.approx(wa * wc, abs=3e-4)


# -------------------------------------------------------------------------------------------------- intervals

def test_intervals_are_resampled_by_session():
    rng, graded = random.Random(0), []
    for s in range(60):  # sessions that are all right or all wrong: 10 turns tell no more than one
        said, r_a = rng.choice([("stop", 1.0), ("continue", 0.0)])
        graded += [rollout("stop", said, r_a, turn_id=f"x_{s}_{t}") for t in range(10)]
    aa = metrics.metrics(graded)["aa"]
    low, high = intervals(graded)["aa"]
    by_session = 2 * 1.96 * math.sqrt(aa * (1 - aa) / 60)
    assert low < aa < high and high - low == pytest.approx(by_session, rel=0.15)  # by turn: a third of that
    assert intervals(graded) == intervals(graded)
    assert intervals(graded[:10])["aa"] == [graded[0].r_s] * 2  # one session: no spread


@pytest.mark.parametrize("turn_ids, named, sessions", [
    ("t1 t2 t3", "a a b", "a b"), ("a_1 a_2 b_1", "x y y", "x y"),
    ("a_1 a_b_2 a_b_3", "", "a a_b"), ("t1 t2 t3", "", "t1 t2 t3")])
def test_the_sessions_of_rollouts(turn_ids, named, sessions):
    """Where a file does not name them, what stands before the turn id's last "_", or each turn is its own."""
    graded = [asked(1.0, turn_id=turn) for turn in turn_ids.split()]
    for g, session in zip(graded, named.split()):
        g.session_id = session
    assert list(metrics.by_session(graded)[0]) == sessions.split()


def test_intervals_agree_with_a_plain_loop():
    rng, sessions = random.Random(1), []
    for s in range(30):
        sessions.append([asked(rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 1.0]), f"{s}_{t}")
                         for t in range(rng.randint(1, 8))])
    draws = []
    for _ in range(2000):
        drawn = [g.r_a for session in rng.choices(sessions, k=30) for g in session]
        draws.append(sum(drawn) / len(drawn))
    draws.sort()
    assert intervals(sum(sessions, []))["wa"] == pytest.approx([draws[50], draws[1949]], abs=0.015)


def sessions_of(scores):
    """{session: [R_a of its turns, all right questions]} -> list of Rollout."""
    return [asked(r_a, turn_id=f"{session}_{i}") for session, values in scores.items()
            for i, r_a in enumerate(values)]


def test_paired_by_hand():
    """Two sessions of one turn: a draw holds them 2-0, 1-1 or 0-2 times, so the difference is 1, 0.5 or 0."""
    a, b = sessions_of({"s": [1.0], "t": [0.5]}), sessions_of({"s": [0.0], "t": [0.5]})
    assert paired(a, b, "wa") == {"difference": 0.5, "interval": [0.0, 1.0], "verdict": "undecided"}
    assert paired(b, a, "wa") == {"difference": -0.5, "interval": [-1.0, 0.0], "verdict": "undecided"}
    assert paired(a, b, "tr")["difference"] == pytest.approx(1.0)  # TR counts R_a twice
    assert paired(a, a, "wa")["interval"] == [0.0, 0.0]


def test_paired_uses_the_sessions_both_have():
    a = sessions_of({"s": [1.0], "t": [0.0], "only a": [0.0]})
    b = sessions_of({"only b": [1.0], "t": [0.5], "s": [1.0]})
    assert paired(a, b, "wa") == {"difference": -0.25, "interval": [-0.5, 0.0], "verdict": "undecided"}
    assert paired(a, sessions_of({"u": [1.0]}), "wa") is None
    assert paired(a, b, "ws") is None  # no stop turn anywhere


def test_paired_is_narrower_than_two_intervals():
    """Easy and hard sessions move both rows alike: the pairing takes that out."""
    rng = random.Random(0)
    a = {f"s{i}": [float(i % 2)] * 3 for i in range(100)}
    b = {s: [rng.choice([v, v, v, 0.5]) for v in values] for s, values in a.items()}
    found = paired(sessions_of(a), sessions_of(b), "wa")
    (low, high), one = found["interval"], intervals(sessions_of(a))["wa"]
    assert low < found["difference"] < high and high - low < 0.5 * (one[1] - one[0])
    assert found["difference"] == pytest.approx(np.mean([np.mean(a[s]) - np.mean(b[s]) for s in a]))


def test_paired_interval_is_95_percent():
    """400 sessions that differ by 0 or 1: the mean of a draw is normal, so the interval is 2 x 1.96 standard
    errors."""
    rng = random.Random(1)
    a = {f"s{i}": [float(rng.random() < 0.5)] for i in range(400)}
    found = paired(sessions_of(a), sessions_of(dict.fromkeys(a, [0.0])), "wa")
    low, high = found["interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.std(list(a.values())) / 20, rel=0.05)
    assert found["verdict"] == "holds"


@pytest.mark.parametrize("low, high, text", [
    (0.01, 0.2, "holds"), (-0.2, -0.01, "the reverse"), (-0.1, 0.1, "undecided"), (0.0, 0.1, "undecided"),
    (-0.1, 0.0, "undecided")])
def test_verdict(low, high, text):
    assert metrics.verdict(low, high) == text


# ------------------------------------------------------------------------------------------- tables and files

def test_table_is_aligned_markdown():
    summary = metrics.summarise(HAND)
    lines = metrics.table("base", summary, {"a longer name": metrics.metrics([])}).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6
    head, _, base, low, high, longer = (line.replace(" ", "") for line in lines)
    assert head.startswith("||WA|WA-GH|WC|WS|AA|FC|TR|")
    assert base.startswith("|base|0.750|0.500|0.750|") and longer.startswith("|alongername|-|")
    ends = summary["intervals"]["tr"]
    assert ends[0] < summary["tr"] < ends[1]
    assert [row.split("|")[1:9:7] for row in (low, high)] == [
        ["95%from", f"{ends[0]:.3f}"], ["95%to", f"{ends[1]:.3f}"]]


@pytest.mark.parametrize("change, says", [
    ({"r_a": "1"}, "r_a must be a number, not '1'"),
    ({"r_a": math.nan}, "r_a must be"),
    ({"r_a": True}, "r_a must be a number, not True"),
    ({"omega": 2}, "omega must be at most 1, not 2"),
    ({"r_s": None}, "r_s must be a number, not None"),
    ({"r_s": 0.0}, "r_s is 0.0, but truth"),
    ({"truth": "go"}, "truth must be 'continue' or 'stop', not 'go'"),
    ({"decision": None}, "decision must be 'continue' or 'stop', not None"),
    ({"turn_id": 3}, "turn_id must be a text, not 3"),
    ({"response": None}, "response must be a text, not None"),
    ({"truth": "stop", "decision": "stop", "r_a": None}, "r_a is null, but truth")])
def test_a_bad_line_names_file_and_line(tmp_path, change, says):
    good = asked(1.0).dump()
    path = write_lines(tmp_path / "graded.jsonl", [good, {**good, **change}])
    with pytest.raises(InputError) as error:
        metrics.load_graded(path)
    assert str(error.value).startswith(f"{path}:2: {says}")
