"""Selection of documents by latents: pooled codes, similarity, cover, files, and errors; the known answer is a long test."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import sparsary
from sparsary.eval.select.cover import coverage, greedy_cover
from sparsary.eval.select.pooled import PooledDocuments, PoolReader, Vocabulary, joined_documents
from sparsary.eval.select.run import select_summary, select_table
from sparsary.eval.select.similarity import PoolStatistics, contributions, generalised_jaccard, similarities
from sparsary.eval.select.store import stored_pool
from sparsary.sae import ENCODERS, SAE
from sparsary.training.embedded.corpus import TASKS, DocumentChoices, FilledPassage, embedded_document, join

HOOK = "transformer.h.2:out"
ABOUT = {
    "hook": HOOK,
    "hooks_in": [HOOK],
    "hooks_out": [HOOK],
    "model": {"id": "embedded", "device": "cpu"},
    "text": {"source": "embedded", "context_length": 32},
    "harvest": {"heldout": 0.05, "exclude_leading": 8},
}


def passages(task, count, split="train"):
    """Return passages of one task."""
    found = []
    for index in range(count):
        passage = FilledPassage(task)
        TASKS[task][0](DocumentChoices(f"{task}/{split}/{index}", split), passage, 0)
        found.append(join(passage.words))
    return found


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory, embedded_model):
    """An SAE whose first latents are directions of the model's own activations, a pool of two tasks, and examples of one."""
    folder = tmp_path_factory.mktemp("select")
    texts = [(text, task) for task in ("greater_than", "pronoun") for text in passages(task, 12)]
    # A long document, several contexts; one that is an example itself; one without words; and two rows that are not documents.
    texts.append((embedded_document(7, 1).text + " " + embedded_document(7, 2).text, "mixed"))
    examples = passages("greater_than", 4, "heldout")
    rows = [{"text": text, "task": task, "id": number} for number, (text, task) in enumerate(texts)]
    lines = [*rows[:3], "not json\n", *rows[3:], {"text": examples[0], "task": "greater_than", "id": 99}, {"other": 1}]
    x = torch.cat([embedded_model.activations(text, HOOK).values[1:] for text, _ in texts[:24]])
    torch.manual_seed(0)
    sae = SAE(128, 61, ENCODERS["topk"](k=4))
    with torch.no_grad():
        rows_ = torch.nn.functional.normalize(x[torch.randperm(len(x))[:61]] - x.mean(0), dim=-1)
        sae.b_dec.copy_(x.mean(0))
        sae.W_enc.copy_(rows_)
        sae.W_dec.copy_(rows_)
    sae.save(folder / "run", ABOUT)
    pool = write_lines(folder / "pool.jsonl", lines)
    like = write_lines(folder / "like.jsonl", [{"text": text} for text in examples])
    return {"run": str(folder / "run"), "pool": pool, "like": like, "texts": texts, "folder": folder}


@pytest.fixture(scope="module")
def found(files):
    out = files["folder"] / "out"
    keys = {"keep": 12, "truth": "task=greater_than", "top": 40}
    return sparsary.select(files["run"], files["pool"], files["like"], out=out, **keys)


def test_jaccard_is_the_sum_of_its_parts_and_that_of_its_definition():
    generator = np.random.default_rng(0)
    dense = generator.random((5, 11)) * (generator.random((5, 11)) < 0.5)
    prototype = generator.random(11) * (generator.random(11) < 0.7)
    expected = np.minimum(dense, prototype).sum(1) / np.maximum(dense, prototype).sum(1)
    rows = sparse.csr_array(dense)
    assert generalised_jaccard(rows, prototype) == pytest.approx(expected)
    assert np.asarray(contributions(rows, prototype).sum(1)).ravel() == pytest.approx(expected)


