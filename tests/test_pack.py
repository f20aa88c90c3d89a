"""Shared-prefix packing equals the computation that repeats the prompt for every response; sharing out loses
nothing."""
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as decoder
import pack
from bench.common import peak_bytes
from conftest import VOCAB, make_model
from pack import Branch, Tree, balance, logprobs, split_tree
from train_grpo import gspo_loss
from world import alone


def make_tree(b, prompt, *responses):
    return Tree(prompt, [Branch(tokens, (b, i), [i - t / 9 for t in tokens], i - 0.5)
                         for i, tokens in enumerate(responses)])


TREES = [make_tree(0, [5, 9, 2, 7, 7, 30], [3], [4, 1, 258], [8, 8, 6, 2, 258], [3, 258]),
         make_tree(1, [11], [12, 258], [13]),
         make_tree(2, [257, 40, 41], [42, 43, 44, 258])]
PAIRS = [(tree, branch) for tree in TREES for branch in tree.branches]
WEIGHTS = torch.linspace(-1.0, 2.0, 18, dtype=torch.float64)  # one for each response token


def tiny(dtype=torch.float64, **overrides):
    """The project's decoder with the weights of a tiny transformers model. -> (ours, transformers')"""
    hf = make_model("qwen2", attn_implementation="eager", **overrides).to(dtype)
    tied = hf.config.tie_word_embeddings
    shape = decoder.Shape(VOCAB, 32, 2, 4, 48, 2, 8, 1e-6, 10000.0, None, True, False, False, tied)
    ours = decoder.Decoder(shape).to(dtype)
    ours.load_state_dict({k: v for k, v in hf.state_dict().items() if k in ours.state_dict()})
    return ours, hf


@pytest.fixture
def model():
    return tiny()[0]


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def close(got, want, rtol=1e-9, atol=1e-10):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{i}: {m}")


def scores(logits, targets):
    """Log-probs of the targets and entropies, the plain way."""
    logp = F.log_softmax(logits, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_unshared(model, temperature):
    batch = pack.pack(TREES)
    assert len(batch.tokens) == tokens_of(TREES)
    got = logprobs(model, batch, temperature, entropy=True)
    want = [alone(model, tree.prompt, branch.tokens, temperature) for tree, branch in PAIRS]
    want = [torch.cat(x) for x in zip(*want)]
    close(got, want, rtol=1e-11, atol=1e-12)
    got, want = (gradients(model, (WEIGHTS * logp).sum() + (WEIGHTS.flip(0) * entropy).sum())
                 for logp, entropy in (got, want))
    assert all(g.abs().max() > 0 for g in want)
    close(got, want)


def test_packed_equals_transformers():
    model, hf = tiny(torch.float32, tie_word_embeddings=False)
    got = logprobs(model, pack.pack(TREES), entropy=True)
    want = []
    for tree, branch in PAIRS:
        logits = hf(torch.tensor([tree.prompt + branch.tokens])).logits[0, len(tree.prompt) - 1:-1]
        want.append(scores(logits, torch.tensor(branch.tokens)))
    want = [torch.cat(x) for x in zip(*want)]
    close(got, want, rtol=1e-4, atol=1e-4)
    theirs = dict(hf.named_parameters())
    theirs = [theirs[name] for name, _ in model.named_parameters()]
    expected = torch.autograd.grad((WEIGHTS.float() * want[0]).sum(), theirs)
    for a, b in zip(gradients(model, (WEIGHTS.float() * got[0]).sum()), expected):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_what_a_micro_batch_says_of_itself():
    batch = pack.pack(TREES, dtype=torch.float64)
    branches = [b for _, b in PAIRS]
    assert batch.names == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    assert batch.targets.tolist() == [t for b in branches for t in b.tokens]
    assert batch.seq.tolist() == [i for i, b in enumerate(branches) for _ in b.tokens]
    assert batch.sampled.tolist() == batch.old.tolist() == [x for b in branches for x in b.logprobs]
    assert batch.adv.tolist() == [b.advantage for b in branches for _ in b.tokens]
    # The row that predicts a response token holds the token before it, at the position before it.
    before = [x for tree, b in PAIRS for x in [tree.prompt[-1]] + b.tokens[:-1]]
    place = [len(tree.prompt) - 1 + i for tree, b in PAIRS for i in range(len(b.tokens))]
    assert batch.tokens[batch.select].tolist() == before
    assert batch.positions[batch.select].tolist() == place
    bare = pack.pack([Tree([1], [Branch([2, 3], "without log-probs and advantage")])])
    assert bare.sampled.tolist() == bare.old.tolist() == bare.adv.tolist() == [0.0, 0.0]
    assert (batch.sampled.dtype, bare.adv.dtype) == (torch.float64, torch.float32)


def test_entropy_has_a_gradient_only_if_asked(model):
    plain, asked = (logprobs(model, pack.pack(TREES), entropy=entropy)[1] for entropy in (False, True))
    assert not plain.requires_grad and asked.requires_grad
    torch.testing.assert_close(plain, asked.detach())


def test_responses_of_one_token_only(model):
    batch = pack.pack([make_tree(0, [5, 6, 7], [1], [2])])
    assert len(batch.tokens) == 3  # no response token needs a forward pass of its own
    mixed = pack.pack([make_tree(0, [5, 6, 7], [1], [2, 3])])
    assert mixed.spans[1].q_len.tolist() == [1]  # the first response asks nothing
    want = torch.cat([alone(model, [5, 6, 7], [token])[0] for token in (1, 2)])
    torch.testing.assert_close(logprobs(model, batch)[0], want, rtol=1e-11, atol=1e-12)


def test_gspo_statistics_are_per_sequence_under_packing(model):
    t = SimpleNamespace(clip_low=0.05, clip_high=0.05)
    shifts = torch.tensor([0.3, -0.2, 0.02, 0.1, -0.01, -0.4, 0.04], dtype=torch.float64)
    adv = torch.tensor([1.0, -1.0, 2.0, -0.5, 1.5, 1.0, -1.0], dtype=torch.float64)
    batch = pack.pack(TREES)
    logp = logprobs(model, batch)[0]
    old = logp.detach() - shifts[batch.seq]
    loss, figures = gspo_loss(logp, old, adv[batch.seq], batch.seq, t)
    parts = []
    for (tree, branch), shift, a in zip(PAIRS, shifts, adv, strict=True):
        lp = alone(model, tree.prompt, branch.tokens)[0]
        one = torch.zeros(len(lp), dtype=torch.long)
        parts.append(gspo_loss(lp, lp.detach() - shift, a.expand(len(lp)), one, t)[0])
    want = torch.cat(parts)
    assert 0 < figures["clip_share"].sum() < len(logp)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    close(*(gradients(model, x.sum()) for x in (loss, want)))


# ------------------------------------------------------------------------------------------ chunked log-probs

def both_ways(monkeypatch, chunk, x, weight, targets, entropy):
    """Log-probs, entropies and gradients, `chunk` tokens at a time and plainly."""
    monkeypatch.setattr(pack, "LOGITS", chunk * len(weight))
    for logp, h in (pack.TokenLogprobs.apply(x, weight, targets, 0.7, entropy),
                    scores(x @ weight.T / 0.7, targets)):
        w = torch.arange(len(x), device=x.device).cos().to(logp.dtype)
        loss = (w * logp).sum() + (w.flip(0) * h).sum() * entropy
        yield [logp, h, *torch.autograd.grad(loss, (x, weight))]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 11, 64])
