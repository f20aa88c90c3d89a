"""Campaigns against faults of reading: logs, records, replies, configs and lexicons that are nearly right,
and report pages full of markup. `make soak` runs them at full length and prints what they counted.

Whatever is read, there is a result or an InputError of one line that names file and line (of a config: file
or key); good lines beside bad ones come out as if these were not there; what is read and what is bad adds up.
"""
import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from copy import deepcopy
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import yaml

import autoprompt
import config
import grading
import hindsight
import lexicon
import llm
import pairs
import prompts
import records
import report
import rollout
from asking import TURN
from conftest import make_tokenizer
from records import InputError, as_line, read_records
from world import THROAT, write_lines

hypothesis = pytest.importorskip("hypothesis")  # a bare image with a GPU has none
st = pytest.importorskip("hypothesis.strategies")
pytestmark = pytest.mark.soak
ODD = [
    None, True, False, 0, -1, 2 ** 70, 0.5, 1e308, float("nan"), float("inf"), "", " ", ":", "_", "\n", "\0",
    "\ud83d", "\u2028", "\u202e", "<stop />", "<|im_end|>", "user", "assistant", "continue", "stop", "a: b",
    "null", "😷" * 9, "[" * 3000, "[" * 600 + "]" * 600, '["\\ud83d"]', "x" * 5000, " " * 3000, "; ? ! .",
    [], {}, [[]], [None], [{}], {"": ""}, {"a": {"b": 1}}, {":": [1, [2]]}, {"role": "user", "content": "x"}]
BYTES = [
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\x0b", b"\xe2\x80\xa8", b'"',
    b"\\", b"[", b"{", b"}", b",", b":", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 4400, b"\\ud83d",
    b"\\u0000", b"[" * 2000, b'{"a":' * 2000, b"<stop />", b"true", b"0x1", b"\xe9", b"\t", b"//", b"'"]


def told(error):
    """An InputError's one line."""
    line = str(error)
    assert len(line.splitlines()) == 1 and len(line) < 2000, line
    return line


# ----------------------------------------------------------------------------------------- nearly right lines

def places(obj):
    """(container, key) of everything in an object."""
    for key in list(obj) if isinstance(obj, dict) else range(len(obj)):
        yield obj, key
        if isinstance(obj[key], (dict, list)):
            yield from places(obj[key])


def changed(rng, row):
    """A row with up to three of its values, keys or elements changed."""
    row = json.loads(json.dumps(row))
    for _ in range(rng.randint(1, 3)):
        found = list(places(row))
        if not found:
            break
        at, key = rng.choice(found)
        how = rng.randrange(5)
        if how == 0:
            del at[key]
        elif how == 1 and isinstance(at, dict):
            new = rng.choice(["", ":", "\n", "role", "learned", "asks", "\ud83d", key.upper(), key + " "])
            at[new] = at.pop(key)
        elif how == 2 and isinstance(at, list):
            at.insert(key, deepcopy(at[rng.randrange(len(at))]))
        else:
            at[key] = deepcopy(rng.choice(ODD))
    return json.dumps(row, ensure_ascii=rng.random() < 0.8).encode(errors="surrogatepass")


def torn(rng, line):
    """A line with up to three pieces of its bytes replaced."""
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(line) + 1)
        j = min(len(line), i + rng.choice([0, 1, 1, 2, 9, 10_000]))
        line = line[:i] + rng.choice([*BYTES, rng.randbytes(3), line[j:j + 20]]) + line[j:]
    return line


def mutant(rng, row):
    line = changed(rng, row) if rng.random() < 0.6 else json.dumps(row).encode()
    return torn(rng, line) if rng.random() < 0.5 else line


