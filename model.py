"""The decoder of Qwen2/2.5, Qwen3 and the Llama family, read from and written to Hugging Face folders.

One class serves the trainer and the sampler. Tokens are packed: a forward pass takes N tokens of any number
of sequences in one row. Which token sees which is decided by `attend(layer, q, k, v)`, a function that the
caller passes (the trainer: a prompt and its responses as a tree; the sampler: a cached prompt and a
response's own tokens). Parameters have Hugging Face's names, so loading and saving go by name. The last
layer computes only the rows whose next token is asked for; of the other rows it needs keys and values alone.

Letters: N packed tokens, M rows whose next token is asked for, H hidden size, A query heads, K key/value
heads, D head size, V vocabulary, S attention spans.
Norms, rotary angles and softmax run in float32 at least; float64 stays float64 (tests rely on it).
"""
import contextlib
import inspect
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from records import InputError, put_in_place, read_json, write_json

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters


# ------------------------------------------------------------------------------------------------ attention

class Starts(NamedTuple):
    """Where S packed sequences start, as the varlen kernels ask for it."""
    q: Tensor  # [S + 1], int32
    k: Tensor  # [S + 1], int32
    max_q: int  # the longest sequence's queries
    max_k: int


@dataclass
class Spans:
    """S attention problems over packed tokens. Span s reads q_len[s] query rows and k_len[s] key rows.

    Causal, aligned at the end: the last query of a span sees all its keys, the one before it all but the
    last, ... q_rows [sum q_len] and k_rows [sum k_len] index the packed tokens. Spans may share key rows
    (those of a prompt).
    """
    q_rows: Tensor
    k_rows: Tensor
    q_len: Tensor  # [S], on the CPU
    k_len: Tensor  # [S], on the CPU

    def __post_init__(self):
        self.max_q = int(self.q_len.max())
        self.max_k = int(self.k_len.max())
        self.whole = self.q_rows is self.k_rows  # whole sequences: the kernels' own causal mask is right

    @cached_property
    def starts(self):
        """Where each span starts among q_rows and k_rows."""
        ends = torch.stack([self.q_len, self.k_len]).cumsum(1)  # [2, S]
        q, k = F.pad(ends, (1, 0)).to(self.q_rows.device, torch.int32)
        return Starts(q, k, self.max_q, self.max_k)

    @cached_property
    def padded(self):
        """The spans as rectangles, filled up with row 0: rows to read, q [S max_q] and k [S max_k]."""
        q = pad_sequence(self.q_rows.split(self.q_len.tolist()), batch_first=True)
        k = pad_sequence(self.k_rows.split(self.k_len.tolist()), batch_first=True)
        return q.flatten(), k.flatten()

    @cached_property
    def mask(self):
        """What to add to the rectangles' scores [S, 1, max_q, max_k].

        A padded query sees some key, so that no softmax is empty. `real` drops its output.
        """
        device = self.q_rows.device
        last = (self.k_len - self.q_len)[:, None] + torch.arange(self.max_q)  # [S, max_q] the last key seen
        hidden = torch.arange(self.max_k, device=device) > last[:, None, :, None].to(device)
        return torch.where(hidden, -torch.inf, 0.0)

    @cached_property
    def real(self):
        """Where in the rectangle the queries are [sum q_len]. Lengths tell, never token ids."""
        real = torch.arange(self.max_q) < self.q_len[:, None]  # [S, max_q]
        return real.flatten().nonzero().flatten().to(self.q_rows.device)


def attention(q, k, v, spans):
    """softmax(q k^T / sqrt(D)) v within each span. q [N, A, D], k and v [N, K, D] -> [sum q_len, A, D].

    Where varlen_takes(q): flash-attn's varlen kernel if it is installed, else PyTorch's own. Otherwise
    scaled_dot_product_attention over padded spans, causal or with a mask.
    """
    kernel = varlen_takes(q)
    q_rows, k_rows = (spans.q_rows, spans.k_rows) if kernel else spans.padded
    q, k, v = (x.index_select(0, at) for x, at in ((q, q_rows), (k, k_rows), (v, k_rows)))
    if kernel:
        return varlen(q, k, v, spans.starts, causal=True)
    q, k, v = (x.unflatten(0, (len(spans.q_len), -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if spans.whole else spans.mask.to(q.dtype)
    groups = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=spans.whole, enable_gqa=groups)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, spans.real)  # from [S, A, max_q, D]


def varlen_takes(x):
    """Whether the varlen kernels take such tensors: CUDA (Ampere on), half precision, D = 8, 16, ... 256."""
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] in range(8, 257, 8)
            and torch.cuda.get_device_capability(x.device) >= (8, 0))


