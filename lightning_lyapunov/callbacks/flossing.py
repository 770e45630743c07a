"""``GradientFlossing``: move the leading exponents of the recurrent layers of a model to zero while it trains."""

import dataclasses
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lyapunov.callbacks.guard import guarded
from lightning_lyapunov.callbacks.host import AnyCallback
from lightning_lyapunov.callbacks.next_step import NextStep
from lightning_lyapunov.callbacks.overhead import Overhead
from lightning_lyapunov.callbacks.publish import logger_step, metrics_of
from lightning_lyapunov.callbacks.ranks import CommonSchedule
from lightning_lyapunov.callbacks.schedule import Progress, is_asked_for
from lightning_lyapunov.callbacks.step_recorder import StepRecorder
from lightning_lyapunov.callbacks.trainer_hooks import progress_of
from lightning_lyapunov.callbacks.warn_once import WarnOnce
from lightning_lyapunov.functional import is_count
from lightning_lyapunov.initialisation import FlossingResult, floss_, recurrent_parameters, with_live_weights
from lightning_lyapunov.kernel.recurrence import NoGraphError
from lightning_lyapunov.layers.copies import is_sharded
from lightning_lyapunov.layers.discovery import FoundLayer, find_layers
from lightning_lyapunov.layers.outer_state import undisturbed
from lightning_lyapunov.measuring.layers import full_name
from lightning_lyapunov.recording.calls import RecordedCalls
from lightning_lyapunov.recording.hooks import beside_modes
from lightning_lyapunov.recording.reading import follow

__all__ = ["GradientFlossing"]


