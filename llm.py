"""Where the answers of extractor, grader and writer come from: a server, or a checkpoint of one's own.

    endpoint   any OpenAI-compatible server (vLLM, ...) through the openai client, whose retries respect Retry-After
    local      a Hugging Face checkpoint through this project's sampler

`rules` and `annotations` need no model (lexicon.py, hindsight.py, reward.py). Both sources give

    future = source.submit(messages, schema, check, seed)    # its result: check's value, or None, a failure that is counted
    source.drain()                                           # what has to be computed here is computed now (local)

A reply must be one JSON object that `check` accepts (ValueError says why not); one repair is asked for, then the ask has
failed: None, never a silent 0. Usable replies are kept in a file by the hash of model, messages and parameters, so that a rerun
repeats no paid call; several processes of one machine may share it. The key is read from the environment and appears nowhere else.
"""
import asyncio
import dataclasses
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from data import InputError, apply_template, identity, load_prompt, load_tokenizer

GIVE_UP = 40  # asks in a row that the server left unanswered, retries included: it is down
PROMPTS = {"extractor": "prompts/extractor.md", "grader": "prompts/grader.md", "writer": "prompts/rejected.md"}


class Unanswered(InputError):
    """The server is down, or refuses whatever it is asked."""


def open_source(role, cfg):
    """The source of a role as its config section says, with its instructions (.prompt) and counts (.tally)."""
    s = getattr(cfg.llm, role)
    if not s.model:
        raise InputError(f"llm.{role}.model is not set: the name the server knows the model by, or a Hugging Face folder")
    cache = Cache(cfg.llm.cache or Path(cfg.run_dir) / "llm_cache.sqlite")
    source = (Endpoint if s.source == "endpoint" else Local)(role, s, cache, cfg)
    source.prompt_file = s.prompt or PROMPTS[role]
    source.prompt = load_prompt(source.prompt_file)
    return source


def dump(obj):
    """Texts for a model, as JSON: none can close its own quotes, and none holds a special token such as <|im_end|> as it stands."""
    return json.dumps(obj, ensure_ascii=False).replace("<|", "\\u003c|")


