"""The group sampler: G responses to each prompt. The prompt is computed once, its keys and values kept once.

    python rollout.py --model DIR --prompts prompts.jsonl --out responses.jsonl --samples 5

All responses to a prompt read its one cache, and keep only their own tokens besides. Rows that end leave the
batch, waiting prompts take the freed places. Tokens in, tokens out: what the loss sees is what was sampled,
the end token included, with the log-prob of each token under the distribution it was drawn from.

The noise of a token depends on (seed, key of its prompt, sample, position) alone, so neither the batch nor
the number of ranks nor a resume changes it. A departure from common samplers: temperature 0 is greedy and
reports the log-probs of temperature 1.

Letters: B prompts held at once, G samples each, n active rows, A query heads, K key/value heads, D head size,
P prompt tokens, T response tokens, V vocabulary, L layers.
"""
import argparse
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, field_validator
from torch import Tensor
from tqdm import tqdm

import model as decoder
import pack
import parallel
from model import wide
from prompts import apply_template, end_ids, load_tokenizer
from records import InputError, Message, Record, as_line, cli, explain, read_jsonl, whole_file

PREFILL_TOKENS = 4096  # prompt tokens per prefill pass: bounds its activations
BLOCK = 512  # tokens of the vocabulary that pick() looks at together
EAGER_STEPS = 4  # decoding steps of a batch size before it gets a CUDA graph: making one costs a few steps


@dataclass
class Response:
    """One sampled response. tokens [R] end with the end token unless cut off."""
    tokens: list
    logprobs: list  # [R], under the distribution that the tokens were drawn from
    finish: str  # "stop": ended by itself; "length": cut off at max_new_tokens
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Sampling:
    """How to sample: the options of the command line."""
    samples: int = 1  # responses per prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_rows: int = 320  # responses decoded at once: bounds the KV cache


class Policy:
    """What can be sampled from: the weights, the tokenizer, and the token ids that end a response."""

    def __init__(self, folder):
        self.model = None  # until somebody reads the weights
        self.tokenizer = load_tokenizer(folder)
        self.ends = end_ids(folder, self.tokenizer)

    def text(self, tokens):
        """A response's text, without its end token."""
        return self.tokenizer.decode(tokens[:-1] if tokens[-1] in self.ends else tokens)


def load_policy(folder, device, dtype):
    """The whole model of a Hugging Face folder on one device -> Policy."""
    policy = Policy(folder)
    policy.model = decoder.load(folder, device, dtype)
    return policy


# ------------------------------------------------------------------------------------------------- the draw

def pick(logits, uniform, temperature, top_p=1.0):
    """Draw one token per row by inverting the cumulative distribution.

    logits [n, V], uniform [n] in [0, 1) -> token [n], log-prob [n] under the distribution drawn from:
    tempered, cut to the nucleus, renormalised.

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
        likelier = ordered.exp().cumsum(-1) - ordered.exp()  # mass of strictly likelier tokens
        ordered = ordered.masked_fill(likelier >= top_p, -torch.inf)
        logp = torch.empty_like(logp).scatter_(-1, index, ordered).log_softmax(-1)
    # In two rounds, so that only the first looks at all V numbers: which block, then which of its tokens.
    p = F.pad(logp, (0, -logp.shape[1] % BLOCK), value=-torch.inf).exp_()
    p = p.unflatten(1, (-1, BLOCK))  # [n, V / BLOCK, BLOCK]
    mass = p.sum(-1)
    block, target = invert(mass, uniform.to(mass.dtype) * mass.sum(-1))
    p = p.take_along_dim(block[:, None, None], 1)  # [n, 1, BLOCK]
    inside, _ = invert(p[:, 0], target)
    token = block * BLOCK + inside
    return token, logp.gather(1, token[:, None])[:, 0]


def invert(mass, target):
    """The first index at which the running sum of mass [n, X] exceeds target [n], and the rest of the target.

    An index without mass is never chosen: neither for a target that rounds up to the total, nor where a
    parallel scan steps up at such an index.
    """
    cdf = mass.cumsum(-1).masked_fill_(mass == 0, 0)
    total = cdf.amax(-1)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = (cdf > target[:, None]).int().argmax(-1)
    return index, (target - (cdf - mass).gather(-1, index[:, None])[:, 0]).clamp(min=0)


# ------------------------------------------------------------------------------------ attention over caches

@dataclass
class Cache:
    """A layer's keys and values of X places with room for Z tokens each, and which of them are in use."""
    k: Tensor  # [X, Z, K, D]
    v: Tensor
    seen: Any  # what visible() says


