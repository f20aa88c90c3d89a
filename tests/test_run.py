"""run.py, what all trainers share: the order of the examples, the learning rate, the files of a run, its
resume, its evaluations, bad steps."""
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config
import eval as evaluation
import grading
import model as decoder
import parallel
import run as running
import train_dpo
import train_grpo
import train_sft
from config import RewardConfig, Stream
from prompts import Prompt
from records import InputError, read_json
from world import (
    equal,
    exported,
    kill_tree,
    let_go,
    make_baseline,
    make_config,
    make_world,
    metrics,
    read_lines,
    timeless,
    torchrun,
)

SCRIPTS = {"grpo": train_grpo, "sft": train_sft, "dpo": train_dpo}


# ---------------------------------------------------------------------------- schedule, order, when it is due

def test_learning_rates():
    def rates(schedule, warmup):
        t = SimpleNamespace(lr=2.0, warmup_steps=warmup, schedule=schedule)
        return [running.lr_at(s, 10, t) for s in range(10)]

    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 4) == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6
    assert rates("linear", 0) == pytest.approx([2 * (1 - s / 10) for s in range(10)])
    assert rates("linear", 2) == pytest.approx([1.0, 2.0] + [2 * (1 - s / 8) for s in range(8)])
    assert rates("cosine", 2) == pytest.approx([1.0, 2.0] + [1 + math.cos(math.pi * s / 8) for s in range(8)])
    assert rates("cosine", 20) == pytest.approx([(s + 1) / 10 for s in range(10)])  # still warming up


