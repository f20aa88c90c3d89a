"""A run's folder: its config, its metrics, its checkpoints. Only safetensors and JSON are ever read back.

A checkpoint folder holds one safetensors file per rank (its rows of every weight and optimizer moment, with
the row offsets in the header) and state.json. The folder is written aside and renamed once all ranks are
done: what carries the final name is whole, and on the disk. Where its files have changed since, it is left
out, aloud, and the one before is read. Any number of ranks can read it; each takes the rows it needs
from the files that hold them.
"""
import hashlib
import json
import re
import shutil
from contextlib import suppress

import torch
import torch.distributed as dist
from safetensors import safe_open
from tqdm import tqdm

import config
import parallel
from model import local, save_tensors, shard_rows
from records import (
    InputError,
    file_hash,
    hash_of,
    put_in_place,
    read_json,
    read_log,
    sync,
    write_json,
    write_jsonl,
)


def open_run(cfg, rank):
    """Make run_dir or go on in it, and save the resolved config there.

    A folder that holds a run of another config is refused. The config may differ in keys that cannot change
    what is trained: how often to evaluate, what fits in memory, where to log.
    """
    run = cfg.run_path
    path = run / "config.yaml"
    if all_checkpoints(run) or (run / "export").exists() or (run / "metrics.jsonl").exists():
        if not path.is_file():
            raise InputError(f"{path} is lost: bring it back, or choose another run_dir (what was trained "
                             "here may have had other settings)")
        old = config.flatten(config.saved(run))
        for name in config.changed(config.made_with(cfg, "training"), old):
            raise InputError(f"{run} holds a run with {name}={old[name]!r}, this one has "
                             f"{config.flatten(cfg)[name]!r}: choose another run_dir (train.from={run} "
                             "goes on from its weights, if model.path is the same), or remove the folder")
    if rank == 0:
        config.save(cfg, path)


# ---------------------------------------------------------------------------------------------- checkpoints

MOMENTS = "exp_avg", "exp_avg_sq"  # AdamW's names


def tensors_of(model, optimizer):
    """Yield (name, parameter, this rank's rows) of what a checkpoint holds: weights and AdamW's moments."""
    for name, p in model.named_parameters():
        yield name, p, local(p).detach()
        for moment in MOMENTS:
            yield f"{name}:{moment}", p, local(optimizer.state[p][moment])


def fresh_moments(model, optimizer, updates=0):
    """AdamW makes its moments at its first step. Make them now, for a checkpoint to be read or written."""
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.tensor(float(updates), device=p.device),
                              "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}


