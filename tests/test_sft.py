"""train_sft.py: its loss and gradient, exactly what carries loss; and what both baselines (SFT, DPO) do as runs: their files,
their resume, their errors. test_dpo.py holds the loss of the other."""
import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import config
import data
import pack
import pairs
import parallel
import rollout
import toy
import train_dpo
import train_grpo
import train_sft
import training
from data import InputError, cli
from test_pack import alone
from test_train import REPO, equal, exported, make_world, metrics, plain_decoder, same, whole

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}


# ------------------------------------------------------------------------------------------------- one step, in float64

def make_config(loss, **flat):
    """Dotted keys with __ for the dot -> Config."""
    base = {"run_dir": "unused", "train.loss": loss, "train.grad_clip": 1e9, "train.lr": 1e-2}
    return config.build(base | {k.replace("__", "."): v for k, v in flat.items()})


def open_run(folder, cfg, rank=0, world=1, lr=0.0):
    """What a train_step sees of a run, on a float64 model."""
    parallel.start()
    model = parallel.load_sharded(folder, torch.device("cpu"), torch.float64)
    return SimpleNamespace(cfg=cfg, rank=rank, world=world, device=torch.device("cpu"), dtype=torch.float64, folder=folder,
                           model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=lr))


def step(function, run, *args):
    """One train_step -> (figures, {parameter: whole gradient before AdamW saw it})."""
    grads = {}
    hook = run.optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: whole(p.grad) for n, p in run.model.named_parameters()}))
    figures = function(run, *args)
    hook.remove()
    return figures, grads


