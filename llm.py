"""Where the replies of extractor, grader and writer come from: a server, or a checkpoint of your own.

    endpoint   any OpenAI-compatible server (vLLM, ...) through the openai client; it respects Retry-After
    local      a Hugging Face checkpoint, sampled by this project (rollout.py)

The sources `rules` and `annotations` need no model (reward.py, hindsight.py). Both sources here give

    future = source.submit(messages, Grade, seed)   # see Ask; its result: a Grade, or None for a failure
    source.drain()                                  # a local model computes now; an endpoint began at submit

where Grade is a class derived from records.Reply: it names the fields, checks them and gives the JSON schema
that is sent. A reply must hold one JSON object that the class accepts. If it does not, the fault is named and
one more reply is asked for. After that the ask is given up and counted: its result is None, never a silent 0.

Usable replies are kept in a file (llm.cache) by a hash of server, model, messages, sampling parameters and
schema, so that a rerun repeats no paid call. Several processes of one machine may share it: what one of them
asks a server, the others wait for. The key to the server comes from the environment and appears nowhere else:
where the server sends it back, it reads ***.
"""
import asyncio
import fcntl
import functools
import itertools
import json
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from config import Stream, need
from prompts import PROMPTS, apply_template, escape, load_prompt
from records import InputError, explain, flaw, hash_of, identity, shorten

LONGEST, BRACES = 500_000, 2000  # a longer reply, or one with more braces, is not read
GIVE_UP = 40  # asks in a row that the server left unanswered, retries included: it is down


class Unanswered(InputError):
    """The server is down, or refuses whatever it is asked."""


def open_source(role, cfg):
    """The source of a role as the config describes it, with its instructions (.prompt) and counts (.tally).

    Raises InputError where no model is named, or where model, prompt or cache cannot be used.
    """
    settings = getattr(cfg.llm, role)
    need(cfg, f"llm.{role}.model")
    cache = Cache(cfg.llm.cache or cfg.run_path / "llm_cache.sqlite")
    source = (Endpoint if settings.source == "endpoint" else Local)(role, settings, cfg)
    source.cache, source.tally = cache, Tally()
    source.prompt_file = settings.prompt or PROMPTS[role]
    source.prompt = load_prompt(source.prompt_file)
    return source


@functools.cache
def say(text):
    """Print it, but only once."""
    print(text)


class Cache:
    """Texts by what was asked (any JSON), in an SQLite file. Several processes may use it at once.

    It belongs to one source, whose asks all run on one thread. Where the file fails on the way, nothing is
    found or kept, which is said once.
    """

    def __init__(self, path):
        self.path = path
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=120, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA synchronous=OFF")  # a kill loses nothing; a power cut may
            self.db.execute("CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, text TEXT)")
            self.claims = open(f"{path}.claims", "w")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"llm.cache: {path} cannot be used ({error}): make room, name another file or "
                             "remove it")

    def run(self, sql, *values):
        """-> the first row, or None where there is none."""
        try:
            return self.db.execute(sql, values).fetchone()
        except sqlite3.Error as error:
            say(f"warning: llm.cache: {self.path}: {error}; what it does not hold is asked again")

    def get(self, what):
        row = self.run("SELECT CAST(text AS TEXT) FROM reply WHERE key = ?", hash_of(what))
        return row and row[0]

    def put(self, what, text):
        self.run("INSERT OR REPLACE INTO reply VALUES (?, ?)", hash_of(what), text)

    def claim(self, what, how=fcntl.LOCK_EX | fcntl.LOCK_NB):
        """Is this for us to ask? Not while another process asks it. A claim is the lock of one byte, which a
        hash names. It ends by LOCK_UN, or with its process."""
        try:
            return not fcntl.lockf(self.claims, how, 1, int(hash_of(what)[:15], 16))
        except BlockingIOError:
            return False


