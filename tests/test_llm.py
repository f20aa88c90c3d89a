"""The sources of replies: what is sent, retried, repaired or failed; the cache; a checkpoint of one's own."""
import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from pydantic import field_validator

import grading
import llm
import rollout
from asking import QUESTION, TURN, ask, counts, graded, values
from config import RoleConfig, Stream
from prompts import PROMPTS
from records import InputError, Reply
from toy.llm_server import role_of
from world import REPO

pytestmark = pytest.mark.usefixtures("client")
WELL = (1.0, 1)


class Number(Reply):
    a: int


def test_an_address_that_is_none_is_told_with_its_key(source_of):
    with pytest.raises(InputError, match=r"llm.grader.base_url=http://\[::1 cannot be used \("):
        source_of("http://[::1")


# ---------------------------------------------------------------------------------- the protocol's failures

# What the server does with the requests -> the grade, and how many requests, calls and repairs that takes.
MISBEHAVIOUR = """
                            well    1 1 0
    429 429                 well    3 1 0
    500 503                 well    3 1 0
    drop                    well    2 1 0
    hang                    well    2 1 0
    prose                   well    1 1 0
    cut                     well    2 2 1
    types                   well    2 2 1
    range                   well    2 2 1
    empty                   well    2 2 1
    null                    well    2 2 1
    html                    well    2 2 1
    list                    well    2 2 1
    parts                   well    2 2 1
    lame                    well    2 2 1
    nojson                  well    2 2 1
    brackets                well    2 2 1
    choices                 well    2 2 1
    no_choices              well    2 2 1
    no_message              well    2 2 1
    usage                   well    2 2 1
    counts                  well    2 2 1
    think                   well    1 1 0
    half_think              well    2 2 1
    two                     well    2 2 1
    drip                    well    2 1 0
    gzip 408                well    3 1 0
    types cut               invalid 2 2 1
    empty empty             invalid 2 2 1
    types 500 500 500       failed  4 1 1
    500 500 500             failed  3 0 0
    429 429 429             failed  3 0 0
    hang hang hang          failed  3 0 0
    drop drop drop          failed  3 0 0
    drip drip drip          failed  3 0 0
    brackets nojson         invalid 2 2 1
""".strip("\n").splitlines()


@pytest.mark.parametrize("line", MISBEHAVIOUR, ids=lambda line: " ".join(line.split()))
def test_misbehaviour(line, serve, source_of):
    """The client retries, one further ask repairs; then the ask is invalid or failed: None, and counted."""
    *script, end, requests, calls, repairs = line.split()
    requests, calls, repairs = int(requests), int(calls), int(repairs)
    server = serve(script=[fault.replace("_", " ") for fault in script])
    source = source_of(server, retries=2, timeout_s=0.7)
    assert graded(source) == (WELL if end == "well" else None)
    n = counts(source)
    assert server.requests == requests
    outcomes = {kind: int(kind == end) for kind in ("invalid", "failed")}
    assert n == dict(asks=1, answered=int(end == "well"), **outcomes, calls=calls, cached=0, repairs=repairs)
    assert (source.tally.n["tokens_in"] > 100) == (calls > 0) or script[0] == "brackets"
    told = llm.report(source)
    assert told.startswith(f"1 asks: {n['answered']} answered, {n['invalid']} with unusable replies, "
                           f"{n['failed']} unanswered; {calls} calls")
    assert source.tally.n == {} and source.tally.seconds == []  # the report took them


def test_the_repair_says_what_was_wrong(serve, source_of):
    server = serve(script=["range"], record=True)
    assert graded(source_of(server)) == WELL
    first, second = (body["messages"] for body in server.bodies)
    assert second[:2] == first and [m["role"] for m in second[2:]] == ["assistant", "user"]
    assert '"score": 7' in second[2]["content"]
    assert "score must be 0, 0.5 or 1, not 7" in second[3]["content"]