def make_trees(n, answers, seed=7):
    """n trees of unequal prompts (3 to 12 tokens), each with answers of unequal lengths (1 to 14)."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(250) for _ in range(rng.randint(low, high))]
    return [pack.Tree(ids(3, 12), [ids(1, 14) for _ in range(answers)], [(i, j) for j in range(answers)]) for i in range(n)]


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint("qwen2", dtype=torch.float64)


TREES = make_trees(9, 1)
BUDGETS = {10_000: 1, 80: 2, 40: 3, 20: 7, 1: 9}  # tokens a micro-batch: how many micro-batches that makes


def by_hand(model, trees):
    """The loss of the design: minus the mean log-prob of all answer tokens; one example at a time, with a prompt of its own."""
    logp = [alone(model, tree.prompt, answer, 1.0)[0] for tree in trees for answer in tree.answers]
    return -sum(x.sum() for x in logp) / sum(len(x) for x in logp)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_step_is_the_token_mean_whatever_the_micro_batches(folder, budget):
    assert len(pack.balance(TREES, 1, budget)[0]) == BUDGETS[budget]
    run = open_run(folder, make_config("sft", train__tokens_per_microbatch=budget))
    figures, grads = step(train_sft.train_step, run, TREES)
    plain = plain_decoder(run.model)
    loss = by_hand(plain, TREES)
    loss.backward()
    want = {n: p.grad for n, p in plain.named_parameters()}
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-10)
    same(grads, want)
    entropy = torch.cat([alone(plain, tree.prompt, tree.answers[0], 1.0)[1] for tree in TREES]).mean()
    assert figures["entropy"] == pytest.approx(entropy.item(), rel=1e-10)
    assert figures["grad_norm"] == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in want.values())), rel=1e-9)
    assert figures["trained_tokens"] == sum(len(a) for tree in TREES for a in tree.answers) and figures["finite"] is True


def test_the_mean_is_over_tokens_not_over_examples_or_micro_batches(folder):
    """The other means are far enough away for the test above to tell them apart."""
    run = open_run(folder, make_config("sft"))
    plain = plain_decoder(run.model)
    loss = step(train_sft.train_step, run, TREES)[0]["loss"]
    per_example = sum(by_hand(plain, [tree]).item() for tree in TREES) / len(TREES)
    parts = pack.balance(TREES, 1, 25)[0]
    per_part = sum(by_hand(plain, part).item() for part in parts) / len(parts)
    assert loss == pytest.approx(by_hand(plain, TREES).item()) and min(abs(loss - per_example), abs(loss - per_part)) > 0.01


def test_every_step_starts_from_a_clean_gradient(folder):
    run = open_run(folder, make_config("sft"))
    first, second = (step(train_sft.train_step, run, TREES[:3])[1] for _ in range(2))
    same(first, second, rtol=0, atol=0)


def test_a_bad_gradient_steps_nothing(folder, monkeypatch):
    run = open_run(folder, make_config("sft"), lr=0.1)
    before = {n: whole(p) for n, p in run.model.named_parameters()}
    logprobs = pack.logprobs
    monkeypatch.setattr(pack, "logprobs", lambda *args: tuple(x * math.nan for x in logprobs(*args)))
    figures, grads = step(train_sft.train_step, run, TREES[:3])
    assert figures["finite"] is False and figures["grad_norm"] is None and not grads
    same({n: whole(p) for n, p in run.model.named_parameters()}, before, rtol=0, atol=0)


# Eight trees fill two ranks evenly; of one the second rank gets nothing but a dummy; of a huge one and two others the first
# rank gets fewer micro-batches.
STEPS = [TREES[:8], TREES[8:], [pack.Tree([7] * 40, [[5, 6]], [(0, 0)]), *TREES[3:5]]]
TWO_RANKS_BUDGET = 25


def train_three_steps(folder, loss, steps, rank, world, *args):
    """-> (figures, {tensor: value}, micro-batches with something in them) of three steps; AdamW moves the weights."""
    cfg = make_config(loss, train__tokens_per_microbatch=TWO_RANKS_BUDGET, train__grad_clip=0.5)
    run = open_run(folder, cfg, rank, world, lr=1e-2)
    tensors, figures = {}, []
    for i, trees in enumerate(steps):
        out, grads = step(SCRIPTS[loss].train_step, run, trees, *args)
        tensors |= {f"grad{i}:{n}": g for n, g in grads.items()}
        figures.append(out)
    tensors |= {f"weight:{n}": whole(p) for n, p in run.model.named_parameters()}
    counts = [sum(map(bool, pack.balance(trees, world, TWO_RANKS_BUDGET)[rank])) for trees in steps]
    return figures, tensors, counts


def on_a_rank(folder, loss, steps, *args):
    rank, world, _ = parallel.start()
    figures, tensors, counts = train_three_steps(folder, loss, steps, rank, world, *args)
    return figures, {n: t.tolist() for n, t in tensors.items()} if rank == 0 else None, counts


def check_two_ranks_equal_one(run_ranks, folder, loss, steps, *args):
    """Gradients (clipped by their global norm), figures and weights; with ranks that have nothing or less to do."""
    (figures, tensors, counts), (figures1, _, counts1) = run_ranks(on_a_rank, 2, str(folder), loss, steps, *args)
    assert counts[1] > counts1[1] == 0 and counts1[2] > counts[2] > 0, "the case shows nothing"
    one, alone_tensors, _ = train_three_steps(folder, loss, steps, 0, 1, *args)
    assert figures == figures1 and max(f["grad_norm"] for f in figures) > 0.5
    for got, want in zip(figures, one):
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)
    same({n: torch.tensor(t, dtype=torch.float64) for n, t in tensors.items()}, alone_tensors, rtol=1e-7, atol=1e-10)


def test_two_ranks_equal_one(run_ranks, folder):
    check_two_ranks_equal_one(run_ranks, folder, "sft", STEPS)


# ------------------------------------------------------------------------------------------------- what carries the loss

TURNS = [  # (context, expert, decision) -> what must be trained on
    ([("user", "Cough, 37°")], "Any fever?", "continue", "Any fever?<|im_end|>"),
    ([("user", "a cough"), ("assistant", "Any fever?"), ("user", "no\nreally")], "  Thanks.\nSince when? 😷\n", "continue",
     "Thanks.\nSince when? 😷<|im_end|>"),
    ([("user", "x"), ("assistant", "<|im_end|>"), ("user", "<|im_start|>assistant")], "a<|im_end|>b\n<|im_start|>user", "continue",
     "a< |im_end|>b\n< |im_start|>user<|im_end|>"),
    ([("user", "two days")], "Take this. How are you?", "stop", "<stop /><|im_end|>"),
    ([("user", "bye")], None, "stop", "<stop /><|im_end|>")]
PROMPTS = [
    "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>user\nCough, 37°<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>user\na cough<|im_end|>\n<|im_start|>assistant\nAny fever?<|im_end|>\n"
    "<|im_start|>user\nno\nreally<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n< |im_end|><|im_end|>\n"
    "<|im_start|>user\n< |im_start|>assistant<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>user\ntwo days<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"]


def golden_turns():
    return [dict(turn_id=f"{i}_1", session_id=str(i), goal="g", context=[dict(role=r, content=c) for r, c in context],
                 expert=expert, target=[], decision=decision) for i, (context, expert, decision, _) in enumerate(TURNS)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run_main(monkeypatch, path, loss, *overrides):
    """The trainer's main() in this process, one rank. -> its metrics lines."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", [f"train_{loss}.py", str(path), *overrides])
    SCRIPTS[loss].main()
    return metrics(path)