def parse_object(text):
    """The one JSON object of a reply. Prose or a code fence may stand around it, <think> before it.

    Raises ValueError where there is no object, or more than one, or more text than any reply needs.

    >>> parse_object('Here: {"score": 0.5}'), parse_object('```json\\n{"a": "}"}\\n```')
    ({'score': 0.5}, {'a': '}'})
    """
    text = re.sub(r"\A\s*<think>.*?(</think>|\Z)", "", text, flags=re.S)
    if len(text) > LONGEST or text.count("{") > BRACES:
        raise ValueError(f"more than {LONGEST:,} characters or {BRACES:,} braces")
    found, at, decode = [], 0, json.JSONDecoder(strict=False).raw_decode
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            at += 1
    if fault := flaw(found):
        raise ValueError(fault)
    if len(found) != 1:
        raise ValueError(f"{len(found)} JSON objects instead of one" if found else "no JSON object")
    return found[0]


@functools.cache
def schema_of(reply_class):
    return reply_class.model_json_schema()


# ---------------------------------------------------------------------------------- what a source has done

KINDS = "asks answered invalid failed calls cached repairs tokens_in tokens_out".split()


class Tally:
    """What a source did. asks = answered + invalid + failed; an ask takes one or two replies."""

    def __init__(self):
        self.n, self.seconds = Counter(), []
        self.why = None  # the reason of the last failure

    def take(self):
        """-> (counts, seconds of each call) since the last take."""
        taken = self.n, self.seconds
        self.n, self.seconds = Counter(), []
        return taken


def summary(takes):
    """What Tally.take gave on each rank -> one dict of figures, latency as quantiles in seconds."""
    counts, seconds = zip(*takes)
    n, seconds = sum(counts, Counter()), sum(seconds, [])
    p50, p95 = np.quantile(seconds, (0.5, 0.95)).tolist() if seconds else (None, None)
    return {**{kind: n[kind] for kind in KINDS}, "p50_s": p50, "p95_s": p95}


def report(source):
    """One line of text about all that a source has done since its last take."""
    s = summary([source.tally.take()])
    line = (f"{s['asks']} asks: {s['answered']} answered, {s['invalid']} with unusable replies, "
            f"{s['failed']} unanswered; {s['calls']} calls ({s['repairs']} repairs asked for), "
            f"{s['cached']} replies from the cache; {s['tokens_in']} + {s['tokens_out']} tokens")
    if s["calls"]:
        line += f"; a call took {s['p50_s']:.2f} s (median), {s['p95_s']:.2f} s (95%)"
    if source.tally.why:
        line += f"; the last that failed: {source.tally.why}"
    return line


def in_order(source, items, submit):
    """Yield (item, results of the futures that submit(item) gives) in the order of the items.

    A window of 4 x concurrency items is under way at once.
    """
    pending = ((item, submit(item)) for item in items)
    window = list(itertools.islice(pending, 4 * source.settings.concurrency))
    while window:
        item, futures = window.pop(0)
        if not all(f.done() for f in futures):
            source.drain()
        yield item, [f.result() for f in futures]
        window += itertools.islice(pending, 1)


# -------------------------------------------------------------------------------------- one ask, step by step

class Ask:
    """One question to a language model: from the cache or a first reply, at most one repair, then the end.

    A source calls look(), then take() with each reply to `request`, until the ask is `over`. The result is an
    instance of reply_class, or None: the ask is invalid (two unusable replies) or failed (no reply).

    context: what the validators of reply_class may read.
    """

    def __init__(self, source, messages, reply_class, seed=0, context=None):
        self.source, self.reply_class, self.context = source, reply_class, context
        self.result, self.repaired, self.over = None, False, False
        s = source.settings
        self.request = {"model": s.model, "messages": messages, "temperature": s.temperature,
                        "max_tokens": s.max_tokens, "seed": seed}  # as the chat-completions API has it
        self.what = [s.base_url, self.request, schema_of(reply_class)]  # decides the reply
        source.tally.n["asks"] += 1

    def look(self):
        """Take the reply that is kept, if there is one."""
        known = self.source.cache.get(self.what)
        if known is not None:
            self.take(known, "cached")

    def take(self, text, origin="calls"):
        """A reply, a ValueError that says why it holds no text, or None where there was none in spite of all
        retries. One that cannot be used is repaired: the request is then to be sent once more, and says what
        was wrong."""
        tally = self.source.tally
        if text is None:
            return self.end("failed")
        tally.n[origin] += 1
        fault, text = (text, "") if isinstance(text, ValueError) else (None, text)
        try:  # the schema forbids further keys, but a reply that has some is usable
            if fault:
                raise fault
            self.result = self.reply_class.model_validate(parse_object(text), context=self.context,
                                                          extra="ignore")
        except (ValueError, RecursionError) as error:
            fault = explain(error) if isinstance(error, ValidationError) else error
        else:
            if origin == "calls":  # an unusable reply is not kept: the next run asks again
                self.source.cache.put(self.what, text)
            return self.end("answered")
        tally.why = f"{fault}, in {text[:200]!r}"
        if self.repaired:
            return self.end("invalid")
        self.repaired = True
        tally.n["repairs"] += 1
        if text:  # an empty reply is not shown again
            wanted = escape(f"That cannot be used: {fault}. Answer again with the JSON object alone.")
            messages = [*self.request["messages"], {"role": "assistant", "content": escape(text[:4000])},
                        {"role": "user", "content": wanted}]
            self.request = {**self.request, "messages": messages}

    def end(self, outcome):
        self.source.tally.n[outcome] += 1
        self.over = True