class GradientFlossing(AnyCallback):  # type: ignore[misc]
    r"""Move the leading Lyapunov exponents of recurrent layers to zero, so that gradients neither vanish nor explode.

    With no argument, every recurrent layer is flossed once: after the first optimizer step and before the second, along
    the sequences of that batch, by the steps of :func:`~lightning_lyapunov.lyapunov_init_`. With a schedule it is
    flossed again, by ``steps_later`` steps each time. It is recorded and checked as by
    :class:`~lightning_lyapunov.LyapunovMonitor`, and both may watch one run. A monitor behind it in the list of
    callbacks measures what came out.

    Recurrent weights and the biases of gates change, and nothing else: no other weight, no gradient, no random state.
    The state of the optimizer stays, too. Adam's moments are running means of the user's optimizer over all weights,
    and it is not known which of them to forget. They do no harm: after the first step they are those of one gradient,
    and whatever gradient comes next, a step of Adam with its default betas is at most 3.2 learning rates long.

    With several ranks, rank 0 flosses along its own sequences, and the others take its weights: eight sequences are
    enough, and then no rank waits for one that has failed. A run that goes on from a checkpoint is not flossed at its
    start.

    It logs ``lyapunov/flossing/<layer>/max_before`` and ``.../max_after``, the largest exponent in nats per step;
    ``.../distance_before`` and ``.../distance_after``, the root mean square distance of the leading exponents from the
    target; ``lyapunov/flossing/steps`` and ``lyapunov/flossing/seconds``.

    Args:
        modules: dotted name or names of the layers to floss; None for every recurrent layer that is trained.
        every_n_epochs: floss again at the end of every ``n``-th epoch.
        every_n_train_steps: floss again every ``n`` optimizer steps.
        target: where the exponents shall be, in nats per step.
        num_exponents: how many of the largest exponents of each cell to move.
        steps: steps of gradient descent at the start; 0 for none.
        steps_later: those of each later time.
        lr: the learning rate of flossing.
        num_sequences: sequences to floss along.
        max_steps: the number of steps of a sequence that are used, from its start.
        strict: raise what fails, instead of warning once.

    Attributes:
        results: what was done to each layer last, a :class:`~lightning_lyapunov.FlossingResult`.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, if the model has no layer of a name, no
            recurrent layer that is trained, or sharded weights; after the first batch, if no graph leads from the state
            of a layer to its weights. The message says what to write.

    Example::

        >>> callbacks = [GradientFlossing()]
    """

    def __init__(
        self,
        modules: str | Sequence[str] | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        target: float = 0.0,
        num_exponents: int = 16,
        steps: int = 60,
        steps_later: int = 10,
        lr: float = 1e-2,
        num_sequences: int = 8,
        max_steps: int = 100,
        strict: bool = False,
    ) -> None:
        every = {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}
        counts = {"num_exponents": num_exponents, "num_sequences": num_sequences, "max_steps": max_steps}
        later = {"steps_later": steps_later, **{name: count for name, count in every.items() if count is not None}}
        for name, count in {**counts, **later, "steps": steps}.items():
            least = 0 if name == "steps" else 1
            if not is_count(count, least):
                raise ValueError(f"`{name}={count!r}` must be a whole number, {least} or more.")
        if not (math.isfinite(target) and math.isfinite(lr) and lr > 0):
            raise ValueError(f"`target={target}` and `lr={lr}` must be finite, and `lr` above 0.")
        self.modules = [modules] if isinstance(modules, str) else modules
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.target, self.num_exponents, self.lr = target, num_exponents, lr
        self.steps, self.steps_later = steps, steps_later
        self.num_sequences, self.max_steps, self.strict = num_sequences, max_steps, strict
        self.results: dict[str, FlossingResult] = {}
        self._run: _Run | None = None

    @guarded(passes=(ValueError,))
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers. Guarded, but for the errors that say what to write."""
        self._run = _Run.start(self, trainer, pl_module, _trained_layers(self.modules, trainer, pl_module))

    @guarded()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Let the training step be recorded, if flossing is due after it. Guarded."""
        if run := self._run_of(trainer):
            run.start_batch(trainer.strategy, progress_of(trainer))

    @guarded(passes=(NoGraphError,))
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Floss, if it is due. Guarded, but for layers that no graph reaches; what was recorded is dropped."""
        if run := self._run_of(trainer):
            with run.ended_batch(progress_of(trainer)) as meets:
                if meets:
                    self._floss(trainer, run)

    @guarded()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take note of the end of an epoch. Guarded."""
        if run := self._run_of(trainer):
            run.schedule.measure_epoch(progress_of(trainer))

    @guarded()
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the run. Guarded."""
        self._end_run(trainer)

    @guarded()
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the run. Guarded."""
        self._end_run(trainer)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "_run": None}

    def _run_of(self, trainer: Any) -> "_Run | None":
        return self._run if self._run is not None and self._run.trainer() is trainer else None

    def _end_run(self, trainer: Any) -> None:
        if run := self._run_of(trainer):
            run.stop()
            self._run = None

    def _give_up(self, hook: str, error: Exception) -> None:
        message = (
            f"`{hook}` of `GradientFlossing` failed; the run goes on without. {type(error).__name__}: {error} To raise "
            "this error, write `GradientFlossing(strict=True)`."
        )
        if self._run:
            self._run.stop()
        (self._run.warn if self._run else WarnOnce())(f"{hook} failed", message)

    def _floss(self, trainer: Any, run: "_Run") -> None:
        """Floss on rank 0, and take its weights on the others. Every rank must make this call."""
        outcome = run.floss(self, progress_of(trainer)) if trainer.is_global_zero else None
        # The only meeting of the ranks, whatever has failed.
        outcome = _Outcome(*trainer.strategy.broadcast(outcome and tuple(outcome)))
        run.schedule.measured(trainer.global_step)
        run.last_step = trainer.global_step
        if not trainer.is_global_zero:
            run.assign(outcome.weights)
        for name, message in outcome.failures.items():
            run.warn(name, message)
        if outcome.refusal:
            raise NoGraphError(outcome.refusal)
        if outcome.results:
            self.results = {**self.results, **outcome.results}
            _publish(trainer, _values(outcome, self.target), run.warn)
        if outcome.failures and self.strict:
            raise RuntimeError(" ".join(outcome.failures.values()))


