"""Python code of a model's repository never runs unasked, whatever is answered on the terminal."""

import ast
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import transformers

import sparsary
from sparsary import CheckpointOptions, evaluate
from sparsary.eval.features.run import Explainer
from sparsary.sae import SAE
from sparsary.sae.encoders import build_encoder
from sparsary.training.activations.model import load_model, skeleton
from sparsary.training.activations.model_source import RemoteCodeRefused, section_content
from sparsary.training.embedded import MODEL_DIR
from sparsary.training.embedded.corpus import embedded_document
from sparsary.training.recipe import ModelSection
from sparsary.training.run import train

ROOT = Path(__file__).parents[2]
LAYERS = ("sae", "transcoders", "training", "eval", "docs")
# What loads a model, a tokenizer, a configuration or a data set, and may run what lies beside it.
LOADERS = {
    "from_pretrained",
    "from_config",
    "load_dataset",
    "load_dataset_builder",
    "pipeline",
    "get_class_from_dynamic_module",
}
CODE = """open({mark!r}, "w").close()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


class PlantedConfig(GPT2Config):
    model_type = "planted"


class PlantedModel(GPT2LMHeadModel):
    config_class = PlantedConfig


class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "planted.PlantedConfig",
    "AutoModelForCausalLM": "planted.PlantedModel",
    "AutoTokenizer": ["planted.PlantedTokenizer", None],
}


@pytest.fixture
def documents_file(tmp_path):
    """A text of the embedded corpus' words."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(embedded_document(1, number).text for number in range(300)))
    return str(path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Makes a copy of the embedded model whose ``parts`` are to come from code of its own; a mark says that it ran."""
    folder, mark = tmp_path / "planted", tmp_path / "RAN"
    # Whoever is asked agrees.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(*parts, kind="planted"):
        shutil.copytree(MODEL_DIR, folder)
        (folder / "planted.py").write_text(CODE.format(mark=str(mark)))
        named = {name: AUTO_MAP[name] for name in parts}
        edit(folder / "config.json", model_type=kind, auto_map={k: v for k, v in named.items() if k != "AutoTokenizer"})
        if "AutoTokenizer" in named:
            changes = {"auto_map": {"AutoTokenizer": named["AutoTokenizer"]}, "tokenizer_class": "PlantedTokenizer"}
            edit(folder / "tokenizer_config.json", **changes)
        return str(folder), mark

    return make


def calls_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def test_every_loader_is_told_whether_code_may_run():
    seen = 0
    for path in sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\w*trust_remote_code(: bool)? ?= ?True", source), path
        if not any(name in source for name in LOADERS):
            continue
        tree = ast.parse(source)
        for name, call in calls_of(tree):
            # Our own loader does not run code unless it is told to; peft's reads the weights of an adapter, for a model that is
            # loaded already.
            if name not in LOADERS or ast.unparse(call.func).endswith(
                ("LanguageModel.from_pretrained", "PeftModel.from_pretrained")
            ):
                continue
            seen += 1
            told = {ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"}
            assert told, f"{path}:{call.lineno}: {name} without trust_remote_code"
            assert told <= {"False", "section.trust_remote_code"}, f"{path}:{call.lineno}: {told}"
        # Under another name, a loader would not be seen.
        called = {id(call.func) for _, call in calls_of(tree)}
        for node in ast.walk(tree):
            named = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            assert not isinstance(named, str) or named not in LOADERS or id(node) in called, f"{path}:{node.lineno}: {named}"
    assert seen >= 6


@pytest.mark.parametrize(
    "parts", [("AutoConfig",), ("AutoConfig", "AutoModelForCausalLM"), ("AutoTokenizer",), tuple(AUTO_MAP)], ids="-".join
)
def test_a_repository_s_code_is_refused_whatever_is_answered(planted, parts):
    model_id, mark = planted(*parts, kind="planted" if "AutoConfig" in parts else "gpt2")
    section = ModelSection(id=model_id, device="cpu")
    if parts == ("AutoTokenizer",):
        # Transformers has one for this kind of model.
        load_model(section)
    else:
        with pytest.raises(
            RemoteCodeRefused, match=r"needs Python code .* not run by default.* model\.trust_remote_code: true"
        ):
            load_model(section)
    for use in (skeleton, section_content):
        # Not all of the model is looked at here.
        with suppress(RemoteCodeRefused):
            use(section)
    assert not mark.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_needed(planted):
    model_id, mark = planted("AutoConfig", "AutoModelForCausalLM", kind="gpt2")
    model = load_model(ModelSection(id=model_id, device="cpu"))
    assert type(model.module) is transformers.GPT2LMHeadModel
    assert not mark.exists()


def test_code_named_in_another_repository_is_refused(planted):
    model_id, mark = planted("AutoConfig")
    edit(Path(model_id) / "config.json", auto_map={"AutoConfig": "somebody/else--planted.PlantedConfig"})
    with pytest.raises(RemoteCodeRefused, match="not run by default"):
        skeleton(ModelSection(id=model_id))
    assert not mark.exists()


def test_an_explainer_s_code_is_refused_with_the_way_around(planted, tmp_path):
    model_id, mark = planted(*AUTO_MAP)
    with pytest.raises(ValueError, match=r"--explainer: .*planted' needs Python code .*--address"):
        Explainer(model_id).chat(tmp_path)
    assert not mark.exists()


def test_allowed_it_runs_is_recorded_and_evaluations_ask_again(planted, recipe_values, write_recipe, documents_file, no_page):
    model_id, mark = planted(*AUTO_MAP)
    recipe_values["model"] = {"id": model_id, "device": "cpu"}
    recipe_values["text"] = {"source": "files", "files": [documents_file], "context_length": 32}
    recipe_values["harvest"]["tokens"] = 2000
    path = write_recipe(recipe_values)
    with pytest.raises(RemoteCodeRefused):
        train(path)
    assert not mark.exists()
    out = train(path, model__trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    config = json.loads((out / "dictionary.json").read_text())
    assert config["provenance"]["model"]["trust_remote_code"] is True
    assert config["provenance"]["recipe"]["model"]["trust_remote_code"] is True
    assert config["provenance"]["content"]["model"]["code"]
    # What a checkpoint's files say does not count: whoever made them may not decide it.
    for arguments in ({}, {"options": CheckpointOptions(settings={"model.dtype": "float32"})}):
        with pytest.raises(RemoteCodeRefused):
            evaluate(out, tokens=400, **arguments)
    assert evaluate(out, tokens=400, options=CheckpointOptions(trust_remote_code=True))["fvu"] < 2
    # Permission is no part of what the run is: it may be withdrawn and given again.
    assert train(path, model__trust_remote_code=True) == out


@pytest.fixture
def malicious(planted, tmp_path):
    """A checkpoint from elsewhere that says its model's code is to be trusted."""
    model_id, mark = planted(*AUTO_MAP)
    dictionary = SAE(128, 16, build_encoder({"name": "topk", "k": 2}))
    model = {"id": model_id, "revision": None, "dtype": "float32", "device": "cpu", "trust_remote_code": True}
    provenance = {
        "model": model,
        "hook": "transformer.h.1:out",
        "hooks_in": ["transformer.h.1:out"],
        "hooks_out": ["transformer.h.1:out"],
        "text": {"source": "embedded"},
        "content": {"model": {"weights": "another"}, "tokenizer": "another"},
    }
    dictionary.save(tmp_path / "gift", provenance)
    return tmp_path / "gift", mark


@pytest.mark.parametrize("command", ["eval", "features", "probe", "circuits", "info", "compare"])
def test_no_command_trusts_what_a_checkpoint_says(malicious, command, monkeypatch, tmp_path, capsys):
    import sparsary

    checkpoint, mark = malicious
    arguments = {
        "info": [
            str(checkpoint),
            "--model",
            json.loads((checkpoint / "dictionary.json").read_text())["provenance"]["model"]["id"],
        ],
        "compare": [str(checkpoint), str(shutil.copytree(checkpoint, tmp_path / "twin")), "--out", str(tmp_path / "c")],
    }.get(command, [str(checkpoint)])
    monkeypatch.setattr(sys, "argv", ["sparsary", command, *arguments])
    with pytest.raises(SystemExit) as ended:
        sparsary.main()
    assert ended.value.code
    assert "not run by default" in capsys.readouterr().err
    assert not mark.exists()


def test_a_prompt_s_graph_does_not_trust_it_either(malicious):
    from sparsary.eval.attribution_graphs.run import open_graph_target

    checkpoint, mark = malicious
    with pytest.raises(RemoteCodeRefused):
        open_graph_target(checkpoint)
    assert not mark.exists()


def test_yes_on_standard_input_runs_nothing(planted, recipe_values, write_recipe, documents_file, monkeypatch):
    """The console script in a process of its own, as a user has it; allowed, the same recipe runs the code."""
    model_id, mark = planted(*AUTO_MAP)
    recipe_values["model"] = {"id": model_id}
    recipe_values["text"] = {"source": "files", "files": [documents_file], "context_length": 32}
    path = write_recipe(recipe_values)
    command = [sys.executable, "-m", "sparsary", "train", path, "--dry-run"]
    ended = subprocess.run(command, input="y\ny\ny\n", capture_output=True, text=True, check=False)
    assert ended.returncode
    assert "--trust-remote-code" in ended.stderr
    assert not mark.exists()
    monkeypatch.setattr(sys, "argv", ["sparsary", *command[3:], "--trust-remote-code"])
    with pytest.raises(SystemExit) as allowed:
        sparsary.main()
    assert allowed.value.code in (0, None)
    assert mark.exists()
