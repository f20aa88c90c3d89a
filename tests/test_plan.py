"""The memory plan: against measured peaks (every tensor counted), what it prints, what it refuses, what it advises."""
import gc
import importlib
import os

import pytest
import torch

import checkpoint
import config
import data
import model as decoder
import pack
import parallel
import plan
import rollout
import train_grpo
import training
from bench.common import peak_bytes
from data import InputError
from test_config import REPO
from test_train import make_world, refused, train

CPU = torch.device("cpu")
P, R, G = 90, 20, 4  # prompt, answer, samples
SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
CASES = {
    "as it is": (SHAPE, {}),
    "checkpointed": (SHAPE | dict(num_hidden_layers=8), {"train.activation_checkpointing": True}),
    "two layers": (SHAPE | dict(num_hidden_layers=2), {}),
    "wide vocabulary": (SHAPE | dict(vocab_size=6000, num_hidden_layers=2), {}),
    "wide vocabulary in chunks": (SHAPE | dict(vocab_size=6000, num_hidden_layers=2, tie_word_embeddings=False), {"LOGITS": 2 ** 18}),
    "qwen3, heads wider than the model": (SHAPE | dict(kind="qwen3", head_dim=32, num_key_value_heads=4), {}),
    "a reference": (SHAPE, {"train.kl_coef": 0.1}),
    "a reference, wide vocabulary": (SHAPE | dict(vocab_size=6000, num_hidden_layers=2), {"train.kl_coef": 0.1}),
    "bfloat16": (SHAPE, {"model.dtype": "bfloat16"}),
    "float64": (SHAPE, {"model.dtype": "float64"}),
    "answers of one token": (SHAPE, {"rollout.max_new_tokens": 1, "train.tokens_per_microbatch": 2 * P}),
    "one prompt of which one answer fills the budget": (SHAPE, {"train.tokens_per_microbatch": P + R}),
}