def test_a_cover_takes_what_is_new_and_begins_anew():
    rows = sparse.csr_array(np.array([[3, 2, 1, 0, 0], [2.5, 2, 0, 0, 0], [0, 0, 0, 1.5, 0], [0, 0, 2, 1, 0.0]]))
    prototype = np.array([3.0, 2, 2, 1.5, 4])
    order = greedy_cover(rows, 4)
    # The fourth adds 1 + 1, the third then only 0.5, and nothing is left for the second but a new beginning.
    assert order.tolist() == [0, 3, 2, 1]
    assert coverage(rows, prototype, order[:2]) == pytest.approx(8 / 12.5)
    assert coverage(rows, prototype, [0, 1]) == pytest.approx(6 / 12.5)
    assert greedy_cover(rows[[0, 0, 2]], 3).tolist() == [0, 2, 1]


def test_word_scores_are_scikit_learns_and_bm25_by_hand(files):
    from sklearn.feature_extraction.text import TfidfVectorizer

    pool, examples = [text for text, _ in files["texts"]], passages("pronoun", 3, "heldout")
    vocabulary = Vocabulary()
    counts = vocabulary.counts(pool, grow=True)
    query = vocabulary.counts(examples, grow=False)

    statistics = PoolStatistics.of([of_words(counts)])
    score = similarities(of_words(query), statistics)
    vectorizer = TfidfVectorizer().fit(pool)
    prototype = np.asarray(vectorizer.transform(examples).mean(0)).ravel()
    expected = vectorizer.transform(pool) @ (prototype / np.linalg.norm(prototype))
    assert score["tfidf"](of_words(counts)) == pytest.approx(expected, rel=1e-6)
    dense, wanted, n = counts.toarray(), query.toarray().mean(0), len(pool)
    present = (dense > 0).sum(0)
    idf = np.log(1 + (n - present + 0.5) / (present + 0.5))
    length = dense.sum(1, keepdims=True) / dense.sum(1).mean()
    bm25 = (wanted * idf * dense * 2.5 / (dense + 1.5 * (0.25 + 0.75 * length))).sum(1)
    assert score["bm25"](of_words(counts)) == pytest.approx(bm25)
    assert vocabulary.counts(["zyzzyva"], grow=False).nnz == 0


def of_words(words):
    """Return documents of which only the words are known."""
    n = words.shape[0]
    return PooledDocuments({"words": words}, np.zeros((n, 2)), np.ones(n, int), np.arange(n), np.zeros((n, 2), int))


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_pooled_codes_are_those_of_each_document_alone(files, embedded_model, pooling):
    from sparsary.eval.probing.subject import probe_target
    from sparsary.training.recipe import TextSection

    sae = sparsary.load(files["run"])
    subject = probe_target(sae, embedded_model, ABOUT | {"harvest": {"exclude_leading": 1}})
    text = TextSection(source="files", files=(files["pool"],), packing="separate", context_length=32)
    reader = PoolReader(subject, text, pooling, Vocabulary(), True, 10_000)
    pooled = joined_documents(list(reader.windows()))
    assert len(pooled) == 26
    assert reader.skipped == ["lines that are no JSON object with the key 'text': 2"]
    bos = embedded_model.tokenizer.bos_token_id
    for number in (0, 13, 24):
        words = files["texts"][number][0]
        ids = embedded_model.tokenizer(words)["input_ids"]
        parts = [torch.tensor([[bos, *ids[start : start + 31]]]) for start in range(0, len(ids), 31)]
        x = torch.cat([embedded_model.activations(part, (HOOK,))[HOOK][0, 1:] for part in parts])
        codes = sae.encode(x).to_dense(61) * sae.atoms.norm(dim=-1)
        expected = codes.amax(0) if pooling == "max" else codes.mean(0)
        assert pooled.units["latents"][[number]].toarray()[0, :61] == pytest.approx(expected.detach().numpy(), abs=1e-4)
        assert pooled.tokens[number] == len(x)
        signed = torch.cat([x.relu(), (-x).relu()], 1)
        expected = signed.amax(0) if pooling == "max" else signed.mean(0)
        assert pooled.units["dimensions"][[number]].toarray()[0] == pytest.approx(expected.numpy(), abs=1e-4)
        assert pooled.activation[number] == pytest.approx(x.mean(0).numpy(), abs=1e-4)
    # The long document has several contexts.
    assert pooled.tokens[24] > 31


