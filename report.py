"""One HTML file about a run, or several side by side, that opens offline: curves, final metrics, time, groups.

    python report.py RUN [RUN ...] [--out FILE]    # default: report.html in RUN; of several, in their common parent

A run folder may hold any part of metrics.jsonl (curves), eval.json (the table), config.yaml (what it is) and
groups_before.jsonl, groups_after.jsonl (held-out turns answered before and after training; without them, some turns
of graded.jsonl). The reward curves follow the paper's Figure 4 (arXiv 2510.25441). plotly.js is in the page, whose
security policy forbids every request. Texts are data: only `esc` brings them into HTML, only `label` into plotly.
"""
import argparse
import html
import json
import math
import os
from datetime import datetime
from pathlib import Path
from string import Template

import torch
from plotly.offline import get_plotlyjs

import config
import eval as evaluation
import train_grpo  # which may be importing this module: look its names up only when they are used
from data import InputError, cli, load_turns, read_jsonl, write_text

FILES = ("metrics.jsonl", "eval.json", "groups_before.jsonl", "groups_after.jsonl", "graded.jsonl")  # one is enough
SHOWN = 24  # turns of graded.jsonl to show where a run has no groups files
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7ae6", "#8a8a8a")  # six: Okabe-Ito
PHASES = {"rollout_s": "sampling", "grade_s": "grading", "train_s": "training", "eval_s": "evaluation"}
AS_IT_IS = ("lr", "gap_max", "gap_mean")  # not noise, so never smoothed
VISIBLE = {**{c: 0x2400 + c for c in range(32) if c not in (9, 10)}, 127: 0x2421,  # control characters get a picture;
           **dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)}  # a lone surrogate cannot be written
CHARTS = {  # section: (title, figures of a step, figure of an evaluation for runs without them, caption)
    "Reward": (
        ("R", "reward", "tr", "Training reward, mean over the answers of a step (of an evaluation: TR)."),
        ("TR", "tr", "tr", "The same answers by the evaluation's reward, R_s (1 + 2 R_a) + Omega."),
        ("R_a", "wa", "wa", "Mean R_a where truth and decision are both continue: do the questions ask for I*?"),
        ("R_s", "aa", "aa", "Share of right decisions between continue and stop."),
        ("Omega", "fc", "fc", "Mean Omega: one question and no more, or the bare stop marker.")),
    "Metrics": (
        ("WA", "-", "wa", "Mean R_a where truth and decision are both continue."),
        ("WA-GH", "-", "wa_gh", "Share of R_a = 1 where truth and decision are both continue."),
        ("WC", "-", "wc", "Share of right decisions where the truth is continue."),
        ("WS", "-", "ws", "Share of right decisions where the truth is stop."),
        ("AA", "-", "aa", "Share of right decisions."), ("FC", "-", "fc", "Mean Omega, the form of the answers."),
        ("TR", "-", "tr", "Mean of R_s (1 + 2 R_a) + Omega.")),
    "Training": (
        ("Loss", "loss", None, "Loss of each step."), ("Learning rate", "lr", None, "Learning rate of each step."),
        ("Response length", "length", None, "Mean tokens of an answer."),
        ("Cut-off share", "cut_off", None, "Share of answers that reached rollout.max_new_tokens."),
        ("Entropy", "entropy", None, "Mean entropy of the next-token distribution over answer tokens, in nats."),
        ("Clip share", "clip_share", None, "Share of answer tokens whose ratio was clipped."),
        ("Sampler/trainer gap", "gap_max gap_mean", None,
         "|log-prob by the sampler - by the trainer|, same weights: solid the largest, dotted the mean; log axis."),
        ("KL", "kl", None, "Mean of log pi - log pi_ref over answer tokens."),
        ("Gradient norm", "grad_norm", None, "Global gradient norm before clipping."),
        ("Skipped groups", "skipped_groups", None, "Share of groups not trained on: their advantages are all zero."),
        ("Most frequent answer", "top_share", None, "Its share among the answers at a step's continue turns."),
        ("Distinct answers", "distinct", None, "Number of different answers at a step's continue turns."),
        ("Preference accuracy", "accuracy", None, "Share of pairs whose chosen answer has the higher implicit reward."),
        ("Margin", "margin", None, "Mean implicit reward of the chosen answer minus that of the rejected one."),
        ("Implicit rewards", "chosen_reward rejected_reward", None, "Mean over pairs: solid chosen, dotted rejected."))}


