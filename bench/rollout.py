"""The group sampler against transformers' generate: the same weights, prompts and number of new tokens, precision of the device.

    python bench/rollout.py --prompt 600 --response 48 --groups 16 --samples 5

On CUDA also against vLLM, if it is installed (its prefix cache emptied before each run, so that it computes the prompts as well).
Prefill and decode are shown apart for ours; greedy tokens of both are compared first. Decode reads the weights and the caches once a
token: the share of the copy bandwidth measured here says how near that is to the limit. Ends in one JSON line.
"""
import importlib.util

import torch
from common import arguments, checkpoint, finish, limits, pairs, random_prompts, timed

import model as decoder
import rollout


def vllm_peer(folder, prompts, a):
    from vllm import LLM, SamplingParams
    engine = LLM(model=str(folder), dtype="bfloat16", gpu_memory_utilization=0.4, enable_prefix_caching=True)
    how = SamplingParams(n=a.samples, max_tokens=a.response, ignore_eos=True, temperature=1.0, logprobs=0, detokenize=False)

    def run():
        engine.reset_prefix_cache()
        engine.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
    return run


def main():
    a = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder, prompts = checkpoint(a), random_prompts(a)
    from transformers import AutoModelForCausalLM
    model, hf = decoder.load(folder, device, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    ids, never = torch.tensor(prompts, device=device), {-1}

    def ours(temperature=1.0, samples=a.samples, response=a.response):
        return rollout.generate(model, prompts, samples=samples, max_new_tokens=response, temperature=temperature, ends=never, seed=0)

    def peer(samples=a.samples, **how):
        with torch.no_grad():
            return hf.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=samples, max_new_tokens=a.response,
                               min_new_tokens=a.response, pad_token_id=0, eos_token_id=None, **how)

    same = [x[0].tokens for x in ours(0, 1)] == peer(1, do_sample=False)[:, a.prompt:].tolist()
    print(f"greedy tokens of both are {'equal' if same else 'NOT equal'}")
    ours_s, peer_s, ratio = pairs(ours, lambda: peer(do_sample=True, top_k=0), a.pairs, device)
    prefill = min(timed(lambda: ours(response=1), device) for _ in range(3))
    bandwidth, _ = limits(device, dtype)
    s, size = model.shape, torch.finfo(dtype).bits // 8
    cache = 2 * s.layers * s.kv_heads * s.head_dim * size * (a.groups * a.prompt + a.groups * a.samples * a.response / 2)
    weights = sum(p.numel() for p in model.parameters()) - (not s.tied) * s.vocab * s.hidden  # an embedding of its own is hardly read
    read = weights * size + cache
    share = read * (a.response - 1) / (ours_s - prefill) / bandwidth
    vllm = {}
    if device.type == "cuda" and importlib.util.find_spec("vllm"):
        del hf
        torch.cuda.empty_cache()
        _, vllm_s, vllm_ratio = pairs(ours, vllm_peer(folder, prompts, a), a.pairs, device)
        vllm = {"vllm_s": round(vllm_s, 4), "vllm_ratio": round(vllm_ratio, 3)}
        print(f"vLLM {vllm_s:.2f} s: ratio {vllm_ratio:.2f}")
    n = a.groups * a.samples * a.response
    print(f"{n} tokens: ours {ours_s:.2f} s ({n / ours_s:.0f} tokens/s; prefill {prefill:.2f} s), transformers {peer_s:.2f} s: ratio "
          f"{ratio:.2f}; decode at {share:.0%} of the copy bandwidth ({bandwidth / 1e9:.0f} GB/s)")
    finish("rollout", a, device, ours_s, peer_s, ratio, greedy_equal=same, prefill_s=round(prefill, 4), decode_share=round(share, 4), **vllm)


if __name__ == "__main__":
    main()
