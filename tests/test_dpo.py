"""train_dpo.py and pairs.py: the loss against its formula and against TRL, the reference's log-probs, and which pairs are made.
What a run of it leaves, resumes and refuses is in test_sft.py, beside that of SFT."""
import functools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import config
import data
import hindsight
import lexicon
import pack
import pairs
import parallel
import reward
import toy
import train_dpo
import training
from data import InputError
from test_pack import alone
from test_sft import (baseline_turns, build_pairs, check_two_ranks_equal_one, make_baseline, make_config, make_trees, open_run,
                      refused, run_main, step, write_lines)
from test_train import plain_decoder, same
from train_dpo import dpo_loss


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(make_checkpoint):
    """Policy and reference: two float64 checkpoints of other weights."""
    return make_checkpoint("qwen2", dtype=torch.float64), make_checkpoint("qwen2", dtype=torch.float64, seed=1)


TREES = make_trees(7, 2)
BUDGETS = {10_000: 1, 90: 2, 50: 4, 1: 7}  # tokens a micro-batch: how many micro-batches that makes


def sums(model, trees):
    """Summed log-probs of each tree's two answers, each with a prompt of its own -> [n, 2]."""
    return torch.stack([torch.stack([alone(model, t.prompt, a, 1.0)[0].sum() for a in t.answers]) for t in trees])


def as_reference(values, trees):
    return {t.index[0][0]: tuple(v) for t, v in zip(trees, values.tolist())}


@pytest.fixture(scope="module")
def reference(folders):
    parallel.start()
    model = parallel.load_sharded(folders[1], torch.device("cpu"), torch.float64, trainable=False)
    with torch.no_grad():
        return as_reference(sums(plain_decoder(model), TREES), TREES)


# ------------------------------------------------------------------------------------------------------------- the loss

def by_hand(logp, ref, beta):
    """Equation 7 of arXiv 2305.18290 -> mean loss, and the implicit rewards [n, 2]."""
    rewards = beta * (logp - ref)
    return -(1 / (1 + (rewards[:, 1] - rewards[:, 0]).exp())).log().mean(), rewards


def test_the_formula():
    g = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = (-10 * torch.rand(6, generator=g, dtype=torch.float64) for _ in range(4))
    for beta in (0.1, 2.0):
        loss, a, b = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        for i in range(6):
            margin = beta * ((chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i]))
            assert loss[i].item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-12)
            assert [a[i], b[i]] == [beta * (chosen[i] - ref_chosen[i]), beta * (rejected[i] - ref_rejected[i])]


def test_the_loss_does_not_overflow():
    x = torch.tensor([3000.0, -3000.0], requires_grad=True)
    loss = dpo_loss(x, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)[0]
    loss.sum().backward()
    assert loss.tolist() == [0.0, 3000.0] and x.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("budget, beta", [(b, 0.1) for b in BUDGETS] + [(50, 1.0)])
def test_a_step_is_the_formula_whatever_the_micro_batches(folders, reference, monkeypatch, budget, beta):
    """Loss, gradient and figures, unshared, one answer at a time; and a pair always stands in one micro-batch."""
    packs, packer = [], pack.pack
    monkeypatch.setattr(pack, "pack", lambda trees, *rest: packs.append(packer(trees, *rest)) or packs[-1])
    run = open_run(folders[0], make_config("dpo", train__tokens_per_microbatch=budget, train__dpo_beta=beta))
    figures, grads = step(train_dpo.train_step, run, TREES, reference)
    assert len(packs) == BUDGETS[budget] and all(p.index[::2] == [(i, 0) for i, _ in p.index[1::2]] and
                                                 p.index[1::2] == [(i, 1) for i, _ in p.index[::2]] for p in packs)
    plain = plain_decoder(run.model)
    logp = sums(plain, TREES)
    loss, rewards = by_hand(logp, torch.tensor([reference[i] for i in range(len(TREES))], dtype=torch.float64), beta)
    loss.backward()
    want = {n: p.grad for n, p in plain.named_parameters()}
    same(grads, want)
    chosen, rejected = rewards.unbind(1)
    accuracy = (chosen > rejected).double().mean().item()
    assert 0 < accuracy < 1
    assert figures == pytest.approx({
        "loss": loss.item(), "chosen_reward": chosen.mean().item(), "rejected_reward": rejected.mean().item(),
        "margin": (chosen - rejected).mean().item(), "accuracy": accuracy, "chosen_logp": logp[:, 0].mean().item(),
        "trained_tokens": sum(len(a) for t in TREES for a in t.answers), "finite": True,
        "grad_norm": math.sqrt(sum((g ** 2).sum().item() for g in want.values()))}, rel=1e-9)


