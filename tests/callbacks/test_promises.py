"""What is promised of a run with the monitor, in many settings, each beside the same run without it.

The two runs must be equal bit by bit: weights, gradients, optimizers, metrics, outputs, random states, what the user's
loggers receive, and the error that the run ends with. The monitor raises nothing, says at most one thing, leaves no
hook and no attribute, and keeps no tensor of a batch alive. A new setting is one entry of ``SETTINGS``.
"""

import contextlib
import copy
import pickle
import random
import resource
import signal
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import (
    FEATURES,
    At,
    CellModel,
    Halves,
    Language,
    Loop,
    Packed,
    Parts,
    Regressor,
    SilentLogger,
    Stream,
    TanhCell,
    TwoLayers,
    TwoOptimizers,
    hooks_of,
    make_trainer,
    run_cell,
    series,
    tokens,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from promises import Setting, compare
from torch import nn

from lightning_lyapunov import GradientFlossing

pytestmark = pytest.mark.slow

COULD_NOT = "could not be measured"

# Layers that cannot be read


class Growing(nn.Module):
    """A cell that is called with all of its earlier states, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES + 5, 5)

    def forward(self, inputs, state, past):
        return torch.tanh(self.linear(torch.cat((inputs, state), -1))) + past.mean(1)


class WithPast(Regressor):
    """Calls its cell with tensors whose size changes between two calls."""

    def __init__(self):
        super().__init__()
        self.rnn = Growing()

    def forward(self, inputs):
        state, states = inputs.new_zeros(len(inputs), 5), []
        for step in inputs.unbind(1):
            state = self.rnn(step, state, torch.stack([*states, state], 1))
            states.append(state)
        return self.head(torch.stack(states, 1))


class Shrinking(Regressor):
    """Calls its layer with fewer and fewer members, and with another number of features."""

    def __init__(self):
        super().__init__()
        self.rnn = Ragged()

    def forward(self, inputs):
        state = inputs.new_zeros(len(inputs), 5)
        for number, step in enumerate(inputs.unbind(1)):
            state = self.rnn(step[..., : 1 + number % FEATURES], state)
        return self.head(state).unsqueeze(1)


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, inputs, state):
        return torch.tanh(self.linear(state) + inputs.sum(-1, keepdim=True))


class IdsThenVectors(nn.Module):
    """Takes ids in its first call and vectors in the others."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(7, FEATURES), nn.GRUCell(FEATURES, 5)

    def forward(self, inputs, state):
        return self.cell(inputs if inputs.is_floating_point() else self.embedding(inputs), state)


class StartsWithIds(CellModel):
    def __init__(self):
        super().__init__(IdsThenVectors())

    def forward(self, inputs):
        state = self.rnn(torch.zeros(len(inputs), dtype=torch.long), inputs.new_zeros(len(inputs), 5))
        return self.head(run_cell(self.rnn, inputs, state))


class Mapped(CellModel):
    """Calls its cell under ``torch.func.vmap``."""

    def __init__(self):
        super().__init__(TanhCell())

    def forward(self, inputs):
        return self.head(torch.func.vmap(lambda one: run_cell(self.rnn, one[None], one.new_zeros(1, 5))[0])(inputs))


class PerSample(CellModel):
    """Computes gradients of each sample with ``torch.func``."""

    def __init__(self):
        super().__init__(TanhCell())

    def training_step(self, batch, batch_idx):
        def loss(parameters, inputs, targets):
            outputs = torch.func.functional_call(self, parameters, inputs[None])
            return (outputs - targets).square().mean()

        parameters = {name: value.detach() for name, value in self.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
        norm = sum(gradient.square().sum() for gradient in gradients.values())
        self.log("norm", norm)
        return super().training_step(batch, batch_idx)


class LayerUnderGrad(Regressor):
    """Calls a layer of torch inside ``torch.func.grad``."""

    def training_step(self, batch, batch_idx):
        slope = torch.func.grad(lambda inputs: self(inputs).sum())(batch[0])
        return super().training_step(batch, batch_idx) + slope.square().mean().detach()


class Loses(Regressor):
    """Takes the upper layer away from its stack, in place, in the second epoch."""

    def __init__(self):
        super().__init__("GRU", num_layers=2)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.rnn.num_layers = 1
            del self.rnn._all_weights[1:], self.rnn._flat_weights_names[4:], self.rnn._flat_weights[4:]
            del self.rnn._flat_weight_refs[4:]
            for name in [name for name in self.rnn._parameters if name.endswith("_l1")]:
                delattr(self.rnn, name)


class Gains(Regressor):
    """Its layer becomes another one, of another size and kind, in the second epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.rnn, self.head = nn.GRU(FEATURES, 7, batch_first=True), nn.Linear(7, 1)


class Scripts(CellModel):
    """Scripts its cell while it trains."""

    def __init__(self):
        super().__init__(nn.GRUCell(FEATURES, 5))

    def training_step(self, batch, batch_idx):
        scripted = torch.jit.script(self.rnn)
        return super().training_step(batch, batch_idx) + scripted(batch[0][:, 0], torch.zeros(4, 5)).mean().detach()


class Traces(Regressor):
    def training_step(self, batch, batch_idx):
        traced = torch.jit.trace(self.rnn, batch[0], check_trace=False)
        return super().training_step(batch, batch_idx) + traced(batch[0])[0].mean().detach()


class Symbolic(CellModel):
    """Traces itself with ``torch.fx``."""

    def __init__(self):
        super().__init__(TanhCell())

    def training_step(self, batch, batch_idx):
        state = torch.zeros(4, 5)
        graph = torch.fx.symbolic_trace(self.rnn)
        assert [node.op for node in graph.graph.nodes].count("placeholder") == 2
        return super().training_step(batch, batch_idx) + graph(batch[0][:, 0], state).mean().detach()


class Exports(CellModel):
    """Exports its cell."""

    def __init__(self):
        super().__init__(TanhCell())

    def training_step(self, batch, batch_idx):
        exported = torch.export.export(self.rnn, (batch[0][:, 0], torch.zeros(4, 5)), strict=False)
        return (
            super().training_step(batch, batch_idx)
            + exported.module()(batch[0][:, 0], torch.zeros(4, 5)).mean().detach()
        )


class Copies(CellModel):
    """Copies and pickles its cell inside a step; the copies can be called and scripted, and have no hooks then."""

    def __init__(self):
        super().__init__(nn.GRUCell(FEATURES, 5))

    def training_step(self, batch, batch_idx):
        copies = [copy.deepcopy(self.rnn), pickle.loads(pickle.dumps(self.rnn)), copy.deepcopy(self.rnn)]
        scripted = [copies[0], *map(torch.jit.script, copies[1:])]
        assert not hooks_of(copies[1]) + hooks_of(copies[2])
        results = [part(batch[0][:, 0], torch.zeros(4, 5)) for part in scripted]
        assert not hooks_of(copies[0])
        return super().training_step(batch, batch_idx) + sum(result.mean().detach() for result in results)


class HandlesOfOthers(Regressor):
    """Registers a hook in a step, and removes the one of the last step."""

    handle = None

    def training_step(self, batch, batch_idx):
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.rnn.register_forward_hook(lambda module, args, output: (output[0] * 0.9, output[1]))
        return super().training_step(batch, batch_idx)


class Raises(Regressor):
    """Fails in its layer, in a certain batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0][..., :2] if self.global_step == 2 else batch[0], batch[1]), batch_idx)


