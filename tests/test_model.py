"""The decoder against transformers, attention against an explicit softmax, and folders in and out (also wrong ones)."""
import doctest
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as decoder
from conftest import LLAMA3_ROPE, VOCAB
from data import InputError

ROPE = LLAMA3_ROPE | {"rope_theta": 100.0}  # with head size 8: one frequency kept, one on the ramp, two stretched
ARCHITECTURES = {
    "qwen2 tied": ("qwen2", {}),
    "qwen2 untied": ("qwen2", dict(tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2 one kv head": ("qwen2", dict(num_key_value_heads=1, rms_norm_eps=0.05)),
    "qwen2 no groups": ("qwen2", dict(num_key_value_heads=4)),
    "qwen3, head size of its own": ("qwen3", dict(head_dim=16, tie_word_embeddings=False)),
    "qwen3 with biases": ("qwen3", dict(head_dim=4, attention_bias=True)),
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "llama3 rope": ("llama", dict(rope_parameters=ROPE)),
    "llama with biases": ("llama", dict(attention_bias=True, head_dim=16)),
}
LENGTHS = (5, 70, 1, 33)


def reference(folder, **kw):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, **kw).eval()


def sequences(lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=g) for n in lengths]


def packed_logits(model, seqs):
    """One packed pass -> logits of each sequence."""
    spans = decoder.causal_spans([len(s) for s in seqs])
    positions = torch.cat([torch.arange(len(s)) for s in seqs])
    out = model(torch.cat(list(seqs)), positions, lambda layer, q, k, v: decoder.attention(q, k, v, spans))
    return out.split([len(s) for s in seqs])


def load(folder, dtype=torch.float32):
    return decoder.load(str(folder), "cpu", dtype)


@pytest.fixture
def broken(tmp_path, make_checkpoint):
    """A copy of a checkpoint, to be damaged: broken(kind, **overrides) -> folder."""
    def copy(kind="qwen2", **overrides):
        return shutil.copytree(make_checkpoint(kind, **overrides), tmp_path / "copy")
    return copy


def edit(folder, remove=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


# ------------------------------------------------------------------------------------------------- parity, both ways

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_transformers(name, make_checkpoint):
    kind, overrides = ARCHITECTURES[name]
    folder = make_checkpoint(kind, **overrides)
    ours, theirs = load(folder), reference(folder)
    seqs = sequences()
    with torch.no_grad():
        for s, got in zip(seqs, packed_logits(ours, seqs)):
            want = theirs(s[None]).logits[0]
            assert want.std() > 1, "a test on near-uniform logits shows nothing"
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)

        greedy = seqs[3]
        for _ in range(12):
            greedy = torch.cat([greedy, packed_logits(ours, [greedy])[0][-1:].argmax(-1)])
    want = theirs.generate(seqs[3][None], attention_mask=torch.ones(1, 33, dtype=torch.long), max_new_tokens=12,
                           do_sample=False, eos_token_id=None)[0]
    assert greedy.tolist() == want.tolist()


def test_packed_equals_one_by_one_and_select_picks_rows(make_checkpoint):
    model = load(make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=False), torch.float64)
    seqs = sequences()
    together = packed_logits(model, seqs)
    for s, got in zip(seqs, together):
        torch.testing.assert_close(got, packed_logits(model, [s])[0], atol=1e-10, rtol=0)
    spans, rows = decoder.causal_spans(LENGTHS), torch.tensor([108, 4, 0])
    last = decoder.Spans(torch.arange(3), torch.cat([torch.arange(76, 109), torch.arange(5), torch.arange(1)]),
                         torch.tensor([1, 1, 1]), torch.tensor([33, 5, 1]))  # of the last layer's queries only these are computed
    some = model(torch.cat(seqs), torch.cat([torch.arange(n) for n in LENGTHS]),
                 lambda layer, q, k, v: decoder.attention(q, k, v, last if layer == 1 else spans), select=rows)
    torch.testing.assert_close(some, torch.cat(together)[rows], atol=1e-12, rtol=0)