def test_what_is_sent(client, serve, source_of):
    """The request as the API defines it: model, temperature, limit, seed, and the schema of the reply."""
    server = serve(record=True)
    graded(source_of(server, temperature=0.7, max_tokens=77), seed=3)
    body, = server.bodies
    assert [body[k] for k in ("model", "temperature", "max_tokens", "seed")] == ["toy", 0.7, 77, 3]
    schema = body["response_format"]["json_schema"]
    assert body["response_format"]["type"] == "json_schema" and schema["name"] == "grader"
    fields = schema["schema"]["properties"]
    assert fields["score"]["type"] == "number" and fields["score"]["enum"] == [0, 0.5, 1]
    assert fields["questions"]["type"] == "integer" and schema["schema"]["required"] == list(fields)
    assert schema["strict"] is True and schema["schema"]["additionalProperties"] is False
    assert server.keys == {f"Bearer {client}"}


@pytest.mark.slow
def test_retry_after_is_respected(serve, source_of):
    server = serve(script=["429"], retry_after="1")
    source, began = source_of(server), time.perf_counter()
    assert graded(source) == WELL and server.requests == 2
    assert time.perf_counter() - began >= 1


@pytest.mark.parametrize("script, models, words", [
    (["401"], ("toy",), ["401", "***"]), (["403"], ("toy",), ["403"]),
    ([], ("other",), ["404", "`toy` does not exist"])])
def test_what_no_retry_can_mend_ends_in_one_line(client, script, models, words, serve, source_of):
    server = serve(script=script * 9, models=models)
    with pytest.raises(llm.Unanswered) as error:
        graded(source_of(server))
    told = str(error.value)
    assert server.requests == 1 and "\n" not in told and client not in told
    words = [*words, "llm.grader", server.url, "toy", "replies so far are kept"]
    assert all(word in told for word in words), told


def test_a_server_without_schemas(capfd, serve, source_of):
    """Plain JSON from then on, said once: one refused request, not one an ask."""
    server = serve(schemas=False, record=True)
    source = source_of(server)
    questions = QUESTION, "Anything else?", "Do you smoke?"
    assert [graded(source, q) for q in questions] == [WELL, (0.5, 1), (0.5, 1)]
    assert server.requests == 4 and counts(source)["calls"] == 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]
    assert None not in values(*[ask(source_of(server), f"{i}?") for i in range(9)])
    told = f"llm.grader: {server.url} takes no JSON schema: it is asked without one\n"
    assert capfd.readouterr().out == told


def test_one_ask_that_the_server_refuses_is_one_failure(serve, source_of):
    """A conversation too long for the server (400) is not the end of the others, nor of the schema."""
    server = serve(script=["400", "400", None], record=True)
    source = source_of(server)
    assert graded(source) is None and graded(source, "Anything else?") == (0.5, 1)
    assert counts(source)["failed"] == 1 and "response_format" in server.bodies[-1]
    server.script = ["400"] * 1000  # all of them: the server is not down, what is asked is wrong
    assert values(*[ask(source, f"{i}?") for i in range(llm.GIVE_UP + 2)]) == [None] * (llm.GIVE_UP + 2)
    assert "400" in source.tally.why and counts(source)["failed"] == llm.GIVE_UP + 3
    assert "last that failed" in llm.report(source)


def test_a_server_that_is_down(serve, source_of):
    """Unanswered after GIVE_UP failures in a row; what was answered is kept."""
    server = serve()
    source = source_of(server, retries=1)
    assert graded(source) == WELL
    server.faults, server.kinds = 1.0, ("500",)
    assert values(*[ask(source, f"{i}?") for i in range(llm.GIVE_UP - 1)]) == [None] * (llm.GIVE_UP - 1)
    server.faults = 0.0
    assert graded(source, "a?") == (0.0, 1)
    server.faults = 1.0
    assert graded(source, "b?") is None  # after an answer: not in a row
    server.__exit__()
    other = source_of(server, retries=1)  # nobody listens any more
    errors = [future.exception(30) for future in [ask(other, f"{i}!") for i in range(llm.GIVE_UP + 5)]]
    assert errors.count(None) == llm.GIVE_UP - 1
    for error in filter(None, errors):
        told = str(error)
        assert isinstance(error, llm.Unanswered) and "\n" not in told
        assert server.url in told and "start again" in told
    assert graded(source_of(server)) == WELL  # from the cache


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_bounded_and_used(limit, serve, source_of):
    server = serve(delay=(0.02, 0.04))
    source, began = source_of(server, concurrency=limit), time.perf_counter()
    assert None not in values(*[ask(source, f"{i}?") for i in range(12)])
    whole = time.perf_counter() - began
    assert server.most == limit and server.requests == 12
    seconds = source.tally.seconds  # of calls, without the queue for them: `limit` run at once
    assert len(seconds) == 12 and min(seconds) >= 0.02 and sum(seconds) <= limit * whole