class Recovers(Regressor):
    """Its layer fails in each batch, and the model goes on without it."""

    def training_step(self, batch, batch_idx):
        with contextlib.suppress(RuntimeError):
            self.rnn(batch[0][..., :1])
        return super().training_step(batch, batch_idx)


class Opaque:
    """An argument that is no tensor and no container."""

    def __init__(self, values):
        self.values = values


class TakesObjects(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, 5)

    def forward(self, inputs, state):
        return self.cell(inputs.values, state)


class WithObjects(CellModel):
    """Passes its inputs in an object of its own, and a graph with it."""

    def __init__(self):
        super().__init__(TakesObjects())

    def forward(self, inputs):
        state, states = inputs.new_zeros(len(inputs), 5), []
        for step in inputs.unbind(1):
            state = self.rnn(Opaque(step + 0 * state.mean()), state)
            states.append(state)
        return self.head(torch.stack(states, 1))


class Complains(nn.Module):
    """Fails when it is called outside of a batch of four, as in a check of a single member."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, 5)

    def forward(self, inputs, state):
        if len(inputs) != 4:
            raise LookupError("four members")
        return self.cell(inputs, state)


# Loggers


class Refuses(SilentLogger):
    """A logger that fails: for a key that it does not know, or a number that it cannot write."""

    def __init__(self, refuses):
        super().__init__()
        self.refuses = refuses

    def log_metrics(self, metrics, step=None):
        if any(self.refuses(key, value) for key, value in metrics.items()):
            raise KeyError("this cannot be logged")


def refuses_keys(folder):
    return {"logger": [Refuses(lambda key, value: key.startswith("lyapunov")), CSVLogger(folder)]}


def refuses_nan(folder):
    return {"logger": Refuses(lambda key, value: value != value)}


def limited(trainer, model, data, val):
    """Fit with a limit on the size of files that the pictures reach and the user's numbers do not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        trainer.fit(model, data, val)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Callbacks and ways to run


