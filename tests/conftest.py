"""Shared by all tests: import path, an offline environment, tiny Hugging Face checkpoints, scripts called in
this process. What is no fixture stands in world.py.

`make_checkpoint(kind, **overrides)` writes (once per session and set of arguments) a folder that transformers
itself made: random weights large enough that the logits are far from uniform, a byte-level tokenizer, a chat
template. Folders are shared between tests: copy one before changing it (`shutil.copytree`). `one_rank` is a
process group of one; `run_ranks` calls a function in several processes, each with the environment that
torchrun would give it.
"""
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  WANDB_MODE="disabled")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

torch.set_num_threads(1)  # tiny matrices: threads only cost

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
VOCAB = 288  # the embedding is a little larger than the tokenizer, as Qwen's is
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="campaigns at full length (make soak)")


@pytest.fixture
def soak(request):
    """Does a campaign (marker `soak`) run at full length? CI runs a short form."""
    return request.config.getoption("--soak")


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # all others are tests of the CPU path, on any machine
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def make_tokenizer():
    """One token per byte, and the three special tokens above; eos is <|im_end|>, pad is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=CHAT)


def make_model(kind, seed=0, dtype=torch.float32, **overrides):
    """A tiny transformers model. kind: qwen2, qwen3, llama; overrides: keys of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                 tie_word_embeddings=True, rms_norm_eps=1e-6, bos_token_id=256, eos_token_id=258,
                 pad_token_id=256, dtype=dtype)
    config = AutoConfig.for_model(kind, **(shape | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(0.35 * noise)
            else:
                p.copy_(1.5 * noise * p.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    made = {}

    def make(kind="qwen2", max_shard_size="1GB", **overrides):
        key = repr((kind, max_shard_size, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}_")
            make_model(kind, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
            make_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint):
    """Qwen2: 288 tokens, hidden 32, 2 layers, 4 heads over 2 key/value heads, tied embeddings, float32."""
    return make_checkpoint("qwen2")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint):
    import prompts
    return prompts.load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="session")
def marks_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model, made to write "?" often: rewards then differ within a group, since Omega counts
    questions."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("marks") / "base"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("?") - 33] *= 2.5  # the byte-level alphabet starts at "!"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def folders64(make_checkpoint):
    """Policy and reference: two float64 checkpoints of other weights."""
    return tuple(make_checkpoint("qwen2", dtype=torch.float64, **seed) for seed in ({}, {"seed": 1}))


# ---------------------------------------------------------------------------- scripts, called in this process

@pytest.fixture
def call(monkeypatch):
    """call(script, *arguments): main() of a script's module, as its command line would."""
    def call(script, *arguments):
        monkeypatch.chdir(Path(__file__).resolve().parent.parent)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()

    return call


@pytest.fixture
def train(call):
    """train(script, config, *overrides) -> the lines of the run's metrics.jsonl."""
    import world

    def train(script, path, *overrides):
        call(script, path, *overrides)
        return world.metrics(path)

    return train


@pytest.fixture
def refused(call, capsys):
    """refused(script, *arguments): it ends with exit code 2 and one line of error, which is returned."""
    import records

    def refused(script, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            records.cli(lambda: call(script, *arguments))
        text = capsys.readouterr().err
        errors = text[text.index("error: "):].splitlines()
        assert end.value.code == 2 and len(errors) == 1 and "Traceback" not in text
        return errors[0]

    return refused


# -------------------------------------------------------------------------------------------- language models

@pytest.fixture(scope="session")
def lexicon_file(tmp_path_factory):
    """What the server of `serve` knows: the toy pharmacy's lexicon. A test file may have another."""
    import yaml

    from toy import world
    path = tmp_path_factory.mktemp("toy") / "lexicon.yaml"
    path.write_text(yaml.safe_dump(world.lexicon(), sort_keys=False))
    return path


@pytest.fixture
def serve(lexicon_file):
    """serve(**settings) -> a running toy.llm_server.Server"""
    from toy.llm_server import Server
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Server(lexicon_file, **settings))


@pytest.fixture
def source_of(tmp_path):
    """asking.open_source with this test's folder."""
    import asking
    return partial(asking.open_source, tmp_path)


@pytest.fixture
def client(monkeypatch):
    """The openai client with a back-off of milliseconds, and with a key in the environment. -> the key"""
    import openai._base_client
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    return os.environ["OPENAI_API_KEY"]


# -------------------------------------------------------------------------------------------------- processes

@pytest.fixture(scope="session")
def stage():
    """Where scripts are disturbed (faulty.py)."""
    from faulty import Stage
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def trial(stage, serve, tmp_path, marks_checkpoint):
    """trial(script, overrides ...): a faulty.Trial of it"""
    from faulty import Trial
    return lambda *script: Trial(stage, tmp_path, marks_checkpoint, serve(), *script)


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of one rank, as a script without torchrun makes it. -> its device."""
    import parallel
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ours = not torch.distributed.is_initialized()
    rank, world, device = parallel.start()
    assert (rank, world) == (0, 1)
    yield device
    if ours:
        torch.distributed.destroy_process_group()


def _rank(function, args, env, pipe):
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        pipe.send((function(*args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(function, world, *args): call a module-level function on `world` ranks, CPU only. -> list of
    what they return.

    The function calls parallel.start() itself. Processes are forked from a server that has torch imported,
    once a session.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.nn.attention.varlen", "pytest"])

    def run(function, world, *args, timeout=120):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = []
        for rank in range(world):
            env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=port, CUDA_VISIBLE_DEVICES="")
            env = {k: str(v) for k, v in env.items()}
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(function, args, env, theirs), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            results = []
            for rank, (process, pipe) in enumerate(ranks):
                assert pipe.poll(timeout), f"rank {rank} did not answer in {timeout} s"
                value, error = pipe.recv()
                assert error is None, f"rank {rank}:\n{error}"
                results.append(value)
            return results
        finally:
            for process, _ in ranks:
                process.join(5)
                process.kill()

    return run