def test_what_must_be_named(tmp_path, source_of):
    with pytest.raises(InputError, match="llm.writer.model is not set"):
        source_of("http://x/v1", "writer", model="")
    with pytest.raises(InputError, match="none.md"):
        source_of("http://x/v1", prompt="none.md")
    with pytest.raises(InputError, match="llm.cache: .* cannot be used"):
        source_of("http://x/v1", llm__cache=str(tmp_path))


def test_each_role_has_its_prompt(source_of):
    for role, file in PROMPTS.items():
        source = source_of("http://x/v1", role)
        assert source.prompt == (REPO / file).read_text().strip() and role_of(source.prompt)
        assert source.prompt_file == file


def test_no_key_is_no_hindrance(monkeypatch, serve, source_of):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    assert graded(source_of(server)) == WELL and server.keys == {"Bearer EMPTY"}


@pytest.mark.parametrize("url", ["http://[x", "localhost:8000", "", "http://localhost:99999/v1"])
def test_an_address_where_nothing_can_be(url, source_of):
    source = source_of(url, retries=0)
    assert graded(source) is None and counts(source)["failed"] == 1 and source.tally.why


@pytest.mark.parametrize("key", ["sk-caf\xe9-0123", "sk-0123\nsk-4567", "sk-\x7f0123"])
def test_a_key_that_no_header_can_carry(key, monkeypatch, serve, source_of):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a character that no header can carry") as told:
        source_of("http://x/v1")
    assert key[3:] not in str(told.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-one-0123\r\n")
    server = serve()
    assert graded(source_of(server)) == WELL and server.keys == {"Bearer sk-one-0123"}


@pytest.mark.parametrize("said", ["K", '"K', "K J", '{"K": 1}',
                                  '{"score": 1, "questions": 1, "rationale": "K J L M N"}', "M", "N"])
def test_a_key_that_comes_back_is_kept_nowhere(said, tmp_path, monkeypatch, capfd, serve, source_of):
    """However JSON or a URL escapes it, in a reply or an answer of another form."""
    key = "sk-ca/na+ry=0123"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    escaped = key.replace("/", "\\/"), key.replace("+", "\\u002B"), quote(key, ""), quote(key).lower()
    for name, form in zip("KJLMN", (key, *escaped)):
        said = said.replace(name, form)
    told = ""
    for fault in "text", "echo", "echo only", "headers":
        source = source_of(serve(script=[fault] * 9, texts=[said] * 9), llm__cache=str(tmp_path / fault))
        grade = ask(source).result(20)
        told += f"{grade} {llm.report(source)}"
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    told += kept.decode(errors="replace") + "".join(capfd.readouterr())
    assert "***" in told
    for form in (key, *escaped):
        assert form not in told and form.replace("\\", "\\\\") not in told


def test_what_a_server_says_is_told_without_control_characters(source_of):
    source = source_of("http://x/v1")
    source.unanswered(ValueError("\x1b[2J a\nb\x9bc"))
    assert source.tally.why == "ValueError: [2J a b c" and source.tally.why in llm.report(source)


# ------------------------------------------------------------------------------------------------- the cache

def test_the_cache(tmp_path, serve, source_of):
    server = serve(models=("toy", "other"))
    source, again = source_of(server), partial(source_of, server)
    assert graded(source) == graded(source) == WELL
    assert server.requests == 1 and counts(source)["cached"] == 1
    # how often and how long it is asked changes no reply
    assert graded(again()) == graded(again(timeout_s=9.0, retries=1)) == WELL
    assert graded(again(concurrency=2)) == WELL and server.requests == 1
    others = again(model="other"), again(temperature=0.5), again(max_tokens=99)
    turn = TURN.model_copy(update={"goal": "h"})
    futures = [ask(source, "x?"), ask(source, seed=1), ask(source, turn=turn), *map(ask, others)]
    assert None not in values(*futures) and server.requests == 7
    assert graded(again(llm__cache=str(tmp_path / "there" / "c.sqlite"))) and server.requests == 8
    assert (tmp_path / "there" / "c.sqlite").is_file() and (tmp_path / "run" / "llm_cache.sqlite").is_file()


def test_two_servers_of_one_model_name_share_no_reply(serve, source_of):
    """Behind one name may be another model: grader and auditor at two addresses never read each other's."""
    one, two = serve(), serve(script=["text"], texts=['{"score": 0.5, "questions": 3}'])
    for _ in range(2):  # the second time from the cache
        assert [graded(source_of(server)) for server in (one, two)] == [WELL, (0.5, 3)]
    assert one.requests == two.requests == 1


@pytest.mark.parametrize("spoil, said", [
    ("PRAGMA max_page_count=1", "full"), ("PRAGMA query_only=1", "readonly"),
    ("UPDATE reply SET text = x'8004952e'", "UTF-8"), ("DROP TABLE reply", "no such table")])
def test_a_cache_that_fails_later_is_a_miss_said_once(serve, source_of, capsys, spoil, said):
    """A full disk, a read-only file, bytes that are no text (a pickle, say)."""
    source = source_of(serve())
    assert graded(source) == WELL
    source.cache.db.execute(spoil)
    assert None not in values(ask(source), *(ask(source, str(i)) for i in range(60)))
    told = "".join(capsys.readouterr())
    assert told.count("warning: llm.cache") == 1 and said in told


def test_the_schema_is_part_of_the_key(serve, source_of):
    class Score(Reply):
        score: float

    server = serve()
    source = source_of(server)
    messages, _ = grading.grader_question(source.prompt, TURN, QUESTION)
    for reply_class in (grading.Grade, Score) * 2:
        assert source.submit(messages, reply_class).result(20).score == 1
    assert server.requests == 2


def test_unanswered_asks_are_not_cached_and_a_repaired_one_is(serve, source_of):
    server = serve(script=["500", "empty", "html", "types"])
    source = source_of(server, retries=0)
    assert [graded(source) for _ in range(3)] == [None, None, WELL] and server.requests == 5
    assert graded(source) == WELL and server.requests == 5
    assert counts(source) == dict(asks=4, answered=2, invalid=1, failed=1, calls=4, cached=1, repairs=2)


def test_a_cached_reply_that_is_no_longer_usable_is_repaired(serve, source_of):
    """Validators read the context, which is no part of the key."""
    class Small(Reply):
        a: int

        @field_validator("a")
        @classmethod
        def at_most(cls, a, info):
            if a > info.context:
                raise ValueError(f"must be at most {info.context}")
            return a

    server = serve(script=["text"] * 2, texts=['{"a": 7}', '{"a": 2}'], record=True)
    source = source_of(server)
    messages = [{"role": "user", "content": "a number"}]
    got = [source.submit(messages, Small, context=most).result(20).a for most in (9, 3)]
    assert got == [7, 2] and "a must be at most 3" in server.bodies[-1]["messages"][-1]["content"]
    assert counts(source) == dict(asks=2, answered=2, invalid=0, failed=0, calls=2, cached=1, repairs=1)


IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from asking import ask, open_source, values
source, first = open_source(Path(sys.argv[1]), sys.argv[2]), int(sys.argv[3])
print(values(*[ask(source, f"{i}?") for i in range(first, first + 40)]) == [(0.0, 1)] * 40)
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path, serve, source_of):
    """Both write at once; nothing is lost, nothing is asked twice, and afterwards neither has to ask."""
    server = serve(delay=(0.5, 1))
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), server.url]
    both = [subprocess.Popen([*command, first], cwd=REPO, stdout=subprocess.PIPE, text=True)
            for first in ("0", "20")]
    assert [p.communicate(timeout=120)[0] for p in both] == ["True\n"] * 2
    before, source = server.requests, source_of(server)
    assert len(server.asked) == 60 == before  # of what both want, one asks and the other waits
    assert values(*[ask(source, f"{i}?") for i in range(60)]) == [(0.0, 1)] * 60
    assert server.requests == before and counts(source)["cached"] == 60


