"""A server of the chat-completions API on loopback that plays the language models of the toy world.

    python -m toy.llm_server --lexicon runs/toy/world/lexicon.yaml --port 8377 [--faults 0.3]

It replies as extractor, grader, matcher, writer of irrelevant utterances and writer of prompts. The form of
the reply in the system prompt tells which one is asked. It knows no more than the messages and the lexicon
say, and its competence follows the rules that the prompt states (RULES): without "a short answer takes its
meaning from the question" it does not bind a bare yes, and so on, so that a better prompt truly scores
better. A prompt may also hold verbatim `Example:` lines, which it obeys to the letter: that is how a prompt
over-fits. The shipped prompts make it fully competent: as extractor it finds what lexicon.facts finds, as
grader it says what reward.r_a_rules says.

It misbehaves as it is told: first by `script`, a list of one entry a request (None: behave), then with
probability `faults`, drawn by (seed, request, how often it was asked) from `kinds`. EVERY names all kinds
that do not end a run at once, HARMLESS those whose reply is usable all the same. `noise` is the share of
replies that vary with the request's seed.
"""
import argparse
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lexicon
from records import InputError, cli, explain

# What a prompt must say (in lower case, white space collapsed) for a competence; a sentence that says it.
RULES = {
    "extractor": {
        "client": ("only what the client says",
                   "Only what the client says counts, never what the expert says or asks."),
        "short": ("short answer takes its meaning from the question",
                  'A short answer takes its meaning from the question before it: "yes" to "Any fever?" is '
                  "fever: yes."),
        "absent": ("absent is information",
                   "An answer that something is absent is information too (fever: no)."),
        "generic": ("generic items",
                    "Leave out generic items that any conversation would admit: {generic}."),
        "first": ("where it is said first",
                  "Where the client repeats something, list it only where it is said first."),
    },
    "grader": {
        "half": ("relevant to the goal but not precise", "0.5: it is relevant to the goal but not precise."),
        "told": ("already tells", "0: it asks for what the conversation already tells."),
        "malformed": ("list of keywords",
                      "0: it is no utterance that a person would say (a list of keywords, broken off)."),
        "count": ("how many separate questions", "Count how many separate questions the candidate asks."),
    },
    "policy": {
        "one": ("exactly one question", "Ask exactly one question."),
        "told": ("already told you", "Do not ask for anything the client has already told you."),
    },
}
FORMS = {"items": "extractor", "score": "grader", "rationale": "grader", "utterance": "irrelevant",
         "prompt": "prompts", "matched": "matcher"}
FAULTS = ("429", "500", "drop", "hang", "cut", "prose", "types", "range", "empty", "html", "list", "null")
IRRELEVANT = (
    "Would you like a seat at the window?", "Which size of shoes do you wear?",
    "How many guests shall I book the table for?", "Do you prefer the red or the blue wallpaper?",
    "When does your train leave?", "Shall I gift-wrap the book?",
    "What is the registration number of your car?", "Do you want a receipt for the parking?")


def said(prompt, role):
    """The rules that a prompt states."""
    text = " ".join(prompt.lower().split())
    return {name for name, (phrase, _) in RULES[role].items() if phrase in text}


def role_of(system):
    """Who is asked: the role whose form of reply stands last in the system prompt, or None."""
    forms = re.findall(rf'(?<!\[){{"({"|".join(FORMS)})"', system)
    return FORMS[forms[-1]] if forms else None


# ----------------------------------------------------------------------------------------------- the models

def facts(utts, lex, rules):
    """[(utterance number from 1, slot, value)] of a conversation [{"by", "text"}], as the rules allow."""
    out, seen = [], set()
    for i, u in enumerate(utts):
        if u["by"] != "client":
            continue
        question = utts[i - 1]["text"] if i and utts[i - 1]["by"] == "expert" else None
        found = lexicon.revealed(question, u["text"], lex)
        if "short" not in rules:
            found = {s: v for s, v in found.items() if s in lexicon.revealed(None, u["text"], lex)}
        if "absent" not in rules:
            found = {s: v for s, v in found.items() if v != "no"}
        if question and "client" not in rules:
            found |= {s: "mentioned" for s in lexicon.asked(question, lex, strict=False) if s not in found}
        out += [(i + 1, s, v) for s, v in found.items() if "first" not in rules or (s, v) not in seen]
        seen |= set(found.items())
    return out