def told_sessions():
    """Good sessions of several forms."""
    user, expert = ({"role": role} for role in ("user", "assistant"))
    return [
        {"session_id": "", "goal": "g", "messages": [
            user | {"content": "a cough,\nfever", "learned": {"symptom": "cough", "fever": ["yes", 39.5]}},
            expert | {"content": "How long?", "asks": ["duration"]},
            user | {"content": "two days", "learned": {"duration": "two days"}},
            expert | {"content": "<stop />", "asks": []}]},
        {"session_id": "", "more": [1], "messages": [
            user | {"content": "喉咙痛 😷", "learned": {}},
            expert | {"content": "多久了？", "asks": ["duration"]},
            user | {"content": "两天", "learned": {"duration": "两天", "none": None}},
            expert | {"content": "Any fever?", "asks": ["fever"]},
            user | {"content": "no", "learned": {"fever": "no"}}]},
        {"session_id": "", "success": True, "diagn": {"a": [1]}, "messages": [
            expert | {"content": "Hello"}, user | {"content": "", "learned": {"a": 1}},
            user | {"content": "x < y", "learned": {"b:c": '["d"]'}}, expert | {"content": "Why?"},
            user | {"content": "z", "learned": {"e": True}}]}]


FOREIGN = ["data.fields={session_id: meta.id, messages: talk, content: value, role: from}",
           "data.roles={user: human, assistant: bot, ignore: system}"]


def in_foreign_terms(row):
    talk = [{"from": "human" if m["role"] == "user" else "bot", "value": m["content"],
             **{k: v for k, v in m.items() if k not in ("role", "content")}} for m in row["messages"]]
    return {"meta": {"id": row["session_id"]}, "talk": talk,
            **{k: v for k, v in row.items() if k not in ("session_id", "messages")}}


# ------------------------------------------------------------------------------------------------------- logs

@pytest.mark.parametrize("way", ["annotations", "rules", "foreign", "array"])
def test_logs(tmp_path, capsys, soak, way):
    """Of all lines, nine in ten are mutants of good ones."""
    files, size = (13, 20_000) if soak else (1, 300)
    lex = tmp_path / "lexicon.yaml"
    lex.write_text(THROAT, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path / 'run'}\ndata: {{lexicon: {lex}, goal: the goal}}")
    source = "rules" if way == "rules" else "annotations"
    cfg = config.load([str(tmp_path / "c.yaml"), f"hindsight.source={source}"])
    extractor, good = hindsight.Extractor(cfg), {}
    for k, row in enumerate(told_sessions()):  # what each gives, but for its id
        session = hindsight.check_session(row | {"session_id": "ID", "goal": row.get("goal", "the goal")})[0]
        reading, = [readings[0] for _, readings in extractor.read([session])]
        good[k] = "".join(map(as_line, hindsight.build_turns(session, reading, cfg.hindsight)[0]))
    n, start = Counter(), time.perf_counter()
    for number in range(files):
        rng, lines, wanted = random.Random(f"{way} {number}"), [], {}
        for i in range(size):
            k, is_good = rng.randrange(len(good)), i == 0 or rng.random() < 0.1
            row = told_sessions()[k] | {"session_id": f"{'good' if is_good else 'm'}-{i}"}
            if way == "foreign":
                row = in_foreign_terms(row)
            lines.append(json.dumps(row).encode() if is_good or way == "array" else mutant(rng, row))
            if way == "array" and not is_good:
                lines[-1] = json.dumps(json.loads(changed(rng, row).decode(errors="surrogatepass"))).encode()
            if is_good:
                wanted[f"good-{i}"] = good[k].replace("ID", f"good-{i}")
        path = tmp_path / ("log.json" if way == "array" else "log.jsonl")
        path.write_bytes(b"[" + b",\n".join(lines) + b"]" if way == "array" else b"\n".join(lines))
        hindsight.main([str(tmp_path / "c.yaml"), f"data.logs={path}", f"hindsight.source={source}",
                        *(FOREIGN if way == "foreign" else [])])
        out = capsys.readouterr().out
        read = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        counts = re.search(r": (\d+) lines, (\d+) sessions used, (\d+) turns", out).groups()
        lines_told, used, turns = map(int, counts)
        aside = sum(map(int, re.findall(r"sessions set aside: (\d+) ", out)))
        assert lines_told == read == used + aside
        made = (tmp_path / "run" / "turns" / "train.jsonl").read_bytes().splitlines(True)
        assert len(made) == turns
        found = defaultdict(bytes)
        for line in made:
            found[json.loads(line)["session_id"]] += line
        for session_id, turns_of_it in wanted.items():
            assert found[session_id] == turns_of_it.encode()
        n.update(lines=read, good=len(wanted), used=used, aside=aside, turns=turns)
    print(f"\nfuzz of logs, {way}: {dict(n)}, {time.perf_counter() - start:.0f} s")