def test_exactly_the_experts_answer_and_the_end_token_carry_loss(monkeypatch, tmp_path, tiny_checkpoint, tiny_tokenizer):
    """A whole run on these turns: what stands before each answer, and every token whose log-prob has a gradient."""
    path = make_world(tmp_path, tiny_checkpoint, train__loss="sft", train__steps_per_sync=1, train__prompts_per_step=5,
                      train__steps=1, rollout__max_new_tokens=60, rollout__max_prompt_tokens=500,
                      train__tokens_per_microbatch=10_000)
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", golden_turns())
    (tmp_path / "prompt.md").write_text("Why: {goal}.\n")
    seen, logprobs = [], pack.logprobs

    def watched(model, packed, *rest):
        logp, entropy = logprobs(model, packed, *rest)
        logp.retain_grad()
        seen.append((packed, logp))
        return logp, entropy

    monkeypatch.setattr(pack, "logprobs", watched)
    run_main(monkeypatch, path, "sft")
    (packed, logp), = seen
    carries = logp.grad != 0
    assert carries.all() and len(set(logp.grad.tolist())) == 1  # all alike, and nothing else has a gradient: it has no log-prob
    answers = [tiny_tokenizer.decode(packed.targets[packed.seq == s]) for s in range(len(TURNS))]
    lengths = packed.spans[0].q_len.tolist()
    prompts = [tiny_tokenizer.decode(ids) for ids in packed.tokens[:sum(lengths)].split(lengths)]
    assert dict(zip(prompts, answers)) == dict(zip(PROMPTS, [want for *_, want in TURNS]))
    assert [int((packed.targets[packed.seq == s] == 258).sum()) for s in range(len(TURNS))] == [1] * len(TURNS)


def test_the_mask_with_merged_tokens():
    """The same with the toy's byte-level BPE: no token reaches over the border of prompt and answer, nothing is lost."""
    tokenizer = toy.make_tokenizer(toy.corpus(3, 60))
    run = SimpleNamespace(cfg=make_config("sft"), tokenizer=tokenizer, rank=0)
    turns, prompts = data.encode_prompts(tokenizer, "Why: {goal}.", golden_turns(), 500)
    trees = training.encode_trees(run, prompts, [[data.expert_answer(turn)] for turn in turns])
    assert [tokenizer.decode(tree.prompt) for tree in trees] == PROMPTS
    packed = pack.pack(trees)
    answers = [packed.targets[packed.seq == s].tolist() for s in range(len(trees))]
    assert [tokenizer.decode(answer) for answer in answers] == [want for *_, want in TURNS]
    assert all(answer.count(tokenizer.eos_token_id) == 1 == answer[::-1].index(tokenizer.eos_token_id) + 1 for answer in answers)
    assert len(answers[0]) < len("Any fever?"), "nothing was merged"


def test_what_an_expert_did():
    turn = dict(turn_id="7_1", decision="continue", expert=" How long?\nReally? ")
    assert data.expert_answer(turn) == "How long?\nReally?"
    assert data.expert_answer(turn | {"decision": "stop"}) == "<stop />" == data.expert_answer({"decision": "stop"})
    for expert in ({}, {"expert": None}, {"expert": " \n"}, {"expert": 3}):
        with pytest.raises(InputError, match="7_1.*'expert'"):
            data.expert_answer({"turn_id": "7_1", "decision": "continue"} | expert)


