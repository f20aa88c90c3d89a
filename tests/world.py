"""What more than one test file needs: tiny runs, trees and steps to compare, processes to start and kill."""
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import config
import model as decoder
import pack
import parallel
import records
from model import Decoder

REPO = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------ files

def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    """Rows (dicts, records, or lines word for word) -> path."""
    rows = [row.dump() if hasattr(row, "dump") else row for row in rows]
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def metrics(config_path):
    return read_lines(config_path.parent / "run" / "metrics.jsonl")


def timeless(lines):
    """Lines of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def exported(config_path):
    return load_file(config_path.parent / "run" / "export" / "model.safetensors")


def make_config(**flat):
    """Dotted keys with __ for the dot -> Config."""
    flat = {"run_dir": "unused"} | {name.replace("__", "."): value for name, value in flat.items()}
    return config.build({name: (value, "test") for name, value in flat.items()})


# ---------------------------------------------------------------------------------------------- the tiny runs

# Sore throats and coughs, in two languages: what the rules of the lexicon are tested on.
THROAT = r"""
goal: Find out what matters before recommending a remedy.
yes: [yes, yeah, 是的, "👍"]
no: [no, nope, not at all]
openers: [how, what, do, does, did, is, are, have, any, since, on, 请问, 你]
generic_questions: ["anything else", "other symptoms"]
attributes:
  duration:
    asks: ["how long", "since when", 多久]
    values: {two days: ["two days", "2 days", 两天], a week: ["a week"]}
  fever:
    yes_no: true
    asks: [fever, temperature, 发烧]
    values: {yes: [fever, 我发烧], no: ["no fever", "don't have a fever", 没有发烧]}
  cough:
    yes_no: true
    asks: ["cough(?:ing)?"]
    values: {yes: ["a cough"], no: ["no cough"]}
  medicine:
    asks: ["taken", "medicine"]
    values: {aspirin: [aspirin], none: ["took nothing"]}
  smoking:
    asks: ["smok\\w*"]
    values: {yes: ["i smoke"], no: ["never smoked"]}
complaints:
  sore throat: {cues: ["sore throat", "throat hurts", 喉咙], attributes: [duration, fever, medicine]}
  cough: {cues: [cough], attributes: [duration, cough, smoking]}
"""


def make_lexicon(attributes, complaints):
    """attributes {name: entry}, complaints {name: (cue, names of attributes)} -> what a lexicon YAML says."""
    of = {name: dict(cues=[cue], attributes=names) for name, (cue, names) in complaints.items()}
    return dict(goal="g", yes=["yes"], no=["no"], openers=[], generic_questions=["else"],
                attributes=attributes, complaints=of)


LEXICON = make_lexicon({"duration": dict(asks=["how long"], values={"two": ["two"]})},
                       {"cough": ("cough", ["duration"])})
# A cough's questions do not matter to a rash: pairs can be made.
TWO_COMPLAINTS = make_lexicon({name: dict(asks=[asks], yes_no="true") for name, asks in (
    ("phlegm", "phlegm"), ("fever", "fever"), ("itching", "itch"), ("allergies", "allerg\\w*"))},
    {"cough": ("cough", ["phlegm", "fever"]), "rash": ("rash", ["itching"])})


def coughs(n):
    """n turns, all coughs; every third is a stop."""
    return [dict(turn_id=f"{i}_0", session_id=str(i), goal="g", expert="How long?",
                 context=[dict(role="user", content="cough " * (1 + i % 4))], known=[],
                 target=["duration: two"] if i % 3 else [], decision="continue" if i % 3 else "stop")
            for i in range(n)]


def coughs_and_rashes(n=10):
    """n turns, coughs and rashes by turns; every third is a stop."""
    kinds, rows = (("cough ", "A fever?", "fever: no"), ("rash ", "An itch?", "itching: no")), []
    for i in range(n):
        word, expert, fact = kinds[i % 2]
        rows.append(dict(turn_id=f"{i}_1", session_id=str(i), goal="g", expert=expert + "!" * (i % 3 == 2),
                         context=[dict(role="user", content=word * (1 + i % 4))], known=[],
                         target=[fact] if i % 3 else [], decision="continue" if i % 3 else "stop"))
    return rows


def make_world(folder, checkpoint_folder, **changed):
    """A run with turns under `folder` -> path of its config. changed: dotted keys with __ for the dot."""
    run = folder / "run"
    (run / "turns").mkdir(parents=True)
    for name, n in (("train", 20), ("eval", 3)):
        write_lines(run / "turns" / f"{name}.jsonl", coughs(n))
    (folder / "prompt.md").write_text("{goal}")
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(LEXICON))
    data = {name: str(folder / file) for name, file in (
        ("lexicon", "lexicon.yaml"), ("prompt", "prompt.md"), ("prompt_no_stop", "prompt.md"))}
    tree = {"run_dir": str(run), "model": {"path": str(checkpoint_folder)}, "data": data,
            "rollout": {"samples": 4, "max_new_tokens": 8, "max_prompt_tokens": 200}, "eval": {"samples": 1},
            "train": {"lr": 1e-3, "prompts_per_step": 4, "steps_per_sync": 2, "steps": 4,
                      "checkpoint_every": 2, "eval_every": None, "tokens_per_microbatch": 250}}
    for name, value in changed.items():
        *sections, leaf = name.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def make_baseline(folder, checkpoint_folder, loss, **changed):
    """A world of coughs and rashes, ready for the trainer of this loss -> path of its config."""
    if loss in ("sft", "dpo"):
        changed = dict(train__steps_per_sync=1, rollout__max_new_tokens=12) | changed
    path = make_world(folder, checkpoint_folder, train__loss=loss, **changed)
    turns = coughs_and_rashes()
    write_lines(folder / "run" / "turns" / "train.jsonl", turns)
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(TWO_COMPLAINTS))
    if loss == "dpo":
        build_pairs(path)
    return path


def let_go():
    """Unlock the run folders that scripts called in this process have locked until its end."""
    for held in records.LOCKS.values():
        held.close()
    records.LOCKS.clear()


def build_pairs(path):
    """pairs.py with this config."""
    import pairs
    argv, sys.argv = sys.argv, ["pairs.py", str(path)]
    try:
        pairs.main()
    finally:
        sys.argv = argv


# ------------------------------------------------------------------------- tensors, models and steps compared

def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def same(a, b, rtol=1e-9, atol=1e-12):
    """Two {name: tensor} agree."""
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def equal(a, b):
    """Two {name: tensor} are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load64(folder, **how):
    """A checkpoint in float64, sharded over the process group."""
    parallel.start()
    return parallel.load_sharded(folder, torch.device("cpu"), torch.float64, **how)


