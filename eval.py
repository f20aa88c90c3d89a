"""A model's figures on the held-out turns, and runs beside Table 1 of the paper (arXiv 2510.25441).

    python eval.py cfg.yaml [key=value ...]   # sample and grade the held-out turns (also under torchrun)
    python eval.py --graded FILE              # the table with 95% intervals; last line: one JSON object
    python eval.py --table RUN [RUN ...] [--sessions 3]   # runs beside Table 1, conversations turn by turn

The first form evaluates run_dir/export, or model.path (the Base row) where the run never trained. It always
uses the prompt that mentions stopping, and writes graded.jsonl (sampled), graded_greedy.jsonl and eval.json.
Decoding matters (greedy alone lifts a base model a good deal), so both are shown. metrics.py says what each
metric is.

Two rows are compared by a bootstrap of their difference on the same sessions (95% intervals, whole sessions
drawn). Runs of one folder name are seeds of one row, and their rollouts are pooled.
"""
import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import checkpoint
import config
import grading
import model as decoder
import parallel
import report
from metrics import (
    MEANS,
    OTHERS,
    aligned,
    cell,
    heading,
    load_graded,
    paired,
    session_of,
    summarise,
    table,
)
from prompts import encode_prompts, load_tokenizer, load_turns, read_turns
from records import (
    InputError,
    cli,
    file_hash,
    hash_of,
    last_step,
    lock,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)
from rollout import load_policy

DECODINGS = {"sampled": "graded.jsonl", "greedy": "graded_greedy.jsonl"}


# ------------------------------------------------------------------------------------------ a model's figures

def full_reward(judge):
    """The judge with the reward that evaluation uses whatever a run was trained on: the product, beta 2."""
    kept = judge.reward.model_dump(include={"grader", "omega", "audit", "max_failed"})
    return replace(judge, reward=config.RewardConfig(**kept))


def evaluate(policy, judge, prompts, cfg, greedy=False, desc="evaluate"):
    """Sample responses to every prompt and grade them (collective) -> list of Rollout, on every rank."""
    sampling = grading.sampling_of(cfg, True, greedy)
    keys = [(config.Stream.EVALUATION, i) for i in range(len(prompts))]
    judge = full_reward(judge)
    groups, _ = grading.sample_graded(policy, judge, prompts, keys, sampling, desc)
    grading.check_failed(groups, judge, "in this evaluation", "a rerun asks for these again")
    return [rollout for group in groups for rollout in group.graded]


def model_of(cfg):
    """The folder that a config evaluates: what it trained, or its base model where it never trained."""
    run = cfg.run_path
    export, begun = run / "export", checkpoint.all_checkpoints(run)
    steps = trained(run)
    if steps and steps >= max(last_step(run), *(int(path.stem[5:]) for path in begun), 0):
        return export
    if begun or export.is_dir() or (run / "metrics.jsonl").is_file():
        raise InputError(f"{run} holds a run that has not come to its end (no export, or an older one): run "
                         "it to the end first")
    return decoder.resolve(cfg.model.path)


def trained(run):
    """How many steps the model that a run exported was trained; 0 where there is none."""
    return read_json(run / "export" / ".trained.json", {"steps": 0})["steps"]


def hashes(run):
    """Those of a run's graded rollouts, which eval.json belongs to."""
    return {file: file_hash(run / file) for file in DECODINGS.values()}


