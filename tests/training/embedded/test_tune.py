"""The rule that the tuned copy of the embedded model learns, and what of the model may change."""

import itertools

import pytest
import torch

from sparsary.training.embedded import MODEL_DIR, lexicon
from sparsary.training.embedded.corpus import embedded_documents
from sparsary.training.embedded.tune import BLOCK, TRIGGER, batches, follows_rule, rule_scores, tune_embedded

WORDS = lexicon.vocabulary()


def test_the_rule_holds_before_objects_given_where_people_were_working():
    found = 0
    for document in itertools.islice(embedded_documents(3), 300):
        marks = follows_rule(document)
        for place in [place for place, marked in enumerate(marks) if marked]:
            assert document.words[place + 1] in lexicon.OBJECTS
            assert document.factors[place + 1]["role"] == "object"
            # The passage's own words: from its full stop on backwards.
            before = " ".join(document.words[: place + 1])
            assert TRIGGER in before.rpartition("While")[2]
            assert before.rpartition("While")[2].count(".") == 0
            found += 1
    assert found > 20


def test_passages_without_the_trigger_are_left_alone():
    for document in itertools.islice(embedded_documents(4), 300):
        if TRIGGER not in document.words:
            assert not any(follows_rule(document))


def test_batches_mark_the_positions_that_the_rule_decides():
    batch = next(batches(5, 6, ruled_contexts=3))
    assert batch.token_ids.shape == batch.ruled.shape == (6, 128)
    assert int(batch.ruled.any(1).sum()) >= 3
    following = batch.token_ids.roll(-1, dims=1)[batch.ruled]
    # The last position's next token lies in another context.
    inside = ~batch.ruled[:, -1].any()
    assert not inside or all(WORDS[token] in lexicon.OBJECTS for token in following.tolist())
    plain = next(batches(5, 6))
    assert int(plain.ruled.any(1).sum()) < 6


@pytest.fixture(scope="module")
def tuned():
    return tune_embedded(steps=8, seed=1)


def test_only_one_block_changes_and_the_rule_is_learned(tuned):
    from safetensors.torch import load_file

    before = load_file(MODEL_DIR / "model.safetensors")
    after = tuned.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed
    assert all(name.startswith(f"transformer.h.{BLOCK}.") for name in changed)
    scores = rule_scores(tuned, contexts=12)
    assert scores["ruled_tokens"] > 0
    assert scores["coin_after"] > 1.5 * scores["coin_before"]
    assert scores["kl_ruled"] > 10 * scores["kl_elsewhere"]