def test_chosen_rows_keep_their_keys_and_say_why(files, found):
    rows = [json.loads(line) for line in (files["folder"] / "out" / "chosen.jsonl").read_text().splitlines()]
    assert [row["selection"]["rank"] for row in rows] == list(range(1, 13))
    scores = [row["selection"]["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    by_id = {number: (text, task) for number, (text, task) in enumerate(files["texts"])}
    assert all((row["text"], row["task"]) == by_id[row["id"]] for row in rows)
    # The example in the pool is left out, though nothing is more like the examples.
    assert found["identical"] == 1
    assert 99 not in {row["id"] for row in rows}
    assert sum(row["task"] == "greater_than" for row in rows) == 12
    causes = rows[0]["selection"]["causes"]
    assert causes
    assert all(cause["lift"] > 0 for cause in causes)


def test_the_table_has_every_method_and_the_page_shows_it(files, found):
    assert [row["method"] for row in found["methods"]] == ["latents", "neurons", "dimensions", "activation", "tfidf", "bm25"]
    assert found["methods"][0]["precision"] == 1
    assert found["methods"][0]["average_precision"] == pytest.approx(1)
    assert all(0 <= row["recovered"] <= 1 and 0 <= row["auroc"] <= 1 for row in found["methods"])
    # Parts of the similarity add up to it.
    scores = [entry["score"] for entry in found["shown"] if entry["rank"]]
    assert sum(entry["chosen"] for entry in found["latents"]) <= np.mean(scores) + 1e-9
    head, rows = select_table(found)
    assert all(len(row) == len(head) for row in rows)
    assert dict(select_summary(found))["left out"] == "1 documents of the pool that are examples"
    page = found.html
    for words in ("TF-IDF", "BM25", "Latents behind the choice", "sparsary select", "The", "not chosen"):
        assert words in page
    assert sparsary.render(found["path"]).read_text(encoding="utf-8") == page


def test_the_pool_is_read_once_for_several_examples(files, found, tmp_path, monkeypatch):
    out = files["folder"] / "out"
    manifest = json.loads((out / "pool" / "pool.json").read_text())
    assert stored_pool(out / "pool", manifest["key"] | {"pooling": "mean"}) is None
    store, seen = sparsary.eval.select.run.store_pool, []
    monkeypatch.setattr("sparsary.eval.select.run.store_pool", lambda *given: seen.append(1) or store(*given))
    like = write_lines(tmp_path / "like.jsonl", [{"text": text} for text in passages("pronoun", 4, "heldout")])
    keys = {"keep": 0.3, "top": 40, "out": out, "diverse": True}
    again = sparsary.select(files["run"], files["pool"], like, **keys)
    assert not seen
    assert again["chosen"] == 8
    assert again["diverse"]["coverage"] >= again["diverse"]["coverage_of_best"] > 0.3
    rows = [json.loads(line) for line in (out / "chosen.jsonl").read_text().splitlines()]
    assert sum(row["task"] == "pronoun" for row in rows) > 3
    # Another pool is not taken for the one in the folder.
    other = write_lines(tmp_path / "pool.txt", ["\n\n".join(text for text, _ in files["texts"])])
    by_text = sparsary.select(files["run"], other, like, keep=0.3, top=40, out=out, by="tfidf")
    assert seen == [1]
    row = json.loads((out / "chosen.jsonl").read_text().splitlines()[0])
    assert set(row) == {"text", "selection"}
    assert by_text["documents"] == 25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0}, "--keep: expected a share below 1 or a number of documents, got 0"),
        ({"keep": 1000}, "--keep: expected at most 26, the documents of the pool, got 1,000"),
        ({"by": "latent"}, "--by: expected one of .* got 'latent'. Did you mean 'latents'"),
        ({"pool": "none.jsonl"}, "--pool: none.jsonl does not exist. Give an existing path.$"),
        ({"like": "none.xyz"}, "--like: expected .txt, .json, .jsonl, .parquet, got none.xyz"),
        ({"column": "words"}, "expected a JSON object with the key 'words'"),
        ({"truth": "task=none"}, "--truth: expected documents of the pool with task = none, got none. Keys: id, task, text"),
        ({"diverse": True, "by": "bm25"}, "--diverse: expected --by latents"),
    ],
)
def test_mistakes_are_one_line(files, found, change, words):
    given = {"pool": files["pool"], "like": files["like"], "out": files["folder"] / "out", "top": 40} | change
    with pytest.raises(ValueError, match=words) as error:
        sparsary.select(files["run"], **given)
    assert "\n" not in str(error.value)


