"""The group sampler: G answers to each prompt, the prompt computed once and its keys and values kept once.

    python rollout.py --model DIR --prompts prompts.jsonl --out answers.jsonl --samples 5

A prompt is prefilled once; all its answers read that one copy, and keep only their own tokens besides. Rows that end
leave the batch, waiting prompts take the freed places. Tokens in, tokens out: what the loss sees is what was sampled,
the end token included, with the log-prob of each token under the distribution it was drawn from.

The noise of a token depends on (seed, key of its prompt, sample, position) alone, so neither the batch nor the number of
ranks nor a resume changes it. Departures from common samplers: temperature 0 is greedy and reports temperature-1 log-probs.

Letters: B prompts held at once, G samples each, n active rows, A query heads, K key/value heads, D head size, P prompt
tokens, T answer tokens, V vocabulary, L layers.
"""
import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import llm
import model as decoder
import parallel
import reward
from data import InputError, apply_template, check_messages, cli, load_tokenizer, read_jsonl, write_jsonl
from model import wide

PREFILL_TOKENS = 4096  # prompt tokens per prefill pass: bounds its activations
BLOCK = 512  # tokens of the vocabulary that pick() looks at together
EAGER_STEPS = 4  # decoding steps of a batch size before a CUDA graph is made of it: making one costs as much as a few of them


@dataclass
class Answer:
    """One sampled answer. tokens [R] end with the end token unless cut off; logprobs [R] under the sampling distribution."""
    tokens: list
    logprobs: list
    finish: str  # "stop": ended by itself; "length": cut off at max_new_tokens
    temperature: float
    top_p: float


def pick(logits, uniform, temperature, top_p=1.0):
    """Draw one token per row by inverting the cumulative distribution. logits [n, V], uniform [n] in [0, 1) ->
    (token [n], log-prob [n] under the distribution drawn from: tempered, cut to the nucleus, renormalised).

    >>> pick(torch.tensor([[0.0, 1.0, 0.0]]).log(), torch.tensor([0.5]), 1.0)[0]
    tensor([1])
    """
    logits = wide(logits)
    if temperature == 0:
        top, token = logits.max(-1)
        return token, top - logits.logsumexp(-1)
    logp = torch.log_softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, index = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of strictly likelier tokens
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logp = torch.empty_like(logp).scatter_(-1, index, ordered).log_softmax(-1)
    # In two rounds, so that only the first looks at all V numbers: which block of tokens, then which token of the block.
    p = F.pad(logp, (0, -logp.shape[1] % BLOCK), value=-torch.inf).exp_().unflatten(-1, (-1, BLOCK))  # [n, V / BLOCK, BLOCK]
    mass = p.sum(-1)
    block, target = invert(mass, uniform.to(mass.dtype) * mass.sum(-1))
    inside, _ = invert(p.gather(1, block[:, None, None].expand(-1, -1, BLOCK))[:, 0], target)
    token = block * BLOCK + inside
    return token, logp.gather(-1, token[:, None])[:, 0]


def invert(mass, target):
    """The first index at which the running sum of mass [n, X] exceeds target [n], and what of the target is left there.

    What has no mass is never chosen: neither for a target that rounds up to the total, nor where a parallel scan steps up at
    an index without mass.
    """
    cdf = mass.cumsum(-1).masked_fill_(mass == 0, 0)
    total = cdf.amax(-1)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = (cdf > target[:, None]).int().argmax(-1)
    return index, (target - (cdf - mass).gather(-1, index[:, None])[:, 0]).clamp(min=0)


def visible(length, Z, K, R, kernel):
    """What attend_cached needs to know of caches of Z keys, the first length [X] of them in use, with R queries to each of K heads.

    For the varlen kernels where sequences start; they are not told where in a cache one ends, so after each stands a gap without
    queries. Otherwise what to add to scores [X K, 1, Z].
    """
    if kernel:
        starts = torch.arange(len(length) + 1, device=length.device, dtype=torch.int32)
        cu_q = (starts * R).repeat_interleave(2, output_size=2 * len(starts))[1:]  # 0, R, R, 2 R, 2 R, ...
        cu_k = torch.stack([starts * Z, starts * Z + F.pad(length, (0, 1)).int()], 1).flatten()[:-1]  # 0, length, Z, Z + length, ...
        return cu_q, cu_k
    hidden = torch.arange(Z, device=length.device) >= length[:, None]
    return torch.where(hidden, -torch.inf, 0.0).repeat_interleave(K, dim=0)[:, None]