class _Outcome(NamedTuple):
    """What rank 0 has done.

    Attributes:
        weights: the new values of the parameters of each layer, on the CPU.
        results: what was done to each layer.
        failures: what went wrong, by layer.
        refusal: why a layer cannot be flossed at all, and what to write; empty if all can.
        steps: how many steps each layer was flossed.
        seconds: how long it took.
    """

    weights: dict[str, dict[str, Tensor]]
    results: dict[str, FlossingResult]
    failures: dict[str, str]
    refusal: str
    steps: int
    seconds: float


@dataclass
class _Run:
    """What belongs to one run of a trainer."""

    trainer: weakref.ReferenceType[Any]
    layers: dict[str, FoundLayer]
    recorder: StepRecorder
    schedule: CommonSchedule
    is_scheduled: bool
    warn: WarnOnce = field(default_factory=WarnOnce)
    next_step: NextStep | None = None
    is_fresh: bool | None = None
    last_step: int = 0

    @classmethod
    def start(cls, flossing: GradientFlossing, trainer: Any, pl_module: Any, layers: dict[str, FoundLayer]) -> "_Run":
        every = flossing.every_n_epochs, flossing.every_n_train_steps
        shared = {"broadcast": trainer.strategy.broadcast, "is_first": trainer.is_global_zero}
        return cls(
            weakref.ref(trainer),
            layers,
            StepRecorder(pl_module, layers, flossing.num_sequences, flossing.max_steps),
            CommonSchedule(
                *every,
                None,
                Overhead(trainer.strategy.root_device),
                **shared,
                automatic=pl_module.automatic_optimization,
            ),
            is_scheduled=every != (None, None),
        )

    def start_batch(self, strategy: Any, progress: Progress) -> None:
        """Let the step of a batch be recorded, if flossing may be due after it."""
        if self.is_fresh is None:
            self.is_fresh, self.last_step = progress.global_step == 0, progress.global_step
        self.stop()
        if (self.is_fresh or self.is_scheduled) and self.schedule.record_batch(progress):
            self.next_step = NextStep(strategy, "training_step", self.recorder.start, self.recorder.stop)

    @contextmanager
    def ended_batch(self, progress: Progress) -> Iterator[bool]:
        """Tell whether the ranks meet at the end of a batch; let them agree on what is next, and drop the recording."""
        try:
            yield self.schedule.measure_batch(progress)
        finally:
            self.stop()
            self.schedule.end_batch(progress)

    def stop(self) -> None:
        """Record no more, and forget what was recorded."""
        if self.next_step is not None:
            self.next_step.withdraw()
            self.next_step = None
            self.recorder.stop()
            self.recorder.forget()

    def floss(self, flossing: GradientFlossing, progress: Progress) -> _Outcome:
        """Floss each layer along what was recorded, if that is due. An error is in what is returned."""
        every = flossing.every_n_epochs, flossing.every_n_train_steps
        is_first = bool(self.is_fresh) and not self.schedule.measured_step
        is_due = is_first or is_asked_for(*every, progress, self.last_step)
        steps = flossing.steps if is_first else flossing.steps_later
        outcome, start = _Outcome({}, {}, {}, "", steps, 0.0), time.perf_counter()
        if not is_due or steps == 0:
            return outcome
        recorded, errors = self.recorder.take(), dict(self.recorder.errors)
        for name, found in self.layers.items():
            try:
                with beside_modes(), undisturbed(found.module, found.wrapper and found.wrapper[0]):
                    if name in errors:
                        raise errors[name]
                    result, weights = _flossed(found.module, recorded.get(name), flossing, steps)
            except NoGraphError as error:
                outcome = outcome._replace(refusal=f"`{name}` cannot be flossed. {error}")
                break
            except Exception as error:
                message = f"`{name}` was not flossed, and the run goes on. {type(error).__name__}: {error}"
                outcome.failures[name] = f"{message} To raise this error, write `GradientFlossing(strict=True)`."
            else:
                outcome.results[name], outcome.weights[name] = result, weights
        return outcome._replace(seconds=time.perf_counter() - start)

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the weights of rank 0."""
        for name, values in weights.items():
            parameters = dict(self.layers[name].module.named_parameters())
            for key, value in values.items():
                parameters[key].copy_(value)


def _trained_layers(names: Sequence[str] | None, trainer: Any, model: nn.Module) -> dict[str, FoundLayer]:
    """Return the layers to floss.

    Raises:
        ValueError: if one cannot be flossed, or none is trained; the message says what to write.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    layers = {}
    for name, found in find_layers(model, names).items():
        if is_sharded(found.module):
            raise ValueError(
                f"`{name}` cannot be flossed: its weights are spread over processes. Floss it before they are: "
                f"`lyapunov_init_(self.{name}, inputs)` in `configure_model`, before `fully_shard`."
            )
        parameters = [parameter for parameter in found.module.parameters() if parameter.requires_grad]
        if any(id(parameter) in optimised for parameter in parameters):
            recurrent_parameters(found.module)
            layers[name] = found
        elif names is not None:
            raise ValueError(f"`{name}` is not trained: no optimizer holds a weight of it. {_BY_HAND.format(name)}")
    if not layers:
        raise ValueError(f"No recurrent layer is trained: no optimizer holds a weight of one. {_BY_HAND.format('rnn')}")
    return layers