# ---------------------------------------------------------------------------------------------------- records

ROLLOUT = dict(turn_id="s_1", session_id="s", sample=0, response="How long?", truth="continue",
               decision="continue", r_a=1.0, r_s=1.0, omega=1.0, reward=4.0, rationale="why", audit=0.5)
PAIR = dict(turn_id="s_1", session_id="s", goal="g", context=TURN.dump()["context"], decision="continue",
            chosen="How long?", rejected="Bye", rejected_from="t_1")
LINES = {
    records.Session: told_sessions()[0] | {"session_id": "s"},
    records.Turn: TURN.dump() | {"expert": "How long?"}, hindsight.Mark: TURN.dump() | {"target_right": None},
    records.Rollout: ROLLOUT, records.Pair: PAIR, records.Message: {"role": "user", "content": "x"},
    report.Group: {"turn": TURN.dump(), "graded": [ROLLOUT]},
    records.GraderAnchor: {"turn": TURN.dump(), "response": "How long?", "score": 0.5},
    records.ExtractorAnchor: {"session": told_sessions()[1] | {"session_id": "s"}, "items": ["fever: no"]},
    rollout.PromptLine: {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}}


def read_one_by_one(path, kind):
    """What is read up to the first fault, as lines, and what is said of it."""
    found = []
    try:
        for _, record in read_records(path, kind):
            found.append(json.dumps(record.model_dump(exclude_unset=True)))
    except InputError as error:
        return found, told(error)
    return found, None


@pytest.mark.parametrize("kind", list(LINES), ids=lambda kind: kind.__name__)
def test_records(tmp_path, soak, kind):
    """A mutant between two good lines: all are read, or the first is read and the second one's place told."""
    good, path, n = json.dumps(LINES[kind]).encode(), tmp_path / "x.jsonl", Counter()
    alone, _ = read_one_by_one(write_lines(path, [LINES[kind]]), kind)
    rng = random.Random(kind.__name__)
    for _ in range(5_000 if soak else 150):
        line = mutant(rng, LINES[kind])
        path.write_bytes(b"\n".join([good, line, good]))
        found, why = read_one_by_one(path, kind)
        assert found[:1] == alone
        if why:
            place = int(re.match(re.escape(str(path)) + r":(\d+): ", why)[1])
            assert 2 <= place <= 2 + line.count(b"\n") and len(found) == place - 1 - sum(
                not part.strip() for part in line.split(b"\n")[:place - 2])
        else:
            assert found[-1:] == alone
        n[why is None] += 1
    print(f"\nfuzz of {kind.__name__}: {n[True]} read, {n[False]} refused with their place")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=9), part, max_size=4),
    max_leaves=12)


def examples(soak, test):
    hypothesis.settings(max_examples=5_000 if soak else 60, deadline=None, derandomize=True, database=None,
             suppress_health_check=list(hypothesis.HealthCheck))(test)()


def nearly(row):
    """A row of which some keys hold any JSON; and any JSON at all."""
    some = st.dictionaries(st.sampled_from(list(row)) | st.text(max_size=9), JSON, max_size=2)
    return JSON | some.map(row.__or__) | some.map(row.__or__)


def test_any_json_in_a_record(tmp_path, soak):
    path, n, kinds = tmp_path / "x.jsonl", Counter(), list(LINES)

    pairs_of = st.sampled_from(kinds).flatmap(lambda kind: st.tuples(st.just(kind), nearly(LINES[kind])))

    @hypothesis.given(pairs_of)
    def run(pick):
        kind, obj = pick
        path.write_text(f"{json.dumps(obj)}\n{json.dumps(LINES[kind])}")
        found, why = read_one_by_one(path, kind)
        assert why.startswith(f"{path}:1: ") and not found if why else len(found) == 2
        for line in found:
            assert kind.model_validate(json.loads(line)) or records.flaw(json.loads(line)) is None
        n[why is None] += 1

    examples(soak, run)
    print(f"\nfuzz of records by hypothesis: {n[True]} read, {n[False]} refused")


