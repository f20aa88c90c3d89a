"""A training run, as the three trainers share it: start and resume, the frame of a step, the end of a run.

train_grpo.py, train_sft.py and train_dpo.py each hold their own loss and loop and call these functions in
turn: start -> (their data) -> load -> for each step: begin_step, optimizer_step, end_step -> finish.
"""
import functools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import eval as evaluation
import grading
import llm
import metrics
import model as decoder
import pack
import parallel
import plan
import report
from config import Stream
from prompts import encode_prompts, encode_response, load_turns, turns_file, within_limit
from records import InputError, file_hash, hash_of, lock, sync, write_jsonl
from rollout import Policy

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient
GROUPS_SHOWN = 24  # held-out turns whose responses before and after training report.html shows


def script_of(loss):
    """The script that trains with this train.loss: the policy losses all belong to train_grpo.py."""
    return {"sft": "train_sft.py", "dpo": "train_dpo.py"}.get(loss, "train_grpo.py")


def policy_prompt(cfg):
    return cfg.data.prompt_no_stop if cfg.reward.mode == "no_rs" else cfg.data.prompt


@functools.cache
def shuffled(n, seed, epoch):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, Stream.ORDER, epoch]).permutation(n).tolist()


def stream(n, positions, seed):
    """Indices of the examples at these positions (a range) of the endless stream of shuffled epochs."""
    return [shuffled(n, seed, i // n)[i % n] for i in positions]


def lr_at(step, total, t):
    """Learning rate of step 0 .. total - 1: linear warm-up, then constant, linear or cosine to zero."""
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    done = (step - t.warmup_steps) / (total - t.warmup_steps)
    return t.lr * {"constant": 1.0, "linear": 1 - done,
                   "cosine": (1 + math.cos(math.pi * done)) / 2}[t.schedule]


def due(every, before, after, total):
    """Has one of every so many steps passed since `before`, or is the run at its end?"""
    return every is not None and (before // every != after // every or after == total)


# ----------------------------------------------------------------------------------------- the start of a run

@dataclass
class Run:
    """A training run on this rank. What load() sets is None before it."""
    cfg: config.Config
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of the computation; the master weights are at least float32
    dir: Path  # everything the run writes
    folder: Path  # the base model
    policy: Policy  # its model is None before load()
    judge: grading.Judge
    held_out: list | None  # Prompts for evaluation during training
    optimizer: torch.optim.Optimizer | None = None
    log: checkpoint.Log | None = None
    inputs: str | None = None  # hash of what is trained on; a resume refuses another
    size: int | None = None  # training examples of an epoch
    total: int | None = None  # steps
    step: int = 0  # steps taken
    synced: int = 0  # the step at which rollouts, checkpoints and evaluations were last possible
    bad: int = 0  # steps in a row without a finite gradient
    began: float = 0.0  # when the step began, on time.perf_counter's clock

    @property
    def model(self):
        return self.policy.model

    def positions(self, steps=1):
        """Where in the endless stream of examples the next steps read: the same whatever was resumed."""
        n = self.cfg.train.prompts_per_step
        return range(self.step * n, (self.step + steps) * n)

    def next_examples(self, steps=1):
        """Indices of the examples that the next steps train on."""
        return stream(self.size, self.positions(steps), self.cfg.seed)


def start(doc, script):
    """The command line of a trainer, given its docstring and name -> Run, before any weights are read.

    What a user can mend is checked first: the config, the memory, the run folder, prompts and turns.
    """
    cfg = config.load(sys.argv[1:], doc, may_plan=True)
    config.need(cfg, "model.path")
    if script_of(cfg.train.loss) != script:
        raise InputError(f"train.loss={cfg.train.loss} belongs to {script_of(cfg.train.loss)}, not {script}")
    if cfg.train.steps == 0:
        raise InputError("train.steps=0 is a row that never trains (Base): evaluate it with eval.py")
    if cfg.plan:
        sys.exit(not plan.show(cfg))
    rank, world, device = parallel.start()
    dtype, folder = parallel.compute_dtype(cfg.model.dtype, device), decoder.resolve(cfg.model.path)
    plan.check(plan.Job(cfg, decoder.read_shape(folder), world, device),
               min(parallel.all_gather(plan.capacity(cfg, device))))
    if rank == 0:
        lock(cfg.run_path)
    checkpoint.open_run(cfg, rank)
    policy = Policy(folder)
    return Run(cfg, rank, world, device, dtype, cfg.run_path, folder, policy, grading.open_judge(cfg),
               held_out_prompts(cfg, policy.tokenizer))


def held_out_prompts(cfg, tokenizer):
    """Prompts for evaluation during training, always with the prompt that mentions stopping; or None."""
    if cfg.train.eval_every is None:
        return None
    turns = load_turns(cfg, "valid" if cfg.data.valid_sessions else "eval")
    return encode_prompts(tokenizer, turns, cfg)


def training_prompts(cfg, tokenizer):
    """Prompts to train on. Without R_s: continue turns only, and a prompt that never mentions stopping."""
    turns = load_turns(cfg, "train")
    if cfg.reward.mode == "no_rs":
        turns = [t for t in turns if t.decision == "continue"]
    if not turns:
        raise InputError(f"{turns_file(cfg, 'train')} holds no continue turns, and reward.mode=no_rs trains "
                         "on nothing else")
    return encode_prompts(tokenizer, turns, cfg, policy_prompt(cfg))


def encode_trees(run, prompts, texts):
    """Prompts, and for each the texts to learn from -> pack.Trees, branches named by the prompt's place.

    None has a response over rollout.max_new_tokens.
    """
    trees, sizes = [], []
    for i, (prompt, responses) in enumerate(zip(prompts, texts, strict=True)):
        branches = [pack.Branch(encode_response(run.policy.tokenizer, text), i) for text in responses]
        trees.append(pack.Tree(prompt.tokens, branches))
        sizes.append((max(len(branch.tokens) for branch in branches), prompt.turn.turn_id))
    return within_limit(trees, sizes, "max_new_tokens", run.cfg)


def pack_mine(run, trees):
    """This rank's share of these trees (the same list on every rank), packed: pack.MicroBatches."""
    mine = pack.balance(trees, run.world, run.cfg.train.tokens_per_microbatch)[run.rank]
    dtype = torch.promote_types(run.dtype, torch.float32)
    return (pack.pack(part, run.device, dtype) for part in mine)  # one in memory at a time


def set_layers(model, checkpointed, compiled):
    """Activation checkpointing, and torch.compile of all but attention, in every layer."""
    for layer in model.model.layers:
        layer.checkpointed = checkpointed
        if compiled:
            layer.before, layer.after = (torch.compile(f, dynamic=True) for f in (layer.before, layer.after))


def base_model(run, trainable=False):
    """The model that the run starts from, sharded (collective)."""
    return parallel.load_sharded(run.folder, run.device, run.dtype, trainable=trainable)


def load(run, size, sources):
    """Model, optimizer, newest checkpoint and log.

    size: examples of an epoch; sources: the files they come from (None or "" for one that is not used).
    """
    t = run.cfg.train
    run.size = size
    run.total = t.steps or t.epochs * size // t.prompts_per_step
    if run.total == 0:
        raise InputError(f"{size} examples x {t.epochs} epochs do not fill one step of "
                         f"train.prompts_per_step={t.prompts_per_step}")
    sources = [Path(source) for source in sources if source]
    if t.kl_coef or t.loss == "dpo":  # the base is read at each start, as the reference
        sources += sorted(run.folder.glob("*.safetensors"))
    content = hash_of([*map(file_hash, sources)]) if run.rank == 0 else None  # once: weights are large
    run.inputs = parallel.all_gather(content)[0]
    model = run.policy.model = base_model(run, trainable=True)
    set_layers(model, t.activation_checkpointing, t.compile)
    run.optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay,
                                      fused=True)
    found = checkpoint.all_checkpoints(run.dir)
    if not found and (other := getattr(t, "from")):
        begun = checkpoint.all_checkpoints(Path(other))
        if not begun or config.saved(other).model.path != run.cfg.model.path:
            raise InputError(f"train.from={other} holds no checkpoints of a run with model.path="
                             f"{run.cfg.model.path}")
        checkpoint.load(Path(other), model, run.optimizer)
    elif found:
        path, state = checkpoint.load(run.dir, model, run.optimizer)
        run.step = run.synced = state["step"]
        if state["inputs"] != run.inputs:
            raise InputError(f"what is trained on ({', '.join(map(str, sources))}) has changed since "
                             f"{path} was written: bring it back, or go on in a new run_dir with "
                             f"train.from={run.dir}")
        if run.step > run.total:
            raise InputError(f"{path} is beyond the {run.total} steps of this config (train.steps or "
                             f"train.epochs): raise them, or start in a new run_dir (train.from={run.dir})")
    else:
        checkpoint.fresh_moments(model, run.optimizer)
    if t.moments_on_host:
        for state in run.optimizer.state.values():
            move(state, "cpu")
    run.log = checkpoint.Log(run.cfg, run.step, run.total, run.rank)
    if run.step == 0 and run.held_out:
        run.log.write({"step": 0, "eval": evaluate(run)})
        show_groups(run, "before")


# ----------------------------------------------------------------------------------------------- step by step

def begin_step(run):
    """Set the learning rate and start the step's clock."""
    run.optimizer.param_groups[0]["lr"] = lr_at(run.step, run.total, run.cfg.train)
    run.began = time.perf_counter()


def steps(run, trees):
    """Begin each step, and yield its trees, how many response tokens they have, this rank's micro-batches."""
    while run.step < run.total:
        begin_step(run)
        step = [trees[i] for i in run.next_examples()]
        yield step, sum(len(b.tokens) for tree in step for b in tree.branches), pack_mine(run, step)


def zeros(model, names):
    """-> {name: 0-dim tensor}, in which this rank adds up the figures of a step."""
    device = model.model.norm.weight.device
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}


def move(state, device):
    """Move AdamW's moments of one parameter, if it has any yet."""
    for name in state.keys() & checkpoint.MOMENTS:
        state[name] = state[name].to(device)


def adamw_step(optimizer):
    """One step of AdamW, a parameter at a time: its moments may wait in the host's memory."""
    group, = optimizer.param_groups
    params = group["params"]
    for p in params:
        state = optimizer.state[p]
        home = state["exp_avg"].device if "exp_avg" in state else p.device
        move(state, p.device)
        group["params"] = [p]
        optimizer.step()
        move(state, home)
    group["params"] = params


def optimizer_step(model, optimizer, grad_clip, figures, maxima=()):
    """Clip the gradient by its global norm and step (collective).

    No step is made where gradient or loss is not finite, nor where the gradient is 0: momentum alone must not
    move the weights. figures: {name: 0-dim tensor} of this rank, to be summed over ranks; of those in
    maxima the largest is taken. All reach the host together, in one synchronisation. -> {name: number},
    grad_norm and finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    ranks = parallel.all_gather(torch.stack([*figures.values(), norm.double()]).tolist())
    whole = {name: np.max(values) if name in maxima else sum(values)  # of numbers and a NaN: the NaN
             for name, values in zip(figures, zip(*ranks))}
    norm = ranks[0][-1]
    finite = math.isfinite(norm) and math.isfinite(whole["loss"])
    if finite and norm:
        adamw_step(optimizer)
    return whole | {"grad_norm": norm if finite else None, "finite": finite}


def end_step(run, record, boundary=True):
    """Count and log a step; at a sync boundary evaluate and save where due. Bad steps in a row end a run."""
    t = run.cfg.train
    run.optimizer.zero_grad()  # rollouts need the memory
    run.step += 1
    run.bad = 0 if record["finite"] else run.bad + 1
    record = {"step": run.step, "epoch": run.step * t.prompts_per_step / run.size,
              "lr": run.optimizer.param_groups[0]["lr"], **record, "train_s": time.perf_counter() - run.began}
    # null: nothing was computed, or it is not finite (JSON has no NaN)
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    if boundary and run.held_out and due(t.eval_every, run.synced, run.step, run.total):
        began = time.perf_counter()
        try:
            record |= {"eval": evaluate(run), "eval_s": time.perf_counter() - began}
        except llm.Unanswered:  # the grader is down: the step is kept, its evaluation is not
            run.log.write(record)
            save(run)
            raise
    run.log.write(record)
    if run.bad == MAX_BAD_STEPS or run.bad and run.step == run.total:
        raise InputError(f"{run.bad} steps in a row had no finite loss or gradient (last: step {run.step}): "
                         f"go on in a new run_dir with a lower train.lr and train.from={run.dir}")
    if boundary:
        if due(t.checkpoint_every, run.synced, run.step, run.total):
            save(run)
        run.synced = run.step


def save(run):
    """Write a checkpoint, unless the last step was a bad one: its weights are not to be gone on from."""
    if run.bad:
        return
    sync(run.dir / "metrics.jsonl")
    checkpoint.save(run.dir, run.step, run.model, run.optimizer, run.inputs, run.cfg.train.keep_checkpoints)


def evaluate(run):
    return metrics.metrics(evaluation.evaluate(run.policy, run.judge, run.held_out, run.cfg))


def show_groups(run, when):
    """Sample a group at a few held-out turns, graded as in evaluation, for report.html (collective)."""
    every = max(1, len(run.held_out) // GROUPS_SHOWN)
    prompts = run.held_out[::every][:GROUPS_SHOWN]
    keys = [(Stream.GROUPS, every * i) for i in range(len(prompts))]
    judge, sampling = evaluation.full_reward(run.judge), grading.sampling_of(run.cfg)
    groups, _ = grading.sample_graded(run.policy, judge, prompts, keys, sampling, f"groups {when}")
    if run.rank == 0:
        write_jsonl(run.dir / f"groups_{when}.jsonl",
                    [{"turn": group.prompt.turn, "graded": group.graded} for group in groups])


def finish(run):
    """Export the trained model and write report.html."""
    run.log.close()
    decoder.export(run.model, run.folder, run.dir / "export", run.total)
    if run.held_out:
        show_groups(run, "after")
    if run.rank == 0:
        page = report.try_to_write(run.dir)
        print(f"trained {run.total} steps; model: {run.dir / 'export'}, metrics: "
              f"{run.dir / 'metrics.jsonl'}, look at {page}")
    parallel.stop()