def test_the_stream_visits_every_example_once_an_epoch_however_it_is_cut():
    n, whole = 11, running.stream(11, range(44), seed=5)
    epochs = [whole[i:i + n] for i in range(0, 44, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    for size in (1, 3, 4, 11, 25):
        parts = [running.stream(n, range(a, min(a + size, 44)), seed=5) for a in range(0, 44, size)]
        assert sum(parts, []) == whole
    assert running.stream(n, range(44), seed=6) != whole and running.stream(1, range(3), seed=0) == [0, 0, 0]


def test_due():
    due = running.due
    assert not due(None, 0, 100, 100)
    assert [s for s in range(1, 13) if due(4, s - 1, s, 12)] == [4, 8, 12]
    assert [s for s in range(5, 31, 5) if due(7, s - 5, s, 100)] == [10, 15, 25, 30]  # at the next boundary
    assert due(50, 8, 10, 10)  # always at the end


@pytest.mark.parametrize("rank", ["0", "1"])
def test_responses_that_are_too_long(tiny_tokenizer, monkeypatch, capsys, rank):
    """The end token counts. What is left out takes its tree along, and the others keep their numbers."""
    cfg = make_config(rollout__max_new_tokens=4)
    run = SimpleNamespace(cfg=cfg, policy=SimpleNamespace(tokenizer=tiny_tokenizer))
    monkeypatch.setenv("RANK", rank)
    texts = [["abc", "d"], ["e", "abcd"], ["abcd", "e"], ["f", "abc"]]
    prompts = [Prompt(SimpleNamespace(turn_id=name), [i]) for i, name in enumerate("abcd", 1)]
    with pytest.raises(InputError, match=r"2 of 4 turns .*rollout.max_new_tokens=4 \(turn c: 5 tokens\); "
                                         "raise it to 5, .*=drop"):
        running.encode_trees(run, prompts, texts)
    cfg.data.long_prompts = "drop"
    trees = running.encode_trees(run, prompts, texts)
    assert ("left out: 2 of 4 turns" in capsys.readouterr().out) == (rank == "0")
    found = [(t.prompt, b.name, tiny_tokenizer.decode(b.tokens)) for t in trees for b in t.branches]
    assert found == [([1], 0, "abc<|im_end|>"), ([1], 0, "d<|im_end|>"),
                     ([4], 3, "f<|im_end|>"), ([4], 3, "abc<|im_end|>")]
    with pytest.raises(InputError, match="2 of 2 turns"):
        running.encode_trees(run, prompts[1:3], texts[1:3])


def test_what_turns_and_prompts_are_trained_on(tmp_path, tiny_checkpoint, tiny_tokenizer):
    """reward.mode no_rs: continue turns only, with a prompt that never mentions stopping. Evaluation has the
    other."""
    path = make_world(tmp_path, tiny_checkpoint, train__eval_every=2)
    (tmp_path / "no_stop.md").write_text("Never stop. {goal}")
    shutil.copy(tmp_path / "run" / "turns" / "train.jsonl", tmp_path / "run" / "turns" / "valid.jsonl")

    def read(*overrides):
        """-> of training and of evaluation: (turns, decisions, how many are told never to stop)."""
        cfg = config.load([str(path), f"data.prompt_no_stop={tmp_path / 'no_stop.md'}", *overrides])
        for prompts_of in running.training_prompts, running.held_out_prompts:
            prompts = prompts_of(cfg, tiny_tokenizer)
            told = sum("Never stop" in tiny_tokenizer.decode(p.tokens) for p in prompts)
            yield len(prompts), {p.turn.decision for p in prompts}, told

    both = {"continue", "stop"}
    assert list(read()) == [(20, both, 0), (3, both, 0)]
    assert list(read("reward.mode=no_rs")) == [(13, {"continue"}, 13), (3, both, 0)]
    assert list(read("data.valid_sessions=5"))[1] == (20, both, 0)  # in place of the held-out turns
    assert running.held_out_prompts(config.load([str(path), "train.eval_every=null"]), tiny_tokenizer) is None


# --------------------------------------------------------------------------------------- a run and its resume

KEYS = {"step", "epoch", "lr", "loss", "trained_tokens", "grad_norm", "finite", "train_s"}
OWN_KEYS = {"sft": "entropy", "dpo": "chosen_reward rejected_reward margin accuracy chosen_logp",
            "grpo": "reward wa wa_gh wc ws aa fc tr wa_all n failed top_share distinct length cut_off ratio "
                    "clip_share entropy gap_mean gap_max skipped_groups trained_share logp rollout_s grade_s"}


@pytest.fixture
def order(monkeypatch):
    """-> list that grows by the number of each example that a run trains on."""
    seen, next_examples = [], running.Run.next_examples

    def watched(*args):
        found = next_examples(*args)
        seen.extend(found)
        return found

    monkeypatch.setattr(running.Run, "next_examples", watched)
    return seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adamw_moves_one_parameters_moments_at_a_time(device, monkeypatch):
    """Its updates are those of torch's optimizer. Moments leave home for their own update only."""
    twins = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(device) for _ in "ab"]
    twins[1].load_state_dict(twins[0].state_dict())
    plain, ours = (torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1, fused=True) for m in twins)
    checkpoint.fresh_moments(twins[1], ours)
    states, moved, move = list(ours.state.values()), [], running.move
    for state in states:
        move(state, "cpu")
    monkeypatch.setattr(running, "move", lambda *to: (moved.append(to), move(*to)))
    for x in torch.randn(3, 5, 4, device=device):
        for model in twins:
            model.zero_grad()
            model(x).square().sum().backward()
        plain.step()
        running.adamw_step(ours)
    assert all(map(torch.equal, twins[0].parameters(), twins[1].parameters()))
    away, home = torch.device(device, 0 if device == "cuda" else None), torch.device("cpu")
    assert [to for _, to in moved] == [away, home] * len(states) * 3
    assert [state for state, _ in moved[::2]] == [state for state, _ in moved[1::2]] == states * 3
    assert all(state[name].device == home for state in states for name in checkpoint.MOMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(SCRIPTS))
