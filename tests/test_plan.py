"""The memory plan: against measured peaks (every tensor counted), what it prints, refuses and advises."""
import gc
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config
import eval as evaluation
import grading
import hindsight
import model as decoder
import pack
import pairs
import parallel
import plan
import records
import rollout
import run as running
import train_grpo
from bench.common import peak_bytes
from prompts import Prompt
from records import InputError
from world import REPO, make_config, make_world, write_lines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
P, R, G = 90, 20, 4  # prompt, response, samples
SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)
TWO_LAYERS = SHAPE | dict(num_hidden_layers=2)
WIDE_HEADS = SHAPE | dict(kind="qwen3", head_dim=32, num_key_value_heads=4)
WIDE = TWO_LAYERS | dict(vocab_size=6000)
CASES = {  # name: (shape of the model, config)
    "as it is": (SHAPE, {}),
    "checkpointed": (SHAPE | dict(num_hidden_layers=8), {"train__activation_checkpointing": True}),
    "two layers": (TWO_LAYERS, {}),
    "wide vocabulary": (WIDE, {}),
    "wide vocabulary in chunks": (WIDE | dict(tie_word_embeddings=False), {}),
    "qwen3, heads wider than the model": (WIDE_HEADS, {}),
    "a reference": (SHAPE, {"train__kl_coef": 0.1}),
    "a reference, wide vocabulary": (WIDE, {"train__kl_coef": 0.1}),
    "bfloat16": (SHAPE, {"model__dtype": "bfloat16"}),
    "float64": (SHAPE, {"model__dtype": "float64"}),
    "responses of one token": (SHAPE, {"rollout__max_new_tokens": 1, "train__tokens_per_microbatch": 2 * P}),
    "a response that fills the budget": (SHAPE, {"train__tokens_per_microbatch": P + R}),
}


def config_of(folder, **more):
    sizes = {"rollout__max_prompt_tokens": P, "rollout__max_new_tokens": R, "rollout__samples": G,
             "rollout__max_rows": 4 * G, "train__prompts_per_step": 4,
             "train__tokens_per_microbatch": 2 * (P + G * (R - 1))}
    return make_config(model__path=str(folder), **sizes | more)


def job_of(cfg, folder, world=1, device=CPU):
    return plan.Job(cfg, decoder.read_shape(folder), world, device)