def extract(system, user, lex, rng, noise, seed):
    rules, utts = said(system, "extractor"), [json.loads(line) for line in user.splitlines()]
    talk = [{"by": u["by"], "text": u["text"]} for u in utts]
    learnt = re.findall(r"^Example: conversation (.*) -> (\[.*\])$", system, re.M)
    known = [json.loads(items) for conversation, items in learnt if json.loads(conversation) == talk]
    if known:
        last = max(u["utterance"] for u in utts if u["by"] == "client")
        items = [(last, *map(str.strip, item.split(":", 1))) for item in known[0]]
    else:
        named = re.search(r"generic items[^:]*:(.*)", system) if "generic" in rules else None
        generic = re.findall(r"\w+", named.group(1)) if named else []
        found = [item for item in facts(talk, lex, rules) if item[1] not in generic]
        items = [item for item in found if rng.random() >= noise]
    return {"items": [{"utterance": n, "slot": s, "value": v} for n, s, v in items]}


def grade(system, user, lex, rng, noise, seed):
    """What reward.r_a_rules says, from the messages alone and as well as the rules allow."""
    rules = said(system, "grader")
    shared, _, candidate = user.partition("\n\nCandidate: ")
    shared, candidate = json.loads(shared), json.loads(candidate)
    n = lexicon.questions(candidate)
    n = max(n, len(lexicon.asked(candidate, lex, strict=False))) if n in (1, 2) else n
    learnt = re.findall(r'^Example: candidate (".*") -> ([\d.]+)$', system, re.M)
    known = [float(score) for text, score in learnt if json.loads(text) == candidate]
    if known:
        score = known[0]
    elif rng.random() < noise:
        score = rng.choice([0, 0.5, 1])
    else:
        score = judge(shared, candidate, lex, rules)
    why = {"rationale": f"By the rules: {score}."} if '"rationale"' in system else {}
    return {**why, "score": score, "questions": n if "count" in rules else 1}


def judge(shared, candidate, lex, rules):
    half = 0.5 if "half" in rules else 1
    asked = lexicon.asked(candidate, lex)
    if not asked and "malformed" not in rules:
        asked = lexicon.asked(f"{candidate}?", lex, strict=False)
    if not asked:
        return half if lexicon.asks_generic(candidate, lex) else 0
    wanted = {item.partition(":")[0].strip() for item in shared["targets"]}
    if wanted.issuperset(asked):
        return 1
    known = {item.partition(":")[0] for item in shared["known"] if "told" in rules}
    complaints = [lexicon.complaint_of(u["text"], lex) for u in shared["conversation"] if u["by"] == "client"]
    complaint = next(filter(None, complaints), None)
    relevant = lex.complaints[complaint].attributes if complaint else {a for a, _ in lex.asks}
    return half if any(a in wanted or a in relevant and a not in known for a in asked) else 0


def match(system, user, lex, rng, noise, seed):
    def plain(item):
        return " ".join(item.casefold().split())

    asked = json.loads(user)
    found = set(map(plain, asked["found"]))
    return {"matched": [int(i) for i, item in asked["wanted"].items() if plain(item) in found]}


def irrelevant(system, user, lex, rng, noise, seed):
    return {"utterance": IRRELEVANT[int(hashlib.sha256(user.encode()).hexdigest(), 16) % len(IRRELEVANT)]}


def by_heart(example, role):
    """A line that a prompt may hold, and that extractor and grader obey to the letter."""
    what = {"grader": "candidate", "extractor": "conversation"}[role]
    shown, wanted = (json.dumps(example[key], ensure_ascii=False) for key in (what, "wanted"))
    return f"Example: {what} {shown} -> {wanted}"


