"""Does gradient flossing help a recurrent network to learn what lies many steps back? A study with its baselines.

    python examples/flossing.py           # 40 minutes on one core; finished runs are read from the table
    python examples/flossing.py --fast    # a quarter of a minute: one task, one network, two seeds

Two tasks: say at the end of a sequence what its first input was (`recall`), or what the product of its first and its
last input is (`xor`); all between is noise. Three cells of 64 units, from four starts, without flossing, with flossing
before training, and for the plain RNN with flossing before and during it. A loss of 1 is chance; a run has learned its
task once the mean loss of 20 batches is below 0.25. The table of all runs and the picture are written to `--folder`.
`flossing.csv` and `flossing.png` beside this file are those of a whole study: put the table there to draw it again.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lyapunov import lyapunov_init_

UNITS, BATCH_SIZE, NOISE, MAX_STEPS, LEARNED, WINDOW = 64, 32, 0.3, 400, 0.25, 20
FLOSSED_SEQUENCES, EVERY, STEPS_DURING = 8, 100, 10

# Tasks: `delay` steps lie between the first and the last input


def recall(inputs: Tensor) -> Tensor:
    """Return the first input of each sequence."""
    return inputs[0]


def xor(inputs: Tensor) -> Tensor:
    """Return the product of the first and the last input, which are 1 or -1."""
    inputs[0].sign_()
    inputs[-1].sign_()
    return inputs[0] * inputs[-1]


TASKS: dict[str, Callable[[Tensor], Tensor]] = {"recall": recall, "xor": xor}

# Cells, and what is done to them before


def default(rnn: nn.RNNBase) -> None:
    """Keep the weights that PyTorch draws."""


def orthogonal(rnn: nn.RNNBase) -> None:
    """Draw an orthogonal matrix for each gate."""
    for block in rnn.weight_hh_l0.detach().split(rnn.hidden_size):
        nn.init.orthogonal_(block)


def forget_bias(rnn: nn.RNNBase) -> None:
    """Open the gate that keeps the state: an LSTM's forget gate, a GRU's update gate, the second block of each."""
    with torch.no_grad():
        rnn.bias_ih_l0[rnn.hidden_size : 2 * rnn.hidden_size] = 3.0


def chaotic(rnn: nn.RNNBase) -> None:
    """Draw weights far above the edge of chaos (Sompolinsky, Crisanti and Sommers, 1988): gated cells need more."""
    nn.init.normal_(rnn.weight_hh_l0, std=(2.5 if isinstance(rnn, nn.RNN) else 8.0) / math.sqrt(rnn.hidden_size))


CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
STARTS = {"default": default, "orthogonal": orthogonal, "forget_bias": forget_bias, "chaotic": chaotic}
FLOSSINGS = ("none", "before", "during")


@dataclass(frozen=True)
class Setting:
    """What a run is of."""

    task: str
    delay: int
    cell: str
    start: str
    flossing: str
    num_exponents: int
    seed: int


@dataclass(frozen=True)
class Result(Setting):
    """What came out: the step at which the task was learned (-1: never), the last loss, exponents and seconds."""

    learned_at: int
    loss: float
    first_exponent: float
    flossed_exponent: float
    training_seconds: float
    training_steps: int
    flossing_seconds: float

    @property
    def learned(self) -> bool:
        return self.learned_at >= 0


def run(setting: Setting) -> Result:
    """Train a network until it has learned its task, and no longer than `MAX_STEPS`."""
    torch.manual_seed(setting.seed)
    rnn, head = CELLS[setting.cell](1, UNITS), nn.Linear(UNITS, 1)
    STARTS[setting.start](rnn)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 1e-3 if setting.cell == "rnn" else 3e-3)
    data = torch.Generator().manual_seed(1000 + setting.seed)
    losses: list[float] = []
    flossing, exponents, began = 0.0, (math.nan, math.nan), time.perf_counter()
    for step in range(MAX_STEPS):
        inputs = torch.randn(setting.delay + 1, BATCH_SIZE, 1, generator=data)
        inputs[1:] *= NOISE
        target = TASKS[setting.task](inputs)
        if setting.flossing != "none" and (step == 0 or (setting.flossing == "during" and step % EVERY == 0)):
            start = time.perf_counter()
            few = {"steps": STEPS_DURING} if step else {}
            found = lyapunov_init_(rnn, inputs[:, :FLOSSED_SEQUENCES], num_exponents=setting.num_exponents, **few)
            exponents = exponents if step else (float(found.before[0, 0]), float(found.after[0, 0]))
            flossing += time.perf_counter() - start
        states, _ = rnn(inputs)
        loss = F.mse_loss(head(states[-1]), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*rnn.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        losses.append(loss.item())
        if sum(losses[-WINDOW:]) < WINDOW * LEARNED and len(losses) >= WINDOW:
            break
    seconds = time.perf_counter() - began - flossing
    mean = sum(losses[-WINDOW:]) / WINDOW
    learned_at = len(losses) if mean < LEARNED else -1
    return Result(
        **asdict(setting),
        learned_at=learned_at,
        loss=round(mean, 4),
        first_exponent=round(exponents[0], 4),
        flossed_exponent=round(exponents[1], 4),
        training_seconds=round(seconds, 2),
        training_steps=len(losses),
        flossing_seconds=round(flossing, 2),
    )


STARTS_OF = [(cell, start) for cell, start in product(CELLS, STARTS) if (cell, start) != ("rnn", "forget_bias")]
RNNS = [network for network in STARTS_OF if network[0] == "rnn"]
NUM_EXPONENTS = 16


def settings(seeds: int) -> list[Setting]:
    """Return the runs of the study. How many exponents to move was chosen on `recall` and checked on `xor`."""
    counts = product(TASKS, (40,), [("rnn", "default")], ("before",), (4, NUM_EXPONENTS, 48))
    by_start = [("recall", 40, STARTS_OF), ("xor", 40, [*RNNS, ("gru", "default"), ("gru", "forget_bias")])]
    by_start += [(task, 20, RNNS) for task in TASKS]
    plain = [(*one, flossing) for one in by_start for flossing in ("none", "before")]
    plain += [(task, 40, RNNS, "during") for task in TASKS]
    by_flossing = [(task, delay, network, how, NUM_EXPONENTS) for task, delay, some, how in plain for network in some]
    chosen = [
        Setting(task, delay, cell, start, flossing, count, seed)
        for task, delay, (cell, start), flossing, count in (*counts, *by_flossing)
        for seed in range(seeds)
    ]
    return list(dict.fromkeys(chosen))


FAST = [
    Setting("recall", 20, "rnn", "default", flossing, NUM_EXPONENTS, seed)
    for flossing in ("none", "before")
    for seed in (0, 1)
]


def finished(table: Path) -> dict[Setting, Result]:
    """Return the runs of a table."""
    if not table.exists():
        return {}
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Result)}
    with table.open(newline="") as file:
        results = [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
    return {Setting(*(getattr(result, field.name) for field in fields(Setting))): result for result in results}


def study(chosen: list[Setting], table: Path) -> list[Result]:
    """Return the results of some runs; those that the table lacks are made, and written to it as they end."""
    known = finished(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        if not known:
            writer.writeheader()
        for setting in tqdm([setting for setting in chosen if setting not in known], desc="runs", mininterval=1):
            known[setting] = run(setting)
            writer.writerow(asdict(known[setting]))
            file.flush()
    return [known[setting] for setting in chosen]


# What came out


def wilson(learned: int, runs: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    share, z = learned / runs, 1.96
    middle, width = share + z**2 / (2 * runs), z * math.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    return max(0.0, (middle - width) / (1 + z**2 / runs)), min(1.0, (middle + width) / (1 + z**2 / runs))


def median_steps(results: list[Result]) -> tuple[float, float, float]:
    """Return the median of the steps to learn a task, and its 95 % interval by the bootstrap; infinite: not learned."""
    steps = torch.tensor([result.learned_at if result.learned else math.inf for result in results])
    drawn = steps[torch.randint(len(steps), (2000, len(steps)), generator=torch.Generator().manual_seed(0))]
    medians = drawn.sort(-1).values[:, (len(steps) - 1) // 2].sort().values
    return float(steps.sort().values[(len(steps) - 1) // 2]), float(medians[50]), float(medians[1949])


def cost(results: list[Result]) -> float:
    """Return the time of flossing in training steps of the same run, the median."""
    return float(
        torch.tensor([one.flossing_seconds * one.training_steps / one.training_seconds for one in results]).median()
    )


Group = tuple[str, int, str, str, int]


def grouped(results: list[Result]) -> dict[Group, dict[str, list[Result]]]:
    """Return the results of each task, delay, cell, start and number of exponents, by their flossing."""
    groups: dict[Group, dict[str, list[Result]]] = {}
    for one in results:
        key = one.task, one.delay, one.cell, one.start, one.num_exponents
        groups.setdefault(key, {}).setdefault(one.flossing, []).append(one)
    return groups


def said(results: list[Result]) -> str:
    """Say how many runs have learned, with the interval of their share, and after how many steps."""
    if not results:
        return ""
    learned, (median, *between) = sum(one.learned for one in results), median_steps(results)
    low, high = (f"{100 * limit:.0f}" for limit in wilson(learned, len(results)))
    share = f"{learned} of {len(results)} ({low} to {high} %)"
    steps = "never" if math.isinf(median) else f"{median:.0f}"
    limits = " to ".join("never" if math.isinf(limit) else f"{limit:.0f}" for limit in between)
    return share if steps == limits == "never" or not learned else f"{share}; {steps} ({limits})"


def report(results: list[Result]) -> list[str]:
    """Return the rows of a table: who learned of how many (95 %), the median of the steps (95 %), and the cost."""
    lines = [
        "| task, delay | network | exponents | none | before | during | cost, steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, delay, cell, start, count), by_flossing in grouped(results).items():
        flossed = by_flossing.get("before", []) or by_flossing.get("during", [])
        columns = " | ".join(said(by_flossing.get(name, [])) for name in FLOSSINGS)
        spent = f"{cost(flossed):.0f}" if flossed else ""
        lines.append(f"| {task}, {delay} | {cell.upper()}, {start.replace('_', ' ')} | {count} | {columns} | {spent} |")
    return lines


COLOURS = {"none": "0.5", "before": "tab:blue", "during": "tab:green"}


def draw_network(left: Any, right: Any, place: int, by_flossing: dict[str, list[Result]]) -> None:
    """Draw the share of a network's runs that learned, and the steps that they took, each with its interval."""
    for number, (name, colour) in enumerate(COLOURS.items()):
        if not (runs := by_flossing.get(name, [])):
            continue
        x, learned = place + 0.25 * (number - 1), sum(one.learned for one in runs)
        left.plot([x, x], wilson(learned, len(runs)), color=colour, linewidth=1)
        left.plot(x, learned / len(runs), "o", color=colour)
        middle, low, high = (min(value, 1.15 * MAX_STEPS) for value in median_steps(runs))
        right.plot([x, x], [low, high], color=colour, linewidth=1)
        right.plot(x, middle, "o" if middle <= MAX_STEPS else "x", color=colour)


