"""How fast hindsight.py works through a log with a language model behind a server, and how much memory it takes.

    python bench/hindsight.py [--sessions 20000] [--concurrency 64]

The server is the toy's (tests/llm_server.py), in a process of its own. Its capacity is measured in the same run: the very same
requests, sent once more by a bare loop of threads with the same concurrency over kept-open connections, parsing nothing. hindsight.py
cannot be faster than that; ratio = its rate / that rate. On a machine whose cores the server fills, both are the server's own speed.
"""
import argparse
import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPO)  # not this folder, whose files bear the modules' names

import yaml

import config
import hindsight
import toy

CHILD = """
import resource, sys, time
import hindsight
from data import cli
began = time.perf_counter()
cli(hindsight.main)
print("BENCH", time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def start_server(lexicon, port):
    server = subprocess.Popen([sys.executable, str(REPO / "tests/llm_server.py"), "--lexicon", lexicon, "--port", str(port)], stdout=subprocess.PIPE)
    server.stdout.readline()  # it says where it serves
    return server


def bare_loop(port, bodies, concurrency):
    """Post the bodies as fast as `concurrency` threads can. -> seconds"""
    waiting = queue.Queue(4 * concurrency)

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while (body := waiting.get()) is not None:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status == 200
            reply.read()

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    began = time.perf_counter()
    for t in threads:
        t.start()
    for body in bodies:
        waiting.put(body)
    for _ in threads:
        waiting.put(None)
    for t in threads:
        t.join()
    return time.perf_counter() - began


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sessions", type=int, default=20_000)
    p.add_argument("--concurrency", type=int, default=64)
    a = p.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with open(folder / "logs.jsonl", "w") as f:
            for i in range(a.sessions):
                f.write(json.dumps({**toy.session(7, "train", i), "success": True}) + "\n")
        (folder / "lexicon.yaml").write_text(yaml.safe_dump(toy.lexicon(), sort_keys=False))
        role = {"model": "toy", "base_url": f"http://127.0.0.1:{port}/v1", "concurrency": a.concurrency}
        (folder / "c.yaml").write_text(yaml.safe_dump({
            "run_dir": str(folder / "run"), "data": {"logs": str(folder / "logs.jsonl"), "lexicon": str(folder / "lexicon.yaml")},
            "hindsight": {"source": "llm"}, "llm": {"extractor": role}}))
        cfg = config.load([str(folder / "c.yaml")])
        prompt, schema = (REPO / "prompts/extractor.md").read_text().strip(), {"type": "json_schema", "json_schema": {
            "name": "extractor", "schema": hindsight.EXTRACT, "strict": True}}

        def bodies():
            for line in open(folder / "logs.jsonl"):
                session = json.loads(line)
                messages = hindsight.extractor_messages(prompt, hindsight.utterances(session["messages"]), session["goal"], cfg.hindsight.generic)
                yield json.dumps({"model": "toy", "messages": messages, "temperature": 0.0, "max_tokens": 512, "seed": 0, "response_format": schema})

        server = start_server(str(folder / "lexicon.yaml"), port)
        try:
            env = os.environ | {"PYTHONPATH": str(REPO)}
            done = subprocess.run([sys.executable, "-c", CHILD, str(folder / "c.yaml")], cwd=REPO, env=env, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.rpartition("BENCH")[0], end="")
            ours, rss = map(float, done.stdout.rpartition("BENCH")[2].split())
            peer = bare_loop(port, bodies(), a.concurrency)
        finally:
            server.kill()
        cache = (folder / "run" / "llm_cache.sqlite").stat().st_size
    print(f"hindsight.py: {a.sessions / ours:.0f} sessions/s, peak memory {rss / 1024:.0f} MiB; the server alone: {a.sessions / peer:.0f} requests/s; "
          f"cache file {cache / 2 ** 20:.1f} MiB")
    print(json.dumps({"bench": "hindsight", "sessions": a.sessions, "concurrency": a.concurrency, "cores": os.cpu_count(), "ours_s": round(ours, 2),
                      "peer_s": round(peer, 2), "ratio": round(peer / ours, 3), "peak_rss_mib": round(rss / 1024, 1)}))


if __name__ == "__main__":
    main()
