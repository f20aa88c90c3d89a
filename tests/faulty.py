"""Faults at chosen places: the n-th call of a function kills its process, raises, or finds the disk full.

    torchrun ... tests/faulty.py RANK:PLACE:N:BLOW SCRIPT ARGUMENT ...   # PLACE: module.function

The function is replaced in one rank of the process that the test started: the code itself has no hook. A
Stage runs many scripts so, each in processes that are forked from one which has all modules imported.
"""
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import yaml

import records
from autoprompt import LABEL
from toy.world import lexicon, session
from world import REPO, let_go, make_baseline, read_lines, timeless, write_lines

SCRIPTS = "hindsight pairs train_sft train_dpo train_grpo eval autoprompt rollout".split()


def kill(*_, **how):
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_, **how):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mine(*_, **how):
    raise records.InputError("mine alone")


def bug(*_, **how):
    raise ValueError("a bug of mine")


def half_a_line(log, record, then=kill):
    if log.file:
        log.file.write(json.dumps(record)[:25])
        log.file.flush()
    then()


def full_amid_a_line(log, record):
    half_a_line(log, record, full)


def half_a_file(tensors, path, **metadata):
    Path(path).write_bytes(b"half")
    kill()


def strike(place, n=0, blow=None):
    """From now on the n-th call of this function is the blow. -> list that grows by one with each call"""
    owner, _, name = place.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), []
    real = getattr(owner, name)

    def struck(*args, **how):
        calls.append(place)
        if len(calls) == n:
            globals()[blow](*args, **how)
        return real(*args, **how)

    setattr(owner, name, struck)
    return calls


# ----------------------------------------------------------------------------------- a stage for many scripts