def number(value):
    """A finite number as it is, else None: null, NaN, a text, a truth value."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def show(value, spec=".2f"):
    return "–" if number(value) is None else format(value, spec)


def esc(text):
    """Any text -> HTML text, also for attributes: esc('<b>&') is '&lt;b&gt;&amp;'."""
    return html.escape(str(text).translate(VISIBLE))


def label(text):
    """A run's name -> plotly text, which knows a few tags and entities; cut in the middle where it is long."""
    text = str(text).translate(VISIBLE)
    return html.escape(text if len(text) <= 28 else f"{text[:13]}…{text[-14:]}", quote=False)


def smooth(values, window):
    """Centred mean over `window` values (an odd number), near the ends over those there are.

    >>> smooth([0.0, 3.0, 6.0, 0.0], 3)
    [1.5, 3.0, 3.0, 3.0]
    """
    near = (values[max(0, i - window // 2):i + window // 2 + 1] for i in range(len(values)))
    return [sum(v) / len(v) for v in near]


def read_run(path):
    """-> dict: folder, steps and evals (records of metrics.jsonl), result (eval.json or {}), about (a line of text)."""
    folder, lines, result = Path(path).resolve(), [], {}
    if not any((folder / name).is_file() for name in FILES):
        bad = f"holds none of {', '.join(FILES)}" if folder.is_dir() else "is not a folder"
        raise InputError(f"{path} {bad}: name the run_dir of a config that train_grpo.py or eval.py has run with")
    if (folder / "metrics.jsonl").is_file():  # of a killed run the last line may be half a line
        lines = [m for _, m in read_jsonl(folder / "metrics.jsonl", on_bad=lambda n, reason: None)]
        lines = [m for m in lines if number(m.get("step")) is not None]
    if (folder / "eval.json").is_file():
        result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    steps, about = [m for m in lines if m["step"] > 0], result.get("model", "no config.yaml")
    try:
        c = config.load([str(folder / "config.yaml")])
        if steps:
            about = f"{c.train.loss} from {c.model.path}, lr {c.train.lr:g}, reward {c.reward.mode}, seed {c.seed}"
    except InputError:
        pass  # there is none, or one of another version; the curves are there all the same
    return {"folder": folder, "steps": steps, "result": result, "about": f"{about}; {len(steps)} training steps",
            "evals": [{**m["eval"], "step": m["step"]} for m in lines if isinstance(m.get("eval"), dict)]}


def groups_of(folder):
    """-> {side: {turn_id: (turn, graded answers)}}: before and after training, else some of graded.jsonl, or {}."""
    paths = {f"{when} training": folder / f"groups_{when}.jsonl" for when in ("before", "after")}
    found = {side: {g["turn"]["turn_id"]: (g["turn"], g["graded"]) for _, g in read_jsonl(path)}
             for side, path in paths.items() if path.is_file()}
    if found or not ((folder / "graded.jsonl").is_file() and (folder / "turns" / "eval.jsonl").is_file()):
        return found
    turns, graded = {turn["turn_id"]: turn for turn in load_turns(folder / "turns" / "eval.jsonl")}, {}
    for g in evaluation.load_graded(folder / "graded.jsonl"):
        graded.setdefault(g["turn_id"], []).append(g)
    ids = [i for i in graded if i in turns]
    picked = [ids[k * len(ids) // SHOWN] for k in range(SHOWN)] if len(ids) > SHOWN else ids  # spread over the file
    return {"at evaluation": {i: (turns[i], graded[i]) for i in picked}}


def series(records, key):
    """-> steps and values of the records that have a number under this key."""
    points = [(m["step"], m[key]) for m in records if number(m.get(key)) is not None]
    return [x for x, _ in points], [y for _, y in points]


def curves(runs, keys, eval_key, window):
    """A line a run and key: smoothed, single steps faint behind it. Without the figure: the evaluations, as points."""
    traces = []
    for run in runs:
        for key, dash in zip(keys.split(), ("solid", "dot")):
            (x, y), mode = series(run["steps"], key), "lines"
            if not x and eval_key:
                (x, y), mode = series(run["evals"], eval_key), "lines+markers"
            trace = {"type": "scatter", "mode": mode if len(x) > 1 else "markers", "x": x, "y": y,
                     "name": label(run["name"]) + (f" {key.replace('_', ' ')}" if " " in keys else ""),
                     "marker": {"color": run["colour"]}, "line": {"color": run["colour"], "dash": dash, "width": 2}}
            if x and mode == "lines" and window > 1 and key not in AS_IT_IS:
                traces.append({**trace, "opacity": 0.25, "hoverinfo": "skip", "line": {**trace["line"], "width": 1}})
                trace["y"] = smooth(y, window)
            traces += [trace] if x else []
    return traces


def times(runs):
    """Stacked bars by phase: seconds of each step of one run, or minutes of all steps of several. -> traces, layout"""
    bars, layout = [], {"barmode": "stack", "bargap": 0}
    if len(runs) > 1:
        names = {"tickvals": list(range(len(runs))), "ticktext": [label(run["name"]) for run in runs]}
        layout |= {"bargap": 0.5, "hovermode": "closest", "xaxis": {"title": "", **names}}
    for (key, name), colour in zip(PHASES.items(), COLOURS[3:]):
        x, y = series(runs[0]["steps"], key)
        if len(runs) > 1:
            x, y = names["tickvals"], [sum(series(run["steps"], key)[1]) / 60 for run in runs]
        bars += [{"type": "bar", "x": x, "y": y, "name": name, "marker": {"color": colour}}] if any(y) else []
    return bars, layout


def legend(entries):
    mark = '<span class="key"><i style="background:{}"></i><bdi>{}</bdi></span>'
    return "".join(mark.format(colour, esc(name)) for name, colour in entries)


def charts(runs):
    """-> HTML of the sections, and the figures [{"data", "layout"}] of its divs plot0, plot1, ..."""
    window = max(len(run["steps"]) for run in runs) // 20 | 1  # odd
    faint = f" Lines are centred means over {window} steps; single steps are faint." if window > 1 else ""
    notes = {"Reward": f"The reward and its parts in training, as in the paper's Figure 4.{faint} A run without "
                       "rewards of its own (SFT, DPO) shows its evaluations during training, as points.",
             "Metrics": "Evaluations during training, sampled, at turns it does not train on; step 0: the base model.",
             "Training": f"Figures of the optimizer steps.{faint}",
             "Time": "Minutes of all logged steps." if len(runs) > 1 else "Seconds of each step."}
    page, figures = "", []
    for heading, note in notes.items():
        boxes = ""
        for title, keys, eval_key, caption in CHARTS.get(heading, [("By phase", "", None, "")]):
            traces, layout = (curves(runs, keys, eval_key, window), {}) if keys else times(runs)
            if not traces:
                continue
            low = min(y for trace in traces for y in trace["y"])
            mode = "tozero" if heading != "Training" else "nonnegative" if low >= 0 else "normal"
            layout["yaxis"] = {"type": "log"} if "gap" in keys else {"rangemode": mode}
            caption = esc(caption) or legend((bar["name"], bar["marker"]["color"]) for bar in traces)
            boxes += (f'<figure><h3>{title}</h3><div class="plot" id="plot{len(figures)}"></div>'
                      f'<figcaption>{caption}</figcaption></figure>')
            figures.append({"data": traces, "layout": layout})
        page += f'<h2>{heading}</h2><p class="note">{note}</p><div class="charts">{boxes}</div>' if boxes else ""
    return page, figures


def final_table(runs):
    """The final evaluations with their 95% intervals: a row a run, sampled, then greedy."""
    metrics, rows = {key: (name, text) for name, _, key, text in CHARTS["Metrics"]}, ""
    for run, m in [(r, r["result"]) for r in runs] + [(r, r["result"].get("greedy")) for r in runs]:
        if m:
            bounds = [(m.get("intervals") or {}).get(k) or (None, None) for k in metrics]
            cells = "".join(f"<td>{show(m.get(k), '.3f')}<small>{show(low)}–{show(high)}</small></td>"
                            for k, (low, high) in zip(metrics, bounds))
            rows += (f'<tr><th><bdi>{esc(run["name"])}</bdi><small>{esc(m.get("decoding", "greedy"))}</small></th>'
                     f'{cells}<td>{show(m.get("n"), "d")}<small>{show(m.get("failed"), "d")} failed</small></td></tr>')
    head = "".join(f'<th title="{esc(text)}">{name}</th>' for name, text in metrics.values())
    return rows and (f'<div class="scroll"><table class="final"><tr><th>final evaluation</th>{head}<th>answers</th>'
                     f'</tr>{rows}</table></div><p class="note">Held-out turns; small: 95% intervals by session.</p>')


def rewards(graded):
    """-> [G], NaN where the grading failed."""
    given = [number(g.get("reward")) for g in graded]
    return torch.tensor([math.nan if r is None else r for r in given], dtype=torch.float64)


def answers(side, graded):
    """One side of a turn: its answers with their grades and advantages."""
    advantages = train_grpo.advantages(rewards(graded)[None])[0].tolist() if graded else []
    rows = "".join(f'<tr><td><div class="text" dir="auto">{esc(g.get("response") or "(empty)")}</div></td>'
                   + "".join(f"<td>{show(g.get(k), '.4g')}</td>" for k in ("r_a", "r_s", "omega", "reward"))
                   + f"<td>{format(a, '+.2f') if a else '0'}</td></tr>" for g, a in zip(graded, advantages))
    return (f'<section><h4>{side}: mean R {show(rewards(graded).nanmean().item())}</h4><div class="scroll"><table '
            'class="answers"><tr><th>answer</th><th>R_a</th><th>R_s</th><th>Ω</th><th>R</th><th>A</th></tr>'
            f'{rows}</table></div></section>')


def groups(folder):
    """The groups of a run: a turn to unfold each, before and after side by side, and buttons that filter."""
    sides, page, counts = groups_of(folder), "", dict.fromkeys(("all", "continue", "stop", "R fell"), 0)
    for i, turn in {i: turn for side in sides.values() for i, (turn, _) in side.items()}.items():
        graded = {name: side[i][1] if i in side else [] for name, side in sides.items()}
        means, decision = [rewards(g).nanmean().item() for g in graded.values()], turn.get("decision")
        kinds = ["all", str(decision)] + ["R fell"] * (means[-1] < means[0])  # a side without rewards is NaN: not less
        counts |= {kind: counts.get(kind, 0) + 1 for kind in kinds}
        lines = [("user" if m["role"] == "user" else "expert", m["content"]) for m in turn["context"]]
        said = [text for who, text in lines if who == "user"][-1:] or [""]
        lines += [("I*", "; ".join(map(str, turn.get("target") or [])) or "(nothing left to learn)"), ("s*", decision),
                  ("expert said", turn.get("expert") or "(nothing more)")]
        talk = "".join(f'<dt>{who}</dt><dd class="text" dir="auto">{esc(text)}</dd>' for who, text in lines)
        page += (f'<details data-kinds="{esc("|".join(kinds))}"><summary><bdi>{esc(i)}</bdi> <b>{esc(decision)}</b> '
                 f'<bdi class="said">{esc(said[0][:160])}</bdi> <span>R {" → ".join(map(show, means))}</span></summary>'
                 f'<dl>{talk}</dl><div class="sides">{"".join(map(answers, graded, graded.values()))}</div></details>')
    buttons = "".join(f'<button data-kind="{kind}" aria-pressed="{str(kind == "all").lower()}">{kind} {counts[kind]}'
                      '</button>' for kind in ("all", "continue", "stop", "R fell"))
    return page and ('<h2>Groups of answers</h2><p class="note">Sampled at held-out turns, graded as in evaluation. '
                     'A = (R - mean) / (std + 1e-6) in the group; a failed grading (–) has A = 0. s* is the right '
                     f'decision, I* what was still to be learned.</p><p class="filter">{buttons}</p>{page}')


def write(paths, out=None):
    """Read the runs and write the page, whole or not at all. -> its path"""
    runs = list({run["folder"]: run for run in map(read_run, paths)}.values())
    parent = Path(os.path.commonpath([run["folder"].parent for run in runs]))
    for run, colour in zip(runs, COLOURS * len(runs)):
        run |= {"name": run["folder"].relative_to(parent), "colour": colour}
    out = Path(out or (parent if len(runs) > 1 else runs[0]["folder"]))
    out = out / "report.html" if out.is_dir() else out
    sections, figures = charts(runs)
    key = [(run["name"], run["colour"]) for run in runs]
    files = ", ".join(f"<bdi><code>{esc(name / 'report.html')}</code></bdi>" for name, _ in key)
    elsewhere = ("<h2>Groups of answers</h2><p>They are in the report of each run by itself, which <code>python "
                 f"report.py RUN</code> writes: {files}.</p>")
    write_text(out, PAGE.substitute(
        title=", ".join(esc(name) for name, _ in key), made=f"{datetime.now():%Y-%m-%d %H:%M}", table=final_table(runs),
        runs="".join(f"<li>{legend([k])} {esc(run['about'])}</li>" for k, run in zip(key, runs)), charts=sections,
        legend=f'<div class="legend">{legend(key)}</div>' if len(runs) > 1 and figures else "",
        groups=elsewhere if len(runs) > 1 else groups(runs[0]["folder"]),
        plotly=get_plotlyjs() if figures else "", figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c")))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    p.add_argument("--out", metavar="FILE", help="where to write the page")
    args = p.parse_args()
    print(f"wrote {write(args.runs, args.out)}")


PAGE = Template(r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>$title</title><style>
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #59636e; --line: #d8dde3; --tint: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e3e7eb; --soft: #9aa4ae; --line: #353b43; --tint: #1d2126 } }
* { box-sizing: border-box } [hidden] { display: none } bdi, h1, li { overflow-wrap: anywhere }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; font: 15px/1.5 system-ui, sans-serif;
  background: var(--page); color: var(--ink) }
h2 { margin: 2.5rem 0 .3rem } h3, h4 { margin: 0 } ul { list-style: none; padding: 0 } .note { max-width: 60rem }
.note, figcaption, small, dt, .runs { color: var(--soft); font-size: .85rem }
.legend { position: sticky; top: 0; z-index: 2; padding: .4rem 0; background: var(--page) }
.key, .key i { display: inline-block; margin-right: 1rem } .key i { width: .8rem; height: .8rem; margin-right: .35rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 1rem }
figure { margin: 0; min-width: 0 } figure:only-child { grid-column: 1 / -1 } .plot { height: 220px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
small { display: block; white-space: nowrap; font-weight: 400 } .answers th + th { width: 3.6rem }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left; min-width: 9rem }
.final th:first-child { position: sticky; left: 0; background: var(--page) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto }
button { font: inherit; padding: .2rem .7rem; margin: 0 .3rem .4rem 0; border: 1px solid var(--line);
  border-radius: 1rem; background: none; color: inherit }
button[aria-pressed=true] { background: var(--ink); color: var(--page) } h1 { font-size: 1.6rem }
details { border-top: 1px solid var(--line) } summary::before { content: "▸" } [open] summary::before { content: "▾" }
summary { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .4rem 0; cursor: pointer } summary b { width: 5rem }
.said { flex: 1 1 12rem; min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; padding: .7rem; background: var(--tint) }
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
  const base = {showlegend: false, hovermode: "x unified", paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    margin: {l: 40, r: 12, t: 8, b: 36}, font: {size: 11, color: css.getPropertyValue("--soft")},
    hoverlabel: {bgcolor: css.getPropertyValue("--page"), namelength: -1},
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom"};  // a finger scrolls the page
  figures.forEach((f, i) => Plotly.react("plot" + i, f.data, {...base, ...f.layout,
    yaxis: {...axis, hoverformat: ".4g", ...f.layout.yaxis},
    xaxis: {...axis, title: {text: "step"}, ...f.layout.xaxis}}, {responsive: true, displayModeBar: false}));
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
const buttons = [...document.querySelectorAll(".filter button")], turns = [...document.querySelectorAll("details")];
buttons.forEach(button => button.addEventListener("click", () => {
  buttons.forEach(b => b.setAttribute("aria-pressed", b === button));
  turns.forEach(d => { d.hidden = !d.dataset.kinds.split("|").includes(button.dataset.kind); });
}));
</script>
""")

if __name__ == "__main__":
    cli(main)
