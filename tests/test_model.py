"""The decoder against transformers, attention against an explicit softmax, folders in and out (also wrong
ones)."""
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as decoder
from conftest import LLAMA3_ROPE, VOCAB
from records import InputError
from world import equal, packed_logits, same, weights

ROPE = LLAMA3_ROPE | {"rope_theta": 100.0}  # head size 8: one frequency kept, one on the ramp, two stretched
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
ARCHITECTURES = {
    "qwen2 tied": dict(kind="qwen2"),
    "qwen2 untied": dict(kind="qwen2", tie_word_embeddings=False, rope_parameters=PLAIN_ROPE),
    "qwen2 one kv head": dict(kind="qwen2", num_key_value_heads=1, rms_norm_eps=0.05),
    "qwen2 no groups": dict(kind="qwen2", num_key_value_heads=4),
    "qwen3, head size of its own": dict(kind="qwen3", head_dim=16, tie_word_embeddings=False),
    "qwen3 with biases": dict(kind="qwen3", head_dim=4, attention_bias=True),
    "llama": dict(kind="llama", tie_word_embeddings=False),
    "llama3 rope": dict(kind="llama", rope_parameters=ROPE),
    "llama with biases": dict(kind="llama", attention_bias=True, head_dim=16),
}
LENGTHS = (5, 70, 1, 33)
NOISE = torch.Generator().manual_seed(0)
SEQS = [torch.randint(0, VOCAB, (n,), generator=NOISE) for n in LENGTHS]


def reference(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def load(folder, dtype=torch.float32):
    return decoder.load(decoder.resolve(str(folder)), "cpu", dtype)


@pytest.fixture
def broken(tmp_path, make_checkpoint):
    """A copy of a checkpoint, to be damaged: broken(kind, **overrides) -> folder."""
    return lambda *kind, **how: shutil.copytree(make_checkpoint(*kind, **how), tmp_path / "copy")


def edit(folder, changes):
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# ------------------------------------------------------------------------------------------ parity, both ways

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_transformers(name, make_checkpoint):
    folder = make_checkpoint(**ARCHITECTURES[name])
    ours, theirs = load(folder), reference(folder)
    with torch.no_grad():
        for s, got in zip(SEQS, packed_logits(ours, SEQS)):
            want = theirs(s[None]).logits[0]
            assert want.std() > 1, "a test on near-uniform logits shows nothing"
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)

        greedy = SEQS[3]
        for _ in range(12):
            greedy = torch.cat([greedy, packed_logits(ours, [greedy])[0][-1:].argmax(-1)])
    want = theirs.generate(SEQS[3][None], attention_mask=torch.ones(1, 33, dtype=torch.long),
                           max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert greedy.tolist() == want[0].tolist()


def test_packed_equals_one_by_one_and_select_picks_rows(make_checkpoint):
    model = load(make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=False), torch.float64)
    together = packed_logits(model, SEQS)
    for s, got in zip(SEQS, together):
        torch.testing.assert_close(got, packed_logits(model, [s])[0], atol=1e-10, rtol=0)
    spans = decoder.causal_spans(LENGTHS)
    select = torch.tensor([108, 4, 0])  # of the last layer's queries only these are computed
    k_rows = torch.tensor([*range(76, 109), *range(5), 0])
    last = decoder.Spans(torch.arange(3), k_rows, torch.tensor([1, 1, 1]), torch.tensor([33, 5, 1]))

    def attend(layer, q, k, v):
        return decoder.attention(q, k, v, last if layer == 1 else spans)

    some = model(torch.cat(SEQS), torch.cat([torch.arange(n) for n in LENGTHS]), attend, select=select)
    torch.testing.assert_close(some, torch.cat(together)[select], atol=1e-12, rtol=0)


