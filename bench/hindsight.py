"""How fast hindsight.py works through a log with a language model behind a server, and how much memory it
takes.

    python -m bench.hindsight [--sessions 20000] [--concurrency 64]

The server is the toy's (toy/llm_server.py), in a process of its own. Its capacity is measured in the same
run: the very same requests are sent once more by a bare loop of threads with the same concurrency over
kept-open connections, which parses nothing. hindsight.py cannot be faster than that; ratio = its rate /
that rate. On a machine whose cores the server fills, both are the server's own speed. Ends in one JSON
line.
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

import yaml

import config
import hindsight
import llm
import toy.world
from prompts import load_prompt
from records import Session, read_records, write_jsonl

REPO = Path(__file__).resolve().parent.parent
CHILD = """
import resource, sys, time
import hindsight
from records import cli
began = time.perf_counter()
cli(hindsight.main)
print("BENCH", time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(lexicon, port):
    command = [sys.executable, "-m", "toy.llm_server", "--lexicon", str(lexicon), "--port", str(port)]
    server = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
    server.stdout.readline()  # it says where it serves
    return server


def write_run(folder, sessions, concurrency, port):
    """Logs, lexicon and config of a run under `folder` -> the config's path."""
    rows = ({**toy.world.session(7, "train", i), "success": True} for i in range(sessions))
    write_jsonl(folder / "logs.jsonl", rows)
    (folder / "lexicon.yaml").write_text(yaml.safe_dump(toy.world.lexicon(), sort_keys=False))
    role = {"model": "toy", "base_url": f"http://127.0.0.1:{port}/v1", "concurrency": concurrency}
    data = {"logs": str(folder / "logs.jsonl"), "lexicon": str(folder / "lexicon.yaml")}
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "data": data,
                                    "hindsight": {"source": "llm"}, "llm": {"extractor": role}}))
    return path


def requests(cfg):
    """The bodies of the requests that hindsight.py makes with this config."""
    prompt = load_prompt(REPO / "prompts" / "extractor.md", ())
    schema = {"name": "extractor", "schema": llm.schema_of(hindsight.Extraction), "strict": True}
    for _, session in read_records(cfg.data.logs[0], Session):
        utterances = hindsight.utterances(session.messages)
        messages = hindsight.extractor_messages(prompt, utterances, session.goal, cfg.hindsight.generic)
        yield json.dumps({"model": "toy", "messages": messages, "temperature": 0.0, "max_tokens": 512,
                          "seed": 0, "response_format": {"type": "json_schema", "json_schema": schema}})


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


def timed_hindsight(path):
    """hindsight.py with this config, in a process of its own -> (seconds, peak KiB)."""
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    shown, _, figures = done.stdout.rpartition("BENCH")
    print(shown, end="")
    return map(float, figures.split())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=64)
    a = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = write_run(folder, a.sessions, a.concurrency, port)
        server = start_server(folder / "lexicon.yaml", port)
        try:
            ours, rss = timed_hindsight(path)
            peer = bare_loop(port, requests(config.load([str(path)])), a.concurrency)
        finally:
            server.kill()
        cache = (folder / "run" / "llm_cache.sqlite").stat().st_size
    print(f"hindsight.py: {a.sessions / ours:.0f} sessions/s, peak memory {rss / 1024:.0f} MiB; the server "
          f"alone: {a.sessions / peer:.0f} requests/s; cache file {cache / 2 ** 20:.1f} MiB")
    print(json.dumps({"bench": "hindsight", "sessions": a.sessions, "concurrency": a.concurrency,
                      "cores": os.cpu_count(), "ours_s": round(ours, 2), "peer_s": round(peer, 2),
                      "ratio": round(peer / ours, 3), "peak_rss_mib": round(rss / 1024, 1)}))


if __name__ == "__main__":
    main()
