"""A server of the chat-completions API on loopback that plays the language models of the toy world.

    python tests/llm_server.py --lexicon runs/toy/world/lexicon.yaml --port 8377 [--faults 0.3]

It answers as extractor, grader, matcher, writer of irrelevant utterances and writer of prompts; which one is asked is told from
the answer form in the system prompt. It knows no more than the messages and the lexicon say, and its competence follows the
rules that the prompt states (RULES): without "a short answer takes its meaning from the question" it does not bind a bare yes,
and so on, so that a better prompt truly scores better. A prompt may also hold verbatim `Example:` lines, which it obeys to the
letter: that is how a prompt over-fits. The shipped prompts make it fully competent: as extractor it finds what lexicon.facts
finds, as grader it says what reward.grade_rules says.

It misbehaves as it is told: `script`, a list of one entry a request (None: behave), then with probability `faults`, drawn by
(seed, request, how often it was asked) from `kinds`. `noise` is the share of replies that vary with the request's seed.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lexicon

# What a prompt must say (lower case, white space collapsed) for the competence to be there, and a sentence that says it.
RULES = {
    "extractor": {
        "client": ("only what the client says", "Only what the client says counts, never what the expert says or asks."),
        "short": ("short answer takes its meaning from the question",
                  'A short answer takes its meaning from the question before it: "yes" to "Any fever?" is fever: yes.'),
        "absent": ("absent is information", "An answer that something is absent is information too (fever: no)."),
        "generic": ("generic items", "Leave out generic items that any conversation would admit: {generic}."),
        "first": ("where it is said first", "Where the client repeats something, list it only where it is said first."),
    },
    "grader": {
        "half": ("relevant to the goal but not precise", "0.5: it is relevant to the goal but not precise."),
        "told": ("already tells", "0: it asks for what the conversation already tells."),
        "malformed": ("list of keywords", "0: it is no utterance that a person would say (a list of keywords, broken off)."),
        "count": ("how many separate questions", "Count how many separate questions the candidate asks."),
    },
    "policy": {
        "one": ("exactly one question", "Ask exactly one question."),
        "told": ("already told you", "Do not ask for anything the client has already told you."),
    },
}
FORMS = {"items": "extractor", "score": "grader", "utterance": "irrelevant", "prompt": "prompts", "matched": "matcher"}
FAULTS = ("429", "500", "drop", "hang", "cut", "prose", "types", "range", "empty", "html", "list", "null")
IRRELEVANT = ("Would you like a seat at the window?", "Which size of shoes do you wear?", "How many guests shall I book the table for?",
              "Do you prefer the red or the blue wallpaper?", "When does your train leave?", "Shall I gift-wrap the book?",
              "What is the registration number of your car?", "Do you want a receipt for the parking?")


def said(prompt, role):
    """The rules that a prompt states."""
    text = " ".join(prompt.lower().split())
    return {name for name, (phrase, _) in RULES[role].items() if phrase in text}


def role_of(system):
    """Who is asked: the role whose answer form stands last in the system prompt, or None."""
    forms = re.findall(rf'(?<!\[){{"({"|".join(FORMS)})"', system)
    return FORMS[forms[-1]] if forms else None


# ----------------------------------------------------------------------------------------------------------- the models

def facts(utts, lex, rules):
    """[(utterance number from 1, slot, value)] of a conversation [{"by", "text"}], as well as the rules allow."""
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


def extract(system, user, lex, rng, noise):
    rules, utts = said(system, "extractor"), [json.loads(line) for line in user.splitlines()]
    talk = [{"by": u["by"], "text": u["text"]} for u in utts]
    for example in re.findall(r"^Example: conversation (.*) -> (\[.*\])$", system, re.M):
        if json.loads(example[0]) == talk:
            last = max(u["utterance"] for u in utts if u["by"] == "client")
            items = [(last, *map(str.strip, item.split(":", 1))) for item in json.loads(example[1])]
            break
    else:
        named = re.search(r"generic items[^:]*:(.*)", system) if "generic" in rules else None
        generic = set(re.findall(r"[\w]+", named.group(1))) if named else set()
        items = [item for item in facts(talk, lex, rules) if item[1] not in generic and rng.random() >= noise]
    return {"items": [{"utterance": n, "slot": s, "value": v} for n, s, v in items]}


def grade(system, user, lex, rng, noise):
    """What reward.grade_rules says, from the messages alone and as well as the rules allow."""
    rules = said(system, "grader")
    shared, _, candidate = user.partition("\n\nCandidate: ")
    shared, candidate = json.loads(shared), json.loads(candidate)
    n = lexicon.questions(candidate)
    n = max(n, len(lexicon.asked(candidate, lex, strict=False))) if n in (1, 2) else n
    reply = {"score": 0, "questions": n if "count" in rules else 1}
    for text, score in re.findall(r'^Example: candidate (".*") -> ([\d.]+)$', system, re.M):
        if json.loads(text) == candidate:
            return {**reply, "score": float(score)}
    if rng.random() < noise:
        return {**reply, "score": rng.choice([0, 0.5, 1])}
    half = 0.5 if "half" in rules else 1
    asked = lexicon.asked(candidate, lex)
    if not asked and "malformed" not in rules:
        asked = lexicon.asked(f"{candidate}?", lex, strict=False)
    wanted = {item.partition(":")[0].strip() for item in shared["targets"]}
    if not asked:
        return {**reply, "score": half if lexicon.asks_generic(candidate, lex) else 0}
    if all(a in wanted for a in asked):
        return {**reply, "score": 1}
    known = {s for _, s, _ in facts(shared["conversation"], lex, set(RULES["extractor"]))} if "told" in rules else set()
    complaints = [lexicon.complaint_of(u["text"], lex) for u in shared["conversation"] if u["by"] == "client"]
    complaint = next(filter(None, complaints), None)
    relevant = lex.complaints[complaint] if complaint else {a for a, _ in lex.asks}
    good = any(a in wanted or a in relevant and a not in known for a in asked)
    return {**reply, "score": half if good else 0}


def match(system, user, lex, rng, noise):
    asked = json.loads(user)
    plain = [" ".join(item.casefold().split()) for item in asked["found"]]
    return {"matched": [int(i) for i, w in asked["wanted"].items() if " ".join(w.casefold().split()) in plain]}


def irrelevant(system, user, lex, rng, noise):
    return {"utterance": IRRELEVANT[int(hashlib.sha256(user.encode()).hexdigest(), 16) % len(IRRELEVANT)]}


def write_prompt(system, user, lex, rng, noise, seed=0):
    """By seed: a missing rule added, the rules shuffled, a rule dropped, the examples learnt by heart."""
    asked = json.loads(user)
    text, role = asked["instructions"], {"extractor": "extractor", "grader": "grader"}.get(role_of(asked["instructions"]), "policy")
    head, answer, form = text.partition("\n\nAnswer with one JSON object")
    rules, how = said(text, role), ("good", "neutral", "bad", "learnt")[seed % 4]
    missing = [sentence for name, (_, sentence) in RULES[role].items() if name not in rules]
    lines = []
    for e in asked["examples"]:
        if role == "grader":
            lines.append(f"Example: candidate {json.dumps(e['candidate'], ensure_ascii=False)} -> {e['wanted']:g}")
        elif role == "extractor":
            lines.append(f"Example: conversation {json.dumps(e['conversation'], ensure_ascii=False)} -> {json.dumps(e['wanted'], ensure_ascii=False)}")
    if how == "good" and missing:
        head += f"\n\n- {rng.choice(missing)}"
    elif how == "bad" and rules:
        head = without(head, role, rng.choice(sorted(rules)))
    elif how == "learnt" and lines:
        head += "\n\n" + "\n".join(lines)
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


MODELS = {"extractor": extract, "grader": grade, "matcher": match, "irrelevant": irrelevant, "prompts": write_prompt}


# ------------------------------------------------------------------------------------------------------------- protocol

class Refuse(Exception):
    """An HTTP status with the API's error object."""
    def __init__(self, status, message):
        super().__init__(message)
        self.status = int(status)


