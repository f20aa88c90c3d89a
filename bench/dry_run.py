"""One training step, one prefill and one decoding step of the real code at full size, without a GPU.

    python -m bench.dry_run configs/table1/7b/grpo.yaml --ranks 8 --model 7b [key=value ...]

plan=true answers from formulas; this runs the code. Tensors have shapes and no numbers, so they take neither
memory nor time. The process plays one of many ranks whose collectives go nowhere, and takes the path of
CUDA's kernels. --model is a name in bench/common.py's SHAPES or a folder with a config.json. It prints

    memory  the peak of a micro-batch of the greatest length that follows another, as torch's tracker for
            FSDP2 counts it, beside the plan's
    wire    bytes that a rank receives for a micro-batch
    FLOP    of a rank's training step, prefill and decoding step, at the lengths that the options give
    hours   of a row, at the rates that the options give. Loading, evaluation and graders come on top.
"""
import argparse
import time
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import config
import model as decoder
import pack
import parallel
import plan
import rollout
import run as running
import train_grpo
from bench.common import read_shape
from bench.rollout import bytes_read

OPTIONS = {  # name: (default, help)
    "model": ("7b", "a name in SHAPES, or a folder with a config.json"),
    "ranks": (8, "GPUs"),
    "prompt": (600, "prompt tokens"),
    "response": (50, "response tokens"),
    "longest": (150, "tokens of the longest response of a rollout phase"),
    "steps": (343, "steps of a row"),
    "tflops": (989.0, "TFLOP/s of a card in bfloat16 (an H100's)"),
    "efficiency": (0.4, "share of them that is reached"),
    "bandwidth": (2850.0, "GB/s of its memory that are reached (85% of an H100's)"),
    "wire": (300.0, "GB/s that a rank receives (NVLink; between nodes perhaps 50)"),
}
HALF = torch.bfloat16, torch.float16
GB = 1e9