@pytest.mark.slow
@pytest.mark.parametrize("end", ["401", "kill"])
def test_what_another_process_gave_up_is_asked(end, tmp_path, serve, source_of):
    """A claim ends with the ask, and with its process."""
    server = serve(script=["hang" if end == "kill" else end] * 10)
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), server.url, "0"]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL) as other:
        while not server.requests:
            time.sleep(0.01)
        server.script, source = [], source_of(server)
        future = ask(source, "0?")
        if end == "kill":
            time.sleep(0.3)
            assert not future.done()
            other.kill()
        assert values(future) == [(0.0, 1)]
        other.kill()


@pytest.mark.parametrize("harm, said", [("DROP TABLE reply", "no such table"),
                                        ("PRAGMA max_page_count=1", "full")])
def test_a_cache_that_fails_on_the_way_is_a_miss(harm, said, capfd, serve, source_of):
    """It is said once; every ask has its answer."""
    server = serve()
    source = source_of(server)
    source.cache.db.execute(harm)
    for _ in range(2):
        assert values(*[ask(source, f"{i}?") for i in range(60)]) == [(0.0, 1)] * 60
    told = "".join(capfd.readouterr())
    assert told.count("warning: llm.cache: ") == told.count(said) == 1 and 60 < server.requests <= 120


