"""Toy with a known cause of its errors: handwritten weights that copy a letter, and a flag that turns it over.

Prompts: start, two bits, a letter, six fillers, ask. A head at the end fetches the letter, with a weight that depends on the
fillers, and two others fetch the bits. The first MLP writes the flag, the exclusive or of the bits, in place of them; the
second turns the letter over where the flag is set. So errors have one cause, which is in no single token of the prompt, in no
attention weight and in no margin, and after the first block is one direction. Further heads and neurons read and write spare
axes. The residual stream is rotated at random, so that no dimension is the flag.
"""

import torch

from sparsary.eval.circuits.known.handbuilt import equal_pairs
from sparsary.eval.circuits.known.known_circuit import Known
from sparsary.eval.circuits.known.rotation import rotated
from sparsary.eval.circuits.known.toy import ToyConfig, ToyTransformer, blank
from sparsary.eval.circuits.known.wiring import ResidualLayout, write_head, write_neurons
from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question
from sparsary.training.activations.model import LanguageModel

# Tokens: start, the values of two bits, two letters, fillers, ask.
BITS, LETTERS, FILLERS, ASK = (1, 2), (3, 4), tuple(range(5, 13)), 13
LENGTH, AT_BITS, AT_LETTER = 11, (1, 2), 3
# Scores of attention: of position for the bits' heads, of position and of the fillers for the letter's.
SHARP, SOFT = 30.0, 4.0
FILLER_SCORES = (-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
# A neuron of the second MLP is silent without the flag if this exceeds the letter.
GATE = 2.0
SPARE = 6


def flag_toy(n_pairs: int = 2000, seed: int = 0, errors: float = 0.3, prompts_seed: int | None = None) -> Known:
    """Return the toy with pairs that differ in the letter; ``errors`` is the share of prompts whose flag is set.

    ``seed`` draws distractors and the rotation, and the prompts unless they have a seed of their own.
    """
    stream = ResidualLayout(token=14, position=LENGTH, score=1, letter=1, bit=2, flag=1, spare=SPARE)
    config = ToyConfig(2, 4, stream.width, 4, n_ctx=LENGTH, d_vocab=14, d_vocab_out=2, d_mlp=12)
    model = blank(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.wte.weight.copy_(stream.all("token"))
        model.wpe.weight.copy_(stream.all("position"))
        for filler, score in zip(FILLERS, FILLER_SCORES, strict=True):
            model.wte.weight[filler] += score * stream.at("score")
        model.lm_head.weight[0], model.lm_head.weight[1] = stream.at("letter"), -stream.at("letter")
    letter = stream.at("token", LETTERS[0]) - stream.at("token", LETTERS[1])
    key = SOFT * stream.at("position", AT_LETTER) + stream.at("score")
    write_head(model, 0, 0, letter[None], stream.at("letter")[None], key=key[None], query_bias=torch.ones(1))
    for index, place in enumerate(AT_BITS):
        value, key = stream.at("token", BITS[1]), SHARP * stream.at("position", place)
        write_head(model, 0, 1 + index, value[None], stream.at("bit", index)[None], key=key[None], query_bias=torch.ones(1))
    write_head(model, 0, 3, stream.all("token")[5:9], stream.all("spare")[:4], key=stream.all("token")[5:9])
    _write_flag(model, stream, draw)
    _write_turn(model, stream, draw)
    nodes = {"resample": frozenset({"embed", "a0.h0", "m1"})}
    edges = {"resample": frozenset({"embed->a0.h0.v", "a0.h0->m1", "a0.h0->logits", "m1->logits"})}
    pairs = flag_pairs(n_pairs, seed if prompts_seed is None else prompts_seed, errors)
    language_model = LanguageModel(model, None, "known:flag", None)
    return rotated(Known("flag", language_model, pairs, nodes, edges, stream.directions()), seed)


def _write_flag(model: ToyTransformer, stream: ResidualLayout, draw: torch.Generator) -> None:
    """Write the first MLP: the flag, and the bits taken away, so that only the flag tells of them."""
    first, second = stream.all("bit")
    # The bits are read where the prompt ends only: elsewhere other heads' tokens stand in for them.
    end = stream.at("token", ASK)
    read = torch.stack([first - second + end, second - first + end, first + end, second + end])
    start = write_neurons(model, 0, 0, read, -1.0, torch.stack([stream.at("flag"), stream.at("flag"), -first, -second]))
    _write_distractors(model, 0, start, stream, draw)


def _write_turn(model: ToyTransformer, stream: ResidualLayout, draw: torch.Generator) -> None:
    """Write the second MLP: twice the letter taken away where the flag is set."""
    letter = stream.at("letter")
    read = torch.stack([letter, -letter]) + GATE * stream.at("flag")
    start = write_neurons(model, 1, 0, read, -GATE, torch.stack([-2 * letter, 2 * letter]))
    _write_distractors(model, 1, start, stream, draw)


def _write_distractors(model: ToyTransformer, layer: int, start: int, stream: ResidualLayout, draw: torch.Generator) -> None:
    """Write neurons that read fillers' scores and spare axes, and write to spare axes."""
    count = 12 - start
    axes = torch.cat([stream.all("token")[5:13], stream.all("spare"), stream.at("score")[None]])
    read = torch.randn(count, len(axes), generator=draw) @ axes
    write_neurons(model, layer, start, read, 0.1, torch.randn(count, SPARE, generator=draw) @ stream.all("spare") / 4)


def flag_pairs(n_pairs: int, seed: int, errors: float) -> PromptPairs:
    """Return prompts whose letter is asked for; corrupted ones have the other letter."""
    draw = torch.Generator().manual_seed(seed)
    flag = torch.rand(n_pairs, generator=draw) < errors
    first, letters = (torch.randint(0, 2, (n_pairs,), generator=draw) for _ in range(2))
    clean = torch.zeros(n_pairs, LENGTH, dtype=torch.long)
    clean[:, AT_BITS[0]] = BITS[0] + first
    clean[:, AT_BITS[1]] = BITS[0] + (first ^ flag.long())
    clean[:, AT_LETTER] = LETTERS[0] + letters
    fillers = torch.randint(FILLERS[0], FILLERS[-1] + 1, (n_pairs, LENGTH - 5), generator=draw)
    clean[:, AT_LETTER + 1 : -1], clean[:, -1] = fillers, ASK
    corrupted = clean.clone()
    corrupted[:, AT_LETTER] = LETTERS[0] + 1 - letters
    questions = [(Question(LENGTH - 1, (int(letter),), (1 - int(letter),)),) for letter in letters]
    return equal_pairs("flag", "other letter", clean, corrupted, questions)