def test_sums_are_per_pair_not_per_micro_batch(folders, reference):
    """The reference release sums over a whole micro-batch; what that gives is far from what a step gives."""
    run = open_run(folders[0], make_config("dpo"))
    figures, _ = step(train_dpo.train_step, run, TREES, reference)
    ref = torch.tensor([reference[i] for i in range(len(TREES))], dtype=torch.float64)
    whole = by_hand(sums(plain_decoder(run.model), TREES).detach().sum(0, keepdim=True), ref.sum(0, keepdim=True), 0.1)[0].item()
    assert abs(figures["loss"] - whole) > 0.1 and abs(figures["loss"] - whole / len(TREES)) > 0.1


def test_at_the_reference_the_loss_is_log_2(folders):
    """Nothing is preferred yet; the gradient is that of beta / 2 (rejected - chosen), so beta scales it."""
    grads = {}
    for beta in (0.1, 0.3):
        run = open_run(folders[0], make_config("dpo", train__dpo_beta=beta))
        plain = plain_decoder(run.model)
        logp = sums(plain, TREES)
        figures, grads[beta] = step(train_dpo.train_step, run, TREES, as_reference(logp.detach(), TREES))
        assert figures["loss"] == pytest.approx(math.log(2), rel=1e-12)
        assert [figures[k] for k in ("chosen_reward", "rejected_reward", "margin")] == pytest.approx([0.0] * 3, abs=1e-12)
        (beta / 2 * (logp[:, 1] - logp[:, 0])).mean().backward()
        same(grads[beta], {n: p.grad for n, p in plain.named_parameters()})
    same({n: g * 3 for n, g in grads[0.1].items()}, grads[0.3])


def test_a_tie_is_no_preference(folders, monkeypatch):
    run, real = open_run(folders[0], make_config("dpo")), train_dpo.pair_logprobs
    monkeypatch.setattr(train_dpo, "pair_logprobs", lambda *args: real(*args)[:, :1].expand(-1, 2))  # equal to the last bit
    figures, _ = step(train_dpo.train_step, run, [pack.Tree([1, 2, 3], [[5, 6], [5, 6]], [(0, 0), (0, 1)])], {0: (-1.0, -1.0)})
    assert figures["chosen_reward"] == figures["rejected_reward"] != 0 and figures["accuracy"] == 0


STEPS = [TREES[:6], TREES[6:], [pack.Tree([7] * 60, [[5, 6], [8]], [(7, 0), (7, 1)]), *TREES[:2]]]


def test_two_ranks_equal_one(run_ranks, folders, reference):
    check_two_ranks_equal_one(run_ranks, folders[0], "dpo", STEPS, reference | {7: (-9.0, -8.0)})