def plain_decoder(model):
    """The same weights in a decoder without FSDP."""
    out = Decoder(model.shape).double()
    out.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
    return out


def alone(model, prompt, response, temperature=1.0):
    """Log-probs [R] and entropies [R] of one response with a prompt of its own, by plain causal attention."""
    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        score = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
        future = torch.ones(score.shape[1:], dtype=torch.bool).triu(1)
        return (score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    tokens = torch.tensor(prompt + response)
    logits = model(tokens, torch.arange(len(tokens)), attend)[len(prompt) - 1:-1]
    logp = F.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(response)), response], -(logp.exp() * logp).sum(-1)


def make_trees(n, responses, seed=7):
    """n trees of unequal prompts (3 to 12 tokens), each with responses of unequal lengths (1 to 14), named
    by the tree."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(250) for _ in range(rng.randint(low, high))]

    return [pack.Tree(ids(3, 12), [pack.Branch(ids(1, 14), i) for _ in range(responses)])
            for i in range(n)]


def open_run(folder, cfg, lr=0.0):
    """What a step sees of a run on this rank, with a float64 model."""
    rank, world, device = parallel.start()
    model = load64(folder)
    return SimpleNamespace(cfg=cfg, rank=rank, world=world, device=device, dtype=torch.float64, folder=folder,
                           model=model,
                           optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=lr))


@contextmanager
def gradients(model, optimizer):
    """-> {parameter: whole gradient}, as the optimizer's next step sees it (after clipping)."""
    grads = {}
    hook = optimizer.register_step_pre_hook(
        lambda *_: grads.update({name: whole(p.grad) for name, p in model.named_parameters()}))
    yield grads
    hook.remove()


def gradient_of(model, loss):
    """-> {parameter: gradient}, by a plain backward pass."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def norm_of(grads):
    return sum((g ** 2).sum().item() for g in grads.values()) ** 0.5


def some_steps(step, folder, cfg, parts, args):
    """A step on each part, on this rank -> (figures, {tensor: values}, micro-batches without dummies)."""
    run, figures, tensors, counts = open_run(folder, cfg, lr=1e-2), [], {}, []
    for i, part in enumerate(parts):
        found, grads, batches = step(run, part, *args)
        figures.append(found)
        tensors |= {f"gradient {i} {name}": g.numpy() for name, g in grads.items()}
        counts.append(sum(bool(batch.names) for batch in batches))
    tensors |= {f"weight {name}": p.numpy() for name, p in weights(run.model).items()}
    return figures, tensors, counts


def check_two_ranks(run_ranks, step, folder, cfg, parts, *args):
    """step(run, part, *args) -> (figures, gradients, micro-batches). Two ranks get the figures, gradients and
    weights that one gets. -> (micro-batches of each step on rank 0, on rank 1)"""
    ranks = run_ranks(some_steps, 2, step, folder, cfg, parts, args)
    figures, tensors, counts = zip(*ranks, some_steps(step, folder, cfg, parts, args))
    assert figures[0] == figures[1]
    for got, want in zip(figures[0], figures[2]):
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)
    two, _, one = ({name: torch.from_numpy(x) for name, x in found.items()} for found in tensors)
    same(two, one, rtol=1e-7, atol=1e-10)
    start = weights(load64(folder))
    assert any((one[f"weight {name}"] - p).abs().max() > 1e-3 for name, p in start.items()), "nothing moved"
    return counts[:2]


# -------------------------------------------------------------------------------------------------- processes

def torchrun(*args):
    """Two ranks of a script, in the repository."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen([*command, *map(str, args)], cwd=REPO, start_new_session=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def kill_tree(process):
    """SIGKILL to a torchrun and all its ranks (they have sessions of their own), all stopped first."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for pid in family:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:
                pass
    process.communicate()
    return family


# ----------------------------------------------------------------------------------- decoders, called plainly

def packed_logits(model, seqs):
    """One packed pass over sequences of token ids -> the logits of each."""
    lengths = [len(s) for s in seqs]
    tokens = torch.cat([torch.as_tensor(s) for s in seqs]).to(model.model.norm.weight.device)
    positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
    spans = decoder.causal_spans(lengths, tokens.device)
    out = model(tokens, positions, lambda layer, q, k, v: decoder.attention(q, k, v, spans))
    return out.split(lengths)


def some_prompts(lengths=(7, 1, 40, 12, 3, 25, 7), seed=0):
    """Token ids of prompts of these lengths."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


def tokens_of(groups):
    """What rollout.generate returned -> the responses' token ids."""
    return [[response.tokens for response in group] for group in groups]