def test_a_run_its_files_and_its_resume(loss, train, order, monkeypatch, tmp_path, marks_checkpoint):
    """4 steps, then 8 by train.steps=8, are 8 steps to the bit. A finished run that is started again changes
    nothing."""
    script, how = SCRIPTS[loss], dict(train__eval_every=4, train__lr=1e-2, train__tokens_per_microbatch=60)
    short = make_baseline(tmp_path / "a", marks_checkpoint, loss, **how, train__moments_on_host=True)
    straight = make_baseline(tmp_path / "b", marks_checkpoint, loss, **how)
    train(script, short)
    with open(short.parent / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "half a line')
    for name in (".step_000006.tmp", "step_000007"):  # a checkpoint that was being written
        (short.parent / "run" / "checkpoints" / name).mkdir()
    resumed = train(script, short, "train.steps=8")
    resumed_order, order[:] = order[:], []
    lines = train(script, straight, "train.steps=8")
    assert order == resumed_order and equal(exported(short), exported(straight))
    assert len(order) == 32 and sorted(order[:20]) == sorted([*range(10)] * 2)  # an epoch of ten is 2.5 steps
    assert timeless(resumed) == timeless(lines)

    run = straight.parent / "run"
    assert [m["step"] for m in lines] == list(range(9))
    assert [m["step"] for m in lines if "eval" in m] == [0, 4, 8] and set(lines[0]) == {"step", "eval"}
    assert all(set(m) - {"eval", "eval_s"} == KEYS | set(OWN_KEYS[loss].split()) for m in lines[1:])
    assert [m["epoch"] for m in lines[1:]] == pytest.approx([0.4 * s for s in range(1, 9)])
    assert lines[-1]["lr"] == 1e-2 and (loss == "grpo" or lines[-1]["loss"] < lines[1]["loss"])  # it learns
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000006", "step_000008"]
    shown = [read_lines(run / f"groups_{when}.jsonl") for when in ("before", "after")]
    for rows in shown:
        assert [r["turn"]["turn_id"] for r in rows] == ["0_0", "1_0", "2_0"]
        assert [len(r["graded"]) for r in rows] == [4] * 3 and "reward" in rows[0]["graded"][0]
    assert shown[0] != shown[1] and (run / "report.html").is_file()
    assert config.load([str(run / "config.yaml")]).train.steps == 8
    from transformers import AutoModelForCausalLM, AutoTokenizer
    embedding = AutoModelForCausalLM.from_pretrained(run / "export").get_input_embeddings().weight
    name = "model.embed_tokens.weight"
    assert torch.equal(embedding, exported(straight)[name])
    assert not torch.equal(embedding, load_file(marks_checkpoint / "model.safetensors")[name])
    assert AutoTokenizer.from_pretrained(run / "export").chat_template

    monkeypatch.setattr(script, "train_step", lambda *_: pytest.fail("a finished run trains again"))
    files = [file for file in run.iterdir() if file.suffix in (".jsonl", ".yaml")]
    files.append(run / "export" / "model.safetensors")
    before = [file.read_bytes() for file in files]
    train(script, straight, "train.steps=8")
    assert before == [file.read_bytes() for file in files]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_without_evaluations_and_steps(loss, train, order, tmp_path, tiny_checkpoint):
    """Epochs decide how long and the seed in which order, the learning rate rises and falls, the last step
    leaves a checkpoint, and no held-out turns are read."""
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=None, train__epochs=2, seed=3,
                         train__schedule="linear", train__warmup_steps=2, train__checkpoint_every=50)
    (tmp_path / "run" / "turns" / "eval.jsonl").unlink()
    lines = train(SCRIPTS[loss], path)
    assert [m["lr"] for m in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [m["epoch"] for m in lines] == [0.4, 0.8, 1.2, 1.6, 2.0] and not any("eval" in m for m in lines)
    assert order == running.stream(10, range(20), 3) != running.stream(10, range(20), 0)
    if loss == "dpo":  # two whole epochs of bytes, each response with its end token
        pairs = read_lines(tmp_path / "run" / "pairs.jsonl")
        tokens = sum(len(pair["chosen"]) + len(pair["rejected"]) + 2 for pair in pairs)
        assert sum(m["trained_tokens"] for m in lines) == 2 * tokens
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000005"]
    assert not list((tmp_path / "run").glob("groups_*"))


@pytest.mark.parametrize("loss, limit, left", [
    ("grpo", "max_prompt_tokens=44", 6), ("sft", "max_new_tokens=9", 7), ("dpo", "max_new_tokens=9", 4)])
def test_what_is_too_long_can_be_dropped(loss, limit, left, train, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=2)
    lines = train(SCRIPTS[loss], path, f"rollout.{limit}", "data.long_prompts=drop")
    assert lines[-1]["epoch"] == pytest.approx(8 / left)


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(SCRIPTS))
def test_evaluations_and_the_groups_to_show(loss, train, monkeypatch, tmp_path, tiny_checkpoint):
    """The last step is evaluated whatever eval_every. The groups are the same turns and noise before and
    after, and neither evaluation's noise nor training's. Both have the full reward whatever is trained on."""
    how = dict(train__steps=3, train__eval_every=2, eval__samples=2)
    how |= {"reward__mode": "sum"} if loss == "grpo" else {}
    path = make_baseline(tmp_path, tiny_checkpoint, loss, **how)
    asked, sample_graded = [], grading.sample_graded

    def watched(policy, judge, prompts, keys, sampling, *rest, **how):
        asked.append((keys, sampling.samples, judge.reward))
        return sample_graded(policy, judge, prompts, keys, sampling, *rest, **how)

    monkeypatch.setattr(grading, "sample_graded", watched)
    lines = train(SCRIPTS[loss], path)
    assert [m["step"] for m in lines if "eval" in m] == [0, 2, 3]
    look = [(Stream.EVALUATION, i) for i in range(3)], 2, RewardConfig()
    show = [(Stream.GROUPS, i) for i in range(3)], 4, RewardConfig()
    assert [a for a in asked if a[0][0][0] != Stream.ROLLOUT] == [look, show, look, look, show]
    trained = [reward.mode for keys, _, reward in asked if keys[0][0] == Stream.ROLLOUT]
    assert trained == (["sum"] * 2 if loss == "grpo" else [])


