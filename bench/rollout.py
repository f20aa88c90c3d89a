"""The group sampler against transformers' generate: the same weights, prompts, number of new tokens and
precision.

    python -m bench.rollout --prompt 600 --response 48 --groups 16 --samples 5

On CUDA also against vLLM, if it is installed. Its prefix cache is emptied before each run, so that it
computes the prompts as well. Prefill and decode are shown apart for ours; greedy tokens of both are
compared first. Decode reads the weights and the caches once a token: the share of the copy bandwidth
measured here says how near that is to the limit. Ends in one JSON line.
"""
import importlib.util
from functools import partial

import torch

import model as decoder
from bench.common import arguments, checkpoint, finish, limits, pairs, random_prompts, setting, timed
from rollout import Sampling, generate


def transformers_peer(folder, prompts, a):
    from transformers import AutoModelForCausalLM
    device, dtype = setting()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    ids = torch.tensor(prompts, device=device)

    def run(samples=a.samples, **how):
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=samples,
                                  max_new_tokens=a.response, min_new_tokens=a.response, pad_token_id=0,
                                  eos_token_id=None, **how)
    return run


def vllm_peer(folder, prompts, a):
    from vllm import LLM, SamplingParams
    engine = LLM(model=str(folder), dtype="bfloat16", gpu_memory_utilization=0.4, enable_prefix_caching=True)
    how = SamplingParams(n=a.samples, max_tokens=a.response, ignore_eos=True, temperature=1.0, logprobs=0,
                         detokenize=False)

    def run():
        engine.reset_prefix_cache()
        engine.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
    return run


def beside_vllm(ours, folder, prompts, a, device):
    """-> figures for the JSON line, where vLLM is installed."""
    if device.type != "cuda" or not importlib.util.find_spec("vllm"):
        return {}
    torch.cuda.empty_cache()
    _, seconds, ratio = pairs(ours, vllm_peer(folder, prompts, a), a.pairs, device)
    print(f"vLLM {seconds:.2f} s: ratio {ratio:.2f}")
    return {"vllm_s": round(seconds, 4), "vllm_ratio": round(ratio, 3)}


def bytes_read(model, a, dtype):
    """What decoding reads for a token of each row: weights, and caches that are half full of responses."""
    s, size = model.shape, torch.finfo(dtype).bits // 8
    cached = a.groups * a.prompt + a.groups * a.samples * a.response / 2
    weights = sum(p.numel() for p in model.parameters())
    if not s.tied:
        weights -= s.vocab * s.hidden  # an embedding of its own is hardly read
    return weights * size + 2 * s.layers * s.kv_heads * s.head_dim * size * cached


def main():
    a = arguments(__doc__)
    device, dtype = setting()
    folder, prompts = checkpoint(a), random_prompts(a)
    model = decoder.load(folder, device, dtype)

    def ours(temperature=1.0, samples=a.samples, response=a.response):
        return generate(model, prompts, {-1}, Sampling(samples, response, temperature))  # -1: nothing ends

    peer = transformers_peer(folder, prompts, a)
    greedy = [x[0].tokens for x in ours(0, 1)]
    same = greedy == peer(1, do_sample=False)[:, a.prompt:].tolist()
    print(f"greedy tokens of both are {'equal' if same else 'NOT equal'}")
    times = pairs(ours, partial(peer, do_sample=True, top_k=0), a.pairs, device)
    ours_s, peer_s, ratio = times
    prefill = min(timed(lambda: ours(response=1), device) for _ in range(3))
    bandwidth, _ = limits(device, dtype)
    share = bytes_read(model, a, dtype) * (a.response - 1) / (ours_s - prefill) / bandwidth
    del peer
    vllm = beside_vllm(ours, folder, prompts, a, device)
    n = a.groups * a.samples * a.response
    print(f"{n} tokens: ours {ours_s:.2f} s ({n / ours_s:.0f} tokens/s; prefill {prefill:.2f} s), "
          f"transformers {peer_s:.2f} s: ratio {ratio:.2f}; decode at {share:.0%} of the copy bandwidth "
          f"({bandwidth / 1e9:.0f} GB/s)")
    finish("rollout", a, device, times, greedy_equal=same, prefill_s=round(prefill, 4),
           decode_share=round(share, 4), **vllm)


if __name__ == "__main__":
    main()
