"""Shared fixtures, and what makes tests quick and alike on every machine."""

import functools
import gc
import importlib.util
import json
import os
import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# Collecting makes millions of objects that stay: it is of no use to look for garbage among them again and again.
gc.disable()


def beside(name):
    """Load a module of this folder, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Before sparsary is imported, because functions are wrapped when their module is loaded.
PLUGINS = [beside("shape_checks"), beside("selection")]

# One thread each, because two workers share two cores. Processes that tests start inherit it: other thread counts round
# differently, and runs are compared bit for bit. `make portable` uses two.
THREADS = os.environ.get("SPARSARY_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS

# No test asks the hub, nor does a process that one starts: without a network, a model that is not there takes a minute of
# attempts. huggingface_hub reads this when it is imported. Tests marked `network` are run with HF_HUB_OFFLINE=0.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No test cuts the power: what is written needs not reach the disk. Processes that tests start do sync.
os.fsync = lambda handle: None

import torch  # noqa: E402

torch.set_num_threads(int(THREADS))

if not torch.cuda.is_available():
    # The same for this processor. torch would note the seed for every kind of GPU, each time with the stack as text: a tenth of
    # the time of short tests.
    torch.manual_seed = torch.default_generator.manual_seed

# For `make portable`: sum products in another order, as another CPU would.
if os.environ.get("SPARSARY_TEST_PRODUCTS") == "reordered":
    REORDERED = beside("other_products").reorder_products()

SPECS = beside("encoder_specs")
HOOK = "transformer.h.2:out"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def load_beside():
    """Return a function that loads a module of this folder by name."""
    return beside


@pytest.fixture(params=SPECS.TRAINED, ids=SPECS.spec_id)
def trained_spec(request):
    """Each encoder that trains, as a recipe names it."""
    return request.param


@pytest.fixture(params=SPECS.DIVIDED, ids=SPECS.spec_id)
def divided_spec(request):
    """Each encoder whose latents several ranks can hold."""
    return request.param


@pytest.fixture(scope="session")
def encoder_specs():
    """All encoders that train, and those of them that are divided or not."""
    return SPECS


def pytest_configure(config):
    for plugin in PLUGINS:
        config.pluginmanager.register(plugin, plugin.__name__)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Cache file digests separately from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSARY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _compiled_by_one_worker(tmp_path_factory):
    """Let the other workers wait while one compiles a kernel, and load it from its file then, rather than all compile it."""
    try:
        from numba.core.dispatcher import Dispatcher
    except ImportError:
        yield
        return
    from filelock import FileLock

    # The parent of all workers' folders.
    lock, compile_ = FileLock(tmp_path_factory.getbasetemp().parent / "numba.lock"), Dispatcher.compile

    def compile_alone(dispatcher, signature):
        with lock.acquire(poll_interval=0.02):
            return compile_(dispatcher, signature)

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(Dispatcher, "compile", compile_alone)
        yield


@pytest.fixture(autouse=True, scope="session")
def _documents_made_once():
    """Keep the documents of the embedded corpus, which most runs read: making them is a tenth of a small run's time."""
    from sparsary.training.embedded import corpus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "embedded_document", functools.lru_cache(maxsize=20_000)(corpus.embedded_document))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_same_tensors():
    """Return a function that asserts that two dictionaries have bit-identical tensors.

    Outputs may differ: tensors of a mapped file lie elsewhere in memory, which affects how products round.
    """

    def check(first, second):
        one, other = first.state_dict(), second.state_dict()
        assert one.keys() == other.keys()
        assert {name: t.dtype for name, t in one.items()} == {name: t.dtype for name, t in other.items()}
        assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]

    return check


@pytest.fixture(scope="session")
def encoder_arguments():
    """Return arguments for small shapes, one entry per encoder."""
    return {
        "topk": {"k": 3},
        "mutual_choice": {"k": 3},
        "feature_choice": {"k": 3, "budget": "zipf", "rerank_every": 3},
        "gradient_topk": {"k": 3, "beta": 4.0, "normalize": "token"},
        "matching_pursuit": {"k": 3, "tolerance": 0.0},
        "batch_topk": {"k": 3},
        "matryoshka": {"k": 3, "shares": [0.25, 0.5, 1.0], "sampled": 0},
        "lista": {"k": 3, "steps": 1, "eta": 0.3, "budget": "batch", "select": "hard", "shares": [1.0]},
        "multi_topk": {"k": 3, "weight": 0.125},
        "signed_topk": {"k": 3, "by": "size"},
        "relu": {"sparsity": 0.1, "target_l0": 3, "ramp": 0.1, "pre_act_loss": 0.03, "penalty_form": "l1"},
        "jumprelu": {
            "target_l0": 3,
            "sparsity": 1.0,
            "bandwidth": 0.3,
            "penalty": "square",
            "steepness": 4.0,
            "ramp": 0.0,
            "pre_act_loss": 0.03,
            "start": 1.0,
        },
        "gated": {"sparsity": 0.1, "target_l0": 3, "ramp": 0.1, "pre_act_loss": 0.03},
    }