def check_request(body, models):
    """What a real server would refuse."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages):
        raise Refuse(400, "messages must be a non-empty list of {role, content}")
    if body.get("model") not in models:
        raise Refuse(404, f"The model `{body.get('model')}` does not exist.")
    for name, kind, low in (("max_tokens", int, 1), ("temperature", (int, float), 0), ("seed", int, 0)):
        if name in body and (not isinstance(body[name], kind) or body[name] < low):
            raise Refuse(400, f"{name} is out of range: {body[name]!r}")
    how = body.get("response_format")
    if how is not None and not (how.get("type") == "json_schema" and how["json_schema"]["name"] and isinstance(how["json_schema"]["schema"], dict)):
        raise Refuse(400, "response_format is not understood")
    unknown = set(body) - {"model", "messages", "max_tokens", "temperature", "seed", "response_format"}
    if unknown:
        raise Refuse(400, f"unknown parameters {sorted(unknown)}")


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def reply(self, status, obj, **headers):
        data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(data)} | {k.replace("_", "-"): v for k, v in headers.items()}
        head = f"HTTP/1.1 {status} {self.responses.get(status, ('', ''))[0]}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        self.wfile.write(head.encode() + b"\r\n" + data)

    def fail(self, status, message, **headers):
        self.reply(status, {"error": {"message": message, "type": "error", "param": None, "code": status}}, **headers)

    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply(200, {"object": "list", "data": [{"id": m, "object": "model", "created": 0, "owned_by": "toy"} for m in self.server.models]})
        self.fail(404, "not found")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        with server.lock:
            server.flying += 1
            server.most = max(server.most, server.flying)
        try:
            if self.path != "/v1/chat/completions":
                raise Refuse(404, "not found")
            self.complete(json.loads(body))
        except Refuse as error:
            self.fail(error.status, str(error))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.flying -= 1

    def complete(self, body):
        server = self.server
        key = hashlib.sha256(json.dumps([body.get("model"), body.get("messages")]).encode()).hexdigest()
        with server.lock:
            server.requests += 1
            number, attempt = server.requests, server.asked[key]
            server.asked[key] += 1
            server.keys.add(self.headers.get("Authorization"))
            scripted = server.script.pop(0) if server.script else "by chance"
            if server.record:
                server.bodies.append(body)
                server.times.append(time.perf_counter())
        fault = scripted if scripted != "by chance" else server.fault(key, attempt, body)
        if fault and fault.isdigit():
            wait = {"Retry-After": server.retry_after} if server.retry_after and fault in ("429", "500", "503") else {}
            secret = f" Incorrect API key provided: {(self.headers.get('Authorization') or '')[7:]}." if fault == "401" else ""
            return self.fail(int(fault), f"This is a {fault}.{secret}", **wait)
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault == "hang":
            server.closing.wait(server.hang_s)
            self.close_connection = True
            return None
        if fault == "html":
            return self.reply(200, b"<html>502 Bad Gateway</html>", Content_Type="text/html")
        if fault == "nojson":
            return self.reply(200, b'{"id": "chatcmpl-', Content_Type="application/json")
        if body.get("response_format") and not server.schemas:
            raise Refuse(400, "response_format json_schema is not supported")
        check_request(body, server.models)
        if server.delay:
            time.sleep(random.Random(f"{server.seed} {key} delay").uniform(*server.delay))
        rng = random.Random(f"{server.seed} {key} {body.get('seed', 0)}")
        system, messages = body["messages"][0]["content"], body["messages"]
        role = role_of(system) if messages[0]["role"] == "system" else None
        if fault == "text":  # a scripted reply, word for word
            content = server.texts.pop(0)
        elif not role:
            content = "I am a toy."
        else:
            extra = {"seed": body.get("seed", 0)} if role == "prompts" else {}
            content = json.dumps(MODELS[role](system, messages[1]["content"], server.lex, rng, server.noise, **extra), ensure_ascii=False)
        finish = "stop"
        if fault == "cut" or len(content) > 4 * body.get("max_tokens", 10 ** 9):
            content, finish = content[:min(len(content) // 2, 4 * body.get("max_tokens", 10 ** 9))], "length"
        content = {"prose": f"Sure, here it is:\n```json\n{content}\n```\nAnything else?",
                   "types": '{"items": "none", "score": "high", "utterance": 3, "prompt": ["x"]}',
                   "range": '{"items": [{"utterance": 999, "slot": "fever", "value": "no"}], "score": 7, "questions": -1, "utterance": "", "prompt": ""}',
                   "null": None}.get(fault, content)
        done = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish, "logprobs": None}],
                "usage": {"prompt_tokens": sum(len(m["content"]) for m in messages) // 4, "completion_tokens": len(content or "") // 4,
                          "total_tokens": sum(len(m["content"]) for m in messages) // 4 + len(content or "") // 4}}
        done = {"empty": done | {"choices": []}, "list": [1, 2], "lame": {"id": 3, "choices": [{"index": 0}], "usage": {}},
                "parts": done | {"choices": [{"index": 0, "message": {"role": "assistant", "content": [content]}, "finish_reason": "stop"}]}}.get(fault, done)
        if fault in (None, "prose"):
            with server.lock:
                server.answered[key, body.get("temperature"), body.get("seed")] += 1
        self.reply(200, done)


class Server(ThreadingHTTPServer):
    """Started by `with Server(lexicon_path) as server`; server.url is what base_url wants. All settings may be changed on the way."""
    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 1024, True

    def __init__(self, lexicon_path, port=0, *, faults=0.0, kinds=FAULTS, script=(), texts=(), seed=0, noise=0.0, delay=None, schemas=True,
                 models=("toy",), retry_after="0.05", hang_s=600, record=False):
        super().__init__(("127.0.0.1", port), Handler)
        self.lex = lexicon.load(lexicon_path)
        self.faults, self.kinds, self.script, self.texts, self.seed = faults, kinds, list(script), list(texts), seed
        self.noise, self.delay, self.schemas, self.models = noise, delay, schemas, models
        self.retry_after, self.hang_s, self.record = retry_after, hang_s, record
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.requests, self.flying, self.most = 0, 0, 0
        self.asked, self.answered = Counter(), Counter()  # by model and messages; answered properly: also by temperature and seed
        self.keys, self.bodies, self.times = set(), [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fault(self, key, attempt, body):
        rng = random.Random(f"{self.seed} {key} {attempt} fault")
        return rng.choice(self.kinds) if rng.random() < self.faults else None

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handle_error(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lexicon", required=True)
    p.add_argument("--port", type=int, default=8377)
    p.add_argument("--faults", type=float, default=0.0, help="share of requests that go wrong, one way or another")
    p.add_argument("--noise", type=float, default=0.0, help="share of replies that vary with the request's seed")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    with Server(a.lexicon, a.port, faults=a.faults, noise=a.noise, seed=a.seed) as server:
        print(f"serving model toy at {server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
