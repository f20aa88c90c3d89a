"""A campaign against faulty servers: each kind of fault that toy/llm_server.py plays, in extraction, grading,
pairs and Auto-Prompt. Nothing may be lost or asked twice, every count must add up, an error is one line, and
the key to the server is written nowhere. `make soak` runs it at full length."""
import random
import re
import shutil
import sys
import threading
from collections import Counter
from itertools import product

import pytest

import autoprompt
import hindsight
import llm
import pairs
import records
import rollout
import train_grpo
from asking import QUESTION, ask, counts, open_source, turns_of, values, write_config, write_logs
from toy.llm_server import EVERY, HARMLESS, Server
from world import REPO, coughs, make_world, metrics, read_lines, timeless, write_lines

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("client")]
CANARY = "sk-canary/7f+3=0123456789"
SAID = [QUESTION, "How long? Any color?", "What color?", "<stop />", "Do you smoke?", "how long how long"]
DENIED, SLOW = ["401", "403", "404"], ["hang", "drip"]
KINDS = "asks answered invalid failed calls repairs cached".split()  # as llm.report names their numbers


def leaks(folder):
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_one_ask_of_each_kind(tmp_path, monkeypatch, serve):
    """Answered, unusable or unanswered, and counted as such. A healthy server then answers all."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    server = serve(faults=1.0)
    patient, hasty = (open_source(tmp_path, server, retries=1, timeout_s=s) for s in (20.0, 0.3))
    kinds = EVERY + DENIED
    for i, kind in enumerate(kinds):
        source = hasty if kind in SLOW else patient
        server.kinds, grade, source.tally.why = [kind], None, None
        try:
            grade = ask(source, f"{i}?").result(20)
            assert kind not in DENIED and counts(source)["answered"] == (kind in HARMLESS), kind
        except llm.Unanswered as error:
            assert kind in DENIED and CANARY not in str(error)
        told = llm.report(source)
        assert CANARY not in told and len(told) < 900
        assert (grade is not None) == (kind in HARMLESS) == ("the last that failed: " not in told), kind
    server.faults, source = 0.0, open_source(tmp_path, server)
    assert values(*[ask(source, f"{i}?") for i in range(len(kinds))]) == [(0.0, 1)] * len(kinds)
    assert set(server.answered.values()) == {1} and not leaks(tmp_path)


# ----------------------------------------------------------------------------------------------- the commands

class Desk:
    """The four commands, and what they wrote with a healthy server. A run of all four is a folder."""

    def __init__(self, folder, checkpoint, lexicon, server, n):
        self.folder, self.checkpoint, self.lexicon, self.server = folder, checkpoint, lexicon, server
        self.logs, self.turns, self.totals, self.codes = write_logs(folder, n), coughs(n), Counter(), {}
        for i, turn in enumerate(self.turns):  # each once: else the same may be asked twice at one time
            turn["context"][0]["content"] += f" {i}"
        rng = random.Random(0)
        write_lines(folder / "anchors.jsonl", [
            dict(turn=turn | dict(decision="continue"), response=rng.choice(SAID), score=rng.choice((0.5, 1)))
            for turn in self.turns])
        self.new("clean")
        self.clean = {name: self.made(name) for name in self.commands if self.run(name) == 0}

    def new(self, name, **how):
        """A run's configs, and no counts of the server's."""
        how = dict(model="toy", base_url=self.server.url, retries=1, concurrency=8, timeout_s=3.0) | how
        roles = {f"llm__{role}__{key}": value for role in ("extractor", "grader", "writer")
                 for key, value in how.items()}
        folder = self.folder / name
        roles |= dict(llm__writer__max_tokens=4096)
        self.world = make_world(folder, self.checkpoint, reward__grader="llm", reward__max_failed=0.0,
                                train__checkpoint_every=50, data__lexicon="", **roles)
        write_lines(folder / "run" / "turns" / "train.jsonl", self.turns)
        self.extraction = write_config(folder, self.lexicon, "", self.logs, "turns", **roles)
        self.commands = {"extraction": (hindsight, self.extraction), "pairs": (pairs, self.world),
                         "grading": (train_grpo, self.world),
                         "autoprompt": (autoprompt, self.world, "type=grader", "rounds=2", "candidates=4",
                                        f"anchors={self.folder}/anchors.jsonl")}
        self.server.answered.clear()

    def run(self, name, *overrides):
        """-> exit code of a command. What it prints is checked."""
        script, *arguments = self.commands[name]
        self.capfd.readouterr()
        sys.argv, code = [f"{script.__name__}.py", *map(str, arguments), *overrides], 0
        try:
            records.cli(script.main)
        except SystemExit as end:
            code = end.code
        out, err = self.capfd.readouterr()
        assert CANARY not in out + err and "Traceback" not in err, err
        errors = [line for line in err.splitlines() if "error: " in line]
        assert (code, len(errors)) in ((0, 0), (2, 1)), (name, out, err)
        for line in re.findall(r"\d+ asks: .*", out):
            n = dict(zip(KINDS, map(int, re.findall(r"\d+", line))))
            assert n["asks"] == n["answered"] + n["invalid"] + n["failed"]
            assert n["answered"] + n["invalid"] + n["repairs"] - n["failed"] <= n["calls"] + n["cached"]
            lost = n["invalid"] + n["failed"]
            if name == "extraction":
                assert ("no usable extraction" in out) == (lost > 0)
                assert not lost or f"set aside: {lost} no usable extraction" in out
            if name == "pairs":
                assert not lost or f"left out: {lost} the language model failed" in out
                assert code or f"{len(self.turns) - lost} pairs of {len(self.turns)} turns" in out
            self.totals.update(n)
        self.codes.setdefault(name, Counter())[code] += 1
        return code

    def made(self, name):
        """-> what a command wrote, without what was counted or timed."""
        run = self.world.parent / "run"
        if name == "grading":
            return [{k: v for k, v in line.items() if not k.startswith("grade_")}
                    for line in timeless(metrics(self.world))]
        return turns_of(self.extraction) if name == "extraction" else read_lines(
            run / ("pairs.jsonl" if name == "pairs" else "autoprompt/grader.jsonl"))

    def recover(self):
        """A healthy server brings all to the clean run's results, and was asked nothing that was answered.

        A repaired reply of the writer may be another prompt: Auto-Prompt comes to what the replies give.
        """
        self.server.faults = 0.0
        for name in self.commands:
            assert self.run(name) == 0
            assert name == "autoprompt" or self.made(name) == self.clean[name], name
        ledger, requests = self.made("autoprompt"), self.server.requests
        (self.world.parent / "run" / "autoprompt" / "scores.sqlite").unlink()
        assert self.run("autoprompt") == 0 and self.made("autoprompt") == ledger
        assert self.server.requests == requests and not leaks(self.folder)
        assert max(self.server.answered.values()) == 1, self.server.kinds

    def tell(self, what):
        codes = ", ".join(f"{name} {dict(found)}" for name, found in self.codes.items())
        with self.capfd.disabled():
            print(f"\n{what}: {dict(self.totals)}; exit codes: {codes}")
        self.totals, self.codes = Counter(), {}


@pytest.fixture
def desk(tmp_path, monkeypatch, capfd, marks_checkpoint, lexicon_file, serve, soak):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setattr(llm, "GIVE_UP", 15)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(rollout.Policy, "text", lambda self, tokens: SAID[sum(tokens) % len(SAID)])
    monkeypatch.setattr(Desk, "capfd", capfd, raising=False)
    shutil.copytree(REPO / "prompts", tmp_path / "prompts")
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, marks_checkpoint, lexicon_file, serve(), 40 if soak else 12)


def test_faults(desk, soak):
    """All kinds at 30%; then each kind alone, always, which ends all commands but Auto-Prompt."""
    kinds = [kind for kind in EVERY if soak or kind not in SLOW]
    mixed = [(0.3, kinds, seed) for seed in range(10 if soak else 1)]
    for share, kinds, seed in mixed + [(1.0, [kind], 0) for kind in (EVERY + DENIED if soak else ["html"])]:
        desk.new(f"{share} {kinds[0]} {seed}")
        vars(desk.server).update(faults=share, kinds=kinds, seed=seed)
        for name in desk.commands:
            code = desk.run(name, f"hindsight.max_failed={1 if share < 1 else 0.2}")
            assert share < 1 or name == "autoprompt" or code == 2 * (kinds[0] not in HARMLESS), (kinds, name)
        desk.recover()
        if share < 1 and seed == len(mixed) - 1:
            desk.tell(f"{len(mixed)} times {len(kinds)} kinds at 30%")
    desk.tell("each kind alone")


def test_the_server_dies(desk, lexicon_file, soak):
    """It is back while the commands still try again, which then lose nothing, or after they have ended."""
    address, answered, servers = desk.server.server_address, desk.server.answered, []

    def rise():
        servers.append(Server(lexicon_file, address[1]).__enter__())
        servers[-1].answered, desk.server = answered, servers[-1]

    def mortal(server, last, back):
        def fault(key, attempt, body):
            if server.requests == last:
                server.__exit__()
                if back:
                    threading.Timer(0.1, rise).start()
            return "drop" if server.requests >= last else None

        server.fault = fault

    for n, back in product(range(2, 12, 3) if soak else [4], (True, False)):
        desk.new(f"dies {n} {back}", retries=9 if back else 1)
        for name in desk.commands:
            deaths = len(servers)
            mortal(desk.server, desk.server.requests + n, back)
            assert desk.run(name) == 0 or not back
            if not back:
                rise()
            assert len(servers) == deaths + 1, name
        desk.recover()
    desk.tell(f"{len(servers)} deaths of the server")
    for server in servers:
        server.__exit__()