def test_gradients_equal_transformers(make_checkpoint):
    folder = make_checkpoint("qwen2", num_key_value_heads=1, rms_norm_eps=0.05)
    ours, theirs = load(folder).requires_grad_(True), reference(folder)
    s = sequences()[1] % 256  # transformers gives the pad token's embedding no gradient
    for logits in (packed_logits(ours, [s])[0], theirs(s[None]).logits[0]):
        torch.nn.functional.cross_entropy(logits[:-1], s[1:]).backward()
    want = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, want[name].grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind, overrides, old_scaling", [
    ("qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), None),
    ("llama", dict(rope_parameters=ROPE), {k: v for k, v in ROPE.items() if k != "rope_theta"}),
])
def test_config_of_older_transformers_means_the_same(broken, make_checkpoint, kind, overrides, old_scaling):
    folder, s = broken(kind, **overrides), sequences()[1:2]
    edit(folder, remove=("rope_parameters", "dtype"), torch_dtype="float32", rope_scaling=old_scaling,
         rope_theta=overrides["rope_parameters"]["rope_theta"])
    old, new = load(folder), load(make_checkpoint(kind, **overrides))
    assert torch.equal(packed_logits(old, s)[0], packed_logits(new, s)[0])
    decoder.export(old, folder, folder.parent / "out")  # the type is found under its old name too
    assert load_file(folder.parent / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_bfloat16_stays_near_float32(tiny_checkpoint):
    s = sequences()[1:2]
    exact, rough = (packed_logits(load(tiny_checkpoint, d), s)[0].float() for d in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rough).abs().mean() < 0.1


# ---------------------------------------------------------------------------------------------------------- attention

def explicit(q, k, v, q_rows, k_rows, q_len, k_len):
    """Attention written out, one query and one head at a time."""
    out, q_rows, k_rows = [], list(q_rows), list(k_rows)
    for nq, nk in zip(q_len, k_len):
        qs, ks = q_rows[:nq], k_rows[:nk]
        q_rows, k_rows = q_rows[nq:], k_rows[nk:]
        for i, row in enumerate(qs):
            seen = torch.tensor(ks[:nk - nq + i + 1])
            heads = [torch.softmax(k[seen, h * k.shape[1] // q.shape[1]] @ q[row, h] / q.shape[2] ** 0.5, 0)
                     @ v[seen, h * k.shape[1] // q.shape[1]] for h in range(q.shape[1])]
            out.append(torch.stack(heads))
    return torch.stack(out)


def random_spans(seed, N, S, longest):
    """Spans over N packed rows with q_len <= k_len; key rows are shared between spans, query rows are not."""
    g = torch.Generator().manual_seed(seed)
    k_len = torch.randint(1, longest + 1, (S,), generator=g)
    q_len = torch.minimum(k_len, torch.randint(1, longest + 1, (S,), generator=g))
    q_rows = torch.randperm(N, generator=g)[:int(q_len.sum())]
    k_rows = torch.randint(0, N, (int(k_len.sum()),), generator=g)
    return q_rows, k_rows, q_len, k_len


def qkv(N, A, K, D, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, h, D, generator=g, dtype=dtype) * 2 for h in (A, K, K)]


@pytest.mark.parametrize("A, K", [(4, 2), (3, 3), (4, 1)])
def test_attention_equals_explicit_softmax_and_so_do_its_gradients(A, K):
    for seed in range(4):
        args = random_spans(seed, N=40, S=5, longest=8)
        both = []
        for function in (lambda q, k, v: decoder.attention(q, k, v, decoder.Spans(*args)),
                         lambda q, k, v: explicit(q, k, v, *(x.tolist() for x in args))):
            leaves = [x.requires_grad_() for x in qkv(40, A, K, 6, seed)]
            out = function(*leaves)
            (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
            both.append([out.detach(), *(x.grad for x in leaves)])
        for got, want in zip(*both):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_attention_gradcheck():
    args = random_spans(7, N=9, S=3, longest=3)
    spans = decoder.Spans(*args)
    assert torch.autograd.gradcheck(lambda q, k, v: decoder.attention(q, k, v, spans),
                                    [x.requires_grad_() for x in qkv(9, 2, 1, 2)])


def test_rows_outside_the_spans_neither_give_nor_take():
    """Padding is filled from row 0. Spans of unequal lengths that never name row 0: no value, no gradient, no NaN from it."""
    args = [torch.tensor(x) for x in ([1, 2, 3, 4], [5, 1, 2, 3, 5, 4], [3, 1], [4, 2])]
    plain = qkv(7, 4, 2, 6)
    changed = [torch.cat([torch.full_like(x[:1], 1e30), x[1:6], torch.full_like(x[6:], torch.nan)]) for x in plain]
    outs, grads = [], []
    for tensors in (plain, changed):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = decoder.attention(*leaves, decoder.Spans(*args))
        out.sum().backward()
        outs.append(out.detach())
        grads.append([x.grad for x in leaves])
    assert torch.equal(*outs) and outs[0].isfinite().all()
    for a, b in zip(*grads):
        assert torch.equal(a, b) and a.isfinite().all()
        assert a[0].eq(0).all() and a[6].eq(0).all()


# ------------------------------------------------------------------------------------------------- folders in and out

def test_sharded_checkpoint_loads(make_checkpoint, tiny_checkpoint):
    folder = make_checkpoint("qwen2", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    s = sequences()[:1]
    assert torch.equal(packed_logits(load(folder), s)[0], packed_logits(load(tiny_checkpoint), s)[0])


@pytest.mark.parametrize("max_bytes", [4 << 30, 20_000])
@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3, head size of its own"])
def test_export_loads_in_transformers(tmp_path, make_checkpoint, tiny_tokenizer, name, max_bytes):
    from transformers import AutoTokenizer
    kind, overrides = ARCHITECTURES[name]
    base, out, s = make_checkpoint(kind, **overrides), tmp_path / "run" / "export", sequences()[1]
    model = load(base)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    for _ in range(2):  # the second time over the first
        (out / "stale").mkdir(parents=True, exist_ok=True)
        decoder.export(model, str(base), out, max_bytes)
    want = packed_logits(model, [s])[0]
    with torch.no_grad():
        torch.testing.assert_close(reference(out)(s[None]).logits[0], want, atol=1e-4, rtol=0)
    assert torch.equal(packed_logits(load(out), [s])[0], want)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer.chat_template
    assert [p.name for p in out.parent.iterdir()] == ["export"] and not (out / "stale").exists()
    assert (out / "generation_config.json").is_file()

    files = sorted(out.glob("*.safetensors"))
    held = {name: file.name for file in files for name in load_file(file)}
    assert set(held) == set(dict(model.named_parameters()))
    if max_bytes > 1 << 20:
        assert [f.name for f in files] == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()
    else:
        assert len(files) > 2 and json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == held
        assert all(f.stat().st_size < 40_000 + 4 * VOCAB * 32 for f in files)


def test_export_in_the_type_of_the_base(tmp_path, make_checkpoint):
    base = make_checkpoint("qwen2", dtype=torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    decoder.export(load(base), base, tmp_path / "out")  # float32 master weights
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == stored.keys()
    assert all(out[n].dtype == torch.bfloat16 and torch.equal(out[n], stored[n]) for n in stored)
    assert reference(tmp_path / "out").dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- wrong folders

def fails(folder, *words):
    with pytest.raises(InputError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    for word in (str(folder), *words):
        assert str(word) in message, f"{message!r} does not say {word!r}"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor(broken):
    folder = broken()
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(folder, "model.layers.1.mlp.up_proj.weight")


def test_untied_without_a_head(broken):
    folder = broken()
    edit(folder, tie_word_embeddings=False)
    fails(folder, "lm_head.weight")


def test_extra_tensor(broken):
    folder = broken()
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    fails(folder, "model.layers.0.self_attn.q_norm.weight")


def test_a_stored_copy_of_a_tied_head_is_no_extra(broken):
    folder = broken()
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(folder)


def test_wrong_shape(broken):
    folder = broken()
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    fails(folder, "model.norm.weight", 31, 32)


def test_torn_file(broken):
    folder = broken()
    data = (folder / "model.safetensors").read_bytes()
    for size in (len(data) - 100, 20, 0):
        (folder / "model.safetensors").write_bytes(data[:size])
        fails(folder, "safetensors")


def test_torn_or_missing_shard_is_named(broken):
    folder = broken(max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(folder, shard.name)
    shard.unlink()
    fails(folder, shard.name)


def test_index_and_files_that_do_not_agree(broken):
    folder = broken(max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    gone = where["model.norm.weight"]
    path.write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if f != gone}}))
    fails(folder, "lacks", min(n for n in where if where[n] == gone))
    path.write_text(json.dumps({"weight_map": where | {"model.norm.weight": "model-00099-of-00005.safetensors"}}))
    fails(folder, "model-00099-of-00005.safetensors")
    for wrong in ("{", "[]", "{}"):
        path.write_text(wrong)
        fails(folder, path.name)


def test_no_weights_and_no_config(broken):
    folder = broken()
    (folder / "model.safetensors").unlink()
    fails(folder, "safetensors")
    (folder / "config.json").write_text("{")
    fails(folder, "config.json")
    (folder / "config.json").unlink()
    fails(folder, "config.json")


@pytest.mark.parametrize("changes, word", [
    (dict(model_type="gpt2"), "gpt2"),
    (dict(model_type=None), "None"),
    (dict(use_sliding_window=True), "sliding"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "yarn"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
])
def test_architectures_that_are_refused(broken, changes, word):
    folder = broken()
    edit(folder, **changes)
    fails(folder, "config.json", word)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_config_that_lacks_a_size(broken, key):
    folder = broken()
    edit(folder, remove=(key,))
    fails(folder, "config.json", key)


def test_a_config_that_is_no_object(broken):
    folder = broken()
    (folder / "config.json").write_text("[]")
    fails(folder, "config.json")


def test_a_llama3_rope_that_lacks_a_number(broken):
    folder = broken()
    edit(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    fails(folder, "config.json", "low_freq_factor")


@pytest.mark.parametrize("path", ["./nope", "/no/such/folder", "runs/grpo_7b/export", "nobody/no-such-model", "no-such-model"])
def test_a_model_that_is_nowhere(path):
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        decoder.resolve(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10


def test_local_rows_are_what_fsdp_shards():
    for rows in range(1, 20):
        for world in range(1, 8):
            chunks = torch.arange(rows).chunk(world)
            got = [range(*decoder.local_rows(rows, r, world)) for r in range(world)]
            assert [list(r) for r in got if len(r)] == [c.tolist() for c in chunks]
            assert sum(map(len, got)) == rows


@pytest.mark.parametrize("takes, changed", [
    (True, {}), (True, dict(dtype=torch.float16, shape=(9, 256))), (False, dict(is_cuda=False)), (False, dict(dtype=torch.float32)),
    (False, dict(shape=(9, 12))), (False, dict(shape=(9, 264))), (False, dict(device="Turing"))])
def test_what_the_varlen_kernels_take(monkeypatch, takes, changed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"Turing": (7, 5), "Ampere": (8, 0)}.get)
    q = SimpleNamespace(**(dict(is_cuda=True, dtype=torch.bfloat16, shape=(9, 64), device="Ampere") | changed))
    assert decoder.varlen_takes(q) == takes


def test_doctests():
    assert doctest.testmod(decoder).failed == 0


# ---------------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_cuda_attention_equals_cpu(monkeypatch, D):
    installed = decoder.flash_attn_varlen_func
    backends = {None: "torch"} | ({installed: "flash-attn"} if installed else {})
    for seed in range(3):
        args = random_spans(seed, N=600, S=6, longest=90)
        tensors = [x.bfloat16() for x in qkv(600, 8, 2, D, seed, torch.float32)]

        def run(device, dtype):
            leaves = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
            out = decoder.attention(*leaves, decoder.Spans(args[0].to(device), args[1].to(device), *args[2:]))
            (out * torch.arange(out.numel(), device=device).view(out.shape).cos().to(dtype)).sum().backward()
            return [out.detach().cpu().double(), *(x.grad.cpu().double() for x in leaves)]

        want = run("cpu", torch.float64)
        for function, name in backends.items():
            monkeypatch.setattr(decoder, "flash_attn_varlen_func", function)
            for what, a, b in zip(("out", "dq", "dk", "dv"), run("cuda", torch.bfloat16), want):
                assert (a - b).norm() / b.norm() < 0.02, f"{name}, {what}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3, head size of its own", "llama3 rope"])
def test_cuda_logits_near_cpu(make_checkpoint, name):
    kind, overrides = ARCHITECTURES[name]
    folder, seqs = make_checkpoint(kind, **overrides), sequences()
    exact = torch.cat(packed_logits(load(folder), seqs))
    cpu = torch.cat(packed_logits(load(folder, torch.bfloat16), seqs)).float()
    model = decoder.load(folder, "cuda", torch.bfloat16)
    spans = decoder.causal_spans(LENGTHS, "cuda")
    got = model(torch.cat(seqs).cuda(), torch.cat([torch.arange(n) for n in LENGTHS]).cuda(),
                lambda layer, q, k, v: decoder.attention(q, k, v, spans)).float().cpu()
    assert (got - exact).abs().mean() < 2 * (cpu - exact).abs().mean() + 1e-3
