"""The sampler: against transformers' generate, in any batch, its log-probs against a plain forward, its
frequencies against the softmax; and the command line."""
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import model as decoder
import pack
import rollout
from conftest import LLAMA3_ROPE, VOCAB
from records import InputError
from rollout import Cache, Sampling, attend_merged, pick, visible
from world import alone, packed_logits, read_lines, some_prompts, tokens_of, write_lines

UNTIED = dict(tie_word_embeddings=False)
PROMPTS = some_prompts()
MORE_PROMPTS = some_prompts((7, 1, 40, 12, 3, 25, 7) * 2, seed=3)


def sample(model, prompts, ends=(), keys=None, on_response=None, static=None, **how):
    sampling = Sampling(**dict(samples=1, max_new_tokens=12) | how)
    return rollout.generate(model, prompts, set(ends), sampling, keys, on_response, static)


def watched(monkeypatch, model, prompts, samples, **how):
    """-> (what sample() returns, what each forward pass was asked). Of a pass: prompts prefilled, positions
    of its tokens, rows active before it, lengths of the prompts that these belong to."""
    passes, begun, left, forward = [], [0], Counter(), model.forward

    def watching(tokens, positions, attend, select=None):
        lengths = [len(prompts[i]) for i, n in left.items() if n]
        prefilled = 0 if select is None else len(select)
        passes.append(SimpleNamespace(prefilled=prefilled, positions=positions.tolist(), lengths=lengths,
                                      active=left.total()))
        for _ in range(prefilled):  # in the order of the prompts
            left[begun[0]] = samples
            begun[0] += 1
        return forward(tokens, positions, attend, select)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", watching)
        out = sample(model, prompts, samples=samples, on_response=lambda i, _: left.subtract([i]), **how)
    assert left.total() == 0, "on_response was called for each response"
    return out, passes


def logp_of(model, prompt, tokens, temperature=1.0):
    """Log-probs of all tokens [R, V] at the places of `tokens`, by one plain causal forward."""
    with torch.no_grad():
        logits = packed_logits(model, [prompt + tokens[:-1]])[0][len(prompt) - 1:]
    return (logits / temperature).log_softmax(-1)


def flat(groups):
    return [r for group in groups for r in group]


def close(got, want, atol):
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint("qwen2", **UNTIED)


@pytest.fixture(scope="module")
def small(folder):
    return decoder.load(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def exact(folder):
    return decoder.load(folder, "cpu", torch.float64)


@pytest.fixture(scope="module")
def frequent_ends(exact):
    """Ten tokens the model likes, as end tokens: responses then end at many different lengths."""
    drawn = torch.tensor([r.tokens for r in flat(sample(exact, PROMPTS, samples=10, seed=5))])
    return set(drawn.flatten().bincount().topk(10).indices.tolist())


# -------------------------------------------------------------------------------------------- greedy and ends

@pytest.mark.slow
@pytest.mark.parametrize("kind, overrides", [
    ("qwen2", UNTIED), ("qwen3", dict(head_dim=16, num_key_value_heads=4)),
    ("qwen2", dict(num_key_value_heads=1)), ("llama", UNTIED | dict(rope_parameters=LLAMA3_ROPE))])
def test_greedy_equals_transformers(make_checkpoint, kind, overrides):
    """Prompts of unequal lengths in one batch; several end ids, one of which is the pad id; end ids inside
    prompts."""
    from transformers import AutoModelForCausalLM
    folder, N = make_checkpoint(kind, **overrides), 16
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = decoder.load(folder, "cpu", torch.float32)
    free = [r.tokens for r in flat(sample(ours, PROMPTS, temperature=0, max_new_tokens=N))]
    rare = [t for tokens in free for t in tokens if sum(t in other for other in free) == 1]
    ends = {rare[0], rare[len(rare) // 2], rare[-1]}
    prompts = PROMPTS + [p[:2] + sorted(ends) + p[2:] for p in PROMPTS]  # an end token inside means nothing
    prompts += [p + [max(ends)] for p in prompts]  # nor at the prompt's end
    how = dict(do_sample=False, max_new_tokens=N, eos_token_id=sorted(ends), pad_token_id=max(ends))
    want = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), **how)
            for p in prompts]
    want = [w[0, len(p):].tolist() for w, p in zip(want, prompts)]
    assert {len(w) for w in want} & set(range(1, N)) and N in map(len, want), "both ways to finish occur"
    for max_rows in (1, 4, 100):
        got = flat(sample(ours, prompts, ends, temperature=0, max_new_tokens=N, max_rows=max_rows))
        assert [r.tokens for r in got] == want
        assert [r.finish for r in got] == ["stop" if w[-1] in ends else "length" for w in want]
    for p, r in zip(prompts, got):  # greedy reports the log-probs of temperature 1
        logp = logp_of(ours, p, r.tokens)
        assert r.tokens == logp.argmax(-1).tolist()
        close(r.logprobs, logp.amax(-1), 1e-4)


