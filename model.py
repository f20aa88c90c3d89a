"""The decoder of Qwen2/2.5, Qwen3 and the Llama family, read from and written to Hugging Face folders.

One class serves trainer and sampler. Tokens are packed: a forward pass takes N tokens of any number of sequences in one
row, and who sees whom is decided by `attend(layer, q, k, v)`, a function the caller brings (the trainer: prompt + answers
as a tree; the sampler: prompt cache + own answer). Parameter names are Hugging Face's, so loading and saving is by name.
The last layer computes only the rows whose next token is asked for: of the others nobody reads more than keys and values.

Letters: N packed tokens, H hidden size, A query heads, K key/value heads, D head size, V vocabulary, S attention spans.
Norms, rotary angles and softmax run in float32 at least; float64 stays float64 (tests rely on it).
"""
import contextlib
import inspect
import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.checkpoint import checkpoint

from data import InputError, write_json

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters


# -------------------------------------------------------------------------------------------------------- attention

@dataclass
class Spans:
    """S attention problems over packed tokens: span s reads q_len[s] query rows and k_len[s] key rows.

    Causal, aligned at the end: the last query of a span sees all its keys, the one before sees all but the last, ...
    q_rows [sum q_len] and k_rows [sum k_len] index the packed tokens; two spans may share key rows (a prompt).
    """
    q_rows: torch.Tensor
    k_rows: torch.Tensor
    q_len: torch.Tensor  # [S], on the CPU
    k_len: torch.Tensor  # [S], on the CPU

    def __post_init__(self):
        self.max_q, self.max_k = int(self.q_len.max()), int(self.k_len.max())
        self.whole = self.q_rows is self.k_rows  # whole sequences: kernels know their mask without being given one

    @cached_property
    def offsets(self):
        """Where each span starts among q_rows and k_rows, two [S + 1] tensors: what the varlen kernels ask for."""
        device = self.q_rows.device
        return tuple(F.pad(n.cumsum(0), (1, 0)).to(device, torch.int32) for n in (self.q_len, self.k_len))

    @cached_property
    def padded(self):
        """The same as rectangles: q_pad [S max_q] and k_pad [S max_k] (rows to read), what to add to scores [S, 1, max_q, max_k], and
        q_slot [sum q_len], where real queries sit. Padding is told by lengths, never by token ids; a padded query sees
        some key, so that no softmax is empty, and its output is dropped."""
        device = self.q_rows.device
        q_at, k_at = torch.arange(self.max_q, device=device), torch.arange(self.max_k, device=device)
        q_len, k_len = self.q_len.to(device)[:, None], self.k_len.to(device)[:, None]
        q_real, k_real = q_at < q_len, k_at < k_len  # [S, max_q], [S, max_k]
        q_pad, k_pad = (torch.zeros(real.shape, dtype=torch.long, device=device).masked_scatter(real, rows).flatten()
                        for real, rows in ((q_real, self.q_rows), (k_real, self.k_rows)))
        mask = None if self.whole else torch.where(k_at <= (k_len - q_len + q_at)[:, :, None], 0.0, -torch.inf)[:, None]
        return q_pad, k_pad, mask, q_real.flatten().nonzero().flatten()


def attention(q, k, v, spans):
    """softmax(q k^T / sqrt(D)) v within each span. q [N, A, D], k and v [N, K, D] -> [sum q_len, A, D].

    Where varlen_takes(q): flash-attn's varlen kernel if installed, else PyTorch's own. Otherwise
    scaled_dot_product_attention over padded spans, causal or with a mask.
    """
    if varlen_takes(q):
        q, k, v = q.index_select(0, spans.q_rows), k.index_select(0, spans.k_rows), v.index_select(0, spans.k_rows)
        return varlen(q, k, v, *spans.offsets, spans.max_q, spans.max_k, causal=True)
    S, (q_pad, k_pad, mask, q_slot) = len(spans.q_len), spans.padded
    mask = None if mask is None else mask.to(q.dtype)
    q = q.index_select(0, q_pad).view(S, spans.max_q, *q.shape[1:]).transpose(1, 2)  # [S, A, max_q, D]
    k = k.index_select(0, k_pad).view(S, spans.max_k, *k.shape[1:]).transpose(1, 2)  # [S, K, max_k, D]
    v = v.index_select(0, k_pad).view(S, spans.max_k, *v.shape[1:]).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=spans.whole, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, q_slot)


