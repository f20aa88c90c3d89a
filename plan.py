"""The memory that a run needs on each device, and what language models will be asked, before it starts.

    python train_grpo.py cfg.yaml plan=true gpus=8 gpu_gib=80

The plan counts bytes from the model's shape and the config, for prompts and responses of the greatest length.
Every training run makes the same check at its start and refuses what does not fit. The tests hold the plan to
measured peaks. Two phases matter: a training step, and the sampling of rollouts.

"Packed" tokens are all tokens of a micro-batch, "scored" tokens are those of its responses, "rows" are the
responses that are decoded at once. Language models of llm.*.source=local are not counted.

The calls of extractor, grader and auditor are counted from the config and the logs. Nobody is asked.
"""
import os
from dataclasses import dataclass

import torch

import config
import logs
import model as decoder
import pack
import parallel
import rollout
from prompts import PROMPTS, load_prompt, load_tokenizer
from records import InputError

USABLE = 0.9  # of a device's memory; the rest is for CUDA's context, NCCL's buffers, fragmentation
GIB = 2 ** 30
WAYS_OUT = {
    "training": "set train.activation_checkpointing=true, then train.moments_on_host=true, or lower "
                "train.tokens_per_microbatch",
    "sampling": "lower rollout.max_rows, or set train.moments_on_host=true"}


@dataclass
class Job:
    """What a plan is made for, how many numbers the model holds, and the bytes that a number takes."""
    cfg: config.Config
    shape: decoder.Shape
    world: int  # ranks
    device: torch.device

    def __post_init__(self):
        with torch.device("meta"):
            model = decoder.Decoder(self.shape)
        weights = list(model.parameters())
        self.whole = sum(p.numel() for p in weights)
        self.layer = sum(p.numel() for p in model.model.layers[0].parameters())
        self.root = self.whole - self.layer * self.shape.layers  # embedding, final norm and head
        self.shard = sum(p[0].numel() * decoder.local_rows(len(p), 0, self.world)[1]
                         for p in weights)  # the largest share of a rank
        self.cuda = self.device.type == "cuda"
        self.dtype = parallel.compute_dtype(self.cfg.model.dtype, self.device)
        self.compute = self.dtype.itemsize  # bytes of a number in the computation
        self.master = max(4, self.compute)  # bytes of a number that is float32 at least: weights, log-probs
        self.norm = self.compute if self.cuda else 2 * self.master  # on the CPU a norm keeps input and result


