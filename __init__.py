"""Train, evaluate and load sparse dictionaries (SAEs, transcoders, crosscoders) of language-model activations."""

import importlib
import io
import logging
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from . import eval, sae, training, transcoders  # noqa: A004
    from .eval.attribution_graphs.run import attribution_graph
    from .eval.circuits.benchmark import CircuitSettings, circuits
    from .eval.circuits.comparison.run import compare_circuits
    from .eval.circuits.mib import mib_submission
    from .eval.compare.run import compare
    from .eval.compare.similarity import similarity
    from .eval.diff.run import diff
    from .eval.features.neuronpedia.export import NeuronpediaExport
    from .eval.features.run import Explainer, features
    from .eval.info import CheckpointInfo, info
    from .eval.metrics.inference import InferenceMode
    from .eval.name.run import name
    from .eval.pages.render import render_file as render
    from .eval.probing.run import ProbingResults, probe
    from .eval.report.evaluate import evaluate, evaluate_all
    from .eval.result import Features, Report
    from .eval.select.run import SelectSettings, select
    from .eval.steer.run import steer
    from .sae import ENCODERS, SAE, Encoder, SparseCode, SparseDictionary
    from .sae.hub import push_to_hub
    from .training.activations.model import LanguageModel
    from .training.activations.read import read_activations
    from .training.run import harvest, train
    from .transcoders import Crosscoder, CrossLayerTranscoder, Stack, Transcoder
    from .transcoders.convert import Converted, convert
    from .transcoders.load import CheckpointOptions, load
    from .transcoders.releases import published

    __version__: str

__all__ = [
    "ENCODERS",
    "SAE",
    "CheckpointInfo",
    "CheckpointOptions",
    "CircuitSettings",
    "Converted",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Encoder",
    "Explainer",
    "Features",
    "InferenceMode",
    "LanguageModel",
    "NeuronpediaExport",
    "ProbingResults",
    "Report",
    "SelectSettings",
    "SparseCode",
    "SparseDictionary",
    "Stack",
    "Transcoder",
    "__version__",
    "attribution_graph",
    "circuits",
    "compare",
    "compare_circuits",
    "convert",
    "diff",
    "eval",
    "evaluate",
    "evaluate_all",
    "features",
    "harvest",
    "info",
    "load",
    "mib_submission",
    "name",
    "probe",
    "published",
    "push_to_hub",
    "read_activations",
    "render",
    "sae",
    "select",
    "similarity",
    "steer",
    "train",
    "training",
    "transcoders",
]