def test_the_end_token_is_part_of_the_response_and_of_its_logprobs(exact, frequent_ends):
    responses = flat(sample(exact, PROMPTS, frequent_ends, samples=6, max_new_tokens=10))
    free = flat(sample(exact, PROMPTS, samples=6, max_new_tokens=10))  # the same noise, no end
    for r, whole in zip(responses, free):
        assert r.tokens == whole.tokens[:len(r.tokens)] and len(whole.tokens) == 10
        assert len(r.tokens) == len(r.logprobs)
        assert not frequent_ends & set(r.tokens[:-1])
        assert r.finish == ("stop" if r.tokens[-1] in frequent_ends else "length")
        assert r.finish == "stop" or len(r.tokens) == 10
    assert {r.finish for r in responses} == {"stop", "length"}


def test_one_new_token(exact, frequent_ends):
    one, more = (flat(sample(exact, PROMPTS, frequent_ends, samples=3, max_new_tokens=n)) for n in (1, 5))
    assert [r.tokens for r in one] == [r.tokens[:1] for r in more]
    assert {r.finish for r in one} == {"stop", "length"}
    assert all(r.finish == ("stop" if r.tokens[0] in frequent_ends else "length") for r in one)


def test_nothing_to_do_and_an_empty_prompt(exact):
    assert sample(exact, []) == []
    with pytest.raises(InputError, match="prompt 1 is empty"):
        sample(exact, [[1], []])


# --------------------------------------------------------------------------- the batch changes nothing (fp64)

def joined(passes):
    """Whether prompts were prefilled while rows were under way."""
    pairs = zip(passes, passes[1:])
    return any(p.prefilled and p.active and not before.prefilled for before, p in pairs)


def moved(passes):
    """Whether a row took the place of another: those left are not just the first ones, one token further."""
    decoded = [p.positions for p in passes if not p.prefilled]
    return any(after != [x + 1 for x in before[:len(after)]]
               for before, after in zip(decoded, decoded[1:]) if len(after) < len(before))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_are_the_same_in_any_batch(monkeypatch, exact, frequent_ends, temperature):
    prompts, keys = MORE_PROMPTS, [(7, 100 + i) for i in range(len(MORE_PROMPTS))]
    first = tokens_of(sample(exact, prompts[:3], temperature=0))
    ends = frequent_ends if temperature else {tokens[5] for (tokens,) in first}
    how = dict(ends=ends, temperature=temperature, max_new_tokens=14, seed=11)
    together = sample(exact, prompts, keys=keys, samples=3, max_rows=1000, **how)
    assert len({len(r.tokens) for r in flat(together)}) > 3, "rows leave at different times"

    def check(got, want):
        assert tokens_of(got) == tokens_of(want)
        for a, b in zip(flat(got), flat(want)):
            close(a.logprobs, b.logprobs, 1e-9)
            assert a.finish == b.finish

    for max_rows, prefill_tokens in ((1, 1), (8, 30), (12, 16384), (24, 60)):
        monkeypatch.setattr(rollout, "PREFILL_TOKENS", prefill_tokens)
        for static in (False, True):
            got, passes = watched(monkeypatch, exact, prompts, 3, keys=keys, max_rows=max_rows, static=static,
                                  **how)
            check(got, together)
            assert all(p.prefilled < 2 or len(p.positions) <= prefill_tokens for p in passes)
            if max_rows > 8 and temperature:
                assert joined(passes) and (static or moved(passes))

    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    share = list(range(1, len(prompts), 3))  # what rank 1 of 3 would sample
    for some, samples, max_rows in ((order, 3, 9), (share, 3, 320), (range(len(prompts)), 2, 320)):
        got = sample(exact, [prompts[i] for i in some], keys=[keys[i] for i in some], samples=samples,
                     max_rows=max_rows, **how)
        check(got, [together[i][:samples] for i in some])


