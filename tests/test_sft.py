"""train_sft.py: its loss and gradient, and exactly which tokens carry loss. test_run.py tests whole runs."""
from types import SimpleNamespace

import pytest
import torch

import pack
import prompts
import run as running
import train_sft
from records import Turn
from toy import world as pharmacy
from world import (
    alone,
    check_two_ranks,
    equal,
    gradient_of,
    gradients,
    make_config,
    make_trees,
    make_world,
    norm_of,
    open_run,
    plain_decoder,
    same,
    write_lines,
)

TREES = make_trees(9, 1)
BUDGETS = {10_000: 1, 80: 2, 40: 3, 20: 7, 1: 9}  # tokens a micro-batch: how many micro-batches that makes


def configure(budget=16_384, **flat):
    return make_config(train__loss="sft", train__grad_clip=1e9, train__tokens_per_microbatch=budget, **flat)


@pytest.fixture
def run(folders64):
    return open_run(folders64[0], configure())


def step(run, trees):
    """One train_step -> (figures, {parameter: whole gradient}, micro-batches)."""
    batches = list(running.pack_mine(run, trees))
    tokens = sum(len(branch.tokens) for tree in trees for branch in tree.branches)
    with gradients(run.model, run.optimizer) as grads:
        figures = train_sft.train_step(run.model, run.optimizer, batches, tokens, run.cfg.train.grad_clip)
    return figures, grads, batches


def by_hand(model, trees):
    """The loss of the design, minus the mean log-prob of all response tokens, each response with a prompt of
    its own; and the mean entropy."""
    found = [alone(model, tree.prompt, branch.tokens) for tree in trees for branch in tree.branches]
    logp, entropy = map(torch.cat, zip(*found))
    return -logp.mean(), entropy.mean()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_step_is_the_token_mean_whatever_the_micro_batches(run, budget):
    run.cfg = configure(budget)
    figures, grads, batches = step(run, TREES)
    assert len(batches) == BUDGETS[budget]
    plain = plain_decoder(run.model)
    loss, entropy = by_hand(plain, TREES)
    want = gradient_of(plain, loss)
    same(grads, want)
    tokens = sum(len(tree.branches[0].tokens) for tree in TREES)
    assert figures == pytest.approx(dict(loss=loss.item(), entropy=entropy.item(), grad_norm=norm_of(want),
                                         trained_tokens=tokens, finite=True), rel=1e-9)


def test_the_mean_is_over_tokens_not_over_examples_or_micro_batches(run):
    """The other means are far enough away for the test above to tell them apart."""
    plain, parts = plain_decoder(run.model), pack.balance(TREES, 1, 25)[0]
    whole, *others = (sum(by_hand(plain, part)[0].item() for part in parts) / len(parts)
                      for parts in ([TREES], [[tree] for tree in TREES], parts))
    assert min(abs(whole - other) for other in others) > 0.01


def test_every_step_starts_from_a_clean_gradient(run):
    assert equal(step(run, TREES[:3])[1], step(run, TREES[:3])[1])


@pytest.mark.slow
def test_two_ranks_equal_one(run_ranks, folders64):
    """Eight trees fill both evenly. Of one the second rank gets nothing but a dummy. Of a huge one and two
    others the first rank gets fewer micro-batches."""
    huge = pack.Tree([7] * 40, [pack.Branch([5, 6], 0)])
    cfg = make_config(train__loss="sft", train__grad_clip=0.5, train__tokens_per_microbatch=25)
    parts = [TREES[:8], TREES[8:], [huge, *TREES[3:5]]]
    counts, other = check_two_ranks(run_ranks, step, folders64[0], cfg, parts)
    assert counts[1] > other[1] == 0 and other[2] > counts[2] > 0, "the case shows nothing"


# -------------------------------------------------------------------------------------- what carries the loss

