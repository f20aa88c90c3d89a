"""The page about a run: its numbers, what it leaves out, texts that stay texts, no request to a network."""
import json
import math
import re
import sys
from html.parser import HTMLParser
from statistics import NormalDist
from types import SimpleNamespace
from xml.etree.ElementTree import TreeBuilder

import pytest

import config
import report
from records import InputError, write_json, write_jsonl
from world import make_config

EVAL = dict(zip("wa wa_gh wc ws aa fc tr wa_all n failed".split(),
                (0.5, 0.25, 0.9, 0.125, 0.75, 0.625, 2.0, 0.4, 8, 1)))
HOSTILE = ('</script><script>alert(1)</script>', '"><img src=x onerror=alert(2)>', "</details></summary><!--",
           "a\x00\x1b[31m\x85b", "\u202eevil \u0645\u0631\u062d\u0628\u0627",
           "$title ${plotly} %{y} &lt;i&gt;", "\u54b3\U0001f912" * 3000)


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch):
    """The pages of these tests do without the 5 MB of plotly.js; monkeypatch.undo() brings them back."""
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_plotlyjs=lambda: "/* plotly.js */"))


class Parser(HTMLParser):
    """A page -> its tree of elements; a tag that does not close what is open fails the test."""

    def __init__(self, source):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []
        self.feed(source)
        self.close()
        assert self.open == ["html"]

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, dict(attrs))
        self.open.append(tag)
        if tag == "meta":
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")


def page(*runs, **how):
    source = report.write(runs, **how).read_text(encoding="utf-8")
    return Parser(source).builder.close()


def text(tree):
    return "".join(tree.itertext())


def texts(tree, path):
    return [text(found) for found in tree.findall(f".//{path}")]


def table(tree):
    return [[text(cell) for cell in row] for row in tree.findall(".//tr")]


def figures(tree):
    """{"section title": figure}, read back from the page's JSON by the place of the divs."""
    source, = texts(tree, "script[@id='figures']")
    data = json.loads(source, object_hook=lambda found: SimpleNamespace(**found))
    headings = [heading for heading in texts(tree, "h2") if heading in report.CHARTS]
    out = {}
    for heading, box in zip(headings, tree.findall(".//div[@class='charts']"), strict=True):
        for figure in box:
            out[f"{heading} {text(figure.find('h3'))}"] = data[int(figure.find("div").get("id")[4:])]
    assert len(out) == len(data)
    return out


def titles(charts, section):
    return ", ".join(key.removeprefix(section)[1:] for key in charts if key.startswith(section))


def grpo(folder, steps=40, **more):
    """A run of `steps` steps whose figures differ from key to key; evaluated at 0 and every 20 steps."""
    keys = "reward tr wa aa fc loss length clip_share entropy grad_norm".split()
    rows = [{"step": 0, "eval": EVAL}]
    for s in range(1, steps + 1):
        row = {"step": s, "lr": 1e-3 / s, **{k: i + math.sin(s * (i + 1)) for i, k in enumerate(keys)},
               "rollout_s": 1.0, "grade_s": 0.5, "train_s": 2.0, "gap_max": None, "gap_mean": None}
        if s % 2:
            row |= {"gap_max": 1e-5, "gap_mean": 1e-7}
        if s % 20 == 0:
            row |= {"eval": {**EVAL, "tr": 2 + s / 100}, "eval_s": 3.0}
        rows.append(row | more)
    write_jsonl(folder / "metrics.jsonl", rows)
    return rows


def response(turn_id, sample, text="How long?", reward=2.0):
    return {"turn_id": turn_id, "sample": sample, "response": text, "truth": "continue",
            "decision": "continue", "r_a": 0.5, "r_s": 1.0, "omega": 1.0, "reward": reward}


def turn(turn_id, decision="continue", **more):
    return {"turn_id": turn_id, "session_id": "s", "expert": "Since when?", "decision": decision,
            "known": [], "context": [{"role": "user", "content": f"words of {turn_id}"}],
            "target": ["duration: two days"] if decision == "continue" else [], **more}


def group(t, rewards):
    return {"turn": t, "graded": [response(t["turn_id"], i, reward=r) for i, r in enumerate(rewards)]}


# ---------------------------------------------------------------------------------------------- charts

