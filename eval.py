"""The seven metrics of the paper's Tables 1 and 2 (arXiv 2510.25441) over graded rollouts.

    python eval.py cfg.yaml [key=value ...]           # sample and grade the held-out turns (also under torchrun)
    python eval.py --graded FILE                      # the table with 95% intervals; last line: one JSON object
    python eval.py --table RUN [RUN ...] [--sessions 3]   # runs beside the paper's Table 1, and conversations turn by turn

The first form evaluates run_dir/export, or model.path (the Base row) where the run never trained, always with the prompt
that mentions stopping, and writes graded.jsonl (sampled), graded_greedy.jsonl and eval.json. Decoding matters (greedy alone
lifts a base model a good deal), so both are shown.

    wa      mean R_a where truth and decision are both continue     wa_gh  share of those with R_a = 1
    wc, ws  share of right decisions among truth continue, stop     aa     among all
    fc      mean Omega                                              tr     mean of R_s (1 + 2 R_a) + Omega
    wa_all  mean R_a over truth continue, a wrong stop counting 0   top_share, distinct: variety of the responses

TR is recomputed here, always as the product with beta 2, whatever reward the rollouts were trained on. wa_all stands
beside wa because the paper's DPO row fits only that reading. A failed grading (null) is left out of the means that
need it and counted in `failed`. Intervals are bootstrapped by session, as turns of one session are not independent.
"""
import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import checkpoint
import config
import hindsight
import model as decoder
import parallel
import reward
import rollout
from data import (DECISIONS, InputError, cli, encode_prompts, load_prompt, load_tokenizer, load_turns, read_jsonl, write_json,
                  write_jsonl)
from reward import fuse

MEANS = ("wa", "wa_gh", "wc", "ws", "aa", "fc", "tr", "wa_all")


def score_matrix(graded):
    """One row a rollout, one column for each of MEANS; NaN where the rollout does not count for that mean.

    A right question graded 0.5 with Omega 1 gives wa .5, wa_gh 0, wc 1, ws NaN, aa 1, fc 1, tr 3, wa_all .5.
    """
    rows, skip = [], math.nan
    for g in graded:
        right = float(g["truth"] == g["decision"])
        r_a = skip if g["r_a"] is None else g["r_a"]
        total = fuse(g["r_a"], right, g["omega"], "product", 2.0)
        asks, truth_continue = right and g["truth"] == "continue", g["truth"] == "continue"
        rows.append((r_a if asks else skip,
                     float(r_a == 1) if asks and g["r_a"] is not None else skip,
                     right if truth_continue else skip,
                     skip if truth_continue else right,
                     right,
                     skip if g["omega"] is None else g["omega"],
                     skip if total is None else total,
                     (r_a if asks else 0.0) if truth_continue else skip))
    return np.array(rows, dtype=np.float64).reshape(-1, len(MEANS))  # [N, K]


def metrics(graded):
    """Graded rollouts -> {metric: number, or None where nothing counts for it}."""
    scores = score_matrix(graded)
    counted = (~np.isnan(scores)).sum(0)
    sums = np.nansum(scores, axis=0)
    out = {name: float(s / c) if c else None for name, s, c in zip(MEANS, sums, counted)}
    said = Counter(g["response"].strip() for g in graded if g["truth"] == "continue")
    return {**out, "n": len(graded), "failed": sum(g["r_a"] is None for g in graded),
            "top_share": max(said.values()) / said.total() if said else None, "distinct": len(said)}


def by_session(graded):
    """-> (sessions [S] in order, their sums [S, K], how many rollouts these sum up [S, K])."""
    scores = score_matrix(graded)
    names, session = np.unique([g["turn_id"].rpartition("_")[0] for g in graded], return_inverse=True)
    sums, counts = np.zeros((len(names), len(MEANS))), np.zeros((len(names), len(MEANS)))
    np.add.at(sums, session, np.nan_to_num(scores))
    np.add.at(counts, session, ~np.isnan(scores))
    return names, sums, counts


def bootstrap(parts, n_boot=2000, seed=0):
    """parts: (sums [S, K], counts [S, K]) over the same S sessions. Whole sessions are drawn with replacement, the same for
    every part -> for each its means [n_boot, K], NaN where nothing was drawn that counts."""
    n = len(parts[0][0])
    rng, means = np.random.default_rng(seed), [[] for _ in parts]
    for start in range(0, n_boot, 200):  # in blocks, so that many sessions fit in memory
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(200, n_boot - start))  # [block, S]
        with np.errstate(invalid="ignore"):
            for out, (sums, counts) in zip(means, parts):
                out.append(times @ sums / (times @ counts))
    return [np.concatenate(blocks) for blocks in means]


