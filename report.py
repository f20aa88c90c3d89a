"""One HTML file about a run, or several side by side, that opens offline: curves, metrics, time, groups.

    python report.py RUN [RUN ...] [--out FILE]   # default: report.html in RUN; of several, in their parent

A run folder may hold any part of metrics.jsonl (curves), eval.json (the table), config.yaml (what it is) and
groups_before.jsonl, groups_after.jsonl (responses at held-out turns before and after training). The reward
curves follow the paper's Figure 4 (arXiv 2510.25441). plotly.js is in the page, whose security policy forbids
every request. Where plotly is not installed, the page has no curves and says so. Texts are data: only `esc`
brings them into HTML, only `label` into plotly.
"""
import argparse
import html
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from string import Template

import config
from records import (
    InputError,
    Record,
    Rollout,
    Turn,
    cli,
    read_json,
    read_log,
    read_records,
    write_text,
)
from reward import advantages

# One of these is enough.
FILES = "metrics.jsonl eval.json groups_before.jsonl groups_after.jsonl".split()
TURNS = 300  # training turns on hindsight.py's page
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8c7ae6 #8a8a8a".split()  # six: Okabe-Ito
DASHES = "solid dot dash dashdot".split()
VISIBLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)}  # control characters get a picture
VISIBLE[127] = 0x2421
VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)  # UTF-8 has no lone surrogates
# Sections; in each its charts: title | figures of a step or an evaluation | caption.
CHARTS, section = {}, ""
for line in """
Reward
  R | reward | Training reward, mean over the responses of a step (of an evaluation: TR).
  TR | tr | The same responses by the evaluation's reward, R_s (1 + 2 R_a) + Omega.
  R_a | wa | Mean R_a where truth and decision are both continue: do the questions ask for I*?
  R_s | aa | Share of right decisions between continue and stop.
  Omega | fc | Mean Omega: one question and no more, or the bare stop marker.
Metrics
  WA | wa | Mean R_a where truth and decision are both continue.
  WA-GH | wa_gh | Share of R_a = 1 where truth and decision are both continue.
  WC | wc | Share of right decisions where the truth is continue.
  WS | ws | Share of right decisions where the truth is stop.
  AA | aa | Share of right decisions.
  FC | fc | Mean Omega, the form of the responses.
  TR | tr | Mean of R_s (1 + 2 R_a) + Omega.
Training
  Loss | loss | Loss of each step.
  Learning rate | lr | Learning rate of each step.
  Response length | length | Mean tokens of a response.
  Cut-off share | cut_off | Share of responses that reached rollout.max_new_tokens.
  Entropy | entropy | Mean entropy of the next-token distribution, in nats, over the tokens trained on.
  Clip share | clip_share | Share of the tokens trained on at which the clip acts.
  Sampler/trainer gap | gap_max gap_mean | Of log-probs: solid the largest, dotted the mean; log axis.
  KL | kl | Mean of log pi - log pi_ref over response tokens.
  Gradient norm | grad_norm | Global gradient norm before clipping.
  Skipped groups | skipped_groups | Share of groups not trained on: all advantages are zero.
  Most frequent response | top_share | Its share among the responses at a step's continue turns.
  Audit | audit_kappa | Agreement of grader and auditor on R_a: Cohen's kappa, quadratically weighted.
  Distinct responses | distinct | Number of different responses at a step's continue turns.
  Preference accuracy | accuracy | Share of pairs whose chosen response has the higher implicit reward.
  Margin | margin | Mean implicit reward of the chosen response minus that of the rejected one.
  Implicit rewards | chosen_reward rejected_reward | Mean over pairs: solid chosen, dotted rejected.
Time
  By phase | rollout_s grade_s train_s eval_s | Sampling, grading, training, evaluation: solid to dash-dotted.
""".strip().splitlines():
    title, *rest = map(str.strip, line.split("|"))
    if rest:
        CHARTS[section].append((title, *rest))
    else:
        CHARTS[section := title] = []


@dataclass
class Run:
    """What a run folder holds."""
    name: Path  # in the page
    colour: str
    steps: list  # records of metrics.jsonl
    evals: list  # the metrics in them, with their step
    result: dict  # eval.json
    about: str


