"""The page about a run: its numbers, what it leaves out, texts that stay texts, and no request to any network."""
import doctest
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

import config
import report
import train_grpo
from data import InputError, cli, write_json, write_jsonl

EVAL = {"wa": 0.5, "wa_gh": 0.25, "wc": 0.9, "ws": 0.125, "aa": 0.75, "fc": 0.625, "tr": 2.0, "wa_all": 0.4, "n": 8,
        "failed": 1}
HOSTILE = ('</script><script>alert(1)</script>', '"><img src=x onerror=alert(2)>', "</details></summary><!--",
           "a\x00\x1b[31m\x85b", "\ud800 lone",
           "\u202eevil \u0645\u0631\u062d\u0628\u0627", "$title ${plotly} %{y} &lt;i&gt;", "\u54b3\U0001f912" * 3000)


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch):
    """The pages of these tests do without the 5 MB of plotly.js; one test puts it back."""
    real = report.get_plotlyjs
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "/* plotly.js */")
    return real


def node(tag, attrs=()):
    return {"tag": tag, "attrs": dict(attrs), "children": []}


class Tree(HTMLParser):
    """A page as nested nodes; a tag that does not close what is open fails the test."""

    def __init__(self, path):
        super().__init__()
        self.open = [node("page")]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert [n["tag"] for n in self.open] == ["page", "html"]

    def handle_starttag(self, tag, attrs):
        new = node(tag, attrs)
        self.open[-1]["children"].append(new)
        if tag != "meta":
            self.open.append(new)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, self.getpos()

    def handle_data(self, data):
        self.open[-1]["children"].append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")


def find(tree, tag, **attrs):
    """All nodes below with this tag and these attributes, in the page's order."""
    found = []
    for child in tree["children"] if isinstance(tree, dict) else []:
        if isinstance(child, dict):
            mine = child["tag"] == tag and all(child["attrs"].get(k) == v for k, v in attrs.items())
            found += [child] * mine + find(child, tag, **attrs)
    return found


def text(tree):
    return tree if isinstance(tree, str) else "".join(map(text, tree["children"]))


def page(*runs, **kw):
    return Tree(report.write(runs, **kw)).open[0]


def figures(tree):
    """{section: {title: figure}}, read back from the page's JSON by the place of the divs."""
    data = json.loads(text(find(tree, "script", id="figures")[0]))
    headings = [text(h) for h in find(tree, "h2") if text(h) in (*report.CHARTS, "Time")]
    boxes = find(tree, "div", **{"class": "charts"})
    out = {heading: {text(find(f, "h3")[0]): data[int(find(f, "div")[0]["attrs"]["id"][4:])]
                     for f in find(box, "figure")} for heading, box in zip(headings, boxes, strict=True)}
    assert sum(map(len, out.values())) == len(data)
    return out


def table(tree):
    return [[text(cell) for cell in find(row, "th") + find(row, "td")] for row in find(tree, "tr")]


def grpo(folder, steps=40, **more):
    """A run of `steps` steps whose figures differ from key to key; evaluated at 0 and every 20 steps."""
    rows = [{"step": 0, "eval": EVAL}]
    for s in range(1, steps + 1):
        keys = ("reward", "tr", "wa", "aa", "fc", "loss", "length", "clip_share", "entropy", "grad_norm")
        row = {"step": s, "lr": 1e-3 / s, **{k: i + math.sin(s * (i + 1)) for i, k in enumerate(keys)},
               "rollout_s": 1.0, "grade_s": 0.5, "train_s": 2.0, "gap_max": 1e-5 if s % 2 else None,
               "gap_mean": 1e-7 if s % 2 else None, **more}
        rows.append(row | ({"eval": {**EVAL, "tr": 2 + s / 100}, "eval_s": 3.0} if s % 20 == 0 else {}))
    write_jsonl(folder / "metrics.jsonl", rows)
    return rows