def varlen(q, k, v, starts, causal, lse=False):
    """Attention of packed sequences by a varlen kernel. q [Nq, A, D], k and v [Nk, K, D] -> [Nq, A, D].

    With lse also the log-sum-exp of the scores [Nq, A].
    """
    if flash_attn_varlen_func is not None:
        out = flash_attn_varlen_func(q, k, v, *starts, causal=causal, return_attn_probs=lse)
    else:
        how = {"return_aux": AuxRequest(lse=True)} if lse else {}
        if causal:
            how["window_size"] = (-1, 0)
        if "enable_gqa" in VARLEN_ARGUMENTS:  # torch 2.11 takes grouped heads without being asked
            how["enable_gqa"] = True
        out = varlen_attn(q, k, v, *starts, **how)
    return (out[0], out[1].transpose(0, 1)) if lse else out  # the kernels give the log-sum-exp as [A, Nq]


def causal_spans(lengths, device="cpu"):
    """Independent sequences of these lengths, packed one after the other."""
    lengths = torch.as_tensor(lengths)
    rows = torch.arange(int(lengths.sum()), device=device)
    return Spans(rows, rows, lengths, lengths)


# ---------------------------------------------------------------------------------------------- the decoder

@dataclass
class Shape:
    """What config.json says of the architecture."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    rope_scaling: dict | None  # llama3's, or None
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    tied: bool


FEW_ROWS = 400  # a CPU multiplies up to so many rows faster with the weights on the left
SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_shape(folder):
    """config.json of a Hugging Face folder -> Shape. InputError: what this file does not compute."""
    path = folder / "config.json"
    try:
        c = read_json(path)
    except OSError as error:
        raise InputError(f"model.path: {path} cannot be read ({error})")
    kind = c.get("model_type")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    fault = fault_of(c, kind, rope, rope_type)
    if fault:
        raise InputError(f"{path}: {fault}")
    heads = c["num_attention_heads"]
    bias = bool(c.get("attention_bias"))
    return Shape(
        *(c[key] for key in SIZES),  # the first five fields
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        eps=c.get("rms_norm_eps", 1e-6),
        theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
        rope_scaling=rope if rope_type == "llama3" else None,
        qkv_bias=kind == "qwen2" or bias,
        out_bias=kind != "qwen2" and bias,
        qk_norm=kind == "qwen3",
        tied=bool(c.get("tie_word_embeddings", False)))


def fault_of(c, kind, rope, rope_type):
    """-> None, or what config.json asks for that this file does not compute."""
    if kind not in ("qwen2", "qwen3", "llama"):
        return f"model_type {kind!r} is not supported; qwen2, qwen3 and llama are"
    activation = c.get("hidden_act", "silu")
    refused = {f"rope type {rope_type}": rope_type not in ("default", "llama3"),
               f"activation {activation}": activation != "silu",
               "sliding-window attention": c.get("use_sliding_window"),
               "mlp_bias": c.get("mlp_bias"),
               "quantization": c.get("quantization_config")}
    for what, present in refused.items():
        if present:
            return f"{what} is not supported by model.py"
    for key in LLAMA3_ROPE if rope_type == "llama3" else ():
        if not isinstance(rope.get(key), (int, float)):
            return f"rope type llama3 lacks {key}"
    for key in SIZES:
        if not isinstance(c.get(key), int):
            return f"{key} is missing or not a whole number"


def wide(x):
    """x in float32 at least: the type that softmax and log-probs are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def logits_of(x, weight):
    """x [N, H], weight [V, H] -> x W^T [N, V] in float32 at least.

    A logit rounded to bfloat16 would move a log-prob by more than all that sampler and trainer differ in.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return wide(x) @ wide(weight).T


def rope_angles(shape, positions, dtype):
    """Rotary cos and sin of positions [N], each [N, 1, D]. sin's first half has the sign rotate() needs."""
    at_least = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, shape.head_dim, 2, dtype=at_least, device=positions.device)
    freq = 1.0 / shape.theta ** (even / shape.head_dim)  # [D/2]
    if shape.rope_scaling:  # Llama 3.1: long wavelengths are stretched, short ones kept, with a ramp between
        factor, low, high, old = (shape.rope_scaling[key] for key in LLAMA3_ROPE)
        turns = old * freq / (2 * math.pi)  # within the context of the first training
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / factor)
    angle = positions.to(at_least)[:, None, None] * freq  # [N, 1, D/2]
    sin, cos = angle.sin(), angle.cos()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.head_dim = s.head_dim
        q_size, kv_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.q_proj = nn.Linear(s.hidden, q_size, bias=s.qkv_bias)
        self.k_proj = nn.Linear(s.hidden, kv_size, bias=s.qkv_bias)
        self.v_proj = nn.Linear(s.hidden, kv_size, bias=s.qkv_bias)
        self.o_proj = nn.Linear(q_size, s.hidden, bias=s.out_bias)
        norm = nn.RMSNorm if s.qk_norm else nn.Identity
        self.q_norm = norm(s.head_dim, s.eps)
        self.k_norm = norm(s.head_dim, s.eps)

    def forward(self, x, cos, sin, select):  # x [N, H] -> q [N, A, D] (select: [M, A, D]), k and v [N, K, D]
        k, v, q = self.k_proj(x), self.v_proj(x), self.q_proj(rows(x, select))
        k, v, q = (y.unflatten(-1, (-1, self.head_dim)) for y in (k, v, q))
        q = rotate(self.q_norm(q), rows(cos, select), rows(sin, select))
        return q, rotate(self.k_norm(k), cos, sin), v