LAYERS = ("sae", "transcoders", "training", "eval")
# Modules of the public names. They are imported on first use, because torch alone takes seconds.
_HOMES = {
    "sae": "ENCODERS SAE Encoder SparseCode SparseDictionary",
    "sae.hub": "push_to_hub",
    "transcoders": "CrossLayerTranscoder Crosscoder Stack Transcoder",
    "transcoders.convert": "Converted convert",
    "transcoders.load": "CheckpointOptions load",
    "transcoders.releases": "published",
    "training.activations.model": "LanguageModel",
    "training.activations.read": "read_activations",
    "training.run": "harvest train",
    "eval.attribution_graphs.run": "attribution_graph",
    "eval.circuits.benchmark": "CircuitSettings circuits",
    "eval.circuits.comparison.run": "compare_circuits",
    "eval.circuits.mib": "mib_submission",
    "eval.compare.run": "compare",
    "eval.compare.similarity": "similarity",
    "eval.diff.run": "diff",
    "eval.features.neuronpedia.export": "NeuronpediaExport",
    "eval.features.run": "Explainer features",
    "eval.info": "CheckpointInfo info",
    "eval.metrics.inference": "InferenceMode",
    "eval.name.run": "name",
    "eval.pages.render": "render",
    "eval.probing.run": "ProbingResults probe",
    "eval.report.evaluate": "evaluate evaluate_all",
    "eval.result": "Features Report",
    "eval.select.run": "SelectSettings select",
    "eval.steer.run": "steer",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

# Type checkers read the imports above instead, and so see real signatures and misspelled names.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib import metadata

            try:
                value = metadata.version("sparsary")
            except metadata.PackageNotFoundError:
                # On the path but not installed.
                value = "0+unknown"
        elif name in LAYERS:
            value = importlib.import_module(f".{name}", __name__)
        elif name in _HOME_OF:
            # Imported lazily: it loads torch, as do the modules of the public names.
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
    """Build the command ``sparsary`` from the commands of the layers."""
    from typing import Annotated

    import typer

    from .eval.cli import app as evaluation
    from .eval.synthetic.cli import app as bench
    from .training.cli import app as training_
    from .training.scale.cli import app as scale

    app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

    # Declared for the help text only: `main` removes it from the arguments, at any position.
    @app.callback()
    def _options(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, with any command.")] = False,
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    app.add_typer(training_)
    app.add_typer(scale)
    app.add_typer(evaluation)
    app.add_typer(bench, name="bench")
    return app


def _show_version(wanted: bool) -> None:
    import typer

    if wanted:
        typer.echo(f"sparsary {sys.modules[__name__].__version__}")
        raise typer.Exit


def main() -> None:
    """Run the console script. Every error ends with one message: status 2 if the user can fix it, else 1 and a log file."""
    # Read when torch is first loaded. By default OpenMP threads keep spinning after a matrix product and slow down whatever
    # follows: reading, compiled kernels, other processes. Harvest and training took two to four times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Lost connections between processes are told in one line; torch's own warnings print its stack, too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imported lazily: programs that use the package do not need it.
    from .training.console import StandardErrorHandler

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StandardErrorHandler()])
    # Hides log lines of these libraries on requests and caches.
    for name in ("httpx", "urllib3", "datasets", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints its warnings itself.
    logging.getLogger("huggingface_hub").propagate = False
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    # A log line that cannot be written, for example to a closed pipe, must not print a traceback.
    logging.raiseExceptions = debug
    # Characters that the terminal cannot encode are printed as escapes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    others = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        with _as_one_of_several() if others else nullcontext():
            status, message = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends in one line
        status, message = _ended(error)
        if debug:
            traceback.print_exception(error)
        if others:
            from .training.processes import told_by_one_rank

            status, message = told_by_one_rank(status, message, error)
    if message and sys.stderr is not None:
        # Without a reader of standard error, the exit status suffices.
        with suppress(OSError):
            sys.stderr.write(f"{message}\n")
            if told := os.environ.get("SPARSARY_TOLD"):
                # The launcher adds nothing to it.
                Path(told).touch()
    sys.exit(status)


def _require_shared_work() -> None:
    """Raise ``ValueError`` if a launcher started several processes of a command that works in one."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    if command not in SHARED_COMMANDS | {""}:
        raise ValueError(
            f"{command}: expected one process, got {os.environ['WORLD_SIZE']} from a launcher; only "
            f"{' and '.join(sorted(SHARED_COMMANDS))} share their work. Start it without one: "
            f"sparsary {shlex.join(sys.argv[1:])}"
        )


@contextmanager
def _as_one_of_several() -> Iterator[None]:
    """Join the other processes of the run; all but the first are silent."""
    from .training.processes import leave, own_ranks

    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger().setLevel(logging.ERROR)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    own_ranks()
    # Known earlier, but only ranks that have met can agree on which of them tells.
    _require_shared_work()
    yield
    leave()


def _run() -> tuple[int, str]:
    """Run the command and return its exit status and final message."""
    # Not standalone, so that errors are reported here. Ctrl-C is returned as status 130.
    status = command_line()(standalone_mode=False) or 0
    return status, INTERRUPTED if status == 130 else ""


def _help_command(error: BaseException) -> str:
    """Return the command line that shows the help of the command with the usage error."""
    context = getattr(error, "ctx", None)
    return f"{getattr(context, 'command_path', None) or 'sparsary'} --help"


def _ended(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message for an error."""
    from .training.signals import Stopped

    if isinstance(error, KeyboardInterrupt):
        return 130, INTERRUPTED
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (int(error.code is not None), str(error.code or ""))
    if isinstance(error, Stopped):
        return 128 + error.signal_number, str(error)
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        # The status of a program that SIGPIPE ends, without a message, because nobody reads it.
        return 141, ""
    if isinstance(error, ModuleNotFoundError) and (missing := _missing(error)):
        return 2, missing
    if type(error).__module__.split(".")[0] in ("typer", "click"):
        said = getattr(error, "format_message", lambda: str(error))()
        said = said if said.endswith((".", "?")) else f"{said}."
        return 2, f"sparsary: {said} Try: {_help_command(error)}"
    try:
        # Imported lazily: it loads torch, and `--help` must stay fast.
        from .sae.errors import WriteError, operating_system_message
        from .sae.ranks import RanksLostError
    except Exception:  # noqa: BLE001 - an installation that is broken: the error is about to be told
        return 1, _unforeseen(error)
    if isinstance(error, RanksLostError):
        return 1, f"sparsary: {error}"
    if isinstance(error, WriteError):
        return 2, f"sparsary: {error} It was: {shlex.join(['sparsary', *sys.argv[1:]])}"
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        return 2, f"sparsary: {operating_system_message(error)}"
    if isinstance(error, ValueError) and _is_ours(error):
        return 2, f"sparsary: {error}"
    return 2 if isinstance(error, ValueError) else 1, _unforeseen(error)


# Commands that several processes can share.
SHARED_COMMANDS = {"harvest", "train"}
INTERRUPTED = "Stopped. What was complete is saved; the same command continues."


def _is_ours(error: BaseException) -> bool:
    """Return True if this package raised the error itself, so that its message is written for the user."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not frames or str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] == __name__


def _unforeseen(error: BaseException) -> str:
    """Return a message with the operation, the error of the library, and the path of the logged traceback."""
    command = shlex.join(["sparsary", *sys.argv[1:]])
    said = " ".join(str(error).split())[:600]
    notes = [str(note) for note in getattr(error, "__notes__", ()) if str(note).startswith("while ")]
    log = Path(tempfile.gettempdir()) / f"sparsary-error-{os.getpid()}.log"
    try:
        log.write_text(f"{command}\n\n{''.join(traceback.format_exception(error))}", encoding="utf-8")
        logged = f"log: {log}; "
    except OSError:
        logged = ""
    doing = notes[0] if notes else f"while running {command}"
    return f"sparsary: {doing}: {type(error).__name__}{': ' * bool(said)}{said} ({logged}--debug shows the traceback)"


def _reader_is_gone() -> bool:
    """Return True if standard output has no reader; it is then redirected, so that flushing at exit does not fail."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _missing(error: ModuleNotFoundError) -> str:
    """Return the message on the extra that a command needs; an empty string if no extra has the module."""
    # Imported lazily: it loads torch, and `--help` must stay fast.
    from .sae.extras import MissingPackageError, needs

    command = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    evaluates = command in ("eval", "features", "probe", "circuits", "diff", "steer", "compare", "similarity", "info", "render")
    try:
        with needs(f"sparsary {command}".strip(), "eval" if evaluates else None):
            raise error
    except MissingPackageError as missing:
        return str(missing)
    except ModuleNotFoundError:
        return ""