@pytest.mark.slow
@pytest.mark.parametrize("loss, name", [("sft", "run/turns/train.jsonl"), ("dpo", "run/pairs.jsonl"),
                                        ("sft", "prompt.md"), ("dpo", "prompt.md"), ("grpo", "lexicon.yaml")])
def test_a_resume_on_other_examples_is_refused(loss, name, train, refused, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, loss, train__steps=2)
    train(SCRIPTS[loss], path)
    file = tmp_path / name
    good = file.read_text()
    file.write_text(good + "\n")
    line = refused(SCRIPTS[loss], path, "train.steps=4")
    assert name in line and "has changed" in line and "step_000002" in line
    file.write_text(good)
    assert len(train(SCRIPTS[loss], path, "train.steps=4")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("loss, reads", [("dpo", ""), ("grpo", "train.kl_coef=0.1"), ("grpo", "")])
def test_a_resume_with_another_base_is_refused_where_it_is_the_reference(
        loss, reads, train, refused, tmp_path, tiny_checkpoint, marks_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = make_baseline(tmp_path, tmp_path / "base", loss, train__steps=2)
    how = reads.split()
    train(SCRIPTS[loss], path, *how)
    shutil.copy(marks_checkpoint / "model.safetensors", tmp_path / "base")
    if loss == "dpo" or reads:
        line = refused(SCRIPTS[loss], path, "train.steps=4", *how)
        assert "base/model.safetensors" in line and "has changed" in line and "step_000002" in line
        shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path / "base")
    assert [m["step"] for m in train(SCRIPTS[loss], path, "train.steps=4", *how)] == [1, 2, 3, 4]


def test_a_page_that_cannot_be_made_costs_nothing_else(train, call, capsys, tmp_path, tiny_checkpoint):
    """Export and figures stand, and the exit code says so; one line tells why there is no page."""
    path, run = make_baseline(tmp_path, tiny_checkpoint, "sft", train__steps=1), tmp_path / "run"
    (run / "eval.json").write_text('{"n": 3, "tr')
    train(train_sft, path)
    assert exported(path) and "report.html was not written (InputError" in capsys.readouterr().out
    (run / "eval.json").unlink()
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    call(evaluation, path)
    assert read_json(run / "eval.json")["n"] and "report.html is a folder" in capsys.readouterr().out


def test_the_log_reaches_the_disk_before_the_checkpoint(train, monkeypatch, tmp_path, tiny_checkpoint):
    """Else a power cut could leave a checkpoint whose steps the log lacks."""
    path = make_baseline(tmp_path, tiny_checkpoint, "sft", train__steps=2, train__checkpoint_every=1)
    sync, save, done = running.sync, checkpoint.save, []
    monkeypatch.setattr(running, "sync", lambda f: done.append((f.name, len(metrics(path)))) or sync(f))
    monkeypatch.setattr(checkpoint, "save", lambda *what: done.append(what[1]) or save(*what))
    train(train_sft, path)
    assert done == [("metrics.jsonl", 1), 1, ("metrics.jsonl", 2), 2]


def test_torn_lines_of_the_log_are_counted_aloud(train, capsys, tmp_path, tiny_checkpoint):
    path = make_baseline(tmp_path, tiny_checkpoint, "sft", train__steps=2)
    lines, log = train(train_sft, path), tmp_path / "run" / "metrics.jsonl"
    assert train(train_sft, path) == lines and "lacks" not in capsys.readouterr().out
    log.write_text(log.read_text().replace('{"step": 1,', '{"st'))
    assert [m["step"] for m in train(train_sft, path, "train.steps=3")] == [2, 3]
    assert f"{log} lacks the figures of some of its 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_folder_by_another_name(train, tmp_path, tiny_checkpoint):
    """It goes on: "=" in its name, a trailing slash, "./", a moved folder."""
    folder, path = tmp_path, make_baseline(tmp_path, tiny_checkpoint, "sft", train__steps=1)
    begun = folder / "lr=1"
    (folder / "run").rename(begun)
    (folder / "run").symlink_to(begun)  # where the fixture reads the metrics
    train(train_sft, path, f"run_dir={begun}")
    other = [f"run_dir={begun}/", f"model.path={tiny_checkpoint}/", f"data.prompt={folder}/.//prompt.md"]
    lines = train(train_sft, path, "train.steps=2", *other)
    assert [m["step"] for m in lines] == [1, 2]
    let_go()
    begun.rename(folder / "moved")
    (folder / "run").unlink()
    (folder / "run").symlink_to("moved")
    lines = train(train_sft, path, "train.steps=3", f"run_dir={folder}/moved")
    assert [m["step"] for m in lines] == [1, 2, 3]
    assert config.saved(folder / "run/").run_dir == str(folder / "moved")
    with pytest.raises(InputError, match="no such folder: ./no/hub"):
        decoder.resolve(make_config(model__path="./no/hub").model.path)


def test_a_run_starts_from_another(train, refused, order, tmp_path, make_checkpoint, marks_checkpoint):
    """train.from: weights and moments are the other run's, the schedule and the data begin anew. A resume
    reads the run's own checkpoint."""
    first, second = (make_baseline(tmp_path / x, marks_checkpoint, "sft", train__lr=1e-2) for x in "ab")
    straight = train(train_sft, first)
    run, begun = first.parent / "run", f"train.from={first.parent / 'run'}"
    weights, seen = exported(first), order[:]
    lines = train(train_sft, second, begun, "train.steps=2", "train.lr=1e-30", "train.weight_decay=0")
    assert equal(weights, exported(second)) and order[len(seen):] == seen[:8]
    assert [m["step"] for m in lines] == [1, 2] and lines[0]["loss"] < straight[0]["loss"]
    saved = [load_file(path.parent / "run" / "checkpoints" / name / "rank_00000.safetensors")
             for path, name in ((first, "step_000004"), (second, "step_000002"))]
    moment = "model.norm.weight:exp_avg"
    assert not equal(*saved) and saved[1][moment].norm() > 0.1 * saved[0][moment].norm()
    assert timeless(train(train_sft, second, begun, "train.steps=2", "train.lr=1e-30",
                          "train.weight_decay=0")) == timeless(lines)
    line = refused(train_sft, second, "train.steps=3", begun, "train.lr=1e-30", "train.weight_decay=0",
                   "reward.mode=product", "model.dtype=float64")
    assert f"choose another run_dir (train.from={second.parent / 'run'} goes on from its weights, if" in line
    other = make_checkpoint(num_hidden_layers=1)
    moved = marks_checkpoint.rename(tmp_path / "moved")
    shutil.copytree(other, marks_checkpoint)  # the base model was made anew
    wider = refused(train_sft, make_baseline(tmp_path / "d", marks_checkpoint, "sft"), begun)
    assert "step_000004 is of a model of another shape than model.path is now" in wider
    shutil.rmtree(marks_checkpoint)
    moved.rename(marks_checkpoint)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace(str(marks_checkpoint), "other"))
    third = make_baseline(tmp_path / "c", marks_checkpoint, "sft")
    for other in (run, tmp_path):
        says = f"train.from={other} holds no checkpoints of a run with model.path={marks_checkpoint}"
        assert says in refused(train_sft, third, f"train.from={other}")