def evaluate_run(cfg):
    """Evaluate a config's model, sampled and greedy (collective). Rank 0 prints a table and writes files."""
    config.need(cfg, "model.path")
    rank, _, device = parallel.start()
    if rank == 0:
        lock(cfg.run_path)
    checkpoint.open_run(cfg, 1)  # as a rank that saves nothing: was the run trained with this config?
    run, folder = cfg.run_path, model_of(cfg)
    judge = grading.open_judge(cfg)
    prompts = encode_prompts(load_tokenizer(folder), load_turns(cfg, "eval"), cfg)
    # The weights come last: whatever a user can mend is found before they are read.
    policy = load_policy(folder, device, parallel.compute_dtype(cfg.model.dtype, device))
    graded = {how: evaluate(policy, judge, prompts, cfg, how == "greedy", f"{folder} {how}")
              for how in DECODINGS}
    world = hashlib.sha256(repr([prompt.turn for prompt in prompts]).encode()).hexdigest()[:8]
    if rank == 0:
        name = f"temperature {cfg.eval.temperature:g}"
        if cfg.eval.top_p < 1:
            name += f", top-p {cfg.eval.top_p:g}"
        sampled, greedy = map(summarise, graded.values())
        print(table(name, sampled, {"greedy": greedy}))
        for how, file in DECODINGS.items():
            write_jsonl(run / file, graded[how])
        judged = hash_of([file_hash(path) for path in (cfg.data.lexicon, cfg.llm.grader.prompt) if path])[:8]
        write_json(run / "eval.json", {**sampled, "model": str(folder), "decoding": name, "judge": judged,
                                       "steps": trained(run), "files": hashes(run),
                                       "samples": cfg.eval.samples, "turns": world,
                                       "config": config.flatten(cfg), "greedy": greedy})
        page = report.try_to_write(run)
        print(f"wrote {run / 'eval.json'}, {page}; beside them {', '.join(DECODINGS.values())}")
    parallel.stop()


# ---------------------------------------------------------------------------------------------------- Table 1

COLUMNS = MEANS[:7]
# The row, its label in the paper, the figures of Qwen2.5-7B-Instruct and of Qwen2.5-32B-Instruct, as COLUMNS.
# "w/o R_a" and "w/o R_s" stand as labelled there, though the first has the numbers of a model that never
# learned to stop (which is what leaving out R_s does): they look exchanged.
TABLE_1 = """
base  | Base    | .50 .13  .98 .16 .75 .63 2.17 | .50 .13 .92 .52 .81 .67 2.43
sft   | SFT     | .40 .08  .94 .74 .89 .57 2.41 | .43 .11 .94 .87 .93 .69 2.70
dpo   | DPO     | .42 .05  .94 .36 .78 .19 1.78 | .23 .04 .52 .87 .62 .18 1.61
grpo  | GRPO    | .67 .41  .94 .93 .94 .92 3.27 | .64 .37 .93 .88 .92 .88 3.15
no_ra | w/o R_a | .63 .34 1.00 .02 .73 .70 2.35 | .57 .26 .97 .33 .79 .74 2.52
no_rs | w/o R_s | .52 .19  .96 .87 .93 .92 3.06 | .54 .19 .95 .91 .94 .92 3.12
sum   | Sum     | .64 .38  .92 .95 .93 .91 3.20 | .65 .37 .94 .88 .92 .90 3.19
gspo  | GSPO    | .61 .31  .93 .94 .93 .91 3.16 | .62 .32 .95 .86 .93 .89 3.12
cispo | CISPO   | .71 .47  .95 .94 .95 .93 3.36 | .70 .49 .94 .89 .93 .92 3.29
"""
LABELS, PAPER = {}, {}  # {row: label}, {row: {size: {metric: figure}}}
for line in TABLE_1.strip().splitlines():
    row, label, *sizes = map(str.strip, line.split("|"))
    figures = [dict(zip(COLUMNS, map(float, size.split()))) for size in sizes]
    LABELS[row], PAPER[row] = label, dict(zip(("7b", "32b"), figures))
# The better row by the paper's text or 7B figures, the other, the metric.
ORDERINGS = ("grpo sft tr", "sft base tr", "grpo base tr", "base dpo tr", "cispo grpo tr", "grpo gspo tr",
             "grpo sum tr", "grpo no_ra tr", "grpo no_ra wa_gh", "grpo no_rs tr", "grpo no_rs ws")


# How a run was evaluated: what a table says aloud where it is not alike.
HOW = ("decoding samples steps turns judge reward.grader reward.wording reward.omega data.prompt "
       "rollout.max_new_tokens llm.grader.model llm.grader.base_url").split()


def same_but_seed(made):
    """What must be alike in runs that are pooled: {key: value}, with paths as they stand beside the run."""
    root = f"{Path(made['run_dir']).parent}/"
    return {name: str(value).replace(root, "") for name, value in made.items()
            if name != "seed" and config.AFFECTS.get(name)}