def varlen_takes(x):
    """Whether the varlen kernels take such tensors: on CUDA (Ampere or later), half precision, heads of 8, 16, ... 256 numbers."""
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
            and torch.cuda.get_device_capability(x.device) >= (8, 0))


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, lse=False):
    """Attention of sequences packed one after the other by a varlen kernel. q [Nq, A, D], k and v [Nk, K, D]; cu_q, cu_k [S + 1]
    where each starts, int32 -> [Nq, A, D], with lse also the log-sum-exp of the scores [Nq, A]."""
    sizes = (cu_q, cu_k, max_q, max_k)
    if flash_attn_varlen_func is not None:
        out = flash_attn_varlen_func(q, k, v, *sizes, causal=causal, return_attn_probs=lse)
    else:
        how = {"return_aux": AuxRequest(lse=True)} if lse else {}
        if causal:
            how |= {"window_size": (-1, 0)} if "window_size" in VARLEN_ARGUMENTS else {"is_causal": True}  # newer | older torch
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in VARLEN_ARGUMENTS:
                how["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, *sizes, **how)
    return (out[0], out[1].transpose(0, 1)) if lse else out  # the kernels give the log-sum-exp as [A, Nq]


def causal_spans(lengths, device="cpu"):
    """Independent sequences of these lengths, packed one after the other."""
    lengths = torch.as_tensor(lengths)
    rows = torch.arange(int(lengths.sum()), device=device)
    return Spans(rows, rows, lengths, lengths)


# -------------------------------------------------------------------------------------------------------- the decoder

@dataclass
class Shape:
    """What config.json says of the architecture."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eps: float
    theta: float
    rope_scaling: dict | None  # llama3's, or None
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    tied: bool


FEW_ROWS = 400  # up to so many a CPU multiplies faster with the weights on the left
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_shape(folder):
    """config.json of a Hugging Face folder -> Shape. Raises InputError for an architecture this file does not compute."""
    path = Path(folder) / "config.json"
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model.path: {path} cannot be read ({error})") from None
    if not isinstance(c, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(c).__name__}")
    kind = c.get("model_type")
    if kind not in ("qwen2", "qwen3", "llama"):
        raise InputError(f"{path}: model_type {kind!r} is not supported; qwen2, qwen3 and llama are")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {"rope type " + str(rope_type): rope_type not in ("default", "llama3"),
               "sliding-window attention": bool(c.get("use_sliding_window")),
               f"activation {c.get('hidden_act')}": c.get("hidden_act", "silu") != "silu",
               "mlp_bias": bool(c.get("mlp_bias")), "quantization": bool(c.get("quantization_config"))}
    for what, present in refused.items():
        if present:
            raise InputError(f"{path}: {what} is not supported by model.py")
    lacks = [k for k in LLAMA3_ROPE if not isinstance(rope.get(k), (int, float))] if rope_type == "llama3" else []
    if lacks:
        raise InputError(f"{path}: rope type llama3 lacks {lacks[0]}")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in needed:
        if not isinstance(c.get(key), int):
            raise InputError(f"{path}: {key} is missing or not a whole number")
    bias = bool(c.get("attention_bias"))
    return Shape(
        vocab=c["vocab_size"], hidden=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
        kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], mlp=c["intermediate_size"],
        eps=c.get("rms_norm_eps", 1e-6), theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
        rope_scaling=rope if rope_type == "llama3" else None, qkv_bias=kind == "qwen2" or bias,
        out_bias=kind != "qwen2" and bias, qk_norm=kind == "qwen3", tied=bool(c.get("tie_word_embeddings", False)))


def wide(x):
    """float32 at least: the type norms, softmax and log-probs are computed in."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_angles(shape, positions, dtype):
    """Rotary cos and sin of these positions [N] -> two [N, 1, D] tensors; sin's first half has the sign that rotate needs."""
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    even = torch.arange(0, shape.head_dim, 2, dtype=at_least, device=positions.device)
    freq = 1.0 / shape.theta ** (even / shape.head_dim)  # [D/2]
    if shape.rope_scaling:  # Llama 3.1: long wavelengths stretched, short ones kept, a ramp between
        s, old = shape.rope_scaling, shape.rope_scaling["original_max_position_embeddings"]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        ramp = ((old * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / s["factor"])
    angle = positions.to(at_least)[:, None] * freq  # [N, D/2]
    sin, cos = angle.sin(), angle.cos()
    return tuple(torch.cat(x, dim=-1)[:, None].to(dtype) for x in ((cos, cos), (-sin, sin)))  # [N, 1, D]


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.head_dim = s.head_dim
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=s.qkv_bias)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=s.out_bias)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.head_dim, s.eps), RMSNorm(s.head_dim, s.eps)
        self.qk_norm = s.qk_norm

    def forward(self, x, cos, sin, select):  # x [N, H] -> q [N, A, D] (select: [M, A, D]), k and v [N, K, D]
        k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        q = self.q_proj(rows(x, select)).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rows(cos, select), rows(sin, select)), rotate(k, cos, sin), v