def raise_in(hook, error=ValueError):
    """Return a callback that fails in a hook."""

    def fail(trainer):
        raise error("no")

    return At(hook, fail)


class FailsAgain(Callback):
    """Fails in a batch, and again in its own ``on_exception``."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step = trainer.global_step

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 1:
            raise ValueError("no")

    def on_exception(self, trainer, module, exception):
        raise LookupError("no, again")


class ScriptsLayer(Callback):
    """Scripts the layer at the end of a batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        torch.jit.script(module.rnn)


class CallsModel(Callback):
    """Calls the model, at many hooks."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with torch.no_grad():
            module(batch[0])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module(batch[0]).sum().item()


class Averages(Callback):
    """Keeps a moving average of the weights, and validates with it."""

    def on_fit_start(self, trainer, module):
        self.average = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, value in module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_validation_start(self, trainer, module):
        self.kept = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.average)

    def on_validation_end(self, trainer, module):
        module.load_state_dict(self.kept)


class Nested(Callback):
    """Trains another model in the middle of a run, with the same monitor if there is one."""

    def __init__(self, monitor):
        self.monitors = [] if monitor is None else [monitor]

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            make_trainer(*self.monitors, max_epochs=1).fit(Regressor("GRU"), series())


def twice(trainer, model, data, val):
    trainer.fit(model, data, val)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data, val)
    trainer.validate(model, val, verbose=False)
    trainer.test(model, val, verbose=False)


class WithTest(Regressor):
    def test_step(self, batch, batch_idx):
        return self(batch[0]).mean()


def again_with_grad_off(trainer, model, data, val):
    with torch.no_grad():
        trainer.fit(model, data, val)


def interrupted(signum):
    def send(trainer):
        if trainer.global_step == 2:
            signal.raise_signal(signum)

    return send


class Quantized(Regressor):
    """Trains beside a layer that is quantised."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.ao.quantization.quantize_dynamic(nn.GRU(FEATURES, 4, batch_first=True), {nn.GRU})

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.frozen(batch[0])[0].mean().detach()


class FakeQuantized(Regressor):
    def __init__(self):
        super().__init__()
        self.observer = torch.ao.quantization.FakeQuantize()

    def forward(self, inputs):
        return super().forward(self.observer(inputs))


class Compiled(Regressor):
    def __init__(self, backend="eager", **options):
        super().__init__("GRU")
        self.rnn = torch.compile(self.rnn, backend=backend, **options)


class Tied(CellModel):
    """Two cells share their weights; one is called in turn with the other."""

    def __init__(self):
        super().__init__(nn.GRUCell(FEATURES, 5))
        self.twin = nn.GRUCell(FEATURES, 5)
        self.twin.weight_hh = self.rnn.weight_hh

    def forward(self, inputs):
        return super().forward(inputs) + self.twin(inputs[:, 0]).mean()


class Optimized(Regressor):
    """Trains with an optimizer of torch."""

    def __init__(self, kind, **options):
        super().__init__("GRU")
        self.kind, self.options = kind, {"lr": 0.01, **options}

    def configure_optimizers(self):
        return self.kind(self.parameters(), **self.options)


class Scheduled(Regressor):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


class SkipsSteps(Regressor):
    """Returns nothing from some training steps."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class EndsEpochs(Regressor):
    """Ends an epoch before its last batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


class Checkpointed(Regressor):
    """Computes its forward again in the backward."""

    def forward(self, inputs):
        return self.head(torch.utils.checkpoint.checkpoint(self.rnn, inputs, use_reentrant=False)[0])


