"""Forward and backward of the answers' log-probs alone: a prompt shared by its answers against the prompt repeated for each.

    python bench/train_tokens.py --prompt 600 --response 48 --groups 2 --samples 5 [--sizes 1,2,5,10,20]

The peer is the same code given one tree per answer, as trainers without sharing compute it. `--sizes` adds a table over group sizes:
seconds and peak memory of both. The share of the limit: the matrix products that ours needs (forward once, backward twice; without
attention, and without what recomputing adds) against the rate of a large matrix product measured here. Ends in one JSON line.
"""
import torch
from common import arguments, checkpoint, finish, forward_flops, limits, pairs, peak_bytes, random_prompts

import pack
import parallel
import training


def main():
    a = arguments(__doc__, sizes=("", "group sizes of the table"), checkpointing=(0, "1: with activation checkpointing"),
                  compile=(0, "1: with torch.compile"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder, prompts = checkpoint(a), random_prompts(a)
    parallel.start()
    model = parallel.load_sharded(folder, device, dtype)
    training.set_layers(model, a.checkpointing, a.compile)

    def step(trees):
        packed = pack.pack(trees, device)

        def run():
            pack.logprobs(model, packed)[0].sum().backward()
            model.zero_grad(set_to_none=True)
        return run, len(packed.tokens)

    def both(samples):
        answers = torch.randint(66, 92, (a.groups, samples, a.response), generator=torch.Generator().manual_seed(2)).tolist()
        shared = [pack.Tree(p, g, list(range(samples))) for p, g in zip(prompts, answers)]
        (ours, unique), (peer, repeated) = step(shared), step([pack.Tree(t.prompt, [x], [0]) for t in shared for x in t.answers])
        ours_s, peer_s, ratio = pairs(ours, peer, a.pairs, device)
        mib = [round(peak_bytes(f, device) / 2 ** 20, 1) for f in (ours, peer)]
        return {"samples": samples, "tokens": unique, "repeated_tokens": repeated, "ours_s": round(ours_s, 4), "peer_s": round(peer_s, 4),
                "ratio": round(ratio, 3), "ours_mib": mib[0], "peer_mib": mib[1]}

    rows = [both(int(n)) for n in a.sizes.split(",")] if a.sizes else []
    if rows:
        print("| G | tokens | repeated | seconds | repeated | ratio | peak MiB | repeated |\n|---|---|---|---|---|---|---|---|")
        for r in rows:
            print("| " + " | ".join(map(str, r.values())) + " |")
    main_row = next((r for r in rows if r["samples"] == a.samples), None) or both(a.samples)
    _, flops = limits(device, dtype)
    share = 3 * forward_flops(model.shape, main_row["tokens"], a.groups * a.samples * a.response) / main_row["ours_s"] / flops
    print(f"{main_row['tokens']} unique tokens ({main_row['repeated_tokens']} with repeated prompts): {main_row['ours_s']:.3f} s against "
          f"{main_row['peer_s']:.3f} s, ratio {main_row['ratio']:.2f}; peak {main_row['ours_mib']:.0f} against {main_row['peer_mib']:.0f} MiB; "
          f"{share:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here")
    finish("train_tokens", a, device, main_row["ours_s"], main_row["peer_s"], main_row["ratio"], flop_share=round(share, 4),
           ours_mib=main_row["ours_mib"], peer_mib=main_row["peer_mib"], checkpointing=a.checkpointing, compile=a.compile, table=rows or None)
    parallel.stop()


if __name__ == "__main__":
    main()