# ---------------------------------------------------------------------------------------------------- replies

SESSION = records.Session.model_validate(LINES[records.Session])
REPLIES = [
    (hindsight.Extraction, {"items": [{"utterance": 1, "slot": "fever", "value": "no"}] * 2},
     hindsight.utterances(SESSION.messages)),
    (grading.Grade, {"score": 0.5, "questions": 1}, None), (pairs.Written, {"utterance": "Bye"}, None),
    (grading.Reasoned, {"rationale": "why", "score": 1, "questions": 0}, None),
    (autoprompt.Variant, {"prompt": "{goal}"}, None), (autoprompt.Matches, {"matched": [1, 2]}, 3)]


@pytest.mark.parametrize("reply_class, good, context", REPLIES, ids=lambda x: getattr(x, "__name__", ""))
def test_replies(soak, reply_class, good, context):
    """Each ask ends as answered or invalid, whatever the replies; what is kept and sent again is UTF-8."""
    rng, n = random.Random(reply_class.__name__), Counter()
    cache = SimpleNamespace(get=lambda what: None, put=lambda what, text: text.encode())
    source = SimpleNamespace(settings=config.RoleConfig(model="m"), tally=llm.Tally(), cache=cache)
    for _ in range(5_000 if soak else 30):
        ask = llm.Ask(source, [{"role": "user", "content": "x"}], reply_class, context=context)
        while not ask.over:
            line = mutant(rng, good).decode(errors="replace")
            line = rng.choice(["", "Here: ", "```json\n", "{a} ", '{"b": 1} ', "<think>{</think>"]) + line
            odd = rng.choice(["", "{" * 2000, "[" * 2000, '{"a":' * 990 + "1" + "}" * 990])
            ask.take(rng.choice([line, line, line[:-1], odd]))
            json.dumps(ask.request, ensure_ascii=False).encode()
            assert not any(prompts.MARKUP.search(m["content"]) for m in ask.request["messages"])
        if ask.result is not None:
            json.dumps(ask.result.model_dump(), ensure_ascii=False).encode()
        n[ask.result is not None] += 1
    counted = source.tally.n
    assert counted["asks"] == counted["answered"] + counted["invalid"] == n.total()
    print(f"\nfuzz of replies, {reply_class.__name__}: {n[True]} answered, {n[False]} invalid")


# -------------------------------------------------------------------------------------- prompts of the policy

