"""A whole GRPO step (sample, old log-probs, loss, backward, optimizer) against TRL's GRPOTrainer.

    python -m bench.grpo_step --prompt 600 --response 48 --groups 16 --samples 5 [--peer-batch 8]

Both have the same weights, prompts, numbers of tokens, loss (KL off) and precision; rewards are random,
so that no group is skipped. TRL is optional (`make bench` installs it): without it only our time is
shown. How many responses it takes in a micro-batch matters to it: on two cores, at prompt 600, 8 (its
default) is the fastest and all 80 at once the slowest. On CUDA it trains bfloat16 weights, ours float32
masters. Ends in one JSON line.
"""
import math
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

import model as decoder
import parallel
import train_grpo
from bench.common import (
    arguments,
    checkpoint,
    finish,
    forward_flops,
    limits,
    medians,
    random_prompts,
    setting,
    sync,
    timed,
)
from config import Config
from grading import Group
from prompts import Prompt
from rollout import Sampling, generate


def our_step(a, folder, prompts):
    """-> a function that makes one step."""
    device, dtype = setting()
    cfg = Config.model_validate({
        "run_dir": "unused", "rollout": {"samples": a.samples, "max_new_tokens": a.response},
        "train": {"prompts_per_step": a.groups, "lr": 1e-6, "tokens_per_microbatch": a.tokens}})
    model = parallel.load_sharded(folder, device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, device=device, dtype=dtype)
    rng, n = np.random.default_rng(0), 0

    def graded(responses):
        return [SimpleNamespace(reward=reward) for reward in rng.random(len(responses)).tolist()]

    def step():
        nonlocal n
        n += 1
        with decoder.gathered(model):  # -1: nothing ends a response
            sampled = generate(model, prompts, {-1}, Sampling(a.samples, a.response, seed=n))
        groups = [Group(Prompt(None, tokens), responses, graded(responses))
                  for tokens, responses in zip(prompts, sampled)]
        figures = train_grpo.train_step(model, optimizer, train_grpo.prepare(groups, run), cfg)
        assert figures["finite"] and math.isclose(figures["ratio"], 1.0)
        assert figures["trained_tokens"] == a.groups * a.samples * a.response
    return step


def trl_config(trl, a, folder):
    device, dtype = setting()
    rows = a.groups * a.samples
    micro = a.peer_batch or rows
    assert rows % micro == 0, "--peer-batch must divide groups x samples, or the peer would do other work"
    return trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro, num_generations=a.samples, beta=0.0, report_to=[],
        max_completion_length=a.response, learning_rate=1e-6, max_steps=a.pairs + 1, save_strategy="no",
        logging_strategy="no", use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, disable_tqdm=True,
        shuffle_dataset=False, gradient_checkpointing=False, temperature=1.0,
        generation_kwargs={"min_new_tokens": a.response},
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")})


def beside_trl(a, folder, prompts, ours):
    """Train with TRL's GRPOTrainer, and make one of our steps after each of its own.

    -> ([(our seconds, its seconds)] without the first pair, its version); or None where TRL is absent.
    """
    try:
        import trl
    except ImportError:
        return None
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device, _ = setting()
    rng, seconds = np.random.default_rng(0), []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sync(device)
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            sync(device)
            peer = time.perf_counter() - self.began
            seconds.append((timed(ours, device), peer))

    def reward(completions, **_):
        return rng.random(len(completions)).tolist()

    texts = [tokenizer.decode(p) for p in prompts]
    assert tokenizer(texts).input_ids == prompts, "the peer would train on other tokens"
    data = Dataset.from_dict({"prompt": texts * (a.pairs + 2)})
    trainer = trl.GRPOTrainer(model=str(folder), args=trl_config(trl, a, folder), processing_class=tokenizer,
                              callbacks=[Clock()], train_dataset=data, reward_funcs=reward)
    trainer.train()
    return seconds[1:], trl.__version__


def needed_flops(s, a):
    """Matrix products of a step: prefill and decode, then forward and backward of the unique tokens."""
    rows = a.groups * a.samples
    unique = a.groups * (a.prompt + a.samples * (a.response - 1))
    prefill = forward_flops(s, a.groups * a.prompt, a.groups)
    decode = (a.response - 1) * forward_flops(s, rows, rows)
    return prefill + decode + 3 * forward_flops(s, unique, rows * a.response), unique


def main():
    a = arguments(__doc__, tokens=(7000, "our train.tokens_per_microbatch"),
                  peer_batch=(8, "responses in the peer's micro-batch (8 is its default); 0: all of a step"))
    device, dtype = setting()
    folder, prompts = checkpoint(a), random_prompts(a)
    parallel.start()
    ours = our_step(a, folder, prompts)
    ours()
    found = beside_trl(a, folder, prompts, ours)
    if found:
        times = medians(found[0])
        peer = f"{times[1]:.2f} s, ratio {times[2]:.2f}"
    else:
        times = statistics.median(timed(ours, device) for _ in range(a.pairs)), None, None
        peer = "is not installed"
    _, flops = limits(device, dtype)
    needed, unique = needed_flops(decoder.read_shape(folder), a)
    share = needed / times[0] / flops
    print(f"ours {times[0]:.2f} s a step; TRL {peer}; matrix products of {unique} unique tokens: {share:.0%} "
          f"of the {flops / 1e9:.0f} GFLOP/s measured here")
    finish("grpo_step", a, device, times, flop_share=round(share, 4), tokens=a.tokens,
           peer_batch=a.peer_batch, peer=f"trl {found[1]}" if found else None)
    parallel.stop()


if __name__ == "__main__":
    main()
