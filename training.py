"""What the three trainers share: how a run starts and resumes, its learning rate and data order, how a step and a run end.

train_grpo.py, train_sft.py and train_dpo.py each hold their own loss and loop and call these functions in turn:
start -> (their data) -> load -> for each step: set_lr, optimizer_step, end_step -> finish.
"""
import hashlib
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
import hindsight
import lexicon
import llm
import model as decoder
import pack
import parallel
import plan
import reward
import rollout
from data import InputError, encode_answer, encode_prompts, load_prompt, load_tokenizer, load_turns, write_jsonl

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient
GROUPS_SHOWN = 24  # held-out turns whose answers before and after training report.html shows


def script_of(loss):
    """The script that trains with this train.loss: the policy losses are all train_grpo.py's."""
    return {"sft": "train_sft.py", "dpo": "train_dpo.py"}.get(loss, "train_grpo.py")


def policy_prompt(cfg):
    return cfg.data.prompt_no_stop if cfg.reward.mode == "no_rs" else cfg.data.prompt


def stream(n, start, stop, seed):
    """Turn indices at positions start .. stop - 1 of the endless stream of shuffled epochs."""
    order = {e: np.random.default_rng([seed, 2, e]).permutation(n) for e in range(start // n, (stop - 1) // n + 1)}
    return [int(order[i // n][i % n]) for i in range(start, stop)]


def lr_at(step, total, t):
    """Learning rate of step 0 .. total - 1: linear warm-up, then constant, linear or cosine to zero."""
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, total - t.warmup_steps)
    return t.lr * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[t.schedule]


def due(every, before, after, total):
    return every is not None and (before // every != after // every or after == total)


# ------------------------------------------------------------------------------------------------- the start of a run

@dataclass
class Run:
    """A training run on this rank. What load() sets is None before it."""
    cfg: config.Config
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of the computation; the master weights are at least float32
    folder: Path  # the base model
    tokenizer: object
    ends: set
    lex: lexicon.Lexicon  # or None
    grader: object  # llm's source, or None where rules grade
    held_out: tuple  # (turns, prompts) for evaluation during training, or None
    model: torch.nn.Module = None
    optimizer: torch.optim.Optimizer = None
    log: checkpoint.Log = None
    inputs: str = None  # hash of what is trained on; a resume refuses another
    size: int = None  # training examples of an epoch
    total: int = None  # steps
    step: int = 0  # steps taken
    synced: int = 0  # the step at which rollouts, checkpoints and evaluations were last possible
    bad: int = 0  # steps in a row without a finite gradient

    def positions(self, steps=1):
        """Where in the endless stream of examples the next steps read: the same whatever was resumed."""
        n = self.cfg.train.prompts_per_step
        return range(self.step * n, (self.step + steps) * n)


def start(cfg, script):
    """Process group, run folder, tokenizer, lexicon and held-out turns; everything a user can mend is checked first."""
    config.need(cfg, "model.path")
    if script_of(cfg.train.loss) != script:
        raise InputError(f"train.loss={cfg.train.loss} is what {script_of(cfg.train.loss)} trains with, not {script}")
    if cfg.train.steps == 0:
        raise InputError("train.steps=0 is a row that never trains (Base): evaluate it with eval.py")
    if cfg.plan:
        sys.exit(not plan.show(cfg))
    rank, world, device = parallel.start()
    dtype, folder = parallel.compute_dtype(cfg.model.dtype, device), decoder.resolve(cfg.model.path)
    plan.check(cfg, decoder.read_shape(folder), world, device, dtype, min(parallel.all_gather(plan.capacity(cfg, device))))
    checkpoint.open_run(cfg, rank)
    tokenizer = load_tokenizer(folder)
    lex, grader = reward.judges(cfg)
    return Run(cfg, rank, world, device, dtype, folder, tokenizer, rollout.end_ids(folder, tokenizer), lex, grader,
               held_out_turns(cfg, tokenizer))


def held_out_turns(cfg, tokenizer):
    """-> (turns, prompts) for evaluation during training, always with the prompt that mentions stopping; or None."""
    if cfg.train.eval_every is None:
        return None
    turns = load_turns(hindsight.turns_file(cfg, "valid" if cfg.data.valid_sessions else "eval"))
    return encode_prompts(tokenizer, load_prompt(cfg.data.prompt), turns, cfg.rollout.max_prompt_tokens, cfg.data.long_prompts)


def training_turns(cfg, tokenizer):
    """-> (turns, prompts) to train on."""
    path = hindsight.turns_file(cfg, "train")
    turns = load_turns(path)
    if cfg.reward.mode == "no_rs":  # without R_s: continue turns only, and a prompt that never mentions stopping
        turns = [t for t in turns if t["decision"] == "continue"]
    if not turns:
        raise InputError(f"{path} holds no continue turns, and reward.mode=no_rs trains on nothing else")
    return encode_prompts(tokenizer, load_prompt(policy_prompt(cfg)), turns, cfg.rollout.max_prompt_tokens, cfg.data.long_prompts)


def encode_trees(run, prompts, texts):
    """texts[i]: the answers to learn from at prompts[i] -> pack.Trees whose answers are named (i, number). What holds an
    answer over rollout.max_new_tokens is refused or left out, like long prompts."""
    cfg, trees, too_long = run.cfg, [], []
    for i, (prompt, answers) in enumerate(zip(prompts, texts, strict=True)):
        answers = [encode_answer(run.tokenizer, text) for text in answers]
        if max(map(len, answers)) <= cfg.rollout.max_new_tokens:
            trees.append(pack.Tree(prompt, answers, [(i, j) for j in range(len(answers))]))
        else:
            too_long.append(max(map(len, answers)))
    if too_long and (cfg.data.long_prompts == "error" or not trees):
        raise InputError(f"{len(too_long)} of {len(prompts)} examples hold an answer longer than rollout.max_new_tokens="
                         f"{cfg.rollout.max_new_tokens}; raise it to {max(too_long)}, or set data.long_prompts=drop to leave them out")
    if too_long and run.rank == 0:
        print(f"left out {len(too_long)} of {len(prompts)} examples: answers longer than rollout.max_new_tokens="
              f"{cfg.rollout.max_new_tokens}")
    return trees


def set_layers(model, checkpointed, compiled):
    """Activation checkpointing, and torch.compile of all but attention, in every layer."""
    for layer in model.model.layers:
        layer.checkpointed = checkpointed
        if compiled:
            layer.before, layer.after = (torch.compile(f, dynamic=True) for f in (layer.before, layer.after))


def load(run, size, sources):
    """Model, optimizer, newest checkpoint and log. size: examples of an epoch; sources: the files they come from."""
    cfg, t = run.cfg, run.cfg.train
    run.size = size
    run.total = t.steps if t.steps is not None else t.epochs * size // t.prompts_per_step
    if run.total == 0:
        raise InputError(f"{size} examples x {t.epochs} epochs do not fill one step of train.prompts_per_step={t.prompts_per_step}")
    run.inputs = hashlib.sha256(b"".join(Path(p).read_bytes() for p in sources)).hexdigest()
    run.model = parallel.load_sharded(run.folder, run.device, run.dtype)
    set_layers(run.model, t.activation_checkpointing, t.compile)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=t.lr, betas=tuple(t.betas), weight_decay=t.weight_decay, fused=True)
    found = checkpoint.all_checkpoints(Path(cfg.run_dir) / "checkpoints")
    if found:
        state = checkpoint.load(found[-1], run.model, run.optimizer)
        run.step, run.synced, run.bad = state["step"], state["step"], state["bad_steps"]
        if state["inputs"] != run.inputs:
            raise InputError(f"what is trained on ({', '.join(map(str, sources))}) has changed since {found[-1]} was written: "
                             f"bring it back, or start in a new run_dir")
    else:
        checkpoint.fresh_moments(run.model, run.optimizer)
    run.log = checkpoint.Log(cfg, run.step, run.total, run.rank)
    if run.step == 0 and run.held_out:
        run.log.write({"step": 0, "eval": evaluate(run)})
        show_groups(run, "before")


# ------------------------------------------------------------------------------------------------------- step by step

def set_lr(run):
    run.optimizer.param_groups[0]["lr"] = lr_at(run.step, run.total, run.cfg.train)


def optimizer_step(run):
    """Clip the gradient by its global norm and step, unless it is not finite. -> figures to log."""
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.train.grad_clip)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    finite = math.isfinite(norm)
    if finite:
        run.optimizer.step()
    return {"grad_norm": norm if finite else None, "finite": finite}


def end_step(run, record, boundary=True):
    """Count and log a step; at a sync boundary evaluate and save where due. Several bad steps in a row end the run."""
    t, lr = run.cfg.train, run.optimizer.param_groups[0]["lr"]
    run.optimizer.zero_grad(set_to_none=True)  # rollouts need the memory
    run.step += 1
    run.bad = 0 if record["finite"] else run.bad + 1
    # null: nothing was computed, or it is not finite (JSON has no NaN)
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    record = {"step": run.step, "epoch": run.step * t.prompts_per_step / run.size, "lr": lr, **record}
    if boundary and run.held_out and due(t.eval_every, run.synced, run.step, run.total):
        began = time.perf_counter()
        try:
            record |= {"eval": evaluate(run), "eval_s": time.perf_counter() - began}
        except llm.Unanswered:  # the grader is down: the step is kept, its evaluation is not
            run.log.write(record)
            save(run)
            raise
    run.log.write(record)
    if run.bad == MAX_BAD_STEPS:
        raise InputError(f"{run.bad} steps in a row had a non-finite gradient (last: step {run.step}): lower train.lr and "
                         f"start in a new run_dir (copy turns/ there, and checkpoints/ to go on from the last)")
    if boundary:
        if due(t.checkpoint_every, run.synced, run.step, run.total):
            save(run)
        run.synced = run.step


def save(run):
    checkpoint.save(Path(run.cfg.run_dir) / "checkpoints", run.step, run.model, run.optimizer,
                    {"bad_steps": run.bad, "inputs": run.inputs}, run.cfg.train.keep_checkpoints)


def check_failed(run, graded):
    """Too many failed gradings in a rollout phase end the run, at a checkpoint (collective)."""
    asked = [g for group in graded for g in group if reward.needs_grader({"decision": g["truth"]}, g["response"], run.cfg)]
    failed = sum(g["reward"] is None for g in asked)
    if failed > run.cfg.reward.max_failed * len(asked):
        if run.step:
            save(run)
        raise InputError(f"{failed} of {len(asked)} gradings failed after step {run.step}, more than reward.max_failed="
                         f"{run.cfg.reward.max_failed} of them (the last on this rank: {run.grader.tally.why}): look at the grader "
                         f"({run.cfg.llm.grader.model}); the same command goes on from here")


def evaluate(run):
    return evaluation.metrics(evaluation.evaluate(run.model, run.tokenizer, *run.held_out, run.cfg, run.lex, run.ends, run.grader))


def show_groups(run, when):
    """Sample a group of answers at a few held-out turns, graded as in evaluation, for report.html (collective)."""
    picked = range(0, len(run.held_out[0]), max(1, len(run.held_out[0]) // GROUPS_SHOWN))[:GROUPS_SHOWN]
    turns, prompts = ([part[i] for i in picked] for part in run.held_out)
    cfg, r = evaluation.full_reward(run.cfg), run.cfg.rollout
    _, graded, _ = rollout.sample_graded(run.model, run.tokenizer, turns, prompts, [(3, i) for i in picked], cfg, run.lex, run.ends,
                                         run.grader, samples=r.samples, temperature=r.temperature, desc=f"groups {when}", leave=False)
    if run.rank == 0:
        write_jsonl(Path(run.cfg.run_dir) / f"groups_{when}.jsonl",
                    [{"turn": turn, "graded": group} for turn, group in zip(turns, graded)])


def finish(run):
    """Export the trained model and write report.html."""
    import report  # which reads the advantages from train_grpo.py, which reads this file
    path = Path(run.cfg.run_dir)
    run.log.close()
    decoder.export(run.model, run.folder, path / "export")
    if run.held_out:
        show_groups(run, "after")
    if run.rank == 0:
        page = report.write([path])
        print(f"trained {run.total} steps; model: {path / 'export'}, metrics: {path / 'metrics.jsonl'}, look at {page}")
    parallel.stop()