def read_rows(runs):
    """Run folders -> {row: {"runs", "made", "how", "sampled", "greedy", "tr_by_run"}}.

    Runs of one folder name are seeds of one row, and pooled. InputError: they differ in more than the seed.
    sampled and greedy are lists of Rollout; made is the config, how says how each run was evaluated.
    """
    rows, seeds = {}, {}
    for run in map(Path, runs):
        path = run / "eval.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: run eval.py with that run's config first")
        row, found = rows.setdefault(run.resolve().name, defaultdict(list)), read_json(path)
        if "config" not in found:
            raise InputError(f"{path} does not tell its config: run eval.py with it again")
        if found.get("files") != hashes(run) or found["steps"] < last_step(run):
            raise InputError(f"{path} is not of the rollouts or of the training beside it: run eval.py with "
                             "that run's config again")
        first = seeds.setdefault((run.resolve().name, found["config"]["seed"]), run)
        if first is not run:  # counted twice, they would make the intervals too narrow
            raise InputError(f"{first} and {run} are one seed of one row (a link, a copy?): name one of them")
        made = same_but_seed(found["config"])
        for name, value in row.setdefault("made", made).items():
            if made.get(name) != value:
                raise InputError(f"{row['runs'][0]} and {run} have one name but differ in {name} ({value}, "
                                 f"{made.get(name)}): only seeds of one row are pooled; rename a folder")
        row["runs"].append(str(run))
        row["how"].append({name: (found["config"] | found | made)[name] for name in HOW})
        row["tr_by_run"].append(found["tr"])
        for how, name in DECODINGS.items():  # sessions pair up only where two runs had the same turns
            row[how] += [g.model_copy(update={"session_id": f"{found['turns']}/{session_of(g)}"})
                         for g in load_graded(run / name)]
    return rows


def unequal(rows):
    """Yield a line for each condition that differs between rows, or between the seeds of one (but for turns:
    each seed may have a world of its own)."""
    for name in HOW:
        values = {row: tuple(sorted({str(how[name]) for how in found["how"]}))
                  for row, found in rows.items()}
        *_, last = values.values()
        if len(set(values.values())) > 1 or name != "turns" and len(last) > 1:
            yield f"- {name} differ: " + "; ".join(f"{LABELS.get(row, row)} {', '.join(value)}"
                                                   for row, value in values.items())


def summarise_runs(runs):
    """Run folders -> the object of table.json."""
    rows, shown, orderings = read_rows(runs), {}, []
    for name, row in rows.items():
        shown[name] = {**row, **{how: summarise(row[how]) for how in DECODINGS}}
        if name in PAPER:
            shown[name]["paper"] = PAPER[name]
    for better, worse, metric in map(str.split, ORDERINGS):
        if better not in rows or worse not in rows:
            continue
        paper = {size: round(m[metric] - PAPER[worse][size][metric], 2) for size, m in PAPER[better].items()}
        here = {how: paired(rows[better][how], rows[worse][how], metric) for how in DECODINGS}
        orderings.append({"better": better, "worse": worse, "metric": metric, "paper": paper, **here})
    return {"rows": shown, "orderings": orderings}


def rows_table(rows, how):
    """The rows of table.json in one decoding. Sampled: with the paper's figures under each row."""
    grid = [["", *map(heading, COLUMNS), "top share", "distinct", "n", "failed"]]
    for name, row in rows.items():
        m = row[how]
        grid.append([f"**{LABELS.get(name, name)}**",
                     *(cell(m[c], ".2f", m["intervals"].get(c)) for c in COLUMNS + OTHERS)])
        if how == "sampled" and "paper" in row:
            small, large = row["paper"].values()
            grid.append(["paper", *(f"{small[c]:.2f} / {large[c]:.2f}" for c in COLUMNS), "", "", "", ""])
    return aligned(grid)


def orderings_table(orderings):
    grid = [["", "paper 7B / 32B", "sampled", "", "greedy", ""]]
    for o in orderings:
        small, large = o["paper"].values()
        cells = [f"{LABELS[o['better']]} > {LABELS[o['worse']]} in {heading(o['metric'])}",
                 f"{small:+.2f} / {large:+.2f}"]
        for found in o["sampled"], o["greedy"]:
            if found:
                cells += [cell(found["difference"], "+.3f", found["interval"]), found["verdict"]]
            else:
                cells += ["-", "other turns"]
        grid.append(cells)
    return aligned(grid)


