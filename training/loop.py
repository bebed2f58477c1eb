"""The training loop, read top to bottom."""

from accelerate import Accelerator

from .activations.stream import Stream
from .checkpoints import Checkpoints
from .objective import Objective, combine
from .optim import Schedule
from .recipe import Recipe
from .report import Report
from .state import TrainState


def train_loop(
    cfg: Recipe,
    objective: Objective,
    optimizer,
    schedule: Schedule,
    stream: Stream,
    state: TrainState,
    accelerator: Accelerator,
    report: Report,
    checkpoints: Checkpoints,
) -> None:
    """Step until the token budget is used or a stop is asked for; every way out leaves a saved state.

    Raises:
        ValueError: If the loss or an activation is not finite; the last good state is kept.
    """
    dictionary = accelerator.unwrap_model(objective).dictionary
    while state.tokens < cfg.tokens and not checkpoints.stop_requested:
        batch = next(stream).to(accelerator.device)
        schedule.apply(state.step)
        pieces = []
        for piece in batch.split(cfg.accumulate):
            with accelerator.accumulate(objective), accelerator.autocast():
                loss, terms = objective(piece, state.usage)
            accelerator.backward(loss)
            pieces.append(terms)
        # Projection, clipping, Adam and unit atoms are one step: they can be one pass over the weights.
        optimizer.step()
        optimizer.zero_grad()
        terms = combine(pieces)
        state.advance(batch.x.shape[0], terms)
        if state.step % cfg.log_every == 0 or state.tokens >= cfg.tokens:
            state.require_finite()
            report(state, terms, schedule.lr(state.step - 1), stream.waited_seconds)
        if state.step % cfg.save_every == 0 and state.tokens < cfg.tokens:
            checkpoints.save(state, dictionary, optimizer, stream, report)
    checkpoints.save(state, dictionary, optimizer, stream, report)
