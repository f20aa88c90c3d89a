"""Packing with shared prefixes: a prompt and its responses are one tree, computed once and exactly.

A response's tokens see the prompt and their own response, and their positions follow the prompt's. The
gradients equal those of the unshared computation, at P + G R tokens instead of G (P + R). A micro-batch is a
set of trees up to a token budget. Trees are balanced over ranks by tokens, and every rank gets the same
number of micro-batches (FSDP's collectives must pair up).

Letters: P prompt tokens, G responses of R tokens, N packed tokens, M response tokens, S responses, H hidden
size, V vocabulary.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

import model as decoder
from model import logits_of, wide

LOGITS = 2 ** 26  # logits in memory at once for log-probs: 256 MiB in float32, a few times over


@dataclass
class Branch:
    """One response to a tree's prompt. The name is the caller's (say, the number of its group)."""
    tokens: list
    name: object
    logprobs: list | None = None  # the sampler's, one per token
    advantage: float = 0.0


@dataclass
class Tree:
    """One prompt (token ids) and responses to it."""
    prompt: list
    branches: list  # of Branch

    def size(self):
        """Tokens of its forward pass. A response's last token is only predicted, so it needs no pass."""
        return len(self.prompt) + sum(len(b.tokens) - 1 for b in self.branches)


@dataclass
class MicroBatch:
    """Packed trees: first all prompts, then all responses; and what belongs to each response token."""
    tokens: Tensor  # [N]
    positions: Tensor  # [N]
    spans: list  # attention problems: prompts over themselves; responses over [prompt; own response]
    last: decoder.Spans  # the last layer's, whose queries are those of `select` alone
    select: Tensor  # [M] the packed row that predicts each response token
    targets: Tensor  # [M] the response tokens
    seq: Tensor  # [M] response number 0 .. S - 1
    names: list  # [S] the branches' names; empty in a dummy
    sampled: Tensor  # [M] log-probs that the sampler recorded (0 where a branch has none)
    adv: Tensor  # [M] the advantage of the token's response
    old: Tensor  # [M] log-probs that the ratio is taken against; first the sampler's


DUMMY = Tree([0], [Branch([0], None)])


def pack(trees, device="cpu", dtype=torch.float32):
    """Trees -> MicroBatch, with sampled, adv and old in dtype. No trees: a dummy, to be given zero weight."""
    names = [branch.name for tree in trees for branch in tree.branches]
    trees = trees or [DUMMY]
    tokens, positions = [], []
    for tree in trees:
        tokens += tree.prompt
        positions += range(len(tree.prompt))
    first = len(tokens)
    select, k_rows, targets, seq, sampled, adv = [], [], [], [], [], []
    lengths, keys = [], []  # of each response: its tokens; the keys of its last one
    start = 0
    for tree in trees:
        P = len(tree.prompt)
        for branch in tree.branches:
            R = len(branch.tokens)
            own = range(len(tokens), len(tokens) + R - 1)
            tokens += branch.tokens[:-1]
            positions += range(P, P + R - 1)
            select += [start + P - 1, *own]
            k_rows += [*range(start, start + P), *own]
            targets += branch.tokens
            seq += [len(lengths)] * R
            sampled += branch.logprobs or [0.0] * R
            adv += [branch.advantage] * R
            lengths.append(R)
            keys.append(P + R - 1)
        start += P

    def tensor(x, dtype=None):
        return torch.tensor(x, dtype=dtype, device=device)

    # A response's keys are [prompt; own response]. Its last token needs no row of its own: of R tokens R - 1
    # are queries in all layers. In the last layer the prompt's last row asks too, for the first token.
    lengths = torch.tensor(lengths)
    keys = torch.tensor(keys)
    k_rows = tensor(k_rows)
    last = decoder.Spans(torch.arange(len(targets), device=device), k_rows, lengths, keys)
    spans = [decoder.causal_spans([len(tree.prompt) for tree in trees], device)]
    longer = lengths > 1
    if longer.any():
        q_rows = torch.arange(first, len(tokens), device=device)
        if not longer.all():
            k_rows = k_rows[longer.repeat_interleave(keys).to(device)]
        spans.append(decoder.Spans(q_rows, k_rows, lengths[longer] - 1, keys[longer]))
    sampled = tensor(sampled, dtype)
    return MicroBatch(tensor(tokens), tensor(positions), spans, last, tensor(select), tensor(targets),
                      tensor(seq), names, sampled, adv=tensor(adv, dtype), old=sampled)


class TokenLogprobs(torch.autograd.Function):
    """Log-probs and entropies of tokens from hidden states. The [M, V] logits are never in memory whole: they
    are computed for a chunk of tokens at a time, and once more in the backward pass.

    x [M, H], weight [V, H], targets [M] -> logp [M] of the targets under softmax(x W^T / temperature),
    entropy [M]. With z the scaled logits and p = softmax(z):
    d logp / dz = 1[target] - p, d entropy / dz = -p (log p + entropy).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, entropy_grad):
        lse, logp, entropy = (wide(x[:0]).new_empty(len(x)) for _ in range(3))
        for c in chunks(x, weight):
            z = logits_of(x[c], weight).div_(temperature)
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
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=lse.dtype)
        for c in chunks(x, weight):
            logp = logits_of(x[c], weight).div_(ctx.temperature).sub_(lse[c, None])
            dz = logp.exp()
            if entropy is None:
                dz.mul_(-d_logp[c, None])
            else:
                logp.add_(entropy[c, None]).mul_(-d_entropy[c, None])
                dz.mul_(logp.sub_(d_logp[c, None]))
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


def logprobs(model, batch, temperature=1.0, entropy=False):
    """Log-prob [M] of every response token at this temperature, and the distribution's entropy [M].

    entropy: whether the entropy is differentiable.
    """
    def attend(layer, q, k, v):
        if layer == model.shape.layers - 1:
            return decoder.attention(q, k, v, batch.last)
        return torch.cat([decoder.attention(q, k, v, spans) for spans in batch.spans])

    def head(x, weight):
        return TokenLogprobs.apply(x, weight, batch.targets, temperature, entropy)

    return model(batch.tokens, batch.positions, attend, batch.select, head)


def split_tree(tree, budget):
    """A tree over the token budget -> several over the same prompt that share out its responses.

    Exact: responses never see each other.
    """
    parts = [Tree(tree.prompt, [])]
    for branch in tree.branches:
        if parts[-1].branches and parts[-1].size() + len(branch.tokens) - 1 > budget:
            parts.append(Tree(tree.prompt, []))
        parts[-1].branches.append(branch)
    return parts


def balance(trees, world, budget):
    """Share trees out over ranks by tokens and bin them to the budget.

    -> [world][n] lists of trees, n the same on all ranks. Ranks with less to do get empty micro-batches.
    There is always at least one, so that every rank makes a backward pass. A tree over the budget gets a
    micro-batch to itself: split it before (split_tree) where its responses may be parted.
    """
    ranks = [[] for _ in range(world)]
    load = [0] * world
    for tree in sorted(trees, key=Tree.size, reverse=True):  # the largest first, to the rank with the least
        r = load.index(min(load))
        load[r] += tree.size()
        for bin in ranks[r]:
            if sum(t.size() for t in bin) + tree.size() <= budget:
                bin.append(tree)
                break
        else:
            ranks[r].append([tree])
    return [bins + [[]] * (max(1, *map(len, ranks)) - len(bins)) for bins in ranks]
