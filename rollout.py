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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import llm
import model as decoder
import parallel
import reward
from data import InputError, apply_template, check_messages, cli, load_tokenizer, read_jsonl, write_jsonl
from model import wide

PREFILL_TOKENS = 16384  # prompt tokens per prefill pass: bounds its activations


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
        logp, token = torch.log_softmax(logits, -1).max(-1)
        return token, logp
    logp = torch.log_softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, index = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of strictly likelier tokens
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logp = torch.empty_like(logp).scatter_(-1, index, ordered).log_softmax(-1)
    p = logp.exp()
    # What has no probability cannot be drawn: neither for a target that rounds up to the total, nor where a parallel scan
    # steps up at a token of probability 0.
    cdf = p.cumsum(-1).masked_fill(p == 0, 0)
    total = cdf.amax(-1)
    target = torch.minimum(uniform.to(cdf.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    token = (cdf > target[:, None]).int().argmax(-1)  # the first such token
    return token, logp.gather(-1, token[:, None])[:, 0]


def attend_merged(q, group, G, prompt_k, prompt_v, prompt_len, own_k, own_v, own_len):
    """Attention of one new token per row over its group's prompt and its own answer, merged by log-sum-exp.

    q [n, A, D]; group [n] = place of the row among B * G; prompt_k, prompt_v [B, K, P, D], prompt_len [B];
    own_k, own_v [n, K, T, D], own_len [n] -> [n, A, D]. The prompt's keys are read once for the G rows of a group.
    """
    (n, A, D), (B, K) = q.shape, prompt_k.shape[:2]
    rep = A // K

    def part(queries, keys, values, length):  # [X, K, Y, D], [X, K, Z, D], length [X] -> output and log-sum-exp
        score = wide(queries @ keys.transpose(-1, -2)) * D ** -0.5
        hidden = torch.arange(keys.shape[2], device=q.device) >= length[:, None]
        score = score.masked_fill(hidden[:, None, None], -torch.inf)
        return score.softmax(-1).to(q.dtype) @ values, score.logsumexp(-1)

    def by_row(x):  # [B, K, G rep, ...] -> [n, A, ...]
        return x.unflatten(2, (G, rep)).transpose(1, 2).flatten(0, 1).index_select(0, group).flatten(1, 2)

    rows = q.view(n, K, rep, D)
    grouped = q.new_zeros(B * G, K, rep, D).index_copy_(0, group, rows)  # rows that have ended leave zeros
    grouped = grouped.view(B, G, K, rep, D).transpose(1, 2).reshape(B, K, G * rep, D)
    prompt_out, prompt_lse = (by_row(x) for x in part(grouped, prompt_k, prompt_v, prompt_len))
    own_out, own_lse = (x.flatten(1, 2) for x in part(rows, own_k, own_v, own_len))
    weight = torch.sigmoid(prompt_lse - own_lse)[..., None]
    return (weight * wide(prompt_out) + (1 - weight) * wide(own_out)).to(q.dtype)


class Slots:
    """Static buffers: B prompt places, B * G row places, the first n of which are active, and what each row has so far."""

    def __init__(self, model, B, G, max_prompt, max_new):
        s, weight = model.shape, model.model.norm.weight
        device, dtype = weight.device, weight.dtype
        self.G, self.device = G, device
        self.prompt_k, self.prompt_v = torch.zeros(2, s.layers, B, s.kv_heads, max_prompt, s.head_dim, device=device, dtype=dtype)
        self.own_k, self.own_v = torch.zeros(2, s.layers, B * G, s.kv_heads, max_new, s.head_dim, device=device, dtype=dtype)
        self.prompt_len = torch.ones(B, dtype=torch.long, device=device)
        self.place = torch.zeros(B * G, dtype=torch.long, device=device)  # prompt place * G + sample
        self.length = torch.zeros(B * G, dtype=torch.long, device=device)  # tokens sampled so far
        self.uniform = torch.zeros(B * G, max_new, device=device)
        self.tokens = torch.zeros(B * G, max_new, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(B * G, max_new, device=device, dtype=wide(weight[:0]).dtype)
        self.rows = []  # of each active row: [prompt index, sample, tokens so far, prompt place], the host's copy
        self.held = {}  # prompt place -> [prompt length, rows still active]

    def free_places(self):
        return [p for p in range(len(self.prompt_len)) if p not in self.held]

    def prefill(self, model, prompts, entries, noise):
        """Run prompts through the model into the cache; entries: (place, prompt index). -> logits of their G rows each."""
        ids = [prompts[i] for _, i in entries]
        tokens = torch.tensor([t for p in ids for t in p], device=self.device)
        position = torch.cat([torch.arange(len(p), device=self.device) for p in ids])
        place = torch.repeat_interleave(torch.tensor([p for p, _ in entries], device=self.device),
                                        torch.tensor([len(p) for p in ids], device=self.device))
        spans = decoder.causal_spans([len(p) for p in ids], self.device)

        def attend(layer, q, k, v):
            self.prompt_k[layer][place, :, position] = k
            self.prompt_v[layer][place, :, position] = v
            return decoder.attention(q, k, v, spans)

        ends = torch.tensor([len(p) for p in ids], device=self.device).cumsum(0) - 1
        logits = model.forward(tokens, position, attend, select=ends)  # [m, V]
        n, m, G = len(self.rows), len(entries), self.G
        new = slice(n, n + m * G)
        for p, i in entries:
            self.held[p] = [len(prompts[i]), G]
            self.prompt_len[p] = len(prompts[i])
            self.rows += [[i, g, 0, p] for g in range(G)]
        self.place[new] = torch.tensor([p * G + g for p, _ in entries for g in range(G)], device=self.device)
        self.length[new] = 0
        self.uniform[new] = torch.tensor(np.stack([noise(i, g) for _, i in entries for g in range(G)]), device=self.device)
        return logits.repeat_interleave(G, dim=0), new

    def decode(self, model):
        """One more token for every active row. -> logits [n, V]."""
        n = len(self.rows)
        row = torch.arange(n, device=self.device)
        cached = self.length[:n] - 1  # the last sampled token is not in the cache yet
        T = max(r[2] for r in self.rows)
        B = 1 + max(self.held)
        P = max(length for length, _ in self.held.values())
        place, seen = self.place[:n], self.prompt_len[:B]

        def attend(layer, q, k, v):
            self.own_k[layer][row, :, cached] = k
            self.own_v[layer][row, :, cached] = v
            return attend_merged(q, place, self.G, self.prompt_k[layer, :B, :, :P], self.prompt_v[layer, :B, :, :P], seen,
                                 self.own_k[layer, :n, :, :T], self.own_v[layer, :n, :, :T], cached + 1)

        return model.forward(self.tokens[row, cached], self.prompt_len[place // self.G] + cached, attend)

    def append(self, rows, token, logprob):
        """Note the tokens just drawn for `rows` (a slice of the active rows)."""
        at = torch.arange(rows.start, rows.stop, device=self.device)
        self.tokens[at, self.length[rows]] = token
        self.logprobs[at, self.length[rows]] = logprob
        self.length[rows] += 1
        for r in self.rows[rows]:
            r[2] += 1

    def retire(self, done):
        """Take finished rows out. done: indices of active rows, ascending -> [(prompt index, sample, tokens, logprobs)]."""
        at, out = torch.tensor(done, device=self.device), []
        for r, tokens, logprobs in zip(done, self.tokens[at].tolist(), self.logprobs[at].tolist()):
            i, g, length, place = self.rows[r]
            out.append((i, g, tokens[:length], logprobs[:length]))
            self.held[place][1] -= 1
            if self.held[place][1] == 0:
                del self.held[place]
        n = len(self.rows) - len(done)
        holes, tails = [r for r in done if r < n], sorted(set(range(n, len(self.rows))) - set(done))
        if holes:
            self.move(tails, holes)
        del self.rows[n:]
        return out

    def move(self, source, to):
        """Copy active rows over finished ones, so that the active rows stay together."""
        T = max(self.rows[r][2] for r in source)
        for r, hole in zip(source, to):
            self.rows[hole] = self.rows[r]
        source, to = torch.tensor(source, device=self.device), torch.tensor(to, device=self.device)
        for layer in (*self.own_k, *self.own_v):
            layer[to, :, :T] = layer[source, :, :T]
        for state in (self.place, self.length, self.uniform, self.tokens, self.logprobs):
            state[to] = state[source]


@torch.no_grad()
def generate(model, prompts, *, samples, max_new_tokens, temperature, ends, seed, top_p=1.0, keys=None, max_rows=320,
             max_prompts=None, bar=None, on_answer=None):
    """Sample G answers to each prompt. -> list (per prompt) of lists (per sample) of Answer.

    prompts: lists of token ids; ends: ids that end an answer; keys: a tuple of ints per prompt that names its noise
    (default: its index); max_rows: answers decoded at once; max_prompts: prompts held at once
    (default: what max_rows / samples makes); both bound the KV cache; bar: a tqdm bar that counts finished answers;
    on_answer(prompt's index, Answer): called for each as it ends.
    """
    if not prompts:
        return []
    if min(len(p) for p in prompts) == 0:
        raise InputError(f"prompt {[len(p) for p in prompts].index(0)} is empty")
    keys = [(i,) for i in range(len(prompts))] if keys is None else keys
    B = min(len(prompts), max(1, max_rows // samples), max_prompts or len(prompts))
    slots = Slots(model, B, samples, max(map(len, prompts)), max_new_tokens)
    end_ids = torch.tensor(sorted(ends), device=slots.device)
    answers = [[None] * samples for _ in prompts]
    waiting = list(range(len(prompts)))[::-1]

    def noise(i, g):
        return np.random.default_rng([seed, *keys[i], g]).random(max_new_tokens, dtype=np.float32)

    def draw(logits, rows):
        token, logprob = pick(logits, slots.uniform[rows].gather(1, slots.length[rows][:, None])[:, 0], temperature, top_p)
        slots.append(rows, token, logprob)

    while waiting or slots.rows:
        free = slots.free_places()
        if waiting and (not slots.rows or 4 * len(free) >= B):  # refill in bulk: a pass over one prompt is a slow pass
            while waiting and free:
                entries, size = [], 0
                while waiting and free and (not entries or size + len(prompts[waiting[-1]]) <= PREFILL_TOKENS):
                    entries.append((free.pop(0), waiting.pop()))
                    size += len(prompts[entries[-1][1]])
                draw(*slots.prefill(model, prompts, entries, noise))
        else:
            draw(slots.decode(model), slice(0, len(slots.rows)))
        n = len(slots.rows)
        last = slots.tokens[:n].gather(1, slots.length[:n, None] - 1)
        done = ((last == end_ids).any(1) | (slots.length[:n] == max_new_tokens)).nonzero().flatten().tolist()  # the one sync
        for i, g, tokens, logprobs in slots.retire(done) if done else ():
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