def test_no_special_token_comes_from_any_text(soak):
    """Texts made of pieces of the tokens: their number in the prompt is the template's own."""
    tokenizer, n = make_tokenizer(), Counter()
    marks = ["</s>", "<s>", "[INST]", "[/INST]", "<start_of_turn>", "<｜end｜>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    special = tokenizer.get_added_vocab()
    cut = [token[:i] for token in special for i in (1, 2, -1)]
    pieces = [*special, *cut, *"<>|/[] sxI", "<|", "|>", "im_end"]
    rng, ids = random.Random(0), set(special.values())
    for _ in range(20_000 if soak else 150):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        turn = TURN.model_copy(update={"goal": text, "context": [records.Message(role="user", content=text)]})
        found = prompts.encode_prompt(tokenizer, "Ask. {goal}", turn)
        said = prompts.encode_response(tokenizer, text)
        assert (sum(i in ids for i in found), sum(i in ids for i in said)) == (5, 1), text
        n["texts"] += 1
    print(f"\nfuzz of the policy's prompts: {n['texts']} texts, no special token of theirs")


# --------------------------------------------------------------------------------------- configs and lexicons

SCALARS = [
    "", "~", "yes", "3", "-1", "0x_", "0b_", "1e400", ".nan", "-.inf", "2026-02-30", "12:70:70", "9" * 5000,
    '"\\0"', '"\\ud83d"', "[]", "{}", "[1, [2]]", "{a: {b: c}}", "[" * 400, "&a [*a]", "*a", "0xff", "1_0",
    "!!int x", "!!map 3", "!!binary x", "!!set {a}", "!!timestamp x", "!!bool x", "!x y", "|\n  a", "a: b",
    "<<: 3", "? a", "- a", "%x", "@", "`", "'", "\t", "text", "grpo", "sft", "rules", "llm", "0.5", "1.0",
    "[0.9, 0.99]", "\u2028", "\x07"]


def check_config(load, *names):
    """A Config that is written and read back the same; or one line with one of the names."""
    try:
        cfg = load()
    except InputError as error:
        assert any(name in told(error) for name in names), error
        return False
    return cfg


def test_configs(tmp_path, soak):
    """Keys with odd values, in a file and on the command line; and files torn apart."""
    path, saved, n, start = tmp_path / "c.yaml", tmp_path / "saved.yaml", Counter(), time.perf_counter()
    rng, names = random.Random(0), list(config.FIELDS)
    whole = yaml.safe_dump(config.Config(run_dir="r").model_dump(exclude={"gpus"}), sort_keys=False)
    for i in range(4_000 if soak else 30):
        picked = rng.choices(names, k=rng.randint(1, 3))
        values = [rng.choice(SCALARS) for _ in picked]
        if i % 3 == 0:
            text, arguments = "run_dir: r\n", []
            for name, value in zip(picked, values):
                *sections, leaf = name.split(".")
                text += "".join(f"{section}: {{" for section in sections)
                text += f"{leaf}: {value}{'}' * len(sections)}\n"
        elif i % 3 == 1:
            text, arguments = "run_dir: r\n", [f"{name}={value}" for name, value in zip(picked, values)]
        else:
            text, arguments = torn(rng, whole.encode()), []
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        cfg = check_config(lambda: config.load([str(path), *arguments]), str(path), "command line", *names)
        if cfg:
            config.save(cfg, saved)
            assert repr(config.load([str(saved)])) == repr(cfg)
        n[bool(cfg)] += 1
    print(f"\nfuzz of configs: {n[True]} read, {n[False]} refused, {time.perf_counter() - start:.0f} s")


def test_any_yaml(tmp_path, soak):
    path, lex, n = tmp_path / "c.yaml", tmp_path / "l.yaml", Counter()
    row = {"run_dir": "r", "base": [], **{name: {} for name in config.SECTIONS if "." not in name}}
    data = {"logs": "a", "fields": {"goal": "x"}, "roles": {"user": "y"}, "split": 0.5, "goal": "g"}
    inside = nearly(data).map(lambda section: {"run_dir": "r", "data": section})

    @hypothesis.given(st.text() | nearly(row).map(yaml.dump) | inside.map(yaml.dump))
    def run(text):
        for file in (path, lex):
            file.write_bytes(text.encode(errors="surrogatepass"))
        n["configs"] += bool(check_config(lambda: config.load([str(path)]), str(tmp_path), *config.FIELDS))
        check_config(lambda: lexicon.load(lex), str(lex))
        n["files"] += 1

    examples(soak, run)
    print(f"\nfuzz of YAML by hypothesis: {dict(n)}")


def test_lexicons(tmp_path, soak):
    path, n, rng = tmp_path / "l.yaml", Counter(), random.Random(0)
    for _ in range(4_000 if soak else 40):
        path.write_bytes(torn(rng, THROAT.encode()))
        lex = check_config(lambda: lexicon.load(path), str(path))
        if lex:
            lexicon.asked("How long? And the fever?", lex.at("g"))
            lexicon.revealed("Any fever?", "No, two days", lex)
        n[bool(lex)] += 1
    print(f"\nfuzz of lexicons: {n[True]} read, {n[False]} refused")


# ----------------------------------------------------------------------------------------------- report pages

RUN = 'document.documentElement.setAttribute("data-canary","1")'
PAYLOADS = [
    f"<script>{RUN}</script>", f"</script><script>{RUN}</script>", f"</title></style><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>", f'"><svg onload=\'{RUN}\'>', f"' autofocus onfocus='{RUN}' x='",
    f"<svg><script>{RUN}</script></svg>", f"<style>@import 'data:,x'</style><body onload='{RUN}'>",
    f"<a href=\"javascript:{RUN}\">x</a><iframe srcdoc=\"<script>parent.{RUN}</script>\">",
    f'<iframe src="data:text/html,<script>{RUN}</script>">', f"`${{{RUN}}}` ${{title}} $figures $plotly",
    f"--><!--<script>{RUN}//\u2028{RUN}\u2029", f"</bdi></details></dl><details open ontoggle='{RUN}'>",
    f"\x00<scr\x00ipt>{RUN}</scr\x00ipt>\ufeff＜script＞",
    f"<math><mtext><table><mglyph><style><img src=x onerror='{RUN}'>",
    f'\\u003cscript>{RUN}\\u003c/script> &lt;script&gt; %3Cscript%3E ";{RUN};//']


class Page(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.policy, self.scripts = [], [], []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *sorted(name for name, _ in attrs)))
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy.append((len(self.tags), dict(attrs)["content"]))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def pages(folder, texts):
    """report.html and turns.html of a run that says these texts everywhere."""
    (folder / "run").mkdir(parents=True)
    run, turns = folder / "run", []
    for i, text in enumerate(texts):
        context = [records.Message(role=role, content=text) for role in ("user", "assistant", "user")]
        turns.append(records.Turn(turn_id=f"{i} {text}", session_id=text, goal=text, context=context,
                                  expert=text, known=[text], target=[text], decision="continue"))
    write_lines(run / "groups_before.jsonl", [{"turn": t.dump(), "graded": [
        ROLLOUT | {"turn_id": t.turn_id, "response": text, "rationale": text}]}
        for t, text in zip(turns, texts)])
    shutil.copy(run / "groups_before.jsonl", run / "groups_after.jsonl")
    write_lines(run / "metrics.jsonl", [{"step": i, "reward": 1.0, "loss": 0.5} for i in (1, 2, 3)])
    records.write_json(run / "eval.json", {"tr": 1.0, "n": 3, "decoding": texts[0], "model": texts[1],
                                           "greedy": {"tr": 2.0, "decoding": texts[2]}})
    strange = {t.turn_id: f"odd {text}" for t, text in zip(turns, texts)}
    named = folder / (re.sub("[/\0]", "", texts[5])[:60] or "x")
    run.rename(named)
    return [report.write([named], folder / "report.html"),
            report.write_turns(folder / "turns.html", "\n".join(texts), turns, strange)]


