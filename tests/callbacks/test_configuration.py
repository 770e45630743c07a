"""LightningCLI, YAML files, and module names in other sequences than lists."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import Regressor, fit, series

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor

CONFIGURATION = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_lyapunov.LyapunovMonitor
      init_args: {modules: [rnn], every_n_train_steps: 2, num_exponents: null, dtype: torch.float64}
    - class_path: InstabilityStopping
      init_args: {threshold: 0.1, lower_threshold: -3.0, monitor: lyapunov/rnn/max}
"""


class Series(pl.LightningDataModule):
    def train_dataloader(self):
        return series()


def cli(*arguments):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    return LightningCLI(Regressor, Series, args=list(arguments), save_config_callback=None)


def test_a_yaml_file_makes_both_callbacks_by_long_and_short_names(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    trainer = cli("fit", "--config", str(tmp_path / "run.yaml")).trainer
    monitor = next(callback for callback in trainer.callbacks if isinstance(callback, LyapunovMonitor))
    rule = next(callback for callback in trainer.callbacks if isinstance(callback, InstabilityStopping))
    assert (monitor.modules, monitor.every_n_epochs, monitor.every_n_train_steps) == (["rnn"], None, 2)
    assert (monitor.num_exponents, monitor.dtype) == (None, torch.float64)
    assert (rule.threshold, rule.lower_threshold, rule.monitor) == (0.1, -3.0, "lyapunov/rnn/max")
    assert monitor.history["rnn"]["step"].tolist() == [0, 1]


@pytest.mark.parametrize("callback", [LyapunovMonitor, InstabilityStopping])
def test_the_help_of_the_command_line_is_the_docstring(callback, capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--trainer.callbacks.help", f"lightning_lyapunov.{callback.__name__}")
    text = " ".join(capsys.readouterr().out.split())
    wanted = {
        LyapunovMonitor: "sequences per measurement and rank",
        InstabilityStopping: "how many measurements in a row",
    }
    assert wanted[callback] in text


def test_an_argument_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--trainer.callbacks=lightning_lyapunov.LyapunovMonitor", "--trainer.callbacks.every_n=3")
    assert "every_n" in capsys.readouterr().err


class ListConfig(list):
    """What Hydra passes: a sequence that is not simply a list."""


@pytest.mark.parametrize("kind", [list, tuple, ListConfig])
def test_names_may_come_in_any_sequence(kind):
    monitor = LyapunovMonitor(kind(["rnn"]))
    fit(Regressor(), monitor, max_epochs=1)
    assert list(monitor.history) == ["rnn"]