def object_schema(**properties):
    """The JSON schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class Cache:
    """Replies by key in one SQLite file; safe for several processes, and whole after a kill."""

    def __init__(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path, self.local = path, threading.local()

    def db(self):  # a connection belongs to its thread
        if not hasattr(self.local, "db"):
            try:
                self.local.db = sqlite3.connect(self.path, timeout=120, isolation_level=None)
                self.local.db.execute("PRAGMA synchronous=OFF")  # safe against a killed process, not against a power cut
                self.local.db.execute("CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, text TEXT)")
            except sqlite3.Error as error:
                raise InputError(f"llm.cache: {self.path} cannot be used ({error}); name another file or remove it") from None
        return self.local.db

    def get(self, key):
        row = self.db().execute("SELECT text FROM reply WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def put(self, key, text):
        self.db().execute("INSERT OR REPLACE INTO reply VALUES (?, ?)", (key, text))


def parse_object(text):
    """The one JSON object of a reply, prose or a code fence around it allowed; ValueError where there is none, or several.

    >>> parse_object('Here: {"score": 0.5}'), parse_object('```json\\n{"a": "}"}\\n```')
    ({'score': 0.5}, {'a': '}'})
    """
    found, at, decode = [], 0, json.JSONDecoder(strict=False).raw_decode
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            at += 1
    json.dumps(found, ensure_ascii=False).encode()  # a cut emoji (half a surrogate pair) is a ValueError too
    if len(found) != 1:
        raise ValueError("no JSON object" if not found else f"{len(found)} JSON objects instead of one")
    return found[0]


class Tally:
    """What a source did. asks = answered + invalid + failed; an ask takes one or two replies, cached or called for."""

    def __init__(self):
        self.n, self.seconds, self.why = Counter(), [], None  # why: the reason of the last ask that failed

    def take(self):
        """-> (counts, seconds of each call) since the last take."""
        n, seconds, self.n, self.seconds = self.n, self.seconds, Counter(), []
        return n, seconds


def summary(takes):
    """Tallies of several ranks (or one) -> one dict of figures, latency as quantiles in seconds."""
    n, seconds = sum((t[0] for t in takes), Counter()), [x for t in takes for x in t[1]]
    p50, p95 = np.quantile(seconds, (0.5, 0.95)).tolist() if seconds else (None, None)
    kinds = ("asks", "answered", "invalid", "failed", "calls", "cached", "repairs", "tokens_in", "tokens_out")
    return {**{k: n[k] for k in kinds}, "p50_s": p50, "p95_s": p95}


def report(source):
    """A line for people about all that a source has done since its last take."""
    s = summary([source.tally.take()])
    return (f"{s['asks']} asks: {s['answered']} answered, {s['invalid']} with unusable replies, {s['failed']} unanswered; "
            f"{s['calls']} calls ({s['repairs']} repairs asked for), {s['cached']} replies from the cache; {s['tokens_in']} + {s['tokens_out']} tokens"
            + (f"; a call took {s['p50_s']:.2f} s (median), {s['p95_s']:.2f} s (95%)" if s["calls"] else "")
            + (f"; the last that failed: {source.tally.why}" if source.tally.why else ""))


def in_order(source, items, submit):
    """Yield (item, results of the futures that submit(item) gives) in input order, with a window of items under way. source:
    None where the futures are done at once."""
    window, at_once = deque(), 4 * source.s.concurrency if source else 1

    def first():
        item, futures = window.popleft()
        if source and not all(f.done() for f in futures):
            source.drain()
        return item, [f.result() for f in futures]

    for item in items:
        window.append((item, submit(item)))
        if len(window) >= at_once:
            yield first()
    while window:
        yield first()


async def answer(reply, s, cache, tally, messages, schema, check, seed):
    """One ask: from the cache or by `reply`, checked, with one repair. -> check's value or None."""
    tally.n["asks"] += 1
    key = json.dumps([s.model, messages, s.temperature, s.max_tokens, seed, schema], ensure_ascii=False, sort_keys=True)
    key = hashlib.sha256(key.encode()).hexdigest()
    known = cache.get(key)
    tally.n["cached"] += known is not None
    for attempt in (0, 1):
        if attempt or known is None:
            text = await reply(messages, schema, seed)
            if text is None:
                tally.n["failed"] += 1
                return None
            tally.n["calls"] += 1
        else:
            text = known
        try:
            value = check(parse_object(text))
            if text is not known:
                cache.put(key, text)  # also a repaired one; what cannot be used is asked for again by the next run
            tally.n["answered"] += 1
            return value
        except ValueError as error:
            tally.n["repairs"] += attempt == 0
            if text:
                messages = [*messages, {"role": "assistant", "content": text[:4000]},
                            {"role": "user", "content": f"That cannot be used: {error}. Answer again with the JSON object alone."}]
            tally.why = f"{error}, in {text[:200]!r}"
    tally.n["invalid"] += 1
    return None