def micro_batch(job):
    """The largest micro-batch of a rank -> (prompts, responses, packed tokens), all of full length.

    They need not be whole numbers: shorter trees may fill what full-length trees leave of the token budget.
    """
    t = job.cfg.train
    r = job.cfg.rollout
    budget = t.tokens_per_microbatch
    samples = {"sft": 1, "dpo": 2}.get(t.loss, r.samples)
    tree = pack.Tree([0] * r.max_prompt_tokens, [pack.Branch([0] * r.max_new_tokens, None)] * samples)
    parts = [tree] if t.loss == "dpo" else pack.split_tree(tree, budget)  # a pair is not split
    trees = -(-t.prompts_per_step // job.world)
    bins, = pack.balance(parts * min(trees, 1 + budget // tree.size()), 1, budget)

    def size(bin):
        return sum(part.size() for part in bin)

    largest = max(bins, key=size)
    fill = max(1, min(budget, trees * tree.size()) / size(largest))
    responses = sum(len(part.branches) for part in largest)
    return [fill * n for n in (len(largest), responses, size(largest))]


def layer_memory(job, inputs, outputs, keys):
    """Bytes that a layer keeps for the backward pass: of its tokens in, tokens out, and attention's keys."""
    s = job.shape
    queries = s.heads * outputs
    norms = s.hidden * (inputs + outputs) + s.qk_norm * s.head_dim * (queries + s.kv_heads * inputs)
    residual = inputs + outputs + outputs * (outputs < inputs)
    attention = 3 * queries + 2 * s.kv_heads * keys  # q, the output, o_proj's input; k, v, gathered or padded
    kept = s.hidden * residual + s.head_dim * attention + 3 * s.mlp * outputs  # gate, up and their product
    return job.norm * norms + job.compute * kept + job.master * queries  # the last: attention's log-sum-exp


def forward_peak(job, tokens):
    """Bytes of a forward pass without gradients, at its widest: in attention or in an MLP."""
    s = job.shape
    attention = (5 * s.heads + 4 * s.kv_heads) * s.head_dim  # q, k, v, also gathered; output and copies
    mlp = 2 * s.mlp + s.heads * s.head_dim + s.hidden  # gate, up, attention's output
    beside = 2 * s.hidden + 2 * s.head_dim  # residual, norm, rotary angles
    return job.compute * tokens * (beside + max(attention, mlp))


def step_memory(job):
    """What a training step needs beside weights and moments, at its peak. -> {what: bytes}"""
    s = job.shape
    t = job.cfg.train
    r = job.cfg.rollout
    compute = job.compute
    master = job.master
    prompts, responses, packed = micro_batch(job)
    length = r.max_new_tokens
    scored = responses * length
    keys = responses * (r.max_prompt_tokens + length - 1)  # all that the last tokens attend to

    # What the forward pass saves for the backward pass. The last layer computes the scored tokens alone.
    kept = layer_memory(job, packed, packed, prompts * r.max_prompt_tokens + keys * (length > 1))
    final = s.hidden * scored * (job.norm + compute)  # the final norm, and what it gives to the head
    last = layer_memory(job, packed, scored, keys) + final
    again = 0
    at_head = last
    if t.activation_checkpointing:  # a layer keeps its input, the rest is computed again
        kept, again = compute * s.hidden * packed, kept
        at_head = kept + final
    masks = 0 if job.cuda and compute == 2 else 4 * keys * (2 * length - 1)  # fused kernels need none
    saved = masks + 2 * compute * s.head_dim * (packed + scored) + (s.layers - 1) * kept

    # Log-probs are computed for a chunk of tokens. Embedding and head stay gathered; so does a layer at work,
    # and in the backward pass the next one.
    logits = min(scored, max(1, pack.LOGITS // s.vocab)) * s.vocab
    logprobs = 2 * logits * master
    head_grads = s.hidden * (s.vocab * (master + compute) + scored * compute)
    mlp_grad = 3 * s.mlp * compute  # bytes a token: of the MLP's four parts the product is gone by then
    root = compute * job.root
    layer = compute * job.layer
    ahead = root + 2 * layer
    ends = 3 * master if job.world == 1 else 2 * compute + master
    in_head = {"activations": saved + at_head,
               "log-probs": logprobs + head_grads,
               "weights at work": root + layer}
    in_layer = {"activations": saved + again + mlp_grad * packed,
                "weights at work": ahead,
                "gradients at work": root + master * job.layer}  # a layer's are on their way to their shards
    in_last_layer = {"activations": saved + last + mlp_grad * scored,
                     "weights at work": ahead,
                     "gradients at work": root}
    moments = [in_head, in_layer, in_last_layer,
               {"gradients at work": ends * job.root}]  # embedding's and head's, when all others are done
    if t.moments_on_host:  # in AdamW's step those of a parameter, at most of embedding and head
        moments.append({"AdamW moments": 2 * master * job.root / job.world})
    if t.kl_coef:
        moments.append(in_head | {"log-probs": logprobs, "weights at work": root,
                                  "reference at work": ahead + forward_peak(job, packed)})
    return {"gradients": job.shard * master, **max(moments, key=lambda moment: sum(moment.values()))}


def rollout_memory(job):
    """What a rollout needs beside weights and moments. -> {what: bytes}"""
    s = job.shape
    r = job.cfg.rollout
    compute = job.compute
    master = job.master
    prompts = r.max_rows // r.samples  # held at once
    rows = prompts * r.samples
    prompt_tokens = prompts * r.max_prompt_tokens
    cached = prompt_tokens + rows * r.max_new_tokens
    prefill = forward_peak(job, max(min(rollout.PREFILL_TOKENS, prompt_tokens), r.max_prompt_tokens))
    row = 3 * master  # logits, scaled, log-probs
    if job.cfg.train.eval_every and job.cfg.eval.top_p < 1:
        row += 3 * master + 8  # sorted, with their places
    draw = s.vocab * (prompts * master + rows * row)
    return {"weights, whole": job.whole * compute,
            "KV cache": 2 * compute * s.layers * s.kv_heads * s.head_dim * cached,
            # on CUDA the decoding graphs keep their memory while prompts are computed
            "prefill and drawing": prefill + draw if job.cuda else max(prefill, draw)}


def memory(job):
    """-> {"training": {what: bytes}, "sampling": {what: bytes}} on the rank that holds most."""
    t = job.cfg.train
    weights = job.shard * job.master
    kept = {"master weights": weights, "AdamW moments": 2 * weights * (not t.moments_on_host)}
    if t.kl_coef:
        kept["reference"] = job.shard * job.compute
    phases = {"training": kept | step_memory(job)}
    if t.eval_every or t.loss not in ("sft", "dpo"):
        phases["sampling"] = kept | rollout_memory(job)
    return phases


def totals(job):
    """-> {"training": bytes, "sampling": bytes}"""
    return {phase: sum(parts.values()) for phase, parts in memory(job).items()}


def capacity(cfg, device):
    """Bytes of memory that a process has: a GPU's, or its share of the machine's."""
    if cfg.gpus:
        return cfg.gpu_gib * GIB
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(job, least):
    """Raise InputError, with what to change, where the job exceeds `least`, the smallest device's bytes."""
    need = totals(job)
    room = USABLE * least
    phase = max(need, key=need.get)
    if need[phase] > room:
        raise InputError(f"{phase} needs {need[phase] / GIB:.1f} GiB on each device ({job.world} in all), "
                         f"but only {room / GIB:.1f} GiB can be used ({USABLE:.0%} of {least / GIB:.1f}); "
                         f"{WAYS_OUT[phase]}, or take more devices")


def row(name, cells):
    return f"{name:32}" + "".join(f"{cell:>10}" for cell in cells)


def table(job):
    """The plan as lines: a row for each part, a column for each phase, in GiB."""
    phases = memory(job)
    yield row("GiB on each", phases)
    for what in dict.fromkeys(what for phase in phases.values() for what in phase):
        yield row(what, [f"{phase[what] / GIB:.2f}" if what in phase else "-" for phase in phases.values()])
    yield row("total", [f"{need / GIB:.2f}" for need in totals(job).values()])


def calls(cfg):
    """About how much language models are asked before and in training -> the lines of a table, or none.

    A user's message counts as a turn, a whole session as what a call shows. Evaluations come on top.
    """
    t, how, judge = cfg.train, cfg.hindsight, cfg.reward
    if "llm" not in (how.source, judge.grader) and not judge.audit:
        return
    texts = [str(row) for name in ("logs", "eval_logs") for _, row in logs.rows(cfg, name)]
    turns = "".join(texts).count("'role': 'user'")
    if not turns:
        raise InputError("data.logs holds no message of a user (see data.fields and data.roles)")
    steps = t.steps or t.epochs * turns // t.prompts_per_step
    graded = steps * t.prompts_per_step * cfg.rollout.samples * (t.loss not in ("sft", "dpo"))
    asks = {"extractor": (how.source == "llm") * how.self_check * len(texts),
            "grader": (judge.grader == "llm") * graded, "auditor": judge.audit * graded}
    cut, shown = load_tokenizer(cfg.model.path).tokenize, texts[:50]
    session = len(cut("".join(shown))) / len(shown)
    yield row("language models, about", ["calls", "M in", "M out", "hours"])
    for name, n in asks.items():
        role = getattr(cfg.llm, name)
        read = session + len(cut(load_prompt(role.prompt or PROMPTS[name])))
        if n:
            yield row(f"llm.{name}", [f"{x:,.2f}" for x in (
                n, n * read / 1e6, n * role.max_tokens / 1e6, n / role.concurrency / 3600)])
    yield "gradings: at most, evaluations aside (wrong decisions, stops and repeats are not asked about)"
    yield "hours: if a call takes 1 s, and llm.ROLE.concurrency of them are under way at once"


def show(cfg):
    """Print the plan for cfg.gpus GPUs, or for this machine's device and torchrun's processes. -> it fits"""
    device = torch.device("cuda" if cfg.gpus or torch.cuda.is_available() else "cpu")
    world = cfg.gpus or int(os.environ.get("WORLD_SIZE", 1))
    job = Job(cfg, decoder.read_shape(decoder.resolve(cfg.model.path, ["config.json"])), world, device)
    room = capacity(cfg, device)
    try:
        check(job, room)
        verdict = f"fits: {USABLE:.0%} of {room / GIB:.1f} GiB are counted on"
    except InputError as error:
        verdict = f"does not fit: {error}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{cfg.model.path}: {job.whole / 1e9:.3g} billion parameters, "
              f"{str(job.dtype)[6:]}, {world} x {'GPU' if job.cuda else 'CPU process'}",
              *table(job), f"micro-batches of up to {micro_batch(job)[2]:,.0f} tokens", verdict, sep="\n")
        try:
            for line in calls(cfg):
                print(line)
        except InputError as error:
            print(f"the calls of language models cannot be counted: {error}")
    return verdict.startswith("fits")
