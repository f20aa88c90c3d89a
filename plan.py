"""The memory of a run, per device, before it starts.

    python train_grpo.py cfg.yaml plan=true gpus=8 gpu_gib=80

Counted from the model's shape and the config, for prompts and answers as long as they may be; the same check runs at the start of
every training and refuses what does not fit. Tests hold it to measured peaks. Two phases matter: a training step and a rollout.

Letters: N packed tokens of a micro-batch, M answer tokens, P prompt tokens, R tokens and G number of the answers to it, B prompts
held at once; b bytes of a number in the compute type, w in the master type.
"""
import copy
import os

import torch

import model as decoder
import pack
import parallel
import rollout
from data import InputError

USABLE = 0.9  # of a device's memory; the rest is for CUDA's context, NCCL's buffers, fragmentation
GIB = 2 ** 30


def parameters(shape, world):
    """-> numbers in (the whole model, one layer, all but the layers, the largest share of a rank)."""
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in decoder.Decoder(shape).named_parameters()}
    layer = sum(size.numel() for name, size in sizes.items() if name.startswith("model.layers.0."))
    whole = sum(size.numel() for size in sizes.values())
    shard = sum(size[1:].numel() * decoder.local_rows(size[0], 0, world)[1] for size in sizes.values())
    return whole, layer, whole - layer * shape.layers, shard


