"""train_dpo.py: the loss against its formula and against TRL, and the reference's log-probs. Whole runs are
tested in test_run.py."""
import functools
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import pack
import parallel
import prompts
import run as running
import train_dpo
from records import InputError, Pair, Turn, read_json
from train_dpo import dpo_loss
from world import (
    alone,
    check_two_ranks,
    coughs_and_rashes,
    gradient_of,
    gradients,
    load64,
    make_baseline,
    make_config,
    make_trees,
    norm_of,
    open_run,
    plain_decoder,
    read_lines,
    same,
    write_lines,
)

TREES = make_trees(7, 2)
BUDGETS = {10_000: 1, 90: 2, 50: 4, 1: 7}  # tokens a micro-batch: how many micro-batches that makes


def configure(budget=16_384, beta=0.1, **flat):
    return make_config(train__loss="dpo", train__grad_clip=1e9, train__tokens_per_microbatch=budget,
                       train__dpo_beta=beta, **flat)


@pytest.fixture
def run(folders64):
    return open_run(folders64[0], configure())


def step(run, trees, reference):
    """One train_step -> (figures, {parameter: whole gradient}, micro-batches)."""
    batches = list(running.pack_mine(run, trees))
    with gradients(run.model, run.optimizer) as grads:
        figures = train_dpo.train_step(run.model, run.optimizer, batches, reference, len(trees),
                                       run.cfg.train)
    return figures, grads, batches


def sums(model, trees):
    """Summed log-probs of each tree's two responses, each with a prompt of its own -> [n, 2]."""
    found = [alone(model, tree.prompt, branch.tokens)[0].sum() for tree in trees for branch in tree.branches]
    return torch.stack(found).view(-1, 2)


def as_reference(values, trees):
    return {tree.branches[0].name: tuple(v) for tree, v in zip(trees, values.tolist())}


@pytest.fixture(scope="module")
def reference(folders64):
    with torch.no_grad():
        return as_reference(sums(plain_decoder(load64(folders64[1], trainable=False)), TREES), TREES)


# --------------------------------------------------------------------------------------------------- the loss

def by_hand(logp, ref, beta):
    """Equation 7 of arXiv 2305.18290 -> mean loss, and the implicit rewards [n, 2]."""
    rewards = beta * (logp - ref)
    return -(1 / (1 + (rewards[:, 1] - rewards[:, 0]).exp())).log().mean(), rewards


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_formula(beta):
    g = torch.Generator().manual_seed(0)
    logps = -10 * torch.rand(4, 6, generator=g, dtype=torch.float64)
    found = zip(logps.T.tolist(), *(x.tolist() for x in dpo_loss(*logps, beta)))
    for (chosen, rejected, ref_chosen, ref_rejected), loss, a, b in found:
        assert (a, b) == (beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))
        assert loss == pytest.approx(math.log(1 + math.exp(b - a)), rel=1e-12)


def test_the_loss_does_not_overflow():
    x = torch.tensor([3000.0, -3000.0], requires_grad=True)
    loss = dpo_loss(x, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)[0]
    loss.sum().backward()
    assert loss.tolist() == [0.0, 3000.0] and x.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("budget, beta", [(b, 0.1) for b in BUDGETS] + [(50, 1.0)])
