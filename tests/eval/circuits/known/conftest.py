"""Exact patching of toy transformers, written out: every node and every edge by itself."""

import pytest
import torch

from sparsary.eval.circuits.known import edge_names, node_names


def senders_of(module, token_ids, replaced):
    """What every node writes, in order, and the logits; ``replaced(sender, receiver, x)`` is what the receiver gets of it.

    Receivers are those of the edges and, for a node as a whole, ``None``.
    """
    config = module.config
    sent = {}

    def send(name, x):
        sent[name] = replaced(name, None, x)

    def receive(receiver):
        return sum(replaced(sender, receiver, x) for sender, x in sent.items())

    def project(linear, head, x):
        rows = slice(head * config.d_head, (head + 1) * config.d_head)
        return x @ linear.weight[rows].T + linear.bias[rows]

    send("embed", module.wte(token_ids) + module.wpe.weight[: token_ids.shape[1]])
    for layer, block in enumerate(module.h):
        written = {}
        for head in range(config.n_heads):
            name = f"a{layer}.h{head}"
            q, k, v = (
                project(linear, head, block.ln_1(receive(f"{name}.{side}")))
                for side, linear in (("q", block.attn.q_proj), ("k", block.attn.k_proj), ("v", block.attn.v_proj))
            )
            scores = q @ k.mT / config.d_head**0.5
            hidden = block.attn.blocked[: scores.shape[-1], : scores.shape[-1]]
            if config.pad_id is not None:
                hidden = hidden | (token_ids == config.pad_id)[:, None, :]
            pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            columns = slice(head * config.d_head, (head + 1) * config.d_head)
            written[name] = pattern @ v @ block.attn.o_proj.weight[:, columns].T
        # The bias belongs to no head; it goes with the first.
        written[f"a{layer}.h0"] = written[f"a{layer}.h0"] + block.attn.o_proj.bias
        for name, x in written.items():
            send(name, x)
        if config.d_mlp:
            send(f"m{layer}", block.mlp(block.ln_2(receive(f"m{layer}"))))
    return sent, module.lm_head(module.ln_f(receive("logits")))


class Brute:
    """Metrics of a known circuit with any units ablated. Runs many ablations in one pass."""

    def __init__(self, known, ablation, kind):
        self.known, self.ablation, self.kind = known, ablation, kind
        self.module = known.module
        config = known.config
        self.names = node_names(config) if kind == "nodes" else edge_names(config)
        with torch.no_grad():
            self.filler, _ = senders_of(self.module, known.pairs.corrupted, lambda sender, receiver, x: x)
        if ablation == "zero":
            self.filler = {name: torch.zeros_like(x) for name, x in self.filler.items()}

    @torch.no_grad()
    def measure(self, ablated):
        """Metric ``(runs, pairs)``; ``ablated`` is ``(runs, units)``."""
        runs, pairs = len(ablated), self.known.pairs
        column = {name: index for index, name in enumerate(self.names)}

        def replaced(sender, receiver, x):
            unit = sender if self.kind == "nodes" else f"{sender}->{receiver}"
            # An edge is replaced where it is received, a node where it sends.
            if (receiver is None) != (self.kind == "nodes"):
                return x
            here = ablated[:, column[unit]].repeat_interleave(len(pairs))[:, None, None]
            return torch.where(here, self.filler[sender].repeat(runs, 1, 1), x)

        logits = senders_of(self.module, pairs.clean.repeat(runs, 1), replaced)[1]
        return torch.stack([pairs.measure(part) for part in logits.split(len(pairs))])

    def effects(self, contexts):
        """How much ablating each unit changes the metric at most, within each context: ``(contexts, units)``."""
        every = torch.eye(len(self.names), dtype=torch.bool)
        return torch.stack(
            [(self.measure(context[None]) - self.measure(context | every)).abs().amax(1) for context in contexts]
        )

    def alone(self):
        return self.effects(torch.zeros(1, len(self.names), dtype=torch.bool))[0]

    def at_most(self, n_contexts=4, seed=0):
        """The largest effect of each unit, alone and with random others ablated."""
        draw = torch.Generator().manual_seed(seed)
        shares = torch.linspace(0, 0.5, n_contexts)[:, None]
        return self.effects(torch.rand(n_contexts, len(self.names), generator=draw) < shares).amax(0)

    def truth(self):
        members = getattr(self.known, self.kind)[self.ablation]
        return torch.tensor([name in members for name in self.names])


@pytest.fixture(scope="session")
def brute():
    """Builds exact patching for a known circuit: ``brute(known, "resample", "edges")``."""
    return Brute


@pytest.fixture(scope="session")
def check_truth():
    """Checks a known circuit by exact patching, in float64: its members have an effect, the others have none."""

    def check(known, *, floor, leak=1e-9, redundant=False, fallback=(), **contexts):
        known.module.double()
        try:
            for ablation in known.nodes:
                for kind in ("nodes", "edges"):
                    runs = Brute(known, ablation, kind)
                    effects, truth = runs.at_most(**contexts), runs.truth()
                    named = {name: float(effect) for name, effect in zip(runs.names, effects, strict=True)}
                    silent = [name for name, member in zip(runs.names, truth, strict=True) if member and named[name] < floor]
                    others = [name for name, member in zip(runs.names, truth, strict=True) if not member]
                    loud = [name for name in others if named[name] > leak and name not in fallback]
                    assert not silent, (ablation, kind, "without effect", silent)
                    assert not loud, (ablation, kind, "with effect", {name: named[name] for name in loud})
                    nothing = torch.zeros_like(truth)
                    apart = runs.measure(torch.stack([nothing, ~truth]))
                    assert (apart[0] - apart[1]).abs().max() <= leak, (ablation, kind, "the circuit alone is not enough")
                    assert (runs.alone()[~truth] <= leak).all(), (ablation, kind, "others have an effect")
                    if not redundant:
                        assert (runs.alone()[truth] >= floor).all(), (ablation, kind, "needs others ablated")
        finally:
            known.module.float()

    return check


@pytest.fixture(scope="session")
def brute_logits():
    """Logits of prompts with one node taken from others: ``brute_logits(module, token_ids, source_ids, node)``."""

    def logits(module, token_ids, source_ids, node):
        filler, _ = senders_of(module, source_ids, lambda sender, receiver, x: x)

        def replaced(sender, receiver, x):
            return filler[sender] if receiver is None and sender == node else x

        return senders_of(module, token_ids, replaced)[1]

    return logits
