"""One process per device: start the process group, shard a model with FSDP2, exchange small objects."""
import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import model as decoder
from records import InputError


def start():
    """Join torchrun's process group (NCCL on CUDA, gloo on CPU), or make one of a single rank.

    -> (rank, world, device). InputError: this process has no GPU of its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with a torchrun that is killed
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        present = torch.cuda.device_count()
        if local >= present:
            raise InputError(f"process {local} of this node has no GPU of its own ({present} present): lower "
                             "--nproc_per_node, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return dist.get_rank(), dist.get_world_size(), device


def stop():
    """Leave the process group (NCCL warns at exit where a process did not)."""
    several = dist.get_world_size() > 1
    dist.destroy_process_group()
    if several:  # gloo's thread asks for the interpreter's lock to drop its last tensors, and asking for it
        time.sleep(0.5)  # during the shutdown aborts the process


def compute_dtype(name, device):
    """model.dtype of the config -> torch dtype."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def shard(model, mesh, dtype, trainable=True):
    """Split a model's weights over the ranks by FSDP2, layer by layer.

    It computes in `dtype`. Gradients are SUMMED over ranks: the losses carry global denominators, so FSDP's
    own averaging is undone.
    """
    master = model.model.norm.weight.dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master, cast_forward_inputs=False)
    reshard = None if trainable else True  # True: without a backward pass even the root can be let go
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def load_sharded(folder, device, dtype, trainable=True):
    """A checkpoint folder into shards: each rank reads only its own rows, none holds the whole model.

    Trainable: master weights of at least float32. Not trainable (a KL reference): weights in `dtype`.
    """
    with torch.device("meta"):
        model = decoder.Decoder(decoder.read_shape(folder))
    master = torch.promote_types(dtype, torch.float32) if trainable else dtype
    model = model.to(master).requires_grad_(trainable)
    shard(model, init_device_mesh(device.type, (dist.get_world_size(),)), dtype, trainable)
    model.to_empty(device=device)
    return decoder.load_weights(model, folder)


def all_gather(obj):
    """-> list of every rank's object (small, picklable), in rank order."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, obj)
    return out
