"""Shared-prefix packing equals the computation that repeats the prompt for every answer; sharing out loses nothing."""
import random

import pytest
import torch
import torch.nn.functional as F

import model as decoder
import pack
from bench.common import peak_bytes
from conftest import VOCAB, make_model
from pack import Tree, balance, logprobs, split_tree
from train_grpo import gspo_loss

TREES = [Tree([5, 9, 2, 7, 7, 30], [[3], [4, 1, 258], [8, 8, 6, 2, 258], [3, 258]], [(0, 0), (0, 1), (0, 2), (0, 3)]),
         Tree([11], [[12, 258], [13]], [(1, 0), (1, 2)]),
         Tree([257, 40, 41], [[42, 43, 44, 258]], [(2, 1)])]


def tiny(seed=0, dtype=torch.float64, **overrides):
    """The project's decoder with the weights of a tiny transformers model, in memory. -> (ours, transformers')."""
    hf = make_model("qwen2", seed=seed, attn_implementation="eager", **overrides).to(dtype)
    shape = decoder.Shape(VOCAB, 32, 2, 4, 2, 8, 48, 1e-6, 10000.0, None, True, False, False, hf.config.tie_word_embeddings)
    ours = decoder.Decoder(shape).to(dtype)
    ours.load_state_dict({k: v for k, v in hf.state_dict().items() if k in ours.state_dict()})
    return ours, hf


def alone(model, prompt, answer, temperature):
    """Log-probs [R] and entropies [R] of one answer with a prompt of its own, by the plainest causal attention."""
    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        score = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
        future = torch.ones(score.shape[1:], dtype=torch.bool).triu(1)
        return (score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    tokens = torch.tensor(prompt + answer)
    logits = model(tokens, torch.arange(len(tokens)), attend)[len(prompt) - 1:-1]
    logp = F.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(answer)), answer], -(logp.exp() * logp).sum(-1)


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def weights(n):
    return torch.linspace(-1.0, 2.0, n, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_unshared(temperature):
    model, _ = tiny()
    packed = pack.pack(TREES)
    assert packed.tokens.numel() == sum(t.size() for t in TREES)
    logp, entropy = logprobs(model, packed, temperature, entropy=True)
    want = [alone(model, t.prompt, a, temperature) for t in TREES for a in t.answers]
    want_logp, want_entropy = (torch.cat(x) for x in zip(*want))
    torch.testing.assert_close(logp, want_logp, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-11, atol=1e-12)
    w = weights(len(logp))
    got = gradients(model, (w * logp).sum() + (w.flip(0) * entropy).sum())
    expected = gradients(model, (w * want_logp).sum() + (w.flip(0) * want_entropy).sum())
    for name, a, b in zip(dict(model.named_parameters()), got, expected):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


def test_packed_equals_transformers():
    model, hf = tiny(dtype=torch.float32, tie_word_embeddings=False)
    packed = pack.pack(TREES)
    logp, entropy = logprobs(model, packed, 1.0, entropy=True)
    want_logp, want_entropy = [], []
    for t in TREES:
        for a in t.answers:
            full = F.log_softmax(hf(torch.tensor([t.prompt + a])).logits[0, len(t.prompt) - 1:-1].float(), -1)
            want_logp.append(full[torch.arange(len(a)), a])
            want_entropy.append(-(full.exp() * full).sum(-1))
    want_logp, want_entropy = torch.cat(want_logp), torch.cat(want_entropy)
    torch.testing.assert_close(logp, want_logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-4, atol=1e-4)
    w = weights(len(logp)).float()
    names = [n for n, _ in model.named_parameters()]
    theirs = dict(hf.named_parameters())
    got = gradients(model, (w * logp).sum())
    expected = torch.autograd.grad((w * want_logp).sum(), [theirs[n] for n in names])
    for name, a, b in zip(names, got, expected):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name


def test_what_a_micro_batch_says_of_itself():
    packed = pack.pack(TREES)
    answers = [a for t in TREES for a in t.answers]
    assert packed.targets.tolist() == sum(answers, [])
    assert packed.seq.tolist() == [i for i, a in enumerate(answers) for _ in a]
    assert packed.index == [i for t in TREES for i in t.index]
    # The row that predicts an answer token holds the token before it, at the position before it.
    before = [x for t in TREES for a in t.answers for x in [t.prompt[-1]] + a[:-1]]
    place = [len(t.prompt) - 1 + i for t in TREES for a in t.answers for i in range(len(a))]
    assert packed.tokens[packed.select].tolist() == before
    assert packed.positions[packed.select].tolist() == place


def test_entropy_has_a_gradient_only_if_asked():
    model, _ = tiny()
    packed = pack.pack(TREES)
    assert not logprobs(model, packed)[1].requires_grad and logprobs(model, packed, entropy=True)[1].requires_grad
    torch.testing.assert_close(logprobs(model, packed)[1], logprobs(model, packed, entropy=True)[1].detach())


def test_answers_of_one_token_only():
    model, _ = tiny()
    packed = pack.pack([Tree([5, 6, 7], [[1], [2]], [0, 1])])
    assert len(packed.tokens) == 3  # no answer token needs a forward pass of its own
    want = torch.cat([alone(model, [5, 6, 7], [a], 1.0)[0] for a in (1, 2)])
    torch.testing.assert_close(logprobs(model, packed)[0], want, rtol=1e-11, atol=1e-12)


def test_gspo_statistics_are_per_sequence_under_packing():
    from types import SimpleNamespace
    t = SimpleNamespace(clip_low=0.05, clip_high=0.05)
    model, _ = tiny()
    answers = [a for tree in TREES for a in tree.answers]
    shifts = [0.3, -0.2, 0.02, 0.1, -0.01, -0.4, 0.04]
    adv = [1.0, -1.0, 2.0, -0.5, 1.5, 1.0, -1.0]
    packed = pack.pack(TREES)
    logp = logprobs(model, packed)[0]
    old = logp.detach() - torch.tensor(shifts, dtype=torch.float64)[packed.seq]
    loss, figures = gspo_loss(logp, old, torch.tensor(adv, dtype=torch.float64)[packed.seq], packed.seq, t)
    parts = []
    for tree in TREES:
        for a in tree.answers:
            i = len(parts)
            lp = alone(model, tree.prompt, a, 1.0)[0]
            one = torch.zeros(len(a), dtype=torch.long)
            parts.append(gspo_loss(lp, lp.detach() - shifts[i], torch.full((len(a),), adv[i], dtype=torch.float64), one, t)[0])
    assert 0 < figures["clip_share"].sum() < len(logp) and len(parts) == len(answers)
    torch.testing.assert_close(loss, torch.cat(parts), rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(model, loss.sum()), gradients(model, torch.cat(parts).sum())):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------ chunked log-probs

def plain_scores(x, weight, targets, temperature):
    logp = F.log_softmax(x @ weight.T / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 11, 64])
