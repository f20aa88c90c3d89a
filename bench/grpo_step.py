"""A whole GRPO step (sample, old log-probs, loss, backward, optimizer) against TRL's GRPOTrainer: the same weights, prompts, numbers of
tokens, loss (KL off) and precision; random rewards, so that no group is skipped.

    python bench/grpo_step.py --prompt 600 --response 48 --groups 16 --samples 5 [--peer-batch 8]

TRL is optional (`make bench` installs it): without it only our time is shown. How many answers it takes in a micro-batch matters to
it: on two cores, at prompt 600, 8 (its default) is the fastest and all 80 at once the slowest. On CUDA it trains bfloat16 weights,
ours float32 masters. Ends in one JSON line.
"""
import math
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch
from common import arguments, checkpoint, finish, forward_flops, limits, random_prompts, sync, timed

import config
import model as decoder
import parallel
import rollout
import train_grpo


def our_step(a, folder, device, dtype, prompts):
    """-> a function that makes one step."""
    cfg = config.build({"run_dir": "unused", "train.prompts_per_step": a.groups, "train.lr": 1e-6, "rollout.samples": a.samples,
                        "rollout.max_new_tokens": a.response, "train.tokens_per_microbatch": a.tokens})
    model = parallel.load_sharded(folder, device, dtype)
    run = SimpleNamespace(model=model, cfg=cfg, device=device,
                          optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))
    rng, n = np.random.default_rng(0), 0

    def step():
        nonlocal n
        n += 1
        with decoder.gathered(model):
            answers = rollout.generate(model, prompts, samples=a.samples, max_new_tokens=a.response, temperature=1.0, ends={-1}, seed=n)
        groups = [train_grpo.Group(p, g, rng.random(a.samples).tolist()) for p, g in zip(prompts, answers)]
        batch = train_grpo.prepare(groups, cfg, 0, 1, device)
        figures = train_grpo.train_step(run, None, batch, True)
        assert figures["finite"] and math.isclose(figures["ratio"], 1.0) and figures["trained_tokens"] == a.groups * a.samples * a.response
    return step


def beside_trl(a, folder, device, dtype, prompts, ours):
    """Train with TRL's GRPOTrainer and make one of our steps after each of its own -> [(our seconds, its seconds)] without the first
    pair, its version; or None where TRL is absent."""
    try:
        import trl
    except ImportError:
        return None
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    tokenizer, rng, seconds = AutoTokenizer.from_pretrained(folder), np.random.default_rng(0), []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sync(device)
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            sync(device)
            peer = time.perf_counter() - self.began
            seconds.append((timed(ours, device), peer))

    micro = a.peer_batch or a.groups * a.samples
    assert a.groups * a.samples % micro == 0, "--peer-batch must divide groups x samples, or the peer would do other work"
    texts = [tokenizer.decode(p) for p in prompts]
    assert tokenizer(texts).input_ids == prompts, "the peer would train on other tokens"
    args = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro, gradient_accumulation_steps=a.groups * a.samples // micro,
        num_generations=a.samples, beta=0.0, report_to=[], max_completion_length=a.response, learning_rate=1e-6, max_steps=a.pairs + 1,
        save_strategy="no", logging_strategy="no", use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, disable_tqdm=True,
        shuffle_dataset=False, gradient_checkpointing=False, generation_kwargs={"min_new_tokens": a.response}, temperature=1.0,
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")})
    trl.GRPOTrainer(model=str(folder), args=args, processing_class=tokenizer, callbacks=[Clock()],
                    train_dataset=Dataset.from_dict({"prompt": texts * (a.pairs + 2)}),
                    reward_funcs=lambda completions, **_: rng.random(len(completions)).tolist()).train()
    return seconds[1:], trl.__version__


def main():
    a = arguments(__doc__, tokens=(7000, "our train.tokens_per_microbatch"),
                  peer_batch=(8, "answers in a micro-batch of the peer's (8 is its own default); 0: all of a step"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder, prompts = checkpoint(a), random_prompts(a)
    parallel.start()
    ours = our_step(a, folder, device, dtype, prompts)
    ours()
    found = beside_trl(a, folder, device, dtype, prompts, ours)
    if found:
        ours_s, peer_s = (statistics.median(s[i] for s in found[0]) for i in (0, 1))
        ratio = statistics.median(peer / our for our, peer in found[0])
    else:
        ours_s, peer_s, ratio = statistics.median(timed(ours, device) for _ in range(a.pairs)), None, None
    _, flops = limits(device, dtype)
    s, rows, unique = decoder.read_shape(folder), a.groups * a.samples, a.groups * (a.prompt + a.samples * (a.response - 1))
    needed = forward_flops(s, a.groups * a.prompt, a.groups) + (a.response - 1) * forward_flops(s, rows, rows)  # prefill, decode
    share = (needed + 3 * forward_flops(s, unique, rows * a.response)) / ours_s / flops
    print(f"ours {ours_s:.2f} s a step; TRL {f'{peer_s:.2f} s, ratio {ratio:.2f}' if found else 'is not installed'}; matrix products of "
          f"{unique} unique tokens: {share:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here")
    finish("grpo_step", a, device, ours_s, peer_s, ratio, flop_share=round(share, 4), tokens=a.tokens, peer_batch=a.peer_batch,
           peer=f"trl {found[1]}" if found else None)
    parallel.stop()


if __name__ == "__main__":
    main()