class FusedNorm(torch.autograd.Function):
    """What RMSNorm keeps on CUDA: its input and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_logits(x, weight):
    """bfloat16 in, float32 out, as one kernel of CUDA does it."""
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


class Wire(TorchDispatchMode):
    """Counts the bytes that collectives bring to a rank from the others."""

    def __init__(self, world):
        super().__init__()
        self.others = (world - 1) / world
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            size = max((x.nbytes for x in args if isinstance(x, torch.Tensor)), default=0)
            self.bytes[func._schema.name.split("::")[1].strip("_")] += self.others * size
        return func(*args, **kwargs or {})


def trees_of(n, prompt, response, samples):
    return [pack.Tree([0] * prompt, [pack.Branch([0] * response, i, [0.0] * response, 1.0)
                                     for i in range(samples)]) for _ in range(n)]


def largest_micro_batch(cfg):
    """As many trees of the greatest length as a micro-batch takes."""
    r, budget = cfg.rollout, cfg.train.tokens_per_microbatch
    tree, = trees_of(1, r.max_prompt_tokens, r.max_new_tokens, r.samples)
    part = pack.split_tree(tree, budget)[0]
    batch = pack.pack([part] * max(1, budget // part.size()))
    for spans in (*batch.spans, batch.last):
        spans.starts  # made from lengths, while these are real tensors
    return batch


def train(model, batch, cfg, reference):
    """A training step, up to the figures that would reach the host."""
    step = train_grpo.Step([batch], tokens=1, responses=1, skipped=0.0)
    figures = {"trained_tokens": 0}
    with mock.patch.object(running, "optimizer_step", lambda *_, **how: figures):
        train_grpo.train_step(model, mock.Mock(), step, cfg, reference)  # gradients stay: nothing zeroes them


def sharded(job, mesh, trainable):
    """The model of a rank, weights in the types that parallel.load_sharded gives them."""
    torch.set_default_dtype(torch.float32 if trainable else job.dtype)
    model = decoder.Decoder(job.shape).requires_grad_(trainable)
    torch.set_default_dtype(torch.float32)
    parallel.shard(model, mesh, job.dtype, trainable)
    running.set_layers(model, job.cfg.train.activation_checkpointing, False)
    return model


def memory(job):
    """-> (peak bytes of a micro-batch after another, {collective: bytes received})."""
    mesh, batch = init_device_mesh("cpu", (job.world,)), largest_micro_batch(job.cfg)
    norm = mock.patch.object(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight))
    logits = mock.patch.object(pack, "logits_of", fused_logits)
    with FakeTensorMode(allow_non_fake_inputs=True), norm, logits:
        model = sharded(job, mesh, trainable=True)
        reference = sharded(job, mesh, trainable=False) if job.cfg.train.kl_coef else None
        kept = 0 if reference is None else sum(p.to_local().nbytes for p in reference.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # the tracker counts it
            # Moments are added by hand: given an optimizer, the tracker counts them unsharded.
            kept += 2 * p.to_local().nbytes * (not job.cfg.train.moments_on_host)
        tracker, wire = FSDPMemTracker(model), Wire(job.world)
        tracker.track_inputs(())
        with tracker, wire:
            train(model, batch, job.cfg, reference)
    peak, = tracker.get_tracker_snapshot("peak").values()
    return kept + peak["Total"], wire.bytes


def counted(work):
    """-> FLOP of a function."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def work_of(job, a):
    """-> ({phase: FLOP of a rank}, bytes that a decoding step reads while responses are half grown, packed
    tokens of the training step)."""
    n, samples = -(-job.cfg.train.prompts_per_step // job.world), job.cfg.rollout.samples
    trees = trees_of(n, a.prompt, a.response, samples)
    with torch.device("meta"):
        model = decoder.Decoder(job.shape).to(job.dtype)
    running.set_layers(model, job.cfg.train.activation_checkpointing, False)
    batch, reference = pack.pack(trees, "meta"), model if job.cfg.train.kl_coef else None
    flops = {"training step": counted(lambda: train(model, batch, job.cfg, reference))}
    slots = rollout.Slots(model, n, a.prompt, {0}, rollout.Sampling(samples, a.longest), static=True)
    entries = [(i, i, tree.prompt) for i, tree in enumerate(trees)]
    with torch.no_grad():
        flops["prefill"] = counted(lambda: slots.prefill(entries, lambda i, g: [0.0] * a.longest))
        flops["decoding step"] = counted(lambda: slots.decode(n * samples))
    lengths = argparse.Namespace(**vars(a), groups=n, samples=samples)
    return flops, bytes_read(model, lengths, job.dtype), len(batch.tokens)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("config")
    for name, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} ({default})")
    a, overrides = parser.parse_known_args()
    began = time.perf_counter()
    cfg = config.load([a.config, *overrides])
    job = plan.Job(cfg, read_shape(a.model), a.ranks, torch.device("cuda"))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=a.ranks)
    with mock.patch.object(decoder, "varlen_takes", lambda x: x.dtype in HALF):
        peak, wire = memory(job)
        flops, read, tokens = work_of(job, a)
    planned = plan.totals(job)["training"]
    print(f"memory  {peak / plan.GIB:.1f} GiB at the peak of a training step; the plan says "
          f"{planned / plan.GIB:.1f} ({planned / peak - 1:+.1%})")
    print(f"wire    {sum(wire.values()) / GB:.1f} GB for a micro-batch"
          + "".join(f", {size / GB:.1f} by {name}" for name, size in wire.items()))
    print("FLOP    " + ", ".join(f"{flop / 1e12:.2f} TFLOP a {name}" for name, flop in flops.items())
          + f"; it reads {read / GB:.1f} GB")
    rate = a.efficiency * a.tflops * 1e12
    batches = -(-tokens // cfg.train.tokens_per_microbatch)
    moved = batches * sum(wire.values()) + job.whole * job.compute  # and all weights, for the rollouts
    seconds = {"training": flops["training step"] / rate, "prefill": flops["prefill"] / rate,
               "decoding": a.longest * read / a.bandwidth / GB, "wire": moved / a.wire / GB}
    hours = a.steps * sum(seconds.values()) / 3600
    print(f"hours   {hours:.2f}: {a.steps} steps of {batches} micro-batches, "
          + " + ".join(f"{s:.2f} s {name}" for name, s in seconds.items()))
    print(f"(computed in {time.perf_counter() - began:.0f} s on this CPU; nothing was measured)")


if __name__ == "__main__":
    main()
