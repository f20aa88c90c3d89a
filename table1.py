"""Table 1 of the paper (arXiv 2510.25441): run its rows, and print any runs beside the paper's numbers.

    python table1.py configs/toy/grpo.yaml configs/toy/sft.yaml --nproc 2 [--root DIR] [key=value ...]
    python table1.py configs/table1/7b/*.yaml --nproc 8
    python eval.py --table RUN [RUN ...]                    # the view alone, of runs that are there

A row is a config: hindsight.py, pairs.py where it is DPO, its trainer, eval.py. Interrupted, the same command goes on where it
was; a finished row is not run again unless its config, logs, lexicon, prompts or base model changed, and then what was
there is moved aside. At the end: the view, in Markdown and JSON, and a report.html with the rows' curves overlaid.

Two rows differ by the bootstrap of their difference on the same sessions (paired): 95% intervals, whole sessions drawn.
Runs of one name are seeds of one row; their rollouts are pooled.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import checkpoint
import config
import eval as evaluation
import llm
import model as decoder
import pairs
import training
from data import InputError, cli, identity, write_json, write_text

COLUMNS = ("wa", "wa_gh", "wc", "ws", "aa", "fc", "tr")
# Table 1: the row's label there, Qwen2.5-7B-Instruct, Qwen2.5-32B-Instruct. "w/o R_a" and "w/o R_s" as labelled there, though
# the first has the numbers of a model that never learned to stop (which is what leaving out R_s does): they look exchanged.
PAPER = {
    "base": ("Base", (.50, .13, .98, .16, .75, .63, 2.17), (.50, .13, .92, .52, .81, .67, 2.43)),
    "sft": ("SFT", (.40, .08, .94, .74, .89, .57, 2.41), (.43, .11, .94, .87, .93, .69, 2.70)),
    "dpo": ("DPO", (.42, .05, .94, .36, .78, .19, 1.78), (.23, .04, .52, .87, .62, .18, 1.61)),
    "grpo": ("GRPO", (.67, .41, .94, .93, .94, .92, 3.27), (.64, .37, .93, .88, .92, .88, 3.15)),
    "no_ra": ("w/o R_a", (.63, .34, 1.00, .02, .73, .70, 2.35), (.57, .26, .97, .33, .79, .74, 2.52)),
    "no_rs": ("w/o R_s", (.52, .19, .96, .87, .93, .92, 3.06), (.54, .19, .95, .91, .94, .92, 3.12)),
    "sum": ("Sum", (.64, .38, .92, .95, .93, .91, 3.20), (.65, .37, .94, .88, .92, .90, 3.19)),
    "gspo": ("GSPO", (.61, .31, .93, .94, .93, .91, 3.16), (.62, .32, .95, .86, .93, .89, 3.12)),
    "cispo": ("CISPO", (.71, .47, .95, .94, .95, .93, 3.36), (.70, .49, .94, .89, .93, .92, 3.29)),
}
# (the better row by the paper's text or 7B figures, the other, the metric)
ORDERINGS = [("grpo", "sft", "tr"), ("sft", "base", "tr"), ("grpo", "base", "tr"), ("base", "dpo", "tr"), ("cispo", "grpo", "tr"),
             ("grpo", "gspo", "tr"), ("grpo", "sum", "tr"), ("grpo", "no_ra", "tr"), ("grpo", "no_ra", "wa_gh"),
             ("grpo", "no_rs", "tr"), ("grpo", "no_rs", "ws")]


# --------------------------------------------------------------------------------------------------------- the view

def read_rows(runs):
    """Run folders -> {row: {"runs", "decoding", "sampled", "greedy"}}; runs of one folder name are pooled.

    Turn ids get a prefix that tells worlds apart, so that sessions pair up where two runs were evaluated on the same turns.
    """
    rows = {}
    for run in map(Path, runs):
        for name in ("eval.json", "graded.jsonl", "graded_greedy.jsonl"):
            if not (run / name).is_file():
                raise InputError(f"{run / name} does not exist: run eval.py with that run's config first")
        row = rows.setdefault(run.resolve().name, {"runs": [], "decoding": [], "sampled": [], "greedy": []})
        row["runs"].append(str(run))
        row["decoding"].append(json.loads((run / "eval.json").read_text(encoding="utf-8"))["decoding"])
        for how, name in (("sampled", "graded.jsonl"), ("greedy", "graded_greedy.jsonl")):
            graded = evaluation.load_graded(run / name)
            world = hashlib.sha256(repr(sorted({(g["turn_id"], g["truth"]) for g in graded})).encode()).hexdigest()[:8]
            row[how].append([{**g, "turn_id": f"{world}/{g['turn_id']}"} for g in graded])
    return rows


def paired(a, b, metric, n_boot=2000, seed=0):
    """Difference of a metric between two sets of graded rollouts on the sessions they share.
    -> (difference, [low, high]), or None where they share none or the metric counts nothing."""
    parts = [evaluation.by_session(g) for g in (a, b)]
    shared = sorted(set(parts[0][0]) & set(parts[1][0]))
    if not shared:
        return None
    k, cut = evaluation.MEANS.index(metric), []
    for names, sums, counts in parts:
        at = np.searchsorted(names, shared)
        cut.append((sums[at], counts[at]))
    with np.errstate(invalid="ignore"):
        (sums_a, counts_a), (sums_b, counts_b) = cut
        point = sums_a[:, k].sum() / counts_a[:, k].sum() - sums_b[:, k].sum() / counts_b[:, k].sum()
    means = evaluation.bootstrap(cut, n_boot, seed)
    drawn = means[0][:, k] - means[1][:, k]
    if np.isnan(point) or np.isnan(drawn).all():
        return None
    return float(point), [float(q) for q in np.nanquantile(drawn, (0.025, 0.975))]


def summarise(runs):
    """Run folders -> the object of table.json."""
    rows, out = read_rows(runs), {"rows": {}, "orderings": []}
    for name, row in rows.items():
        flat = {how: [g for graded in row[how] for g in graded] for how in ("sampled", "greedy")}
        out["rows"][name] = {"runs": row["runs"], "decoding": ", ".join(dict.fromkeys(row["decoding"])),
                             **{how: evaluation.summarise(graded) for how, graded in flat.items()},
                             "tr_by_run": [evaluation.metrics(graded)["tr"] for graded in row["sampled"]]}
        if name in PAPER:
            out["rows"][name]["paper"] = {size: dict(zip(COLUMNS, PAPER[name][1 + i])) for i, size in enumerate(("7b", "32b"))}
        rows[name] |= flat
    for better, worse, metric in ORDERINGS:
        if better in rows and worse in rows:
            k = COLUMNS.index(metric)
            entry = {"better": better, "worse": worse, "metric": metric,
                     "paper": {size: round(PAPER[better][i][k] - PAPER[worse][i][k], 2) for i, size in ((1, "7b"), (2, "32b"))}}
            for how in ("sampled", "greedy"):
                found = paired(rows[better][how], rows[worse][how], metric)
                entry[how] = found and {"difference": found[0], "interval": found[1], "verdict": verdict(*found[1])}
            out["orderings"].append(entry)
    return out


def verdict(low, high):
    """What the 95% interval of a difference says about "the first is better"."""
    return "holds" if low > 0 else "the reverse" if high < 0 else "undecided"


def label(name):
    return PAPER[name][0] if name in PAPER else name


def markdown(summary):
    """table.json's object -> the view: both decodings, the paper's numbers under each row, and its orderings."""
    def cell(value, bound=None):
        if value is None:
            return "-"
        return f"{value:.2f}" + (f" [{bound[0]:.2f}, {bound[1]:.2f}]" if bound else "")

    heads, lines = [c.upper().replace("_", "-") for c in COLUMNS], []
    decodings = ", ".join(dict.fromkeys(r["decoding"] for r in summary["rows"].values()))
    for how, title in (("sampled", f"Sampled ({decodings})"), ("greedy", "Greedy")):
        beside = "; under each row the paper's figures at 7B / 32B" if how == "sampled" else ""
        lines += [f"**{title}**, with 95% intervals (bootstrap by session){beside}", ""]
        grid = [["", *heads, "top share", "distinct", "n", "failed"]]
        for name, r in summary["rows"].items():
            m = r[how]
            grid.append([f"**{label(name)}**", *(cell(m[c], m["intervals"][c]) for c in COLUMNS), cell(m["top_share"]),
                         str(m["distinct"]), str(m["n"]), str(m["failed"])])
            if "paper" in r and how == "sampled":
                paper = r["paper"]
                grid.append(["paper", *(f"{paper['7b'][c]:.2f} / {paper['32b'][c]:.2f}" for c in COLUMNS), "", "", "", ""])
        lines += [evaluation.aligned(grid), ""]
    several = {name: r for name, r in summary["rows"].items() if len(r["runs"]) > 1}
    if several:
        lines += ["**TR of each seed** (sampled)", ""]
        lines += [f"- {label(name)}: " + ", ".join(cell(tr) for tr in r["tr_by_run"]) for name, r in several.items()] + [""]
    if summary["orderings"]:
        lines += ["**The paper's orderings** and what holds here: paired difference with its 95% interval; undecided where that "
                  "includes 0", ""]
        grid = [["", "paper 7B / 32B", "sampled", "", "greedy", ""]]
        for o in summary["orderings"]:
            cells = [f"{label(o['better'])} > {label(o['worse'])} in {o['metric'].upper().replace('_', '-')}",
                     f"{o['paper']['7b']:+.2f} / {o['paper']['32b']:+.2f}"]
            for how in ("sampled", "greedy"):
                found = o[how]
                low, high = found["interval"] if found else (None, None)
                cells += [f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", found["verdict"]] if found else ["-", "other turns"]
            grid.append(cells)
        lines += [evaluation.aligned(grid), ""]
    return "\n".join(lines)


def view(runs):
    """Print the view of these runs; write it as table.md and table.json into the folder that holds them."""
    summary, folder = summarise(runs), Path(os.path.commonpath([Path(run).resolve().parent for run in runs]))
    text = markdown(summary)
    print(text)
    write_text(folder / "table.md", text)
    write_json(folder / "table.json", summary)
    print(f"wrote {os.path.relpath(folder / 'table.md')} and table.json beside it")


# ---------------------------------------------------------------------------------------------------------- the runs

def changed(cfg, want, have):
    """-> what this run's training depends on that is not as it was: names of config keys and files."""
    path = Path(cfg.run_dir) / "config.yaml"
    old = have["config"] if have else config.flatten(config.load([str(path)])) if path.is_file() else want["config"]
    names = [name for name, value in want["config"].items() if old.get(name) != value and not checkpoint.may_change(name, cfg)]
    return names + [name for name, mark in want["inputs"].items() if have and have["inputs"].get(name) != mark]