class Endpoint:
    """A server that speaks the chat-completions API. Its asks run on a thread of their own, `concurrency` at once."""

    def __init__(self, role, settings, cache, cfg):
        import openai
        self.role, self.s, self.cache, self.tally, self.openai = role, settings, cache, Tally(), openai
        self.key = os.environ.get(settings.api_key_env) or "EMPTY"
        self.schema_known, self.in_a_row = True, 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = openai.AsyncOpenAI(base_url=settings.base_url, api_key=self.key, timeout=settings.timeout_s,
                                         max_retries=settings.retries)
        self.gate = asyncio.Semaphore(settings.concurrency)

    def submit(self, messages, schema, check, seed=0):
        return asyncio.run_coroutine_threadsafe(
            answer(self.reply, self.s, self.cache, self.tally, messages, schema, check, seed), self.loop)

    def drain(self):
        pass

    async def reply(self, messages, schema, seed):
        """-> text ("" where the server sent none), or None where it did not answer in spite of all retries."""
        how = dict(model=self.s.model, messages=messages, temperature=self.s.temperature, max_tokens=self.s.max_tokens, seed=seed)
        o = self.openai
        async with self.gate:
            began = time.perf_counter()
            if self.schema_known and schema:
                form = {"name": self.role, "schema": schema, "strict": True}
                how["response_format"] = {"type": "json_schema", "json_schema": form}
            try:
                try:
                    done = await self.client.chat.completions.create(**how)
                except (o.BadRequestError, o.UnprocessableEntityError):
                    if "response_format" not in how:
                        raise
                    del how["response_format"]
                    done = await self.client.chat.completions.create(**how)
                    self.schema_known = False  # a server without JSON schemas: plain JSON from now on
            except (o.AuthenticationError, o.PermissionDeniedError, o.NotFoundError) as error:
                raise self.error(error) from None
            except (o.OpenAIError, ValueError) as error:  # no answer, one that is no JSON, or this ask is refused (too long)
                self.tally.why = self.told(error)
                refused = isinstance(error, (o.BadRequestError, o.UnprocessableEntityError))  # this ask, not any: too long, say
                self.in_a_row += not refused
                if self.in_a_row >= GIVE_UP:
                    raise self.error(error) from None
                return None
            self.tally.seconds.append(time.perf_counter() - began)
        self.in_a_row = 0
        if usage := getattr(done, "usage", None):
            self.tally.n["tokens_in"] += usage.prompt_tokens or 0
            self.tally.n["tokens_out"] += usage.completion_tokens or 0
        try:
            text = done.choices[0].message.content
        except (AttributeError, IndexError, TypeError):  # a reply of another form
            text = None
        return text.encode(errors="replace").decode() if isinstance(text, str) else ""

    def told(self, error):
        return " ".join(f"{type(error).__name__}: {error}".replace(self.key, "***").split())[:300]

    def error(self, error):
        return Unanswered(f"llm.{self.role} at {self.s.base_url} ({self.s.model}, key from ${self.s.api_key_env}): {self.told(error)}; answers so far are kept, start "
                          f"again to go on")


class Local:
    """A checkpoint of one's own. Asks wait until drain(), which samples them together (collective where it is sharded)."""

    def __init__(self, role, settings, cache, cfg):
        import torch

        import model as decoder
        import parallel
        import rollout
        folder = decoder.resolve(settings.model)
        self.s = dataclasses.replace(settings, model=f"{settings.model} {identity(folder)}")  # another content, other replies
        self.cache, self.tally, self.waiting, self.batch = cache, Tally(), [], []
        self.decoder, self.rollout, self.rows = decoder, rollout, max(1, cfg.rollout.max_rows // cfg.rollout.samples)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        dtype = parallel.compute_dtype(cfg.model.dtype, device)
        many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.model = parallel.load_sharded(folder, device, dtype, trainable=False) if many else decoder.load(folder, device, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.ends = rollout.end_ids(folder, self.tokenizer)

    def submit(self, messages, schema, check, seed=0):
        future = Future()
        self.waiting.append((future, messages, schema, check, seed))
        return future

    def drain(self):
        waiting, self.waiting = self.waiting, []
        with self.decoder.gathered(self.model):
            values = asyncio.run(self.all(waiting))
        for (future, *_), value in zip(waiting, values):
            future.set_result(value)

    async def all(self, waiting):
        tasks = [asyncio.ensure_future(answer(self.reply, self.s, self.cache, self.tally, *ask)) for _, *ask in waiting]
        while True:
            for _ in range(3):  # let every task run to where it waits for a reply
                await asyncio.sleep(0)
            batch, self.batch = self.batch, []
            if not batch:
                return await asyncio.gather(*tasks)
            began = time.perf_counter()
            prompts = [apply_template(self.tokenizer, messages) for messages, *_ in batch]
            answers = self.rollout.generate(
                self.model, prompts, samples=1, max_new_tokens=self.s.max_tokens, temperature=self.s.temperature, ends=self.ends,
                seed=0, keys=[(5, seed, i) for i, (_, seed, _) in enumerate(batch)], max_rows=self.rows)
            for (_, _, future), prompt, (a,) in zip(batch, prompts, answers):
                self.tally.seconds.append(time.perf_counter() - began)
                self.tally.n["tokens_in"] += len(prompt)
                self.tally.n["tokens_out"] += len(a.tokens)
                future.set_result(self.rollout.text_of(self.tokenizer, a, self.ends))

    def reply(self, messages, schema, seed):
        future = asyncio.get_running_loop().create_future()
        self.batch.append((messages, seed, future))
        return future
