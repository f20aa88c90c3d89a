"""Forward and backward of the responses' log-probs alone: a prompt shared by its responses against one
repeated for each.

    python -m bench.train_tokens --prompt 600 --response 48 --groups 2 --samples 5 [--sizes 1,2,5,10,20]

The peer is the same code given one tree per response, as trainers without sharing compute it. `--sizes`
adds a table over group sizes: seconds and peak memory of both. The share of the limit: the matrix
products that ours needs (forward once, backward twice; without attention, and without what recomputing
adds) against the rate of a large matrix product measured here. Ends in one JSON line.
"""
import parallel
from bench.common import (
    arguments,
    checkpoint,
    finish,
    forward_flops,
    limits,
    pairs,
    peak_bytes,
    random_letters,
    random_prompts,
    setting,
)
from pack import Branch, Tree, logprobs, pack
from run import set_layers

COLUMNS = ("G", "tokens", "repeated", "seconds", "repeated", "ratio", "peak MiB", "repeated")


def step(model, trees, device):
    """-> (a function that computes the trees' gradients, packed tokens)."""
    batch = pack(trees, device)

    def run():
        logprobs(model, batch)[0].sum().backward()
        model.zero_grad(set_to_none=True)
    return run, len(batch.tokens)


def both(model, prompts, samples, a, device):
    """Ours and the peer at this group size -> a row of the table."""
    responses = random_letters(a.groups, samples, a.response, seed=2)
    shared = [Tree(prompt, [Branch(tokens, None) for tokens in group])
              for prompt, group in zip(prompts, responses)]
    repeated = [Tree(tree.prompt, [branch]) for tree in shared for branch in tree.branches]
    ours, tokens = step(model, shared, device)
    peer, repeated_tokens = step(model, repeated, device)
    ours_s, peer_s, ratio = pairs(ours, peer, a.pairs, device)
    ours_mib, peer_mib = (round(peak_bytes(f, device) / 2 ** 20, 1) for f in (ours, peer))
    return {"samples": samples, "tokens": tokens, "repeated_tokens": repeated_tokens,
            "ours_s": round(ours_s, 4), "peer_s": round(peer_s, 4), "ratio": round(ratio, 3),
            "ours_mib": ours_mib, "peer_mib": peer_mib}


def show_table(rows):
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


def main():
    a = arguments(__doc__, sizes=("", "group sizes of the table"),
                  checkpointing=(0, "1: with activation checkpointing"), compile=(0, "1: with torch.compile"))
    device, dtype = setting()
    folder, prompts = checkpoint(a), random_prompts(a)
    parallel.start()
    model = parallel.load_sharded(folder, device, dtype)
    set_layers(model, a.checkpointing, a.compile)
    rows = [both(model, prompts, int(n), a, device) for n in a.sizes.split(",") if n]
    if rows:
        show_table(rows)
    row = next((r for r in rows if r["samples"] == a.samples), None)
    row = row or both(model, prompts, a.samples, a, device)
    _, flops = limits(device, dtype)
    scored = a.groups * a.samples * a.response
    share = 3 * forward_flops(model.shape, row["tokens"], scored) / row["ours_s"] / flops
    print(f"{row['tokens']} unique tokens ({row['repeated_tokens']} with repeated prompts): "
          f"{row['ours_s']:.3f} s against {row['peer_s']:.3f} s, ratio {row['ratio']:.2f}; "
          f"peak {row['ours_mib']:.0f} against {row['peer_mib']:.0f} MiB; "
          f"{share:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here")
    finish("train_tokens", a, device, (row["ours_s"], row["peer_s"], row["ratio"]),
           flop_share=round(share, 4), ours_mib=row["ours_mib"], peer_mib=row["peer_mib"],
           checkpointing=a.checkpointing, compile=a.compile, table=rows or None)
    parallel.stop()


if __name__ == "__main__":
    main()