def visible(length, Z, K, R, kernel):
    """Which keys the R queries to each of K heads see: of each place's Z the first length [X].

    kernel: for the varlen kernels, where sequences start; after each place's keys in use comes a gap that no
    query reads. Otherwise what to add to the scores [X K, 1, Z].
    """
    if kernel:
        queries = torch.stack([torch.full_like(length, R), torch.zeros_like(length)], 1)
        keys = torch.stack([length, Z - length], 1)
        ends = torch.stack([queries, keys]).flatten(1).cumsum(1)  # [2, 2 X]
        q, k = F.pad(ends, (1, 0)).int()
        return decoder.Starts(q, k, R, Z)
    hidden = torch.arange(Z, device=length.device) >= length[:, None]
    return torch.where(hidden, -torch.inf, 0.0).repeat_interleave(K, 0)[:, None]


def attend_cached(q, cache):
    """Attention of each place's queries over the keys of its cache that are in use.

    q [X, K, R, D] -> output [X, K, R, D], log-sum-exp of the scores [X, K, R]. With R queries to a key head
    (a group's samples x the heads that share keys) the keys are read once for all of them.
    """
    X, K, R, D = q.shape
    if isinstance(cache.seen, decoder.Starts):
        q, k, v = (x.flatten(0, 1) for x in (q.transpose(1, 2), cache.k, cache.v))
        out, lse = decoder.varlen(q, k, v, cache.seen, causal=False, lse=True)
        return out.view(X, R, K, D).transpose(1, 2), lse.reshape(X, R, K).transpose(1, 2)
    k = cache.k.permute(0, 2, 3, 1).flatten(0, 1)  # [X K, D, Z]
    v = cache.v.transpose(1, 2).flatten(0, 1)  # [X K, Z, D]
    score = torch.baddbmm(cache.seen.to(q.dtype), q.flatten(0, 1), k, alpha=D ** -0.5)  # [X K, R, Z]
    score = wide(score)
    p = score.softmax(-1)
    lse = score.amax(-1) - p.amax(-1).log()  # the largest p is exp(largest score - log-sum-exp)
    return torch.bmm(p.to(v.dtype), v).view(q.shape), lse.view(X, K, R)


