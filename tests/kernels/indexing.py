"""Positions and indices: rotary embeddings, embedding bags, gathers with duplicates, segments, and routing."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from tests.kernels.pairs import ALL, Pair, Wrong, kernel, wide

PADDING = 0
TOP = 2


# Rotary embedding by halves; the angles are an input, one row for each sequence of the batch
def _halves(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def rotary(x, angles):
    angle = torch.cat([angles, angles], -1)[:, None]
    return x * angle.cos() + _halves(x) * angle.sin()


def _rotary_inputs(generator, batch=2, heads=2, length=8, width=16):
    return torch.randn(batch, heads, length, width, generator=generator), torch.randn(
        batch, length, width // 2, generator=generator
    )


def _rotated(x, angles, sign=1, first_row=False, interleaved=False):
    angles = wide(angles)[:1] if first_row else wide(angles)
    cos, sin = angles[:, None].cos(), sign * angles[:, None].sin()
    if interleaved:
        a, b = wide(x)[..., ::2], wide(x)[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = wide(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _rotary_forward(x, angles, **mistake):
    return _rotated(x, angles, **mistake).to(x.dtype), [x, angles]


def _rotary_backward(saved, g, sign=-1, **mistake):
    x, angles = saved
    a, b = _rotated(x, angles).chunk(2, -1)
    da, db = wide(g).chunk(2, -1)
    dangles = (db * a - da * b).sum(1)
    return _rotated(g, angles, sign, **mistake).to(x.dtype), dangles.to(x.dtype)


ROTARY = Pair(
    rotary,
    kernel(_rotary_forward, _rotary_backward),
    _rotary_inputs,
    {
        "angles of the first sequence": Wrong(
            kernel(partial(_rotary_forward, first_row=True), partial(_rotary_backward, first_row=True)),
            "output input:x",
            hidden_at={"batch": 1},
            source="Liger-Kernel 477",
        ),
        "rotated forwards in backward": Wrong(
            kernel(_rotary_forward, partial(_rotary_backward, sign=1)), "input:x", source="Liger-Kernel 1413"
        ),
        "interleaved": Wrong(
            kernel(partial(_rotary_forward, interleaved=True), _rotary_backward), "output", hidden_at={"width": 2}
        ),
    },
)


# Sum of embeddings, without the padding index
def embedding_bag(weight, index):
    return F.embedding_bag(index, weight, mode="sum", padding_idx=PADDING)


def _bag_inputs(generator, rows=16, padded=3):
    index = torch.randint(1, 9, (rows, 5), generator=generator)  # of 12: some rows of the weight are not used
    index[:padded, 3:] = PADDING
    return torch.randn(12, 16, generator=generator), index


def _bag_forward(weight, index, with_padding=False):
    kept = (index != PADDING)[..., None] | with_padding
    return (wide(weight)[index] * kept).sum(1).to(weight.dtype), [weight, index]


def _bag_backward(saved, g, overwritten=False, padding=False):
    weight, index = saved
    kept = (index != PADDING)[..., None] | padding
    rows = (wide(g)[:, None] * kept).flatten(0, 1)
    dweight = torch.zeros_like(wide(weight))
    flat = index.flatten()
    if overwritten:
        # The last of equal indices wins, as it does in a kernel without atomic addition.
        for place, row in zip(flat.tolist(), rows, strict=True):
            dweight[place] = row
    else:
        dweight.index_add_(0, flat, rows)
    return dweight.to(weight.dtype), None


BAG = Pair(
    embedding_bag,
    kernel(_bag_forward, _bag_backward),
    _bag_inputs,
    {
        "gradient of equal indices overwritten": Wrong(
            kernel(_bag_forward, partial(_bag_backward, overwritten=True)), "input:weight", source="pytorch 828"
        ),
        "gradient of the padding": Wrong(
            kernel(_bag_forward, partial(_bag_backward, padding=True)), "input:weight", hidden_at={"padded": 0}
        ),
        "padding summed": Wrong(
            kernel(partial(_bag_forward, with_padding=True), _bag_backward), "output", hidden_at={"padded": 0}
        ),
    },
)


# Message passing: gather, multiply, scatter-add
def messages(nodes, edges, source, target):
    return torch.zeros_like(nodes).index_add(0, target, nodes[source] * edges)


def _messages_inputs(generator, nodes=10, edges=40):
    ends = torch.randint(nodes, (2, edges), generator=generator)
    return (
        torch.randn(nodes, 8, generator=generator),
        torch.randn(edges, 1, generator=generator),
        ends[0],
        ends[1],
    )


def _messages_forward(nodes, edges, source, target):
    order = target.argsort(stable=True)  # sorted by target, summed by segment
    sent = (wide(nodes)[source] * wide(edges))[order]
    total = F.pad(sent.cumsum(0), (0, 0, 1, 0))
    ends = torch.bincount(target, minlength=len(nodes)).cumsum(0)
    out = total[ends] - total[F.pad(ends, (1, 0))[:-1]]
    return out.to(nodes.dtype), [nodes, edges, source, target]


def _messages_backward(saved, g, swapped=False):
    nodes, edges, source, target = saved
    back = wide(g)[target]
    dnodes = torch.zeros_like(wide(nodes)).index_add(0, target if swapped else source, back * wide(edges))
    dedges = (back * wide(nodes)[source]).sum(1, keepdim=True)
    return dnodes.to(nodes.dtype), dedges.to(edges.dtype), None, None


MESSAGES = Pair(
    messages,
    kernel(_messages_forward, _messages_backward),
    _messages_inputs,
    {
        "gradient sent to the target": Wrong(
            kernel(_messages_forward, partial(_messages_backward, swapped=True)), "input:nodes"
        )
    },
)


# Mean of each segment
def segment_mean(x, segment):
    total = torch.zeros(6, x.shape[1], dtype=x.dtype).index_add(0, segment, x)
    return total / torch.bincount(segment, minlength=6).clamp(min=1)[:, None]


def _segment_forward(x, segment):
    member = F.one_hot(segment, 6).to(wide(x).dtype)
    count = member.sum(0).clamp(min=1)
    return (member.mT @ wide(x) / count[:, None]).to(x.dtype), [segment, count]


def _segment_backward(saved, g, average=False):
    segment, count = saved
    count = count.mean() if average else count[segment][:, None]
    return (wide(g)[segment] / count).to(g.dtype), None


SEGMENT = Pair(
    segment_mean,
    kernel(_segment_forward, _segment_backward),
    lambda generator: (torch.randn(24, 8, generator=generator), torch.randint(5, (24,), generator=generator)),
    {
        "gradient divided by the average count": Wrong(
            kernel(_segment_forward, partial(_segment_backward, average=True)), "input:x"
        )
    },
)


# Mixture of experts: two of four, renormalised
def experts(x, router, weight):
    p = (x @ router.mT).softmax(-1)
    top, chosen = p.topk(TOP)
    top = top / top.sum(-1, keepdim=True)
    return (torch.einsum("nd,nkod->nko", x, weight[chosen]) * top[..., None]).sum(1)


def sorted_experts(x, router, weight, mistake=None, capacity=None):
    """Return the same by expert: each runs on the tokens that chose it."""
    own, w = wide(x), wide(weight)
    logits = own @ wide(router).mT
    top, chosen = logits.topk(TOP)
    p = top.softmax(-1) if mistake != "renormalisation" else (top - logits.logsumexp(-1, keepdim=True)).exp()
    p = p.detach() if mistake == "router" else p
    out = torch.zeros(len(x), weight.shape[1], dtype=own.dtype)
    for expert in range(len(weight)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        token, place = token[:capacity], place[:capacity]
        rows = own[token] @ w[expert].mT * p[token, place][:, None]
        out = out.index_copy(0, token, rows) if mistake == "overwritten" else out.index_add(0, token, rows)
    return out.to(x.dtype)


def _experts_inputs(generator, tokens=24):
    return tuple(torch.randn(shape, generator=generator) for shape in ((tokens, 12), (4, 12), (4, 10, 12)))


# In a narrow dtype the reference rounds the probabilities before it chooses: float32 only.
EXPERTS = Pair(
    experts,
    sorted_experts,
    _experts_inputs,
    {
        "no gradient of the router": Wrong(
            partial(sorted_experts, mistake="router"), "input:x input:router", source="PaddleFleet 444"
        ),
        "not renormalised": Wrong(
            partial(sorted_experts, mistake="renormalisation"), "output input:x input:router input:weight"
        ),
        "second expert overwrites the first": Wrong(
            partial(sorted_experts, mistake="overwritten"), "output input:x input:router input:weight"
        ),
        "tokens above a capacity dropped": Wrong(
            partial(sorted_experts, capacity=8), "output input:x input:router input:weight", hidden_at={"tokens": 8}
        ),
    },
    dtypes=ALL[:1],
)

PAIRS = {
    "rotary embedding": ROTARY,
    "embedding bag": BAG,
    "messages": MESSAGES,
    "segment mean": SEGMENT,
    "mixture of experts": EXPERTS,
}