@pytest.fixture(scope="session")
def outlined_once():
    """Build the embedded model without weights once for all recipes: building it is a third of a small run's time.

    Only where recipes are resolved. Tests of ``skeleton`` itself call the original, and other models are built every time.
    """
    from sparsary.training import resolve_hooks

    build, built = resolve_hooks.skeleton, {}

    def skeleton(section):
        if section.id != "embedded":
            return build(section)
        key = section.model_dump_json()
        if key not in built:
            model = built[key] = build(section)
            # A pass of the model for every new set of hooks, not for every run.
            model.widths = functools.cache(model.widths)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve_hooks, "skeleton", skeleton)
        yield


@pytest.fixture
def recipe_values(tmp_path, outlined_once):
    """Return the values of a recipe that runs in seconds: 6,000 tokens of the embedded model, 30 steps."""
    return {
        "text": {"context_length": 32},
        "harvest": {
            "hooks": [HOOK],
            "tokens": 6000,
            "store": str(tmp_path / "store"),
            "shard_tokens": 2000,
            "exclude_leading": 2,
        },
        "dictionary": {"hook": HOOK, "n_latents": 67, "encoder": {"name": "topk", "k": 5}},
        "tokens": 3030,
        "batch_tokens": 101,
        "lr_warmup_steps": 5,
        "dead_after_tokens": 500,
        "out_dir": str(tmp_path / "run"),
        "log_every": 5,
        "save_every": 10,
        "eval_tokens": 2000,
    }


@pytest.fixture
def write_recipe(tmp_path):
    """Return a function that writes values as a recipe file (JSON is YAML) and returns its path."""

    def write(values, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return str(path)

    return write


@pytest.fixture
def count_calls(monkeypatch):
    """Return a call counter: ``count_calls((module, "function"), ...)`` returns a live mapping from names to counts."""

    def count(*functions):
        seen = {name: 0 for _, name in functions}

        def watch(module, name):
            real = getattr(module, name)

            def watched(*arguments, **options):
                seen[name] += 1
                return real(*arguments, **options)

            monkeypatch.setattr(module, name, watched)

        for module, name in functions:
            watch(module, name)
        return seen

    return count


@pytest.fixture
def files_of_at_most():
    """Return a context in which this process can write no file past a size, as if the disk were full there."""
    # A module that Windows does not have.
    import resource

    @contextmanager
    def limited(size):
        # Python ignores the signal that comes with it.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


class _StopAfter:
    """Replacement for ``StopRequest.requested`` that is true after a number of steps."""

    def __init__(self, steps):
        self.left = steps

    def __get__(self, stop, _owner):
        self.left -= 1
        if self.left < 0:
            stop.signal_number = signal.SIGTERM
        return self.left < 0


@pytest.fixture
def stopped_after():
    """Return a context manager in which a run is asked to stop after a number of steps."""

    @contextmanager
    def stopped(steps):
        from sparsary.training.signals import Stopped, StopRequest

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopRequest, "requested", _StopAfter(steps))
            with pytest.raises(Stopped):
                yield

    return stopped


@pytest.fixture
def no_page(monkeypatch):
    """Leave out the drawing of reports' pages: of evaluations this small, it is the larger part."""
    monkeypatch.setattr("sparsary.eval.report.candidate.render_file", lambda path: path.with_suffix(".html"))