def measured(folder, cfg, world, rank=0):
    """Peak bytes of a training step (two micro-batches, so that gradients are there while the second is computed) and of a rollout,
    with weights and moments."""
    dtype, t, r = parallel.compute_dtype(cfg.model.dtype, CPU), cfg.train, cfg.rollout
    model = parallel.load_sharded(folder, CPU, dtype)
    reference = parallel.load_sharded(folder, CPU, dtype, trainable=False) if t.kl_coef else None
    training.set_layers(model, t.activation_checkpointing, False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.fresh_moments(model, optimizer)
    kept = sum(checkpoint.local(p).nbytes for m in (model, reference) if m for p in m.parameters())
    kept += sum(x.nbytes for state in optimizer.state.values() for x in map(checkpoint.local, state.values()))
    prompts = [[7 + i] * r.max_prompt_tokens for i in range(t.prompts_per_step)]
    with decoder.gathered(model):
        answers = rollout.generate(model, prompts, samples=r.samples, max_new_tokens=r.max_new_tokens, temperature=1.0, ends=set(), seed=0)
    groups = [train_grpo.Group(p, a, [0.0, 1.0, 2.0, 3.0]) for p, a in zip(prompts, answers)]
    batch = train_grpo.prepare(groups, cfg, rank, world, CPU, torch.promote_types(dtype, torch.float32))
    assert len(batch.packed) > 1
    run = type("Run", (), dict(model=model, cfg=cfg, optimizer=optimizer, device=CPU))
    gc.collect()
    step = peak_bytes(lambda: train_grpo.train_step(run, reference, batch, True), CPU)
    optimizer.zero_grad(set_to_none=True)

    def sample():
        with decoder.gathered(model):
            rollout.generate(model, prompts, samples=r.samples, max_new_tokens=r.max_new_tokens, temperature=1.0, ends=set(), seed=0)

    gc.collect()
    return kept + step, kept + peak_bytes(sample, CPU)


def case(name, make_checkpoint, monkeypatch):
    shape, overrides = CASES[name]
    folder = make_checkpoint(shape.get("kind", "qwen2"), **{k: v for k, v in shape.items() if k != "kind"})
    monkeypatch.setattr(pack, "LOGITS", overrides.get("LOGITS", pack.LOGITS))
    flat = {"run_dir": "x", "model.path": str(folder), "rollout.max_prompt_tokens": P, "rollout.max_new_tokens": R, "rollout.samples": G,
            "rollout.max_rows": 4 * G, "train.prompts_per_step": 4, "train.tokens_per_microbatch": 2 * (P + G * (R - 1))}
    return folder, config.build(flat | {k: v for k, v in overrides.items() if k != "LOGITS"})


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_measured(one_rank, make_checkpoint, monkeypatch, name):
    folder, cfg = case(name, make_checkpoint, monkeypatch)
    phases = plan.memory(cfg, decoder.read_shape(folder), 1, "cpu", parallel.compute_dtype(cfg.model.dtype, CPU))
    for (phase, parts), peak in zip(phases.items(), measured(folder, cfg, 1)):
        assert 0.95 * peak <= sum(parts.values()) <= 1.1 * peak, f"{phase}: {sum(parts.values()) / peak:.3f} of the measured {peak}: {parts}"


def test_what_a_micro_batch_may_hold():
    """Full-length trees set the pace where they exceed the budget; where they leave some of it, shorter ones may fill it."""
    def tokens(loss, budget, prompts=8, G=4):
        cfg = config.build({"run_dir": "x", "train.loss": loss, "rollout.max_prompt_tokens": P, "rollout.max_new_tokens": R, "rollout.samples": G,
                            "train.prompts_per_step": prompts, "train.tokens_per_microbatch": budget})
        prompts, answers = plan.micro_batch(cfg, 2)
        return round(prompts * P + answers * (R - 1))

    tree = P + 4 * (R - 1)
    assert tokens("grpo", 2 * tree) == 2 * tree and tokens("grpo", 2 * tree + 70) == 2 * tree + 70
    assert tokens("grpo", 10_000) == 4 * tree  # all that a rank has
    assert tokens("grpo", 50) == P + R - 1 and tokens("sft", 50) == P + R - 1  # one answer, over the budget
    assert tokens("dpo", 50) == P + 2 * (R - 1) and tokens("sft", 1000) == 4 * (P + R - 1)


def test_baselines_that_never_sample_need_no_room_for_it(make_checkpoint):
    shape = decoder.read_shape(make_checkpoint("qwen2"))
    for loss in ("sft", "dpo", "grpo"):
        for every in (None, 5):
            cfg = config.build({"run_dir": "x", "train.loss": loss, "train.eval_every": every})
            assert ("sampling" in plan.memory(cfg, shape, 1, "cpu", torch.float32)) == (loss == "grpo" or every is not None)


@pytest.mark.parametrize("script", ["eval", "hindsight", "pairs"])
def test_stages_without_a_plan_say_so(monkeypatch, tmp_path, tiny_checkpoint, script):
    monkeypatch.setattr("sys.argv", [f"{script}.py", str(make_world(tmp_path, tiny_checkpoint)), "plan=true"])
    with pytest.raises(InputError, match="train_grpo.py"):
        importlib.import_module(script).main()


def two_ranks(folder, flat):
    rank, world, _ = parallel.start()
    return measured(folder, config.build(flat), world, rank)


def test_two_ranks_share(run_ranks, make_checkpoint, monkeypatch):
    folder, cfg = case("as it is", make_checkpoint, monkeypatch)
    flat = {name: value for name, value in config.flatten(cfg).items() if value != config.flatten(config.Config())[name]}
    # Each rank samples all prompts here and trains on half. Long ones: what gloo's threads hold for a moment is then of no account.
    flat |= {"train.prompts_per_step": 8, "rollout.max_prompt_tokens": 8 * P, "train.tokens_per_microbatch": 2 * (8 * P + G * (R - 1))}
    phases = plan.memory(config.build(flat | {"rollout.max_rows": 8 * G}), decoder.read_shape(folder), 2, "cpu", torch.float32)
    peaks = run_ranks(two_ranks, 2, folder, flat)
    for i, parts in enumerate(phases.values()):
        peak = max(p[i] for p in peaks)
        assert 0.9 * peak <= sum(parts.values()) <= 1.1 * peak, f"{sum(parts.values()) / peak:.3f} {parts}"
    assert phases["training"]["master weights"] < 0.6 * plan.memory(cfg, decoder.read_shape(folder), 1, "cpu", torch.float32)["training"]["master weights"]


# 7.6 and 32.8 billion parameters
QWEN = {"7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
        "32b": dict(hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, intermediate_size=27648)}


def qwen(tmp_path, size):
    """A folder with a config.json alone: a plan needs no weights."""
    folder = tmp_path / size
    folder.mkdir()
    data.write_json(folder / "config.json", {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False, **QWEN[size]})
    return folder


def test_parameters_of_the_papers_models(tmp_path):
    whole, layer, root, shard = plan.parameters(decoder.read_shape(qwen(tmp_path, "7b")), 8)
    assert whole == 7_615_616_512 == 28 * layer + root  # as its model card has it
    assert whole / 8 <= shard < whole / 8 * 1.001


def show(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *map(str, argv)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        train_grpo.main()
    return end.value.code


def test_the_plan_as_printed(monkeypatch, capsys, tmp_path):
    """plan=true gpus=8: bytes per GPU in bfloat16, where no GPU is; nothing is written."""
    folder, where = qwen(tmp_path, "7b"), f"run_dir={tmp_path / 'run'}"
    preset = REPO / "configs" / "table1" / "7b" / "grpo.yaml"
    assert show(monkeypatch, preset, f"model.path={folder}", where, "plan=true", "gpus=8") == 0
    out = capsys.readouterr().out
    lines = {line[:32].strip(): [x for x in line[32:].split() if x != '-'] for line in out.splitlines()}
    assert "7.62 billion parameters, bfloat16, 8 x GPU" in out and "fits: 90% of 80.0 GiB" in out
    gib = 7_615_616_512 / 2 ** 30
    assert float(lines["master weights"][0]) == pytest.approx(gib * 4 / 8, abs=0.01) == float(lines["gradients"][0])
    assert float(lines["AdamW moments"][1]) == pytest.approx(gib * 8 / 8, abs=0.01)
    assert float(lines["weights, whole"][0]) == pytest.approx(gib * 2, abs=0.01)
    cache = 2 * 2 * 28 * 4 * 128 * (64 * 2048 + 320 * 1024) / 2 ** 30  # keys and values, bfloat16, 64 prompts and 320 answers
    assert float(lines["KV cache"][0]) == pytest.approx(cache, abs=0.01)
    for column in (0, 1):
        parts = [v for k, v in lines.items() if k in plan.memory(config.load([str(preset)]), decoder.read_shape(folder), 8, "cuda",
                                                                 torch.bfloat16)[("training", "sampling")[column]]]
        assert float(lines["total"][column]) == pytest.approx(sum(float(v[min(column, len(v) - 1)]) for v in parts), abs=0.05)
    assert show(monkeypatch, preset, f"model.path={folder}", where, "plan=true", "gpus=2") == 1  # does not fit
    out = capsys.readouterr().out
    assert "2 x GPU" in out and "does not fit" in out
    assert show(monkeypatch, preset, f"model.path={folder}", where, "plan=true", "gpus=2", "gpu_gib=180") == 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="gpus"):
        config.build({"run_dir": "x", "gpus": 8})
    with pytest.raises(InputError, match="gpu_gib"):
        config.build({"run_dir": "x", "plan": True, "gpu_gib": 40.0})


@pytest.mark.parametrize("size, gpus, gib, what", [("7b", 1, 80.0, "sampling"), ("32b", 32, 80.0, "sampling"), ("7b", 8, 40.0, "training")])
def test_the_advice_fits(tmp_path, size, gpus, gib, what):
    """What is said to fit does: taken as written, back through the config."""
    cfg = config.load([str(REPO / "configs" / "table1" / size / "grpo.yaml"), "plan=true", f"gpus={gpus}", f"gpu_gib={gib}"], may_plan=True)
    shape, device = decoder.read_shape(qwen(tmp_path, size)), torch.device("cuda")
    with pytest.raises(InputError) as error:
        plan.check(cfg, shape, gpus, device, torch.bfloat16, plan.capacity(cfg, device))
    text = str(error.value)
    assert f"{0.9 * gib:.1f} are to be had" in text
    changes = dict(pair.split("=") for pair in text.rpartition("GiB: ")[2].split())
    world = int(changes.pop("devices", gpus))
    again = config.load([str(REPO / "configs" / "table1" / size / "grpo.yaml"), "plan=true", f"gpus={world}", f"gpu_gib={gib}",
                         *(f"{k}={v}" for k, v in changes.items())], may_plan=True)
    plan.check(again, shape, world, device, torch.bfloat16, gib * plan.GIB)
    assert changes or world > gpus


def test_training_that_does_not_fit_never_starts(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    """The same check at the start, against the machine's own memory."""
    path = make_world(tmp_path, tiny_checkpoint, train__steps=2)
    pages = os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else 16)  # a machine of some MiB
    line = refused(monkeypatch, capsys, path, "rollout.max_rows=2000", "rollout.max_new_tokens=2000")
    assert "needs" in line and "rollout.max_rows=" in line and not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    assert len(train(monkeypatch, path)) == 2


def test_a_model_that_no_number_of_devices_holds(tmp_path):
    cfg = config.load([str(REPO / "configs" / "table1" / "32b" / "grpo.yaml"), "plan=true", "gpus=64", "gpu_gib=40"], may_plan=True)
    with pytest.raises(InputError, match="it cannot fit"):
        plan.check(cfg, decoder.read_shape(qwen(tmp_path, "32b")), 64, torch.device("cuda"), torch.bfloat16, 40 * plan.GIB)


def test_options_that_only_memory_and_time_know_of(monkeypatch, tmp_path, make_checkpoint):
    """activation_checkpointing and compile reach the layers, and the run stays the same up to rounding."""
    folder, results, compiled = make_checkpoint("qwen2"), [], []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or compile(f, backend="eager", **how))
    for name, overrides in (("plain", []), ("checkpointed", ["train.activation_checkpointing=true"]), ("compiled", ["train.compile=true"])):
        recomputed = []
        monkeypatch.setattr(decoder, "checkpoint", lambda f, *args, **kw: recomputed.append(1) or torch.utils.checkpoint.checkpoint(f, *args, **kw))
        (tmp_path / name).mkdir()
        results.append(train(monkeypatch, make_world(tmp_path / name, folder, train__steps=2), *overrides))
        assert bool(recomputed) == (name == "checkpointed") and bool(compiled) == (name == "compiled")
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-7) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_gradients_are_gone_while_sampling(monkeypatch, tmp_path, tiny_checkpoint):
    """As the plan has it; and the optimizer is the fused one."""
    seen, sample, load = [], rollout.sample_graded, training.load
    monkeypatch.setattr(rollout, "sample_graded", lambda model, *a, **k: seen.append([p.grad for p in model.parameters()]) or sample(model, *a, **k))
    monkeypatch.setattr(training, "load", lambda run, *a: (load(run, *a), seen.append(run.optimizer.defaults["fused"])))
    train(monkeypatch, make_world(tmp_path, tiny_checkpoint, train__steps=4))
    assert seen[0] is True and len(seen) >= 3 and all(grad is None for grads in seen[1:] for grad in grads)


def smallest_of_two(config_path):
    rank = int(os.environ["RANK"])
    plan.capacity = lambda cfg, device: 2.0 ** (40 if rank else 10)
    try:
        training.start(config.load([config_path]), "train_grpo.py")
    except InputError as error:
        return str(error)


def test_all_ranks_refuse_where_one_has_too_little(run_ranks, tmp_path, tiny_checkpoint):
    first, second = run_ranks(smallest_of_two, 2, str(make_world(tmp_path, tiny_checkpoint)))
    assert first == second and "0.0 are to be had" in first
