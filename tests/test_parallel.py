"""FSDP on one rank and on three: loading, sampling from gathered weights, a step, export, exchanges."""
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model as decoder
import pack
import parallel
from rollout import Sampling, generate
from world import REPO, equal, make_world, same, some_prompts, tokens_of, torchrun, weights

PROMPTS = some_prompts()


def rolled(model, prompts=PROMPTS, keys=None, samples=1):
    with decoder.gathered(model):
        return generate(model, prompts, set(), Sampling(samples, 12), keys)


def backward(model, prompts, responses):
    """Gradients that raise the mean log-prob of these responses (token ids, some for each prompt)."""
    trees = [pack.Tree(p, [pack.Branch(tokens, None) for tokens in group])
             for p, group in zip(prompts, responses, strict=True)]
    logp, _ = pack.logprobs(model, pack.pack(trees))
    (-logp.mean()).backward()
    return logp


def step_of_sgd(model, prompts, responses):
    backward(model, prompts, responses)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def test_sampling_under_fsdp_reads_the_weights_of_the_moment(one_rank, make_checkpoint):
    folder = make_checkpoint("qwen2", tie_word_embeddings=False)
    plain = decoder.load(folder, "cpu", torch.float64).requires_grad_(True)
    sharded = parallel.load_sharded(folder, one_rank, torch.float64)
    seen = []
    for _ in range(2):
        ours, want = (rolled(model, samples=2) for model in (sharded, plain))
        seen.append(tokens_of(ours))
        assert tokens_of(want) == seen[-1] and not sharded.gathered
        for (a, _), (b, _) in zip(ours, want):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-9, rtol=0)
        for model in (plain, sharded):
            step_of_sgd(model, PROMPTS, seen[-1])
    with pytest.raises(ZeroDivisionError), decoder.gathered(sharded):
        assert not torch.is_grad_enabled()
        1 / 0
    assert not sharded.gathered and torch.is_grad_enabled()
    step_of_sgd(sharded, PROMPTS, seen[-1])  # training goes on after a rollout that failed
    assert seen[0] != seen[1] != tokens_of(rolled(sharded, samples=2))


RANK = f"""
import os, sys, time
sys.path.insert(0, {str(REPO)!r})
import parallel
parallel.start()
os.write(1, b"here\\n")  # in one piece, beside another rank's
time.sleep(40)
"""


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path):
    """They would go on holding their GPUs, and rank 0 the run folder."""
    (tmp_path / "rank.py").write_text(RANK)
    process = torchrun(tmp_path / "rank.py")
    assert [line for _, line in zip("ab", process.stdout)] == ["here\n"] * 2
    process.kill()
    process.communicate(timeout=15)  # until no rank has the other end of the pipe


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollout.load_tokenizer:1:mine", "grading.grade:2:mine",
                                   "checkpoint.save_tensors:1:full", "train_grpo.train_step:1:bug"])
def test_a_rank_that_fails_tells_why_and_ends_the_others(tmp_path, monkeypatch, tiny_checkpoint, place):
    """At the start, while it grades, in a save, in a step: once, and no other rank shows a traceback."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    path, began = make_world(tmp_path, tiny_checkpoint), time.monotonic()
    process = torchrun("tests/faulty.py", f"1:{place}", "train_grpo.py", path)
    said = process.communicate(timeout=60)[0]
    told = {"mine": "error: mine alone", "full": "error: [Errno 28] No space left on device",
            "bug": "[rank1]: ValueError: a bug of mine"}[place.split(":")[2]]
    assert process.returncode and time.monotonic() - began < 60
    assert said.count(told) == 1 and "[rank0]" not in said, said
    own = "[rank1]" if place.endswith("bug") else "error: "
    assert own in said and ("[rank1]" in said) != ("error: " in said), said


def test_master_weights_are_float32_and_computing_is_bfloat16(one_rank, tiny_checkpoint):
    model = parallel.load_sharded(tiny_checkpoint, one_rank, torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    groups = rolled(model)
    with decoder.gathered(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logp = backward(model, PROMPTS, tokens_of(groups))
    sampled = torch.tensor([x for (r,) in groups for x in r.logprobs])
    assert logp.dtype == torch.float32 and (logp - sampled).abs().mean() < 0.05
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    frozen = parallel.load_sharded(tiny_checkpoint, one_rank, torch.bfloat16, trainable=False)
    assert {(p.dtype, p.requires_grad) for p in frozen.parameters()} == {(torch.bfloat16, False)}


def on_each_rank(folder, out):
    """What test_three_ranks runs: load, export, sample, take a step, export. -> this rank's report."""
    rank, world, device = parallel.start()
    model = parallel.load_sharded(Path(folder), device, torch.float64)
    stored = {n: t.double() for n, t in load_file(folder + "/model.safetensors").items()}
    report = {"equal": equal(weights(model), stored),
              "rows": {n: p.to_local().shape[0] for n, p in model.named_parameters()}}
    decoder.export(model, folder, out + "/same")
    mine = slice(rank, 5, world)  # each rank its own share, and not the same number of them
    groups = rolled(model, PROMPTS[mine], [(i,) for i in range(5)][mine])
    report["tokens"] = parallel.all_gather(tokens_of(groups))
    prompts = PROMPTS[rank::world]
    step_of_sgd(model, prompts, [[p] for p in prompts])
    decoder.export(model, folder, out + "/stepped", max_bytes=30_000)
    return report


@pytest.mark.slow
def test_three_ranks(tmp_path, make_checkpoint, run_ranks):
    """Uneven shards (289 rows over 3 ranks), and tensors of 4 rows, of which the last rank holds none."""
    folder = make_checkpoint("qwen3", vocab_size=289, intermediate_size=49, head_dim=4, num_key_value_heads=1)
    reports = run_ranks(on_each_rank, 3, str(folder), str(tmp_path))
    assert all(r["equal"] for r in reports)
    assert [r["rows"]["model.embed_tokens.weight"] for r in reports] == [97, 97, 95]
    assert [r["rows"]["model.layers.0.self_attn.k_norm.weight"] for r in reports] == [2, 2, 0]
    stored = load_file(folder / "model.safetensors")
    assert equal(load_file(tmp_path / "same" / "model.safetensors"), stored)

    model = decoder.load(folder, "cpu", torch.float64)
    alone = tokens_of(rolled(model, PROMPTS[:5]))
    for r in reports:  # the number of ranks does not change the responses
        assert [r["tokens"][i % 3][i // 3] for i in range(5)] == alone

    model.requires_grad_(True)  # gradients are summed over the ranks: the same step, on one
    for rank in range(3):
        prompts = PROMPTS[rank::3]
        backward(model, prompts, [[p] for p in prompts])
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert len(list((tmp_path / "stepped").glob("model-*.safetensors"))) > 1
    stepped = weights(decoder.load(tmp_path / "stepped", "cpu", torch.float32))
    same(stepped, {n: t.float() for n, t in weights(model).items()}, rtol=1e-5, atol=1e-5)
    assert max((stepped[n] - stored[n]).abs().max().item() for n in stored) > 1e-3