def test_curves_hold_the_steps_and_their_means(tmp_path):
    rows = grpo(tmp_path)[1:]
    tree = page(tmp_path)
    charts = figures(tree)
    for title, key in zip("R TR R_a R_s Omega".split(), "reward tr wa aa fc".split()):
        figure = charts[f"Reward {title}"]
        raw, line = figure.data
        assert raw.x == line.x == list(range(1, 41)) and raw.y == [row[key] for row in rows]
        assert line.y[10] == pytest.approx(sum(raw.y[9:12]) / 3)  # 40 steps: over 3
        assert raw.opacity < 0.5 and not hasattr(line, "opacity")
        assert figure.layout.yaxis.rangemode == "tozero"
    lr, = charts["Training Learning rate"].data
    assert lr.y == [row["lr"] for row in rows]  # never smoothed
    gap = charts["Training Sampler/trainer gap"]
    assert [(t.line.dash, t.x[:2], t.y[0], t.name.split()[-1]) for t in gap.data] == [
        ("solid", [1, 3], 1e-5, "max"), ("dot", [1, 3], 1e-7, "mean")]
    assert gap.layout.yaxis.type == "log"
    assert "over 3 steps" in texts(tree, "p")[0]
    grpo(tmp_path, steps=10)
    short = page(tmp_path)
    assert len(figures(short)["Reward R"].data) == 1 and "centred" not in text(short)
    assert report.smooth([1.0, 2.0, 9.0], 1) == [1, 2, 9] and report.smooth([], 5) == []


def test_metric_curves_are_the_evaluations_and_every_chart_has_a_caption(tmp_path):
    grpo(tmp_path)
    tree = page(tmp_path)
    charts = figures(tree)
    assert titles(charts, "Metrics") == "WA, WA-GH, WC, WS, AA, FC, TR"
    tr, = charts["Metrics TR"].data
    assert (tr.x, tr.y, tr.mode) == ([0, 20, 40], [2.0, 2.2, 2.4], "lines+markers")
    assert [charts[f"Metrics {title}"].data[0].y for title in ("WA-GH", "WS")] == [[0.25] * 3, [0.125] * 3]
    captions = texts(tree, "figcaption")
    assert all(map(str.strip, captions)) and len(captions) == len(charts)
    assert titles(charts, "Training") == ("Loss, Learning rate, Response length, Entropy, Clip share, "
                                          "Sampler/trainer gap, Gradient norm")  # what this run has


