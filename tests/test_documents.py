"""The README and the examples: their code runs, and their names, keys and links exist."""

import logging
import math
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, Regressor, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.callbacks.publish import DEFAULT_METRICS, METRICS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "examples" / "reading_the_dashboard.md").read_text(encoding="utf-8")
GUARANTEES = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").partition("## What is guaranteed")[2]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def keys(text: str) -> set[str]:
    rows = re.findall(r"^\| (`lyapunov/.*?) \|", text, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(.*?)`", row)}


def run_example(name: str, monkeypatch, tmp_path, *arguments: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        logger.setLevel(level)  # the examples quieten it


def test_the_python_blocks_of_the_readme_run_one_after_the_other(capsys):
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert namespace["spectrum"].shape == (4, 32)
    said = capsys.readouterr().out
    printed = [float(number) for number in re.findall(r"-?\d+\.\d+", said)]
    assert printed[:2] == pytest.approx([0.9624, -0.9624], abs=1e-4)
    assert re.findall(r"^(\S+) CellSpectrum\(-0\.\d+ ± 0\.\d+, 16 sequences, 800 steps\)", said, re.MULTILINE) == [
        "1.l0",
        "1.l1",
    ]
    lorenz = zip(namespace["mean"].tolist(), namespace["stderr"].tolist(), (0.9056, 0.0, -14.572), strict=True)
    assert all(0 < stderr < 0.05 and abs(mean - expected) < 4 * stderr for mean, stderr, expected in lorenz)


def test_the_diff_of_the_readme_is_all_that_a_trainer_needs():
    (diff,) = blocks("diff")
    added = "\n".join(line[2:] for line in diff.splitlines() if line.startswith("+ "))
    namespace: dict[str, object] = {"Trainer": lambda **kwargs: kwargs}
    exec(added, namespace)
    assert isinstance(namespace["trainer"]["callbacks"][0], LyapunovMonitor)


def test_the_key_table_of_the_readme_is_what_is_logged():
    trainer = fit(Regressor(num_layers=2), LyapunovMonitor(strict=True, metrics="all"))
    logged = {key for key in trainer.callback_metrics if key.startswith("lyapunov/")}
    assert {re.sub(r"/rnn\.l\d/", "/<layer>/", key) for key in logged} == keys(README)
    on_request = set(re.findall(r"/<layer>/(\w+)` \| on request|/<layer>/(\w+)`, ", README))
    assert {first or second for first, second in on_request} | {"num_steps"} == set(METRICS) - set(DEFAULT_METRICS)


def test_the_two_commands_of_the_readme_name_what_exists():
    # Python 3.10 has no tomllib.
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [block.strip() for block in blocks("bash")]
    assert len(commands) == 2
    for command, extra in zip(commands, ("examples", "test"), strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert f"'.[{extra}]'" in command
        assert extra in extras
    assert (ROOT / re.search(r"python (examples/\S+)", commands[0]).group(1)).exists()


def test_each_promise_of_the_readme_has_its_test():
    assert "](tests/README.md)" in README
    assert GUARANTEES.count("\n### ") == 9
    points = re.findall(r"^- .*\n(?:  .*\n)*", GUARANTEES, re.MULTILINE)
    assert len(points) > 30
    for point in points:
        links = re.findall(r"\[`(\S+)::(\w+)`\]\((\S+)\)", point)
        assert links, point
        for path, test, link in links:
            assert link == path
            assert f"\ndef {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test


def test_the_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000


@pytest.mark.slow
def test_the_quickstart_says_what_it_learned_and_where_the_dashboard_is(monkeypatch, tmp_path, capsys):
    run_example("quickstart.py", monkeypatch, tmp_path, "--epochs", "2")
    said = capsys.readouterr().out
    assert re.search(r"^start +-\d", said, re.MULTILINE)
    assert re.search(r"^    1 +\d\.\d+ +\d\.\d+ +-0\.\d+ ± 0\.\d+", said, re.MULTILINE)
    assert "stayed stable" in said
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in said
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_quickstart_learns_a_text_of_ones_own(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question; " * 3000, encoding="utf-8")
    run_example("quickstart.py", monkeypatch, tmp_path, "--epochs", "1", "--text", str(tmp_path / "text.txt"))
    assert "116,100 characters to learn from" in capsys.readouterr().out


@pytest.mark.slow
def test_the_unstable_quickstart_is_stopped_before_it_wastes_its_budget(monkeypatch, tmp_path, capsys):
    run_example("quickstart.py", monkeypatch, tmp_path, "--unstable")
    said = capsys.readouterr().out
    spared, epochs = re.search(r"became unstable: .* (\d+) of (\d+) epochs were spared", said).groups()
    assert int(spared) > int(epochs) / 2
    assert "Training stops at step" in said


@pytest.mark.slow
def test_the_closed_loop_runs_from_data_to_exponents(monkeypatch, tmp_path, capsys):
    run_example("closed_loop.py", monkeypatch, tmp_path, "--iterations", "400")
    errors = re.findall(r"^λ\d.* (\S+)$", capsys.readouterr().out, re.MULTILINE)
    # A tenth of the training; the figures of the whole are in the example.
    assert [abs(float(error)) for error in errors[:2]] == pytest.approx([0, 0], abs=0.3)


@pytest.mark.slow
def test_the_custom_cells_are_measured_and_the_unitary_one_neither_forgets_nor_explodes(monkeypatch, tmp_path, capsys):
    run_example("custom_cells.py", monkeypatch, tmp_path, "--epochs", "1")
    rows = re.findall(r"^(\w+) +([+-]\d\.\d{4}) +\S+ +([+-]\d\.\d{4})", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 5
    assert all(float(largest) >= float(smallest) for _, largest, smallest in rows)
    assert [(float(largest), float(smallest)) for name, largest, smallest in rows if name == "UnitaryCell"] == [(0, 0)]


@pytest.mark.slow
def test_the_plain_function_example_agrees_with_the_literature(monkeypatch, tmp_path, capsys):
    run_example("plain_function.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    first = {name: float(value) for name, value in re.findall(r"^(\S+).*?([+-]\d\.\d{4}) ±", said, re.MULTILINE)}
    assert first["Hénon"] == pytest.approx(0.4192, abs=5e-3)
    assert first["Rössler"] == pytest.approx(0.0714, abs=1e-2)
    assert torch.isfinite(torch.tensor(list(first.values()))).all()


@pytest.mark.slow
def test_the_sentiment_network_keeps_its_verdict_on_a_line(monkeypatch, tmp_path, capsys):
    run_example("fixed_points.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    lowest, highest, following = map(
        float, re.search(r"largest eigenvalue: (\S+) to (\S+), .* (\S+)$", said, re.M).groups()
    )
    assert 0.99 < lowest < highest < 1.01
    assert following < 0.9
    left, right = map(float, re.search(r"read-outs go from (\S+) to (\S+)", said).groups())
    assert left < -0.4 < 0.4 < right
    assert float(re.search(r"cosine (\S+)", said).group(1)) > 0.7
    assert -0.1 < float(re.search(r"under input: (\S+)", said).group(1)) < 0
    assert (tmp_path / "runs" / "fixed_points" / "fixed_points.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_remedies_are_run_beside_their_troubles(monkeypatch, tmp_path, capsys):
    run_example("remedies.py", monkeypatch, tmp_path, "--steps", "20")
    said = capsys.readouterr().out
    rows = re.findall(r"^\d-(\S+ +\S+) +\S+ ± \S+ +(\S+) ± \S+ +\S+ +(\S+)  (.*)$", said, re.MULTILINE)
    assert len(rows) == 16
    last = {" ".join(run.split()): float(exponent) for run, exponent, *_ in rows}
    stopped = {" ".join(run.split()) for run, *_, word in rows if word == "at step 19"}
    not_finite = {" ".join(run.split()) for run, _, loss, _ in rows if not math.isfinite(float(loss))}
    assert stopped == {"exploding rate-too-high", "chaotic stopped"}
    flossed = [exponent for run, exponent in last.items() if run.endswith("-flossed")]
    assert len(flossed) == 4
    assert all(abs(exponent) < 0.15 for exponent in flossed)
    assert not_finite == {"exploding rate-too-high"}
    assert last["chaotic strong-weights"] > 0.1 > last["chaotic rescaled"] > -0.1
    assert last["fading default-weights"] < -0.3 < -0.1 < last["fading orthogonal"]
    assert last["lstm default-biases"] < -0.3 < -0.1 < last["lstm forget-bias-3"]
    assert last["gru default-biases"] < -0.3 < -0.1 < last["gru update-bias-3"]
    assert f"tensorboard --logdir {tmp_path / 'runs' / 'remedies'}" in said
    assert (tmp_path / "runs" / "remedies" / "remedies.png").stat().st_size > 10_000
    assert len(list((tmp_path / "runs" / "remedies").glob("*/*/events.out.tfevents.*"))) == 16


@pytest.mark.slow
def test_the_study_of_flossing_goes_on_where_it_was_and_says_what_it_found(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "flossing.py"))
    # Half of the runs were made before.
    table = tmp_path / "runs" / "flossing" / "flossing.csv"
    first = example["study"](example["FAST"][2:], table)
    run_example("flossing.py", monkeypatch, tmp_path, "--fast")
    assert "| recall, 20 | RNN, default | 16 | 0 of 2 (0 to 66 %) | 2 of 2 (34 to 100 %)" in capsys.readouterr().out
    results = list(example["finished"](table).values())
    assert len(results) == 4
    assert results[:2] == first
    assert [result.learned for result in results] == [True, True, False, False]
    assert all(abs(result.flossed_exponent) < 0.1 < 0.4 < -result.first_exponent for result in first)
    assert table.with_name("flossing.png").stat().st_size > 5000


def test_the_table_of_flossing_is_that_of_the_runs():
    example = runpy.run_path(str(ROOT / "examples" / "flossing.py"))
    results = example["finished"](ROOT / "examples" / "flossing.csv")
    assert set(results) == set(example["settings"](5))
    rows = example["report"]([results[setting] for setting in example["settings"](5)])
    assert len(rows) > 20
    assert "\n".join(rows) in PAGE


def test_the_intervals_of_the_study_of_flossing():
    example = runpy.run_path(str(ROOT / "examples" / "flossing.py"))
    assert example["wilson"](5, 5) == pytest.approx((0.5655, 1.0), abs=1e-3)
    assert example["wilson"](0, 5) == pytest.approx((0.0, 0.4345), abs=1e-3)
    assert example["wilson"](3, 10) == pytest.approx((0.1078, 0.6032), abs=1e-3)
    few = [SimpleNamespace(learned=step > 0, learned_at=step) for step in (10, 30, 20, -1, 40)]
    middle, low, high = example["median_steps"](few)
    assert (middle, low, high) == (30, 10, math.inf)


@pytest.mark.slow
def test_the_stopping_rules_are_compared_on_runs_that_are_recorded_once(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "stopping.py"))
    # Half of the sweep was cut short.
    example["sweep"](example["settings"](fast=True)[:6], example["FOLDER"] / "traces.jsonl")
    run_example("stopping.py", monkeypatch, tmp_path, "--fast")
    said = capsys.readouterr().out
    assert "0 of 6 runs are in" in said
    assert "6 of 12 runs are in" in said
    rows = dict(re.findall(r"^(.*?) +(\d+)%  \d$", said, re.MULTILINE))
    assert set(rows) == set(example["RULES"])
    assert int(rows["NaN alone"]) <= int(rows["InstabilityStopping()"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["InstabilityStopping()", "InstabilityStopping(lower_threshold=-1.0)"])
@pytest.mark.parametrize("setting", [("RNN", 1e-3, 4.0), ("RNN", 3e-1, 1.0), ("RNN", 3e-3, 1.0)], ids=str)
def test_a_replayed_rule_stops_where_the_callback_does(setting, name):
    example = runpy.run_path(str(ROOT / "examples" / "stopping.py"))
    setting = example["Setting"](*setting, epochs=4)
    (epochs,) = example["RULES"][name]([example["train"](setting)])
    torch.manual_seed(0)
    rule, model = eval(name, {"InstabilityStopping": InstabilityStopping}), example["Recall"](setting)
    monitor = LyapunovMonitor(warmup=10, log_spectrum=False)
    data = example["sequences"](10, seed=1)
    assert fit(model, monitor, rule, data=data, max_epochs=4).current_epoch == epochs


def test_what_the_page_on_the_dashboard_names_exists():
    assert "lyapunov/max" in keys(PAGE) <= keys(README)
    links = re.findall(r"\]\((.*?)\)", PAGE)
    assert links
    assert all((ROOT / "examples" / link).stat().st_size > 1000 for link in links)
    script = (ROOT / "examples" / "remedies.py").read_text(encoding="utf-8")
    named = re.findall(r"^\| (?:LSTM, |GRU, )?`([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
    assert set(named) == set(re.findall(r'Run\("\S+", "(.*?)"', script))


def test_the_remedies_of_the_page_do_what_it_says():
    rate, clip, rescale, orthogonal, gate, floss = blocks("python", PAGE)
    model = SimpleNamespace(rnn=torch.nn.RNN(2, 8), parameters=lambda: model.rnn.parameters())
    namespace = {"torch": torch, "model": model, "Trainer": dict, "LyapunovMonitor": LyapunovMonitor}
    exec(rate, namespace)
    assert namespace["configure_optimizers"](model).defaults["lr"] == 1e-4
    exec(clip, namespace)
    assert namespace["trainer"]["gradient_clip_val"] == 0.1
    exec(floss, namespace)
    assert [type(callback).__name__ for callback in namespace["trainer"]["callbacks"]] == [
        "GradientFlossing",
        "LyapunovMonitor",
    ]
    exec(rescale, namespace)
    assert torch.linalg.eigvals(model.rnn.weight_hh_l0).abs().max().item() == pytest.approx(1.2)
    exec(orthogonal, namespace)
    torch.testing.assert_close(model.rnn.weight_hh_l0 @ model.rnn.weight_hh_l0.T, torch.eye(8))
    for cell in (torch.nn.LSTM, torch.nn.GRU):
        model.rnn = cell(2, 8)
        exec(gate, namespace)
        assert (model.rnn.bias_ih_l0 == 3).nonzero().flatten().tolist() == list(range(8, 16))
        # It is the gate that keeps the state: a change of it lasts.
        assert lyapunov_spectrum(model.rnn, torch.zeros(50, 1, 2), num_exponents=1).item() > -0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_sweep_drops_trials_and_lists_the_exponent_among_the_metrics(monkeypatch, tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    verbosity = optuna.logging.get_verbosity()
    try:
        run_example("sweep.py", monkeypatch, tmp_path, "--trials", "5")
    finally:
        optuna.logging.set_verbosity(verbosity)
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +\d+ +[\d.]+ +\S+ +([+-][\d.]+) +[\d.]+(  \(dropped.*)?$", printed, re.MULTILINE)
    assert len(rows) == 5
    assert [bool(note) for _, note in rows] == [not -10 <= float(gain) <= 4 for gain, _ in rows]
    assert "trials, of which" in printed
    for folder in sorted((tmp_path / "runs" / "sweep").iterdir()):
        events = EventAccumulator(str(folder)).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/experiment"]
        metrics = HParamsPluginData.FromString(content).experiment.metric_infos
        assert {metric.name.tag for metric in metrics} == {"lyapunov/max", "loss"}
        assert math.isfinite(events.Scalars("lyapunov/max")[-1].value)