def test_a_step_is_the_formula_whatever_the_micro_batches(run, reference, budget, beta):
    """Loss, gradient and figures, unshared, one response at a time; a pair stands in one micro-batch."""
    run.cfg = configure(budget, beta)
    figures, grads, batches = step(run, TREES, reference)
    assert len(batches) == BUDGETS[budget]
    for names in (batch.names for batch in batches):
        assert names == [pair for pair in names[::2] for _ in range(2)]
    plain = plain_decoder(run.model)
    logp = sums(plain, TREES)
    ref = torch.tensor([reference[i] for i in range(len(TREES))], dtype=torch.float64)
    loss, rewards = by_hand(logp, ref, beta)
    want = gradient_of(plain, loss)
    same(grads, want)
    chosen, rejected = rewards.unbind(1)
    accuracy = (chosen > rejected).double().mean().item()
    assert 0 < accuracy < 1
    means = {"loss": loss, "chosen_reward": chosen.mean(), "rejected_reward": rejected.mean(),
             "margin": (chosen - rejected).mean(), "chosen_logp": logp[:, 0].mean()}
    assert figures == pytest.approx({name: mean.item() for name, mean in means.items()} | {
        "accuracy": accuracy, "finite": True, "grad_norm": norm_of(want)}, rel=1e-9)
    # The reference release sums over a whole micro-batch; what that gives is far from this.
    whole = by_hand(logp.detach().sum(0, keepdim=True), ref.sum(0, keepdim=True), beta)[0].item()
    assert min(abs(figures["loss"] - whole), abs(figures["loss"] - whole / len(TREES))) > 0.1


def test_at_the_reference_the_loss_is_log_2(run):
    """Nothing is preferred yet; the gradient is that of beta / 2 (rejected - chosen), so beta scales it."""
    plain, found = plain_decoder(run.model), []
    for beta in (0.1, 0.3):
        run.cfg = configure(beta=beta)
        logp = sums(plain, TREES)
        figures, grads, _ = step(run, TREES, as_reference(logp.detach(), TREES))
        rewards = [figures[name] for name in ("chosen_reward", "rejected_reward", "margin")]
        assert figures["loss"] == pytest.approx(math.log(2), rel=1e-12)
        assert rewards == pytest.approx([0.0] * 3, abs=1e-12)
        same(grads, gradient_of(plain, (beta / 2 * (logp[:, 1] - logp[:, 0])).mean()))
        found.append(grads)
    same({n: g * 3 for n, g in found[0].items()}, found[1])


def test_a_tie_is_no_preference(run, monkeypatch):
    pair, pair_sums = pack.Tree([1, 2, 3], [pack.Branch([5, 6], 0)] * 2), train_dpo.pair_sums
    monkeypatch.setattr(train_dpo, "pair_sums", lambda *args: pair_sums(*args)[:, :1].expand(-1, 2))
    figures, _, _ = step(run, [pair], {0: (-1.0, -1.0)})
    assert figures["chosen_reward"] == figures["rejected_reward"] != 0 and figures["accuracy"] == 0


@pytest.mark.slow
def test_two_ranks_equal_one(run_ranks, folders64, reference):
    """Of one pair rank 1 gets nothing but a dummy; of a huge one and two others rank 0 gets less."""
    huge = pack.Tree([7] * 60, [pack.Branch([5, 6], 7), pack.Branch([8], 7)])
    cfg = make_config(train__loss="dpo", train__grad_clip=0.5, train__tokens_per_microbatch=25)
    parts = [TREES[:6], TREES[6:], [huge, *TREES[:2]]]
    counts, other = check_two_ranks(run_ranks, step, folders64[0], cfg, parts, reference | {7: (-9.0, -8.0)})
    assert counts[1] > other[1] == 0 and other[2] > counts[2] > 0, "the case shows nothing"