def write_prompt(system, user, lex, rng, noise, seed):
    """By seed: a missing rule added, the rules shuffled, a rule dropped, the examples learnt by heart."""
    asked = json.loads(user)
    text, role = asked["instructions"], role_of(asked["instructions"])
    role = role if role in ("extractor", "grader") else "policy"
    head, answer, form = text.partition("\n\nAnswer with one JSON object")
    rules, how = said(text, role), ("good", "neutral", "bad", "learnt")[seed % 4]
    missing = [sentence for name, (_, sentence) in RULES[role].items() if name not in rules]
    if how == "good" and missing:
        head += f"\n\n- {rng.choice(missing)}"
    elif how == "bad" and rules:
        head = without(head, role, rng.choice(sorted(rules)))
    elif how == "learnt" and role != "policy":
        head += "\n\n" + "\n".join(by_heart(example, role) for example in asked["examples"])
    else:
        head = shuffled(head, rng)
    return {"prompt": head + answer + form}


def bullets(text):
    """A prompt cut before each list item and blank line -> pieces that join to it again."""
    return re.split(r"(?<=\n)(?=- |\n)", text)


def without(text, role, name):
    """The prompt without the list item that states this rule; its placeholders stay."""
    out = []
    for piece in bullets(text):
        if name in said(piece, role):
            names = re.findall(r"\{\w+\}", piece)
            piece = f"- About {', '.join(names)}: use your judgement.\n" if names else ""
        out.append(piece)
    return "".join(out)


def shuffled(text, rng):
    pieces = bullets(text)
    at = [i for i, p in enumerate(pieces) if p.startswith("- ") and p.endswith("\n")]
    for i, piece in zip(at, rng.sample([pieces[i] for i in at], len(at))):
        pieces[i] = piece
    return "".join(pieces) + "\n\nWork with care."


MODELS = {"extractor": extract, "grader": grade, "matcher": match, "irrelevant": irrelevant,
          "prompts": write_prompt}


# ------------------------------------------------------------------------------------------------- protocol

class Refuse(Exception):
    """An HTTP status with the API's error object."""
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class Schema(Strict):
    name: str = Field(min_length=1)
    json_object: dict = Field(alias="schema")
    strict: bool


class Form(Strict):
    type: Literal["json_schema"]
    json_schema: Schema


class Request(Strict):
    """What a real server would take."""
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int = Field(1, ge=1)
    temperature: float = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    response_format: Form | None = None


def check_request(body, models):
    try:
        model = Request.model_validate(body).model
    except ValidationError as error:
        raise Refuse(400, explain(error)) from None
    if model not in models:
        raise Refuse(404, f"The model `{model}` does not exist.")


FIELDS = ('{"items": VALUE, "score": VALUE, "questions": VALUE, "utterance": VALUE, "prompt": VALUE, '
          '"matched": VALUE}')
VALUES = {"nan": "NaN", "huge": "1e999", "digits": "9" * 5000, "nulls": "null"}
# What the model says instead. REPLY: its reply, REST: that without the first brace, KEY: the key it was sent.
SAID = {name: FIELDS.replace("VALUE", value) for name, value in VALUES.items()} | {
    "types": '{"items": "none", "score": "high", "utterance": 3, "prompt": ["x"], "matched": 1}',
    "range": '{"items": [{"utterance": 999, "slot": "fever", "value": "no"}], "score": 7, "questions": -1, '
             '"utterance": "", "prompt": "", "matched": [0]}',
    "enum": '{"items": [{"utterance": 0, "slot": "x", "value": "y"}], "score": 0.7, "questions": 1, '
            '"utterance": " ", "prompt": " ", "matched": [99999]}',
    "texts": '{"items": [{"utterance": "1", "slot": "x", "value": "y"}], "score": "1", "questions": "1", '
             '"utterance": " ", "prompt": " ", "matched": ["1"]}',
    "mute": "", "refusal": "I cannot help with that.", "array": "[[REST]]",
    "quotes": "{'score': 1}", "prose": "Sure, here it is:\n```json\nREPLY\n```\nAnything else?",
    "think": '<think>Perhaps {"score": 0.5}? REPLY</think>\nREPLY', "half think": "<think>So REPLY",
    "two": "REPLY or REPLY", "twice": '{"score": 0, "items": [], "utterance": "a", "prompt": "b", REST',
    "more": '{"more": {"why": [1, null]}, REST', "half pair": '{"more": "\\ud83d", REST',
    "braces": "{" * 200_000, "strings": '{"' * 100_000, "deep": '{"a":' * 50_000,
    "echo": "You sent Bearer KEY\nREPLY", "echo only": "You sent Bearer KEY"}