class Group(Record):
    """A line of groups_before.jsonl and groups_after.jsonl."""
    turn: Turn
    graded: list[Rollout]


# ------------------------------------------------------------------------------------------- texts, numbers

def known(value):
    """Is this a finite number? Not null, NaN, a text, a truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def show(value, spec=".2f"):
    return format(value, spec) if known(value) else "–"


def esc(text):
    """Any text -> HTML text, also for attributes: esc('<b>&') is '&lt;b&gt;&amp;'."""
    return html.escape(str(text).translate(VISIBLE))


def label(text):
    """A run's name -> plotly text, which has a few tags and entities; cut in the middle where it is long."""
    text = str(text).translate(VISIBLE)
    if len(text) > 28:
        text = f"{text[:13]}…{text[-14:]}"
    return html.escape(text, quote=False)


def smooth(values, window):
    """Centred mean over `window` values (an odd number), near the ends over those there are.

    >>> smooth([0.0, 3.0, 6.0, 0.0], 3)
    [1.5, 3.0, 3.0, 3.0]
    """
    half = window // 2
    return [fmean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------- files

def read_run(folder, name, colour):
    """Read a run folder -> Run. Raises InputError where there is nothing to show."""
    if not any((folder / name).is_file() for name in FILES):
        bad = f"holds none of {', '.join(FILES)}" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} {bad}: name the run_dir of a run of train_grpo.py or eval.py")
    lines = [m for m in read_log(folder) if known(m.get("step"))]
    steps = [m for m in lines if m["step"] > 0]
    evals = [{**m["eval"], "step": m["step"]} for m in lines if isinstance(m.get("eval"), dict)]
    result, count = read_json(folder / "eval.json", {}), f"{len(steps)} training steps"
    if steps and result.get("steps", math.inf) < steps[-1]["step"]:
        count += f"; eval.json is of step {result['steps']}, and not shown"
        result = {}
    about = result.get("model", "no config.yaml")
    try:
        c = config.saved(folder)
        if steps:
            t = c.train
            about = f"{t.loss} from {c.model.path}, lr {t.lr:g}, reward {c.reward.mode}, seed {c.seed}"
    except InputError:
        pass  # there is none, or one of another version; the curves can be shown without it
    return Run(name, colour, steps, evals, result, f"{about}; {count}")


def read_groups(folder):
    """-> [(turn, {side: its Rollouts})]: before and after training."""
    found, sides = {}, {f"{when} training": path for when in ("before", "after")
                        if (path := folder / f"groups_{when}.jsonl").is_file()}
    for side, path in sides.items():
        for _, group in read_records(path, Group):
            new = group.turn, dict.fromkeys(sides, ())
            _, graded = found.setdefault(group.turn.turn_id, new)
            graded[side] = group.graded
    return found.values()


def plotly_js():
    """The text of plotly.js; empty where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return get_plotlyjs()


# --------------------------------------------------------------------------------------------------- curves

def series(records, key):
    """-> steps and values of the records that have a number under this key."""
    found = [m for m in records if known(m.get(key))]
    return [m["step"] for m in found], [m[key] for m in found]


def curves(runs, section, keys, window):
    """A line a run and key: smoothed, single steps faint behind it. Rewards that no step has: those of the
    evaluations, as points."""
    traces = []
    for run in runs:
        for key, dash in zip(keys, DASHES):
            x, y = series(run.steps, key)
            mode = "lines"
            if section == "Metrics" or section == "Reward" and not x:
                x, y = series(run.evals, "tr" if key == "reward" else key)
                mode = "lines+markers"
            if not x:
                continue
            name = label(run.name)
            if len(keys) > 1:
                name += f" {key.replace('_', ' ')}"
            line = {"color": run.colour, "dash": dash, "width": 2}
            trace = {"type": "scatter", "mode": mode if len(x) > 1 else "markers", "x": x, "y": y,
                     "name": name, "marker": {"color": run.colour}, "line": line}
            # The learning rate and the gap are not noise: they are never smoothed.
            if mode == "lines" and window > 1 and key not in ("lr", "gap_max", "gap_mean"):
                traces.append({**trace, "opacity": 0.25, "hoverinfo": "skip", "line": {**line, "width": 1}})
                trace["y"] = smooth(y, window)
            traces.append(trace)
    return traces


def charts(runs):
    """-> HTML of the sections, and the figures [{"data", "layout"}] of its divs plot0, plot1, ..."""
    window = max(len(run.steps) for run in runs) // 20 | 1  # odd
    faint = f" Lines are centred means over {window} steps; single steps are faint." if window > 1 else ""
    notes = (f"The reward and its parts in training, as in the paper's Figure 4.{faint} A run without "
             "rewards of its own (SFT, DPO) shows its evaluations during training, as points.",
             "Evaluations during training, sampled, at turns it does not train on; step 0: the base model.",
             f"Figures of the optimizer steps.{faint}", "Seconds of each step.")
    page, figures = "", []
    for section, note in zip(CHARTS, notes):
        boxes = ""
        for title, keys, caption in CHARTS[section]:
            traces = curves(runs, section, keys.split(), window)
            if not traces:
                continue
            mode = "tozero"
            if section == "Training":
                mode = "normal" if any(min(trace["y"]) < 0 for trace in traces) else "nonnegative"
            axis = {"type": "log"} if "gap" in keys else {"rangemode": mode}
            boxes += f"""<figure><h3>{title}</h3><div class="plot" id="plot{len(figures)}"></div>