_BY_HAND = "Floss it by hand before the fit: `lyapunov_init_(model.{}, inputs)`."


def _flossed(
    module: nn.Module, calls: RecordedCalls | None, flossing: GradientFlossing, steps: int
) -> tuple[FlossingResult, dict[str, Tensor]]:
    """Floss a layer along its calls; return what was done, and the new weights, on the CPU."""
    followed = None if calls is None else follow(module, calls, flossing.num_sequences, flossing.max_steps)
    if followed is None:
        raise RuntimeError("It was not called as a module in this training step. Call the module itself.")
    chosen, layer = recurrent_parameters(module), with_live_weights(followed, module)
    options: dict[str, Any] = {"num_exponents": flossing.num_exponents, "warmup": 0, "qr_interval": "auto"}
    how = {"target": flossing.target, "steps": steps, "lr": flossing.lr, **options}
    result = floss_(layer, followed.sequences, chosen, **how)
    result = dataclasses.replace(result, before=result.before.cpu(), after=result.after.cpu())
    return result, {name: parameter.detach().cpu().clone() for name, parameter in chosen.items()}


def _values(outcome: _Outcome, target: float) -> dict[str, float]:
    values = {}
    for name, result in outcome.results.items():
        for index, cell in enumerate(result.cell_names):
            for when, exponents in (("before", result.before[index]), ("after", result.after[index])):
                key = f"lyapunov/flossing/{full_name(name, cell, result.cell_names)}"
                values[f"{key}/max_{when}"] = float(exponents.max())
                values[f"{key}/distance_{when}"] = float((exponents - target).square().mean().sqrt())
    return {**values, "lyapunov/flossing/steps": float(outcome.steps), "lyapunov/flossing/seconds": outcome.seconds}


def _publish(trainer: Any, values: dict[str, float], warn: WarnOnce) -> None:
    """Give the values to the trainer's metrics, and to each logger; one that refuses them is named once."""
    device = trainer.strategy.root_device
    metrics_of(trainer).update({key: torch.tensor(value, device=device) for key, value in values.items()})
    for logger in trainer.loggers:
        try:
            logger.log_metrics(values.copy(), step=logger_step(trainer))
        except Exception as error:
            warn(
                f"{type(logger)}", f"{type(logger).__name__} did not take the numbers: {type(error).__name__}: {error}"
            )