def test_it_equals_trl(folders, tmp_path, tiny_tokenizer, monkeypatch):
    """TRL's DPOTrainer on the same texts, models and beta: loss, gradient, and the figures it logs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    turns, beta = baseline_turns(6), 0.3
    rejected = ["Red?", "Do you smoke at night?", "é", "How?", "Why now?", "Hm"]
    texts = [[data.expert_answer(t), answer] for t, answer in zip(turns, rejected)]
    run = open_run(folders[0], make_config("dpo", train__dpo_beta=beta, train__tokens_per_microbatch=150))
    run.tokenizer = tiny_tokenizer
    _, prompts = data.encode_prompts(tiny_tokenizer, "Why: {goal}", turns, 500)
    trees = training.encode_trees(run, prompts, texts)
    base = SimpleNamespace(cfg=run.cfg, rank=0, world=1, device=run.device, dtype=run.dtype, folder=folders[1])
    run.cfg.run_dir = str(tmp_path)
    figures, grads = step(train_dpo.train_step, run, trees, train_dpo.reference_logprobs(base, trees, "x"))

    theirs = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            theirs.update({n: p.grad.clone() for n, p in model.named_parameters()})

    policy, ref = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders)
    rows = [dict(prompt=tiny_tokenizer.decode(p), chosen=a, rejected=b) for p, (a, b) in zip(prompts, texts)]
    args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=beta, per_device_train_batch_size=len(rows), max_steps=1,
                         logging_steps=1, learning_rate=1e-9, max_grad_norm=0.0, bf16=False, gradient_checkpointing=False,
                         report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=None)
    trainer = trl.DPOTrainer(model=policy, ref_model=ref, args=args, train_dataset=Dataset.from_list(rows),
                             processing_class=tiny_tokenizer, callbacks=[Watch()])
    for tree, row in zip(trees, trainer.train_dataset):
        assert (tree.prompt, tree.answers) == (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
    trainer.train()
    logged = trainer.state.log_history[0]
    names = {"loss": "loss", "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "margin": "rewards/margins",
             "accuracy": "rewards/accuracies", "chosen_logp": "logps/chosen"}
    worst = max((grads[n] - g).norm().item() / g.norm().item() for n, g in theirs.items())
    print(f"trl {trl.__version__}: largest relative gradient difference {worst:.1e}; (ours, TRL's)",
          {k: (figures[k], logged[v]) for k, v in names.items()})
    assert set(theirs) == set(grads) and worst < 1e-5  # TRL's fused head computes in float32
    for ours, name in names.items():
        assert figures[ours] == pytest.approx(logged[name], rel=1e-5, abs=1e-6), ours


# ----------------------------------------------------------------------------------------------- the reference's log-probs

@pytest.fixture
def loads(monkeypatch):
    """-> list that grows by "reference" or "policy" with every model loaded."""
    seen, load = [], parallel.load_sharded
    monkeypatch.setattr(parallel, "load_sharded", lambda *args, trainable=True: (
        seen.append("policy" if trainable else "reference") or load(*args, trainable=trainable)))
    return seen


def test_the_reference_is_computed_once_and_is_the_base_model(loads, monkeypatch, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo", train__steps=2, train__tokens_per_microbatch=60, train__lr=1e-2)
    file = tmp_path / "run" / "reference.safetensors"
    lines = run_main(monkeypatch, path, "dpo")
    assert loads == ["policy", "reference"] and lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[1]["margin"] > 0.01
    first = file.read_bytes()

    run_main(monkeypatch, path, "dpo", "train.steps=3")  # goes on from a checkpoint
    assert loads == ["policy", "reference", "policy"] and file.read_bytes() == first
    stored, loads[:] = load_file(file), []
    file.unlink()
    run_main(monkeypatch, path, "dpo", "train.steps=4")  # the weights have moved: the base's are computed again, not theirs
    again = load_file(file)
    assert loads == ["policy", "reference"] and torch.equal(again["logprobs"], stored["logprobs"])
    assert again["pairs"].tolist() == stored["pairs"].tolist()

    parallel.start()
    tokenizer, rows = data.load_tokenizer(tiny_checkpoint), read_lines(tmp_path / "run" / "pairs.jsonl")
    model = plain_decoder(parallel.load_sharded(tiny_checkpoint, torch.device("cpu"), torch.float64, trainable=False))
    prompts = data.encode_prompts(tokenizer, "{goal}", rows, 500)[1]
    trees = [pack.Tree(p, [data.encode_answer(tokenizer, r[k]) for k in ("chosen", "rejected")], []) for p, r in zip(prompts, rows)]
    with torch.no_grad():
        want = sums(model, trees)[stored["pairs"]]
    torch.testing.assert_close(stored["logprobs"], want, rtol=1e-4, atol=1e-4)


def on_a_rank(folder, run_dir, trees):
    """reference_logprobs on one of the ranks -> (what it returns, pairs computed here, files written here)."""
    computed, written, logprobs, save_file = [], [], train_dpo.pair_logprobs, train_dpo.save_file
    train_dpo.pair_logprobs = lambda *args: computed.append(logprobs(*args)) or computed[-1]
    train_dpo.save_file = lambda *args, **how: written.append(save_file(*args, **how))
    rank, world, device = parallel.start()
    cfg = make_config("dpo", train__tokens_per_microbatch=300)
    cfg.run_dir = run_dir
    run = SimpleNamespace(cfg=cfg, rank=rank, world=world, device=device, dtype=torch.float64, folder=folder)
    try:
        return train_dpo.reference_logprobs(run, trees, "x"), sum(map(len, computed)), len(written)
    finally:
        train_dpo.pair_logprobs, train_dpo.save_file = logprobs, save_file


def test_the_reference_of_many_pairs_on_two_ranks(run_ranks, folders, tmp_path, one_rank):
    """Each pair is computed once, and rank 0 alone writes. Of 129 pairs the last round leaves the second rank a dummy."""
    trees = make_trees(129, 2, seed=1)
    (first, n, files), (second, n1, files1) = run_ranks(on_a_rank, 2, str(folders[1]), str(tmp_path), trees)
    assert n + n1 == 129 and min(n, n1) > 50 and (files, files1) == (1, 0)
    assert first == second and sorted(first) == list(range(129))
    model = plain_decoder(parallel.load_sharded(folders[1], one_rank, torch.float64, trainable=False))
    some = [0, 63, 64, 77, 127, 128]
    with torch.no_grad():
        want = sums(model, [trees[i] for i in some])
    torch.testing.assert_close(torch.tensor([first[i] for i in some], dtype=torch.float64), want, rtol=1e-10, atol=1e-10)
    file = load_file(tmp_path / "reference.safetensors")  # read back by one rank: the same
    assert dict(zip(file["pairs"].tolist(), file["logprobs"].tolist())) == first
    assert on_a_rank(folders[0], str(tmp_path), trees) == (first, 0, 0)


def test_what_was_computed_from_other_inputs_is_not_used(loads, folders, tmp_path, one_rank):
    cfg = make_config("dpo")
    cfg.run_dir = str(tmp_path)
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, device=one_rank, dtype=torch.float64, folder=folders[0])
    first = train_dpo.reference_logprobs(run, TREES, "a")
    assert loads == ["reference"] and train_dpo.reference_logprobs(run, TREES, "a") == first and loads == ["reference"]
    other = train_dpo.reference_logprobs(run, TREES[::-1][:3], "b")
    assert len(loads) == 2 and sorted(other) == [4, 5, 6] and other[5] == pytest.approx(first[5], rel=1e-10)
    train_dpo.reference_logprobs(run, TREES, "a")
    assert len(loads) == 3 and [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]


def test_a_half_written_reference_is_never_used(loads, folders, tmp_path, one_rank, monkeypatch):
    cfg = make_config("dpo")
    cfg.run_dir = str(tmp_path)
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, device=one_rank, dtype=torch.float64, folder=folders[0])

    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train_dpo, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train_dpo.reference_logprobs(run, TREES, "a")
    assert not (tmp_path / "reference.safetensors").exists()
    train_dpo.reference_logprobs(run, TREES, "a")
    assert len(loads) == 2 and [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]
    with safe_open(tmp_path / "reference.safetensors", "pt") as f:
        assert f.get_tensor("logprobs").shape == (7, 2) and f.get_tensor("logprobs").dtype == torch.float64


def test_what_the_reference_depends_on(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    """The key it is kept under: the pairs, the prompt, the model, its type, the limits; not how long or how fast one trains."""
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    file, keys = tmp_path / "run" / "pairs.jsonl", []

    def stop_here(run, trees, inputs):
        keys.append(inputs)
        (tmp_path / "run" / "metrics.jsonl").unlink()  # else the folder would hold its next user to this config
        raise InputError("enough")

    monkeypatch.setattr(train_dpo, "reference_logprobs", stop_here)
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    with open(tmp_path / "model" / "config.json", "a") as f:  # another content; a mere copy would be the same model
        f.write(" ")
    for same_as_before in ([], ["train.lr=0.5"], ["train.steps=9"], ["train.dpo_beta=0.5"]):
        refused(monkeypatch, capsys, train_dpo, path, *same_as_before)
    assert len(set(keys)) == 1
    for other in ("model.dtype=float64", "rollout.max_new_tokens=20", "rollout.max_prompt_tokens=201",
                  f"model.path={tmp_path / 'model'}"):
        refused(monkeypatch, capsys, train_dpo, path, other)
    (tmp_path / "prompt.md").write_text("{goal}!")
    refused(monkeypatch, capsys, train_dpo, path)
    (tmp_path / "prompt.md").write_text("{goal}")
    file.write_text("".join(file.read_text().splitlines(True)[1:]))
    refused(monkeypatch, capsys, train_dpo, path)
    assert len(keys) == 10 and len(set(keys)) == 7


# --------------------------------------------------------------------------------------------------------------- pairs.py

SMALL = dict(goal="g", yes=["yes"], no=["no"], openers=[], generic_questions=["anything else"],
             attributes=dict(phlegm=dict(asks=["phlegm"], yes_no="true"), fever=dict(asks=["fever"], values=dict(no=["no fever"])),
                             itching=dict(asks=["itch\\w*"], values=dict(yes=["it itches"])),
                             colour=dict(asks=["colour"], values=dict(red=["red"])), coffee=dict(asks=["coffee"], yes_no="true"),
                             allergies=dict(asks=["allerg\\w*"], yes_no="true")),
             complaints=dict(cough=dict(cues=["cough"], attributes=["phlegm", "fever"]),
                             rash=dict(cues=["rash"], attributes=["itching", "colour"]),
                             insomnia=dict(cues=["sleep"], attributes=["coffee", "fever"])))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("lexicon") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return lexicon.load(path)


def turn(name, said, expert, decision="continue", target=()):
    """name: session_turn; said: a conversation from the user's first words on; target: what the user says later."""
    context = [dict(role=("user", "assistant")[i % 2], content=c) for i, c in enumerate(said)]
    return dict(turn_id=name, session_id=name.split("_")[0], goal="g", context=context, expert=expert, target=list(target),
                decision=decision)


