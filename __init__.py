"""sparsary: train, load and judge sparse dictionaries of language-model activations. The public names and the command line."""

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from . import eval, sae, training, transcoders  # noqa: A004
    from .eval.attribution_graphs.run import attribution_graph
    from .eval.circuits.benchmark import CircuitSettings, circuits
    from .eval.compare.run import compare
    from .eval.features.run import Explainer, features
    from .eval.info import CheckpointInfo, info
    from .eval.metrics.inference import InferenceMode
    from .eval.pages.render import render_file as render
    from .eval.probing.run import ProbingResults, probe
    from .eval.report.evaluate import evaluate, evaluate_all
    from .sae import ENCODERS, SAE, Encoder, SparseCode, SparseDictionary
    from .sae.hub import push_to_hub
    from .training.activations.read import read_activations
    from .training.run import harvest, train
    from .transcoders import CrossLayerTranscoder, Stack, Transcoder
    from .transcoders.convert import Converted, convert
    from .transcoders.load import CheckpointOptions, load

    __version__: str

__all__ = [
    "ENCODERS",
    "SAE",
    "CheckpointInfo",
    "CheckpointOptions",
    "CircuitSettings",
    "Converted",
    "CrossLayerTranscoder",
    "Encoder",
    "Explainer",
    "InferenceMode",
    "ProbingResults",
    "SparseCode",
    "SparseDictionary",
    "Stack",
    "Transcoder",
    "__version__",
    "attribution_graph",
    "circuits",
    "compare",
    "convert",
    "eval",
    "evaluate",
    "evaluate_all",
    "features",
    "harvest",
    "info",
    "load",
    "probe",
    "push_to_hub",
    "read_activations",
    "render",
    "sae",
    "train",
    "training",
    "transcoders",
]

LAYERS = ("sae", "transcoders", "training", "eval")
# Where the public names are defined. Importing them waits for their first use: torch alone takes seconds.
_HOMES = {
    "sae": "ENCODERS SAE Encoder SparseCode SparseDictionary",
    "sae.hub": "push_to_hub",
    "transcoders": "CrossLayerTranscoder Stack Transcoder",
    "transcoders.convert": "Converted convert",
    "transcoders.load": "CheckpointOptions load",
    "training.activations.read": "read_activations",
    "training.run": "harvest train",
    "eval.attribution_graphs.run": "attribution_graph",
    "eval.circuits.benchmark": "CircuitSettings circuits",
    "eval.compare.run": "compare",
    "eval.features.run": "Explainer features",
    "eval.info": "CheckpointInfo info",
    "eval.metrics.inference": "InferenceMode",
    "eval.pages.render": "render",
    "eval.probing.run": "ProbingResults probe",
    "eval.report.evaluate": "evaluate evaluate_all",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

# Type checkers read the imports above instead, and so see real signatures and misspelt names.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib import metadata

            try:
                value = metadata.version("sparsary")
            except metadata.PackageNotFoundError:
                # On the path, but not installed.
                value = "0+unknown"
        elif name in LAYERS:
            value = importlib.import_module(f".{name}", __name__)
        elif name in _HOME_OF:
            # Below, because it loads torch; and so does whatever it is for.
            from .sae.extras import needs

            with needs(f"sparsary.{name}", "eval" if _HOME_OF[name].startswith("eval.") else None):
                module = importlib.import_module(f".{_HOME_OF[name]}", __name__)
            value = getattr(module, "render_file" if name == "render" else name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def command_line() -> "typer.Typer":
    """Join the commands of the layers to the command ``sparsary``."""
    import typer

    from .eval.cli import app as evaluation
    from .training.bench.cli import app as bench
    from .training.cli import app as training_

    app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
    app.add_typer(training_)
    app.add_typer(evaluation)
    app.add_typer(bench, name="bench")
    return app


def main() -> None:
    """The console script. What a user can mend ends with status 2 and one message, without traceback."""
    # Read when torch is first loaded. By default OpenMP's threads go on spinning after a product and keep the processor from
    # whatever comes next: reading, compiled kernels, other processes. Harvest and training took twice to four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Their notes on requests and caches are not ours.
    for name in ("httpx", "urllib3", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        status, message = _run()
    except ModuleNotFoundError as error:
        status, message = 2, _missing(error)
    if message:
        sys.stderr.write(f"{message}\n")
    sys.exit(status)


def _run() -> tuple[int, str]:
    """The status of the command, and what to say at its end."""
    import typer

    from .training.signals import Stopped

    try:
        # Not standalone: errors are to be shown our way. Ctrl-C comes back as status 130.
        status = command_line()(standalone_mode=False) or 0
    except typer.TyperException as error:
        return 2, f"sparsary: {error.format_message()} Try: sparsary --help"
    except Stopped as stopped:
        return 128 + stopped.signal_number, str(stopped)
    except (ValueError, OSError) as error:
        return 2, f"sparsary: {error}"
    return status, "Stopped. What was complete is saved; the same command continues." if status == 130 else ""


def _missing(error: ModuleNotFoundError) -> str:
    """The extra that a command needs. Raise the error again if no extra has the module."""
    # Here, because it loads torch, which help is to do without.
    from .sae.extras import MissingPackageError, needs

    command = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    evaluates = command in ("eval", "features", "probe", "circuits", "compare", "info", "render")
    try:
        with needs(f"sparsary {command}".strip(), "eval" if evaluates else None):
            raise error
    except MissingPackageError as missing:
        return str(missing)