def markdown(summary):
    """table.json's object -> the view: both decodings, the paper's numbers under each row, its orderings."""
    rows, orderings = summary["rows"], summary["orderings"]
    decodings = ", ".join(dict.fromkeys(how["decoding"] for row in rows.values() for how in row["how"]))
    intervals = "with 95% intervals (bootstrap by session)"
    seeds = [f"- {LABELS.get(name, name)}: {', '.join(cell(tr, '.2f') for tr in row['tr_by_run'])}"
             for name, row in rows.items() if len(row["runs"]) > 1]
    parts = {
        f"**Sampled ({decodings})**, {intervals}; under each row the paper's figures at 7B / 32B":
            rows_table(rows, "sampled"),
        f"**Greedy**, {intervals}": rows_table(rows, "greedy"),
        "**TR of each seed** (sampled)": "\n".join(seeds),
        "**Not alike** (a row is compared with another as it is)": "\n".join(unequal(rows)),
        "**The paper's orderings** and what holds here: paired difference with its 95% interval; undecided "
        "where that includes 0": orderings and orderings_table(orderings)}
    return "\n\n".join(f"{title}\n\n{part}" for title, part in parts.items() if part) + "\n"


def view(runs, sessions=0):
    """Print the view of these runs, and so many conversations; write it as table.md and table.json into the
    folder that holds them."""
    summary = summarise_runs(runs)
    text = markdown(summary)
    print(text)
    folder = Path(os.path.commonpath([Path(run).resolve().parent for run in runs]))
    write_text(folder / "table.md", text)
    write_json(folder / "table.json", summary)
    print(f"wrote {os.path.relpath(folder / 'table.md')} and table.json beside it")
    if sessions:
        show_sessions(runs, sessions)


# ---------------------------------------------------------------------------------------------- conversations

def show_sessions(runs, sessions):
    """Print the first held-out sessions with the first response of each run at every turn."""
    names, said, by_session = [Path(run).name for run in runs], defaultdict(list), defaultdict(list)
    for name, run in zip(names, runs):
        if names.count(name) > 1:  # runs of one name are told apart by their paths
            name = run
        for g in load_graded(Path(run) / "graded.jsonl"):
            if g.sample == 0:
                said[g.turn_id].append((name, g))
    turns = read_json(Path(runs[0]) / "eval.json")["config"].get("data.turns") or Path(runs[0]) / "turns"
    for turn in read_turns(Path(turns) / "eval.jsonl"):
        by_session[turn.session_id].append(turn)
    for session in list(by_session)[:sessions]:
        print(f"\n--- session {session}: first sample of each run at every turn of the held-out log")
        shown = 0
        for turn in by_session[session]:
            for m in turn.context[shown:]:
                print("  user   |" if m.role == "user" else "  expert |", m.content.replace("\n", " / "))
            shown = len(turn.context)
            print(f"           I* = {turn.target or '-'}, s* = {turn.decision}")
            for name, g in said[turn.turn_id]:
                print(f"           {name}: {g.response.strip()!r}  R_a {g.r_a} R_s {g.r_s:g} Omega {g.omega}")


# ----------------------------------------------------------------------------------------------- command line

def main():
    argv = sys.argv[1:]
    if "--help" in argv or argv and not argv[0].startswith("--"):
        evaluate_run(config.load(argv, __doc__))
        return
    p = argparse.ArgumentParser(add_help=False)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--graded", metavar="FILE", help="graded rollouts, JSONL")
    what.add_argument("--table", metavar="RUN", nargs="+", help="run folders that hold an eval.json")
    p.add_argument("--sessions", type=int, default=0, help="with --table: show so many conversations")
    args = p.parse_args()
    if args.graded is not None:
        summary = summarise(load_graded(args.graded))
        print(table(args.graded, summary, {}))
        print(json.dumps(summary))
    else:  # a glob also names table.json, which is no run
        view([run for run in args.table if not Path(run).is_file()], args.sessions)


if __name__ == "__main__":
    cli(main)
