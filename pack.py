"""Packing with shared prefixes: a prompt and its answers are one tree, computed once and exactly.

Answer tokens see the prompt and their own answer, positions go on from the prompt, and the gradients equal those of the
unshared computation, at P + G R tokens instead of G (P + R). A micro-batch is a set of trees up to a token budget; trees
are balanced over ranks by tokens, and every rank gets the same number of micro-batches (FSDP's collectives must pair up).
"""
from dataclasses import dataclass

import torch

import model as decoder
from model import wide

LOGITS = 2 ** 26  # logits in memory at once while log-probs are computed: 256 MiB in float32, a few times over


@dataclass
class Tree:
    """One prompt and answers to it, token ids; `index` names each answer for the caller (its place in the step)."""
    prompt: list
    answers: list
    index: list

    def size(self):
        """Tokens of its forward pass; an answer's last token is only ever predicted, so it needs none."""
        return len(self.prompt) + sum(len(a) - 1 for a in self.answers)


@dataclass
class Packed:
    """A micro-batch. N packed tokens (all prompts, then all answers), M answer tokens to score, S answers."""
    tokens: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    spans: list  # attention problems: prompts over themselves; answers over [prompt; own answer]
    last: decoder.Spans  # the last layer's, whose queries are those of `select` alone
    select: torch.Tensor  # [M] packed row that predicts each answer token
    targets: torch.Tensor  # [M] the answer tokens
    seq: torch.Tensor  # [M] answer number 0 .. S - 1
    index: list  # [S] the trees' names of the answers; empty in a dummy


DUMMY = Tree([0], [[0]], [])


def pack(trees, device="cpu"):
    """Trees -> Packed. No trees: a dummy, to be given zero weight."""
    trees = trees or [DUMMY]
    tokens = [t for tree in trees for t in tree.prompt]
    positions = [i for tree in trees for i in range(len(tree.prompt))]
    select, targets, seq, lengths, prompts, k_rows = [], [], [], [], [], []
    start, first = 0, len(tokens)
    for tree in trees:
        P, end = len(tree.prompt), start + len(tree.prompt)
        for answer in tree.answers:
            own = range(len(tokens), len(tokens) + len(answer) - 1)
            tokens += answer[:-1]
            positions += range(P, P + len(own))
            select += [end - 1, *own]
            targets += answer
            seq += [len(lengths)] * len(answer)
            lengths.append(len(answer))
            prompts.append(P)
            k_rows += [*range(start, end), *own]
        start = end

    def tensor(x):
        return torch.tensor(x, device=device)

    # Answer by answer the keys are [prompt; own answer]. The last token needs no row of its own: of R tokens R - 1 are queries
    # in all layers; in the last one the prompt's last row asks too, for the first token.
    lengths, prompts, k_rows = torch.tensor(lengths), torch.tensor(prompts), tensor(k_rows)
    keys, spans = prompts + lengths - 1, [decoder.causal_spans([len(tree.prompt) for tree in trees], device)]
    if len(tokens) > first:
        longer = lengths > 1
        spans.append(decoder.Spans(torch.arange(first, len(tokens), device=device),
                                   k_rows if longer.all() else k_rows[longer.repeat_interleave(keys).to(device)],
                                   lengths[longer] - 1, keys[longer]))
    last = decoder.Spans(torch.arange(len(targets), device=device), k_rows, lengths, keys)
    return Packed(tensor(tokens), tensor(positions), spans, last, tensor(select), tensor(targets), tensor(seq),
                  [i for tree in trees for i in tree.index])


class TokenLogprobs(torch.autograd.Function):
    """Log-probs and entropies of tokens from hidden states, the [M, V] logits never there whole: they are computed for a chunk
    of tokens at a time, and once more in the backward pass.

    x [M, H], weight [V, H], targets [M] -> logp [M] of the targets under softmax(x W^T / temperature), entropy [M].
    With z the scaled logits and p = softmax(z): d logp / dz = 1[target] - p, d entropy / dz = -p (log p + entropy).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, entropy_grad):
        lse, logp, entropy = (wide(x[:0]).new_empty(len(x)) for _ in range(3))
        for c in chunks(x, weight):
            z = wide(x[c] @ weight.T).div_(temperature)
            lse[c] = z.logsumexp(-1)
            logp[c] = z.gather(-1, targets[c, None])[:, 0] - lse[c]
            p = (z - lse[c, None]).exp_()
            entropy[c] = lse[c] - p.mul_(z).sum(-1)
            del z, p  # before the next chunk's are made
        ctx.save_for_backward(x, weight, targets, lse, entropy if entropy_grad else None)
        ctx.temperature = temperature
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        x, weight, targets, lse, entropy = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=lse.dtype)
        for c in chunks(x, weight):
            logp = wide(x[c] @ weight.T).div_(ctx.temperature).sub_(lse[c, None])
            dz = logp.exp()
            if entropy is None:
                dz.mul_(-d_logp[c, None])
            else:
                dz.mul_(logp.add_(entropy[c, None]).mul_(-d_entropy[c, None]).sub_(d_logp[c, None]))
            dz.scatter_add_(-1, targets[c, None], d_logp[c, None])
            dz = dz.div_(ctx.temperature).to(x.dtype)
            dx[c] = dz @ weight
            dw += dz.T @ x[c]
            del logp, dz
        return dx, dw.to(weight.dtype), None, None, None


def chunks(x, weight):
    """Slices of x [M, H] whose logits over weight [V, H] are LOGITS numbers at most."""
    size = max(1, LOGITS // len(weight))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def logprobs(model, packed, temperature=1.0, entropy=False):
    """Log-prob [M] of every answer token at this temperature, and the distribution's entropy [M] (differentiable if asked)."""
    def attend(layer, q, k, v):
        if layer == model.shape.layers - 1:
            return decoder.attention(q, k, v, packed.last)
        return torch.cat([decoder.attention(q, k, v, s) for s in packed.spans])

    return model(packed.tokens, packed.positions, attend, packed.select,
                 lambda x, weight: TokenLogprobs.apply(x, weight, packed.targets, temperature, entropy))


def split_tree(tree, budget):
    """A tree over the token budget -> several over the same prompt, its answers shared out. Exact: answers never meet."""
    parts = [Tree(tree.prompt, [], [])]
    for answer, i in zip(tree.answers, tree.index):
        if parts[-1].answers and parts[-1].size() + len(answer) - 1 > budget:
            parts.append(Tree(tree.prompt, [], []))
        parts[-1].answers.append(answer)
        parts[-1].index.append(i)
    return parts


def balance(trees, world, budget):
    """Share trees over ranks by tokens and bin them to the budget. -> [world][n] lists of trees, n the same on all ranks.

    Ranks with less to do get empty micro-batches; there is always at least one, so that every rank makes a backward pass.
    A tree over the budget gets a micro-batch to itself: split it before (split_tree) where its answers may be parted.
    """
    ranks, load = [[] for _ in range(world)], [0] * world
    for tree in sorted(trees, key=Tree.size, reverse=True):  # the largest first, to the rank with the least so far
        r = load.index(min(load))
        load[r] += tree.size()
        for bin in ranks[r]:
            if sum(t.size() for t in bin) + tree.size() <= budget:
                bin.append(tree)
                break
        else:
            ranks[r].append([tree])
    n = max(1, *(len(bins) for bins in ranks))
    return [bins + [[]] * (n - len(bins)) for bins in ranks]