def attend_merged(q, place, G, prompts, own):
    """Attention of one new token per row over its group's prompt and its own response, merged by log-sum-exp.

    q [n, A, D]; place [n] = prompt place * G + sample, or B G for an idle row; prompts: Cache of B places;
    own: Cache of n rows -> [n, A, D]. A group's prompt is read once for its G rows.
    """
    n, A, D = q.shape
    B, _, K, _ = prompts.k.shape
    q = q.view(n, K, A // K, D)
    grouped = q.new_zeros(B * G + 1, *q.shape[1:])  # zeros stay where a row has ended
    grouped.index_copy_(0, place, q)
    grouped = grouped[:-1].view(B, G, K, -1, D).transpose(1, 2).reshape(B, K, -1, D)  # [B, K, G A/K, D]
    at = place.clamp(max=B * G - 1)

    def by_row(x):  # [B, K, G A/K, ...] -> [n, K, A/K, ...]
        return x.unflatten(2, (G, -1))[at // G, :, at % G]

    out, lse = map(by_row, attend_cached(grouped, prompts))
    own_out, own_lse = attend_cached(q, own)
    merged = torch.lerp(wide(own_out), wide(out), torch.sigmoid(lse - own_lse)[..., None])
    return merged.to(q.dtype).reshape(n, A, D)


# ------------------------------------------------------------------------------------------------ the batch

def buckets(most):
    """The batch sizes that get CUDA graphs, up to `most`. From 2 on each is at most a half larger than the
    last.

    >>> buckets(40)
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    """
    return sorted({min(size, most) for i in range(most.bit_length() + 1)
                   for size in (2 ** i, 3 * 2 ** i // 2)})


@dataclass
class Row:
    """An active row of the batch: a response on its way."""
    prompt: int  # the prompt's index
    sample: int
    place: int  # where the prompt's keys and values lie


class Slots:
    """Static buffers: B prompt places; B G rows, the first n of which are active; what each row has so far.

    static: decode with shapes that do not change, as CUDA graphs need them: batch sizes from buckets(),
    caches at full length. On CUDA a batch size that is used for more than a few steps gets a graph. It is
    valid while the weights stay where they are: for this rollout. The host learns one step late which rows
    have ended, so that it does not wait for the step that it has just launched. It takes them out only where
    that makes the batch smaller or gives room to a prompt; until then a row that has ended stands still.
    """

    def __init__(self, model, B, max_prompt, ends, sampling, static):
        s = model.shape
        weight = model.model.norm.weight
        cuda = weight.is_cuda
        T = sampling.max_new_tokens
        rows = B * sampling.samples
        self.model = model
        self.sampling = sampling
        self.static = static
        self.G = sampling.samples
        self.device = weight.device

        def state(*size, dtype=torch.long):
            return torch.zeros(*size, dtype=dtype, device=self.device)

        def cache(places, tokens):  # keys and values [2, L, places, tokens, K, D]
            size = (tokens, s.kv_heads) if cuda else (s.kv_heads, tokens)  # a CPU reads them head by head
            kv = state(2, s.layers, places, *size, s.head_dim, dtype=weight.dtype)
            return kv if cuda else kv.transpose(3, 4)

        self.prompt_kv = cache(B, max_prompt)
        self.own_kv = cache(rows, T)
        self.prompt_len = state(B + 1) + 1  # the last: of idle rows
        self.place = state(rows) + rows  # prompt place * G + sample; idle: B G
        self.length = state(rows) + 1  # tokens sampled so far
        self.ended = ~state(rows, dtype=torch.bool)
        self.uniform = state(rows, T + 1, dtype=torch.float32)
        self.tokens = state(rows, T + 1)  # the last column takes what a row draws after its end
        self.logprobs = state(rows, T + 1, dtype=wide(weight[:0]).dtype)
        self.index = torch.arange(rows, device=self.device)
        self.ends = self.tensor(sorted(ends))
        self.rows = []  # the active ones
        self.used = dict.fromkeys(buckets(rows), 0)  # batch size -> static steps of this size
        self.graphs = {}  # batch size -> CUDA graph
        self.pool = torch.cuda.graph_pool_handle() if cuda else None  # shared: two graphs never run at once
        self.flags = torch.zeros(rows, dtype=torch.bool, pin_memory=cuda)
        self.news = self.flags[:0]  # on the host, which rows have ended
        self.sent = torch.cuda.Event() if cuda else None

    def tensor(self, x):
        return torch.tensor(x, device=self.device)

    def prefill(self, entries, noise):
        """Run prompts through the model into the cache and draw the first tokens of their G rows.

        entries: (place, prompt index, prompt); noise(prompt index, sample): a response's uniform numbers [T].
        """
        first = pack.Branch([0], None)  # one token is asked for after each prompt
        batch = pack.pack([pack.Tree(prompt, [first]) for _, _, prompt in entries], self.device)
        at = self.tensor([p for p, _, prompt in entries for _ in prompt]), batch.positions

        def attend(layer, q, k, v):
            self.prompt_kv[0, layer][at] = k
            self.prompt_kv[1, layer][at] = v
            spans = batch.last if layer == self.model.shape.layers - 1 else batch.spans[0]
            return decoder.attention(q, k, v, spans)

        logits = self.model.forward(batch.tokens, batch.positions, attend, batch.select)
        n = len(self.rows)
        for p, i, prompt in entries:
            self.prompt_len[p] = len(prompt)
            for g in range(self.G):
                self.rows.append(Row(i, g, p))
        rows, new = self.rows[n:], slice(n, len(self.rows))
        self.place[new] = self.tensor([row.place * self.G + row.sample for row in rows])
        self.uniform[new, :-1] = self.tensor(np.stack([noise(row.prompt, row.sample) for row in rows]))
        self.length[new] = 0
        self.ended[new] = False
        self.draw(logits.repeat_interleave(self.G, 0), new)

    def step(self):
        """One more token for every active row."""
        n = len(self.rows)
        if not self.static:
            B = 1 + max(row.place for row in self.rows)
            self.decode(n, B, int(self.prompt_len[:B].max()), int(self.length[:n].max()))
            return
        n = self.bucket(n)
        if self.used[n] == EAGER_STEPS and self.pool:
            self.graphs[n] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[n], pool=self.pool):
                self.decode(n)
        self.used[n] += 1
        if n in self.graphs:
            self.graphs[n].replay()
        else:
            self.decode(n)

    def bucket(self, n):
        return next(size for size in self.used if size >= n)

    def decode(self, n, B=None, P=None, T=None):
        """The next token of rows 0 .. n - 1, all on the device. Prompts lie in places 0 .. B - 1 and have at
        most P tokens, responses have at most T. None: whole caches."""
        K = self.model.shape.kv_heads
        shared = self.model.shape.heads // K  # query heads to a key head
        row = self.index[:n]
        place = self.place[:n]
        cached = self.length[:n] - 1  # the last sampled token is not in the cache yet
        prompt_kv, own_kv = self.prompt_kv[:, :, :B, :P], self.own_kv[:, :, :n, :T]
        kernel = decoder.varlen_takes(own_kv)
        prompt_seen = visible(self.prompt_len[:-1][:B], prompt_kv.shape[3], K, self.G * shared, kernel)
        own_seen = visible(cached + 1, own_kv.shape[3], K, shared, kernel)

        def attend(layer, q, k, v):
            prompts = Cache(*prompt_kv[:, layer], prompt_seen)
            own = Cache(*own_kv[:, layer], own_seen)
            own.k[row, cached] = k
            own.v[row, cached] = v
            return attend_merged(q, place, self.G, prompts, own)

        position = self.prompt_len[place // self.G] + cached
        self.draw(self.model.forward(self.tokens[row, cached], position, attend), slice(n))

    def draw(self, logits, rows):
        """Draw and note a token for each of `rows` (a slice). Of a row that has ended nobody reads it."""
        how, row = self.sampling, self.index[rows]
        length, ended = self.length[rows], self.ended[rows]  # views: what changes them changes the rows
        token, logprob = pick(logits, self.uniform[row, length], how.temperature, how.top_p)
        self.tokens[row, length] = token
        self.logprobs[row, length] = logprob
        length += ~ended
        ended |= (token[:, None] == self.ends).any(1) | (length == how.max_new_tokens)

    def harvest(self, waiting):
        """Take out rows that have ended. waiting: whether prompts wait for a place.

        -> [(Row, tokens, logprobs)]
        """
        if not self.static:
            self.send_news()
        if self.sent:
            self.sent.synchronize()  # the one wait of a step
        # Static: as of the step before, on its way while the next was computed.
        done = self.news.nonzero().flatten().tolist()
        out = self.retire(done, waiting) if done else []
        if self.static:
            self.send_news()
        return out

    def send_news(self):
        n = len(self.rows)
        self.news = self.flags[:n].copy_(self.ended[:n], non_blocking=True)
        if self.sent:
            self.sent.record()

    def retire(self, done, waiting):
        """Take finished rows out where that helps. done: indices of active rows, ascending. -> as harvest"""
        active = len(self.rows)
        left = sorted(set(range(active)) - set(done))
        n = len(left)
        freed = {self.rows[r].place for r in done} - {self.rows[r].place for r in left}
        if self.static and n and self.bucket(n) == self.bucket(active) and not (waiting and freed):
            return []
        columns = (x[done].tolist() for x in (self.length, self.tokens, self.logprobs))
        out = [(self.rows[r], tokens[:T], logprobs[:T]) for r, T, tokens, logprobs in zip(done, *columns)]
        holes = [r for r in done if r < n]
        if holes:
            self.move(left[-len(holes):], holes)
        self.place[n:active] = len(self.place)
        self.ended[n:active] = True
        self.prompt_len[list(freed)] = 1  # nobody reads them any more, and decoding should not either
        del self.rows[n:]
        return out

    def move(self, source, to):
        """Copy active rows over finished ones, so that the active rows stay together."""
        for r, hole in zip(source, to):
            self.rows[hole] = self.rows[r]
        source, to = self.tensor([source, to])
        T = int(self.length[source].max())  # tokens in their caches are fewer
        for cache in self.own_kv:
            cache[:, to, :T] = cache[:, source, :T]
        for state in (self.place, self.length, self.ended, self.uniform, self.tokens, self.logprobs):
            state[to] = state[source]


def next_chunk(waiting, free, most):
    """The prompts of one prefill pass: at most `most` tokens, or one prompt.

    Takes them out of waiting, and their places out of free. -> [(place, prompt index, prompt)]
    """
    entries, size = [], 0
    while waiting and free:
        i, prompt = waiting[-1]
        size += len(prompt)
        if entries and size > most:
            break
        waiting.pop()
        entries.append((free.pop(0), i, prompt))
    return entries


@torch.inference_mode()
def generate(model, prompts, ends, sampling, keys=None, on_response=None, static=None):
    """Sample G responses to each prompt. -> list (per prompt) of lists (per sample) of Response.

    prompts: lists of token ids; ends: ids that end a response; keys: a tuple of ints per prompt that names
    its noise (default: its index); on_response(prompt index, Response): called for each as it ends; static:
    fixed shapes, as for CUDA graphs (see Slots; default: on CUDA). InputError: a prompt is empty.
    """
    if not prompts:
        return []
    lengths = [len(p) for p in prompts]
    if 0 in lengths:
        raise InputError(f"prompt {lengths.index(0)} is empty")
    G = sampling.samples
    B = min(max(1, sampling.max_rows // G), len(prompts))
    cuda = model.model.norm.weight.is_cuda
    static = cuda if static is None else static
    slots = Slots(model, B, max(lengths), ends, sampling, static)
    # On a CPU fewer where the model is wide: gate and up should stay in the caches.
    most = PREFILL_TOKENS if cuda else min(PREFILL_TOKENS, 2 ** 21 // model.shape.mlp)
    responses = [[None] * G for _ in prompts]
    waiting = list(enumerate(prompts))[::-1]

    def noise(i, g):
        rng = np.random.default_rng([sampling.seed, *(keys[i] if keys else (i,)), g])
        return rng.random(sampling.max_new_tokens, dtype=np.float32)

    while waiting or slots.rows:
        taken = {row.place for row in slots.rows}
        free = [place for place in range(B) if place not in taken]
        if waiting and 4 * len(free) >= B:  # in bulk: a pass over one prompt is a slow pass
            while waiting and free:
                slots.prefill(next_chunk(waiting, free, most), noise)
        else:
            slots.step()
        for row, tokens, logprobs in slots.harvest(bool(waiting)):
            response = Response(tokens, logprobs, "stop" if tokens[-1] in ends else "length",
                                sampling.temperature, sampling.top_p)
            responses[row.prompt][row.sample] = response
            if on_response:
                on_response(row.prompt, response)
    return responses


# ----------------------------------------------------------------------------------------- the command line

class PromptMessage(Message):
    """A message of --prompts."""
    role: Literal["system", "user", "assistant"]


class PromptLine(Record):
    """A line of --prompts that holds a conversation."""
    messages: list[PromptMessage] = Field(min_length=1)

    @field_validator("messages")
    @classmethod
    def system_first(cls, messages):
        roles = [m.role for m in messages]
        if roles == ["system"] or "system" in roles[1:]:
            raise ValueError("must hold a user's message, and a system message only as the first")
        return messages


def read_prompts(path, tokenizer):
    """Lines of {"messages": [...]} (chat template applied) or {"prompt": "..."} (as it stands).

    -> (the lines' objects, their token ids)
    """
    objects, prompts = [], []
    for n, obj in read_jsonl(path):
        if isinstance(obj.get("prompt"), str):
            ids = tokenizer(obj["prompt"], add_special_tokens=False).input_ids
        else:
            try:
                PromptLine.model_validate(obj)
            except ValidationError as error:
                wanted = 'expected {"messages": [...]} or {"prompt": "..."}'
                raise InputError(f"{path}:{n}: {wanted}: {explain(error)}")
            ids = apply_template(tokenizer, obj["messages"])
        if not ids:
            raise InputError(f"{path}:{n}: the prompt is empty")
        objects.append(obj)
        prompts.append(ids)
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return objects, prompts


HELP = {"samples": "responses per prompt", "max_rows": "responses decoded at once (bounds the KV cache)"}


def arguments():
    """The command line's arguments. InputError: one is out of range."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    p.add_argument("--prompts", required=True, help='JSONL of {"messages": [...]} or {"prompt": "..."}')
    p.add_argument("--out", required=True, help="JSONL: each line again, with its responses")
    for f in fields(Sampling):
        p.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default, help=HELP.get(f.name))
    p.add_argument("--greedy", action="store_true",
                   help="the likeliest token each time (one response per prompt is enough)")
    a = p.parse_args()
    bounds = {
        "samples": a.samples > 0,
        "max_new_tokens": 0 < a.max_new_tokens <= 1_000_000,
        "temperature": 0.01 <= a.temperature < math.inf,
        "top_p": 0 < a.top_p <= 1,
        "max_rows": a.max_rows >= a.samples,
        "seed": a.seed >= 0}
    for name, ok in bounds.items():
        if not ok:
            raise InputError(f"--{name.replace('_', '-')} {getattr(a, name)} is out of range")
    return a


def main():
    a = arguments()
    folder = decoder.resolve(a.model)
    policy = Policy(folder)
    objects, prompts = read_prompts(a.prompts, policy.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.model = decoder.load(folder, device, parallel.compute_dtype("auto", device))
    sampling = Sampling(a.samples, a.max_new_tokens, 0 if a.greedy else a.temperature, a.top_p, a.seed,
                        a.max_rows)
    bar = tqdm(total=len(prompts) * a.samples, unit="response", desc="rollout")
    with whole_file(a.out) as out, bar:  # whether it can be written is found before the sampling
        groups = generate(policy.model, prompts, policy.ends, sampling,
                          on_response=lambda *response: bar.update())
        for obj, group in zip(objects, groups):
            obj["responses"] = [policy.text(r.tokens) for r in group]
            obj["logprobs"] = [sum(r.logprobs) for r in group]
            obj["finish"] = [r.finish for r in group]
        out.writelines(map(as_line, objects))
    print(f"{len(prompts)} prompts x {a.samples} -> {a.out}")


if __name__ == "__main__":
    cli(main)