def answer(turn_id, sample, response="How long?", reward=2.0, **more):
    return {"turn_id": turn_id, "sample": sample, "response": response, "truth": "continue", "decision": "continue",
            "r_a": 0.5, "r_s": 1.0, "omega": 1.0, "reward": reward, **more}


def turn(turn_id, decision="continue", **more):
    return {"turn_id": turn_id, "session_id": "s", "goal": "g", "expert": "Since when?", "decision": decision,
            "context": [{"role": "user", "content": f"words of {turn_id}"}],
            "target": ["duration: two days"] if decision == "continue" else [], **more}


def group(t, rewards):
    return {"turn": t, "graded": [answer(t["turn_id"], i, reward=r) for i, r in enumerate(rewards)]}


# ------------------------------------------------------------------------------------------------------------- charts

def test_docstring_examples():
    assert doctest.testmod(report).failed == 0
    assert report.smooth([1.0, 2.0, 9.0], 1) == [1, 2, 9] and report.smooth([], 5) == []


def test_curves_hold_the_steps_and_their_means(tmp_path):
    rows = grpo(tmp_path)[1:]
    charts = figures(page(tmp_path))
    for title, key in (("R", "reward"), ("TR", "tr"), ("R_a", "wa"), ("R_s", "aa"), ("Omega", "fc")):
        raw, line = charts["Reward"][title]["data"]
        assert raw["x"] == line["x"] == list(range(1, 41)) and raw["y"] == [r[key] for r in rows]
        assert line["y"][10] == pytest.approx(sum(r[key] for r in rows[9:12]) / 3)  # 40 steps: over 3
        assert raw["opacity"] < 0.5 and "opacity" not in line
        assert charts["Reward"][title]["layout"]["yaxis"]["rangemode"] == "tozero"
    lr, = charts["Training"]["Learning rate"]["data"]
    assert lr["y"] == [r["lr"] for r in rows]  # never smoothed
    gap = charts["Training"]["Sampler/trainer gap"]
    assert [(t["line"]["dash"], t["x"][:2], t["y"][0], t["name"].split()[-1]) for t in gap["data"]] == [
        ("solid", [1, 3], 1e-5, "max"), ("dot", [1, 3], 1e-7, "mean")]
    assert gap["layout"]["yaxis"] == {"type": "log"}
    assert "over 3 steps" in text(find(page(tmp_path), "p")[0])
    grpo(tmp_path, steps=10)
    short = page(tmp_path)
    assert len(figures(short)["Reward"]["R"]["data"]) == 1 and "centred" not in text(short)


def test_metric_curves_are_the_evaluations(tmp_path):
    grpo(tmp_path)
    charts = figures(page(tmp_path))["Metrics"]
    assert list(charts) == ["WA", "WA-GH", "WC", "WS", "AA", "FC", "TR"]
    tr, = charts["TR"]["data"]
    assert (tr["x"], tr["y"], tr["mode"]) == ([0, 20, 40], [2.0, 2.2, 2.4], "lines+markers")
    assert charts["WA-GH"]["data"][0]["y"] == [0.25] * 3 and charts["WS"]["data"][0]["y"] == [0.125] * 3


def test_every_chart_has_a_caption_and_only_what_a_run_has_is_shown(tmp_path):
    grpo(tmp_path)
    tree = page(tmp_path)
    assert all(text(f).strip() for f in find(tree, "figcaption"))
    assert len(find(tree, "figcaption")) == len(find(tree, "figure"))
    assert set(figures(tree)["Training"]) == {"Loss", "Learning rate", "Response length", "Entropy", "Clip share",
                                              "Sampler/trainer gap", "Gradient norm"}


