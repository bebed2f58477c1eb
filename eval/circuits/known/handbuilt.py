"""Handwritten circuits: gates, induction, the fraction of x so far, reversing. Each model also has distractor components.

A distractor's output is read by other distractors only, or not read; some distractors read the circuit's outputs. Attention
that picks one position scores it ``BETA`` above the others, each of which gets a weight of ``exp(-BETA)``: components outside a
circuit may leak that much.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ....sae.suggestions import require_choice
from ....training.activations.model import LanguageModel
from ..tasks.pairs import PromptPairs, Question
from .known_circuit import Known, ends, wired
from .toy import ToyConfig, ToyTransformer, blank
from .wiring import ResidualLayout, write_head, write_neurons

BETA = 30.0


def made(
    name: str,
    model: ToyTransformer,
    pairs: PromptPairs,
    edges: dict[str, str],
    directions: dict[str, Float[Tensor, " d_model"]],
) -> Known:
    """Return a known circuit from edges given as text per ablation; its nodes are the ends of the edges."""
    truth = {ablation: wired(text) for ablation, text in edges.items()}
    nodes = {ablation: ends(members) for ablation, members in truth.items()}
    return Known(name, LanguageModel(model, None, f"known:{name}", None), pairs, nodes, truth, directions)


def equal_pairs(
    task: str,
    corruption: str,
    clean: Int[Tensor, "pairs positions"],
    corrupted: Int[Tensor, "pairs positions"],
    questions: list[tuple[Question, ...]],
) -> PromptPairs:
    """Return pairs without padding."""
    lengths = torch.full((len(clean),), clean.shape[1])
    return PromptPairs(task, corruption, clean, corrupted, tuple(questions), lengths)


# Gates: two heads fetch one bit each, the MLP combines them.
ZERO, ONE, START, ASK = 0, 1, 2, 3
GATES = ("and", "or", "adder")


def and_gate_circuit(kind: str, n_pairs: int = 16, seed: int = 0) -> Known:
    """Return a gate: ``and`` needs both bits, ``or`` either bit, ``adder`` counts them.

    Prompts: start, two bits, two other bits, ask. Clean prompts have ones, corrupted ones zeros. Heads 1 and 3 fetch the bits,
    0 and 2 fetch the other two. Gates as in Conmy et al. 2023, arXiv:2304.14997, appendix, with heads that distinguish the
    bits.
    """
    require_choice("kind", kind, GATES)
    stream = ResidualLayout(token=4, position=6, bit=2, other=2, spare=1, result=1)
    model = blank(ToyConfig(1, 4, stream.width, 1, n_ctx=6, d_vocab=4, d_vocab_out=2, d_mlp=3))
    _embed(model, stream)
    for head, position, target in ((0, 3, ("other", 0)), (1, 1, ("bit", 0)), (2, 4, ("other", 1)), (3, 2, ("bit", 1))):
        write_head(
            model,
            0,
            head,
            value=stream.at("token", ONE)[None],
            output=stream.at(*target)[None],
            key=stream.at("position", position)[None],
            query_bias=torch.tensor([BETA]),
        )
    both, result = stream.all("bit").sum(0), stream.at("result")
    sign, bias, constant = {"and": (1.0, -1.0, 0.0), "or": (-1.0, 1.0, 1.0), "adder": (1.0, 0.0, 0.0)}[kind]
    # or is 1 - relu(1 - left - right).
    start = write_neurons(model, 0, 0, sign * both[None], bias, sign * result[None])
    others = torch.stack([stream.all("other").sum(0), stream.at("token", ASK) + both])
    write_neurons(model, 0, start, others, -1.0, stream.at("spare").expand(2, -1))
    with torch.no_grad():
        model.mlp(0).down_proj.bias.add_(constant * result)
        model.lm_head.weight[1], model.lm_head.bias[1] = result, -0.5
    fetched = "embed->a0.h1.v embed->a0.h3.v a0.h1->m0 a0.h3->m0 m0->logits"
    edges = {"resample": fetched, "zero": f"{fetched} embed->a0.h1.k embed->a0.h3.k"}
    return made(f"{kind}_gate", model, _gate_pairs(kind, n_pairs, seed), edges, stream.directions())


def _gate_pairs(kind: str, n_pairs: int, seed: int) -> PromptPairs:
    draw = torch.Generator().manual_seed(seed)

    def prompts(bit: int) -> Tensor:
        rows = torch.full((n_pairs, 6), bit)
        rows[:, 0], rows[:, 5] = START, ASK
        rows[:, 3:5] = torch.randint(0, 2, (n_pairs, 2), generator=draw)
        return rows

    return equal_pairs(f"{kind}_gate", "other bits", prompts(ONE), prompts(ZERO), [(Question(5, (1,), (0,)),)] * n_pairs)


# Induction: predict the token that followed the last occurrence of the current one.
LETTERS = 7


def induction_circuit(n_pairs: int = 16, seed: int = 0, corruption: str = "other prompt") -> Known:
    """Return a two-layer, attention-only induction circuit: a previous-token head and an induction head.

    Prompts: BOS (id 0), six of seven letters, one of them again. ``corruption`` is ``other prompt`` (new letters) or ``other
    query`` (only the last letter differs: the output of the first layer at earlier positions is then the same on both prompts,
    and not in the resampled circuit).
    """
    size = LETTERS + 1
    stream = ResidualLayout(token=size, position=8, previous=size, found=size, spare=size)
    model = blank(ToyConfig(2, 3, stream.width, 8, n_ctx=8, d_vocab=size, d_vocab_out=size))
    _embed(model, stream)
    token, position, spare = stream.all("token"), stream.all("position"), stream.all("spare")
    # Position i asks for i - d; positions before d attend uniformly.
    for head, distance, target in ((0, 2, spare), (1, 1, stream.all("previous"))):
        write_head(model, 0, head, token, target, query=BETA * position[distance:], key=position[:-distance])
    write_head(model, 0, 2, token, spare)
    write_head(model, 1, 0, token, stream.all("found"), query=BETA * token, key=stream.all("previous"))
    write_head(model, 1, 1, spare, spare, query=BETA * position, key=position)
    write_head(model, 1, 2, stream.all("previous"), spare)
    with torch.no_grad():
        model.lm_head.weight.copy_(stream.all("found"))
    path = "embed->a1.h0.q a1.h0->logits"
    whole = f"{path} embed->a0.h1.v a0.h1->a1.h0.k embed->a1.h0.v"
    edges = {"resample": path if corruption == "other query" else whole, "zero": f"{whole} embed->a0.h1.q,k"}
    name = "induction_query" if corruption == "other query" else "induction"
    return made(name, model, _induction_pairs(name, corruption, n_pairs, seed), edges, stream.directions())


def _induction_pairs(name: str, corruption: str, n_pairs: int, seed: int) -> PromptPairs:
    if corruption not in ("other prompt", "other query"):
        raise ValueError(f"corruption: expected other prompt or other query, got {corruption!r}.")
    draw = torch.Generator().manual_seed(seed)

    def letters() -> Tensor:
        return torch.randperm(LETTERS, generator=draw)[:6] + 1

    clean, corrupted, questions = [], [], []
    while len(clean) < n_pairs:
        first = letters()
        second = first if corruption == "other query" else letters()
        # The last letter has no successor yet.
        one, other = (int(torch.randint(0, 5, (), generator=draw)) for _ in range(2))
        answer, foil = int(first[one + 1]), int(second[other + 1])
        if first[one] == second[other] or answer == foil:
            continue
        for rows, prompt, query in ((clean, first, one), (corrupted, second, other)):
            rows.append(torch.cat([torch.tensor([0]), prompt, prompt[query : query + 1]]))
        questions.append((Question(7, (answer,), (foil,)),))
    return equal_pairs(name, corruption, torch.stack(clean), torch.stack(corrupted), questions)


# The fraction of x so far, as tracr compiles it: the MLP marks x, a head averages.
def fraction(n_pairs: int = 16, seed: int = 0, length: int = 5) -> Known:
    """Return a circuit with one real output per position, the fraction of x so far.

    Tokens: BOS (id 0), w, x (2), y. Corrupted prompts have no x.
    """
    stream = ResidualLayout(token=4, position=length + 1, is_x=1, fraction=1, spare=3)
    config = ToyConfig(2, 2, stream.width, 2, n_ctx=length + 1, d_vocab=4, d_vocab_out=1, d_mlp=3)
    model = blank(config)
    _embed(model, stream)
    is_x, spare = stream.at("is_x")[None], stream.all("spare")
    write_head(model, 0, 0, stream.at("token", 1)[None], spare[:1])
    write_head(model, 0, 1, stream.at("token", 2)[None], spare[1:2], -BETA * stream.at("token")[None], stream.at("token")[None])
    seen = torch.stack([stream.at("token", 2), stream.at("token", 3), spare[:2].sum(0)])
    write_neurons(model, 0, 0, seen, 0.0, torch.stack([is_x[0], spare[1], spare[2]]))
    write_head(model, 1, 0, torch.cat([is_x, spare[:1]]), spare[1:])
    # Attend to everything but BOS.
    key = -stream.at("token")[None]
    write_head(model, 1, 1, is_x, stream.at("fraction")[None], key=key, query_bias=torch.tensor([BETA]))
    write_neurons(model, 1, 0, torch.stack([stream.at("fraction"), spare[2]]), 0.0, spare[:2])
    with torch.no_grad():
        model.lm_head.weight.copy_(stream.at("fraction")[None])
    path = "embed->m0 m0->a1.h1.v a1.h1->logits"
    edges = {"resample": path, "zero": f"{path} embed->a1.h1.k"}
    return made("fraction", model, fraction_pairs("fraction", (1, 3), 2, n_pairs, seed, length), edges, stream.directions())


def fraction_pairs(task: str, others: tuple[int, ...], x: int, n_pairs: int, seed: int, length: int) -> PromptPairs:
    """Return prompts of BOS (id 0) and ``length`` tokens; corrupted ones have random ``others`` instead of any ``x``."""
    draw = torch.Generator().manual_seed(seed)
    pool = torch.tensor(others)

    def filling() -> Tensor:
        return pool[torch.randint(0, len(pool), (n_pairs, length), generator=draw)]

    is_x = torch.rand(n_pairs, length, generator=draw) < 0.5
    is_x[torch.arange(n_pairs), torch.randint(0, length, (n_pairs,), generator=draw)] = True
    start = torch.zeros(n_pairs, 1, dtype=torch.long)
    clean = torch.cat([start, torch.where(is_x, torch.tensor(x), filling())], 1)
    corrupted = torch.cat([start, filling()], 1)
    questions = [tuple(Question(position, (0,), ()) for position in range(1, length + 1))] * n_pairs
    return equal_pairs(task, "no x", clean, corrupted, questions)


# Reversing, as tracr compiles it, in fewer steps: length, source position, copy.
LONGEST = 5


def reverse(n_pairs: int = 16, seed: int = 0, length: int = 4) -> Known:
    """Return a circuit whose position p of n copies the letter of n + 1 - p.

    Tokens: BOS (id 0), three letters, padding (4); attention is bidirectional. Prompts of a pair have equal length, so
    resampling does not change the length, and only the copy is in that circuit.
    """
    if not 1 <= length < LONGEST:
        # Without its inputs the length comes out as LONGEST: ablation would change nothing there.
        raise ValueError(f"length: expected 1 to {LONGEST - 1}, got {length}.")
    stream = ResidualLayout(token=5, position=LONGEST + 1, inverse=1, length=LONGEST, source=LONGEST + 1, found=3, spare=3)
    config = ToyConfig(3, 2, stream.width, LONGEST + 1, LONGEST + 1, d_vocab=5, d_vocab_out=3, d_mlp=16, causal=False, pad_id=4)
    model = blank(config)
    _embed(model, stream)
    letters, position, spare = stream.all("token")[1:4], stream.all("position"), stream.all("spare")
    # Of n letters and BOS, 1 / (n + 1) are BOS.
    write_head(model, 0, 1, stream.at("token")[None], stream.at("inverse")[None])
    write_head(model, 0, 0, letters, spare, query=BETA * position[1:], key=position[:-1])
    _write_lengths(model, stream)
    _write_sources(model, stream)
    write_head(model, 1, 0, letters, spare)
    write_head(model, 1, 1, stream.all("length")[2:], spare, query=BETA * position, key=position)
    write_head(model, 2, 0, spare, spare, query=BETA * position, key=position)
    write_head(model, 2, 1, letters, stream.all("found"), query=BETA * stream.all("source"), key=position)
    write_neurons(model, 2, 0, stream.all("found"), 0.0, spare)
    with torch.no_grad():
        model.lm_head.weight.copy_(stream.all("found"))
    copy = "embed->a2.h1.v a2.h1->logits"
    lookup = "embed->a0.h1.v a0.h1->m0 m0->m1 embed->m1 m1->a2.h1.q embed->a2.h1.k"
    edges = {"resample": copy, "zero": f"{copy} {lookup}"}
    return made("reverse", model, reverse_pairs("reverse", n_pairs, seed, length), edges, stream.directions())


def _write_lengths(model: ToyTransformer, stream: ResidualLayout) -> None:
    """Write ``m0``, from 1 / (n + 1) to the axis of n. A step at each length is a difference of two ReLUs."""
    inverse = torch.tensor([1 / (n + 1) for n in range(1, LONGEST + 1)])
    middle, steep = (inverse[1:] + inverse[:-1]) / 2, 2 / (inverse[:-1] - inverse[1:]).min()
    read = (steep * stream.at("inverse")).expand(LONGEST - 1, -1)
    length = stream.all("length")
    write = length[:-1] - length[1:]
    start = write_neurons(model, 0, 0, read, 0.5 - steep * middle, write)
    start = write_neurons(model, 0, start, read, -0.5 - steep * middle, -write)
    write_neurons(model, 0, start, stream.at("token", 1)[None], 0.0, stream.at("spare", 1)[None])
    with torch.no_grad():
        model.mlp(0).down_proj.bias.add_(length[-1])


def _write_sources(model: ToyTransformer, stream: ResidualLayout) -> None:
    """Write ``m1``: a neuron per length and position, active if both match, that writes the source position."""
    where = [(n, p) for n in range(1, LONGEST + 1) for p in range(1, n + 1)]
    read = torch.stack([stream.at("length", n - 1) + stream.at("position", p) for n, p in where])
    write = torch.stack([stream.at("source", n + 1 - p) for n, p in where])
    start = write_neurons(model, 1, 0, read, -1.0, write)
    write_neurons(model, 1, start, stream.at("token", 2)[None], 0.0, stream.at("spare", 2)[None])


def reverse_pairs(task: str, n_pairs: int, seed: int, length: int) -> PromptPairs:
    """Return BOS (id 0) and letters 1 to 3, all of which change in the corrupted prompt; outputs 0 to 2 are the letters."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 3, (n_pairs, length), generator=draw)
    others = (letters + torch.randint(1, 3, (n_pairs, length), generator=draw)) % 3
    start = torch.zeros(n_pairs, 1, dtype=torch.long)
    questions = [
        tuple(Question(length - index, (int(row[index]),), (int(other[index]),)) for index in range(length))
        for row, other in zip(letters, others, strict=True)
    ]
    clean, corrupted = (torch.cat([start, rows + 1], 1) for rows in (letters, others))
    return equal_pairs(task, "other letters", clean, corrupted, questions)


def _embed(model: ToyTransformer, stream: ResidualLayout) -> None:
    with torch.no_grad():
        model.wte.weight.copy_(stream.all("token"))
        model.wpe.weight.copy_(stream.all("position"))