# ------------------------------------------------------------------------------------------------ the sources

REFUSED = (400, 422)  # HTTP: the server refuses this ask (too long, say), not any
DENIED = (401, 403, 404)  # HTTP: it will answer no ask


async def whole(send, seconds, *args, **more):
    """An HTTP client's send(*args, **more), in so many seconds from first to last. A server may drip."""
    try:
        async with asyncio.timeout(seconds):
            return await send(*args, **more)
    except TimeoutError:
        import httpx2  # what openai is made with
        raise httpx2.ReadTimeout("")  # after which it tries again


class Endpoint:
    """A server with the chat-completions API. Asks run on a thread of their own, `concurrency` at once."""

    def __init__(self, role, settings, cfg):
        import openai
        self.role, self.settings, self.openai = role, settings, openai
        key = os.environ.get(settings.api_key_env, "").strip()
        if not re.fullmatch("[ -~]*", key):
            raise InputError(f"llm.{role}.api_key_env: ${settings.api_key_env} holds a character "
                             "that no header can carry: set it to the key alone")
        # What a server sends back may hold the key, however JSON or a URL escapes it. One of a few characters
        # is none.
        forms = "".join(rf"\\{{0,9}}({re.escape(c)}|u{ord(c):04x}|%(25)*{ord(c):02x})" for c in key)
        self.key = re.compile(forms if len(key) > 7 else "(?!)", re.I)
        http = openai.DefaultAsyncHttpxClient(timeout=None)
        http.send = functools.partial(whole, http.send, settings.timeout_s)
        try:
            self.client = openai.AsyncOpenAI(base_url=settings.base_url, api_key=key or "EMPTY",
                                             http_client=http, max_retries=settings.retries)
        except Exception as error:  # httpx has several for what is no address
            raise InputError(f"llm.{role}.base_url={settings.base_url} cannot be used ({error})")
        self.schema_known, self.in_a_row = True, 0
        self.gate = asyncio.Semaphore(settings.concurrency)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, *question, **more):
        return asyncio.run_coroutine_threadsafe(self.answer(*question, **more), self.loop)

    def drain(self):
        pass

    async def answer(self, *question, **more):
        ask = Ask(self, *question, **more)
        while not self.cache.claim(ask.what):
            await asyncio.sleep(0.1)
        try:
            ask.look()  # here, as the cache belongs to this thread
            while not ask.over:
                ask.take(await self.call(ask))
        finally:
            self.cache.claim(ask.what, fcntl.LOCK_UN)
        return ask.result

    async def call(self, ask):
        """-> the reply's text, a ValueError that says why it holds none, or None where all retries gave none.

        Raises Unanswered where the server denies everything, or has left GIVE_UP asks in a row unanswered.
        """
        async with self.gate:
            began = time.perf_counter()
            try:
                response = await self.complete(ask)
            except Exception as error:  # whatever the client cannot do
                return self.unanswered(error)
            self.tally.seconds.append(time.perf_counter() - began)
        self.in_a_row = 0
        return self.text_of(response.content)

    async def complete(self, ask):
        """One call of the API, with the JSON schema of the reply if the server takes schemas."""
        create = functools.partial(self.client.chat.completions.with_raw_response.create, **ask.request)
        if self.schema_known:
            schema = {"name": self.role, "schema": schema_of(ask.reply_class), "strict": True}
            try:
                return await create(response_format={"type": "json_schema", "json_schema": schema})
            except self.openai.APIStatusError as error:
                if error.status_code not in REFUSED:
                    raise
        response = await create()
        self.schema_known = False  # what the server refused was the schema: plain JSON from now on
        say(f"llm.{self.role}: {self.settings.base_url} takes no JSON schema: it is asked without one")
        return response

    def text_of(self, body):
        """The bytes of an answer -> the reply's text, or a ValueError that says why it holds none."""
        body = self.key.sub("***", body.decode("utf-8-sig", "backslashreplace"))  # no UTF-8: then no JSON
        try:
            answer = json.loads(body)
            used = answer.get("usage") or {}
            for kind, name in ("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens"):
                self.tally.n[kind] += min(used.get(name) or 0, 10 ** 9)
            return answer["choices"][0]["message"]["content"].encode(errors="replace").decode()
        except Exception as error:  # whatever is wrong with its form
            return ValueError(f"not an answer of this API ({error!r}): {shorten(body)}")

    def unanswered(self, error):
        """Note an error of the client. -> None; raises Unanswered where it is the end."""
        s, status = self.settings, getattr(error, "status_code", None)
        told = self.key.sub("***", f"{type(error).__name__}: {error}")
        self.tally.why = re.sub(r"[\s\0-\x1f\x7f-\x9f]+", " ", told)[:300]
        self.in_a_row += status not in REFUSED
        if status in DENIED or self.in_a_row >= GIVE_UP:
            raise Unanswered(f"llm.{self.role} at {s.base_url} ({s.model}, key from ${s.api_key_env}): "
                             f"{self.tally.why}; replies so far are kept, start again to go on")


