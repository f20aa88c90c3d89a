"""A run's folder: its config, its metrics, its checkpoints. Only safetensors and JSON are ever read back.

A checkpoint folder holds one safetensors file per rank (its rows of every weight and optimizer moment, with the row
offsets in the header) and state.json. It is written aside and renamed once all ranks are done, so what carries the final
name is whole. Any number of ranks can read it: each takes the rows it needs from whichever files hold them.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import config
from data import InputError, read_jsonl, write_json, write_jsonl
from model import shard_rows

# Keys that may differ when a run goes on: how long, how often to look, where to log, what fits in memory.
MAY_CHANGE = ("train.steps", "train.epochs", "train.checkpoint_every", "train.keep_checkpoints", "train.eval_every",
              "train.tokens_per_microbatch", "train.activation_checkpointing", "train.compile", "rollout.max_rows",
              "reward.max_failed", "plan", "gpus", "gpu_gib")  # and all of eval. and wandb.


def may_change(name, cfg):
    if name in ("train.steps", "train.epochs") and cfg.train.schedule != "constant":
        return False  # the learning rate depends on where the end is
    if name.startswith("llm."):  # where a model runs, but not which one it is, where this run's data depend on it
        role, _, leaf = name.removeprefix("llm.").partition(".")
        used = {"grader": cfg.reward.grader == "llm", "extractor": cfg.hindsight.source == "llm", "writer": cfg.train.loss == "dpo"}
        return not (used.get(role) and leaf in ("source", "model", "prompt", "temperature", "max_tokens"))
    return name in MAY_CHANGE or name.startswith(("eval.", "wandb."))


def open_run(cfg, rank):
    """Make run_dir or go on in it: refuse a folder that holds a run of another config, save the resolved config."""
    path = Path(cfg.run_dir) / "config.yaml"
    if path.is_file() and (all_checkpoints(path.parent / "checkpoints") or (path.parent / "metrics.jsonl").is_file()):
        old, new = config.flatten(config.load([str(path)])), config.flatten(cfg)
        for name in new:
            if old[name] != new[name] and not may_change(name, cfg):
                raise InputError(f"{cfg.run_dir} holds a run with {name}={old[name]!r}, this one has {new[name]!r}: "
                                 f"choose another run_dir, or remove the folder to start afresh")
    if rank == 0:
        config.save(cfg, path)


def local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def _tensors(model, optimizer):
    """Yield (name, parameter, this rank's rows) of all that a checkpoint holds: weights and AdamW's moments."""
    for name, p in model.named_parameters():
        yield name, p, local(p).detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"{name}:{moment}", p, local(optimizer.state[p][moment])


def fresh_moments(model, optimizer, updates=0):
    """AdamW makes its moments at its first step; make them now, so that a checkpoint can be filled in or written at once."""
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.tensor(float(updates), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}


def save(folder, step, model, optimizer, state, keep):
    """Write folder/step_XXXXXX (collective) and drop all but the newest `keep` checkpoints."""
    rank = dist.get_rank()
    out = Path(folder) / f"step_{step:06d}"
    aside = out.with_name(f".{out.name}.tmp")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors, offsets = {}, {}
    for name, p, rows in _tensors(model, optimizer):
        tensors[name] = rows.cpu().contiguous()
        offsets[name] = shard_rows(p)[0]
    save_file(tensors, aside / f"rank_{rank:05d}.safetensors", metadata={"offsets": json.dumps(offsets)})
    dist.barrier()
    if rank == 0:
        updates = int(next(iter(optimizer.state.values()))["step"])
        write_json(aside / "state.json", {**state, "step": step, "updates": updates})
        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)
        for old in all_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def all_checkpoints(folder):
    return sorted(p for p in Path(folder).glob("step_*") if (p / "state.json").is_file())


def load(path, model, optimizer):
    """Fill model and optimizer from a checkpoint written by any number of ranks. -> its state.json."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    files = []
    for file in sorted(path.glob("rank_*.safetensors")):
        f = safe_open(file, "pt")
        files.append((f, json.loads(f.metadata()["offsets"])))
    fresh_moments(model, optimizer, state["updates"])
    for name, p, rows in _tensors(model, optimizer):
        first, last = shard_rows(p)
        filled = 0
        for f, offsets in files:
            stored = f.get_slice(name)
            start = offsets[name]
            a, b = max(first, start), min(last, start + stored.get_shape()[0])
            if a < b:
                rows[a - first:b - first].copy_(stored[a - start:b - start])
                filled += b - a
        if filled != last - first:
            raise InputError(f"checkpoint {path} lacks rows of {name}: remove the folder to go on from the one before")
    return state


class Log:
    """metrics.jsonl (one line a step, always), Weights & Biases (by config) and the progress bar; silent on ranks above 0.

    On a resume metrics.jsonl is cut back to the checkpoint: what a killed run wrote after it will come again.
    """

    def __init__(self, cfg, step, total, rank):
        self.main, self.wandb, self.gap = rank == 0, None, None
        if not self.main:
            return
        run = Path(cfg.run_dir)
        path = run / "metrics.jsonl"
        if path.is_file():
            write_jsonl(path, [m for _, m in read_jsonl(path, on_bad=lambda n, reason: None) if step and m["step"] <= step])
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=step, desc=run.name, unit="step")
        if cfg.wandb.mode != "disabled":
            import wandb
            self.wandb = wandb.init(project=cfg.wandb.project, name=run.name, dir=str(run), mode=cfg.wandb.mode,
                                    id=hashlib.sha1(str(run.resolve()).encode()).hexdigest()[:16], resume="allow",
                                    config=config.flatten(cfg))

    def write(self, record):
        if not self.main:
            return
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in record.items() if not isinstance(v, dict)}
                           | {f"eval/{k}": v for k, v in record.get("eval", {}).items()}, step=record["step"])
        if record["step"] == 0:
            return
        self.bar.update(record["step"] - self.bar.n)
        self.gap = record["gap_max"] if record.get("gap_max") is not None else self.gap  # measured once a sync
        shown = {"R": "reward", "WA-GH": "wa_gh", "WS": "ws", "len": "length"} if "reward" in record else \
            {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}
        parts = [f"{label} {record[k]:.2g}" for label, k in shown.items() if record.get(k) is not None]
        parts += [f"gap {self.gap:.1g}"] if self.gap is not None else []
        phases = " ".join(f"{name[:-2]} {record[name]:.1f}" for name in ("rollout_s", "grade_s", "train_s") if name in record)
        self.bar.set_postfix_str(" ".join(parts) + f" | s/step {phases}")

    def close(self):
        if self.main:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()