# ------------------------------------------------------------------------------------------------ bad numbers

def poison(monkeypatch, steps):
    """Make the policy loss NaN in these calls (one micro-batch a step, so calls are steps)."""
    calls = []

    def loss(*args):
        calls.extend([0] * args[0].requires_grad)  # it is also called to learn which figures it returns
        value, figures = train_grpo.grpo_loss(*args)
        return (value * math.nan if len(calls) in steps else value), figures

    monkeypatch.setitem(train_grpo.LOSSES, "grpo", loss)


def test_bad_steps_are_counted_and_five_end_the_run(train, refused, monkeypatch, tmp_path, marks_checkpoint):
    path = make_world(tmp_path, marks_checkpoint, train__steps=10, train__lr=1e-2, train__entropy_coef=0.01,
                      train__tokens_per_microbatch=10_000, train__keep_checkpoints=9)
    poison(monkeypatch, [2, 3, 4, 5, 7])  # four in a row are forgiven
    lines = train(train_grpo, path)
    assert [m["step"] for m in lines if not m["finite"]] == [2, 3, 4, 5, 7] and len(lines) == 10
    assert all(m["grad_norm"] is None and m["loss"] is None for m in lines if not m["finite"])
    saved = checkpoint.all_checkpoints(tmp_path / "run")
    assert [path.name for path in saved] == ["step_000006", "step_000008", "step_000010"]
    state = read_json(saved[-1] / "state.json")
    assert state["updates"] == 5
    (tmp_path / "run" / "export").rename(tmp_path / "export")
    poison(monkeypatch, range(2, 9))
    line = refused(train_grpo, path, "train.steps=20")
    assert "5 steps in a row" in line and "step 16" in line
    assert len(metrics(path)) == 16 and not (tmp_path / "run" / "export").exists()
    assert checkpoint.all_checkpoints(tmp_path / "run") == saved  # to go on from