def test_fixed_shapes_and_late_news_of_the_end(exact, frequent_ends, monkeypatch):
    """What a CUDA graph will do, without the graph: only batch sizes of `buckets`, the caches whole; rows are
    taken out a step after they ended and have not grown meanwhile."""
    how = dict(ends=frequent_ends, max_new_tokens=14, seed=11)
    want = tokens_of(sample(exact, MORE_PROMPTS, samples=3, **how))
    extents, read = set(), []

    def looked_at(q, place, G, prompts, own):
        extents.add((*prompts.k.shape[:2], own.k.shape[1]))
        lengths = (prompts.seen == 0).sum(-1).view(6, -1)[:, 0]  # of the prompts in their places
        read.append(sorted(lengths.tolist()))
        return attend_merged(q, place, G, prompts, own)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "attend_merged", looked_at)
        got, passes = watched(monkeypatch, exact, MORE_PROMPTS, 3, max_rows=20, static=True, **how)
    assert tokens_of(got) == want and extents == {(6, 40, 14)}
    decoded = [p for p in passes if not p.prefilled]
    assert {18} < {len(p.positions) for p in decoded} <= set(rollout.buckets(18))
    for p, lengths in zip(decoded, read[::2], strict=True):  # two layers
        idle = [1] * (6 - len(p.lengths))  # a prompt that nobody asks about any more is not read
        assert lengths == sorted(p.lengths + idle)
    needed = sum(len(r.tokens) - 1 for r in flat(got))
    assert sum(p.active for p in decoded) > needed + 10, "rows that had ended were decoded once more"
    for p, after in zip(passes, passes[1:]):
        if p.active == after.active:
            idle = slice(p.active, None)
            assert p.positions[idle] == after.positions[idle], "rows that nobody asks for stand still"

    got, passes = watched(monkeypatch, exact, MORE_PROMPTS, 3, static=True, **how)
    assert tokens_of(got) == want  # no prompt waits: rows leave where that makes the batch smaller
    decoded = [p for p in passes if not p.prefilled]
    sizes = {p.active: len(p.positions) for p in decoded}
    assert len(sizes) == len(set(sizes.values())) > 3

    for static in (False, True):  # one row: static, the host learns a step late that it has ended
        ((one,),), passes = watched(monkeypatch, exact, PROMPTS[:1], 1, static=static, **how)
        assert len(passes) == len(one.tokens) + static


def test_max_rows_bounds_the_prompts_held_at_once(exact, monkeypatch):
    most, want = {}, None
    for max_rows in (320, 2):
        got, passes = watched(monkeypatch, exact, PROMPTS, 1, temperature=0, max_new_tokens=5,
                              max_rows=max_rows)
        want = want or tokens_of(got)
        assert tokens_of(got) == want
        most[max_rows] = max(p.active + p.prefilled for p in passes)
    assert most == {320: len(PROMPTS), 2: 2}


def test_buckets_leave_out_neither_the_top_nor_the_bottom():
    for most in range(1, 400):
        sizes = rollout.buckets(most)
        assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(set(sizes))
        assert all(b <= max(1.5 * a, a + 1) for a, b in zip(sizes, sizes[1:]))


def caches(prompts, own, length, lengths, R, kernel=False):
    """Keys and values of prompts [2, B, P, K, D] and of rows [2, n, T, K, D], with what is in use of them."""
    return [Cache(*kv, visible(n, kv.shape[2], kv.shape[3], r, kernel))
            for kv, n, r in zip((prompts, own), (length, lengths), R)]