<figcaption>{caption}</figcaption></figure>"""
            figures.append({"data": traces, "layout": {"yaxis": axis}})
        if boxes:
            page += f'<h2>{section}</h2><p class="note">{note}</p><div class="charts">{boxes}</div>'
    return page, figures


# ----------------------------------------------------------------------------------------- table and groups

def final_table(runs):
    """The final evaluations with their 95% intervals: a row a run, sampled, then greedy."""
    finals = [(run, run.result) for run in runs] + [(run, run.result.get("greedy")) for run in runs]
    rows = ""
    for run, m in finals:
        if not m:
            continue
        cells = ""
        for _, key, _ in CHARTS["Metrics"]:
            low, high = m.get("intervals", {}).get(key) or (None, None)
            cells += f"<td>{show(m.get(key), '.3f')}<small>{show(low)}–{show(high)}</small></td>"
        rows += f"""<tr><th><bdi>{esc(run.name)}</bdi><small>{esc(m.get("decoding", "greedy"))}</small></th>
{cells}<td>{show(m.get("n"), "d")}<small>{show(m.get("failed"), "d")} failed</small></td></tr>"""
    head = "".join(f'<th title="{esc(text)}">{name}</th>' for name, _, text in CHARTS["Metrics"])
    return rows and f"""<div class="scroll"><table class="final"><tr><th>final evaluation</th>{head}
<th>responses</th></tr>{rows}</table></div>
<p class="note">Held-out turns; small: 95% intervals by session.</p>"""


def mean_reward(graded):
    """Mean R without failed gradings; NaN where there is none."""
    return fmean([g.reward for g in graded if g.reward is not None] or [math.nan])


def responses(side, graded):
    """One side of a turn: its responses with their grades and advantages."""
    rows = ""
    for g, a in zip(graded, advantages([g.reward for g in graded])):
        cells = [show(value, ".4g") for value in (g.r_a, g.r_s, g.omega, g.reward)]
        cells.append(f"{a:+.2f}" if a else "0")
        rows += f"""<tr><td><div class="text" dir="auto">{esc(g.response or "(empty)")}</div><small
class="text" dir="auto">{esc(g.rationale or "")}</small></td><td>{"</td><td>".join(cells)}</td></tr>"""
    return f"""<section><h4>{side}: mean R {show(mean_reward(graded))}</h4><div class="scroll">
<table class="responses"><tr><th>response</th><th>R_a</th><th>R_s</th><th>Ω</th><th>R</th><th>A</th></tr>
{rows}</table></div></section>"""


def conversation(turn):
    """A turn's context and what hindsight tells, as a list of definitions."""
    lines = [*(("user" if m.role == "user" else "expert", m.content) for m in turn.context),
             ("known", "; ".join(turn.known) or "(nothing)"),
             ("I*", "; ".join(turn.target) or "(nothing left to learn)"), ("s*", turn.decision),
             ("expert said", turn.expert or "(nothing more)")]
    return "".join(f'<dt>{who}</dt><dd class="text" dir="auto">{esc(text)}</dd>' for who, text in lines)


