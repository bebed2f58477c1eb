"""The training loop, for one dictionary or for several that share their batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator

from ..sae import SparseDictionary
from .activations.stream import ActivationBatch, ActivationStream
from .checkpoints import Checkpoints
from .lanes import Lanes
from .objective import Objective, Terms, combine
from .optim import Schedule
from .processes import beat
from .recipe import Recipe
from .report import TrainingLog
from .signals import StopRequest
from .state import NotFinite, TrainState


@dataclass(frozen=True)
class TrainedMember:
    """One dictionary in training and everything that is its own; a single run has one member."""

    recipe: Recipe
    objective: Objective
    dictionary: SparseDictionary
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    state: TrainState
    report: TrainingLog
    checkpoints: Checkpoints

    @property
    def done(self) -> bool:
        return self.state.tokens >= self.recipe.tokens


@dataclass(frozen=True)
class Group:
    """Members that train on the same batches, and the stream of these batches."""

    stream: ActivationStream
    members: list[TrainedMember]

    @property
    def done(self) -> bool:
        return all(member.done for member in self.members)

    @property
    def in_step(self) -> list[TrainedMember]:
        """Members that need the next batch.

        After a crash, members may have been saved at different steps; those already past the stream position skip batches until
        the others catch up.
        """
        return [member for member in self.members if member.state.step == self.stream.batches]


def train_loop(groups: list[Group], accelerator: Accelerator, stop: StopRequest) -> None:
    """Train until every token budget is used up or a stop is requested, and save the states in either case.

    Raises:
        NotFinite: If a member's loss is not finite. Its last good state is kept; the other members are saved.
    """
    failures: list[str] = []
    with Lanes(most_lanes(groups, accelerator)) as lanes:
        while not failures and not all(group.done for group in groups) and not stop.requested:
            due = [turn for group in groups if not group.done for turn in turns(group, accelerator)]
            terms = lanes.run([partial(step, turn.member, turn.batch, accelerator) for turn in due])
            for turn, shown in zip(due, terms, strict=True):
                failures += record(turn.member, shown, turn.stream)
    save_moved(groups)
    if failures:
        raise NotFinite("\n".join(failures))


@dataclass(frozen=True)
class MemberStep:
    """A member's next step: the member, its batch and the stream that the batch is from."""

    member: TrainedMember
    batch: ActivationBatch
    stream: ActivationStream


def turns(group: Group, accelerator: Accelerator) -> list[MemberStep]:
    """Take the next batch of a group, and return the steps that its members take with it."""
    members = [member for member in group.in_step if not member.done]
    batch = next(group.stream).to(accelerator.device)
    return [MemberStep(member, batch, group.stream) for member in members]


def most_lanes(groups: Sequence[Group], accelerator: Accelerator) -> int:
    """Return how many members may step at the same time.

    It is one if they share a language model, a GPU, or messages to other processes. Members that are done count: a resumed run
    has as many lanes as before, and so rounds as before.
    """
    members = [member for group in groups for member in group.members]
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    return len(members) if alone and not any(member.recipe.uses_kl for member in members) else 1


def step(member: TrainedMember, batch: ActivationBatch, accelerator: Accelerator) -> Terms:
    """Run one training step of one dictionary. It must not draw random numbers, because members share the generators."""
    state, optimizer = member.state, member.optimizer
    member.schedule.apply(state.step)
    pieces = []
    for piece in batch.split(member.recipe.accumulate):
        with accelerator.autocast():
            loss, terms = member.objective(piece, state.usage)
        # Not by accelerate, whose count of pieces is shared by members that step at the same time.
        (loss / member.recipe.accumulate).backward()
        pieces.append(terms)
    # The optimizer also projects, clips and renormalizes, so that a fused one needs a single pass over the weights.
    optimizer.step()
    optimizer.zero_grad()
    terms = combine(pieces)
    state.advance(batch.x.shape[0] * member.dictionary.ranks.size, terms)
    beat(f"step {state.step}")
    return terms


def record(member: TrainedMember, terms: Terms, stream: ActivationStream) -> list[str]:
    """Log and save what is due after a step; return the errors that keep the member from continuing."""
    state, cfg = member.state, member.recipe
    member.report.advance(state.tokens)
    member.checkpoints.require_written()
    try:
        if state.step % cfg.log_every == 0 or member.done:
            member.checkpoints.require_finite(state)
            member.report(state, terms, member.schedule.lr(state.step - 1), stream.waited_seconds)
        if state.step % cfg.save_every == 0 or member.done:
            save_members(member, stream)
    except NotFinite as error:
        return [str(error)]
    return []


def save_members(member: TrainedMember, stream: ActivationStream) -> None:
    member.checkpoints.save(member.state, member.dictionary, member.optimizer, stream, member.report)


def save_moved(groups: list[Group]) -> None:
    """Save every member that has advanced since its last save, except those with a non-finite loss; wait for all saves.

    Members ahead of the stream are skipped: they have not advanced, and the stream is not at their position.
    """
    for group in groups:
        for member in group.in_step:
            member.checkpoints.wait()
            if member.state.step != member.state.saved_step and bool(member.state.finite):
                save_members(member, group.stream)
    for member in (member for group in groups for member in group.members):
        member.checkpoints.wait()