class Remembers(Loop):
    """Carries its state from batch to batch."""

    state = None

    def forward(self, inputs):
        outputs, state = [], self.state
        for step in inputs.unbind(1):
            state = self.rnn(step, state)
            outputs.append(state[0])
        self.state = tuple(part.detach() for part in state)
        return self.head(torch.stack(outputs, 1))


class Parametrised(Regressor):
    def __init__(self, parametrise):
        super().__init__("GRU")
        parametrise(self.rnn, "weight_hh_l0")


class HasHooks(Regressor):
    """Has hooks of every kind on its layer."""

    def __init__(self):
        super().__init__()
        self.rnn.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        self.rnn.register_forward_hook(lambda module, args, output: (output[0] + 0.1, output[1]), always_call=True)
        self.rnn.register_full_backward_hook(lambda module, inputs, outputs: None)
        self.rnn.register_state_dict_pre_hook(lambda *_: None)


class Inference(Regressor):
    """Calls its layer in inference mode, too."""

    def training_step(self, batch, batch_idx):
        with torch.inference_mode():
            extra = self(batch[0]).mean()
        return super().training_step(batch, batch_idx) + float(extra)


def swa(folder, monitor):
    return [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)]


def checkpoints(folder, monitor):
    return [ModelCheckpoint(folder, monitor="loss", save_top_k=2, every_n_train_steps=1, save_last=True)]


WITH_FILES = {"enable_checkpointing": True}


class DrawsAlways(TanhCell):
    """Draws random numbers in every call, in evaluation mode, too."""

    torchs, numpys, pythons = torch.Generator(), np.random.default_rng(0), random.Random(0)
    drawn: ClassVar[dict[str, int]] = {"calls": 0}
    total = 0

    def __init__(self, draw):
        super().__init__()
        self.draw, self.own = draw, torch.Generator()

    def forward(self, inputs, state):
        type(self).total += 1
        self.drawn["calls"] += 1
        return super().forward(inputs, state) + 0.1 * self.draw(self, state)


DRAWS = {
    "torch": lambda cell, state: torch.randn_like(state),
    "dropout": lambda cell, state: nn.functional.dropout(state),
    "bernoulli": lambda cell, state: torch.bernoulli(torch.full_like(state, 0.5)),
    "python": lambda cell, state: state * random.random(),
    "numpy": lambda cell, state: state * np.random.rand(),
    "a generator of its own": lambda cell, state: torch.rand(state.shape, generator=cell.own),
    "a generator of its class": lambda cell, state: torch.rand(state.shape, generator=cell.torchs),
    "numpy's generator of its class": lambda cell, state: state * cell.numpys.random(),
    "python's generator of its class": lambda cell, state: state * cell.pythons.random(),
    "a counter of its class": lambda cell, state: state / cell.total,
    "a table of its class": lambda cell, state: state / cell.drawn["calls"],
}


def draws_always(draw):
    """Return a model whose cell draws, with the class in the same state for each run."""
    DrawsAlways.torchs.manual_seed(1)
    DrawsAlways.numpys, DrawsAlways.pythons, DrawsAlways.total = np.random.default_rng(0), random.Random(0), 0
    DrawsAlways.drawn["calls"] = 0
    return CellModel(DrawsAlways(draw))


class DropConnect(nn.Module):
    """A weight of which random numbers are dropped, in evaluation mode, too."""

    def forward(self, weight):
        return nn.functional.dropout(weight, 0.3)


def drop_connected():
    model = Regressor("GRU")
    nn.utils.parametrize.register_parametrization(model.rnn, "weight_hh_l0", DropConnect())
    return model


CELL = {"modules": "rnn"}