def save(run, step, model, optimizer, inputs, keep):
    """Write checkpoints/step_XXXXXX (collective) in the run folder and remove all but the newest `keep`.

    inputs: what is trained on, as a hash that a resume compares.
    """
    rank = dist.get_rank()
    out = run / "checkpoints" / f"step_{step:06d}"
    aside = out.with_name(f".{out.name}.tmp")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors, offsets = {}, {}
    for name, p, rows in tensors_of(model, optimizer):
        tensors[name] = rows.cpu().contiguous()
        offsets[name] = shard_rows(p)[0]
    file = aside / f"rank_{rank:05d}.safetensors"
    save_tensors(tensors, file, offsets=json.dumps(offsets))
    sync(file)
    hashes = dict(parallel.all_gather((file.name, file_hash(file))))
    if rank == 0:
        updates = int(next(iter(optimizer.state.values()))["step"])
        state = {"inputs": inputs, "step": step, "updates": updates, "hashes": hashes,
                 "shapes": shapes_of(model)}
        write_json(aside / "state.json", {**state, "hash": hash_of(state)})
        put_in_place(aside, out)
        # What is newer was left out by load(): it is none of those kept.
        found = all_checkpoints(run)
        for old in found[:found.index(out) + 1][:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def read_state(path):
    """A checkpoint's state.json -> (what it holds, the files that are not as they were saved) (collective)"""
    try:
        state = read_json(path / "state.json")
    except (OSError, InputError):
        state = {}
    wrong = []
    if state.pop("hash", None) != hash_of(state):
        state, wrong = {}, ["state.json"]
    for name in sorted(state.get("hashes", {}))[dist.get_rank()::dist.get_world_size()]:
        with suppress(OSError):
            if file_hash(path / name) == state["hashes"][name]:
                continue
        wrong.append(name)
    return state, sum(parallel.all_gather(wrong), [])


def newest(run):
    """-> the newest checkpoint whose files are as they were saved, and its state.json (collective).

    Those that are not are named and left out. Raises InputError where no other is there.
    """
    for path in reversed(parallel.all_gather(all_checkpoints(run))[0]):  # no rank sees others than rank 0
        state, wrong = read_state(path)
        if not wrong:
            return path, state
        if dist.get_rank() == 0:
            print(f"warning: {path / wrong[0]} is not as this version saved it: that checkpoint is left out")
    raise InputError(f"{run / 'checkpoints'} holds no whole checkpoint: bring one back, or remove the folder "
                     "to begin anew")


def all_checkpoints(run):
    """The checkpoints in a run folder, the newest last. What has another name is a copy, and nobody's.

    put_in_place may have left a .old.
    """
    found = [path for path in run.glob("checkpoints/*/") if re.fullmatch(r"step_\d+(\.old)?", path.name)]
    return sorted(found, key=lambda path: (len(path.stem), path))


def shapes_of(model):
    return {name: list(p.shape) for name, p in model.named_parameters()}


def load(run, model, optimizer):
    """Fill model and optimizer from a run's newest whole checkpoint, written by any number of ranks.

    Collective. -> its path, its state.json
    """
    (path, state), files = newest(run), []
    if state.get("shapes") != shapes_of(model):
        raise InputError(f"{path} is of a model of another shape than model.path is now: bring that back")
    for name in state["hashes"]:
        f = safe_open(path / name, "pt")
        files.append((f, json.loads(f.metadata()["offsets"])))
    fresh_moments(model, optimizer, state["updates"])
    for name, p, rows in tensors_of(model, optimizer):
        first, last = shard_rows(p)
        for f, offsets in files:
            stored = f.get_slice(name)
            start = offsets[name]
            a, b = max(first, start), min(last, start + stored.get_shape()[0])
            if a < b:
                rows[a - first:b - first] = stored[a - start:b - start]
    return path, state


# ------------------------------------------------------------------------------------------------------ log

# Keys of a step's record that the progress bar shows.
SHOWN = "reward wa_gh ws length loss accuracy margin gap_max rollout_s grade_s train_s".split()


class Log:
    """metrics.jsonl (a line for each step), Weights & Biases (by config), the progress bar; rank 0 alone.

    A resume cuts metrics.jsonl back to the checkpoint: what a killed run wrote after it will come again.
    """

    def __init__(self, cfg, step, total, rank):
        self.file = self.wandb = None
        if rank > 0:
            return
        run = cfg.run_path
        path = run / "metrics.jsonl"
        lines = [m for m in read_log(run) if step and m.get("step", step + 1) <= step]
        if len({0, *(m["step"] for m in lines)}) <= step:
            print(f"warning: {path} lacks the figures of some of its {step} steps: lines are torn. "
                  "The training itself lacks nothing")
        write_jsonl(path, lines)
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=step, desc=run.name, unit="step")
        if cfg.wandb.mode != "disabled":
            import wandb
            self.wandb = wandb.init(project=cfg.wandb.project, name=run.name, dir=str(run),
                                    id=hashlib.sha1(str(run.resolve()).encode()).hexdigest()[:16],
                                    mode=cfg.wandb.mode, resume="allow", config=config.flatten(cfg))

    def write(self, record):
        if not self.file:
            return
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb:
            figures = {k: v for k, v in record.items() if not isinstance(v, dict)}
            held_out = {f"eval/{k}": v for k, v in record.get("eval", {}).items()}
            self.wandb.log(figures | held_out, step=record["step"])
        if record["step"]:
            self.bar.update(record["step"] - self.bar.n)
            self.bar.set_postfix({k: record[k] for k in SHOWN if record.get(k) is not None})

    def close(self):
        if self.file:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()
