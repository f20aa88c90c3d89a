"""Run the rows of Table 1 of the paper (arXiv 2510.25441), then show them beside the paper's numbers.

    python table1.py configs/toy/grpo.yaml configs/toy/sft.yaml --nproc 2 [--root DIR] [key=value ...]
    python table1.py configs/table1/7b/*.yaml --nproc 8
    python eval.py --table RUN [RUN ...]                    # the view alone, of finished runs

A row is a config: hindsight.py, pairs.py where it is DPO, its trainer, eval.py. After an interruption the
same command goes on where it was. A finished row is not run again unless its config, logs, lexicon, prompts
or base model changed; where its training depends on the change, its folder is moved aside. At the end come
the view, in Markdown and JSON (eval.py), and a report.html with the rows' curves overlaid.
"""
import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import config
import eval as evaluation
import model as decoder
import report
from pairs import same_made
from prompts import files_of
from records import LOCKS, InputError, cli, identity, lock, read_json, write_json
from run import script_of


def inputs_of(cfg, path):
    """-> {config key: identity of the file} of what a row reads. Raises InputError where one is missing."""
    config.need(cfg, "model.path", "data.logs")
    marks = defaultdict(str)
    for name, file in files_of(config.flatten(cfg)):
        if not Path(file).is_file():
            raise InputError(f"{path}: {name}={file} does not exist")
        marks[name] += identity(file)
    return marks | {"model.path": identity(decoder.resolve(cfg.model.path))}


def move_aside(run):
    """Rename a run folder to the first free RUN.oldN. -> its new path"""
    aside, n = run, 0
    while aside.exists():
        n += 1
        aside = run.with_name(f"{run.name}.old{n}")
    return run.rename(aside)


def stages_of(cfg):
    """Yield the scripts that a row still needs. After hindsight.py it is known whether the pairs will do."""
    yield "hindsight.py"
    if cfg.train.loss == "dpo" and not ((cfg.run_path / "pairs.jsonl").is_file() and same_made(cfg)):
        yield "pairs.py"
    if cfg.train.steps != 0:
        yield script_of(cfg.train.loss)
    yield "eval.py"


def run_row(path, overrides, nproc):
    """Bring one row to its end; a finished one is left as it is. -> its run folder."""
    if config.read_yaml(path).get("train.steps", [None])[0] == 0:  # a row that never trains stays one
        overrides = [override for override in overrides if not override.startswith("train.steps=")]
    cfg = config.load([path, *overrides])
    run = cfg.run_path
    lock(run.parent, f".{run.name}.lock")  # the row's scripts each take their own, in the run folder
    stamp = run / "row.json"
    want = {"config": config.flatten(cfg) | {"run_dir": ""}, "inputs": inputs_of(cfg, path), "finished": True}
    have = read_json(stamp, {"config": {}, "inputs": {}})
    if have == want:
        print(f"=== {run}: finished before, not run again")
        return run
    names = config.changed(config.made_with(cfg, "training"), have["config"])
    names += config.changed(want["inputs"], have["inputs"])
    if names and (run / "metrics.jsonl").is_file():
        lock(run)  # a trainer may have outlived its table1.py
        LOCKS.pop(run / ".lock").close()
        print(f"=== {run}: {', '.join(names)} changed; what was there is now {move_aside(run)}")
    write_json(stamp, {**want, "finished": False})
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    for script in stages_of(cfg):
        began = time.perf_counter()
        print(f"=== {run}: {script}", flush=True)
        start = [] if script in ("hindsight.py", "pairs.py") else launcher
        command = [sys.executable, *start, str(Path(__file__).with_name(script)), path, *overrides]
        code = subprocess.run(command).returncode
        if code:
            raise InputError(f"{script} ended with exit code {code} (see above); once that is mended, the "
                             f"same command goes on from here")
        print(f"=== {run}: {script} took {time.perf_counter() - began:.0f} s", flush=True)
    write_json(stamp, want)
    return run


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("configs", nargs="+", metavar="CONFIG", help="a YAML for each row, and key=value for all")
    p.add_argument("--nproc", type=int, default=1, help="processes (GPUs) for training and evaluation")
    p.add_argument("--sessions", type=int, default=0, help="show so many held-out conversations at the end")
    p.add_argument("--root", help="folder of the runs, each named like its config (default: their run_dir)")
    args = p.parse_intermixed_args()
    overrides, rows = [c for c in args.configs if "=" in c], {}
    for path in args.configs:
        if "=" not in path:
            where = [f"run_dir={args.root}/{Path(path).stem}"] if args.root else []
            run = config.load([path, *overrides, *where]).run_path.resolve()
            if run in rows:
                raise InputError(f"{rows[run][0]} and {path} have one run_dir: give each row its own")
            rows[run] = path, overrides + where, args.nproc
    if not rows:
        raise InputError("no config named: give a YAML for each row, e.g. configs/toy/grpo.yaml")
    runs = [run_row(*row) for row in rows.values()]
    print()
    evaluation.view(runs, args.sessions)
    print(f"wrote {os.path.relpath(report.write(runs))}: the rows' curves overlaid")


if __name__ == "__main__":
    cli(main)