FAULTS = {
    "sizes change between calls": Setting(WithPast, monitor=CELL, says=COULD_NOT, measures=False),
    "features change between calls": Setting(Shrinking, monitor=CELL, says=COULD_NOT, measures=False),
    "ids first and vectors later": Setting(StartsWithIds, monitor=CELL),
    "vmap": Setting(Mapped, monitor=CELL, says=COULD_NOT, measures=False),
    "per-sample gradients": Setting(PerSample, monitor=CELL),
    "a layer in torch.func.grad": Setting(LayerUnderGrad),
    "a stack loses a layer": Setting(Loses, says=COULD_NOT),
    "a layer is replaced": Setting(Gains, says="`rnn`"),
    "a logger refuses keys": Setting(trainer=refuses_keys, says="Refuses"),
    "a logger refuses NaN": Setting(trainer=refuses_nan, data=lambda: series(batch_size=1, time=1), says="Refuses"),
    "pictures reach a limit": Setting(
        trainer=lambda folder: {"logger": TensorBoardLogger(folder)},
        play=limited,
        data=lambda: series(20),
        pictures=True,
        says="picture",
    ),
    "scripted in a step": Setting(Scripts, says="scripted", measures=False),
    "scripted by a callback before": Setting(callbacks=lambda *_: [ScriptsLayer()]),
    "scripted by a callback after": Setting(callbacks=lambda *_: [ScriptsLayer()], first=True),
    "a budget of almost nothing": Setting(monitor={"max_overhead": 1e-320}),
    "on_exception fails, before": Setting(callbacks=lambda *_: [FailsAgain()], raises=LookupError),
    "on_exception fails, after": Setting(callbacks=lambda *_: [FailsAgain()], first=True, raises=LookupError),
    "a nested trainer": Setting(callbacks=lambda folder, monitor: [Nested(monitor)], says="another"),
}