@pytest.mark.parametrize("lengths", [(5, 1, 9), (9, 9, 9)])
def test_attention_over_caches_is_that_of_prompt_and_response_in_one(lengths):
    g = torch.Generator().manual_seed(0)
    B, G, K, rep, D, P, T = 3, 4, 2, 3, 8, 9, 6
    prompt_kv, own_kv, q = (torch.randn(size, generator=g, dtype=torch.float64)
                            for size in ((2, B, P, K, D), (2, 7, T, K, D), (7, K * rep, D)))
    q = 2 * q
    place = torch.tensor([0, 5, 6, 3, 11, B * G, B * G])  # the last two: rows that nobody asks for
    own_len = torch.tensor([1, 6, 3, 2, 4, 1, 1])
    prompts, own = caches(prompt_kv, own_kv, torch.tensor(lengths), own_len, (G * rep, rep))
    got = attend_merged(q, place, G, prompts, own)
    for i in range(5):
        b = int(place[i]) // G
        keys, values = torch.cat([prompt_kv[:, b, :lengths[b]], own_kv[:, i, :own_len[i]]], 1)
        for head in range(K * rep):
            p = torch.softmax(keys[:, head // rep] @ q[i, head] / D ** 0.5, 0)
            close(got[i, head], p @ values[:, head // rep], 1e-12)
    _, lse = rollout.attend_cached(q.view(7, K, rep, D), own)
    close(lse[1, 1, 2], torch.logsumexp(own_kv[0, 1, :6, 1] @ q[1, 5] / D ** 0.5, 0), 1e-12)


def test_where_sequences_start_for_the_varlen_kernels():
    starts = visible(torch.tensor([5, 1, 9]), 10, 2, 4, True)
    assert starts.q.tolist() == [0, 4, 4, 8, 8, 12, 12] and starts.k.tolist() == [0, 5, 10, 11, 20, 29, 30]
    assert starts.q.dtype == starts.k.dtype == torch.int32 and starts[2:] == (4, 10)


def test_same_call_twice_is_bitwise_the_same(small, frequent_ends):
    once, again = (sample(small, PROMPTS, frequent_ends, samples=4, max_rows=9) for _ in range(2))
    assert once == again


def test_noise_belongs_to_seed_key_and_sample(exact):
    def drawn(keys, seed):
        return tokens_of(sample(exact, PROMPTS[:1] * len(keys), samples=4, keys=keys, seed=seed))

    one, same, another = drawn([(0, 1), (0, 1), (0, 2)], seed=3)
    assert one == same == drawn([(0, 1)], seed=3)[0]
    seen = one + another
    for seed, key in ((4, (0, 1)), (3, (1, 0)), (0, (3, 1))):
        seen += drawn([key], seed)[0]
    assert len(set(map(tuple, seen))) == 20, "another sample, key or seed: another response"


def test_new_weights_change_the_next_rollout(folder):
    model = decoder.load(folder, "cpu", torch.float64)
    before = sample(model, PROMPTS)
    with torch.no_grad():
        for p in model.model.layers[1].parameters():
            p.add_(0.1)
    after = sample(model, PROMPTS)
    assert tokens_of(before) != tokens_of(after)
    for p, (r,) in zip(PROMPTS, after):
        close(r.logprobs, alone(model, p, r.tokens)[0], 1e-9)


# -------------------------------------------------------------------------------------------------- log-probs

def trees_of(prompts, groups):
    return [pack.Tree(p, [pack.Branch(r.tokens, None, r.logprobs) for r in group])
            for p, group in zip(prompts, groups)]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name, tolerance", [("small", 1e-4), ("exact", 1e-9)])
def test_logprobs_are_a_plain_forwards_and_the_trainers(request, frequent_ends, name, tolerance, temperature):
    model = request.getfixturevalue(name)
    groups = sample(model, PROMPTS, frequent_ends, samples=3, temperature=temperature, max_rows=9)
    batch = pack.pack(trees_of(PROMPTS, groups), dtype=torch.float64)
    with torch.no_grad():
        trainer, _ = pack.logprobs(model, batch, temperature)
    close(batch.sampled, trainer, tolerance)
    for p, group in zip(PROMPTS, groups):
        for r in group:
            assert (r.temperature, r.top_p) == (temperature, 1.0)
            close(r.logprobs, alone(model, p, r.tokens, temperature)[0], tolerance)


def nucleus(logp, top_p):
    """The smallest set of likeliest tokens that holds top_p of the mass, renormalised; one row, in plain
    Python."""
    kept, mass, values = [], 0.0, logp.tolist()
    for t in sorted(range(len(values)), key=lambda t: -values[t]):
        if mass >= top_p:
            break
        kept.append(t)
        mass += math.exp(values[t])
    out = torch.full_like(logp, -torch.inf)
    out[kept] = logp[kept] - math.log(mass)
    return out


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_is_cut_and_renormalised(exact, top_p):
    groups, seen = sample(exact, PROMPTS, samples=4, temperature=1.3, top_p=top_p), set()
    for p, group in zip(PROMPTS, groups):
        for r in group:
            assert r.top_p == top_p
            rows = [nucleus(row, top_p) for row in logp_of(exact, p, r.tokens, 1.3)]
            close(r.logprobs, [row[t] for row, t in zip(rows, r.tokens)], 1e-6)
            seen.add(tuple(r.tokens))
    assert top_p < 0.1 or len(seen) > len(PROMPTS)


# --------------------------------------------------------------------------------------------------- the draw

def chi_square_fits(drawn, probs):
    """Pearson's test against `probs`, classes with fewer than 8 expected pooled: within 4 sigma of its
    expectation."""
    counts, expected = drawn.bincount(minlength=VOCAB).double(), probs * len(drawn)
    rare = expected < 8
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    keep = expected > 0
    assert counts[~keep].sum() == 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum().item()
    df = int(keep.sum()) - 1
    return statistic < df + 4 * (2 * df) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 1.0), (1.0, 0.6)])
def test_frequencies_are_the_softmax(exact, temperature, top_p):
    how = dict(samples=6000, max_new_tokens=2, temperature=temperature, top_p=top_p)
    drawn = torch.tensor(tokens_of(sample(exact, PROMPTS[:1], **how))[0])

    def distribution(tokens):
        logp = logp_of(exact, PROMPTS[0], tokens, temperature)[-1]
        return (nucleus(logp, top_p) if top_p < 1 else logp).exp()

    first, probs = drawn[:, 0], distribution([0])
    assert chi_square_fits(first, probs)
    other = probs.pow(1.2)  # the test would notice a temperature a little off
    assert not chi_square_fits(first, other / other.sum())
    top = first.mode().values.item()  # and of the second token given the first: the decode pass
    second = drawn[first == top, 1]
    assert len(second) > 300 and chi_square_fits(second, distribution([top, 0]))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_pick_never_draws_the_impossible(top_p):
    """float32, 150,000 tokens, uniform numbers at both ends of [0, 1); impossible tokens first, last and
    between."""
    V, below_one = 150_000, 1 - 2 ** -24
    g = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randn(V, generator=g) * 3, torch.randn(V, generator=g) * 60,
                          torch.full((V,), -200.0), *torch.zeros(5, V)])
    for impossible in (slice(5000), slice(-5000, None), slice(50_000, 60_000)):
        logits[:, impossible] = -torch.inf
    logits[2, 70_000] = 5.0  # one token has it all, the others underflow
    for i in range(3, 8):  # flat: rounding makes the probabilities add up to a little less or more than 1
        logits[i, 60_000 + 9_000 * i:] = -torch.inf
    totals = logits.log_softmax(-1).exp().cumsum(-1)[:, -1]
    assert totals.min() < below_one and totals.max() > 1, "both happen here"
    for u in (0.0, 2 ** -24, 0.5, below_one):
        token, logp = pick(logits, torch.full((8,), u), 1.0, top_p)
        assert logits.gather(1, token[:, None]).isfinite().all() and logp.isfinite().all()
        assert logits.softmax(-1).gather(1, token[:, None]).gt(0).all()
        assert token[2] == 70_000
    if top_p == 1:
        grid = torch.tensor([0.0, 0.25, 0.5, 0.75, below_one])
        token, logp = pick(torch.zeros(5, V), grid, 1.0)
        assert (token - grid * V).abs().max() <= V * 1e-4, "the cumulative distribution keeps its precision"
        torch.testing.assert_close(logp, -torch.full((5,), float(V)).log())