def test_gradients_equal_transformers(make_checkpoint):
    folder = make_checkpoint("qwen2", num_key_value_heads=1, rms_norm_eps=0.05)
    ours, theirs = load(folder).requires_grad_(True), reference(folder)
    s = SEQS[1] % 256  # transformers gives the pad token's embedding no gradient
    for logits in (packed_logits(ours, [s])[0], theirs(s[None]).logits[0]):
        torch.nn.functional.cross_entropy(logits[:-1], s[1:]).backward()
    grads = ({n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs))
    same(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, rope", [("qwen2", PLAIN_ROPE), ("llama", ROPE)])
def test_config_of_older_transformers_means_the_same(broken, make_checkpoint, kind, rope, tmp_path):
    folder = broken(kind, rope_parameters=rope)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if rope is ROPE else None
    edit(folder, dict(rope_parameters=None, dtype=None, torch_dtype="float32", rope_scaling=scaling,
                      rope_theta=rope["rope_theta"]))
    old, new = load(folder), load(make_checkpoint(kind, rope_parameters=rope))
    assert torch.equal(packed_logits(old, SEQS)[1], packed_logits(new, SEQS)[1])
    decoder.export(old, folder, tmp_path / "out")  # the type is found under its old name too
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logits_of_bfloat16_are_float32(tiny_checkpoint, device):
    """Rounded, they would make more of what sampler and trainer differ in (here a bit of a hidden state)."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(490, 256, generator=g).bfloat16().to(device).split([90, 400])
    exact = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(decoder.logits_of(x, weight), exact, rtol=0, atol=1e-3)
    near = x.clone()
    near.view(torch.int16)[:, 0] ^= 1

    def gap(logits):
        return torch.dist(*(logits(h, weight).float().log_softmax(-1) for h in (x, near)))

    assert gap(decoder.logits_of) < 0.5 * gap(lambda x, weight: x @ weight.T)
    sampler = packed_logits(decoder.load(tiny_checkpoint, device, torch.bfloat16), SEQS)[0]
    assert not torch.equal(sampler, sampler.bfloat16().float())


def test_bfloat16_stays_near_float32(tiny_checkpoint):
    exact = packed_logits(load(tiny_checkpoint), SEQS)[1]
    rough = packed_logits(load(tiny_checkpoint, torch.bfloat16), SEQS)[1]
    assert 0 < (exact - rough.float()).abs().mean() < 0.1


# -------------------------------------------------------------------------------------------------- attention

def explicit(q, k, v, spans):
    """Attention written out, one query and one head at a time."""
    out, q_rows, k_rows = [], spans.q_rows.tolist(), spans.k_rows.tolist()
    rep = q.shape[1] // k.shape[1]
    for nq, nk in zip(spans.q_len.tolist(), spans.k_len.tolist()):
        for i in range(nq):
            seen = k_rows[:nk - nq + i + 1]
            for h in range(q.shape[1]):
                p = torch.softmax(k[seen, h // rep] @ q[q_rows[i], h] / q.shape[2] ** 0.5, 0)
                out.append(p @ v[seen, h // rep])
        q_rows, k_rows = q_rows[nq:], k_rows[nk:]
    return torch.stack(out).view(-1, *q.shape[1:])


def random_spans(seed, N, S, longest, device="cpu"):
    """Spans over N packed rows with q_len <= k_len; spans share key rows, never query rows."""
    g = torch.Generator().manual_seed(seed)
    k_len = torch.randint(1, longest + 1, (S,), generator=g)
    q_len = torch.minimum(k_len, torch.randint(1, longest + 1, (S,), generator=g))
    q_rows = torch.randperm(N, generator=g)[:int(q_len.sum())]
    k_rows = torch.randint(0, N, (int(k_len.sum()),), generator=g)
    return decoder.Spans(q_rows.to(device), k_rows.to(device), q_len, k_len)


def qkv(N, A, K, D, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, h, D, generator=g, dtype=dtype) * 2 for h in (A, K, K)]


def output_and_gradients(function, tensors, spans):
    """-> [output, dq, dk, dv] of a loss that weighs every number differently."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, spans)
    weight = torch.arange(out.numel(), device=out.device).view(out.shape).cos()
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("A, K", [(4, 2), (3, 3), (4, 1)])
def test_attention_equals_explicit_softmax_and_so_do_its_gradients(A, K):
    for seed in range(4):
        spans, tensors = random_spans(seed, N=40, S=5, longest=8), qkv(40, A, K, 6, seed)
        both = (output_and_gradients(f, tensors, spans) for f in (decoder.attention, explicit))
        for got, want in zip(*both):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_attention_gradcheck():
    spans, leaves = random_spans(7, N=9, S=3, longest=3), [x.requires_grad_() for x in qkv(9, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: decoder.attention(q, k, v, spans), leaves)


def test_rows_outside_the_spans_neither_give_nor_take():
    """Padding is filled from row 0. Spans of unequal lengths that never name row 0: no value, no gradient, no
    NaN from it."""
    spans = decoder.Spans(*map(torch.tensor, ([1, 2, 3, 4], [5, 1, 2, 3, 5, 4], [3, 1], [4, 2])))
    plain = qkv(7, 4, 2, 6)
    changed = [x.clone() for x in plain]
    for x in changed:
        x[0], x[6] = 1e30, torch.nan
    for a, b in zip(*(output_and_gradients(decoder.attention, x, spans) for x in (plain, changed))):
        assert torch.equal(a, b) and a.isfinite().all()
        assert len(a) == 4 or a[0].eq(0).all() and a[6].eq(0).all()


# ----------------------------------------------------------------------------------------- folders in and out

def test_weights_for_which_there_is_no_room_are_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}/none/x: Error while serializing: I/O error"):
        decoder.save_tensors({"a": torch.zeros(2)}, tmp_path / "none" / "x")


def test_sharded_checkpoint_loads(make_checkpoint, tiny_checkpoint):
    folder = make_checkpoint("qwen2", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    assert equal(weights(load(folder)), weights(load(tiny_checkpoint)))


@pytest.mark.parametrize("max_bytes", [4 << 30, 20_000])
@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3, head size of its own"])
def test_export_loads_in_transformers(tmp_path, make_checkpoint, tiny_tokenizer, name, max_bytes):
    from transformers import AutoTokenizer
    base, out, s = make_checkpoint(**ARCHITECTURES[name]), tmp_path / "run" / "export", SEQS[1]
    model = load(base)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    for _ in range(2):  # the second time over the first
        (out / "stale").mkdir(parents=True, exist_ok=True)
        decoder.export(model, str(base), out, max_bytes=max_bytes)
    want = packed_logits(model, [s])[0]
    with torch.no_grad():
        torch.testing.assert_close(reference(out)(s[None]).logits[0], want, atol=1e-4, rtol=0)
    assert torch.equal(packed_logits(load(out), [s])[0], want)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert [p.name for p in out.parent.iterdir()] == ["export"] and not (out / "stale").exists()
    assert (out / "generation_config.json").is_file()

    files, index = sorted(out.glob("*.safetensors")), out / "model.safetensors.index.json"
    held = {name: file.name for file in files for name in load_file(file)}
    assert set(held) == set(weights(model))
    if max_bytes > 1 << 20:
        assert [f.name for f in files] == ["model.safetensors"] and not index.exists()
    else:
        assert len(files) > 2 and json.loads(index.read_text())["weight_map"] == held
        assert all(f.stat().st_size < 40_000 + 4 * VOCAB * 32 for f in files)


def test_export_in_the_type_of_the_base(tmp_path, make_checkpoint):
    base = make_checkpoint("qwen2", dtype=torch.bfloat16)
    decoder.export(load(base), base, tmp_path / "out")  # float32 master weights
    stored, out = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert equal(out, stored) and {t.dtype for t in out.values()} == {torch.bfloat16}
    assert reference(tmp_path / "out").dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- wrong folders

def fails(folder, *words):
    with pytest.raises(InputError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    for word in (folder, *words):
        assert str(word) in message, f"{message!r} does not say {word!r}"


UP = "model.layers.1.mlp.up_proj.weight"
QK = "model.layers.0.self_attn.q_norm.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(UP), [UP]), (lambda t: t.update({QK: torch.ones(8)}), [QK]),
    (lambda t: t.update({NORM: torch.ones(31)}), [NORM, 31, 32]),
    (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), None)],
    ids=["missing", "extra", "of another shape", "a stored copy of a tied head is no extra"])