class Local:
    """A checkpoint of your own. Asks wait for drain(), which samples all in one batch, then the repairs.

    With several ranks the weights are sharded, and drain() is collective; each rank has asks of its own.
    """

    def __init__(self, role, settings, cfg):
        import torch  # torch and what needs it, late: hindsight.py with a server or with rules does without

        import model as decoder
        import parallel
        import rollout
        folder = decoder.resolve(settings.model)
        # For the cache: a folder's content decides its replies.
        self.settings = settings.model_copy(update={"model": f"{settings.model} {identity(folder)}"})
        self.waiting = []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = parallel.compute_dtype(cfg.model.dtype, device)
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        load = functools.partial(parallel.load_sharded, trainable=False) if several else decoder.load
        self.policy = rollout.Policy(folder)
        self.policy.model = load(folder, device, dtype)
        self.gathered, self.generate = decoder.gathered, rollout.generate
        rows = cfg.rollout.max_rows // cfg.rollout.samples  # as many prompts at once as in training
        self.sampling = rollout.Sampling(1, settings.max_tokens, settings.temperature, max_rows=rows)

    def submit(self, *question, **more):
        future, ask = Future(), Ask(self, *question, **more)
        ask.look()
        self.waiting.append((future, ask))
        return future

    def drain(self):
        asks, self.waiting = self.waiting, []
        with self.gathered(self.policy.model):
            while batch := [ask for _, ask in asks if not ask.over]:
                self.answer(batch)
        for future, ask in asks:
            future.set_result(ask.result)

    def answer(self, batch):
        """One reply to each ask of the batch."""
        policy, began = self.policy, time.perf_counter()
        prompts = [apply_template(policy.tokenizer, ask.request["messages"]) for ask in batch]
        keys = [(Stream.LOCAL_LLM, ask.request["seed"], i) for i, ask in enumerate(batch)]
        responses = self.generate(policy.model, prompts, policy.ends, self.sampling, keys=keys)
        self.tally.seconds += [time.perf_counter() - began] * len(batch)
        for ask, prompt, (response,) in zip(batch, prompts, responses):
            self.tally.n["tokens_in"] += len(prompt)
            self.tally.n["tokens_out"] += len(response.tokens)
            ask.take(policy.text(response.tokens))