# ----------------------------------------------------------------------------------------- objects in replies

@pytest.mark.parametrize("text, value", [
    ('{"a": 1}', {"a": 1}), (' \n{"a": {"b": [{}]}}\n', {"a": {"b": [{}]}}),
    ('x {y} {"a": "{\\"b\\": 2}"} z', {"a": '{"b": 2}'}), ('He said "{" and {"score": 1}', {"score": 1}),
    ('```json\n{"a": "```"}\n```', {"a": "```"}), ('{"a": "😷"}', {"a": "😷"}),
    ('{"candidate": "x", {"score": 1}', {"score": 1}),
    ('\n<think>{"a": 2} or {"a": 3}?</think>\n{"a": 1}', {"a": 1}), ("{x} " * 900 + '{"a": 1}', {"a": 1})])
def test_parse_object(text, value):
    assert llm.parse_object(text) == value


@pytest.mark.parametrize("unit", ["{", '{"a":[', '{"a":', '{"a":1,', '{"', "[", " "])
def test_a_long_reply_without_an_object_takes_no_time(unit):
    with pytest.raises(ValueError, match="no JSON object|braces"):
        llm.parse_object(unit * (200_000 // len(unit)))


@pytest.mark.parametrize("text", ["", "no", "[1]", '{"a": 1', '{"a": 1} {"a": 2}', "{'a': 1}", '{"a": 1}' * 2,
                                  '{"a": "\\ud83d"}', '<think>so {"a": 1}', '{"a": 1} </think>{"a": 2}',
                                  "{" * 10 ** 6, '{"a":' * 10 ** 5,
                                  '{"' * 10 ** 5, '{"a": 1' * 10 ** 5, "x" * 10 ** 6 + '{"a": 1}'],
                         ids=lambda text: text[:20])
def test_no_object_or_several(text):
    """In no time, however long: the work grows with the length alone."""
    began = time.perf_counter()
    with pytest.raises(ValueError):
        Number.model_validate(llm.parse_object(text))
    assert time.perf_counter() - began < 2


def test_an_object_of_any_depth():
    """Some are deep enough to be read and too deep to be shown or checked: one unusable reply each."""
    cache = SimpleNamespace(get=lambda what: None)
    source = SimpleNamespace(settings=RoleConfig(), tally=llm.Tally(), cache=cache)
    for n in range(700, 1000):
        llm.Ask(source, [], Number).take(f'{{"a": {"[" * n + "]" * n}}}')
    assert source.tally.n["repairs"] == 300


def test_an_object_as_deep_as_python_can_read():
    for n in range(900, 1000):
        with suppress(ValueError):
            llm.parse_object('{"a":' * n + "1" + "}" * n)


# ------------------------------------------------------------------------------------ every key of every role

@pytest.mark.slow
@pytest.mark.parametrize("role", list(PROMPTS))
def test_every_key_of_a_role_acts(role, tmp_path, monkeypatch, client, serve, source_of):
    """As the server sees model, base_url, api_key_env, prompt, temperature, max_tokens, concurrency,
    timeout_s and retries."""
    monkeypatch.setenv("ANOTHER_KEY", "sk-two")
    (tmp_path / "own.md").write_text("own {goal}")
    server = serve(record=True, models=("toy", "m"))

    def asks(*faults, n=1, **keys):
        server.script, server.texts = list(faults) or ["text"] * n, ['{"a": 1}'] * n
        keys = {"retries": 0, "llm__cache": str(tmp_path / f"{len(server.bodies)}.sqlite")} | keys
        source = source_of(server, role, **keys)
        asked = [[{"role": "system", "content": source.prompt}, {"role": "user", "content": f"{i}"}]
                 for i in range(n)]
        replies = [future.result(30) for future in [source.submit(m, Number) for m in asked]]
        return [reply and reply.a for reply in replies]

    for key, value in {"model": "m", "temperature": 0.25, "max_tokens": 33}.items():
        assert asks(**{key: value}) == [1] and server.bodies[-1][key] == value
    assert asks(api_key_env="ANOTHER_KEY") == [1] and server.keys == {f"Bearer {client}", "Bearer sk-two"}
    assert asks(prompt=str(tmp_path / "own.md")) == [1]
    assert server.bodies[-1]["messages"][0]["content"] == "own {goal}"
    assert asks(base_url=serve().url) == [None] and server.requests == 5  # the other says that it is a toy
    assert asks("500", "500", "500", retries=2) == [None] and asks("500", "text", retries=1) == [1]
    server.most, server.delay = 0, (0.02, 0.03)
    assert asks(n=6, concurrency=2) == [1] * 6 and server.most == 2
    assert asks("hang", timeout_s=0.1) == [None]
    assert isinstance(source_of(server, role), llm.Endpoint)


def test_source_local_is_a_checkpoint(tiny_checkpoint, source_of):
    for role in PROMPTS:
        source = source_of("", role, source="local", model=str(tiny_checkpoint))
        assert isinstance(source, llm.Local)


# --------------------------------------------------------------------------------- a checkpoint of one's own

@pytest.fixture
def local_source(source_of):
    """local_source(model=folder, **keys)"""
    return partial(source_of, "", source="local", max_tokens=12)


def test_a_local_model_that_babbles(local_source, marks_checkpoint):
    """Replies that cannot be used are counted, repaired once, never a grade and never kept."""
    source = local_source(model=str(marks_checkpoint))
    futures = [ask(source, f"{i}?") for i in range(3)]
    assert not any(future.done() for future in futures)
    source.drain()
    assert values(*futures) == [None] * 3
    assert counts(source) == dict(asks=3, answered=0, invalid=3, failed=0, calls=6, cached=0, repairs=3)
    n = source.tally.n
    assert 0 < n["tokens_out"] <= 6 * 12 and n["tokens_in"] > 6 * 500 and len(source.tally.seconds) == 6
    again = local_source(model=str(marks_checkpoint))
    future = ask(again, "1?")
    again.drain()
    again.drain()  # with nothing to do
    assert values(future) == [None] and counts(again)["cached"] == 0 and counts(again)["calls"] == 2


def test_a_local_model_that_replies(local_source, tiny_checkpoint, tiny_tokenizer, monkeypatch):
    """One batch a round, the second of what needs a repair; noise by seed and place in the batch; values in
    the order asked."""
    batches = []

    def generate(model, prompts, ends, sampling, keys):
        batches.append(keys)
        assert sampling == rollout.Sampling(1, 12, 0.7, max_rows=64)
        out = []
        for text in map(tiny_tokenizer.decode, prompts):
            number = int(re.findall(r'Candidate: "(\d+)\?"', text)[0])
            said = "what?" if number % 2 else ""
            if "That cannot be used" in text or number % 3:
                said = json.dumps({"score": 1, "questions": number})
            tokens = tiny_tokenizer(said, add_special_tokens=False).input_ids
            out.append([rollout.Response([*tokens, 258], [], "stop", 0.7, 1.0)])
        return out

    monkeypatch.setattr(rollout, "generate", generate)
    source = local_source(model=str(tiny_checkpoint), temperature=0.7)
    numbers = 1, 2, 3, 4, 5, 9
    futures = [ask(source, f"{i}?", seed=i % 2) for i in numbers]
    source.drain()
    assert values(*futures) == [(1.0, i) for i in numbers]
    stream = Stream.LOCAL_LLM
    assert batches == [[(stream, i % 2, k) for k, i in enumerate(numbers)], [(stream, 1, 0), (stream, 1, 1)]]
    assert counts(source) == dict(asks=6, answered=6, invalid=0, failed=0, calls=8, cached=0, repairs=2)
    source.drain()
    assert len(batches) == 2