def draw(results: list[Result], path: Path) -> None:
    """Draw what came out: a row for each task and delay, a place for each network."""
    from matplotlib import pyplot

    groups = {key: value for key, value in grouped(results).items() if key[-1] == NUM_EXPONENTS}
    rows = sorted({key[:2] for key in groups}, key=lambda row: (list(TASKS).index(row[0]), -row[1]))
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(13, 1 + 2.2 * len(rows)), squeeze=False, layout="constrained")
    for (task, delay), (left, right) in zip(rows, axes, strict=True):
        networks = [key[2:4] for key in groups if key[:2] == (task, delay)]
        names = [network for network in STARTS_OF if network in networks]
        for place, network in enumerate(names):
            draw_network(left, right, place, groups[(task, delay, *network, NUM_EXPONENTS)])
        left.set(ylim=(-0.05, 1.05), ylabel=f"{task}, delay {delay}\nshare that learned")
        right.set(yscale="log", ylim=(15, 1.3 * MAX_STEPS), ylabel="steps to learn, median")
        right.set_yticks([20, 50, 100, 200, MAX_STEPS], ["20", "50", "100", "200", str(MAX_STEPS)])
        right.minorticks_off()
        for axis in (left, right):
            labels = [f"{cell}\n{start.replace('_', ' ')}" for cell, start in names]
            axis.set_xticks(range(len(names)), labels, fontsize=7)
            axis.set_xlim(-0.5, max(len(names), 2) - 0.5)
    handles = [pyplot.Line2D([], [], color=colour, marker="o", label=f"flossing: {n}") for n, colour in COLOURS.items()]
    title = f"bars: 95 %; a cross: most runs did not learn in {MAX_STEPS} steps"
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="four runs of one network")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/flossing"))
    arguments = parser.parse_args()
    chosen = FAST if arguments.fast else settings(arguments.seeds)
    results = study(chosen, arguments.folder / "flossing.csv")
    print("\n".join(["", *report(results)]))
    draw(results, arguments.folder / "flossing.png")
    print(f"\nThe table and the picture: {arguments.folder.resolve()}")


if __name__ == "__main__":
    main()