def test_rows_of_every_kind_of_file_are_found_again(tmp_path):
    import pandas as pd

    from sparsary.training.bad_rows import BadTexts
    from sparsary.training.recipe import TextSection
    from sparsary.training.text import documents
    from sparsary.training.text_rows import rows_at

    rows = [{"text": text, "id": number} for number, text in enumerate(["a", "  ", "b", "c"])]
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "j.json").write_text(json.dumps(rows))
    (tmp_path / "s.json").write_text(json.dumps([row["text"] for row in rows]))
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "t.txt").write_text("\n\n".join(row["text"] for row in rows))
    for name in ("p.parquet", "j.json", "s.json", "l.jsonl", "t.txt"):
        section = TextSection(source="files", files=(str(tmp_path / name),))
        read = [document for _, document in documents(section, 0, lambda _: True, BadTexts(section))]
        assert [str(document) for document in read] == ["a", "b", "c"]
        path, last = read[-1].place
        assert [row["text"] for _, row in rows_at(path, [read[0].place[1], last], section)] == ["a", "c"]
        whole = next(iter(rows_at(path, [last], section)))[1]
        assert whole == ({"text": "c", "id": 3} if name[0] in "pjl" else {"text": "c"})


def test_documents_of_one_kind_are_found_where_words_are_shared(recipe_values, tmp_path, monkeypatch):
    studies = Path(__file__).parents[3] / "docs" / "studies"
    monkeypatch.syspath_prepend(studies)
    study = runpy.run_path(str(studies / "data_selection.py"))
    recipe_values["harvest"] |= {"tokens": 100_000, "shard_tokens": 50_000}
    recipe_values["dictionary"] |= {"n_latents": 512, "encoder": {"name": "topk", "k": 16}}
    run = sparsary.train(recipe_values | {"tokens": 300_000, "batch_tokens": 1024, "lr": 2e-3, "dead_after_tokens": 50_000})
    kinds = ("agreement simple", "agreement object_rc", "agreement subject_rc", "pronoun")
    study["write_documents"](tmp_path / "pool.jsonl", kinds, 100, 0, "train")
    for kind in kinds[:3]:
        study["write_documents"](tmp_path / "like.jsonl", [kind], 16, 0, "heldout")
        keys = {"keep": 0.05, "truth": f"kind={kind}", "out": tmp_path / "out"}
        found = sparsary.select(run, tmp_path / "pool.jsonl", tmp_path / "like.jsonl", **keys)
        methods = {row["method"]: row for row in found["methods"]}
        assert methods["latents"]["precision"] >= 0.95
        assert methods["latents"]["precision"] > methods["tfidf"]["precision"] + 0.2
        assert methods["latents"]["average_precision"] > methods["tfidf"]["average_precision"] + 0.1