@pytest.mark.parametrize("block", [1, 3, 8, 512])
def test_pick_block_by_block_is_pick(monkeypatch, block):
    monkeypatch.setattr(rollout, "BLOCK", block)
    g = torch.Generator().manual_seed(block)
    logits = 4 * torch.randn(500, 37, generator=g, dtype=torch.float64)
    logits[:, 5:9] = -torch.inf
    uniform = torch.rand(500, generator=g, dtype=torch.float64)
    token, logp = pick(logits, uniform, 0.7)
    want = torch.searchsorted((logits / 0.7).softmax(-1).cumsum(-1), uniform[:, None])
    assert token.tolist() == want[:, 0].tolist() and len(set(token.tolist())) > 20
    torch.testing.assert_close(logp, (logits / 0.7).log_softmax(-1).gather(1, want)[:, 0])


def test_pick_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]], dtype=torch.float64).log()
    cases = {0.0: 0, 0.0999: 0, 0.1001: 1, 0.2999: 1, 0.3001: 3, 0.5999: 3, 0.6001: 4, 0.9999: 4}
    token, logp = pick(logits.expand(len(cases), -1), torch.tensor(list(cases)), 1.0)
    assert token.tolist() == list(cases.values())
    torch.testing.assert_close(logp, logits[0, token])
    assert pick(logits, torch.tensor([0.0]), 0)[0].item() == 4
    token, logp = pick(logits.expand(2, -1), torch.tensor([0.0, 0.999]), 1.0, top_p=0.5)
    assert token.tolist() == [3, 4]
    close(logp.exp(), [3 / 7, 4 / 7], 1e-9)  # {0.4, 0.3} renormalised
    assert pick(logits.half(), torch.tensor([0.3001]), 1.0)[0].item() == 3