@pytest.mark.slow
@pytest.mark.extras
def test_it_equals_trl(run, folders64, tmp_path, tiny_tokenizer):
    """TRL's DPOTrainer on the same texts, models and beta: loss, gradient, and the figures it logs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    run.cfg, beta = configure(150, 0.3), 0.3
    run.policy = SimpleNamespace(tokenizer=tiny_tokenizer)
    turns = [Turn(**row) for row in coughs_and_rashes(6)]
    rejected = ["Red?", "Do you smoke at night?", "é", "How?", "Why now?", "Hm"]
    texts = [[prompts.expert_response(turn), text] for turn, text in zip(turns, rejected)]
    (tmp_path / "prompt.md").write_text("Why: {goal}")
    encoded = prompts.encode_prompts(tiny_tokenizer, turns, run.cfg, tmp_path / "prompt.md")
    trees = running.encode_trees(run, encoded, texts)
    base = SimpleNamespace(**vars(run) | {"folder": folders64[1], "dir": tmp_path})
    figures, grads, _ = step(run, trees, train_dpo.reference_logprobs(base, trees, "x"))

    theirs = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            theirs.update({n: p.grad.clone() for n, p in model.named_parameters()})

    policy, ref = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders64)
    rows = [dict(prompt=tiny_tokenizer.decode(p.tokens), chosen=a, rejected=b)
            for p, (a, b) in zip(encoded, texts)]
    args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=beta, per_device_train_batch_size=len(rows),
                         max_steps=1, logging_steps=1, learning_rate=1e-9, max_grad_norm=0.0, bf16=False,
                         gradient_checkpointing=False, report_to=[], use_cpu=True, save_strategy="no",
                         disable_tqdm=True, max_length=None)
    trainer = trl.DPOTrainer(model=policy, ref_model=ref, args=args, train_dataset=Dataset.from_list(rows),
                             processing_class=tiny_tokenizer, callbacks=[Watch()])
    for tree, row in zip(trees, trainer.train_dataset):
        responses = [branch.tokens for branch in tree.branches]
        assert (tree.prompt, responses) == (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
    trainer.train()
    logged = trainer.state.log_history[0]
    worst = max((grads[n] - g).norm().item() / g.norm().item() for n, g in theirs.items())
    print(f"trl {trl.__version__}: relative gradient difference {worst:.1e}; ours {figures}, TRL's {logged}")
    assert set(theirs) == set(grads) and worst < 1e-5  # TRL's fused head computes in float32
    names = """loss=loss chosen_reward=rewards/chosen rejected_reward=rewards/rejected margin=rewards/margins
        accuracy=rewards/accuracies chosen_logp=logps/chosen"""
    for ours, name in (pair.split("=") for pair in names.split()):
        assert figures[ours] == pytest.approx(logged[name], rel=1e-5, abs=1e-6), ours


# ---------------------------------------------------------------------------------- the reference's log-probs

@pytest.fixture
def loads(monkeypatch):
    """-> list that grows by "reference" or "policy" with every model loaded."""
    seen, load = [], parallel.load_sharded

    def watched(*args, trainable=True):
        seen.append("policy" if trainable else "reference")
        return load(*args, trainable=trainable)

    monkeypatch.setattr(parallel, "load_sharded", watched)
    return seen


def test_the_reference_is_computed_once_and_is_the_base_model(loads, train, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo", train__steps=2, train__tokens_per_microbatch=60,
                         train__lr=1e-2)
    train, file = functools.partial(train, train_dpo, path), tmp_path / "run" / "reference.json"
    lines = train()
    assert loads == ["policy", "reference"] and lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[1]["margin"] > 0.01
    first = file.read_bytes()

    train("train.steps=3")  # goes on from a checkpoint
    assert loads == ["policy", "reference", "policy"] and file.read_bytes() == first
    file.write_bytes(first[:99])  # torn
    train("train.steps=4")  # the weights have moved: the base's are computed again, not theirs
    assert loads[3:] == ["policy", "reference"] and file.read_bytes() == first

    tokenizer, trees = prompts.load_tokenizer(tiny_checkpoint), []
    for row in read_lines(tmp_path / "run" / "pairs.jsonl"):
        prompt = prompts.encode_prompt(tokenizer, "{goal}", Pair(**row))
        texts = [prompts.encode_response(tokenizer, row[name]) for name in ("chosen", "rejected")]
        trees.append(pack.Tree(prompt, [pack.Branch(text, 0) for text in texts]))
    with torch.no_grad():
        want = sums(plain_decoder(load64(tiny_checkpoint, trainable=False)), trees)
    for pair, logprobs in read_json(file)["logprobs"]:
        assert logprobs == pytest.approx(want[pair].tolist(), rel=1e-4, abs=1e-4)


def base_run(folder, run_dir):
    """What reference_logprobs sees of a run on this rank."""
    rank, world, device = parallel.start()
    return SimpleNamespace(cfg=configure(300), rank=rank, world=world, device=device, dtype=torch.float64,
                           dir=run_dir, folder=folder)


def on_a_rank(folder, run_dir, trees):
    """reference_logprobs on a rank -> (what it returns, pairs computed here, files written here)."""
    computed, written = [], []
    with pytest.MonkeyPatch.context() as m:
        pair_sums, write_json = train_dpo.pair_sums, train_dpo.write_json
        m.setattr(train_dpo, "pair_sums", lambda *args: computed.append(pair_sums(*args)) or computed[-1])
        m.setattr(train_dpo, "write_json", lambda *args: written.append(write_json(*args)))
        found = train_dpo.reference_logprobs(base_run(folder, run_dir), trees, "x")
    return found, sum(map(len, computed)), len(written)


@pytest.mark.slow
def test_the_reference_of_many_pairs_on_two_ranks(run_ranks, folders64, tmp_path, one_rank):
    """Each is computed once, and rank 0 alone writes. Of 129 pairs the last round leaves rank 1 a dummy."""
    trees = make_trees(129, 2, seed=1)
    (first, n, files), (second, n1, files1) = run_ranks(on_a_rank, 2, folders64[1], tmp_path, trees)
    assert n + n1 == 129 and min(n, n1) > 50 and (files, files1) == (1, 0)
    assert first == second and sorted(first) == list(range(129))
    some = [0, 63, 64, 77, 127, 128]
    with torch.no_grad():
        want = sums(plain_decoder(load64(folders64[1], trainable=False)), [trees[i] for i in some])
    got = torch.tensor([first[i] for i in some], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert on_a_rank(folders64[0], tmp_path, trees) == (first, 0, 0)  # read back by one rank: the same


def test_a_reference_of_other_inputs_or_half_written_is_not_used(loads, folders64, tmp_path, monkeypatch):
    run, file = base_run(folders64[0], tmp_path), tmp_path / "reference.json"

    def killed(*files):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train_dpo.reference_logprobs(run, TREES, "a")
    assert not file.exists()
    first = train_dpo.reference_logprobs(run, TREES, "a")
    assert len(loads) == 2 and list(tmp_path.iterdir()) == [file] and len(first) == len(TREES)
    assert train_dpo.reference_logprobs(run, TREES, "a") == first and len(loads) == 2
    other = train_dpo.reference_logprobs(run, TREES[::-1][:3], "b")
    assert len(loads) == 3 and sorted(other) == [4, 5, 6] and other[5] == pytest.approx(first[5], rel=1e-10)
    train_dpo.reference_logprobs(run, TREES, "a")
    assert len(loads) == 4 and list(tmp_path.iterdir()) == [file]


def test_what_the_reference_depends_on(monkeypatch, refused, tmp_path, tiny_checkpoint):
    """The key it is kept under: the pairs, the prompt, the model, its type, the limits; not how long or how
    fast one trains."""
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    file, prompt, keys = tmp_path / "run" / "pairs.jsonl", tmp_path / "prompt.md", []

    def stop_here(run, trees, inputs):
        keys.append(json.dumps(inputs))
        (tmp_path / "run" / "metrics.jsonl").unlink()  # else the folder would refuse another config
        raise InputError("enough")

    monkeypatch.setattr(train_dpo, "reference_logprobs", stop_here)
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    with open(tmp_path / "model" / "config.json", "a") as f:  # a mere copy would be the same model
        f.write(" ")
    for same_as_before in ([], ["train.lr=0.5"], ["train.steps=9"], ["train.dpo_beta=0.5"]):
        refused(train_dpo, path, *same_as_before)
    assert len(set(keys)) == 1
    for other in ("model.dtype=float64", "rollout.max_new_tokens=20", "rollout.max_prompt_tokens=201",
                  f"model.path={tmp_path / 'model'}"):
        refused(train_dpo, path, other)
    for other in (lambda: prompt.write_text("{goal}!"), lambda: write_lines(file, read_lines(file)[1:])):
        other()
        refused(train_dpo, path)
    assert len(keys) == 10 and len(set(keys)) == 7
