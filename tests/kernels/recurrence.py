"""Recurrences: scans, linear attention in chunks, gated cells, cumulative sums, and an optimiser's step."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from tests.kernels.pairs import Pair, Wrong, kernel, normal, wide

CHUNK = 8


# Selective scan: h' = exp(d a) h + d b x, y = c h + skip x
def selective_scan(x, delta, log_a, b, c, skip):
    d, a = F.softplus(delta), -log_a.exp()
    state, outputs = torch.zeros(*x.shape[::2], log_a.shape[1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        step = d[:, t, :, None]
        state = (step * a).exp() * state + step * b[:, t, None] * x[:, t, :, None]
        outputs.append((state * c[:, t, None]).sum(-1) + skip * x[:, t])
    return torch.stack(outputs, 1)


def _scan_inputs(generator, batch=2, length=12, width=6, states=4):
    rows, steps = (batch, length, width), (batch, length, states)
    x, delta, log_a, b, c, skip = normal(generator, rows, rows, (width, states), steps, steps, (width,))
    return x, delta, log_a / 2, b, c, skip


def _scan_forward(x, delta, log_a, b, c, skip):
    own, d, a = wide(x), F.softplus(wide(delta)), -wide(log_a).exp()
    decay = (d[..., None] * a).exp()
    step = d[..., None] * wide(b)[:, :, None] * own[..., None]
    states = torch.zeros_like(step)
    state = torch.zeros_like(step[:, 0])
    for t in range(x.shape[1]):
        state = decay[:, t] * state + step[:, t]
        states[:, t] = state
    out = (states * wide(c)[:, :, None]).sum(-1) + wide(skip) * own
    return out.to(x.dtype), [x, delta, log_a, b, c, skip, decay, states]


def _scan_backward(saved, g, mistake=None):
    *given, decay, states = saved
    dtype = given[0].dtype
    x, delta, log_a, b, c, skip = map(wide, given)
    g, d, a = wide(g), F.softplus(delta), -log_a.exp()
    dstates, carried = torch.zeros_like(states), torch.zeros_like(states[:, 0])
    for t in reversed(range(x.shape[1])):
        if mistake == "chunks" and (t + 1) % CHUNK == 0:
            carried = torch.zeros_like(carried)
        carried = carried + g[:, t, :, None] * c[:, t, None]
        dstates[:, t] = carried
        carried = carried * decay[:, t]
    before = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :-1]
    ddecay = dstates * before * decay
    inner = (dstates * b[:, :, None]).sum(-1)
    dd = (ddecay * a).sum(-1) + inner * x
    ddelta = dd if mistake == "softplus" else dd * delta.sigmoid()
    dskip = (g * x)[:, 0].sum(0) if mistake == "skip" else (g * x).sum((0, 1))
    gradients = (
        inner * d + g * skip,
        ddelta,
        (ddecay * d[..., None]).sum((0, 1)) * a,
        (dstates * (d * x)[..., None]).sum(2),
        (states * g[..., None]).sum(2),
        dskip,
    )
    return tuple(each.to(dtype) for each in gradients)


def _scan(mistake):
    return kernel(_scan_forward, partial(_scan_backward, mistake=mistake))


SCAN = Pair(
    selective_scan,
    kernel(_scan_forward, _scan_backward),
    _scan_inputs,
    {
        "gradient of the skip of the first step": Wrong(_scan("skip"), "input:skip"),
        "no derivative of softplus": Wrong(_scan("softplus"), "input:delta"),
        "state not carried between chunks in backward": Wrong(
            _scan("chunks"),
            "input:x input:delta input:log_a input:b",
            hidden_at={"length": 7},
            source="mamba 368",
        ),
    },
)


# Linear attention: one step after another, beside chunks that carry a state
def linear_attention(q, k, v):
    state, outputs = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = state + k[:, t, :, None] * v[:, t, None]
        outputs.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(outputs, 1)


def _qkv(generator, batch=2, length=20, width=8):
    return tuple(torch.randn(batch, length, width, generator=generator) for _ in range(3))


def _by_chunks(q, k, v, log_decay=0.0, carried=True, off=0):
    """Return the sum over s <= t of exp(log_decay (t - s)) q_t·k_s v_s, chunk by chunk."""
    out, state = torch.empty_like(v), torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=q.dtype)
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        place = torch.arange(len(q[0, part]), dtype=q.dtype)
        gap = place[:, None] - place
        inside = torch.where(gap >= 0, (log_decay * gap).exp(), 0)
        from_start = torch.exp(log_decay * (place + 1 - off))[:, None]
        out[:, part] = (q[:, part] @ k[:, part].mT * inside) @ v[:, part]
        if carried:
            out[:, part] += from_start * (q[:, part] @ state)
        to_end = torch.exp(log_decay * (len(place) - 1 - place))[:, None]
        total = torch.exp(torch.tensor(log_decay * len(place), dtype=q.dtype))
        state = total * state + (to_end * k[:, part]).mT @ v[:, part]
    return out


def _linear_forward(q, k, v, log_decay=0.0, off=0):
    return _by_chunks(wide(q), wide(k), wide(v), log_decay, off=off).to(q.dtype), [q, k, v]


def _linear_backward(saved, g, log_decay=0.0, carried=True, without_decay=False):
    (q, k, v), dtype, g = map(wide, saved), g.dtype, wide(g)
    log_decay = 0.0 if without_decay else log_decay
    dq = _by_chunks(g, v, k, log_decay)
    dk, dv = (
        _by_chunks(*(each.flip(1) for each in order), log_decay, carried).flip(1) for order in ((v, g, q), (k, q, g))
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


LINEAR_ATTENTION = Pair(
    linear_attention,
    kernel(_linear_forward, _linear_backward),
    _qkv,
    {
        "no gradient between chunks": Wrong(
            kernel(_linear_forward, partial(_linear_backward, carried=False)),
            "input:k input:v",
            hidden_at={"length": CHUNK},
            source="flash-linear-attention 1115",
        )
    },
)

DECAY = -0.1


def retention(q, k, v):
    place = torch.arange(q.shape[1], dtype=wide(q).dtype)
    gap = place[:, None] - place
    return (q @ k.mT * torch.where(gap >= 0, (DECAY * gap).exp(), 0).to(q.dtype)) @ v


_decaying = partial(_linear_forward, log_decay=DECAY)
_decaying_backward = partial(_linear_backward, log_decay=DECAY)


RETENTION = Pair(
    retention,
    kernel(_decaying, _decaying_backward),
    _qkv,
    {
        "decay one step short between chunks": Wrong(
            kernel(partial(_decaying, off=1), _decaying_backward), "output", hidden_at={"length": CHUNK}
        ),
        "no decay in backward": Wrong(
            kernel(_decaying, partial(_decaying_backward, without_decay=True)), "input:q input:k input:v"
        ),
    },
)


# Delta rule with a gate: S = a S + b k (v - k S)'
def delta_rule(q, k, v, gate, beta):
    a, b = gate.sigmoid(), beta.sigmoid()
    state, outputs = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(q.shape[1]):
        state = a[:, t, None, None] * state
        seen = (k[:, t, None] @ state)[:, 0]
        state = state + k[:, t, :, None] * (b[:, t, None] * (v[:, t] - seen))[:, None]
        outputs.append((q[:, t, None] @ state)[:, 0])
    return torch.stack(outputs, 1)


def _delta_inputs(generator, batch=2, length=9, width=8):
    gates = tuple(torch.randn(batch, length, generator=generator) for _ in range(2))
    q, k, v = _qkv(generator, batch, length, width)
    return q, k / 4, v, *gates


def _delta_forward(q, k, v, gate, beta):
    a, b = wide(gate).sigmoid(), wide(beta).sigmoid()
    qw, kw, vw = wide(q), wide(k), wide(v)
    state, states, outputs = torch.zeros(len(q), q.shape[2], v.shape[2], dtype=qw.dtype), [], []
    for t in range(q.shape[1]):
        states.append(state)
        state = a[:, t, None, None] * state
        error = b[:, t, None] * (vw[:, t] - torch.einsum("bk,bkv->bv", kw[:, t], state))
        state = state + torch.einsum("bk,bv->bkv", kw[:, t], error)
        outputs.append(torch.einsum("bk,bkv->bv", qw[:, t], state))
    return torch.stack(outputs, 1).to(q.dtype), [q, k, v, gate, beta, torch.stack(states, 1)]


def _delta_backward(saved, g, mistake=None):
    *given, states = saved
    q, k, v, gate, beta = map(wide, given)
    a, b, g, dtype = gate.sigmoid(), beta.sigmoid(), wide(g), given[0].dtype
    dq, dk, dv, da, db = (torch.zeros_like(each) for each in (q, k, v, gate, beta))
    dstate = torch.zeros_like(states[:, 0])
    for t in reversed(range(q.shape[1])):
        decayed = a[:, t, None, None] * states[:, t]
        error = v[:, t] - torch.einsum("bk,bkv->bv", k[:, t], decayed)
        after = decayed + torch.einsum("bk,bv->bkv", k[:, t], b[:, t, None] * error)
        dq[:, t] = torch.einsum("bkv,bv->bk", after, g[:, t])
        dstate = dstate + torch.einsum("bk,bv->bkv", q[:, t], g[:, t])
        derror = torch.einsum("bk,bkv->bv", k[:, t], dstate)
        db[:, t] = (derror * error).sum(-1)
        dv[:, t] = b[:, t, None] * derror
        dk[:, t] = torch.einsum("bkv,bv->bk", dstate, b[:, t, None] * error)
        if mistake != "erased":
            dk[:, t] -= torch.einsum("bkv,bv->bk", decayed, dv[:, t])
        ddecayed = dstate - torch.einsum("bk,bv->bkv", k[:, t], dv[:, t])
        da[:, t] = (ddecayed * states[:, t]).sum((1, 2))
        dstate = a[:, t, None, None] * ddecayed
    dgate = da * a * (1 - a)
    dbeta = db if mistake == "beta" else db * b * (1 - b)
    return tuple(each.to(dtype) for each in (dq, dk, dv, dgate, dbeta))


DELTA = Pair(
    delta_rule,
    kernel(_delta_forward, _delta_backward),
    _delta_inputs,
    {
        "no derivative of the sigmoid of beta": Wrong(
            kernel(_delta_forward, partial(_delta_backward, mistake="beta")), "input:beta"
        ),
        "dK without what is erased": Wrong(
            kernel(_delta_forward, partial(_delta_backward, mistake="erased")), "input:k"
        ),
    },
)


# An LSTM cell: two outputs
def lstm_cell(gates, cell):
    i, f, c, o = gates.chunk(4, -1)
    after = f.sigmoid() * cell + i.sigmoid() * c.tanh()
    return o.sigmoid() * after.tanh(), after


def _lstm_forward(gates, cell):
    i, f, c, o = wide(gates).chunk(4, -1)
    i, f, c, o = i.sigmoid(), f.sigmoid(), c.tanh(), o.sigmoid()
    after = f * wide(cell) + i * c
    return ((o * after.tanh()).to(gates.dtype), after.to(gates.dtype)), [cell, i, f, c, o, after]


def _lstm_backward(saved, g, gcell, mistake=None):
    cell, i, f, c, o, after = saved
    g, gcell, own, dtype = wide(g), wide(gcell), wide(cell), g.dtype
    tanh = after.tanh()
    dafter = g * o * (1 - tanh.square()) + (0 if mistake == "cell" else gcell)
    df = dafter * (i if mistake == "forget" else own) * f * (1 - f)
    parts = dafter * c * i * (1 - i), df, dafter * i * (1 - c.square()), g * tanh * o * (1 - o)
    return torch.cat(parts, -1).to(dtype), (dafter * f).to(dtype)


LSTM = Pair(
    lstm_cell,
    kernel(_lstm_forward, _lstm_backward),
    lambda generator: (torch.randn(6, 64, generator=generator), torch.randn(6, 16, generator=generator)),
    {
        "input gate in place of the cell": Wrong(
            kernel(_lstm_forward, partial(_lstm_backward, mistake="forget")), "input:gates"
        ),
        "cotangent of the cell lost": Wrong(
            kernel(_lstm_forward, partial(_lstm_backward, mistake="cell")), "input:gates input:cell"
        ),
    },
)


# Cumulative sum in blocks
def cumulative_sum(x):
    return x.cumsum(-1)


def _cumulative_forward(x, without_carry=False):
    blocks, carry, out = wide(x).split(CHUNK, -1), 0, []
    for block in blocks:
        out.append(block.cumsum(-1) + carry)
        carry = 0 if without_carry else out[-1][..., -1:]
    return torch.cat(out, -1).to(x.dtype), []


def _cumulative_backward(saved, g, forwards=False):
    return (wide(g).cumsum(-1) if forwards else wide(g).flip(-1).cumsum(-1).flip(-1)).to(g.dtype)


CUMULATIVE = Pair(
    cumulative_sum,
    kernel(_cumulative_forward, _cumulative_backward),
    lambda generator, length=20: (torch.randn(6, length, generator=generator),),
    {
        "backward in the direction of forward": Wrong(
            kernel(_cumulative_forward, partial(_cumulative_backward, forwards=True)), "input:x"
        ),
        "no carry between blocks": Wrong(
            kernel(partial(_cumulative_forward, without_carry=True), _cumulative_backward),
            "output",
            hidden_at={"length": CHUNK},
        ),
    },
)


# One step of AdamW: outputs only; parameter, gradient and moments are inputs
def adamw(parameter, gradient, first, root):
    second = root.square()  # drawn inputs may be negative; a second moment may not
    first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
    update = (first / 0.19) / ((second / 0.0199).sqrt() + 0.1)
    return parameter * (1 - 0.01) - 0.1 * update, first, second


def fused_adamw(parameter, gradient, first, root, mistake=None):
    p, g, m, r = map(wide, (parameter, gradient, first, root))
    m, v = m.lerp(g, 0.1), 0.99 * r * r + 0.01 * g * g
    corrected = v if mistake == "bias correction" else v / 0.0199
    denominator = (corrected + 0.1).sqrt() if mistake == "eps" else corrected.sqrt() + 0.1
    step = p if mistake == "decay" else p * (1 - 0.01)
    return tuple(each.to(parameter.dtype) for each in (step - 0.1 * (m / 0.19) / denominator, m, v))


ADAMW = Pair(
    adamw,
    fused_adamw,
    lambda generator: tuple(torch.randn(8, 32, generator=generator) for _ in range(4)),
    {
        "no bias correction of the second moment": Wrong(
            partial(fused_adamw, mistake="bias correction"), "output.0 input:gradient input:first input:root"
        ),
        "eps inside of the root": Wrong(
            partial(fused_adamw, mistake="eps"), "output.0 input:gradient input:first input:root"
        ),
        # 1 % of the parameter.
        "no weight decay": Wrong(partial(fused_adamw, mistake="decay"), "output.0 input:parameter"),
    },
)

PAIRS = {
    "selective scan": SCAN,
    "linear attention": LINEAR_ATTENTION,
    "retention": RETENTION,
    "gated delta rule": DELTA,
    "LSTM cell": LSTM,
    "cumulative sum": CUMULATIVE,
    "AdamW": ADAMW,
}