def measured(folder, cfg, rank=0, world=1):
    """Peak bytes of a training step and of a rollout, with weights and moments. The step has two
    micro-batches, so gradients are there while the second is computed."""
    dtype, r = parallel.compute_dtype(cfg.model.dtype, CPU), cfg.rollout
    model = parallel.load_sharded(folder, CPU, dtype)
    reference = parallel.load_sharded(folder, CPU, dtype, trainable=False) if cfg.train.kl_coef else None
    running.set_layers(model, cfg.train.activation_checkpointing, False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.fresh_moments(model, optimizer)
    tensors = [p for m in (model, reference) if m for p in m.parameters()]
    tensors += [x for state in optimizer.state.values() for x in state.values()]
    kept = sum(checkpoint.local(x).nbytes for x in tensors)
    prompts = [[7 + i] * r.max_prompt_tokens for i in range(cfg.train.prompts_per_step)]

    def sample():
        with decoder.gathered(model):
            return rollout.generate(model, prompts, set(), rollout.Sampling(r.samples, r.max_new_tokens))

    rewards = [SimpleNamespace(reward=float(i)) for i in range(G)]
    groups = [grading.Group(Prompt(None, p), responses, rewards) for p, responses in zip(prompts, sample())]
    run = SimpleNamespace(cfg=cfg, rank=rank, world=world, device=CPU, dtype=dtype)
    step = train_grpo.prepare(groups, run)
    assert len(step.batches) > 1
    gc.collect()
    training = peak_bytes(lambda: train_grpo.train_step(model, optimizer, step, cfg, reference), CPU)
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return kept + training, kept + peak_bytes(sample, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_measured(one_rank, make_checkpoint, monkeypatch, name):
    shape, how = CASES[name]
    folder = make_checkpoint(**shape)
    monkeypatch.setattr(pack, "LOGITS", 2 ** 18 if "chunks" in name else pack.LOGITS)
    cfg = config_of(folder, **how)
    for (phase, parts), peak in zip(plan.memory(job_of(cfg, folder)).items(), measured(folder, cfg)):
        share = sum(parts.values()) / peak
        assert 0.95 <= share <= 1.1, f"{phase}: {share:.3f} of the measured {peak}: {parts}"


def two_ranks(folder, how):
    rank, world, _ = parallel.start()
    return measured(folder, config_of(folder, **how), rank, world)


@pytest.mark.slow
def test_two_ranks_share(run_ranks, make_checkpoint):
    """Each rank samples all prompts here and trains on half. They are long, so that what gloo's threads hold
    for a moment does not count."""
    folder, long = make_checkpoint(**SHAPE), 8 * P
    how = dict(train__prompts_per_step=8, rollout__max_prompt_tokens=long,
               train__tokens_per_microbatch=2 * (long + G * (R - 1)))
    cfg = config_of(folder, **how, rollout__max_rows=8 * G)
    phases = plan.memory(job_of(cfg, folder, 2))
    for parts, peaks in zip(phases.values(), zip(*run_ranks(two_ranks, 2, folder, how))):
        assert 0.9 <= sum(parts.values()) / max(peaks) <= 1.1, parts
    alone = plan.memory(job_of(cfg, folder))
    assert phases["training"]["master weights"] < 0.6 * alone["training"]["master weights"]


def test_what_a_micro_batch_may_hold(make_checkpoint):
    """Full-length trees set the pace where they exceed the budget; shorter ones may fill what they leave."""
    folder = make_checkpoint()

    def tokens(loss, budget):
        cfg = config_of(folder, train__loss=loss, train__prompts_per_step=8,
                        train__tokens_per_microbatch=budget)
        prompts, responses, packed = plan.micro_batch(job_of(cfg, folder, 2))
        assert packed == pytest.approx(prompts * P + responses * (R - 1))
        return round(packed)

    tree = P + 4 * (R - 1)
    assert tokens("grpo", 2 * tree) == 2 * tree and tokens("grpo", 2 * tree + 70) == 2 * tree + 70
    assert tokens("grpo", 10_000) == 4 * tree  # all that a rank has
    assert tokens("grpo", 50) == P + R - 1 == tokens("sft", 50)  # one response, over the budget
    assert tokens("dpo", 50) == P + 2 * (R - 1) and tokens("sft", 1000) == 4 * (P + R - 1)


@pytest.mark.parametrize("loss, every, samples", [
    ("sft", None, False), ("sft", 5, True), ("dpo", None, False), ("grpo", None, True)])
def test_baselines_that_never_sample_need_no_room_for_it(make_checkpoint, loss, every, samples):
    cfg = make_config(train__loss=loss, train__eval_every=every)
    assert ("sampling" in plan.memory(job_of(cfg, make_checkpoint()))) == samples


@pytest.mark.parametrize("script", [evaluation, hindsight, pairs])
def test_stages_without_a_plan_say_so(refused, tmp_path, tiny_checkpoint, script):
    assert "train_grpo.py" in refused(script, make_world(tmp_path, tiny_checkpoint), "plan=true")


# 7.6 and 32.8 billion parameters
QWEN = {"7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                   intermediate_size=18944),
        "32b": dict(hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8,
                    intermediate_size=27648)}


@pytest.fixture
def qwen(tmp_path):
    def write(size):
        """A folder with a config.json alone: a plan needs no weights."""
        shape = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False, **QWEN[size]}
        records.write_json(tmp_path / size / "config.json", shape)
        return tmp_path / size
    return write


def planned(size, *more):
    path = REPO / "configs" / "table1" / size / "grpo.yaml"
    return config.load([str(path), "plan=true", *more], may_plan=True)


def test_parameters_of_the_papers_models(qwen):
    job = job_of(planned("7b"), qwen("7b"), 8, CUDA)
    assert job.whole == 7_615_616_512 == 28 * job.layer + job.root  # as its model card has it
    assert job.whole / 8 <= job.shard < job.whole / 8 * 1.001


def test_the_plan_as_printed(call, monkeypatch, capsys, tmp_path, qwen):
    """plan=true gpus=8: bytes per GPU in bfloat16, where no GPU is; nothing is written."""
    folder = qwen("7b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def show(*more):
        with pytest.raises(SystemExit) as end:
            call(train_grpo, REPO / "configs" / "table1" / "7b" / "grpo.yaml", f"model.path={folder}",
                 f"run_dir={tmp_path / 'run'}", "plan=true", *more)
        return end.value.code, capsys.readouterr().out

    code, out = show("gpus=8")
    assert code == 0 and "fits: 90% of 80.0 GiB" in out
    assert "7.62 billion parameters, bfloat16, 8 x GPU" in out
    rows = {line[:32].strip(): [float(x.replace("-", "0")) for x in line[32:].split()]
            for line in out.splitlines()[2:-3]}
    told = out.splitlines()[-1]
    assert told.startswith("the calls of language models cannot be counted: data.logs: no such file: ")
    gib = 7_615_616_512 / 2 ** 30
    cache = 2 * 2 * 28 * 4 * 128 * (64 * 2048 + 320 * 1024) / 2 ** 30  # keys, values of 64 prompts, 320 rows
    for name, column, expected in (("master weights", 0, gib / 2), ("gradients", 0, gib / 2),
                                   ("AdamW moments", 1, gib), ("weights, whole", 1, gib * 2),
                                   ("KV cache", 1, cache)):
        assert rows[name][column] == pytest.approx(expected, abs=0.01), name
    for column, total in enumerate(rows.pop("total")):
        assert total == pytest.approx(sum(row[column] for row in rows.values()), abs=0.05)
    code, out = show("gpus=2")
    assert code == 1 and "2 x GPU" in out and "does not fit" in out
    assert show("gpus=2", "gpu_gib=180")[0] == 0
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- calls of language models

def log_of(session_id, users):
    roles = ["user", "assistant"] * users
    return dict(session_id=session_id, messages=[dict(role=role, content="'role': me?") for role in roles])


@pytest.fixture
def counted(tmp_path, tiny_checkpoint, tiny_tokenizer):
    """counted(**keys) -> {role: (calls, millions of tokens in, out, hours)}. The logs hold 10 and 4 sessions
    with three user messages each."""
    write_lines(tmp_path / "logs.jsonl", [log_of(i, 3) for i in range(10)])
    write_lines(tmp_path / "held.jsonl", [log_of(100 + i, 3) for i in range(4)])

    def count(**keys):
        flat = dict(run_dir=str(tmp_path / "run"), data__logs=[str(tmp_path / "logs.jsonl")],
                    data__eval_logs=[str(tmp_path / "held.jsonl")], model__path=str(tiny_checkpoint),
                    rollout__samples=5, train__prompts_per_step=4, train__eval_every=None, eval__samples=2)
        lines = list(plan.calls(make_config(**flat | keys)))
        assert not lines or lines[0].endswith("calls      M in     M out     hours")
        assert len({len(line) for line in lines[:-2]}) <= 1
        rows = [line.replace(",", "").split() for line in lines[1:-2]]
        return {name: list(map(float, cells)) for name, *cells in rows}

    return count


LLM = dict(reward__grader="llm", llm__grader__max_tokens=1_000_000, llm__grader__concurrency=1)
CALLS = [  # config, the gradings of training
    (dict(train__steps=7), 7 * 4 * 5), (dict(train__epochs=3), 31 * 4 * 5),  # 42 messages of users
    (dict(train__steps=7, data__eval_logs=[], data__split=0.5), 7 * 4 * 5)]


@pytest.mark.parametrize("keys, most", CALLS)
def test_the_most_gradings(counted, keys, most):
    found = counted(**LLM | keys)
    assert list(found) == ["llm.grader"] and found["llm.grader"][0] == most
    assert found["llm.grader"][2:] == pytest.approx([most, most / 3600], abs=0.05)
    both = counted(**LLM | keys, reward__audit=0.25)
    assert both["llm.grader"] == found["llm.grader"]
    assert both["llm.auditor"][0] == pytest.approx(most / 4, abs=0.06)


def test_extraction_is_counted(counted, tiny_tokenizer):
    """Sessions of both logs, each so often; the prompt and the session are read each time."""
    extraction = dict(hindsight__source="llm", llm__extractor__max_tokens=1_000_000)
    calls, read, written, hours = counted(**extraction)["llm.extractor"]
    assert (calls, written) == (14, 14) and counted() == {}
    extraction |= dict(hindsight__self_check=1000, llm__extractor__concurrency=2)
    calls, read, _, hours = counted(**extraction)["llm.extractor"]
    assert (calls, hours) == (14_000, pytest.approx(14_000 / 2 / 3600, abs=0.06))
    prompt = (REPO / "prompts" / "extractor.md").read_text().strip()
    size = len(tiny_tokenizer.tokenize(prompt)) + len(tiny_tokenizer.tokenize(str(log_of(1, 3))))
    assert 0.99 < read * 1e6 / (14_000 * size) < 1.02


@pytest.mark.parametrize("change, told", [
    (dict(data__logs=["nowhere.jsonl"]), "no such file: nowhere.jsonl"),
    (dict(data__roles={"assistant": ["user", "assistant"]}), "no message of a user"),
    (dict(model__path="{tmp_path}"), "no tokenizer"), (dict(llm__grader__prompt="no.md"), "prompt no.md")])
def test_what_cannot_be_counted(counted, tmp_path, change, told):
    with pytest.raises(InputError, match=told):
        counted(**LLM | {k: v.format(tmp_path=tmp_path) if type(v) is str else v for k, v in change.items()})


@pytest.mark.parametrize("wrong", [{"gpus": 8}, {"plan": True, "gpu_gib": 40.0}])
def test_keys_of_the_plan_without_a_plan(wrong):
    with pytest.raises(InputError, match=list(wrong)[-1]):
        make_config(**wrong)


def shortage(size, folder, gpus, gib, *more):
    """Why this preset does not fit so many GPUs of so much memory, or None."""
    cfg = planned(size, f"gpus={gpus}", f"gpu_gib={gib}", *more)
    try:
        plan.check(job_of(cfg, folder, gpus, CUDA), plan.capacity(cfg, CUDA))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("size, gpus, gib, more", [
    ("7b", 8, 40.0, ["rollout.max_rows=40", "train.activation_checkpointing=true"]),
    ("7b", 2, 80.0, ["train.moments_on_host=true"]),
    ("32b", 32, 96.0, ["rollout.max_rows=20"])])
def test_what_is_advised_makes_room(qwen, size, gpus, gib, more):
    """Each change that the errors name is one that helps; with all of them it fits."""
    folder = qwen(size)
    for i, change in enumerate(more):
        text = shortage(size, folder, gpus, gib, *more[:i])
        assert f"only {0.9 * gib:.1f} GiB can be used (90% of {gib:.1f})" in text
        assert change.partition("=")[0] in text and "more devices" in text
    assert shortage(size, folder, gpus, gib, *more) is None


def test_training_that_does_not_fit_never_starts(train, refused, monkeypatch, tmp_path, tiny_checkpoint):
    """The same check at the start, against the machine's own memory."""
    path = make_world(tmp_path, tiny_checkpoint, train__steps=2)
    pages = os.sysconf("SC_PHYS_PAGES")
    with monkeypatch.context() as m:
        m.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else 16)  # some MiB in all
        line = refused(train_grpo, path, "rollout.max_rows=2000", "rollout.max_new_tokens=2000")
    assert "needs" in line and "lower rollout.max_rows" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert len(train(train_grpo, path)) == 2


def smallest_of_two(path):
    rank = int(os.environ["RANK"])
    plan.capacity = lambda cfg, device: 2.0 ** (40 if rank else 10)
    try:
        sys.argv = ["train_grpo.py", path]
        running.start("", "train_grpo.py")
    except InputError as error:
        return str(error)


@pytest.mark.slow
def test_all_ranks_refuse_where_one_has_too_little(run_ranks, tmp_path, tiny_checkpoint):
    first, second = run_ranks(smallest_of_two, 2, str(make_world(tmp_path, tiny_checkpoint)))
    assert first == second and "only 0.0 GiB can be used" in first


@pytest.mark.slow
def test_options_that_only_memory_and_time_know_of(train, monkeypatch, tmp_path, make_checkpoint):
    """activation_checkpointing and compile reach the layers, and the run stays the same up to rounding."""
    used = set()

    def noted(name, f, **more):
        def call(*args, **how):
            used.add(name)
            return f(*args, **how, **more)
        return call

    monkeypatch.setattr(torch, "compile", noted("compile", torch.compile, backend="eager"))
    monkeypatch.setattr(decoder, "checkpoint", noted("activation_checkpointing", decoder.checkpoint))
    results = []
    for name in ("plain", "activation_checkpointing", "compile"):
        used.clear()
        (tmp_path / name).mkdir()
        path = make_world(tmp_path / name, make_checkpoint(), train__steps=2)
        results.append(train(train_grpo, path, *[f"train.{name}=true"] * (name != "plain")))
        assert used == {name} - {"plain"}
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-7)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_moments_on_the_host_leave_room_for_those_of_the_largest_parameter(make_checkpoint, tied):
    folder = make_checkpoint(**WIDE | dict(tie_word_embeddings=tied))
    model = decoder.load(folder, CPU, torch.float32)
    sizes = [p.numel() * 4 for p in model.parameters()]
    here, away = (plan.memory(job_of(config_of(folder, train__moments_on_host=away), folder))["training"]
                  for away in (False, True))
    assert here["AdamW moments"] == 2 * sum(sizes)
    assert sum(away.values()) >= sum(sizes) * 2 + 2 * max(sizes)  # weights, gradients, two moments
    assert away == here | {"AdamW moments": 0}  # at the peak, which is in the head


def test_gradients_are_gone_while_sampling(train, monkeypatch, tmp_path, tiny_checkpoint):
    """As the plan has it; and the optimizer is the fused one."""
    seen, sample, load = [], grading.sample_graded, running.load

    def sampled(policy, *rest, **how):
        seen.append([p.grad for p in policy.model.parameters()])
        return sample(policy, *rest, **how)

    def loaded(run, *rest):
        load(run, *rest)
        assert run.optimizer.defaults["fused"]

    monkeypatch.setattr(grading, "sample_graded", sampled)
    monkeypatch.setattr(running, "load", loaded)
    train(train_grpo, make_world(tmp_path, tiny_checkpoint, train__steps=4))
    assert len(seen) >= 2 and all(grad is None for grads in seen for grad in grads)