def test_nulls_odd_values_and_half_a_line(tmp_path):
    rows = grpo(tmp_path, steps=6, made_up={"a": [1]})
    rows[2] |= {"reward": None, "loss": "big", "length": True, "entropy": math.nan, "grad_norm": math.inf}
    del rows[3]["reward"]
    write_jsonl(tmp_path / "metrics.jsonl", rows + [{"step": None, "reward": 1}, {"eval": EVAL}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "rew')
    charts = figures(page(tmp_path))
    assert charts["Reward R"].data[0].x == [1, 4, 5, 6]
    for title in ("Loss", "Response length", "Entropy", "Gradient norm"):
        assert charts[f"Training {title}"].data[0].x == [1, 3, 4, 5, 6]


def test_runs_without_rewards_show_their_evaluations(tmp_path):
    step = {"lr": 1e-5, "loss": 1.0, "entropy": 1.0, "grad_norm": 1.0, "train_s": 0.5}
    dpo = {"accuracy": 0.75, "margin": -0.5, "chosen_reward": 0.25, "rejected_reward": 0.75}
    rows = [{"step": 0, "eval": EVAL}, *({"step": s, **step} for s in (1, 2)),
            {"step": 3, **step, "eval": {**EVAL, "tr": 3.0}, "eval_s": 1.0}]
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", rows)
    write_jsonl(tmp_path / "dpo" / "metrics.jsonl", [row | dpo for row in rows])
    sft, training = figures(page(tmp_path / "sft")), figures(page(tmp_path / "dpo"))
    for title, last in zip("R TR R_a R_s Omega".split(), (3.0, 3.0, 0.5, 0.75, 0.625)):
        points, = sft[f"Reward {title}"].data
        assert (points.x, points.y[-1], points.mode) == ([0, 3], last, "lines+markers")
    assert titles(sft, "Training") == "Loss, Learning rate, Entropy, Gradient norm"
    assert [training[f"Training {title}"].data[0].y[1] for title in ("Margin", "Preference accuracy")] == [
        -0.5, 0.75]
    rewards = training["Training Implicit rewards"].data
    assert [(t.y[1], t.line.dash) for t in rewards] == [(0.25, "solid"), (0.75, "dot")]
    modes = [training[f"Training {title}"].layout.yaxis.rangemode for title in ("Margin", "Loss")]
    assert modes == ["normal", "nonnegative"]  # negative values are not cut off


def test_time_by_phase(tmp_path):
    """A line a phase, of one run and of several; phases are told apart by their dashes."""
    grpo(tmp_path / "a")
    one = figures(page(tmp_path / "a"))["Time By phase"].data
    means = [t for t in one if not hasattr(t, "hoverinfo")]
    assert [(t.name, t.line.dash, len(t.x)) for t in means] == [
        ("a rollout s", "solid", 40), ("a grade s", "dot", 40), ("a train s", "dash", 40),
        ("a eval s", "dashdot", 2)]
    assert [set(t.y) for t in means] == [{1}, {0.5}, {2}, {3}]


def test_runs_side_by_side(tmp_path):
    names = ["grpo", "cispo", "gspo", "base"]
    runs = [tmp_path / name for name in names]
    for i, run in enumerate(runs):
        if run.name != "base":
            grpo(run, reward=float(i))
        write_json(run / "eval.json", {**EVAL, "tr": 1.0 + i, "decoding": "temperature 1", "greedy": EVAL})
    tree = page(*runs, tmp_path / "grpo")  # named twice, shown once
    assert (tmp_path / "report.html").is_file()
    charts, colours = figures(tree), {}
    for title, figure in charts.items():
        for trace in figure.data:
            colours.setdefault(trace.name.split()[0], set()).add(trace.line.color)
    assert list(colours) == names[:3]
    smooth = charts["Reward R"].data[1::2]
    assert [(t.name, t.y[5]) for t in smooth] == [("grpo", 0.0), ("cispo", 1.0), ("gspo", 2.0)]
    rows = table(tree.find(".//table"))
    assert [(row[0], row[7][:5]) for row in rows[1:]] == [
        *((f"{n}temperature 1", f"{1 + i:.3f}") for i, n in enumerate(names)),
        *((f"{n}greedy", "2.000") for n in names)]
    legend = tree.findall(".//div[@class='legend']//i")
    key = [re.search("#[0-9a-f]{6}", mark.get("style"))[0] for mark in legend]
    assert [{k} for k in key[:3]] == list(colours.values()) and len(set(key)) == 4  # one colour a run
    assert not texts(tree, "details") and all(f"{n}/report.html" in text(tree) for n in names)


def test_folders_of_one_name_are_told_apart(tmp_path):
    runs = [tmp_path / seed / "grpo" for seed in ("seed0", "seed1")]
    for run in runs:
        grpo(run, steps=3)
    traces = figures(page(*runs))["Reward R"].data
    assert [t.name for t in traces] == ["seed0/grpo", "seed1/grpo"]
    assert (tmp_path / "report.html").is_file()
    long = [report.label("x" * 30 + end) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) == 28
    assert report.label("it's \"x\" & y") == "it's \"x\" &amp; y"  # the entities that plotly has


# ------------------------------------------------------------------------------------ table and groups

def test_a_base_run_has_its_table_alone(tmp_path):
    low_high = {k: [v - 0.125, v + 0.125] for k, v in EVAL.items()}
    greedy = {**EVAL, "tr": 3.0, "intervals": low_high}
    write_json(tmp_path / "eval.json", {
        **EVAL, "wa": None, "intervals": {**low_high, "wa": None}, "greedy": greedy,
        "decoding": "temperature 0.7", "model": "models/base"})
    tree = page(tmp_path)
    shown = text(tree)
    assert not texts(tree, "figure") and "plotly" not in shown and "models/base" in shown
    head, sampled, greedy = table(tree.find(".//table"))
    assert head[1:8] == "WA WA-GH WC WS AA FC TR".split()
    assert [sampled[i] for i in (0, 1, 2, 8)] == [
        f"{tmp_path.name}temperature 0.7", "––––", "0.2500.12–0.38", "81 failed"]
    assert greedy[0].endswith("greedy") and greedy[7].startswith("3.000")
    assert not texts(tree, "details") and "Groups of responses" not in shown


def test_before_and_after_are_paired_by_turn(tmp_path):
    a, b, c, d = turn("a"), turn("b", "stop", expert=None), turn("c"), turn("d")
    before = [group(a, [1.0, 3.0]), group(b, [2.0, 2.0]), group(c, [None, None])]
    after = [group(d, [1.0]), group(b, [1.0, 0.0]), group(a, [4.0, 3.5]), group(c, [0.0, 1.0])]
    write_jsonl(tmp_path / "groups_before.jsonl", before)
    write_jsonl(tmp_path / "groups_after.jsonl", after)
    tree = page(tmp_path)
    shown = {texts(found, "bdi")[0]: found for found in tree.findall(".//details")}
    assert [(i, *texts(found, "span"), found.get("data-kinds")) for i, found in shown.items()] == [
        ("a", "R 2.00 → 3.75", "all|continue"), ("b", "R 2.00 → 0.50", "all|stop|R fell"),
        ("c", "R – → 0.50", "all|continue"), ("d", "R – → 1.00", "all|continue")]
    assert texts(shown["a"], "h4") == ["before training: mean R 2.00", "after training: mean R 3.75"]
    sides = map(table, shown["a"].findall(".//section"))
    assert [[row[4] for row in side] for side in sides] == [["R", "1", "3"], ["R", "4", "3.5"]]
    assert len(table(shown["d"].find(".//section"))) == 1  # not sampled before
    assert texts(tree, "button") == ["all 4", "continue 3", "stop 1", "R fell 1"]
    said = zip(texts(shown["b"], "dt"), texts(shown["b"], "dd"), strict=True)
    assert list(said) == [("user", "words of b"), ("known", "(nothing)"),
                          ("I*", "(nothing left to learn)"), ("s*", "stop"),
                          ("expert said", "(nothing more)")]
    assert texts(shown["a"], "dd") == [
        "words of a", "(nothing)", "duration: two days", "continue", "Since when?"]
    (tmp_path / "groups_after.jsonl").unlink()  # a run under way
    assert [len(texts(d, "section")) for d in page(tmp_path).findall(".//details")] == [1, 1, 1]


def test_a_rationale_stands_under_its_response(tmp_path):
    graded = [response("a", i, f"text {i}") for i in range(2)]
    graded[1]["rationale"] = f"it asks {HOSTILE[0]}"
    write_jsonl(tmp_path / "groups_before.jsonl", [{"turn": turn("a"), "graded": graded}])
    rows = page(tmp_path).findall(".//section//td[1]")
    assert [[text(part) for part in row] for row in rows] == [
        ["text 0", ""], ["text 1", f"it asks {HOSTILE[0]}"]]
    assert [part.tag for part in rows[1]] == ["div", "small"]


def test_advantages_are_those_of_training(tmp_path):
    rewards = [4.0, 2.5, None, 0.0, 3.0]
    groups = [group(turn("a"), rewards), group(turn("b"), [2.0, 2.0, 2.0])]
    write_jsonl(tmp_path / "groups_before.jsonl", groups)
    a, b = (table(section)[1:] for section in page(tmp_path).findall(".//section"))
    valid = NormalDist.from_samples([4.0, 2.5, 0.0, 3.0])  # with the sample standard deviation
    expected = [0.0 if r is None else valid.zscore(r) for r in rewards]
    assert [float(row[5]) for row in a] == pytest.approx(expected, abs=0.005)
    assert a[2][1:] == ["0.5", "1", "1", "–", "0"] and [row[5] for row in b] == ["0"] * 3


# --------------------------------------------------------------------------------- texts, file, errors

ATTRIBUTES = set("lang charset name content http-equiv class id style type title dir data-kinds data-kind "
                 "aria-pressed".split())


def test_texts_stay_texts(tmp_path, monkeypatch):
    """The tags are those of harmless texts, none has attributes of its own, and the texts come back whole."""
    def written(name, texts):
        run, first = tmp_path / name, texts[0]
        grpo(run, steps=2)
        t = turn(first, context=[{"role": "user", "content": x} for x in texts], expert=first, target=texts)
        graded = {"turn": t, "graded": [response(first, i, x) for i, x in enumerate(texts)]}
        write_jsonl(run / "groups_before.jsonl", [graded])
        lone = "\ud800 lone"  # ASCII can hold it, our own JSONL cannot
        (run / "eval.json").write_text(json.dumps({**EVAL, "decoding": first + lone, "model": texts[1]}))
        return page(run)

    name = "<b onclick=x>&amp; <"
    hostile, plain = written(name, [*HOSTILE]), written("plain", ["x"] * len(HOSTILE))
    assert [e.tag for e in hostile.iter()] == [e.tag for e in plain.iter()]
    assert set().union(*(e.keys() for e in hostile.iter())) <= ATTRIBUTES
    said = [row[0] for row in table(hostile.find(".//section"))[1:]]
    assert said == [*HOSTILE[:3], "a\u2400\u241b[31m\ufffdb", *HOSTILE[4:]]
    assert f"{HOSTILE[0]}\ufffd lone" in [text(part) for part in hostile.iter("small")]
    assert texts(hostile, "dd")[:len(said)] == said
    assert texts(hostile, "h1") == texts(hostile, "title") == [name]
    shown, = figures(hostile)["Reward R"].data  # plotly would read tags in its name
    assert shown.name == "&lt;b onclick=x&gt;&amp;amp; &lt;"
    monkeypatch.setattr(report, "label", str)  # even a name that nobody escaped cannot end the script
    assert "<" not in texts(written("<!--<script>", [*HOSTILE]), "script[@id='figures']")[0]


def test_the_page_asks_the_network_for_nothing(tmp_path, monkeypatch):
    monkeypatch.undo()
    grpo(tmp_path, steps=3)
    write_jsonl(tmp_path / "groups_before.jsonl", [group(turn("a"), [1.0, 2.0])])
    tree, bundle = page(tmp_path), report.plotly_js()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.count(bundle) == 1 and "</script" not in bundle and len(source) < 6e6
    ours = source.replace(bundle, "")
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bsrc=|\bhref=|<link|<base|fetch\(|XMLHttp", ours)
    policy, = (meta.get("content") for meta in tree.findall(".//meta[@http-equiv]"))
    assert policy.startswith("default-src 'none';") and not re.search("connect-src|http", policy)


def test_without_plotly_the_page_has_no_curves_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    grpo(tmp_path, steps=3)
    write_jsonl(tmp_path / "groups_before.jsonl", [group(turn("a"), [1.0, 2.0])])
    tree = page(tmp_path)
    assert "plotly is not installed" in text(tree) and figures(tree) == {}
    assert len(texts(tree, "details")) == 1


def test_the_header_says_what_the_run_is(tmp_path):
    def header():
        return text(page(tmp_path).find(".//ul"))

    grpo(tmp_path, steps=2)
    assert "no config.yaml; 2 training steps" in header()
    config.save(make_config(run_dir=str(tmp_path), seed=7, model__path="a base"), tmp_path / "config.yaml")
    assert "grpo from a base, lr 5e-07, reward product, seed 7; 2 t" in header()
    (tmp_path / "config.yaml").write_text("of_another: version")
    assert "2 training steps" in header()


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    grpo(tmp_path, steps=2)
    written = []
    with monkeypatch.context() as m:
        m.setattr(report, "write_text", lambda path, content: written.append((path, content)))
        assert report.write([tmp_path]) == tmp_path / "report.html"
    assert not (tmp_path / "report.html").exists()
    (path, content), = written
    assert path == tmp_path / "report.html" and content.endswith("</script>\n")
    sub = tmp_path / "sub"
    assert report.write([str(tmp_path)], str(sub / "x.html")) == sub / "x.html"
    assert report.write([tmp_path], sub) == sub / "report.html"
    assert sorted(p.name for p in sub.iterdir()) == ["report.html", "x.html"]


def test_command_line_and_errors(tmp_path, call, refused, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").touch()
    for name, says in (("nowhere", "is not a folder"), ("empty", "holds none of metrics.jsonl")):
        error = refused(report, tmp_path / name)
        assert f"{name} {says}" in error and error.endswith("of a run of train_grpo.py or eval.py")
    grpo(tmp_path / "run", steps=2)
    with pytest.raises(InputError, match="nowhere"):
        report.write([tmp_path / "run", tmp_path / "nowhere"])
    call(report, tmp_path / "run", "--out", tmp_path / "x.html")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.html'}\n" and (tmp_path / "x.html").is_file()
    (tmp_path / "run" / "groups_after.jsonl").write_text("{")
    with pytest.raises(InputError, match="groups_after.jsonl:1"):
        report.write([tmp_path / "run"])