def test_chunked_logprobs_are_plain_ones(monkeypatch, rows, entropy):
    g = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True) for n in (11, 29))
    targets, (a, b) = torch.randint(0, 29, (11,), generator=g), torch.randn(2, 11, generator=g, dtype=torch.float64)
    monkeypatch.setattr(pack, "LOGITS", rows * 29)
    assert len(pack.chunks(x, weight)) == -(-11 // rows)
    got, want = pack.TokenLogprobs.apply(x, weight, targets, 0.7, entropy), plain_scores(x, weight, targets, 0.7)
    for p, q in zip(got, want):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert got[1].requires_grad == entropy
    losses = [(a * logp).sum() + (b * h).sum() * entropy for logp, h in (got, want)]
    for p, q in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses)):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_chunked_logprobs_in_bfloat16(monkeypatch):
    """Logits rounded to bfloat16 as the plain way does, everything after in float32; the weight's gradient is summed in float32."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=g).bfloat16().requires_grad_() for n in (200, 50))
    targets = torch.randint(0, 50, (200,), generator=g)
    monkeypatch.setattr(pack, "LOGITS", 50)
    logp, entropy = pack.TokenLogprobs.apply(x, weight, targets, 1.0, False)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, (x @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = torch.autograd.grad(plain_scores(*exact, targets, 1.0)[0].sum(), exact)
    for got, want in zip(torch.autograd.grad(logp.sum(), (x, weight)), wanted):
        assert (got.double() - want).norm() < 0.004 * want.norm()


def test_memory_of_the_logprobs_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(pack, "LOGITS", 2 ** 16)
    H = 4

    def peak(M, V, function):
        x, weight = torch.randn(M, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        targets = torch.randint(0, V, (M,))
        return peak_bytes(lambda: function(x, weight, targets)[0].sum().backward(), torch.device("cpu"))

    chunked = {(M, V): peak(M, V, lambda x, w, t: pack.TokenLogprobs.apply(x, w, t, 1.0, False))
               for M in (512, 4096) for V in (512, 4096)}
    for (M, V), took in chunked.items():
        linear = 4 * (3 * V * H + M * (H + 5))  # gradients of weight (and two sums on their way) and hidden states, a few numbers a token
        assert took < 2 * 4 * 2 ** 16 + linear + 8192, (M, V)
    assert peak(4096, 4096, lambda x, w, t: plain_scores(x, w, t, 1.0)) > 20 * chunked[4096, 4096]


# ------------------------------------------------------------------------------------------- activation checkpointing

def test_activation_checkpointing_changes_nothing_but_what_is_kept():
    model, _ = tiny()
    packed, kept = pack.pack(TREES), {}
    w = weights(len(packed.targets))
    grads = {}
    for checkpointed in (False, True):
        for layer in model.model.layers:
            layer.checkpointed = checkpointed
        kept[checkpointed] = 0

        def count(t):
            kept[checkpointed] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            logp, _ = logprobs(model, packed)
        grads[checkpointed] = gradients(model, (w * logp).sum())
    for a, b in zip(grads[True], grads[False]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert kept[True] < 0.5 * kept[False]


def test_compiled_layers_compute_the_same():
    """torch.compile without the code generator of a backend: what it traces is one graph for each part, forward and backward."""
    model, _ = tiny()
    packed = pack.pack(TREES)
    w = weights(len(packed.targets))
    want = gradients(model, (w * logprobs(model, packed)[0]).sum())
    for layer in model.model.layers:
        layer.before, layer.after = (torch.compile(f, dynamic=True, backend="aot_eager", fullgraph=True) for f in (layer.before, layer.after))
    for a, b in zip(gradients(model, (w * logprobs(model, packed)[0]).sum()), want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------- sharing out

def test_dummy_gives_zero_gradient():
    model, _ = tiny()
    packed = pack.pack([])
    assert packed.index == []
    (logprobs(model, packed)[0].sum() * 0.0).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def random_trees(rng, n):
    return [Tree([0] * rng.randint(1, 30), [[1] * rng.randint(1, 20) for _ in range(g)], [(b, i) for i in range(g)])
            for b, g in enumerate(rng.choices(range(1, 6), k=n))]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 40, 64, 200, 10000])
def test_balance(world, budget):
    rng = random.Random(world * 1000 + budget)
    for n in (0, 1, 2, 7, 20):
        trees = random_trees(rng, n)
        ranks = balance([part for tree in trees for part in split_tree(tree, budget)], world, budget)
        assert len(ranks) == world
        assert len({len(bins) for bins in ranks}) == 1 and len(ranks[0]) >= 1  # FSDP: as many passes on every rank
        parts = [t for bins in ranks for bin in bins for t in bin]
        everything = sorted((i, tuple(a)) for t in parts for i, a in zip(t.index, t.answers))
        assert everything == sorted((i, tuple(a)) for t in trees for i, a in zip(t.index, t.answers))
        prompts = {t.index[0][0]: t.prompt for t in trees}
        assert all(t.prompt == prompts[i[0]] for t in parts for i in t.index)
        for bins in ranks:
            for bin in bins:  # over the budget only where a single answer with its prompt is
                size = sum(t.size() for t in bin)
                assert size <= budget or (len(bin) == 1 and len(bin[0].answers) == 1)
        load = [sum(t.size() for bin in bins for t in bin) for bins in ranks]
        if parts:
            assert max(load) - min(load) <= max(t.size() for t in parts)


def test_no_more_micro_batches_than_first_fit_needs():
    trees = [Tree([0] * 10, [[1]], [(b, 0)]) for b in range(8)]
    assert len(balance(trees, 1, 40)[0]) == 2 and len(balance(trees, 2, 40)[0]) == 1


def test_ranks_are_balanced_by_tokens_not_by_trees():
    trees = [Tree([0] * n, [[1]], [(b, 0)]) for b, n in enumerate([100] + [10] * 10)]
    assert [sum(t.size() for bin in bins for t in bin) for bins in balance(trees, 2, 1000)] == [100, 100]


def test_a_tree_that_fits_is_not_split():
    tree = TREES[0]
    assert [t.answers for t in split_tree(tree, tree.size())] == [tree.answers]
    assert len(split_tree(tree, tree.size() - 1)) > 1


@pytest.mark.parametrize("budget", [1, 8, 10, 12])
def test_split_is_exact(budget):
    model, _ = tiny()
    tree, w = TREES[0], weights(11)
    parts = split_tree(tree, budget)
    assert len(parts) > 1 and [i for p in parts for i in p.index] == tree.index
    whole = logprobs(model, pack.pack([tree]))[0]
    split = torch.cat([logprobs(model, pack.pack([p]))[0] for p in parts])
    torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(model, (w * split).sum()), gradients(model, (w * whole).sum())):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_cuda_shared_gradients_equal_unshared(dtype, tolerance):
    """A tree against the same answers each with a prompt of its own, both on CUDA, and against float64 on the CPU."""
    exact, _ = tiny()
    model = decoder.Decoder(exact.shape).to("cuda", dtype)
    model.load_state_dict(exact.state_dict())
    w = weights(sum(len(a) for t in TREES for a in t.answers))
    alone = [Tree(t.prompt, [a], [i]) for t in TREES for a, i in zip(t.answers, t.index)]
    want = gradients(exact, (w * logprobs(exact, pack.pack(TREES))[0]).sum())
    for trees in (TREES, alone):
        logp, _ = logprobs(model, pack.pack(trees, "cuda"))
        for a, b in zip(gradients(model, (w.cuda() * logp).sum()), want):
            assert (a.cpu().double() - b).norm() <= tolerance * b.norm() + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("entropy", [False, True])
def test_cuda_chunked_logprobs_are_plain_ones(monkeypatch, entropy):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=g).cuda().requires_grad_() for n in (300, 5000))
    targets = torch.randint(0, 5000, (300,), generator=g).cuda()
    monkeypatch.setattr(pack, "LOGITS", 70 * 5000)
    got, want = pack.TokenLogprobs.apply(x, weight, targets, 0.7, entropy), plain_scores(x, weight, targets, 0.7)
    losses = [logp.sum() + h.sum() * entropy for logp, h in (got, want)]
    for p, q in zip([*got, *torch.autograd.grad(losses[0], (x, weight))], [*want, *torch.autograd.grad(losses[1], (x, weight))]):
        assert (p - q).norm() <= 1e-4 * q.norm()