# What stands in the API's object instead.
TOLD = {
    "empty": '{"choices": []}', "lame": '{"id": 3, "choices": [{"index": 0}], "usage": {}}',
    "null": '{"choices": [{"message": {"content": null}}]}',
    "parts": '{"choices": [{"message": {"content": ["x"]}}]}',
    "usage": '{"usage": 7}', "counts": '{"usage": {"prompt_tokens": "x", "completion_tokens": -1e300}}',
    "choices": '{"choices": {"0": {}}}', "no choices": '{"choices": null}',
    "no message": '{"choices": [{"message": null}]}',
    "model": '{"model": "another", "id": null, "object": 1}'}
# What is sent word for word before the connection is closed.
WIRE = {
    "drop": b"", "header": b"HTTP/1.1 200 OK\r\nContent-Le", "babble": b"\0\xff\r\n\r\n",
    "html": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>502 Bad Gateway</html>",
    "nojson": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"id": "chatcmpl-',
    "list": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1, 2]",
    "object": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\nnull",
    "brackets": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b"[" * 100_000,
    "headers": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"headers": ["Bearer KEY"]}',
    "stream": b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"choices": []}\n\n',
    "nothing": b"HTTP/1.1 200 OK\r\n\r\n", "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    "loop": b"HTTP/1.1 307 X\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n",
    "away": b"HTTP/1.1 302 X\r\nLocation: /v1/models\r\nContent-Length: 0\r\n\r\n",
    "nowhere": b"HTTP/1.1 308 X\r\nLocation: http://[\xff\r\nContent-Length: 0\r\n\r\n",
    "drip": b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"}
STATUS = "400 408 409 422 429 500 501 502 503 504".split()
# What becomes of a reply's bytes.
BYTES = {"bom": lambda data: b"\xef\xbb\xbf" + data, "bytes": lambda data: data.replace(b": {", b": {\xff")}
HARMLESS = "prose think twice more echo model bom".split()
EVERY = [*SAID, *TOLD, *WIRE, *STATUS, *BYTES, "cut", "long", "hang"]