def test_pages_run_no_text(tmp_path):
    """Tags and attributes are those of harmless texts; the policy stands first; a browser runs nothing."""
    hostile = pages(tmp_path / "hostile", PAYLOADS)
    plain = pages(tmp_path / "plain", [f"x{i}" for i in range(len(PAYLOADS))])
    for ours, theirs in zip(hostile, plain):
        page, other = Page(ours), Page(theirs)
        assert page.tags == other.tags and page.policy == other.policy
        (where, policy), = page.policy
        assert where <= 5 and policy.startswith("default-src 'none'; script-src 'unsafe-inline'")
        assert not any(name.startswith("on") for _, *names in page.tags for name in names)
        assert not any(RUN in script for script in page.scripts)
    print(f"\nreport pages: {len(PAYLOADS)} payloads in {len(hostile)} pages, {len(page.tags)} tags alike")


@pytest.mark.slow
def test_a_browser_runs_no_text(tmp_path, soak):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium or google-chrome on PATH")

    def dump(path):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
                   f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=90)
        return re.search(rb"<html[^>]*>", done.stdout)[0].decode()

    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><html lang=en><script>{RUN}</script>")
    if "data-canary" not in dump(control):
        pytest.skip("this browser runs no script without a window")
    for path in pages(tmp_path / "hostile", PAYLOADS):
        opened = path.with_stem("open")  # with everything unfolded
        opened.write_text(path.read_text("utf-8").replace("<details ", "<details open "), encoding="utf-8")
        assert {dump(p) for p in ((path, opened) if soak else (opened,))} == {'<html lang="en">'}
    print(f"\nreport pages in {browser}: no payload ran")