def test_nulls_odd_values_and_half_a_line(tmp_path):
    rows = grpo(tmp_path, steps=6, made_up={"a": [1]})
    rows[2] |= {"reward": None, "loss": "big", "length": True, "entropy": math.nan, "grad_norm": math.inf}
    del rows[3]["reward"]
    write_jsonl(tmp_path / "metrics.jsonl", rows + [{"step": None, "reward": 1}, {"eval": EVAL}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "rew')
    charts = figures(page(tmp_path))
    assert charts["Reward"]["R"]["data"][0]["x"] == [1, 4, 5, 6]
    for title in ("Loss", "Response length", "Entropy", "Gradient norm"):
        assert charts["Training"][title]["data"][0]["x"] == [1, 3, 4, 5, 6], title


def test_runs_without_rewards_show_their_evaluations(tmp_path):
    step = {"lr": 1e-5, "loss": 1.0, "entropy": 1.0, "grad_norm": 1.0, "train_s": 0.5}
    dpo = {"accuracy": 0.75, "margin": -0.5, "chosen_reward": 0.25, "rejected_reward": 0.75}
    for name, more in (("sft", {}), ("dpo", dpo)):
        rows = [{"step": 0, "eval": EVAL}, *({"step": s, **step, **more} for s in (1, 2, 3))]
        rows[-1] |= {"eval": {**EVAL, "tr": 3.0}, "eval_s": 1.0}
        write_jsonl(tmp_path / name / "metrics.jsonl", rows)
    charts = figures(page(tmp_path / "sft"))
    for title, last in (("R", 3.0), ("TR", 3.0), ("R_a", 0.5), ("R_s", 0.75), ("Omega", 0.625)):
        points, = charts["Reward"][title]["data"]
        assert (points["x"], points["y"][-1], points["mode"]) == ([0, 3], last, "lines+markers")
    assert set(charts["Training"]) == {"Loss", "Learning rate", "Entropy", "Gradient norm"}
    training = figures(page(tmp_path / "dpo"))["Training"]
    assert training["Margin"]["data"][0]["y"] == [-0.5] * 3
    assert training["Preference accuracy"]["data"][0]["y"] == [0.75] * 3
    rewards = training["Implicit rewards"]["data"]
    assert [(t["y"][0], t["line"]["dash"]) for t in rewards] == [(0.25, "solid"), (0.75, "dot")]
    assert training["Margin"]["layout"]["yaxis"]["rangemode"] == "normal"  # negative values are not cut off


def test_time_by_phase(tmp_path):
    grpo(tmp_path / "a")
    grpo(tmp_path / "b", steps=20)
    one = figures(page(tmp_path / "a"))["Time"]["By phase"]
    assert one["layout"]["barmode"] == "stack"
    assert [(t["name"], len(t["x"]), sum(t["y"])) for t in one["data"]] == [
        ("sampling", 40, 40), ("grading", 40, 20), ("training", 40, 80), ("evaluation", 2, 6)]
    tree = page(tmp_path / "a", tmp_path / "b")
    both = figures(tree)["Time"]["By phase"]
    assert both["layout"]["xaxis"]["ticktext"] == ["a", "b"]
    assert [y * 60 for t in both["data"] for y in t["y"]] == pytest.approx([40, 20, 20, 10, 80, 40, 6, 3])
    assert [k in text(find(tree, "figcaption")[-1]) for k in report.PHASES.values()] == [True] * 4


def test_runs_side_by_side(tmp_path):
    names = ["grpo", "cispo", "gspo", "base"]
    for i, name in enumerate(names):
        if name != "base":
            grpo(tmp_path / name, steps=40, reward=float(i))
        write_json(tmp_path / name / "eval.json", {**EVAL, "tr": 1.0 + i, "decoding": "temperature 1", "greedy": EVAL})
    out = report.write([tmp_path / n for n in names])
    assert out == tmp_path / "report.html"
    tree = page(*(tmp_path / n for n in names), tmp_path / "grpo")  # named twice, shown once
    colours = {}
    for section in ("Reward", "Metrics", "Training"):
        for figure in figures(tree)[section].values():
            for trace in figure["data"]:
                colours.setdefault(trace["name"].split()[0], set()).add(trace["line"]["color"])
    assert list(colours) == names[:3] and all(len(c) == 1 for c in colours.values())
    assert len(set.union(*colours.values())) == 3
    r = figures(tree)["Reward"]["R"]["data"]
    assert [(t["name"], t["y"][5]) for t in r[1::2]] == [("grpo", 0.0), ("cispo", 1.0), ("gspo", 2.0)]
    rows = table(find(tree, "table")[0])
    assert [(row[0], row[7][:5]) for row in rows[1:]] == [
        *((f"{n}temperature 1", f"{1 + i:.3f}") for i, n in enumerate(names)),
        *((f"{n}greedy", "2.000") for n in names)]
    legend = find(tree, "div", **{"class": "legend"})[0]
    key = [re.search("#[0-9a-f]{6}", i["attrs"]["style"])[0] for i in find(legend, "i")]
    assert key[:3] == [colours[n].copy().pop() for n in names[:3]] and len(set(key)) == 4
    assert not find(tree, "details") and all(f"{n}/report.html" in text(tree) for n in names)


def test_folders_of_one_name_are_told_apart(tmp_path):
    for seed in ("seed0", "seed1"):
        grpo(tmp_path / seed / "grpo", steps=3)
    tree = page(tmp_path / "seed0" / "grpo", tmp_path / "seed1" / "grpo")
    assert [t["name"] for t in figures(tree)["Reward"]["R"]["data"]] == ["seed0/grpo", "seed1/grpo"]
    assert (tmp_path / "report.html").is_file()
    long = [report.label("x" * 30 + end) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) == 28
    assert report.label("it's \"x\" & y") == "it's \"x\" &amp; y"  # the entities that plotly knows, and no others


# ---------------------------------------------------------------------------------------------------- table and groups

def test_a_base_run_has_its_table_and_groups_of_its_evaluation(tmp_path):
    turns = [turn(f"s_{i}") for i in range(100)]
    write_jsonl(tmp_path / "turns" / "eval.jsonl", turns)
    graded = [answer(t["turn_id"], i, f"{t['turn_id']} {i}") for t in turns for i in range(3)]
    write_jsonl(tmp_path / "graded.jsonl", graded)
    low_high = {k: [v - 0.125, v + 0.125] for k, v in EVAL.items()}
    greedy = {**EVAL, "tr": 3.0, "intervals": low_high}
    write_json(tmp_path / "eval.json", {**EVAL, "wa": None, "intervals": {**low_high, "wa": None}, "greedy": greedy,
                                        "decoding": "temperature 0.7", "model": "models/base"})
    tree = page(tmp_path)
    assert not find(tree, "figure") and "plotly.js */" not in text(tree) and "models/base" in text(tree)
    head, sampled, greedy = table(find(tree, "table")[0])
    assert head[1:8] == ["WA", "WA-GH", "WC", "WS", "AA", "FC", "TR"] and sampled[0].endswith("temperature 0.7")
    assert sampled[1] == "––––" and sampled[2] == "0.2500.12–0.38" and sampled[8] == "81 failed"
    assert greedy[0].endswith("greedy") and greedy[7].startswith("3.000")
    shown = find(tree, "details")
    assert len(shown) == report.SHOWN and len(find(shown[0], "section")) == 1
    ids = [int(text(find(d, "bdi")[0])[2:]) for d in shown]
    assert ids == sorted(set(ids)) and ids[0] == 0 and ids[-1] >= 95  # spread over the file
    assert [row[0] for row in table(shown[1])[1:]] == [f"s_{ids[1]} {i}" for i in range(3)]


def test_before_and_after_are_paired_by_turn(tmp_path):
    a, b, c, d = turn("a"), turn("b", "stop", expert=None), turn("c"), turn("d")
    before = [group(a, [1.0, 3.0]), group(b, [2.0, 2.0]), group(c, [None, None])]
    after = [group(d, [1.0]), group(b, [1.0, 0.0]), group(a, [4.0, 3.5]), group(c, [0.0, 1.0])]
    write_jsonl(tmp_path / "groups_before.jsonl", before)
    write_jsonl(tmp_path / "groups_after.jsonl", after)
    tree = page(tmp_path)
    shown = {text(find(d, "bdi")[0]): d for d in find(tree, "details")}
    assert list(shown) == ["a", "b", "c", "d"]
    assert [text(find(shown[i], "span")[0]) for i in "abcd"] == [
        "R 2.00 → 3.75", "R 2.00 → 0.50", "R – → 0.50", "R – → 1.00"]
    assert [text(h) for h in find(shown["a"], "h4")] == ["before training: mean R 2.00", "after training: mean R 3.75"]
    before, after = (table(s) for s in find(shown["a"], "section"))
    assert [row[4] for row in before] == ["R", "1", "3"] and [row[4] for row in after] == ["R", "4", "3.5"]
    assert len(table(find(shown["d"], "section")[0])) == 1  # not sampled before
    assert [shown[i]["attrs"]["data-kinds"] for i in "abcd"] == [
        "all|continue", "all|stop|R fell", "all|continue", "all|continue"]
    assert [text(b) for b in find(tree, "button")] == ["all 4", "continue 3", "stop 1", "R fell 1"]
    said = [(text(dt), text(dd)) for dt, dd in zip(find(shown["b"], "dt"), find(shown["b"], "dd"), strict=True)]
    assert said == [("user", "words of b"), ("I*", "(nothing left to learn)"), ("s*", "stop"),
                    ("expert said", "(nothing more)")]
    assert "I*" in map(text, find(shown["a"], "dt")) and "duration: two days" in map(text, find(shown["a"], "dd"))
    (tmp_path / "groups_after.jsonl").unlink()  # a run under way
    assert [len(find(d, "section")) for d in find(page(tmp_path), "details")] == [1, 1, 1]


def test_advantages_are_those_of_training(tmp_path):
    rewards = [4.0, 2.5, None, 0.0, 3.0]
    write_jsonl(tmp_path / "groups_before.jsonl", [group(turn("a"), rewards), group(turn("b"), [2.0, 2.0, 2.0])])
    a, b = (table(s)[1:] for s in find(page(tmp_path), "section"))
    expected = train_grpo.advantages(torch.tensor([[math.nan if r is None else r for r in rewards]]))[0].tolist()
    assert [float(row[5]) for row in a] == pytest.approx(expected, abs=0.005) and expected[0] > 0.9
    assert [row[1:] for row in a][2] == ["0.5", "1", "1", "–", "0"] and [row[5] for row in b] == ["0"] * 3


# ------------------------------------------------------------------------------------------------- texts, file, errors

ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "id", "style", "type", "title", "dir",
              "data-kinds", "data-kind", "aria-pressed"}


def test_texts_stay_texts(tmp_path, monkeypatch):
    """The tags are the same as with harmless texts, none has an attribute of its own, and the texts come back whole."""
    def nodes(tree):
        return [n for child in tree["children"] if isinstance(child, dict) for n in (child, *nodes(child))]

    def written(name, texts):
        run, first = tmp_path / name, texts[0]
        grpo(run, steps=2)
        t = turn(first, context=[{"role": "user", "content": x} for x in texts], expert=first, target=list(texts))
        graded = {"turn": t, "graded": [answer(first, i, x) for i, x in enumerate(texts)]}
        (run / "groups_before.jsonl").write_text(json.dumps(graded))  # in ASCII, so that a lone surrogate gets there
        (run / "eval.json").write_text(json.dumps({**EVAL, "decoding": first, "model": texts[1]}))
        return page(run)

    hostile, plain = written("<b onclick=x>&amp; <", HOSTILE), written("plain", ["x"] * len(HOSTILE))
    assert [n["tag"] for n in nodes(hostile)] == [n["tag"] for n in nodes(plain)]
    assert set().union(*(n["attrs"] for n in nodes(hostile))) <= ATTRIBUTES
    said = [row[0] for row in table(find(hostile, "section")[0])[1:]]
    assert said == [*HOSTILE[:3], "a\u2400\u241b[31m\ufffdb", "\ufffd lone", *HOSTILE[5:]]
    assert [text(dd) for dd in find(hostile, "dd")][:len(said)] == said
    assert text(find(hostile, "h1")[0]) == text(find(hostile, "title")[0]) == "<b onclick=x>&amp; <"
    name = figures(hostile)["Reward"]["R"]["data"][0]["name"]  # plotly would take it for tags
    assert name == "&lt;b onclick=x&gt;&amp;amp; &lt;"
    monkeypatch.setattr(report, "label", str)  # even a name that nobody escaped cannot end the script
    assert "<" not in text(find(written("<!--<script>", HOSTILE), "script", id="figures")[0])


def test_the_page_asks_the_network_for_nothing(tmp_path, no_bundle, monkeypatch):
    monkeypatch.setattr(report, "get_plotlyjs", no_bundle)
    grpo(tmp_path, steps=3)
    write_jsonl(tmp_path / "groups_before.jsonl", [group(turn("a"), [1.0, 2.0])])
    tree = page(tmp_path)
    bundle = no_bundle()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.count(bundle) == 1 and "</script" not in bundle
    ours = source.replace(bundle, "")
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bsrc=|\bhref=|<link|<base|fetch\(|XMLHttp", ours)
    policy, = (m["attrs"]["content"] for m in find(tree, "meta") if "http-equiv" in m["attrs"])
    assert policy.startswith("default-src 'none';") and "connect-src" not in policy and "http" not in policy
    assert len(source) < 6e6


def test_the_header_says_what_the_run_is(tmp_path):
    grpo(tmp_path, steps=2)
    assert "no config.yaml; 2 training steps" in text(find(page(tmp_path), "ul")[0])
    cfg = config.Config(run_dir=str(tmp_path), seed=7)
    cfg.model.path = "models/some base"
    config.save(cfg, tmp_path / "config.yaml")
    assert "grpo from models/some base, lr 5e-07, reward product, seed 7; 2 t" in text(find(page(tmp_path), "ul")[0])
    (tmp_path / "config.yaml").write_text("of_another: version")
    assert "2 training steps" in text(find(page(tmp_path), "ul")[0])


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    grpo(tmp_path, steps=2)
    written = []
    monkeypatch.setattr(report, "write_text", lambda path, content: written.append((path, content)))
    assert report.write([tmp_path]) == tmp_path / "report.html" and not (tmp_path / "report.html").exists()
    assert written[0][0] == tmp_path / "report.html" and written[0][1].endswith("</script>\n") and len(written) == 1
    monkeypatch.undo()
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "")
    assert report.write([str(tmp_path)], str(tmp_path / "sub" / "x.html")) == tmp_path / "sub" / "x.html"
    assert report.write([tmp_path], tmp_path / "sub") == tmp_path / "sub" / "report.html"
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["report.html", "x.html"]


def test_command_line_and_errors(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").touch()
    for name, says in (("nowhere", "nowhere is not a folder"), ("empty", "empty holds none of metrics.jsonl")):
        monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            cli(report.main)
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and says in err and err.count("\n") == 1 and not out
        assert "train_grpo.py" in err and "eval.py" in err
    grpo(tmp_path / "run", steps=2)
    with pytest.raises(InputError, match="nowhere"):
        report.write([tmp_path / "run", tmp_path / "nowhere"])
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "run"), "--out", str(tmp_path / "x.html")])
    report.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.html'}\n" and (tmp_path / "x.html").is_file()
    (tmp_path / "run" / "groups_after.jsonl").write_text("{")
    with pytest.raises(InputError, match="groups_after.jsonl:1"):
        report.write([tmp_path / "run"])
