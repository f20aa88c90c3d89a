"""Packing with shared prefixes: a prompt and its answers are one tree, computed once and exactly.

Answer tokens see the prompt and their own answer, positions go on from the prompt, and the gradients equal those of the
unshared computation, at P + G R tokens instead of G (P + R). A micro-batch is a set of trees up to a token budget; trees
are balanced over ranks by tokens, and every rank gets the same number of micro-batches (FSDP's collectives must pair up).
"""
from dataclasses import dataclass

import torch

import model as decoder
from model import wide


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
    select, targets, seq, lengths = [], [], [], []
    q_rows, k_rows, q_len, k_len = [], [], [], []
    start = 0
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
            if own:
                q_rows += own
                k_rows += [*range(start, end), *own]
                q_len.append(len(own))
                k_len.append(P + len(own))
        start = end

    def tensor(x):
        return torch.tensor(x, device=device)

    spans = [decoder.causal_spans([len(tree.prompt) for tree in trees], device)]
    if q_rows:
        spans.append(decoder.Spans(tensor(q_rows), tensor(k_rows), torch.tensor(q_len), torch.tensor(k_len)))
    return Packed(tensor(tokens), tensor(positions), spans, tensor(select), tensor(targets), tensor(seq),
                  [i for tree in trees for i in tree.index])


def logprobs(model, packed, temperature=1.0, entropy=False):
    """Log-prob [M] of every answer token at this temperature, and the distribution's entropy [M] (differentiable if asked)."""
    def attend(layer, q, k, v):
        return torch.cat([decoder.attention(q, k, v, s) for s in packed.spans])

    logits = model(packed.tokens, packed.positions, attend, packed.select)  # [M, V]
    logp = torch.log_softmax(wide(logits) / temperature, dim=-1)
    with torch.set_grad_enabled(entropy and torch.is_grad_enabled()):
        h = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, packed.targets[:, None])[:, 0], h


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