def run_row(path, overrides, nproc):
    """Bring one row to its end; nothing is done where it is there already. -> its run folder."""
    cfg = config.load([path, *overrides])
    run, stamp = Path(cfg.run_dir), Path(cfg.run_dir) / "row.json"
    config.need(cfg, "model.path", "data.logs", "data.eval_logs")
    names = ["data.logs", "data.eval_logs", "data.lexicon", "data.prompt", "data.prompt_no_stop"]
    files = {name: file for name in names if (file := config.flatten(cfg)[name])}
    files |= {f"llm.{role}.prompt": s.prompt or llm.PROMPTS[role] for role in llm.PROMPTS if (s := getattr(cfg.llm, role)).model}
    for name, file in files.items():
        if not Path(file).is_file():
            raise InputError(f"{path}: {name}={file} does not exist")
    inputs = {name: identity(file) for name, file in {**files, "model.path": decoder.resolve(cfg.model.path)}.items()}
    want = {"config": config.flatten(cfg), "inputs": inputs, "finished": True}
    have = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else None
    if have == want:
        print(f"=== {run}: finished before, not run again")
        return run
    if (run / "metrics.jsonl").is_file() and (names := changed(cfg, want, have)):
        aside = next(p for i in range(1, 1000) if not (p := run.with_name(f"{run.name}.old{i}")).exists())
        print(f"=== {run}: {', '.join(names)} changed; what was there is now {aside}")
        run.rename(aside)
    write_json(stamp, {**want, "finished": False})
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    stages = [([sys.executable], "hindsight.py")]
    if cfg.train.loss == "dpo" and not ((run / "pairs.jsonl").is_file() and pairs.same_made(cfg)):
        stages.append(([sys.executable], "pairs.py"))
    if cfg.train.steps != 0:
        stages.append((many, training.script_of(cfg.train.loss)))
    for start, script in [*stages, (many, "eval.py")]:
        began = time.perf_counter()
        print(f"=== {run}: {script}", flush=True)
        if done := subprocess.run([*start, str(Path(__file__).with_name(script)), path, *overrides]).returncode:
            raise InputError(f"{script} ended with exit code {done} (see above); the same command goes on from here")
        print(f"=== {run}: {script} took {time.perf_counter() - began:.0f} s", flush=True)
    write_json(stamp, want)
    return run


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("configs", nargs="+", metavar="CONFIG", help="one YAML a row, and key=value overrides for all of them")
    p.add_argument("--nproc", type=int, default=1, help="processes (GPUs) of this node for training and evaluation")
    p.add_argument("--sessions", type=int, default=0, help="show so many held-out conversations at the end")
    p.add_argument("--root", help="folder of the runs, each named like its config (default: every config's run_dir)")
    a = p.parse_intermixed_args()
    import report
    overrides = [c for c in a.configs if "=" in c]
    runs = []
    for path in [c for c in a.configs if "=" not in c]:
        where = [f"run_dir={a.root}/{Path(path).stem}"] if a.root else []
        runs.append(run_row(path, [*overrides, *where], a.nproc))
    if not runs:
        raise InputError("no config named: give a YAML for each row, e.g. configs/toy/grpo.yaml")
    print()
    view(runs)
    if a.sessions:
        evaluation.show_sessions(runs, a.sessions)
    print(f"wrote {os.path.relpath(report.write(runs))}: the rows' curves overlaid")


if __name__ == "__main__":
    cli(main)