def rows(x, select):
    return x if select is None else x.index_select(0, select)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only gate and up for the backward pass (autograd would keep silu(gate) too)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.hidden, bias=False)

    def forward(self, x):
        if torch.is_grad_enabled():
            return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        if x.is_cuda or len(x) > FEW_ROWS:
            return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))
        gate, up = self.gate_proj.weight @ x.T, self.up_proj.weight @ x.T
        return (self.down_proj.weight @ F.silu(gate, inplace=True).mul_(up)).T


class Layer(nn.Module):
    def __init__(self, s, index):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s)
        self.checkpointed = False  # activation checkpointing: keep the layer's input alone, compute the rest again

    def forward(self, *args):
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, *args, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*args)

    def compute(self, x, cos, sin, attend, select):
        return self.after(rows(x, select), attend(self.index, *self.before(x, cos, sin, select)))

    def before(self, x, cos, sin, select):  # before and after: what torch.compile is given
        return self.self_attn(self.input_layernorm(x), cos, sin, select)

    def after(self, x, out):  # [N, H], [N, A, D] -> [N, H]
        x = x + self.self_attn.o_proj(out.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.gathered = shape, False
        self.model = nn.Module()  # Hugging Face's name for everything but the head
        self.model.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.model.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.layers))
        self.model.norm = RMSNorm(shape.hidden, shape.eps)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens, positions, attend, select=None, head=F.linear):
        """tokens, positions [N]; select [M] packed rows whose next token is asked for (None: all) -> logits [M, V], or what
        head(hidden [M, H], weight [V, H]) makes of them. In the last layer `attend` gets the queries of `select` alone."""
        x = self.model.embed_tokens(tokens)  # [N, H]
        cos, sin = rope_angles(self.shape, positions, x.dtype)
        for layer in self.model.layers:
            # While the weights are gathered for sampling, FSDP's hooks around each layer have nothing to do.
            last = select if layer is self.model.layers[-1] else None
            x = (layer.forward if self.gathered else layer)(x, cos, sin, attend, last)
        x = self.model.norm(x)  # [M, H]
        return head(x, (self.model.embed_tokens if self.shape.tied else self.lm_head).weight)


