"""What the benches share: a random checkpoint, prompts, timed pairs, the machine's limits, the JSON line."""
import argparse
import atexit
import datetime
import itertools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import model as decoder

OPTIONS = {  # name: (default, help)
    "prompt": (600, "prompt tokens"),
    "response": (48, "response tokens, all of them sampled"),
    "groups": (16, "prompts"),
    "samples": (5, "responses per prompt"),
    "hidden": (256, "hidden size"),
    "layers": (4, "layers"),
    "vocab": (2048, "vocabulary"),
    "pairs": (5, "interleaved runs of ours and the peer's"),
}

SHAPES = {  # config.json of Qwen2.5-Instruct
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False)}


def arguments(doc, **extra):
    """The options that all speed benches take; extra: name -> (default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {**OPTIONS, **extra}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                            help=f"{text} ({default})")
    parser.add_argument("--model", help="a folder whose config.json gives the shape (weights stay random)")
    return parser.parse_args()


def setting():
    """-> (device, dtype) that the benches run with: bfloat16 on CUDA, float32 on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def byte_tokenizer():
    """One token per byte; ids 0 and 1 are <pad> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                                   chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")


def checkpoint(a):
    """Write a Qwen2 checkpoint with random weights and a byte-level tokenizer -> its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    if a.model:
        config = config_of(a.model)
        a.hidden = config.hidden_size  # for the JSON line
        a.layers = config.num_hidden_layers
        a.vocab = config.vocab_size
    else:
        config = AutoConfig.for_model(
            "qwen2", vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.hidden * 15 // 4,
            num_hidden_layers=a.layers, num_attention_heads=max(2, a.hidden // 64),
            num_key_value_heads=max(1, a.hidden // 128), max_position_embeddings=8192,
            tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    folder = Path(tempfile.mkdtemp(prefix="bench_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    device, dtype = setting()
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config_of(name):
    """A name in SHAPES, or a folder with a config.json -> transformers' config. It needs no network."""
    from transformers import AutoConfig
    if name in SHAPES:
        return AutoConfig.for_model("qwen2", max_position_embeddings=32768, rope_theta=1e6, **SHAPES[name])
    return AutoConfig.from_pretrained(name)


def read_shape(name):
    """The same -> model.Shape."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(name).save_pretrained(folder)
        return decoder.read_shape(Path(folder))


def random_letters(*shape, seed):
    """Token ids of "a" to "z", one token a letter: a peer that tokenises text gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(66, 92, shape, generator=generator).tolist()


def random_prompts(a):
    return random_letters(a.groups, a.prompt, seed=1)


# -------------------------------------------------------------------------------------------- time and memory

def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def medians(seconds):
    """[(our seconds, the peer's)] -> (our median, the peer's, the median of the pairs' ratios)."""
    ours, peer = zip(*seconds)
    ratio = statistics.median(p / o for o, p in seconds)
    return statistics.median(ours), statistics.median(peer), ratio


def pairs(ours, peer, n, device):
    """One warm-up of each, then n pairs in turn -> (our seconds, the peer's, median of the ratios)."""
    ours()
    peer()
    return medians([(timed(ours, device), timed(peer, device)) for _ in range(n)])


def peak_bytes(function, device):
    """The most memory that tensors took at once while the function ran, above what they took before.

    On CUDA the allocator says it, on the CPU the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in sizes), default=0)


def limits(device, dtype):
    """Measured here and now -> (bytes per second that a copy reads and writes, FLOP per second)."""
    cuda = device.type == "cuda"
    n, times = (8192, 20) if cuda else (1024, 1)
    x = torch.rand(2 ** 28 if cuda else 2 ** 25, device=device)
    y = torch.empty_like(x)
    m = torch.randn(n, n, device=device, dtype=dtype)

    def fastest(function):
        function()
        many = [timed(lambda: [function() for _ in range(times)], device) for _ in range(5)]
        return min(many) / times

    return 2 * x.nbytes / fastest(lambda: y.copy_(x)), 2 * n ** 3 / fastest(lambda: m @ m)


def forward_flops(s, N, M):
    """FLOP of the matrix products of a pass over N tokens of which M are asked for, without attention.

    s: model.Shape. That is 2 for each weight and token; the last layer computes only keys and values for all.
    """
    kv = 2 * s.hidden * s.kv_heads * s.head_dim
    rest = s.hidden * (2 * s.heads * s.head_dim + 3 * s.mlp)
    return 2 * ((s.layers - 1) * (kv + rest) * N + kv * N + rest * M + s.vocab * s.hidden * M)


def finish(name, a, device, times, **figures):
    """The last line: one JSON object, added to bench/results/ too. times: what pairs() or medians() gave."""
    ours_s, peer_s, ratio = times
    keys = ("prompt", "response", "groups", "samples", "hidden", "layers", "vocab", "model", "pairs")
    gpu = {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    line = json.dumps({
        "date": datetime.date.today().isoformat(), "bench": name, "device": device.type, **gpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__, **{k: getattr(a, k) for k in keys},
        "ours_s": round(ours_s, 4), "peer_s": peer_s and round(peer_s, 4), "ratio": ratio and round(ratio, 3),
        **figures})
    with open(Path(__file__).parent / "results" / f"{name}_{device.type}.jsonl", "a") as f:
        f.write(line + "\n")
    print(line)