@pytest.mark.parametrize("gaps", [(math.nan, 0.0), (0.0, math.nan)])
def test_a_gap_that_is_not_a_number_on_one_rank_is_none_at_all(monkeypatch, gaps):
    """0.0 would say that sampler and trainer agree. (A NaN is logged as null, see above.)"""
    monkeypatch.setattr(parallel, "all_gather", lambda _: [[0.0, gap, 1.0] for gap in gaps])
    model, zero = torch.nn.Linear(1, 1), torch.zeros(())
    out = running.optimizer_step(model, torch.optim.SGD(model.parameters()), 1.0,
                                 {"loss": zero, "gap_max": zero}, ["gap_max"])
    assert math.isnan(out["gap_max"])


# ----------------------------------------------------------------------------------------- two ranks, kill -9

STEPS = 36


@pytest.mark.slow
def test_kill_and_resume_on_two_ranks(train, monkeypatch, marks_checkpoint, tmp_path):
    """The same steps on two ranks: uninterrupted, and killed -9 on the way and started again. A finished run
    that is started again, here on one rank, trains nothing."""
    how = dict(train__steps=STEPS, train__checkpoint_every=6, train__eval_every=12, train__entropy_coef=0.01,
               train__tokens_per_microbatch=120)
    straight, killed = (make_world(tmp_path / name, marks_checkpoint, **how) for name in ("whole", "killed"))
    first, second = (torchrun("train_grpo.py", path) for path in (straight, killed))
    written = killed.parent / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (written.is_file() and written.read_bytes().count(b"\n") > STEPS // 3 + 1):
        assert second.poll() is None and time.time() < deadline, second.communicate()[0][-3000:]
        time.sleep(0.005)
    assert len(kill_tree(second)) >= 3
    run = killed.parent / "run"
    assert not (run / "export").exists() and len(metrics(killed)) < STEPS, "it was not killed on the way"
    found = checkpoint.all_checkpoints(run)
    assert found and (run / "checkpoints" / found[-1].name / "rank_00001.safetensors").is_file()
    for process in (first, torchrun("train_grpo.py", killed)):
        log = process.communicate(timeout=240)[0]
        assert process.returncode == 0, log[-3000:]
    lines, weights = metrics(straight), exported(straight)
    assert equal(weights, exported(killed)) and timeless(metrics(killed)) == timeless(lines)
    assert [m["step"] for m in lines] == list(range(STEPS + 1))  # each step once
    assert [m["step"] for m in lines if "eval" in m] == [0, 12, 24, 36]
    assert max(m["grad_norm"] for m in lines[1:]) > 0 and 0 < max(m["clip_share"] for m in lines[1:])
    monkeypatch.setattr(train_grpo, "train_step", lambda *_: pytest.fail("a finished run trains again"))
    assert train(train_grpo, straight) == lines and equal(exported(straight), weights)


def test_the_figures_of_all_ranks(monkeypatch):
    """Sums and maxima over ranks; the norm is the last number of any rank."""
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(running.parallel, "all_gather", lambda x: [[1.0, 5.0, 2.0], [2.0, 7.0, 2.0]])
    figures = dict(zip(("loss", "gap_max"), torch.zeros(2)))
    out = running.optimizer_step(model, optimizer, 1.0, figures, maxima=["gap_max"])
    assert out == {"loss": 3.0, "gap_max": 7.0, "grad_norm": 2.0, "finite": True}