def test_tensors_that_do_not_belong_to_the_config(broken, change, words):
    file = broken() / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if words is None:
        load(file.parent)
    else:
        fails(file.parent, *words)


def test_torn_file(broken):
    file = broken() / "model.safetensors"
    data = file.read_bytes()
    for size in (len(data) - 100, 20, 0):
        file.write_bytes(data[:size])
        fails(file.parent, "safetensors")


def test_torn_or_missing_shard_is_named(broken):
    folder = broken(max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-100]), shard.unlink):
        damage()
        fails(folder, shard.name)


def test_index_and_files_that_do_not_agree(broken):
    folder = broken(max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    gone, nowhere = where[NORM], "model-00099-of-00005.safetensors"
    lacking = {n: f for n, f in where.items() if f != gone}
    for wrong, word in (
            (json.dumps({"weight_map": lacking}), f"lacks {min(set(where) - set(lacking))}"),
            (json.dumps({"weight_map": where | {NORM: nowhere}}), nowhere),
            ("{", path.name), ("[]", path.name), ("{}", path.name)):
        path.write_text(wrong)
        fails(folder, word)


def test_no_weights_and_no_config(broken):
    folder = broken()
    (folder / "model.safetensors").unlink()
    fails(folder, "safetensors")
    config = folder / "config.json"
    for wrong in ("{", "[]"):
        config.write_text(wrong)
        fails(folder, "config.json")
    config.unlink()
    fails(folder, "config.json")


@pytest.mark.parametrize("changes, word", [
    (dict(model_type="gpt2"), "gpt2"),
    (dict(model_type=None), "None"),
    (dict(use_sliding_window=True), "sliding"),
    (dict(rope_parameters=PLAIN_ROPE | {"rope_type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}), "low_freq_factor"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
    (dict(quantization_config={"bits": 4}), "quantization"),
    (dict(tie_word_embeddings=False), "lm_head.weight"),
    *(({key: None}, key) for key in decoder.SIZES)])
def test_configs_that_are_refused(broken, changes, word):
    folder = broken()
    edit(folder, changes)
    fails(folder, "config.json", word)


@pytest.mark.parametrize("path", ["./nope", "/no/such/folder", "runs/grpo_7b/export", "nobody/no-such-model",
                                  "no-such-model"])
def test_a_model_that_is_nowhere(path):
    start = time.perf_counter()
    fails(path)
    assert time.perf_counter() - start < 10


def test_local_rows_are_what_fsdp_shards():
    for rows in range(1, 20):
        for world in range(1, 8):
            chunks = torch.arange(rows).chunk(world)
            got = [range(*decoder.local_rows(rows, r, world)) for r in range(world)]
            assert [list(r) for r in got if len(r)] == [c.tolist() for c in chunks]
            assert sum(map(len, got)) == rows


@pytest.mark.parametrize("takes, changed", [
    (True, {}), (True, dict(dtype=torch.float16, shape=(9, 256))), (False, dict(is_cuda=False)),
    (False, dict(dtype=torch.float32)), (False, dict(shape=(9, 12))), (False, dict(shape=(9, 264))),
    (False, dict(device="Turing"))])
def test_what_the_varlen_kernels_take(monkeypatch, takes, changed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"Turing": (7, 5), "Ampere": (8, 0)}.get)
    half = dict(is_cuda=True, dtype=torch.bfloat16, shape=(9, 64), device="Ampere")
    assert decoder.varlen_takes(SimpleNamespace(**(half | changed))) == takes


# -------------------------------------------------------------------------------------------------------- GPU

@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_cuda_attention_equals_cpu(monkeypatch, D):
    installed = decoder.flash_attn_varlen_func
    backends = {None: "torch"} | ({installed: "flash-attn"} if installed else {})
    for seed in range(3):
        tensors = [x.bfloat16() for x in qkv(600, 8, 2, D, seed, torch.float32)]

        def run(device, dtype):
            spans = random_spans(seed, N=600, S=6, longest=90, device=device)
            out = output_and_gradients(decoder.attention, [x.to(device, dtype) for x in tensors], spans)
            return [x.cpu().double() for x in out]

        want = run("cpu", torch.float64)
        for function, name in backends.items():
            monkeypatch.setattr(decoder, "flash_attn_varlen_func", function)
            for what, a, b in zip(("out", "dq", "dk", "dv"), run("cuda", torch.bfloat16), want):
                assert (a - b).norm() / b.norm() < 0.02, f"{name}, {what}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3, head size of its own", "llama3 rope"])
def test_cuda_logits_near_cpu(make_checkpoint, name):
    folder = make_checkpoint(**ARCHITECTURES[name])
    exact, cpu, got = (
        torch.cat(packed_logits(decoder.load(folder, device, dtype), SEQS)).float().cpu()
        for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)))
    assert (got - exact).abs().mean() < 2 * (cpu - exact).abs().mean() + 1e-3