@pytest.mark.parametrize("rank", [0, 1])
def test_answers_that_are_too_long(tiny_tokenizer, capsys, rank):
    """The end token counts. What is left out takes its whole tree along, and the others keep their numbers."""
    run = SimpleNamespace(cfg=make_config("dpo", rollout__max_new_tokens=4), tokenizer=tiny_tokenizer, rank=rank)
    prompts, texts = [[1], [2], [3], [4]], [["abc", "d"], ["e", "abcd"], ["abcd", "e"], ["f", "abc"]]
    with pytest.raises(InputError, match="2 of 4 examples.*rollout.max_new_tokens=4.*data.long_prompts=drop"):
        training.encode_trees(run, prompts, texts)
    run.cfg.data.long_prompts = "drop"
    capsys.readouterr()
    trees = training.encode_trees(run, prompts, texts)
    assert ("left out 2 of 4 examples" in capsys.readouterr().out) == (rank == 0)
    assert [(t.prompt, t.index) for t in trees] == [([1], [(0, 0), (0, 1)]), ([4], [(3, 0), (3, 1)])]
    assert [tiny_tokenizer.decode(a) for t in trees for a in t.answers] == [x + "<|im_end|>" for x in ("abc", "d", "f", "abc")]
    with pytest.raises(InputError, match="2 of 2 examples"):
        training.encode_trees(run, prompts[1:3], texts[1:3])


# ------------------------------------------------------------------------------------------------- both baselines: a run

YES_NO = dict(yes_no="true")
LEXICON = dict(goal="g", yes=["yes"], no=["no"], openers=[], generic_questions=["else"],
               attributes=dict(phlegm=dict(asks=["phlegm"], **YES_NO), fever=dict(asks=["fever"], **YES_NO),
                               itching=dict(asks=["itch"], **YES_NO), allergies=dict(asks=["allerg\\w*"], **YES_NO)),
               complaints=dict(cough=dict(cues=["cough"], attributes=["phlegm", "fever"]),
                               rash=dict(cues=["rash"], attributes=["itching"])))


def baseline_turns(n=10):
    """Coughs and rashes by turns, every third a stop; a cough's questions do not matter to a rash."""
    rows = []
    for i in range(n):
        cough, stop = i % 2 == 0, i % 3 == 0
        rows.append(dict(turn_id=f"{i}_1", session_id=str(i), goal="g", decision="stop" if stop else "continue",
                         context=[dict(role="user", content=("cough " if cough else "rash ") * (1 + i % 4))],
                         expert=("A fever?" if cough else "An itch?") + "!" * (i % 3 == 2),
                         target=[] if stop else ["fever: no" if cough else "itching: no"]))
    return rows


def make_baseline(folder, checkpoint_folder, loss, **changed):
    """A world ready for train_sft.py or train_dpo.py -> path of its config."""
    if loss != "grpo":
        changed = dict(train__steps_per_sync=1, rollout__max_new_tokens=12) | changed
    path = make_world(folder, checkpoint_folder, train__loss=loss, **changed)
    write_lines(folder / "run" / "turns" / "train.jsonl", baseline_turns())
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(LEXICON))
    if loss == "dpo":
        build_pairs(path)
    return path


def build_pairs(path):
    argv = sys.argv
    sys.argv = ["pairs.py", str(path)]
    try:
        pairs.main()
    finally:
        sys.argv = argv