COUGH = turn("A_2", ["hello", "Hi", "a cough", "Any fever?", "no fever, but it itches"], " Any phlegm?\n", target=["Coffee : yes"])
RED = turn("E_1", ["my rash"], " What colour is it? ")
OTHERS = {  # what may stand in the logs, and must not be held against COUGH
    "matters to this complaint": turn("B_1", ["cannot sleep"], "Do you have a fever?"),
    "one of two matters": turn("B_1", ["my rash"], "What colour is it? Any phlegm?"),
    "mentioned here": turn("B_1", ["my rash"], "Does it itch?"),
    "mentioned later": turn("B_1", ["my rash"], "Do you drink coffee?"),
    "generic": turn("B_1", ["my rash"], "Any allergies?"),
    "the same session": turn("A_1", ["my rash"], "What colour is it?"),
    "the same complaint": turn("B_1", ["a bad cough"], "What colour is it?"),
    "the complaint first named is the same": turn("B_1", ["a cough", "Yes?", "my rash"], "What colour is it?"),
    "a complaint that only the expert named": turn("B_1", ["hello", "Is it your rash?", "yes"], "What colour is it?"),
    "no complaint": turn("B_1", ["hello"], "What colour is it?"),
    "asks for nothing": turn("B_1", ["my rash"], "Anything else?"),
    "no question": turn("B_1", ["my rash"], "I like the colour."),
    "keywords": turn("B_1", ["my rash"], "colour?"),
    "what was said at a stop": turn("B_1", ["my rash"], "What colour is it?", "stop"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_is_never_rejected(small, name):
    made, left_out = pairs.build_pairs([COUGH, OTHERS[name]], small, ["allergies"])
    assert not [p for p in made if p["turn_id"] == "A_2"] and left_out["no irrelevant utterance in the logs"] >= 1
    for seed in range(3):  # with a good one beside it, that is taken
        made, _ = pairs.build_pairs([COUGH, OTHERS[name], RED], small, ["allergies"], seed)
        assert [(p["rejected"], p["rejected_from"]) for p in made if p["turn_id"] == "A_2"] == [("What colour is it?", "E_1")]


def test_a_pair(small):
    stop = turn("F_1", ["cannot sleep"], "Take this.", "stop")
    made, left_out = pairs.build_pairs([COUGH, RED, stop], small, ["allergies"])
    assert made[0] == {**{k: COUGH[k] for k in ("turn_id", "session_id", "goal", "context", "decision")}, "chosen": "Any phlegm?",
                       "rejected": "What colour is it?", "rejected_from": "E_1"}
    assert made[1]["turn_id"] == "E_1" and (made[1]["chosen"], made[1]["rejected"]) == ("What colour is it?", "Any phlegm?")
    assert (made[2]["chosen"], made[2]["decision"]) == ("<stop />", "stop") and len(made) == 3 and not left_out


def test_the_turns_left_out_are_counted(small):
    turns = [turn("B_1", ["hello"], "What?"), turn("C_1", ["hi"], None, "stop"), COUGH, turn("D_1", ["cough"], "Any fever?")]
    made, left_out = pairs.build_pairs(turns, small)
    assert not made and left_out == {"no complaint recognised": 2, "no irrelevant utterance in the logs": 2}


def test_generic_slots_are_named_as_hindsight_reads_them(small):
    """hindsight.generic is compared without regard to case and underscores there, so it must be here."""
    assert not [p for p in pairs.build_pairs([COUGH, OTHERS["generic"]], small, ["Allergies"])[0] if p["turn_id"] == "A_2"]
    assert [p for p in pairs.build_pairs([COUGH, OTHERS["generic"]], small, ["pregnancy"])[0] if p["turn_id"] == "A_2"]


def test_a_rare_irrelevant_utterance_is_found(small):
    """200 draws at random mostly miss the single one of 600."""
    turns = [turn(f"{i}_1", ["a cough"], "Any fever?") for i in range(600)]
    turns[500] = RED
    made, left_out = pairs.build_pairs(turns, small)
    assert len(made) == 600 and not left_out and {p["rejected"] for p in made if p["turn_id"] != "E_1"} == {"What colour is it?"}


@pytest.fixture(scope="module")
def toy_turns(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "lexicon.yaml"
    path.write_text(yaml.safe_dump(toy.lexicon()))
    lex = lexicon.load(path)
    sessions = [s for s in (toy.session(0, "train", i) for i in range(250)) if not hindsight.check_session(s)]
    extract = functools.partial(hindsight.extract_rules, lex=lex)
    return [turn for s in sessions for turn in hindsight.build_turns(s, extract, generic=toy.GENERIC)[0]], lex


def test_the_toys_pairs_are_irrelevant_by_the_grader(toy_turns):
    turns, lex = toy_turns
    made, left_out = pairs.build_pairs(turns, lex, toy.GENERIC)
    by_id = {t["turn_id"]: t for t in turns}
    assert len(made) > 0.95 * len(turns) and len(made) + left_out.total() == len(turns) and len({p["rejected"] for p in made}) > 50
    asks_on = [p for p in made if p["decision"] == "continue"]
    assert len(asks_on) > 500
    for p in asks_on:
        assert reward.grade_rules(by_id[p["turn_id"]], p["rejected"], lex) == 0.0, p
    for p in made:
        other, here = by_id[p["rejected_from"]], by_id[p["turn_id"]]
        assert other["session_id"] != here["session_id"] and other["decision"] == "continue"
        assert p["rejected"] == other["expert"].strip() and reward.decision(p["rejected"]) == "continue"
        assert not set(lexicon.asked(p["rejected"], lex)) & set(toy.GENERIC)
        assert p["chosen"] == (here["expert"].strip() if p["decision"] == "continue" else "<stop />")


def test_the_seed_decides(toy_turns):
    turns, lex = toy_turns[0][:150], toy_turns[1]
    first, again, other = (pairs.build_pairs(turns, lex, toy.GENERIC, seed)[0] for seed in (0, 0, 1))
    rejected = lambda made: [p["rejected"] for p in made]
    assert first == again and rejected(first) != rejected(other) and [p["turn_id"] for p in first] == [p["turn_id"] for p in other]
    assert len(set(rejected(first))) > 20  # drawn, not always the first that fits


def test_the_script(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    out = tmp_path / "run" / "pairs.jsonl"
    good = out.read_bytes()
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", baseline_turns() + [turn("99_1", ["hello"], "Well?")])
    capsys.readouterr()
    build_pairs(path)  # a rerun replaces what was there
    said = capsys.readouterr().out
    assert out.read_bytes() == good
    assert "1 no complaint recognised" in said and "10 pairs of 11 turns" in said and "rather than" in said
    assert sorted(p.name for p in out.parent.iterdir()) == ["pairs.jsonl", "pairs_made.json", "turns"]
    refused(monkeypatch, capsys, train_dpo, path, "seed=5")
    config_5 = config.load([str(path), "seed=5"])
    assert pairs.same_made(config.load([str(path)])) and not pairs.same_made(config_5)
    (out.parent / "pairs_made.json").unlink()  # made by hand
    assert pairs.same_made(config_5)
    keys = {"turn_id", "session_id", "goal", "context", "decision", "chosen", "rejected", "rejected_from"}
    assert all(set(json.loads(line)) == keys for line in good.splitlines())

    line = refused(monkeypatch, capsys, pairs, path, "seed=1", "data.lexicon=")
    assert "data.lexicon is not set" in line
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", baseline_turns()[::2])  # nothing but coughs
    line = refused(monkeypatch, capsys, pairs, path)
    assert "no pair for any of 5 turns" in line and "lexicon.yaml" in line and out.read_bytes() == good


def test_the_scripts_seed_and_generic_slots_are_the_configs(monkeypatch, tmp_path, tiny_checkpoint):
    make_baseline(tmp_path, tiny_checkpoint, "dpo", seed=5, hindsight__generic=["itching"])
    rows = read_lines(tmp_path / "run" / "pairs.jsonl")  # an itch is generic now: coughs get no pair
    assert len(rows) == 5 and {r["rejected"].rstrip("!") for r in rows} == {"A fever?"}
    lex = lexicon.load(tmp_path / "lexicon.yaml")
    assert rows == pairs.build_pairs(data.load_turns(tmp_path / "run" / "turns" / "train.jsonl"), lex, ["itching"], 5)[0]


@pytest.mark.parametrize("change", [{"expert": None}, {"expert": " "}])
def test_a_continue_turn_without_an_expert_is_one_line(change, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "dpo")
    turns = baseline_turns()
    turns[2] |= change
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", turns)
    line = refused(monkeypatch, capsys, pairs, path)
    assert "turn 2_1" in line and "'expert'" in line