SETTINGS = {
    **{
        f"draws: {name}": Setting(lambda draw=draw: draws_always(draw), monitor=CELL, says=COULD_NOT, measures=False)
        for name, draw in DRAWS.items()
    },
    "drops connections": Setting(drop_connected, measures=None),
    "traced": Setting(Traces, says=None, measures=None),
    "traced symbolically": Setting(Symbolic, monitor=CELL, measures=None),
    "exported": Setting(Exports, monitor=CELL, measures=None),
    "copied and pickled": Setting(Copies),
    "hooks come and go": Setting(HandlesOfOthers),
    "the layer fails": Setting(Raises, raises=RuntimeError),
    "the layer fails and is not needed": Setting(Recovers),
    "arguments of an unknown kind": Setting(WithObjects, monitor=CELL),
    "a cell that cannot be called alone": Setting(lambda: CellModel(Complains()), monitor=CELL),
    **{
        f"an error in {hook}": Setting(
            callbacks=lambda *_, hook=hook: [raise_in(hook)], raises=ValueError, measures=None
        )
        for hook in (
            "setup",
            "on_fit_start",
            "on_sanity_check_start",
            "on_train_start",
            "on_train_epoch_start",
            "on_train_batch_start",
            "on_before_zero_grad",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "on_train_batch_end",
            "on_validation_start",
            "on_validation_batch_end",
            "on_validation_end",
            "on_train_epoch_end",
            "on_train_end",
            "on_fit_end",
            "teardown",
        )
    },
    "KeyboardInterrupt": Setting(
        callbacks=lambda *_: [raise_in("on_after_backward", KeyboardInterrupt)], raises=SystemExit, measures=False
    ),
    "SystemExit": Setting(
        callbacks=lambda *_: [raise_in("on_before_backward", SystemExit)], raises=SystemExit, measures=False, first=True
    ),
    "SIGINT": Setting(callbacks=lambda *_: [At("on_train_batch_end", interrupted(signal.SIGINT))], raises=SystemExit),
    "SIGTERM": Setting(callbacks=lambda *_: [At("on_train_batch_end", interrupted(signal.SIGTERM))], raises=SystemExit),
    "a callback calls the model": Setting(callbacks=lambda *_: [CallsModel()]),
    "a callback after calls the model": Setting(callbacks=lambda *_: [CallsModel()], first=True),
    "averaged weights": Setting(callbacks=lambda *_: [Averages()]),
    "stochastic weight averaging": Setting(callbacks=swa, trainer={"max_epochs": 3}),
    "checkpoints": Setting(callbacks=checkpoints, trainer=WITH_FILES),
    "accumulation scheduler": Setting(callbacks=lambda *_: [GradientAccumulationScheduler({0: 2, 1: 1})]),
    "timer": Setting(callbacks=lambda *_: [Timer("00:00:01:00")]),
    "learning rates": Setting(callbacks=lambda *_: [LearningRateMonitor()]),
    "early stopping": Setting(
        callbacks=lambda *_: [EarlyStopping("loss", patience=0, mode="max", check_on_train_epoch_end=True)],
        trainer={"max_epochs": 4},
    ),
    "learning rate finder": Setting(
        callbacks=lambda *_: [LearningRateFinder(num_training_steps=4)],
        trainer=lambda folder: {"default_root_dir": folder},
    ),
    "fitted twice, validated and tested": Setting(WithTest, play=twice),
    "without gradients outside": Setting(play=again_with_grad_off),
    "quantised beside": Setting(Quantized),
    "fake-quantised inputs": Setting(FakeQuantized),
    "compiled layer": Setting(Compiled),
    "tied weights": Setting(Tied, monitor={"modules": ["rnn", "twin"]}),
    "LBFGS": Setting(lambda: Optimized(torch.optim.LBFGS, max_iter=3)),
    "AdamW": Setting(lambda: Optimized(torch.optim.AdamW, amsgrad=True)),
    "Rprop": Setting(lambda: Optimized(torch.optim.Rprop)),
    "fused SGD": Setting(lambda: Optimized(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True)),
    "a learning rate that follows a metric": Setting(Scheduled),
    "steps without a loss": Setting(SkipsSteps),
    "epochs cut short": Setting(EndsEpochs, monitor={"every_n_epochs": 1, "every_n_train_steps": None}),
    "two optimizers": Setting(TwoOptimizers),
    "checkpointed activations": Setting(Checkpointed),
    "state from batch to batch": Setting(Remembers),
    "weight norm": Setting(lambda: Parametrised(nn.utils.parametrizations.weight_norm)),
    "orthogonal": Setting(lambda: Parametrised(nn.utils.parametrizations.orthogonal)),
    "pruned": Setting(lambda: Parametrised(lambda rnn, name: nn.utils.prune.l1_unstructured(rnn, name, 0.3))),
    "hooks of every kind": Setting(HasHooks, measures=False, says=COULD_NOT),
    "inference mode in a step": Setting(Inference),
    "packed": Setting(Packed, val=lambda: None),
    "halves": Setting(Halves),
    "parts": Setting(Parts),
    "tokens": Setting(Language, data=tokens, val=lambda: tokens(1)),
    "a layer that is called now and then": Setting(TwoLayers, says="was not called"),
    "a stream": Setting(data=lambda: series(dataset=Stream), trainer={"max_epochs": 2}),
    "empty epochs": Setting(trainer={"limit_train_batches": 0}, measures=False),
    "one batch again and again": Setting(trainer={"overfit_batches": 1}),
    "fast_dev_run": Setting(trainer={"fast_dev_run": 2}),
    "barebones": Setting(
        trainer=lambda folder: {
            "barebones": True,
            "logger": None,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": None,
        },
        measures=None,
    ),
    "accumulated": Setting(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "bf16-mixed": Setting(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Setting(trainer={"precision": "bf16-true"}),
    "64-true": Setting(trainer={"precision": "64-true"}),
    "anomalies": Setting(trainer={"detect_anomaly": True}),
    "deterministic": Setting(trainer={"deterministic": True}),
    "profiled": Setting(trainer=lambda folder: {"profiler": "simple"}),
    "loaders made anew": Setting(trainer={"reload_dataloaders_every_n_epochs": 1}),
    "validated in between": Setting(trainer={"val_check_interval": 1, "num_sanity_val_steps": 0}),
    "a limit of steps": Setting(trainer={"max_steps": 4, "max_epochs": -1}),
    "loggers of two kinds": Setting(trainer=lambda folder: {"logger": [CSVLogger(folder), TensorBoardLogger(folder)]}),
    "dead units": Setting(lambda: Regressor("RNN", nonlinearity="relu", lr=5.0)),
    "weights that blow up": Setting(lambda: Regressor("RNN", lr=1e30)),
    "bidirectional with projections": Setting(
        lambda: Regressor("LSTM", bidirectional=False, proj_size=0, num_layers=3, dropout=0.5)
    ),
    "flossed": Setting(
        callbacks=lambda folder, monitor: [GradientFlossing(num_exponents=2, steps=3, every_n_train_steps=2)]
    ),
    "flossed behind the monitor": Setting(
        callbacks=lambda folder, monitor: [GradientFlossing(num_exponents=2, steps=3, every_n_epochs=1)], first=True
    ),
    "batches of one": Setting(data=lambda: series(batch_size=1)),
    "sequences of one step": Setting(data=lambda: series(time=1)),
}


@pytest.mark.parametrize("name", [*FAULTS, *SETTINGS])
def test_a_run_with_the_monitor_keeps_every_promise(name, tmp_path):
    compare((FAULTS | SETTINGS)[name], tmp_path)