@pytest.fixture(scope="session")
def planted():
    """Return a sampler of sparse sums of 23 known directions in 17 dimensions, 2.3 per token on average, plus noise."""
    generator = torch.Generator().manual_seed(11)
    truth = torch.nn.functional.normalize(torch.randn(23, 17, generator=generator), dim=-1)

    def draw(tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        fires = torch.rand(tokens, 23, generator=generator) < torch.linspace(0.02, 0.18, 23)
        strengths = 0.5 + torch.rand(tokens, 23, generator=generator)
        return (fires * strengths) @ truth + 0.01 * torch.randn(tokens, 17, generator=generator)

    return draw


@pytest.fixture(scope="session")
def train_on_planted(planted):
    """Return a function that trains an SAE on planted data, with 257 fresh tokens per step."""

    def train(sae, steps, seed=0):
        optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
        sae.train()
        for step in range(steps):
            x = planted(257, 1000 * (seed + 1) + step)
            (sae(x) - x).pow(2).sum(-1).mean().backward()
            sae.project_grad()
            optimizer.step()
            optimizer.zero_grad()
            sae.renormalize()
        return sae

    return train


@pytest.fixture(scope="session")
def embedded_model():
    """Return the language model that ships with the package."""
    from sparsary.training.activations.model import load_model
    from sparsary.training.recipe import ModelSection

    return load_model(ModelSection(device="cpu"))


@pytest.fixture(scope="session")
def build_format():
    """Return ``build_format(name, folder)``, which writes a tiny dictionary and returns the metadata its files lack."""
    module = beside("tiny_formats")

    def build(name, folder, d=128):
        folder.mkdir(parents=True, exist_ok=True)
        return module.BUILD[name](folder, d)

    return build


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of real models and texts, which users do not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the project's shared test data (models, texts), which is not part of the repository")
    return SHARED_DATA


class _ExactGemmaNorm(torch.nn.Module):
    """Gemma's norm in the model's own precision; transformers' computes in float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


@pytest.fixture(scope="session")
def tiny_model():
    """Return a builder of random three-block language models in float64, with random biases and norm weights."""
    import transformers

    from sparsary.training.activations.model import LanguageModel

    tokens = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = tokens | {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    shared = sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}
    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    gemma = shared | {"head_dim": 8, "sliding_window": 3, "layer_types": windows, "max_position_embeddings": 32}
    families = {
        "gpt2": ("GPT2Config", tokens | {"n_layer": 3, "n_embd": 12, "n_head": 2, "n_positions": 32}),
        "gpt_neox": ("GPTNeoXConfig", sizes | {"use_parallel_residual": True}),
        "gpt_neox sequential": ("GPTNeoXConfig", sizes | {"use_parallel_residual": False}),
        # Eight dimensions per head: together they are wider than the residual stream.
        "llama": ("LlamaConfig", shared | {"head_dim": 8}),
        "qwen2": ("Qwen2Config", shared | {"hidden_size": 16}),
        "qwen3": ("Qwen3Config", shared | {"head_dim": 8}),
        # Windows of three tokens in the first and the last layer; caps low enough to bend scores and logits.
        "gemma2": (
            "Gemma2Config",
            gemma | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
        ),
        "gemma3": ("Gemma3TextConfig", gemma | {"query_pre_attn_scalar": 5}),
    }

    def build(family, dtype=torch.float64):
        name, values = families[family]
        torch.manual_seed(5)
        module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                # Initial biases are zero, norms one, and matrices so small that the MLP is almost linear.
                parameter.add_(0.2 * torch.randn_like(parameter))
        for path, part in list(module.named_modules()):
            # Llama's norms always compute in float32; torch's are the same function.
            if type(part).__name__.startswith("Gemma"):
                if type(part).__name__.endswith("RMSNorm"):
                    module.set_submodule(path, _ExactGemmaNorm(part))
            elif type(part).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(part.weight.shape[0], eps=part.variance_epsilon, dtype=dtype)
                exact.weight = part.weight
                module.set_submodule(path, exact)
        return LanguageModel(module, None, family, None)

    return build


@pytest.fixture(scope="session")
def random_transcoders():
    """Return a builder of random transcoders for layers 0 to 2: TopK with skip path, gated with skip path, ReLU."""
    from sparsary.sae import ENCODERS
    from sparsary.transcoders.transcoder import Transcoder

    def one(width, dtype, encoder, skip):
        built = Transcoder(width, width, 19, encoder, skip=skip).to(dtype)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_()
            built.in_centre.normal_()
        built.in_scale.fill_(1.3)
        built.out_scale.fill_(0.7)
        return built.requires_grad_(False).eval()

    def build(width, dtype=torch.float64):
        return {
            0: one(width, dtype, ENCODERS["topk"](k=4), skip=True),
            1: one(width, dtype, ENCODERS["gated"](), skip=True),
            2: one(width, dtype, ENCODERS["relu"](), skip=False),
        }

    return build


class _Stub:
    """Requests that the server received, and its reply: a function from request to (status, body, headers) or a body."""

    def __init__(self, reply):
        self.reply, self.requests, self.headers = reply, [], []


@pytest.fixture
def serving():
    """Return a local server that answers with a function of the request: ``with serving(reply) as (url, stub)``."""
    return _serving


@contextmanager
def _serving(reply):
    stub = _Stub(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(request)
            stub.headers.append(dict(self.headers))
            said = stub.reply(request)
            status, body, headers = said if isinstance(said, tuple) else (200, said, {})
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def stream_model():
    """Return a builder of language models with two MLPs, each followed by a fixed average over positions; linear by default.

    ``twins`` duplicates every neuron of the first MLP and halves the output of each.
    """
    from types import SimpleNamespace

    from torch import nn

    from sparsary.training.activations.model import LanguageModel

    class Stream(nn.Module):
        def __init__(self, activation, norm, bias, twins):
            super().__init__()
            self.wte = nn.Embedding(41, 12)
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {
                        "norm": norm(),
                        "up": nn.Linear(12, 7, bias=bias),
                        "act": activation(),
                        "down": nn.Linear(7, 12, bias=bias),
                    }
                )
                for _ in range(2)
            )
            self.norm, self.head = norm(), nn.Linear(12, 41, bias=bias)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)
            if twins:
                first = self.layers[0]
                up, down = (nn.Linear(*size, bias=bias) for size in ((12, 14), (14, 12)))
                up.weight = nn.Parameter(first["up"].weight.repeat(2, 1))
                down.weight = nn.Parameter(first["down"].weight.repeat(1, 2) / 2)
                if bias:
                    up.bias, down.bias = nn.Parameter(first["up"].bias.repeat(2)), first["down"].bias
                first["up"], first["down"] = up, down

        def get_input_embeddings(self):
            return self.wte

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            x = self.wte(input_ids)
            mixed = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
            mixed = mixed / mixed.sum(-1, keepdim=True)
            for layer in self.layers:
                x = x + mixed @ layer["down"](layer["act"](layer["up"](layer["norm"](x))))
            return SimpleNamespace(logits=self.head(self.norm(x)))

    def build(activation=nn.Identity, norm=nn.Identity, bias=True, twins=False, dtype=torch.float64):
        torch.manual_seed(7)
        return LanguageModel(Stream(activation, norm, bias, twins).to(dtype), None, "stream", None)

    return build


@pytest.fixture(scope="session")
def random_pairs():
    """Return a builder of pairs that differ at positions 1 and 3, with a question at the end, padded to the longest."""
    from sparsary.eval.circuits.tasks.pairs import PromptPairs, Question

    def build(n=5, positions=6, lengths=None, metric="logit_diff"):
        generator = torch.Generator().manual_seed(3)
        clean = torch.randint(3, 41, (n, positions), generator=generator)
        corrupted = clean.clone()
        corrupted[:, [1, 3]] = 3 + (corrupted[:, [1, 3]] - 3 + torch.randint(1, 38, (n, 2), generator=generator)) % 38
        lengths = torch.tensor([positions] * n if lengths is None else lengths)
        for ids in (clean, corrupted):
            ids[torch.arange(positions)[None] >= lengths[:, None]] = 0
        questions = tuple((Question(int(length) - 1, (3 + row,), (20 + row,)),) for row, length in enumerate(lengths))
        return PromptPairs("random", "tokens", clean, corrupted, questions, lengths, metric)

    return build


@pytest.fixture(scope="session")
def gpt2_tokens(shared_data):
    """Return GPT-2's tokenizer in a language model that cannot be run."""
    import transformers

    from sparsary.training.activations.model import LanguageModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "gpt2"))
    return LanguageModel(torch.nn.Linear(1, 1), tokenizer, "gpt2", None)


@pytest.fixture(scope="session")
def word_model():
    """Return a builder of models, which cannot be run, with a tokenizer of words with and without a leading space.

    Two-digit numbers and single characters are tokens too. ``ends`` are the tokens added before and after a text.
    """
    import tokenizers
    import transformers

    from sparsary.training.activations.model import LanguageModel

    def build(words, ends=("<bos>", "<eos>"), numbers=range(100)):
        pieces = [space + word for word in [*words, *(f"{number:02d}" for number in numbers)] for space in ("", " ")]
        vocabulary = dict.fromkeys(["<unk>", "<bos>", "<eos>", *pieces, *map(chr, range(32, 127)), "\n"])
        model = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>")
        backend = tokenizers.Tokenizer(model)
        cut = tokenizers.Regex(r" ?[A-Za-z]+| ?\d\d|[\s\S]")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(cut, "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        first, last = ends
        template = " ".join(piece for piece in (first, "$A", last) if piece)
        special = [(piece, vocabulary_id) for vocabulary_id, piece in enumerate(vocabulary) if piece in ends]
        backend.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
        names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        return LanguageModel(torch.nn.Linear(1, 1), tokenizer, "words", None)

    return build