def intervals(graded, n_boot=2000, seed=0):
    """95% bootstrap intervals, whole sessions drawn with replacement -> {metric: [low, high] or None}."""
    if not graded:
        return dict.fromkeys(MEANS)
    means, out = bootstrap([by_session(graded)[1:]], n_boot, seed)[0], {}
    for k, name in enumerate(MEANS):
        drawn = means[~np.isnan(means[:, k]), k]
        out[name] = [float(q) for q in np.quantile(drawn, (0.025, 0.975))] if len(drawn) else None
    return out


def table(rows):
    """{row name: metrics} -> an aligned table that is also Markdown; "-" where a metric is None or missing."""
    names = [*MEANS, "top_share", "distinct", "n", "failed"]

    def cell(value):
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    grid = [["", *(n.upper().replace("_", "-") if n in MEANS else n for n in names)]]
    grid += [[str(row), *(cell(m.get(n)) for n in names)] for row, m in rows.items()]
    return aligned(grid)


def aligned(grid):
    """Rows of cells, the head first -> a Markdown table whose columns line up, the first to the left."""
    width = [max(map(len, column)) for column in zip(*grid)]
    ruled = [grid[0], ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])], *grid[1:]]
    return "\n".join("| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, width))) + " |"
                     for r in ruled)


def load_graded(path):
    """Read graded rollouts, checked; a bad line is an InputError with its file and number."""
    graded = []
    for n, g in read_jsonl(path):
        bad = _check(g)
        if bad:
            raise InputError(f"{path}:{n}: {bad}")
        graded.append(g)
    if not graded:
        raise InputError(f"{path} holds no graded rollouts")
    return graded


def _check(g):
    """-> None, or why this is not a graded rollout."""
    for key in ("turn_id", "response"):
        if not isinstance(g.get(key), str):
            return f"{key!r} is missing or not a text"
    for key in ("truth", "decision"):
        if g.get(key) not in DECISIONS:
            return f"{key} {g.get(key)!r} is neither 'continue' nor 'stop'"
    for key in ("r_a", "r_s", "omega"):
        value = g.get(key, "missing")
        if value is None and key != "r_s":
            if g["truth"] == g["decision"] == "continue":
                continue
            return f"{key} is null, which only a failed grading where truth and decision are both continue may be"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            return f"{key} must be a number from 0 to 1, not {value!r}"
    if g["r_s"] != (g["truth"] == g["decision"]):
        return f"r_s is {g['r_s']} though truth is {g['truth']!r} and decision {g['decision']!r}"
    return None


def summarise(graded):
    """-> the object of eval.json: the metrics and their intervals."""
    return {**metrics(graded), "intervals": intervals(graded)}


def bounds(summary):
    """The 95% intervals as two rows of a table."""
    return {row: {k: v and v[i] for k, v in summary["intervals"].items()} for i, row in enumerate(("95% from", "95% to"))}


# ------------------------------------------------------------------------------------------------- a model's figures

def full_reward(cfg):
    """The config with the reward that evaluation uses whatever a run was trained on: the product, beta 2."""
    return dataclasses.replace(cfg, reward=config.Reward(grader=cfg.reward.grader, omega=cfg.reward.omega))


def evaluate(model, tokenizer, turns, prompts, cfg, lex, ends, grader=None, *, greedy=False, desc="evaluate", leave=False):
    """Sample answers at every turn and grade them (collective). -> flat list of graded records on every rank."""
    how = dict(samples=1, temperature=0) if greedy else dict(
        samples=cfg.eval.samples, temperature=cfg.eval.temperature, top_p=cfg.eval.top_p)
    cfg = full_reward(cfg)
    keys = [(1, i) for i in range(len(turns))]  # never the noise of a training rollout, whose keys start with 0
    _, graded, _ = rollout.sample_graded(model, tokenizer, turns, prompts, keys, cfg, lex, ends, grader, desc=desc, leave=leave,
                                          **how)
    return [record for group in graded for record in group]