# ------------------------------------------------------------------------------------------- the command line

CONVERSATION = [{"role": "system", "content": "Ask."}, {"role": "user", "content": "咳嗽 😷"},
                {"role": "assistant", "content": "Since when?"}, {"role": "user", "content": "Monday"}]


def test_cli_messages_and_prompts(call, capsys, tmp_path, tiny_checkpoint, tiny_tokenizer):
    lines = [{"messages": CONVERSATION, "id": "a"}, {"prompt": "Sore throat"},
             {"messages": CONVERSATION[1:2], "note": {"é": 1}}]
    prompts, out = write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "deep" / "out.jsonl"
    cough = "<|im_start|>user\n咳嗽 😷<|im_end|>\n<|im_start|>assistant\n"
    texts = ["<|im_start|>system\nAsk.<|im_end|>\n" + cough + "Since when?<|im_end|>\n"
             "<|im_start|>user\nMonday<|im_end|>\n<|im_start|>assistant\n", "Sore throat", cough]
    ids = [tiny_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert ids[0][0] == 257 and 258 in ids[0]
    policy = rollout.load_policy(tiny_checkpoint, "cpu", torch.float32)
    drawn = ("--samples", 3, "--seed", 4, "--temperature", 0.8)
    written = []
    for options, how in ((drawn, dict(samples=3, seed=4, temperature=0.8)), (drawn, None),
                         (("--greedy",), dict(temperature=0))):
        call(rollout, "--model", tiny_checkpoint, "--prompts", prompts, "--out", out, "--max-new-tokens", 6,
             *options)
        assert str(out) in capsys.readouterr().out
        written.append(out.read_bytes())
        if how is None:
            assert written[0] == written[1], "a rerun replaces the file, with the same"
            continue
        want = sample(policy.model, ids, ends={258}, max_new_tokens=6, **how)
        for line, row, group in zip(lines, read_lines(out), want, strict=True):
            texts = [policy.text(r.tokens) for r in group]
            assert row.pop("responses") == texts and len(set(texts)) == len(group)
            assert row.pop("logprobs") == [pytest.approx(sum(r.logprobs)) for r in group]
            assert row.pop("finish") == [r.finish for r in group]
            assert row == line


# -------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
def test_cuda_sampler_agrees_with_the_cpu(folder, small, frequent_ends):
    """bfloat16: its log-probs equal the CPU's (at its own tokens) and the trainer's on CUDA, up to
    rounding."""
    cuda = decoder.load(folder, "cuda", torch.bfloat16)
    groups, again = (sample(cuda, PROMPTS, frequent_ends, samples=4, max_rows=12) for _ in range(2))
    assert again == groups
    batch = pack.pack(trees_of(PROMPTS, groups), "cuda")
    with torch.no_grad():
        trainer, _ = pack.logprobs(cuda, batch)
    exact = torch.cat([alone(small, p, r.tokens)[0] for p, group in zip(PROMPTS, groups) for r in group])
    assert (batch.sampled - trainer).abs().mean() < 0.05
    assert (batch.sampled.cpu() - exact).abs().mean() < 0.1


@pytest.mark.gpu
def test_cuda_greedy_equals_cpu_in_float32(folder, small, frequent_ends):
    cuda = decoder.load(folder, "cuda", torch.float32)
    got, want = (sample(model, PROMPTS, frequent_ends, temperature=0, max_rows=3) for model in (cuda, small))
    assert tokens_of(got) == tokens_of(want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_decode_what_eager_decoding_does(monkeypatch, folder, frequent_ends, dtype):
    model, replayed = decoder.load(folder, "cuda", dtype), []
    monkeypatch.setattr(rollout, "EAGER_STEPS", 1)
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: (replayed.append(g), replay(g))[1])
    how = dict(samples=3, max_new_tokens=14, max_rows=20)
    eager, graphs = (flat(sample(model, MORE_PROMPTS, frequent_ends, static=static, **how))
                     for static in (False, True))
    assert len(replayed) > len(set(map(id, replayed))) > 1
    same = [a.tokens == b.tokens for a, b in zip(eager, graphs)]
    # in bfloat16 other batch sizes round otherwise
    assert all(same) if dtype == torch.float32 else sum(same) > 0.8 * len(same)


@pytest.mark.gpu
@pytest.mark.parametrize("A, K", [(8, 2), (4, 4)])
def test_cuda_attention_over_caches_equals_the_cpus(A, K):
    g = torch.Generator().manual_seed(0)
    B, G, D, P, T, n = 3, 5, 64, 300, 40, 9
    prompt_kv, own_kv, q = (torch.randn(size, generator=g).bfloat16()
                            for size in ((2, B, P, K, D), (2, n, T, K, D), (n, A, D)))
    place, length = torch.randperm(B * G, generator=g)[:n], torch.tensor([300, 7, 120])
    own_len = torch.randint(1, T + 1, (n,), generator=g)

    def run(device, dtype, kernel):
        queries, *kv = (x.to(device, dtype) for x in (2 * q, prompt_kv, own_kv))
        at, *lengths = (x.to(device) for x in (place, length, own_len))
        prompts, own = caches(*kv, *lengths, (G * A // K, A // K), kernel)
        return attend_merged(queries, at, G, prompts, own).cpu().double()

    want, got = run("cpu", torch.float64, False), run("cuda", torch.bfloat16, True)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.gpu
def test_cuda_pick_never_draws_the_impossible():
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(64, 150_000, device="cuda", generator=generator) * 3
    logits[:, 1::2] = -torch.inf
    for u in (0.0, 0.3, 0.99, 1 - 2 ** -24):
        for top_p in (1.0, 0.9):
            assert pick(logits, torch.full((64,), u, device="cuda"), 1.0, top_p)[1].isfinite().all()


def test_a_prefill_pass_takes_prompts_up_to_its_size():
    waiting, free = [(2, [0] * 3), (1, [0] * 2), (0, [0] * 4)], [5, 6, 7]
    assert [i for _, i, _ in rollout.next_chunk(waiting, free, 6)] == [0, 1] and free == [7]
