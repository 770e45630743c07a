"""What the README and the examples say is true, because it is run."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from models import Regressor, fit

from lightning_lyapunov import LyapunovMonitor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_example(name: str, monkeypatch, tmp_path, *arguments: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_python_blocks_of_the_readme_run_one_after_the_other(capsys):
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert namespace["spectrum"].shape == (4, 32)
    printed = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    assert printed == pytest.approx([0.9624, -0.9624], abs=1e-4)


def test_the_diff_of_the_readme_is_all_that_a_trainer_needs():
    (diff,) = blocks("diff")
    added = "\n".join(line[2:] for line in diff.splitlines() if line.startswith("+ "))
    namespace: dict[str, object] = {"Trainer": lambda **kwargs: kwargs}
    exec(added, namespace)
    assert isinstance(namespace["trainer"]["callbacks"][0], LyapunovMonitor)


def test_the_key_table_of_the_readme_is_what_is_logged():
    table = {
        key for row in re.findall(r"^\| (`lyapunov.*?) \|", README, re.MULTILINE) for key in re.findall(r"`(.*?)`", row)
    }
    trainer = fit(Regressor(), LyapunovMonitor(strict=True))
    logged = {key for key in trainer.callback_metrics if key.startswith("lyapunov/")}
    assert {key.replace("/rnn/", "/<layer>/") for key in logged} == table


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


def test_the_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000


def test_the_quickstart_says_what_it_learned_and_where_the_dashboard_is(monkeypatch, tmp_path, capsys):
    run_example("quickstart.py", monkeypatch, tmp_path, "--epochs", "2")
    said = capsys.readouterr().out
    assert re.search(r"^start +-\d", said, re.MULTILINE)
    assert re.search(r"^    1 +\d\.\d+ +\d\.\d+ +-0\.\d+ ± 0\.\d+", said, re.MULTILINE)
    assert "stayed stable" in said
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in said
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


def test_the_quickstart_learns_a_text_of_ones_own(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question; " * 3000, encoding="utf-8")
    run_example("quickstart.py", monkeypatch, tmp_path, "--epochs", "1", "--text", str(tmp_path / "text.txt"))
    assert "116,100 characters to learn from" in capsys.readouterr().out


def test_the_unstable_quickstart_is_stopped_before_it_wastes_its_budget(monkeypatch, tmp_path, capsys):
    run_example("quickstart.py", monkeypatch, tmp_path, "--unstable")
    said = capsys.readouterr().out
    spared, epochs = re.search(r"became unstable: .* (\d+) of (\d+) epochs were spared", said).groups()
    assert int(spared) > int(epochs) / 2
    assert "Training stops at step" in said


def test_the_closed_loop_runs_from_data_to_exponents(monkeypatch, tmp_path, capsys):
    run_example("closed_loop.py", monkeypatch, tmp_path, "--iterations", "400")
    errors = re.findall(r"^λ\d.* (\S+)$", capsys.readouterr().out, re.MULTILINE)
    # A tenth of the training; the figures of the whole are in the example.
    assert [abs(float(error)) for error in errors[:2]] == pytest.approx([0, 0], abs=0.3)


def test_the_custom_cells_are_measured_and_the_unitary_one_neither_forgets_nor_explodes(monkeypatch, tmp_path, capsys):
    run_example("custom_cells.py", monkeypatch, tmp_path, "--epochs", "1")
    rows = re.findall(r"^(\w+) +([+-]\d\.\d{4}) +\S+ +([+-]\d\.\d{4})", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 5
    assert all(float(largest) >= float(smallest) for _, largest, smallest in rows)
    assert [(float(largest), float(smallest)) for name, largest, smallest in rows if name == "UnitaryCell"] == [(0, 0)]


def test_the_plain_function_example_agrees_with_the_literature(monkeypatch, tmp_path, capsys):
    run_example("plain_function.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    first = {name: float(value) for name, value in re.findall(r"^(\S+).*?([+-]\d\.\d{4}) ±", said, re.MULTILINE)}
    assert first["Hénon"] == pytest.approx(0.4192, abs=5e-3)
    assert first["Rössler"] == pytest.approx(0.0714, abs=1e-2)
    assert torch.isfinite(torch.tensor(list(first.values()))).all()