def micro_batch(cfg, world):
    """The largest micro-batch a rank may get -> (prompts, answers) of full length in it. They need not be whole numbers: what trees
    of full length leave of the token budget, shorter ones may fill."""
    t, r = cfg.train, cfg.rollout
    G = {"sft": 1, "dpo": 2}.get(t.loss, r.samples)
    tree = pack.Tree([0] * r.max_prompt_tokens, [[0] * r.max_new_tokens] * G, list(range(G)))
    parts = [tree] if t.loss == "dpo" else pack.split_tree(tree, t.tokens_per_microbatch)  # a pair is not split
    trees = -(-t.prompts_per_step // world)
    bins, = pack.balance(parts * min(trees, 1 + t.tokens_per_microbatch // tree.size()), 1, t.tokens_per_microbatch)
    size, largest = max(((sum(part.size() for part in bin), bin) for bin in bins), key=lambda x: x[0])
    more = max(1, min(t.tokens_per_microbatch, trees * tree.size()) / size)
    return more * len(largest), more * sum(len(part.answers) for part in largest)


def step_memory(cfg, shape, sizes, world, device, b, w):
    """What a training step needs beside weights and moments, at its peak. -> {what: bytes}"""
    s, P, R = shape, cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens
    _, layer, root, shard = sizes
    prompts, answers = micro_batch(cfg, world)
    N, M = prompts * P + answers * (R - 1), answers * R
    norm = 2 * max(4, b) if device == "cpu" else b  # bytes a norm keeps of a number: on the CPU its input and result, in float32 at least

    def attention(queries, keys):  # gathered (or padded) q, k, v, the output and, in float32, the log-sum-exp
        return b * s.head_dim * (2 * s.heads * queries + 2 * s.kv_heads * keys) + max(4, b) * s.heads * queries

    def block(N, M, spans):
        """What a layer keeps of N tokens in and M out: input, norms, o_proj's input, gate, up and their product."""
        norms = s.hidden * (N + M) + s.qk_norm * s.head_dim * (s.heads * M + s.kv_heads * N)
        inputs = s.hidden * (N + M + (M < N) * M) + s.heads * s.head_dim * M + 3 * s.mlp * M
        return norm * norms + b * inputs + spans

    keys = answers * (P + R - 1)
    full = block(N, N, attention(prompts * P, prompts * P) + (attention(N - prompts * P, keys) if R > 1 else 0))
    last = block(N, M, attention(M, keys)) + s.hidden * M * (norm + b)  # and the final norm, and what it gives to the head
    masks = 0 if device == "cuda" and b == 2 else 4 * answers * (2 * R - 1) * (P + R - 1)
    rope = 2 * b * s.head_dim * (N + M)
    if cfg.train.activation_checkpointing:
        kept, working = b * s.hidden * N, full
    else:
        kept, working = full, 0
    saved = masks + rope + (s.layers - 1) * kept

    logits = min(M, max(1, pack.LOGITS // s.vocab)) * s.vocab
    head_grad = s.vocab * s.hidden * (max(4, b) + b)
    backward_mlp = 3 * s.mlp * N * b  # four of its size, but the product is gone by then
    head = saved + (b * s.hidden * N + s.hidden * M * (norm + b) if cfg.train.activation_checkpointing else last)
    scores = logits * (2 * max(4, b) + (b if b < 4 else 0))
    moments = [
        {"activations": head, "log-probs": scores + head_grad + b * s.hidden * M,
         "weights at work": b * (root + layer)},  # the embedding and the head stay whole
        {"activations": saved + working + backward_mlp, "weights at work": b * (root + 2 * layer),  # the next is fetched ahead
         "gradients at work": b * root + w * layer},  # of the layer before, on their way to their shards
        {"activations": saved + last + 3 * s.mlp * M * b, "weights at work": b * (root + 2 * layer), "gradients at work": b * root},
        {"gradients at work": max(2 * b + w, 3 * w if world == 1 else 0) * root}]  # of embedding and head, when all others are done
    if cfg.train.kl_coef:
        moments.append({"activations": head, "log-probs": scores, "weights at work": b * root,
                        "reference at work": b * (root + 2 * layer) + forward_peak(s, N, b)})
    return {"gradients": shard * w, **max(moments, key=lambda m: sum(m.values()))}


def forward_peak(s, N, b):
    """A pass of N tokens without gradients, at its widest: in attention (q, k, v, each gathered too, the output and its copies) or in
    an MLP (gate, up, attention's output), beside residual, norm and rotary angles."""
    attention, mlp = (5 * s.heads + 4 * s.kv_heads) * s.head_dim, 2 * s.mlp + s.heads * s.head_dim + s.hidden
    return b * N * (2 * s.hidden + 2 * s.head_dim + max(attention, mlp))


def rollout_memory(cfg, shape, sizes, device, b):
    """What a rollout needs beside weights and moments. -> {what: bytes}"""
    s, r = shape, cfg.rollout
    B = max(1, r.max_rows // r.samples)
    rows, wide = B * r.samples, max(4, b)
    cache = 2 * b * s.layers * s.kv_heads * s.head_dim * (B * r.max_prompt_tokens + rows * r.max_new_tokens)
    N = max(min(rollout.PREFILL_TOKENS, B * r.max_prompt_tokens), r.max_prompt_tokens)
    draw = s.vocab * (B * b + rows * (b + 2 * wide + (wide if b < 4 else 0)))  # logits of prompts and rows, scaled, log-probs
    if cfg.train.eval_every and cfg.eval.top_p < 1:
        draw += s.vocab * rows * (3 * wide + 8)  # sorted, with their places
    # On CUDA the memory of the decoding graphs is theirs also while prompts are computed.
    work = forward_peak(s, N, b) + draw if device == "cuda" else max(forward_peak(s, N, b), draw)
    return {"weights, whole": sizes[0] * b, "KV cache": cache, "prefill and drawing": work}


def memory(cfg, shape, world, device, dtype):
    """-> {"training": {what: bytes}, "sampling": {what: bytes}} on the rank that holds most, of `world` ranks.

    device: "cuda" or "cpu"; dtype: of the computation. Language models in other roles (llm.*.source=local) are not counted.
    """
    b, w = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    sizes = parameters(shape, world)
    shard = sizes[-1]
    kept = {"master weights": shard * w, "AdamW moments": 2 * shard * w}
    if cfg.train.kl_coef:
        kept["reference"] = shard * b
    phases = {"training": kept | step_memory(cfg, shape, sizes, world, device, b, w)}
    if cfg.train.eval_every or cfg.train.loss not in ("sft", "dpo"):
        phases["sampling"] = kept | rollout_memory(cfg, shape, sizes, device, b)
    return phases


def total(phases):
    return max(sum(parts.values()) for parts in phases.values())


def advice(cfg, shape, world, device, dtype, room):
    """The first of a row of ever larger changes that fits -> words."""
    cfg, changes = copy.deepcopy(cfg), {}
    t, r = cfg.train, cfg.rollout
    while total(phases := memory(cfg, shape, world, device, dtype)) > room:
        if sum(phases["training"].values()) > room and not t.activation_checkpointing:
            t.activation_checkpointing = True
            changes["train.activation_checkpointing"] = "true"
        elif sum(phases["training"].values()) > room and t.tokens_per_microbatch > r.max_prompt_tokens + r.max_new_tokens:
            t.tokens_per_microbatch = changes["train.tokens_per_microbatch"] = t.tokens_per_microbatch // 2
        elif sum(phases.get("sampling", {}).values()) > room and r.max_rows > r.samples:
            r.max_rows = changes["rollout.max_rows"] = max(r.samples, r.max_rows // 2)
        elif world < 4096:
            world *= 2
            changes["devices"] = world
        else:
            return "it cannot fit: the whole model and one group must find room on every device while sampling"
    return f"this would fit in {total(phases) / GIB:.1f} GiB: " + " ".join(f"{k}={v}" for k, v in changes.items())


def capacity(cfg, device):
    """Bytes of memory that a process has: a GPU's, or its share of the machine's."""
    if cfg.gpus:
        return cfg.gpu_gib * GIB
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(cfg, shape, world, device, dtype, least):
    """Raises InputError where a run does not fit the memory of the smallest device, with what to change."""
    phases, room = memory(cfg, shape, world, device.type, dtype), USABLE * least
    name = max(phases, key=lambda name: sum(phases[name].values()))
    if total(phases) > room:
        raise InputError(f"{name} needs {total(phases) / GIB:.1f} GiB on each device ({world}), and {room / GIB:.1f} are to be had "
                         f"({USABLE:.0%} of {least / GIB:.1f}); {advice(cfg, shape, world, device.type, dtype, room)}")


def show(cfg):
    """Print the plan of this config: for cfg.gpus GPUs, or for the processes and the device there are. -> whether it fits"""
    device = torch.device("cuda" if cfg.gpus or torch.cuda.is_available() else "cpu")
    world, dtype = cfg.gpus or int(os.environ.get("WORLD_SIZE", 1)), parallel.compute_dtype(cfg.model.dtype, device)
    shape, room = decoder.read_shape(decoder.resolve(cfg.model.path, ["config.json"])), capacity(cfg, device)
    phases, (prompts, answers) = memory(cfg, shape, world, device.type, dtype), micro_batch(cfg, world)
    lines = [f"{cfg.model.path}: {parameters(shape, world)[0] / 1e9:.3g} billion parameters, {str(dtype)[6:]}, {world} x "
             f"{'GPU' if device.type == 'cuda' else 'CPU process'}", f"{'GiB on each':32}" + "".join(f"{name:>10}" for name in phases)]
    for what in dict.fromkeys(what for parts in phases.values() for what in parts):
        lines.append(f"{what:32}" + "".join(f"{parts[what] / GIB:10.2f}" if what in parts else f"{'-':>10}" for parts in phases.values()))
    lines.append(f"{'total':32}" + "".join(f"{sum(parts.values()) / GIB:10.2f}" for parts in phases.values()))
    N = prompts * cfg.rollout.max_prompt_tokens + answers * (cfg.rollout.max_new_tokens - 1)
    lines.append(f"micro-batches of up to {N:,.0f} tokens")
    try:
        check(cfg, shape, world, device, dtype, room)
        fits = True
        lines.append(f"fits: {USABLE:.0%} of {room / GIB:.1f} GiB are counted on")
    except InputError as error:
        fits = False
        lines.append(f"does not fit: {error}")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return fits