def rows(x, select):
    return x if select is None else x.index_select(0, select)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps gate and up alone for the backward pass (autograd would keep silu(gate) too)."""

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
        gate = F.silu(self.gate_proj.weight @ x.T, inplace=True)
        return (self.down_proj.weight @ gate.mul_(self.up_proj.weight @ x.T)).T


class Layer(nn.Module):
    def __init__(self, s, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s)
        self.checkpointed = False  # activation checkpointing: keep only the input, compute the rest again

    def forward(self, *args):
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, *args, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*args)

    def compute(self, x, cos, sin, attend, select):
        residual = rows(x, select)
        out = attend(self.index, *self.before(x, cos, sin, select))  # q, k, v go before the MLP needs memory
        return self.after(residual, out)

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
        self.model.norm = nn.RMSNorm(shape.hidden, shape.eps)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens, positions, attend, select=None, head=logits_of):
        """Logits [M, V] of packed tokens [N] at their positions [N].

        select [M]: packed rows whose next token is asked for (None: all). In the last layer `attend` gets the
        queries of these rows alone. head(hidden [M, H], weight [V, H]) may make something else than logits.
        """
        x = self.model.embed_tokens(tokens)  # [N, H]
        cos, sin = rope_angles(self.shape, positions, x.dtype)
        for layer in self.model.layers:
            # While the weights are gathered for sampling, FSDP's hooks around each layer have nothing to do.
            call = layer.forward if self.gathered else layer
            x = call(x, cos, sin, attend, select if layer is self.model.layers[-1] else None)
        x = self.model.norm(x)  # [M, H]
        return head(x, (self.model.embed_tokens if self.shape.tied else self.lm_head).weight)


@contextlib.contextmanager
def gathered(model):
    """Whole weights on every rank while the block runs (a rollout phase). The sampler reads them in place."""
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


# ------------------------------------------------------------------------------------- folders in and out

def resolve(path, files=("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")):
    """A local folder -> its Path. Anything else is a hub id: huggingface_hub downloads its files."""
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        return Path(path)
    if os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise InputError(f"model.path: no such folder: {path}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:  # the hub's many errors (offline, unknown id, no access) all mean: no weights
        raise InputError(f"model.path: {path!r} is neither a local folder nor a hub id that could be "
                         f"downloaded ({str(error).strip().splitlines()[0]})")


def local_rows(rows, rank, world):
    """FSDP2 shards dimension 0 like torch.chunk: -> [first, last) of this rank's rows.

    >>> [local_rows(5, r, 4) for r in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def local(p):
    """This rank's rows of a parameter."""
    return p.to_local() if isinstance(p, DTensor) else p


def shard_rows(p):
    """Rows [first, last) of the whole tensor that this parameter holds here."""
    if not isinstance(p, DTensor):
        return 0, p.shape[0]
    return local_rows(p.shape[0], p.device_mesh.get_local_rank(), p.device_mesh.size())


def open_weights(folder):
    """-> {parameter name: the open safetensors file that holds it}, from one file or shards with an index."""
    file = index = folder / "model.safetensors.index.json"
    where = {}
    try:
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        for name in sorted(shards):
            file = folder / name
            opened = safe_open(file, "pt")
            where |= dict.fromkeys(opened.keys(), opened)
    except Exception as error:  # safetensors raises its own kinds for torn or missing files
        raise InputError(f"model.path: {file} holds no readable safetensors weights ({error})")
    return where


def load_weights(model, folder):
    """Fill the parameters from a folder's safetensors. Each rank reads only its own rows."""
    where = open_weights(folder)
    params = dict(model.named_parameters())
    missing = sorted(params.keys() - where)
    unknown = where.keys() - params - {"lm_head.weight"}
    extra = sorted(n for n in unknown if not n.endswith("rotary_emb.inv_freq"))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the architecture does not have"
        raise InputError(f"{folder}: the checkpoint {what}: config.json and weights do not belong together")
    for name, p in params.items():
        stored = where[name].get_slice(name)
        shape, wanted = list(stored.get_shape()), list(p.shape)
        if shape != wanted:
            raise InputError(f"{folder}: {name} has shape {shape}, config.json asks for {wanted}")
        first, last = shard_rows(p)
        if last > first:
            local(p).data.copy_(stored[first:last])
    return model


def load(folder, device, dtype):
    """A whole model on one device, in one type, without gradients: for sampling and evaluation."""
    with torch.device("meta"):
        model = Decoder(read_shape(folder))
    model = model.to(dtype).to_empty(device=device)
    return load_weights(model.requires_grad_(False), folder)


def save_tensors(tensors, file, **metadata):
    """Write a safetensors file. OSError: it cannot be written, say where the disk is full."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}")


def export(model, base, out, steps=0, max_bytes=4 << 30):
    """Write the model as a Hugging Face folder, with the base checkpoint's type, config and tokenizer files.

    steps: how long it was trained, for eval.py. Collective under FSDP: one parameter at a time is gathered,
    rank 0 writes. The folder appears whole or not at all.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    base, out, params = resolve(base), Path(out), dict(model.named_parameters())
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    config = read_json(base / "config.json")
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    sizes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in params.items()}
    files = split_torch_state_dict_into_shards(sizes, max_shard_size=max_bytes)
    aside = out.with_name(out.name + ".tmp")
    if main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for f in base.iterdir():
            wanted = f.suffix in (".json", ".txt", ".jinja", ".model")
            if wanted and f.is_file() and not f.name.startswith((".", "model")):
                shutil.copyfile(f, aside / f.name)
    for file, names in files.filename_to_tensors.items():
        tensors = {}
        for name in names:
            p = params[name]
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            if main:
                tensors[name] = whole.detach().to("cpu", dtype).contiguous()
        if main:
            save_tensors(tensors, aside / file, format="pt")
    if main:
        if files.is_sharded:
            write_json(aside / "model.safetensors.index.json",
                       {"metadata": files.metadata, "weight_map": files.tensor_to_filename})
        write_json(aside / ".trained.json", {"steps": steps})  # hidden: a later export leaves it behind
        put_in_place(aside, out)