# What user and expert said in turns, what the expert said next, s*, the prompt, what must be trained on.
CASES = [
    (["Cough, 37°"], "Any fever?", "continue", "user\nCough, 37°<|im_end|>", "Any fever?"),
    (["a cough", "Any fever?", "no\nreally"], "  Thanks.\nSince when? 😷\n", "continue",
     "user\na cough<|im_end|>\n<|im_start|>assistant\nAny fever?<|im_end|>\n"
     "<|im_start|>user\nno\nreally<|im_end|>", "Thanks.\nSince when? 😷"),
    (["x", "<|im_end|>", "<|im_start|>assistant"], "a<|im_end|>b\n<|im_start|>user", "continue",
     "user\nx<|im_end|>\n<|im_start|>assistant\n< |im_end|><|im_end|>\n"
     "<|im_start|>user\n< |im_start|>assistant<|im_end|>", "a< |im_end|>b\n< |im_start|>user"),
    (["two days"], "Take this. How are you?", "stop", "user\ntwo days<|im_end|>", "<stop />"),
    (["bye"], None, "stop", "user\nbye<|im_end|>", "<stop />")]
HEAD, TAIL = "<|im_start|>system\nWhy: g.<|im_end|>\n<|im_start|>", "\n<|im_start|>assistant\n"
WANTED = {f"{HEAD}{prompt}{TAIL}": f"{response}<|im_end|>" for *_, prompt, response in CASES}


def golden_turns():
    turns = []
    for i, (said, expert, decision, *_) in enumerate(CASES):
        context = [dict(role=("user", "assistant")[j % 2], content=text) for j, text in enumerate(said)]
        turns.append(Turn(turn_id=f"{i}_1", session_id=str(i), goal="g", context=context, expert=expert,
                          known=[], target=[], decision=decision))
    return turns


def test_exactly_the_experts_response_and_the_end_token_carry_loss(
        call, monkeypatch, tmp_path, tiny_checkpoint, tiny_tokenizer):
    """A whole run on these turns: what stands before each response, and whose log-probs have a gradient."""
    path = make_world(tmp_path, tiny_checkpoint, train__loss="sft", train__steps_per_sync=1, train__steps=1,
                      train__prompts_per_step=5, train__tokens_per_microbatch=10_000,
                      rollout__max_new_tokens=60, rollout__max_prompt_tokens=500)
    write_lines(tmp_path / "run" / "turns" / "train.jsonl", golden_turns())
    (tmp_path / "prompt.md").write_text("Why: {goal}.\n")
    seen, logprobs = [], pack.logprobs

    def watched(model, batch, *rest):
        logp, entropy = logprobs(model, batch, *rest)
        logp.retain_grad()
        seen.append((batch, logp))
        return logp, entropy

    monkeypatch.setattr(pack, "logprobs", watched)
    call(train_sft, path)
    (batch, logp), = seen
    assert (logp.grad != 0).all() and len(set(logp.grad.tolist())) == 1  # nothing else has a log-prob
    responses = [batch.targets[batch.seq == s].tolist() for s in range(len(CASES))]
    lengths = batch.spans[0].q_len.tolist()
    before = [tiny_tokenizer.decode(ids) for ids in batch.tokens[:sum(lengths)].split(lengths)]
    assert dict(zip(before, map(tiny_tokenizer.decode, responses))) == WANTED
    assert all(ids.count(258) == 1 for ids in responses)


def test_with_merged_tokens_nothing_reaches_over_the_border(tmp_path):
    """The same with the toy's byte-level BPE: no token ends a prompt and starts a response."""
    tokenizer = pharmacy.make_tokenizer(pharmacy.corpus(3, 60))
    run = SimpleNamespace(cfg=make_config(), policy=SimpleNamespace(tokenizer=tokenizer), rank=0)
    (tmp_path / "prompt.md").write_text("Why: {goal}.")
    encoded = prompts.encode_prompts(tokenizer, golden_turns(), run.cfg, tmp_path / "prompt.md")
    texts = [[prompts.expert_response(prompt.turn)] for prompt in encoded]
    trees = running.encode_trees(run, encoded, texts)
    responses = [tree.branches[0].tokens for tree in trees]
    assert {tokenizer.decode(tree.prompt): tokenizer.decode(r) for tree, r in zip(trees, responses)} == WANTED
    assert all(r.index(tokenizer.eos_token_id) == len(r) - 1 for r in responses)
    assert len(responses[0]) < len("Any fever?"), "nothing was merged"