def test_chunked_logprobs_are_plain_ones(monkeypatch, rows, entropy):
    g = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True) for n in (11, 29))
    targets = torch.randint(0, 29, (11,), generator=g)
    got, want = both_ways(monkeypatch, rows, x, weight, targets, entropy)
    assert len(pack.chunks(x, weight)) == -(-11 // rows)
    assert got[1].requires_grad == entropy
    close(got, want, rtol=1e-12, atol=1e-12)


def test_chunked_logprobs_in_bfloat16(monkeypatch):
    """Logits and all that follows in float32 (logits rounded to bfloat16 move a log-prob by up to 0.06); the
    weight's gradient is summed in float32."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=g).bfloat16().requires_grad_() for n in (200, 50))
    targets = torch.randint(0, 50, (200,), generator=g)
    monkeypatch.setattr(pack, "LOGITS", 50)
    logp, entropy = pack.TokenLogprobs.apply(x, weight, targets, 1.0, False)
    assert logp.dtype == entropy.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    torch.testing.assert_close(logp.double(), scores(exact[0] @ exact[1].T, targets)[0], rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(scores(exact[0] @ exact[1].T, targets)[0].sum(), exact)
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
        # gradients of weight (and two sums on their way) and of hidden states, a few numbers a token
        linear = 4 * (3 * V * H + M * (H + 5))
        assert took < 2 * 4 * 2 ** 16 + linear + 8192, (M, V)
    assert peak(4096, 4096, lambda x, w, t: scores(x @ w.T, t)) > 20 * chunked[4096, 4096]


# ------------------------------------------------------------------- activation checkpointing, torch.compile

def test_activation_checkpointing_changes_nothing_but_what_is_kept(model):
    kept, grads = {}, {}
    for checkpointed in (False, True):
        for layer in model.model.layers:
            layer.checkpointed = checkpointed
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            logp, _ = logprobs(model, pack.pack(TREES))
        kept[checkpointed] = sum(saved)
        grads[checkpointed] = gradients(model, (WEIGHTS * logp).sum())
    close(grads[True], grads[False], rtol=1e-12, atol=1e-12)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.slow
def test_compiled_layers_compute_the_same(model):
    """torch.compile without the code generator of a backend: what it traces is one graph for each part,
    forward and backward."""
    def trained():
        return gradients(model, (WEIGHTS * logprobs(model, pack.pack(TREES))[0]).sum())

    want = trained()
    for layer in model.model.layers:
        layer.before, layer.after = (torch.compile(f, dynamic=True, backend="aot_eager", fullgraph=True)
                                     for f in (layer.before, layer.after))
    close(trained(), want, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ sharing out

def test_dummy_gives_zero_gradient(model):
    batch = pack.pack([])
    assert batch.names == [] and batch.sampled.tolist() == batch.adv.tolist() == batch.old.tolist() == [0.0]
    (logprobs(model, batch)[0].sum() * 0.0).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def random_trees(rng, n):
    return [make_tree(b, [0] * rng.randint(1, 30), *([1] * rng.randint(1, 20) for _ in range(g)))
            for b, g in enumerate(rng.choices(range(1, 6), k=n))]


def tokens_of(trees):
    return sum(t.size() for t in trees)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 40, 64, 200, 10000])
def test_balance(world, budget):
    rng = random.Random(world * 1000 + budget)
    for n in (0, 1, 2, 7, 20):
        trees = random_trees(rng, n)
        ranks = balance([part for tree in trees for part in split_tree(tree, budget)], world, budget)
        assert len(ranks) == world
        assert len({len(bins) for bins in ranks}) == 1 and ranks[0]  # FSDP: as many passes on every rank
        parts = [t for bins in ranks for bin in bins for t in bin]
        found = sorted((b for t in parts for b in t.branches), key=lambda b: b.name)
        assert found == [b for t in trees for b in t.branches]
        assert all(t.prompt == trees[b.name[0]].prompt for t in parts for b in t.branches)
        for bins in ranks:
            for bin in bins:  # over the budget only where a single response with its prompt is
                assert tokens_of(bin) <= budget or (len(bin) == 1 and len(bin[0].branches) == 1)
        load = [sum(map(tokens_of, bins)) for bins in ranks]
        if parts:
            assert max(load) - min(load) <= max(t.size() for t in parts)


def test_as_few_micro_batches_as_first_fit_needs_and_ranks_balanced_by_tokens():
    trees = [make_tree(b, [0] * 10, [1]) for b in range(8)]
    assert len(balance(trees, 1, 40)[0]) == 2 and len(balance(trees, 2, 40)[0]) == 1
    trees = [make_tree(b, [0] * n, [1]) for b, n in enumerate([100] + [10] * 10)]
    assert [sum(map(tokens_of, bins)) for bins in balance(trees, 2, 1000)] == [100, 100]


@pytest.mark.parametrize("budget", [1, 8, 10, 12, TREES[0].size() - 1])
def test_split_is_exact_and_only_over_the_budget(model, budget):
    tree = TREES[0]
    assert split_tree(tree, tree.size()) == [tree]
    parts = split_tree(tree, budget)
    assert len(parts) > 1 and [b for p in parts for b in p.branches] == tree.branches
    whole = logprobs(model, pack.pack([tree]))[0]
    split = torch.cat([logprobs(model, pack.pack([p]))[0] for p in parts])
    torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-12)
    close(*(gradients(model, (WEIGHTS[:11] * logp).sum()) for logp in (split, whole)))


# -------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_cuda_shared_gradients_equal_unshared(model, dtype, tolerance):
    """A tree against the same responses each with a prompt of its own, both on CUDA, and against float64 on
    the CPU."""
    cuda = decoder.Decoder(model.shape).to("cuda", dtype)
    cuda.load_state_dict(model.state_dict())
    unshared = [Tree(tree.prompt, [branch]) for tree, branch in PAIRS]
    want = gradients(model, (WEIGHTS * logprobs(model, pack.pack(TREES))[0]).sum())
    for trees in (TREES, unshared):
        logp, _ = logprobs(cuda, pack.pack(trees, "cuda"))
        for a, b in zip(gradients(cuda, (WEIGHTS.cuda() * logp).sum()), want):
            assert (a.cpu().double() - b).norm() <= tolerance * b.norm() + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("entropy", [False, True])
def test_cuda_chunked_logprobs_are_plain_ones(monkeypatch, entropy):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=g).cuda().requires_grad_() for n in (300, 5000))
    targets = torch.randint(0, 5000, (300,), generator=g).cuda()
    for p, q in zip(*both_ways(monkeypatch, 70, x, weight, targets, entropy)):
        assert (p - q).norm() <= 1e-4 * q.norm()