def model_of(cfg):
    """The folder a config's evaluation is about: what it trained, or its base model where it never trained."""
    run = Path(cfg.run_dir)
    export, found = run / "export", checkpoint.all_checkpoints(run / "checkpoints")
    trained = found[-1].stat().st_mtime if found else 0
    if export.is_dir() and export.stat().st_mtime >= trained:
        return export
    if found or (run / "metrics.jsonl").is_file():
        raise InputError(f"{run} holds a run that has not come to its end (no export, or an older one): run it to the end first")
    return decoder.resolve(cfg.model.path)


def evaluate_run(cfg):
    import report  # which reads this module
    config.need(cfg, "model.path")
    rank, _, device = parallel.start()
    run, folder = Path(cfg.run_dir), model_of(cfg)
    lex, grader = reward.judges(cfg)
    held_out = load_turns(hindsight.turns_file(cfg, "eval"))
    tokenizer = load_tokenizer(folder)
    turns, prompts = encode_prompts(tokenizer, load_prompt(cfg.data.prompt), held_out, cfg.rollout.max_prompt_tokens,
                                    cfg.data.long_prompts)
    model = decoder.load(folder, device, parallel.compute_dtype(cfg.model.dtype, device))
    ends = rollout.end_ids(folder, tokenizer)
    sampled, greedy = (evaluate(model, tokenizer, turns, prompts, cfg, lex, ends, grader, greedy=g, leave=True,
                                desc=f"{folder} {'greedy' if g else 'sampled'}") for g in (False, True))
    if rank == 0:
        name = f"temperature {cfg.eval.temperature:g}" + (f", top-p {cfg.eval.top_p:g}" if cfg.eval.top_p < 1 else "")
        summary = {**summarise(sampled), "model": str(folder), "decoding": name, "greedy": summarise(greedy)}
        print(table({name: summary, **bounds(summary), "greedy": summary["greedy"]}))
        write_jsonl(run / "graded.jsonl", sampled)
        write_jsonl(run / "graded_greedy.jsonl", greedy)
        write_json(run / "eval.json", summary)
        print(f"wrote {run / 'eval.json'}, {run / 'graded.jsonl'}, {run / 'graded_greedy.jsonl'}, {report.write([run])}")
    parallel.stop()


def show_sessions(runs, sessions):
    """Print the first held-out sessions with what each run answered at every turn."""
    names = [Path(run).name if [Path(r).name for r in runs].count(Path(run).name) == 1 else str(run) for run in runs]
    said = {name: {g["turn_id"]: g for g in load_graded(Path(run) / "graded.jsonl") if g.get("sample") == 0}
            for name, run in zip(names, runs)}
    turns = load_turns(Path(runs[0]) / "turns" / "eval.jsonl")
    for session in list(dict.fromkeys(t["session_id"] for t in turns))[:sessions]:
        print(f"\n--- session {session}: first sample of each run at every turn of the held-out log")
        shown = 0
        for turn in (t for t in turns if t["session_id"] == session):
            for m in turn["context"][shown:]:
                print(f"  {'user  ' if m['role'] == 'user' else 'expert'} | " + m["content"].replace("\n", " / "))
            shown = len(turn["context"])
            print(f"           I* = {turn['target'] or '-'}, s* = {turn['decision']}")
            for name, answers in said.items():
                g = answers.get(turn["turn_id"])
                if g:
                    print(f"           {name}: {g['response'].strip()!r}  R_a {g['r_a']} R_s {g['r_s']:g} Omega {g['omega']}")


def main():
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(config.help_text(__doc__))
        return
    if argv and not argv[0].startswith("--"):
        evaluate_run(config.load(argv, __doc__))
        return
    p = argparse.ArgumentParser(add_help=False)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--graded", metavar="FILE", help="graded rollouts, JSONL")
    what.add_argument("--table", metavar="RUN", nargs="+", help="run folders that hold an eval.json")
    p.add_argument("--sessions", type=int, default=0, help="with --table: show so many held-out conversations")
    a = p.parse_args(argv)
    if a.table:
        import table1  # which reads this module
        runs = [r for r in a.table if not Path(r).is_file()]  # a glob also names table.json, which stands beside the runs
        table1.view(runs)
        if a.sessions:
            show_sessions(runs, a.sessions)
        return
    summary = summarise(load_graded(a.graded))
    print(table({a.graded: summary, **bounds(summary)}))
    print(json.dumps(summary))


if __name__ == "__main__":
    cli(main)