def foldable(entries):
    """Turns to unfold, and buttons that filter them. entries: (turn, kinds, the end of its line, its body)"""
    page, counted = "", Counter()
    for turn, kinds, end, body in entries:
        kinds = ["all", turn.decision, *kinds]
        counted.update(kinds)
        page += f"""<details data-kinds="{"|".join(kinds)}"><summary><bdi>{esc(turn.turn_id)}</bdi>
<b>{turn.decision}</b> <bdi class="said">{esc(turn.context[-1].content[:160])}</bdi>
<span>{end}</span></summary><dl>{conversation(turn)}</dl>{body}</details>"""
    buttons = "".join(f"""<button data-kind="{kind}"
aria-pressed="{str(kind == "all").lower()}">{kind} {n}</button>""" for kind, n in counted.items())
    return f'<p class="filter">{buttons}</p>{page}'


def groups(folder):
    """The groups of a run: responses before and after training side by side."""
    entries = []
    for turn, graded in read_groups(folder):
        means = list(map(mean_reward, graded.values()))
        fell = ["R fell"] * (means[-1] < means[0])  # a side without rewards is NaN: not less
        sides = "".join(map(responses, graded, graded.values()))
        entries.append((turn, fell, f'R {" → ".join(map(show, means))}', f'<div class="sides">{sides}</div>'))
    return entries and f"""<h2>Groups of responses</h2><p class="note">Sampled at held-out turns, graded as in
evaluation. A = (R - mean) / (std + 1e-6) in the group; a failed grading (–) has A = 0. s* is the right
decision, I* what was still to be learned.</p>{foldable(entries)}"""


# ------------------------------------------------------------------------------------------------- the page

def write_page(out, **parts):
    """Fill in the page and write it, whole or not at all. Parts that are not named are empty. -> its path"""
    write_text(out, PAGE.substitute(defaultdict(str, parts, made=f"{datetime.now():%Y-%m-%d %H:%M}")))
    return out