@contextlib.contextmanager
def gathered(model):
    """Whole weights on every rank while the block runs (a rollout phase); the sampler reads them in place."""
    shards = [m for m in model.modules() if hasattr(m, "unshard")]
    for m in shards:
        m.unshard()
    model.gathered = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.gathered = False
        for m in shards:
            m.reshard()


# ------------------------------------------------------------------------------------------------ folders in and out

def resolve(path, files=("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")):
    """A local folder as it is; anything else is a hub id, whose files huggingface_hub downloads."""
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        return Path(path)
    if os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise InputError(f"model.path: no such folder: {path}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:  # the hub's many errors (offline, unknown id, no access) all leave the user without weights
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.path: {path!r} is neither a local folder nor a hub id that could be downloaded "
                         f"({reason})") from None


def local_rows(rows, rank, world):
    """FSDP2 shards dimension 0 like torch.chunk: -> [first, last) of this rank's rows.

    >>> [local_rows(5, r, 4) for r in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def shard_rows(p):
    """Rows [first, last) of the whole tensor that this parameter holds here."""
    if not isinstance(p, DTensor):
        return 0, p.shape[0]
    return local_rows(p.shape[0], p.device_mesh.get_local_rank(), p.device_mesh.size())


def load_weights(model, folder):
    """Fill the parameters from safetensors (one file or shards with an index), each rank reading only its own rows."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    file, where = index, {}  # parameter name -> the open file that holds it
    try:
        shards = {"model.safetensors"}
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(shards):
            file = folder / name
            opened = safe_open(file, "pt")
            where |= dict.fromkeys(opened.keys(), opened)
    except Exception as error:  # safetensors raises its own kinds for torn or missing files
        raise InputError(f"model.path: {file} holds no readable safetensors weights ({error})") from None
    params = dict(model.named_parameters())
    missing, extra = sorted(set(params) - set(where)), sorted(set(where) - set(params) - {"lm_head.weight"})
    extra = [n for n in extra if not n.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the architecture does not have"
        raise InputError(f"{folder}: the checkpoint {what}: config.json and weights do not belong together")
    for name, p in params.items():
        stored = where[name].get_slice(name)
        if list(stored.get_shape()) != list(p.shape):
            raise InputError(f"{folder}: {name} has shape {list(stored.get_shape())}, config.json asks for {list(p.shape)}")
        first, last = shard_rows(p)
        local = p.to_local() if isinstance(p, DTensor) else p
        if last > first:
            local.data.copy_(stored[first:last])
    return model


def load(path, device, dtype):
    """A whole model on one device, in one type, without gradients: for sampling and evaluation."""
    folder = resolve(path)
    with torch.device("meta"):
        model = Decoder(read_shape(folder))
    return load_weights(model.to(dtype).to_empty(device=device).requires_grad_(False), folder)


def export(model, base, out, max_bytes=4 << 30):
    """Write the model as a Hugging Face folder: weights in the base checkpoint's type, its config and tokenizer files.

    Collective under FSDP: one parameter at a time is gathered, rank 0 writes. The folder appears whole or not at all.
    """
    base, out = resolve(base), Path(out)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    params = list(model.named_parameters())
    files, size = [[]], 0
    for name, p in params:
        if files[-1] and size + p.numel() * dtype.itemsize > max_bytes:
            files.append([])
            size = 0
        files[-1].append((name, p))
        size += p.numel() * dtype.itemsize
    aside = out.with_name(out.name + ".tmp")
    if main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for f in base.iterdir():
            if f.is_file() and not f.name.startswith((".", "model")) and f.suffix in (".json", ".txt", ".jinja", ".model"):
                shutil.copyfile(f, aside / f.name)
    weight_map = {}
    for i, group in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name, p in group:
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            if main:
                tensors[name] = whole.detach().to("cpu", dtype).contiguous()
            weight_map[name] = file
        if main:
            save_file(tensors, aside / file, metadata={"format": "pt"})
    if main:
        if len(files) > 1:
            total = sum(p.numel() for _, p in params) * dtype.itemsize
            write_json(aside / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)