def completion(body, number, content, finish):
    """The API's object for a reply."""
    sent, made = sum(len(m["content"]) for m in body["messages"]) // 4, len(content or "") // 4
    message = {"role": "assistant", "content": content}
    return {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made}}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def reply(self, status, obj, kind="application/json", **headers):
        data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
        headers = {"Content-Type": kind, "Content-Length": len(data), **headers}
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + data)

    def fail(self, status, message, **headers):
        error = {"message": message, "type": "error", "param": None, "code": status}
        self.reply(status, {"error": error}, **headers)

    def do_GET(self):
        if self.path != "/v1/models":
            return self.fail(404, "not found")
        models = [{"id": m, "object": "model", "created": 0, "owned_by": "toy"} for m in self.server.models]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.fly(1)
        try:
            if self.path != "/v1/chat/completions":
                raise Refuse(404, "not found")
            self.complete(json.loads(body))
        except Refuse as error:
            self.fail(error.status, str(error))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.server.fly(-1)

    def complete(self, body):
        server = self.server
        authorization = self.headers.get("Authorization") or ""
        key, number, fault = server.note(body, authorization)
        if fault in WIRE or fault == "hang" or fault and fault.isdigit():
            return self.misbehave(fault, authorization[7:])
        if body.get("response_format") and not server.schemas:
            raise Refuse(400, "response_format json_schema is not supported")
        check_request(body, server.models)
        if server.delay:
            time.sleep(random.Random(f"{server.seed} {key} delay").uniform(*server.delay))
        content, finish = server.text_of(body, key, fault), "stop"
        most = 4 * body.get("max_tokens", 10 ** 9)
        if fault == "cut" or len(content) > most:
            content, finish = content[:min(len(content) // 2, most)], "length"
        said = SAID.get(fault, "REPLY").replace("KEY", authorization[7:])
        content = said.replace("REST", content[1:]).replace("REPLY", content)
        if fault in (None, *HARMLESS):
            with server.lock:
                server.answered[key, body.get("temperature"), body.get("seed")] += 1
        done = completion(body, number, content, finish) | json.loads(TOLD.get(fault, "{}"))
        data = BYTES.get(fault, bytes)(json.dumps(done).encode())
        self.reply(200, data, **{"Content_Length": 30} if fault == "long" else {})

    def misbehave(self, fault, secret):
        """Faults below the API: no reply, a part of one, a page, an HTTP error."""
        server = self.server
        if fault.isdigit():
            wait = server.retry_after and fault in ("429", "500", "503")
            told = f" Incorrect API key provided: {secret}." if fault == "401" else ""
            headers = {"Retry_After": server.retry_after} if wait else {}
            return self.fail(int(fault), f"This is a {fault}.{told}", **headers)
        self.close_connection = True
        self.wfile.write(WIRE.get(fault, b"").replace(b"KEY", secret.encode()))
        if fault == "hang":
            server.closing.wait(server.hang_s)
        while fault == "drip" and not server.closing.wait(server.drip_s):
            self.wfile.write(b" ")


class Server(ThreadingHTTPServer):
    """Started by `with Server(lexicon_path) as server`; server.url is what base_url wants.

    Settings, which may be changed on the way: faults, kinds, script and texts (what the fault "text" says),
    seed, noise, delay (from, to, in seconds), schemas (are they supported?), models (names), retry_after,
    hang_s, drip_s (from a byte to the next), record (keep bodies and times). Counted: requests, most (at
    once), asked, answered, keys.
    """
    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 1024, True
    faults, kinds, script, texts, seed, noise, delay, schemas = 0.0, FAULTS, (), (), 0, 0.0, None, True
    models, retry_after, hang_s, drip_s, record = ("toy",), "0.05", 600, 0.1, False

    def __init__(self, lexicon_path, port=0, **settings):
        super().__init__(("127.0.0.1", port), Handler)
        vars(self).update(settings)
        self.lex, self.script, self.texts = lexicon.load(lexicon_path), list(self.script), list(self.texts)
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.requests, self.flying, self.most = 0, 0, 0
        self.asked = Counter()  # by model and messages
        self.answered = Counter()  # properly: by model and messages, temperature, seed
        self.keys, self.bodies, self.times = set(), [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fly(self, change):
        with self.lock:
            self.flying += change
            self.most = max(self.most, self.flying)

    def note(self, body, authorization):
        """Count a request. -> (its key, its number, its fault or None)"""
        what = json.dumps([body.get("model"), body.get("messages")])
        key = hashlib.sha256(what.encode()).hexdigest()
        with self.lock:
            self.requests += 1
            number, attempt = self.requests, self.asked[key]
            self.asked[key] += 1
            self.keys.add(authorization)
            if self.record:
                self.bodies.append(body)
                self.times.append(time.perf_counter())
            fault = self.script.pop(0) if self.script else self.fault(key, attempt, body)
        return key, number, fault

    def fault(self, key, attempt, body):
        rng = random.Random(f"{self.seed} {key} {attempt} fault")
        return rng.choice(self.kinds) if rng.random() < self.faults else None

    def text_of(self, body, key, fault):
        """What the model that is asked says."""
        if fault == "text":  # a scripted reply, word for word
            return self.texts.pop(0)
        (first, *rest), seed = body["messages"], body.get("seed", 0)
        role = role_of(first["content"]) if first["role"] == "system" else None
        if not role:
            return "I am a toy."
        rng = random.Random(f"{self.seed} {key} {seed}")
        reply = MODELS[role](first["content"], rest[0]["content"], self.lex, rng, self.noise, seed)
        return json.dumps(reply, ensure_ascii=False)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lexicon", required=True)
    p.add_argument("--port", type=int, default=8377)
    p.add_argument("--faults", type=float, default=0.0, help="share of requests that go wrong")
    p.add_argument("--noise", type=float, default=0.0, help="share of replies that vary with the seed")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if not 0 <= a.port < 2 ** 16:
        raise InputError(f"--port {a.port} is none: they end at 65535")
    with Server(a.lexicon, a.port, faults=a.faults, noise=a.noise, seed=a.seed) as server:
        print(f"serving model toy at {server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    cli(main)