def attend_cached(q, k, v, seen):
    """Attention of each place's queries over the keys of its cache that are in use (seen: what `visible` says).

    q [X, K, R, D], k and v [X, Z, K, D] -> output [X, K, R, D], log-sum-exp of the scores [X, K, R]. With R query rows to a
    key head (a group's samples x the heads that share keys) the keys are read once for all of them.
    """
    (X, K, R, D), Z = q.shape, k.shape[1]
    if isinstance(seen, tuple):
        out, lse = decoder.varlen(q.transpose(1, 2).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *seen, R, Z, causal=False, lse=True)
        return out.view(X, R, K, D).transpose(1, 2), lse.reshape(X, R, K).transpose(1, 2)
    k, v = k.permute(0, 2, 3, 1).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)  # [X K, D, Z], [X K, Z, D]
    score = wide(torch.baddbmm(seen.to(q.dtype), q.flatten(0, 1), k, alpha=D ** -0.5))  # [X K, R, Z]
    p = score.softmax(-1)
    lse = score.amax(-1) - p.amax(-1).log()  # the largest p is exp(largest score - log-sum-exp)
    return torch.bmm(p.to(v.dtype), v).view(q.shape), lse.view(X, K, R)


def attend_merged(q, place, G, prompt_k, prompt_v, prompt_seen, own_k, own_v, own_seen):
    """Attention of one new token per row over its group's prompt and its own answer, merged by log-sum-exp.

    q [n, A, D]; place [n] = prompt place * G + sample, or B G for a row that nobody asks for; prompt_k, prompt_v [B, P, K, D];
    own_k, own_v [n, T, K, D]; ..._seen: what `visible` says of them -> [n, A, D]. A group's prompt is read once for its G rows.
    """
    (n, A, D), (B, _, K, _) = q.shape, prompt_k.shape
    q = q.view(n, K, A // K, D)
    grouped = q.new_zeros(B * G + 1, *q.shape[1:]).index_copy_(0, place, q)[:-1]  # rows that have ended leave zeros
    grouped = grouped.view(B, G, K, -1, D).transpose(1, 2).reshape(B, K, -1, D)  # [B, K, G A/K, D]
    at = place.clamp(max=B * G - 1)
    prompt_out, prompt_lse = (x.unflatten(2, (G, A // K))[at // G, :, at % G] for x in
                              attend_cached(grouped, prompt_k, prompt_v, prompt_seen))  # [n, K, A/K, D], [n, K, A/K]
    own_out, own_lse = attend_cached(q, own_k, own_v, own_seen)
    weight = torch.sigmoid(prompt_lse - own_lse)[..., None]
    return torch.lerp(wide(own_out), wide(prompt_out), weight).to(q.dtype).reshape(n, A, D)


def buckets(most):
    """Batch sizes that CUDA graphs are made for: at most a half more than the rows at hand, and the largest is the most there are.

    >>> buckets(40)
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    """
    sizes = {int(2 ** i * x) for i in range(most.bit_length()) for x in (1, 1.5)}
    return sorted({s for s in sizes if s < most} | {most})


class Slots:
    """Static buffers: B prompt places, B * G row places, the first n of which are active, and what each row has so far.

    static: decode with shapes that do not change, as CUDA graphs need them: batch sizes from `buckets`, caches at full length. On
    CUDA a bucket that is used for more than a few steps becomes a graph, which is valid while the weights stay where they are: for
    this rollout. The host learns one step late which rows have ended, so that it does not wait for the step it has just launched,
    and takes them out only where that makes the batch smaller or room for a prompt (until then a row that has ended stands still).
    """

    def __init__(self, model, B, G, max_prompt, max_new, ends, temperature, top_p, static):
        s, weight = model.shape, model.model.norm.weight
        device, dtype = weight.device, weight.dtype
        self.model, self.G, self.device, self.static = model, G, device, static
        self.draws = temperature, top_p

        def cache(places, tokens):  # [L, places, tokens, K, D]; on the CPU in memory head by head
            if device.type == "cpu":
                return torch.zeros(s.layers, places, s.kv_heads, tokens, s.head_dim, dtype=dtype).transpose(2, 3)
            return torch.zeros(s.layers, places, tokens, s.kv_heads, s.head_dim, dtype=dtype, device=device)

        self.prompt_k, self.prompt_v = cache(B, max_prompt).unbind(), cache(B, max_prompt).unbind()
        self.own = cache(B * G, max_new), cache(B * G, max_new)
        self.own_k, self.own_v = (x.unbind() for x in self.own)
        self.ends = torch.tensor(sorted(ends), device=device)
        self.prompt_len = torch.ones(B + 1, dtype=torch.long, device=device)  # the last: of rows that nobody asks for
        self.place = torch.full((B * G,), B * G, dtype=torch.long, device=device)  # prompt place * G + sample
        self.length = torch.ones(B * G, dtype=torch.long, device=device)  # tokens sampled so far
        self.ended = torch.ones(B * G, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(B * G, max_new, device=device)
        self.tokens = torch.zeros(B * G, max_new, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B * G, max_new, device=device, dtype=wide(weight[:0]).dtype)
        self.rows = []  # of each active row: [prompt index, sample, most tokens it may have so far, prompt place]
        self.held = {}  # prompt place -> [prompt length, rows still active]
        self.graphs = dict.fromkeys(buckets(B * G), 0)  # batch size -> its CUDA graph; before there is one, steps taken without
        self.flags, self.copied = torch.zeros(B * G, dtype=torch.bool, pin_memory=device.type == "cuda"), None

    def free_places(self):
        return [p for p in range(len(self.prompt_len) - 1) if p not in self.held]

    def prefill(self, prompts, entries, noise):
        """Run prompts through the model into the cache and draw the first tokens of their G rows; entries: (place, prompt index)."""
        ids = [prompts[i] for _, i in entries]
        lengths = torch.tensor([len(p) for p in ids], device=self.device)
        places = torch.tensor([p for p, _ in entries], device=self.device)
        tokens = torch.tensor([t for p in ids for t in p], device=self.device)
        position = torch.cat([torch.arange(len(p), device=self.device) for p in ids])
        place = places.repeat_interleave(lengths)
        spans, ends = decoder.causal_spans([len(p) for p in ids], self.device), lengths.cumsum(0) - 1
        last = decoder.Spans(torch.arange(len(ids), device=self.device), spans.k_rows, torch.ones_like(spans.k_len), spans.k_len)

        def attend(layer, q, k, v):
            self.prompt_k[layer][place, position] = k
            self.prompt_v[layer][place, position] = v
            return decoder.attention(q, k, v, last if layer == self.model.shape.layers - 1 else spans)

        logits = self.model.forward(tokens, position, attend, ends)  # [m, V]
        n, m, G = len(self.rows), len(entries), self.G
        new = slice(n, n + m * G)
        for p, i in entries:
            self.held[p] = [len(prompts[i]), G]
            self.rows += [[i, g, 1, p] for g in range(G)]
        self.prompt_len[places] = lengths
        self.place[new] = (places[:, None] * G + torch.arange(G, device=self.device)).flatten()
        self.length[new], self.ended[new] = 0, False
        self.uniform[new] = torch.tensor(np.stack([noise(i, g) for _, i in entries for g in range(G)]), device=self.device)
        self.draw(logits.repeat_interleave(G, dim=0), new)

    def step(self):
        """One more token for every active row."""
        n = len(self.rows)
        if not self.static:
            B, P = 1 + max(self.held), max(length for length, _ in self.held.values())
            self.decode(n, B, P, max(r[2] for r in self.rows))
        else:
            bucket, sizes = self.bucket(n), (*self.prompt_k[0].shape[:2], self.own_k[0].shape[1])
            if self.graphs[bucket] == EAGER_STEPS and self.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool()):
                    self.decode(bucket, *sizes)
                self.graphs[bucket] = graph
            if isinstance(self.graphs[bucket], int):
                self.decode(bucket, *sizes)
                self.graphs[bucket] = min(self.graphs[bucket] + 1, EAGER_STEPS)
            else:
                self.graphs[bucket].replay()
        for r in self.rows:
            r[2] = min(r[2] + 1, self.tokens.shape[1])

    def pool(self):
        """The memory that the graphs share: never do two of them run at once."""
        return next((g.pool() for g in self.graphs.values() if not isinstance(g, int)), None)

    def bucket(self, n):
        return next(size for size in self.graphs if size >= n)

    def decode(self, n, B, P, T):
        """The next token of rows 0 .. n - 1, all on the device: prompts in places 0 .. B - 1 of P tokens at most, answers of T."""
        row = torch.arange(n, device=self.device)
        cached = self.length[:n] - 1  # the last sampled token is not in the cache yet
        place, s, kernel = self.place[:n], self.model.shape, decoder.varlen_takes(self.own_k[0])
        K, rep = s.kv_heads, s.heads // s.kv_heads
        prompt_seen, own_seen = visible(self.prompt_len[:B], P, K, self.G * rep, kernel), visible(cached + 1, T, K, rep, kernel)

        def attend(layer, q, k, v):
            own_k, own_v = self.own_k[layer].index_put_((row, cached), k), self.own_v[layer].index_put_((row, cached), v)
            return attend_merged(q, place, self.G, self.prompt_k[layer][:B, :P], self.prompt_v[layer][:B, :P], prompt_seen,
                                 own_k[:n, :T], own_v[:n, :T], own_seen)

        self.draw(self.model.forward(self.tokens[row, cached], self.prompt_len[place // self.G] + cached, attend), slice(0, n))

    def draw(self, logits, rows):
        """Draw and note a token for each of `rows` (a slice) that has not ended."""
        row, length, ended = torch.arange(rows.start, rows.stop, device=self.device), self.length[rows], self.ended[rows]
        at = length.clamp(max=self.tokens.shape[1] - 1)
        token, logprob = pick(logits, self.uniform[row, at], *self.draws)
        self.tokens[row, at] = torch.where(ended, self.tokens[row, at], token)
        self.logprobs[row, at] = torch.where(ended, self.logprobs[row, at], logprob)
        length += ~ended
        ended |= (token[:, None] == self.ends).any(1) | (length == self.tokens.shape[1])

    def harvest(self, waiting):
        """Take out rows that have ended; waiting: whether prompts wait for a place. -> [(prompt index, sample, tokens, logprobs)]"""
        if self.static:  # as of the step before: its flags were on their way while the next was computed
            done = self.arrived()
        else:
            done = self.ended[:len(self.rows)].nonzero().flatten().tolist()  # the one sync
        out = self.retire(done) if done and self.worth_it(done, waiting) else []
        if self.static:
            self.flags.copy_(self.ended, non_blocking=True)
            self.copied = len(self.rows), torch.cuda.Event() if self.device.type == "cuda" else None
            if self.copied[1]:
                self.copied[1].record()
        return out

    def arrived(self):
        if self.copied is None:
            return []
        n, event = self.copied
        if event:
            event.synchronize()
        return self.flags[:n].nonzero().flatten().tolist()

    def worth_it(self, done, waiting):
        left, by_place = len(self.rows) - len(done), Counter(self.rows[r][3] for r in done)
        return not self.static or left == 0 or self.bucket(left) < self.bucket(len(self.rows)) \
            or waiting and any(self.held[place][1] == n for place, n in by_place.items())

    def retire(self, done):
        """Take finished rows out. done: indices of active rows, ascending -> [(prompt index, sample, tokens, logprobs)]."""
        at, out, freed = torch.tensor(done, device=self.device), [], []
        for r, length, tokens, logprobs in zip(done, self.length[at].tolist(), self.tokens[at].tolist(), self.logprobs[at].tolist()):
            i, g, _, place = self.rows[r]
            out.append((i, g, tokens[:length], logprobs[:length]))
            self.held[place][1] -= 1
            if self.held[place][1] == 0:
                del self.held[place]
                freed.append(place)
        self.prompt_len[freed] = 1  # nobody reads it any more, and decoding should not either
        n = len(self.rows) - len(done)
        holes, tails = [r for r in done if r < n], sorted(set(range(n, len(self.rows))) - set(done))
        if holes:
            self.move(tails, holes)
        self.place[n:len(self.rows)] = len(self.place)
        self.ended[n:len(self.rows)] = True
        del self.rows[n:]
        return out

    def move(self, source, to):
        """Copy active rows over finished ones, so that the active rows stay together."""
        T = max(self.rows[r][2] for r in source)
        for r, hole in zip(source, to):
            self.rows[hole] = self.rows[r]
        source, to = torch.tensor(source, device=self.device), torch.tensor(to, device=self.device)
        for cache in self.own:
            cache[:, to, :T] = cache[:, source, :T]
        for state in (self.place, self.length, self.ended, self.uniform, self.tokens, self.logprobs):
            state[to] = state[source]


@torch.inference_mode()
def generate(model, prompts, *, samples, max_new_tokens, temperature, ends, seed, top_p=1.0, keys=None, max_rows=320,
             max_prompts=None, bar=None, on_answer=None, static=None):
    """Sample G answers to each prompt. -> list (per prompt) of lists (per sample) of Answer.

    prompts: lists of token ids; ends: ids that end an answer; keys: a tuple of ints per prompt that names its noise
    (default: its index); max_rows: answers decoded at once; max_prompts: prompts held at once
    (default: what max_rows / samples makes); both bound the KV cache; bar: a tqdm bar that counts finished answers;
    on_answer(prompt's index, Answer): called for each as it ends; static: fixed shapes, as CUDA graphs (see Slots; default: on CUDA).
    """
    if not prompts:
        return []
    if min(len(p) for p in prompts) == 0:
        raise InputError(f"prompt {[len(p) for p in prompts].index(0)} is empty")
    keys = [(i,) for i in range(len(prompts))] if keys is None else keys
    B = min(len(prompts), max(1, max_rows // samples), max_prompts or len(prompts))
    static = model.model.norm.weight.is_cuda if static is None else static
    slots = Slots(model, B, samples, max(map(len, prompts)), max_new_tokens, ends, temperature, top_p, static)
    # On a CPU fewer where the model is wide: gate and up should stay in its caches.
    prefill_tokens = PREFILL_TOKENS if slots.device.type == "cuda" else min(PREFILL_TOKENS, 2 ** 21 // model.shape.mlp)
    answers = [[None] * samples for _ in prompts]
    waiting = list(range(len(prompts)))[::-1]

    def noise(i, g):
        return np.random.default_rng([seed, *keys[i], g]).random(max_new_tokens, dtype=np.float32)

    while waiting or slots.rows:
        free = slots.free_places()
        if waiting and (not slots.rows or 4 * len(free) >= B):  # refill in bulk: a pass over one prompt is a slow pass
            while waiting and free:
                entries, size = [], 0
                while waiting and free and (not entries or size + len(prompts[waiting[-1]]) <= prefill_tokens):
                    entries.append((free.pop(0), waiting.pop()))
                    size += len(prompts[entries[-1][1]])
                slots.prefill(prompts, entries, noise)
        else:
            slots.step()
        for i, g, tokens, logprobs in slots.harvest(bool(waiting)):
            finish = "stop" if tokens[-1] in ends else "length"
            answers[i][g] = Answer(tokens, logprobs, finish, temperature, top_p)
            if bar is not None:
                bar.update()
            if on_answer is not None:
                on_answer(i, answers[i][g])
    return answers


def end_ids(folder, tokenizer):
    """Token ids that end an answer: what the folder's generation_config.json and config.json name, and the tokenizer's."""
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids.update(eos if isinstance(eos, list) else [eos])
    ids.discard(None)
    if not ids:
        raise InputError(f"{folder}: neither the tokenizer nor generation_config.json names an end token")
    return ids


def text_of(tokenizer, answer, ends):
    """An answer's text without its end token."""
    tokens = answer.tokens[:-1] if answer.tokens[-1] in ends else answer.tokens
    return tokenizer.decode(tokens)


def sample_graded(model, tokenizer, turns, prompts, keys, cfg, lexicon, ends, grader=None, *, samples, temperature, top_p=1.0,
                  desc="rollout", leave=True):
    """A rollout phase: each rank samples and grades its share of the turns; all get everything (collective).

    A language model (grader) is asked as soon as an answer is there, once for identical answers to a turn, while others are
    still being sampled. -> (answers [turn][sample], graded records [turn][sample], figures: seconds of sampling and of grading
    beyond it on this rank, and over all ranks what the grader did).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, verdicts = list(range(rank, len(turns), world)), {}

    def ask(i, answer):
        turn, text = turns[mine[i]], text_of(tokenizer, answer, ends)
        if (turn["turn_id"], text) not in verdicts and reward.needs_grader(turn, text, cfg):
            verdicts[turn["turn_id"], text] = grader.submit(reward.grader_messages(grader.prompt, turn, text), reward.GRADE,
                                                            reward.check_grade)

    start = time.perf_counter()
    with decoder.gathered(model), tqdm(total=len(mine) * samples, unit="answer", desc=desc, leave=leave, disable=rank > 0) as bar:
        answers = generate(model, [prompts[i] for i in mine], keys=[keys[i] for i in mine], seed=cfg.seed, samples=samples,
                           temperature=temperature, top_p=top_p, ends=ends, max_new_tokens=cfg.rollout.max_new_tokens,
                           max_rows=cfg.rollout.max_rows, bar=bar, on_answer=ask if grader else None,
                           max_prompts=max(1, cfg.rollout.max_rows // cfg.rollout.samples))
    sampled = time.perf_counter()
    texts = [[text_of(tokenizer, a, ends) for a in group] for group in answers]
    if grader:
        grader.drain()
    flat, down = [], None
    try:
        flat = reward.grade([turns[i] for i in mine], texts, cfg, lexicon, verdicts)
    except llm.Unanswered as error:  # on this rank: the others must learn of it
        down = str(error)
    graded = [flat[i * samples:(i + 1) * samples] for i in range(len(mine))]
    figures = {"rollout_s": sampled - start, "grade_s": time.perf_counter() - sampled}
    shares = parallel.all_gather((answers, graded, grader and grader.tally.take(), down))
    if any(share[3] for share in shares):
        raise llm.Unanswered(next(share[3] for share in shares if share[3]))
    answers, graded = ([shares[i % world][part][i // world] for i in range(len(turns))] for part in (0, 1))
    if grader:
        figures |= {f"grade_{k}": v for k, v in llm.summary([share[2] for share in shares]).items()}
    return answers, graded, figures


def read_prompts(path, tokenizer):
    """{"messages": [...]} (chat template applied) or {"prompt": "..."} (as it stands) lines -> (objects, token ids)."""
    objects, prompts = [], []
    for n, obj in read_jsonl(path):
        if isinstance(obj.get("prompt"), str):
            ids = tokenizer(obj["prompt"], add_special_tokens=False).input_ids
        else:
            messages = obj.get("messages")
            rest = messages[1:] if isinstance(messages, list) and messages and isinstance(messages[0], dict) \
                and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str) else messages
            bad = check_messages(rest)
            if bad:
                raise InputError(f'{path}:{n}: expected {{"messages": [...]}} or {{"prompt": "..."}}: {bad}')
            ids = apply_template(tokenizer, messages)
        if not ids:
            raise InputError(f"{path}:{n}: the prompt is empty")
        objects.append(obj)
        prompts.append(list(ids))
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return objects, prompts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    p.add_argument("--prompts", required=True, help='JSONL of {"messages": [...]} or {"prompt": "..."}')
    p.add_argument("--out", required=True, help="JSONL: each line again, with its responses")
    p.add_argument("--samples", type=int, default=1, help="answers per prompt")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--greedy", action="store_true", help="the likeliest token each time (one answer per prompt is enough)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-rows", type=int, default=320, help="answers decoded at once (bounds the KV cache)")
    a = p.parse_args()
    for name, ok in (("samples", a.samples > 0), ("max-new-tokens", a.max_new_tokens > 0), ("temperature", 0 < a.temperature < float("inf")),
                     ("top-p", 0 < a.top_p <= 1), ("max-rows", a.max_rows >= a.samples), ("seed", a.seed >= 0)):
        if not ok:
            raise InputError(f"--{name} {getattr(a, name.replace('-', '_'))} is out of range")
    folder = decoder.resolve(a.model)
    tokenizer = load_tokenizer(folder)
    objects, prompts = read_prompts(a.prompts, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = decoder.load(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ends = end_ids(folder, tokenizer)
    with tqdm(total=len(prompts) * a.samples, unit="answer", desc="rollout") as bar:
        answers = generate(model, prompts, samples=a.samples, max_new_tokens=a.max_new_tokens, ends=ends, seed=a.seed,
                           temperature=0 if a.greedy else a.temperature, top_p=a.top_p, max_rows=a.max_rows, bar=bar)
    write_jsonl(a.out, [{**obj, "responses": [text_of(tokenizer, s, ends) for s in group],
                         "logprobs": [sum(s.logprobs) for s in group], "finish": [s.finish for s in group]}
                        for obj, group in zip(objects, answers)])
    print(f"{len(prompts)} prompts x {a.samples} -> {a.out}")


if __name__ == "__main__":
    cli(main)