KEYS = {"step", "epoch", "lr", "loss", "trained_tokens", "grad_norm", "finite", "train_s"}
OWN_KEYS = {"sft": {"entropy"}, "dpo": {"chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logp"}}


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_a_run_its_files_and_its_resume(loss, monkeypatch, tmp_path, tiny_checkpoint):
    """3 steps, then 6 by train.steps=6, are 6 steps to the bit; a finished run that is started again changes nothing."""
    how = dict(train__steps=3, train__eval_every=3, train__keep_checkpoints=2, train__lr=1e-2, train__tokens_per_microbatch=60)
    short, straight = (make_baseline(tmp_path / x, tiny_checkpoint, loss, **how) for x in "ab")
    seen, train_step = [], SCRIPTS[loss].train_step
    monkeypatch.setattr(SCRIPTS[loss], "train_step", lambda run, trees, *rest: (
        seen.append(sorted(t.index[0][0] for t in trees)) or train_step(run, trees, *rest)))
    run_main(monkeypatch, short, loss)
    with open(short.parent / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "half a line')
    resumed = run_main(monkeypatch, short, loss, "train.steps=6")
    orders, seen[:] = seen[:], []
    lines = run_main(monkeypatch, straight, loss, "train.steps=6")
    assert seen == orders and equal(exported(short), exported(straight))
    assert sorted(i for part in seen[:5] for i in part) == sorted([*range(10)] * 2)  # 20 examples: two whole epochs of ten
    timeless = lambda rows: [{k: v for k, v in m.items() if not k.endswith("_s")} for m in rows]
    assert timeless(resumed) == timeless(lines)

    run = straight.parent / "run"
    assert [m["step"] for m in lines] == list(range(7)) and [m["step"] for m in lines if "eval" in m] == [0, 3, 6]
    assert set(lines[0]) == {"step", "eval"}
    assert all(set(m) - {"eval", "eval_s"} == KEYS | OWN_KEYS[loss] for m in lines[1:])
    assert [m["epoch"] for m in lines[1:]] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.4]) and lines[-1]["lr"] == 1e-2
    assert lines[-1]["loss"] < lines[1]["loss"]  # it learns
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    for when in ("before", "after"):
        rows = [json.loads(x) for x in (run / f"groups_{when}.jsonl").read_text().splitlines()]
        assert [r["turn"]["turn_id"] for r in rows] == ["0_0", "1_0", "2_0"] and all(len(r["graded"]) == 4 for r in rows)
        assert {"response", "r_a", "r_s", "omega", "reward"} <= set(rows[0]["graded"][0])
    assert (run / "groups_before.jsonl").read_text() != (run / "groups_after.jsonl").read_text()
    assert (run / "report.html").is_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    hf = AutoModelForCausalLM.from_pretrained(run / "export")
    base = load_file(tiny_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(hf.get_input_embeddings().weight, exported(straight)["model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(run / "export").chat_template and not torch.equal(hf.get_input_embeddings().weight, base)

    monkeypatch.setattr(SCRIPTS[loss], "train_step", lambda *_: pytest.fail("a finished run trains again"))
    names = ("metrics.jsonl", "config.yaml", "groups_before.jsonl", "groups_after.jsonl", "export/model.safetensors")
    before = {name: (run / name).read_bytes() for name in names}
    run_main(monkeypatch, straight, loss, "train.steps=6")
    assert before == {name: (run / name).read_bytes() for name in names}


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_without_evaluations_and_steps(loss, monkeypatch, tmp_path, tiny_checkpoint):
    """Epochs decide how long and the seed in which order, the learning rate rises and falls, the last step leaves a
    checkpoint, and no held-out turns are read."""
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=None, train__epochs=2, train__schedule="linear",
                         train__checkpoint_every=50, train__warmup_steps=2, seed=3)
    seen, train_step = [], SCRIPTS[loss].train_step
    monkeypatch.setattr(SCRIPTS[loss], "train_step", lambda run, trees, *rest: (
        seen.extend(t.index[0][0] for t in trees) or train_step(run, trees, *rest)))
    (tmp_path / "run" / "turns" / "eval.jsonl").unlink()
    lines = run_main(monkeypatch, path, loss)
    assert [m["lr"] for m in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [m["epoch"] for m in lines] == [0.4, 0.8, 1.2, 1.6, 2.0] and not any("eval" in m for m in lines)
    assert seen == training.stream(10, 0, 20, 3) != training.stream(10, 0, 20, 0)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000005"]
    assert not list((tmp_path / "run").glob("groups_*"))


# ------------------------------------------------------------------------------------------------- both baselines: errors

def refused(monkeypatch, capsys, script, *argv):
    """The script ends with exit code 2 and one line of error, which is returned."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli(script.main)
    text = capsys.readouterr().err
    errors = text[text.index("error: "):].splitlines()
    assert end.value.code == 2 and len(errors) == 1 and "Traceback" not in text
    return errors[0]


def rewrite(name, change):
    def how(path):
        file = path.parent / "run" / name
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            change(row)
        write_lines(file, rows)
    return how


def break_line(name, number, text):
    def how(path):
        file = path.parent / "run" / name
        lines = file.read_text().splitlines()
        lines[number - 1] = text
        file.write_text("\n".join(lines) + "\n")
    return how


def remove(name):
    return lambda path: (path.parent / "run" / name).unlink()


def lame_tokenizer(path):
    """A copy of the model folder whose tokenizer names no end token (config.json does)."""
    tree = yaml.safe_load(path.read_text())
    shutil.copytree(tree["model"]["path"], path.parent / "lame")
    file = path.parent / "lame" / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told["eos_token"] = None
    file.write_text(json.dumps(told))
    tree["model"]["path"] = str(path.parent / "lame")
    path.write_text(yaml.safe_dump(tree))


def named(turn_id, /, **change):
    return lambda row: row["turn_id"] == turn_id and row.update(change)


BAD = {  # name: (loss, script, what is done to a good run, overrides, what the line must say)
    "grpo with the wrong script": ("grpo", "sft", None, [], ["train.loss=grpo", "train_grpo.py", "not train_sft.py"]),
    "own loss with the wrong script": ("grpo", "dpo", None, ["train.loss=mine"],
                                       ["train.loss=mine", "train_grpo.py", "not train_dpo.py"]),
    "dpo with the wrong script": ("sft", "sft", None, ["train.loss=dpo"], ["train.loss=dpo", "train_dpo.py", "not train_sft.py"]),
    "sft with the wrong script": ("sft", "dpo", None, [], ["train.loss=sft", "train_sft.py", "not train_dpo.py"]),
    "sft with train_grpo": ("sft", "grpo", None, [], ["train.loss=sft", "train_sft.py", "not train_grpo.py"]),
    "no steps": ("sft", "sft", None, ["train.steps=0"], ["train.steps=0", "eval.py"]),
    "no steps of dpo": ("dpo", "dpo", None, ["train.steps=0"], ["train.steps=0", "eval.py"]),
    "no steps of grpo": ("grpo", "grpo", None, ["train.steps=0"], ["train.steps=0", "eval.py"]),
    "a key without effect": ("sft", "sft", None, ["train.kl_coef=0.1"], ["train.kl_coef has no effect with train.loss=sft"]),
    "no turns": ("sft", "sft", remove("turns/train.jsonl"), [], ["train.jsonl", "hindsight.py"]),
    "no turns for dpo": ("dpo", "dpo", remove("turns/train.jsonl"), [], ["train.jsonl", "hindsight.py"]),
    "no held-out turns": ("sft", "sft", remove("turns/eval.jsonl"), ["train.eval_every=1"], ["eval.jsonl", "hindsight.py"]),
    "too few": ("sft", "sft", None, ["train.steps=null", "train.epochs=1", "train.prompts_per_step=11"],
                ["10 examples x 1 epochs", "train.prompts_per_step=11"]),
    "no expert": ("sft", "sft", rewrite("turns/train.jsonl", named("2_1", expert=None)), [], ["turn 2_1", "'expert'"]),
    "long answers": ("sft", "sft", None, ["rollout.max_new_tokens=9"], ["3 of 10 examples", "rollout.max_new_tokens=9",
                                                                         "data.long_prompts=drop"]),
    "all answers long": ("sft", "sft", None, ["rollout.max_new_tokens=2", "data.long_prompts=drop"], ["10 of 10 examples"]),
    "no end token": ("sft", "sft", lame_tokenizer, [], ["lame", "eos_token", "tokenizer_config.json"]),
    "no pairs.jsonl": ("dpo", "dpo", remove("pairs.jsonl"), [], ["pairs.jsonl does not exist", "pairs.py"]),
    "empty pairs.jsonl": ("dpo", "dpo", lambda p: (p.parent / "run" / "pairs.jsonl").write_text("\n"), [],
                          ["pairs.jsonl holds no pairs"]),
    "bad JSON": ("dpo", "dpo", break_line("pairs.jsonl", 3, '{"turn_id": '), [], ["pairs.jsonl:3:", "JSON"]),
    "no context": ("dpo", "dpo", break_line("pairs.jsonl", 2, '{"turn_id": "1_1"}'), [], ["pairs.jsonl:2:", "'messages'"]),
    "no rejected": ("dpo", "dpo", rewrite("pairs.jsonl", named("4_1", rejected=" ")), [], ["pairs.jsonl:5:", "'rejected'"]),
    "chosen no text": ("dpo", "dpo", rewrite("pairs.jsonl", named("4_1", chosen=7)), [], ["pairs.jsonl:5:", "'chosen'"]),
    "no turn_id": ("dpo", "dpo", rewrite("pairs.jsonl", lambda r: r.pop("turn_id")), [], ["pairs.jsonl:1:", "'turn_id'"]),
    "another turn": ("dpo", "dpo", rewrite("pairs.jsonl", named("4_1", turn_id="44_1")), [],
                     ["pairs.jsonl:5:", "'44_1'", "pairs.py"]),
    "other turns": ("dpo", "dpo", rewrite("turns/train.jsonl", lambda r: r["context"][0].update(content="rash, cough")), [],
                    ["pairs.jsonl:1:", "'0_1'", "pairs.py"]),
    "long pairs": ("dpo", "dpo", None, ["rollout.max_new_tokens=9"], ["of 10 examples", "rollout.max_new_tokens=9"]),
    "long prompts": ("dpo", "dpo", None, ["rollout.max_prompt_tokens=40"], ["of 10 prompts", "rollout.max_prompt_tokens=40"]),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    loss, script, spoil, overrides, say = BAD[name]
    path = make_baseline(tmp_path, tiny_checkpoint, loss)
    if spoil:
        spoil(path)
    line = refused(monkeypatch, capsys, SCRIPTS[script], path, *overrides)
    assert all(text in line for text in say), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_evaluations_and_the_groups_to_show(loss, monkeypatch, tmp_path, tiny_checkpoint):
    """The last step is evaluated whatever eval_every; the groups are the same turns and noise before and after, and neither
    evaluation's noise nor training's."""
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=3, train__eval_every=2, eval__samples=2)
    asked, sample = [], rollout.sample_graded
    monkeypatch.setattr(rollout, "sample_graded", lambda model, tokenizer, turns, prompts, keys, *rest, **how: asked.append(
        (how["samples"], keys)) or sample(model, tokenizer, turns, prompts, keys, *rest, **how))
    lines = run_main(monkeypatch, path, loss)
    assert [m["step"] for m in lines if "eval" in m] == [0, 2, 3]
    groups = [keys for samples, keys in asked if samples == 4]
    assert groups == [[(3, 0), (3, 1), (3, 2)]] * 2
    assert len(asked) == 5 and not {key for samples, keys in asked if samples == 2 for key in keys if key[0] in (0, 3)}


def test_the_groups_to_show_are_graded_as_in_evaluation(monkeypatch, tmp_path, tiny_checkpoint):
    """Whatever reward the run trains on: runs are compared by them."""
    path = make_baseline(tmp_path, tiny_checkpoint, "grpo", reward__mode="sum", train__steps=2, train__eval_every=2)
    rewards, sample = [], rollout.sample_graded
    monkeypatch.setattr(rollout, "sample_graded", lambda model, tokenizer, turns, prompts, keys, cfg, *rest, **how: rewards.append(
        (keys[0][0], cfg.reward)) or sample(model, tokenizer, turns, prompts, keys, cfg, *rest, **how))
    run_main(monkeypatch, path, "grpo")
    assert {r.mode for key, r in rewards if key == 0} == {"sum"} and [r for key, r in rewards if key == 3] == [config.Reward()] * 2


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_long_answers_can_be_dropped(loss, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, loss, rollout__max_new_tokens=9, data__long_prompts="drop", train__steps=1)
    rows = [json.loads(x) for x in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()] if loss == "dpo" else [
        dict(chosen=data.expert_answer(t), rejected="") for t in baseline_turns()]
    left = sum(max(len(r["chosen"]), len(r["rejected"])) + 1 <= 9 for r in rows)
    assert left == 7 if loss == "sft" else 0 < left < 7
    assert run_main(monkeypatch, path, loss)[-1]["epoch"] == pytest.approx(4 / left)
    assert f"left out {10 - left} of 10 examples" in capsys.readouterr().out


@pytest.mark.parametrize("loss, name", [("sft", "run/turns/train.jsonl"), ("dpo", "run/pairs.jsonl"), ("sft", "prompt.md"),
                                        ("dpo", "prompt.md")])
def test_a_resume_on_other_examples_is_refused(loss, name, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=2)
    run_main(monkeypatch, path, loss)
    file = tmp_path / name
    good = file.read_text()
    file.write_text("".join(good.splitlines(True)[::-1]) + "\n")
    line = refused(monkeypatch, capsys, SCRIPTS[loss], path, "train.steps=4")
    assert name in line and "has changed" in line and "step_000002" in line
    file.write_text(good)
    assert len(run_main(monkeypatch, path, loss, "train.steps=4")) == 4