def write(paths, out=None):
    """Read the runs and write their page. -> its path"""
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    several = len(folders) > 1
    parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = [read_run(folder, folder.relative_to(parent), colour)
            for folder, colour in zip(folders, COLOURS * len(folders))]
    out = Path(out or (parent if several else folders[0]))
    if out.is_dir():
        out /= "report.html"
    sections, figures = charts(runs)
    plotly = plotly_js() if figures else ""
    if figures and not plotly:
        sections, figures = NO_CURVES, []
    names = [esc(run.name) for run in runs]
    swatches = [f'<span class="key"><i style="background:{run.colour}"></i><bdi>{name}</bdi></span>'
                for run, name in zip(runs, names)]
    files = ", ".join(f"<bdi><code>{name}/report.html</code></bdi>" for name in names)
    return write_page(
        out,
        title=", ".join(names),
        runs="".join(f"<li>{mark} {esc(run.about)}</li>" for mark, run in zip(swatches, runs)),
        table=final_table(runs),
        legend=f'<div class="legend">{"".join(swatches)}</div>' if several and figures else "",
        charts=sections,
        groups=ELSEWHERE.format(files) if several else groups(folders[0]),
        plotly=plotly,
        figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"))


def write_turns(out, told, turns, strange):
    """A page to browse turns (hindsight.py): the strange ones first, then a few of the others. -> its path

    told: what hindsight.py says of the logs. strange: {turn_id: why}.
    """
    first = sorted(turns, key=lambda turn: turn.turn_id not in strange)[:TURNS]
    entries = [(turn, ["strange"] * (turn.turn_id in strange), esc(strange.get(turn.turn_id, "")), "")
               for turn in first]
    return write_page(
        out, title=f"{len(first)} of {len(turns)} training turns", figures="[]",
        table=f'<div class="scroll"><pre>{esc(told)}</pre></div>', groups=foldable(entries))


def try_to_write(run):
    """Write the page of a run whose figures stand already -> its path, or one line of why there is none."""
    try:
        return write([run])
    except Exception as error:  # no page is worth them
        return f"report.html was not written ({error!r})"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    p.add_argument("--out", metavar="FILE", help="where to write the page")
    args = p.parse_args()
    print(f"wrote {write(args.runs, args.out)}")


ELSEWHERE = """<h2>Groups of responses</h2><p>They are in the report of each run by itself, which
<code>python report.py RUN</code> writes: {}.</p>"""
NO_CURVES = """<h2>Curves</h2><p class="note">The curves are left out because plotly is not installed. With it
(<code>pip install plotly</code>), <code>python report.py RUN</code> draws them.</p>"""
PAGE = Template(r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>$title</title><style>
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #59636e; --line: #d8dde3;
  --tint: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e3e7eb; --soft: #9aa4ae; --line: #353b43; --tint: #1d2126 } }
* { box-sizing: border-box } [hidden] { display: none } bdi, h1, li { overflow-wrap: anywhere }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; font: 15px/1.5 system-ui, sans-serif;
  background: var(--page); color: var(--ink) }
h2 { margin: 2.5rem 0 .3rem } h3, h4 { margin: 0 } ul { list-style: none; padding: 0 }
.note { max-width: 60rem }
.note, figcaption, small, dt, .runs { color: var(--soft); font-size: .85rem }
.legend { position: sticky; top: 0; z-index: 2; padding: .4rem 0; background: var(--page) }
.key, .key i { display: inline-block; margin-right: 1rem }
.key i { width: .8rem; height: .8rem; margin-right: .35rem }
.charts { display: grid; gap: 1.5rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; min-width: 0 } figure:only-child { grid-column: 1 / -1 } .plot { height: 220px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
small { display: block; white-space: nowrap; font-weight: 400 } .responses th + th { width: 3.6rem }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; min-width: 9rem }
.final th:first-child { position: sticky; left: 0; background: var(--page) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto }
button { font: inherit; padding: .2rem .7rem; margin: 0 .3rem .4rem 0; border: 1px solid var(--line);
  border-radius: 1rem; background: none; color: inherit }
button[aria-pressed=true] { background: var(--ink); color: var(--page) } h1 { font-size: 1.6rem }
details { border-top: 1px solid var(--line) } summary b { width: 5rem }
summary::before { content: "▸" } [open] summary::before { content: "▾" }
summary { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .4rem 0; cursor: pointer }
.said { flex: 1 1 12rem; min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; padding: .7rem;
  background: var(--tint) }
dd, section { margin: 0; min-width: 0 } .sides { display: grid; gap: 1rem; margin-bottom: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
</style>
<h1>$title</h1><div class="runs">Learn-to-Ask report, made $made<ul>$runs</ul></div>
$table $legend $charts $groups
<script>$plotly</script><script type="application/json" id="figures">$figures</script><script>
const figures = JSON.parse(document.getElementById("figures").textContent);
function draw() {
  const css = getComputedStyle(document.documentElement), line = css.getPropertyValue("--line");
  const axis = {gridcolor: line, zerolinecolor: line, automargin: true, exponentformat: "power"};
  const base = {showlegend: false, hovermode: "x unified",
    paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    margin: {l: 40, r: 12, t: 8, b: 36}, font: {size: 11, color: css.getPropertyValue("--soft")},
    hoverlabel: {bgcolor: css.getPropertyValue("--page"), namelength: -1},
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom"};  // a finger scrolls the page
  figures.forEach((f, i) => Plotly.react("plot" + i, f.data, {...base, ...f.layout,
    yaxis: {...axis, hoverformat: ".4g", ...f.layout.yaxis},
    xaxis: {...axis, title: {text: "step"}, ...f.layout.xaxis}}, {responsive: true, displayModeBar: false}));
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
const buttons = [...document.querySelectorAll(".filter button")];
const turns = [...document.querySelectorAll("details")];
buttons.forEach(button => button.addEventListener("click", () => {
  buttons.forEach(b => b.setAttribute("aria-pressed", b === button));
  turns.forEach(d => { d.hidden = !d.dataset.kinds.split("|").includes(button.dataset.kind); });
}));
</script>
""")


if __name__ == "__main__":
    cli(main)
