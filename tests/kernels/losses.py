"""Losses: cross entropy in chunks and its options, divergences, preference and contrastive losses."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from tests.kernels.pairs import ALL, Pair, Wrong, kernel, normal, wide

IGNORED = -100
CHUNK = 8
SMOOTHING, Z_WEIGHT, CAP = 0.1, 0.02, 3.0


def logits_and_target(generator, rows=20, classes=32, ignored=5):
    target = torch.randint(classes, (rows,), generator=generator)
    target[:ignored] = IGNORED
    return 2 * torch.randn(rows, classes, generator=generator), target


# Cross entropy, by rows in chunks, with the gradient computed in forward
def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, ignore_index=IGNORED)


def _chunked_forward(logits, target, mistake=None):
    known = target != IGNORED
    loss, gradient = 0, torch.empty_like(wide(logits))
    chunks = range(0, len(target), CHUNK)
    for start in chunks:
        part = slice(start, start + CHUNK)
        own, seen = wide(logits[part]), known[part]
        count = {"mean of means": max(int(seen.sum()), 1) * len(chunks), "all rows": len(target)}
        weight = 1 / count.get(mistake, max(int(known.sum()), 1))
        chosen = target[part].clamp(min=0)[:, None]
        lse = own.logsumexp(-1, keepdim=True)
        loss = loss + ((lse - own.gather(1, chosen))[:, 0] * seen).sum() * weight
        p = (own - lse).exp()
        p.scatter_add_(1, chosen, -torch.ones_like(lse))
        gradient[part] = p * weight * (seen[:, None] if mistake != "ignored rows" else 1)
    return loss.to(logits.dtype), [gradient.to(logits.dtype)]


def _chunked_backward(saved, g, without_cotangent=False):
    (gradient,) = saved
    return (gradient if without_cotangent else gradient * g), None


def _chunked(mistake):
    return kernel(partial(_chunked_forward, mistake=mistake), _chunked_backward)


CROSS_ENTROPY = Pair(
    cross_entropy,
    kernel(_chunked_forward, _chunked_backward),
    logits_and_target,
    {
        "mean of the means of chunks": Wrong(
            _chunked("mean of means"), "output input:logits", hidden_at={"rows": 16, "ignored": 0}
        ),
        "ignored rows counted": Wrong(_chunked("all rows"), "output input:logits", hidden_at={"ignored": 0}),
        "gradient of ignored rows": Wrong(_chunked("ignored rows"), "input:logits", hidden_at={"ignored": 0}),
        "cotangent not used": Wrong(
            kernel(_chunked_forward, partial(_chunked_backward, without_cotangent=True)),
            "input:logits",
            source="Liger-Kernel 968",
        ),
    },
)


# Label smoothing, z-loss and soft cap; one loss for each row
def smoothed(logits, target):
    return F.cross_entropy(logits, target, label_smoothing=SMOOTHING, reduction="none")


def _smoothed_forward(logits, target):
    own = wide(logits)
    lse = own.logsumexp(-1)
    chosen = own.gather(1, target[:, None])[:, 0]
    loss = lse - (1 - SMOOTHING) * chosen - SMOOTHING * own.mean(-1)
    return loss.to(logits.dtype), [logits, target, lse]


def _smoothed_backward(saved, g, only_target=False):
    logits, target, lse = saved
    p = (wide(logits) - lse[:, None]).exp()
    hard = F.one_hot(target, logits.shape[1]).to(p.dtype) * (1 - SMOOTHING)
    gradient = p - hard - (0 if only_target else SMOOTHING / logits.shape[1])
    return (gradient * wide(g)[:, None]).to(logits.dtype), None


SMOOTHED = Pair(
    smoothed,
    kernel(_smoothed_forward, _smoothed_backward),
    partial(logits_and_target, ignored=0),
    {
        # 0.1 / 32 in each element: little beside the gradient.
        "no smoothing in the gradient": Wrong(
            kernel(_smoothed_forward, partial(_smoothed_backward, only_target=True)), "input:logits"
        )
    },
)


def with_z_loss(logits, target):
    lse = logits.logsumexp(-1)
    return F.cross_entropy(logits, target, reduction="none") + Z_WEIGHT * lse.square()


def _z_forward(logits, target):
    own = wide(logits)
    lse = own.logsumexp(-1)
    loss = lse - own.gather(1, target[:, None])[:, 0] + Z_WEIGHT * lse.square()
    return loss.to(logits.dtype), [logits, target, lse]


def _z_backward(saved, g, without_z=False):
    logits, target, lse = saved
    p = (wide(logits) - lse[:, None]).exp()
    p = p if without_z else p * (1 + 2 * Z_WEIGHT * lse[:, None])
    return ((p - F.one_hot(target, logits.shape[1])) * wide(g)[:, None]).to(logits.dtype), None


Z_LOSS = Pair(
    with_z_loss,
    kernel(_z_forward, _z_backward),
    partial(logits_and_target, ignored=0),
    {"no z term in the gradient": Wrong(kernel(_z_forward, partial(_z_backward, without_z=True)), "input:logits")},
)


def soft_capped(logits, target):
    return F.cross_entropy(CAP * torch.tanh(logits / CAP), target, reduction="none")


def _capped_forward(logits, target):
    capped = CAP * torch.tanh(wide(logits) / CAP)
    lse = capped.logsumexp(-1)
    return (lse - capped.gather(1, target[:, None])[:, 0]).to(logits.dtype), [logits, target, lse]


def _capped_backward(saved, g, without_tanh=False):
    logits, target, lse = saved
    tanh = torch.tanh(wide(logits) / CAP)
    gradient = (CAP * tanh - lse[:, None]).exp() - F.one_hot(target, logits.shape[1])
    gradient = gradient if without_tanh else gradient * (1 - tanh.square())
    return (gradient * wide(g)[:, None]).to(logits.dtype), None


SOFT_CAPPED = Pair(
    soft_capped,
    kernel(_capped_forward, _capped_backward),
    partial(logits_and_target, ignored=0),
    {
        "no derivative of the soft cap": Wrong(
            kernel(_capped_forward, partial(_capped_backward, without_tanh=True)), "input:logits"
        )
    },
)


# Linear layer and cross entropy in one
def linear_cross_entropy(x, weight, target):
    return F.cross_entropy(x @ weight.mT, target)


def _fused_inputs(generator, rows=1024, width=16, classes=12):
    x, weight = normal(generator, (rows, width), (classes, width))
    return x, weight / 2, torch.randint(classes, (rows,), generator=generator)


def _fused_forward(x, weight, target, accumulator=None, last_chunk=False):
    """Return the loss and, computed at once, both gradients; that of the weight is a sum over chunks of two rows."""
    logits = wide(x) @ wide(weight).mT
    lse = logits.logsumexp(-1, keepdim=True)
    loss = (lse - logits.gather(1, target[:, None])).mean()
    g = ((logits - lse).exp() - F.one_hot(target, len(weight))) / len(x)
    chunks = torch.einsum("nro,nri->noi", g.unflatten(0, (-1, 2)), wide(x).unflatten(0, (-1, 2)))
    dweight = chunks[-1] if last_chunk else chunks.sum(0)
    if accumulator == "narrow":
        dweight = torch.zeros_like(weight)
        for chunk in chunks.to(weight.dtype):
            dweight = dweight + chunk
    return loss.to(x.dtype), [(g @ wide(weight)).to(x.dtype), dweight.to(weight.dtype)]


def _fused_backward(saved, g):
    return *(each * g for each in saved), None


FUSED = Pair(
    linear_cross_entropy,
    kernel(_fused_forward, _fused_backward),
    _fused_inputs,
    {
        "weight gradient of the last chunk": Wrong(
            kernel(partial(_fused_forward, last_chunk=True), _fused_backward), "input:weight", hidden_at={"rows": 2}
        ),
        "weight gradient accumulated in the dtype of the weight": Wrong(
            kernel(partial(_fused_forward, accumulator="narrow"), _fused_backward),
            "input:weight",
            kind="precision",
            dtypes=ALL[1:],
            source="axolotl 1601, Liger-Kernel 1391",
        ),
    },
)


# Divergences between two sets of logits
def two_logits(generator, rows=12, classes=24):
    return tuple(torch.randn(rows, classes, generator=generator) for _ in range(2))


def kl_divergence(student, teacher):
    target = teacher.detach().log_softmax(-1)
    return F.kl_div(student.log_softmax(-1), target, log_target=True, reduction="batchmean")


def _kl_forward(student, teacher, linear_target=False, mean=False):
    p, q = wide(teacher).log_softmax(-1), wide(student).log_softmax(-1)
    loss = (p * (p.abs().log() - q) if linear_target else p.exp() * (p - q)).sum()
    return (loss / (student.numel() if mean else len(student))).to(student.dtype), [p, q, student]


def _kl_backward(saved, g, without_softmax=False):
    p, q, student = saved
    gradient = -p.exp() if without_softmax else q.exp() - p.exp()
    return (gradient * g / len(p)).to(student.dtype), None


KL = Pair(
    kl_divergence,
    kernel(_kl_forward, _kl_backward),
    two_logits,
    {
        "log target taken for a target": Wrong(
            kernel(partial(_kl_forward, linear_target=True), _kl_backward), "output"
        ),
        "mean over elements in forward": Wrong(kernel(partial(_kl_forward, mean=True), _kl_backward), "output"),
        "gradient without that of log_softmax": Wrong(
            kernel(_kl_forward, partial(_kl_backward, without_softmax=True)), "input:student", source="Liger-Kernel 262"
        ),
    },
)


def js_divergence(student, teacher):
    p, q = teacher.detach().softmax(-1), student.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1)


def _js_forward(student, teacher, mean_of_logs=False):
    p, q = wide(teacher).log_softmax(-1), wide(student).log_softmax(-1)
    m = (p + q) / 2 if mean_of_logs else torch.logaddexp(p, q) - torch.tensor(2.0, dtype=p.dtype).log()
    return ((p.exp() * (p - m) + q.exp() * (q - m)) / 2).sum(-1).to(student.dtype), [q, m, student]


def _js_backward(saved, g):
    q, m, student = saved
    each = q.exp() * (q - m) / 2
    return ((each - q.exp() * each.sum(-1, keepdim=True)) * wide(g)[:, None]).to(student.dtype), None


JS = Pair(
    js_divergence,
    kernel(_js_forward, _js_backward),
    two_logits,
    {
        "mean of the logarithms": Wrong(
            kernel(partial(_js_forward, mean_of_logs=True), _js_backward), "output input:student"
        )
    },
)


# Focal loss
def focal(logits, labels):
    p = logits.sigmoid()
    pt = torch.where(labels, p, 1 - p)
    signed = torch.where(labels, logits, -logits)
    return -((1 - pt) ** 2) * F.logsigmoid(signed)


def _focal_forward(logits, labels):
    signed = torch.where(labels, wide(logits), -wide(logits))
    return ((-signed).sigmoid().square() * F.softplus(-signed)).to(logits.dtype), [logits, labels]


def _focal_backward(saved, g, constant_factor=False):
    logits, labels = saved
    sign = torch.where(labels, 1, -1)
    signed = wide(logits) * sign
    rest = (-signed).sigmoid()
    slope = -(rest**3)
    slope = slope if constant_factor else slope - 2 * rest.square() * (1 - rest) * F.softplus(-signed)
    return (slope * sign * wide(g)).to(logits.dtype), None


FOCAL = Pair(
    focal,
    kernel(_focal_forward, _focal_backward),
    lambda generator: (torch.randn(16, 24, generator=generator), torch.rand(16, 24, generator=generator) < 0.3),
    {
        "factor held constant": Wrong(
            kernel(_focal_forward, partial(_focal_backward, constant_factor=True)), "input:logits"
        )
    },
)


# Direct preference optimisation
def dpo(chosen, rejected, chosen_reference, rejected_reference):
    margin = (chosen - rejected) - (chosen_reference - rejected_reference).detach()
    return -F.logsigmoid(0.5 * margin)


def _dpo_forward(chosen, rejected, chosen_reference, rejected_reference, sign=-1):
    margin = wide(chosen) - wide(rejected) + sign * (wide(chosen_reference) - wide(rejected_reference))
    return F.softplus(-0.5 * margin).to(chosen.dtype), [margin]


def _dpo_backward(saved, g, without_rejected=False):
    slope = (-0.5 * (-0.5 * saved[0]).sigmoid() * wide(g)).to(g.dtype)
    return slope, (torch.zeros_like(slope) if without_rejected else -slope), None, None


DPO = Pair(
    dpo,
    kernel(_dpo_forward, _dpo_backward),
    lambda generator: tuple(torch.randn(64, generator=generator) for _ in range(4)),
    {
        "no gradient of the rejected": Wrong(
            kernel(_dpo_forward, partial(_dpo_backward, without_rejected=True)), "input:rejected"
        ),
        "sign of the reference": Wrong(
            kernel(partial(_dpo_forward, sign=1), _dpo_backward), "output input:chosen input:rejected"
        ),
    },
)


# Contrastive loss over both directions of a similarity matrix
def contrastive(x, y):
    similarity = 2 * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    labels = torch.arange(len(x))
    return (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.mT, labels)) / 2


def _contrastive_forward(x, y):
    rx, ry = (wide(each).square().sum(-1, keepdim=True).rsqrt() for each in (x, y))
    similarity = 2 * (wide(x) * rx) @ (wide(y) * ry).mT
    rows, columns = similarity.logsumexp(1, keepdim=True), similarity.logsumexp(0, keepdim=True)
    loss = (rows.mean() + columns.mean()) / 2 - similarity.diagonal().mean()
    return loss.to(x.dtype), [x, y, rx, ry, similarity, rows, columns]


def _contrastive_backward(saved, g, one_direction=False):
    x, y, rx, ry, similarity, rows, columns = saved
    columns = rows if one_direction else columns
    p = ((similarity - rows).exp() + (similarity - columns).exp()) / 2
    ds = 2 * wide(g) * (p - torch.eye(len(p))) / len(p)
    gradients = []
    for own, rnorm, back in ((wide(x) * rx, rx, ds @ (wide(y) * ry)), (wide(y) * ry, ry, ds.mT @ (wide(x) * rx))):
        gradients.append(((back - own * (own * back).sum(-1, keepdim=True)) * rnorm).to(x.dtype))
    return tuple(gradients)


CONTRASTIVE = Pair(
    contrastive,
    kernel(_contrastive_forward, _contrastive_backward),
    lambda generator: tuple(torch.randn(16, 24, generator=generator) for _ in range(2)),
    {
        "rows in place of columns in backward": Wrong(
            kernel(_contrastive_forward, partial(_contrastive_backward, one_direction=True)), "input:x input:y"
        )
    },
)

PAIRS = {
    "cross entropy in chunks": CROSS_ENTROPY,
    "label smoothing": SMOOTHED,
    "z-loss": Z_LOSS,
    "cross entropy with a soft cap": SOFT_CAPPED,
    "linear layer and cross entropy": FUSED,
    "KL divergence": KL,
    "JS divergence": JS,
    "focal loss": FOCAL,
    "DPO loss": DPO,
    "contrastive loss": CONTRASTIVE,
}