def drop_capabilities():
    """Even root must then respect the permissions of files."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def perform(rank, job):
    """In a forked process: one rank of a script."""
    os.chdir(job["cwd"])
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    if job["ranks"] > 1:
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
        values = rank, rank, job["ranks"], job["ranks"], "127.0.0.1", job["port"]
        os.environ.update(zip(names, map(str, values)))
    os.environ.update(job.get("env", {}))
    sys.argv = [f"{job['script']}.py", *job["args"]]
    main = importlib.import_module(job["script"]).main
    for struck, place, n, blow in job.get("faults", ()):
        if rank == struck:
            strike(place, n, blow)
    counts = {place: strike(place) for place in job.get("count", ())}
    if "wait" in job:  # what a rank waits before it tells an error that another may tell too
        sleep = time.sleep
        records.time.sleep = lambda seconds: sleep(min(seconds, job["wait"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit none
    if job.get("unprivileged"):
        drop_capabilities()
    if "fsize" in job:
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)  # no limit for what is said
        for stream in (1, 2):
            os.dup2(cat.stdin.fileno(), stream)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], job["fsize"]))
    records.cli(main)
    found = {place: len(calls) for place, calls in counts.items()}
    Path(f"{job['log']}.{rank}.txt").write_text(json.dumps(found))


def end(work, *arguments):
    """Do this, and end the process with its exit code at once: to tidy up a forked heap takes seconds."""
    code = 0
    try:
        work(*arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def serve():
    """Fork, for each line that comes in, the ranks of a job, and answer how each of them ended."""
    for module in ("openai", "transformers", *SCRIPTS):  # before the forks
        importlib.import_module(module)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            job["port"] = s.getsockname()[1]
        pids = []
        for rank in range(job["ranks"]):
            pids.append(os.fork())
            if not pids[-1]:
                end(perform, rank, job)
        print(json.dumps(watch(pids, job)), flush=True)


def watch(pids, job):
    """Wait for the ranks; where one has failed the others get a while, then SIGTERM (as torchrun does)."""
    began, ended, failed = time.monotonic(), {}, None
    while len(ended) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
            failed = failed or ended[pid] and now
        elif failed and now - failed > job.get("grace", 0.2) or now - began > 60:
            for left in set(pids) - set(ended):
                os.kill(left, signal.SIGKILL if now - began > 60 else signal.SIGTERM)
            failed = failed and now
        if "signal" in job and not ended and (mark := Path(job["mark"])).is_file() \
                and mark.read_bytes().count(b"\n") > job["lines"]:
            number, began = job.pop("signal"), now
            for pid in pids:
                os.kill(pid, number)
        time.sleep(0.005)
    return {"codes": [ended[pid] for pid in pids], "seconds": time.monotonic() - began}


class Stage:
    """The other end of serve(), in a test."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OPENAI_API_KEY": "none",
                            "PYTHONPATH": str(REPO)}
        self.server = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, text=True,
                                       stdout=subprocess.PIPE, env=env)
        assert self.server.stdout.readline() == "ready\n"

    def run(self, folder, script, *arguments, ranks=1, **job):
        """Run a script on so many ranks in this folder -> (exit codes, what they printed, seconds)."""
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        job |= {"script": script, "args": [str(a) for a in arguments], "ranks": ranks, "cwd": str(folder),
                "log": str(log)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        time.sleep(0.05 * ("fsize" in job))
        return answer["codes"], log.read_text(errors="replace"), answer["seconds"]

    def count(self, folder, script, *arguments, places, **how):
        """The same without a fault -> for each rank {place: how often it calls it}."""
        codes, said, _ = self.run(folder, script, *arguments, count=places, **how)
        assert not any(codes), said
        return [json.loads((folder / f"log.txt.{rank}.txt").read_text()) for rank in range(len(codes))]

    def close(self):
        self.server.stdin.close()
        self.server.wait()


# --------------------------------------------------------------------------------- scripts that are disturbed

def world_of(script, folder, checkpoint, server):
    """What the script needs, in this folder -> its arguments."""
    shutil.copytree(REPO / "prompts", folder / "prompts")
    if script.startswith("train") or script in ("eval", "pairs"):
        loss = script.removeprefix("train_") if script.startswith("train") else "dpo"
        with contextlib.redirect_stdout(None):  # of pairs.py
            path = make_baseline(folder, checkpoint, loss, train__eval_every=2, train__steps=4,
                                 train__lr=1e-2, train__steps_per_sync=1 + (loss == "grpo"))
        let_go()
        if script == "pairs":
            (folder / "run" / "pairs.jsonl").unlink()
        return [path]
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(lexicon()))
    logs = write_lines(folder / "logs.jsonl", [session(1, "train", i) for i in range(12)])
    role = {"model": "toy", "base_url": server.url, "timeout_s": 9.0}
    tree = {"run_dir": str(folder / "run"), "data": {"logs": [str(logs)], "lexicon": "lexicon.yaml",
            "split": 0.3}, "hindsight": {"source": "llm"}, "llm": {"extractor": role, "grader": role}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    if script == "hindsight":
        return [folder / "run.yaml"]
    turn = dict(goal="g", known=[], target=["fever: no"], decision="continue")
    write_lines(folder / "anchors.jsonl", [
        {"turn": turn | {"turn_id": f"{i}_1", "session_id": str(i), "context": [
            {"role": "user", "content": f"I have a cough, {i}"}]},
         "response": ("Do you have a fever?", "Fever, cough", "Any fever? Since when?")[i % 3],
         LABEL["grader"]: (1, 0, 0.5)[i % 3]} for i in range(16)])
    return [folder / "run.yaml", "type=grader", "rounds=2", "candidates=4", f"anchors={folder}/anchors.jsonl"]


def result(folder):
    """{file: what it holds} of all that a script leaves, but for times, pages and what no reader sees."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.suffix in (".html", ".sqlite", ".txt") or any(
                part.startswith(".") or part.endswith((".tmp", ".old")) for part in path.parts[-3:]):
            continue
        found[name] = timeless(read_lines(path)) if path.name == "metrics.jsonl" else path.read_bytes()
    return found


class Trial:
    """Runs of one script that start from the same folder, at the same path."""

    def __init__(self, stage, tmp_path, checkpoint, server, script, *overrides):
        self.stage, self.script, self.folder = stage, script, tmp_path / "work"
        self.folder.mkdir()
        self.arguments = [*world_of(script, self.folder, checkpoint, server), *overrides]
        self.fresh = tmp_path / "fresh"
        if script == "eval":  # of a finished run
            assert self.run("train_dpo")[0] == [0]
        shutil.copytree(self.folder, self.fresh)

    def again(self):
        shutil.rmtree(self.folder)
        shutil.copytree(self.fresh, self.folder)

    def run(self, script=None, **job):
        return self.stage.run(self.folder, script or self.script, *self.arguments, **job)

    def ends_as(self, whole, after, **how):
        """Started again, the script ends with the results of an uninterrupted run."""
        codes, said, _ = self.run(**how)
        assert not any(codes), (after, said)
        found = result(self.folder)
        differ = [name for name in {*whole, *found} if whole.get(name) != found.get(name)]
        assert not differ, (after, differ)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        fault, script, *arguments = sys.argv[1:]
        rank, place, n, blow = fault.split(":")
        sys.argv = [script, *arguments]
        main = importlib.import_module(Path(script).stem).main
        if os.environ.get("RANK", "0") == rank:
            strike(place, int(n), blow)
        records.cli(main)
