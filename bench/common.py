"""What the benches share: a random checkpoint of a given shape, prompts, timed pairs, the machine's limits, the JSON line."""
import argparse
import atexit
import datetime
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch


def arguments(doc, **extra):
    """The options all speed benches take; extra: name -> (default, help)."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {
            "prompt": (600, "prompt tokens"), "response": (48, "answer tokens, all of them sampled"), "groups": (16, "prompts"),
            "samples": (5, "answers per prompt"), "hidden": (256, "hidden size"), "layers": (4, "layers"),
            "vocab": (2048, "vocabulary"), "pairs": (5, "interleaved runs of ours and the peer's"), **extra}.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} ({default})")
    p.add_argument("--model", help="a folder whose config.json gives the shape instead (weights are random all the same)")
    return p.parse_args()


def checkpoint(a):
    """Write a Qwen2 checkpoint with random weights and a byte-level tokenizer -> its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(0)
    if a.model:
        config = AutoConfig.from_pretrained(a.model)
        a.hidden, a.layers, a.vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size  # for the JSON line
    else:
        config = AutoConfig.for_model("qwen2", vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.hidden * 15 // 4,
                                      num_hidden_layers=a.layers, num_attention_heads=max(2, a.hidden // 64),
                                      num_key_value_heads=max(1, a.hidden // 128), max_position_embeddings=8192,
                                      tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    folder, cuda = Path(tempfile.mkdtemp(prefix="bench_")), torch.cuda.is_available()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.device("cuda" if cuda else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                            chat_template="{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(folder)
    return folder


def random_prompts(a):
    """Letters only, one token each, so that a peer that tokenises their text gets the same tokens."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(66, 92, (a.groups, a.prompt), generator=g).tolist()  # "a" to "z"


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def pairs(ours, peer, n, device):
    """One warm-up of each, then n pairs in turn -> (ours' seconds, the peer's seconds, median of the pairs' ratios)."""
    ours(), peer()
    seconds = [(timed(ours, device), timed(peer, device)) for _ in range(n)]
    return (statistics.median(s for s, _ in seconds), statistics.median(s for _, s in seconds),
            statistics.median(p / o for o, p in seconds))


def peak_bytes(function, device):
    """The most memory that tensors took at once while the function ran, above what they took before: on CUDA by the allocator, on the
    CPU by the profiler's record of every allocation."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events), default=0)


def limits(device, dtype):
    """Measured here and now: copy bandwidth (bytes read and written per second) and matrix products (FLOP per second)."""
    cuda = device.type == "cuda"
    x = torch.rand(2 ** 28 if cuda else 2 ** 25, device=device)
    y, n, times = torch.empty_like(x), 8192 if cuda else 1024, 20 if cuda else 1
    m = torch.randn(n, n, device=device, dtype=dtype)
    y.copy_(x), m @ m
    copy = min(timed(lambda: [y.copy_(x) for _ in range(times)], device) for _ in range(5)) / times
    product = min(timed(lambda: [m @ m for _ in range(times)], device) for _ in range(5)) / times
    return 2 * x.nbytes / copy, 2 * n ** 3 / product


def forward_flops(s, N, M):
    """Matrix products of a pass over N tokens of which M are asked for, attention aside: 2 for each weight and token. s: model.Shape;
    of the last layer only keys and values are computed for all tokens."""
    kv, rest = 2 * s.hidden * s.kv_heads * s.head_dim, s.hidden * (2 * s.heads * s.head_dim + 3 * s.mlp)
    return 2 * ((s.layers - 1) * (kv + rest) * N + kv * N + rest * M + s.vocab * s.hidden * M)


def finish(name, a, device, ours_s, peer_s, ratio, **figures):
    """The last line: one JSON object, added to bench/results/ too."""
    settings = {k: getattr(a, k) for k in ("prompt", "response", "groups", "samples", "hidden", "layers", "vocab", "model", "pairs")}
    gpu = {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    line = json.dumps({"date": datetime.date.today().isoformat(), "bench": name, "device": device.type, **gpu, "threads": torch.get_num_threads(),
                       "torch": torch.__version__, **settings, "ours_s": round(ours_s, 4), "peer_s": peer_s and round(peer_s, 4),
                       "ratio": ratio and round(ratio, 3), **figures})
    with open(Path(__file__).parent / "results" / f"{name}_{device.type}.jsonl", "a") as f:
        f.write(line + "\n")
    print(line)
