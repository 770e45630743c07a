"""The study in `examples/paper`: its statistics on made data, its scripts in small, and its page."""

import csv
import itertools
import logging
import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT

FOLDER = ROOT / "examples" / "paper"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
FIRST_FIGURE = {"a_spectra": "spectra.png", "b_grid": "grid.png", "c_ranges": "ranges.png", "e_digits": "digits.png"}


@pytest.fixture(autouse=True)
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import study

    return study


def run_script(name: str, monkeypatch, tmp_path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--folder", str(tmp_path), *arguments])
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        logger.setLevel(level)  # the scripts quieten it


def table(path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


# Statistics


def test_equal_values_share_their_rank_and_a_diverged_run_comes_last(study):
    assert study.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert study.ranks(np.array([math.nan, 1.0, 5.0])).tolist() == [3.0, 1.0, 2.0]


def test_a_rank_correlation_is_that_of_the_textbook(study):
    x, y = np.arange(5.0), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    # 1 - 6 Σ d² / (n (n² - 1)), with Σ d² = 4
    assert study.rank_correlation(x, y) == pytest.approx(0.8)
    assert study.rank_correlation(np.exp(x), -y) == pytest.approx(-0.8)
    assert math.isnan(study.rank_correlation(np.ones(5), y))
    assert study.interval(x, x**3) == pytest.approx((1.0, 1.0))


def test_rank_correlations_with_ties_are_those_of_scipy(study):
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(0).integers(6, size=(2, 40)).astype(float)
    assert study.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_partial_correlation_is_that_of_the_formula_and_of_what_is_left(study):
    z, noise, other = np.random.default_rng(0).normal(size=(3, 60))
    x, y = z + noise, z + other
    xy, xz, yz = (study.rank_correlation(*pair) for pair in itertools.combinations((x, y, z), 2))
    formula = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert study.rank_correlation(x, y, [z]) == pytest.approx(formula)
    assert math.isnan(study.rank_correlation(x, y, [x]))  # nothing of it is left


def test_the_interval_of_a_rank_correlation_covers_it(study):
    generator, inside = np.random.default_rng(0), 0
    for _ in range(20):
        x = generator.normal(size=50)
        low, high = study.interval(x, generator.normal(size=50), draws=100)
        inside += low <= 0 <= high
    assert inside >= 16


def test_a_fit_predicts_what_it_can_know_and_not_noise(study):
    generator = np.random.default_rng(0)
    spectra = generator.normal(size=(60, 200))
    spectra[:, :50] += 2 * (known := generator.normal(size=60))[:, None]
    assert study.rank_correlation(study.predicted([spectra], known), known) > 0.9
    assert study.rank_correlation(study.predicted([spectra], generator.normal(size=60)), known) < 0.5
    blind = [study.predicted([generator.normal(size=(60, 200))], known) for _ in range(5)]
    assert np.mean([study.rank_correlation(guess, known) for guess in blind]) < 0.1


def test_the_authors_grid_gives_the_correlations_that_others_found():
    rows = table(FOLDER / "results" / "grid_vogt2020_char_lstm_grid_correlations.csv")
    found = {
        (name, epoch): float(rows[f"{name}, epoch {epoch}"]["rank correlation"])
        for name in ("largest exponent", "mean exponent", "variance over index", "share above -3 bits")
        for epoch in (15, 4)
    }
    # In this order; from another program.
    assert list(found.values()) == [-0.570, -0.458, 0.479, 0.526, -0.518, -0.545, 0.442, 0.420]
    assert float(rows["learning rate"]["rank correlation"]) == -0.519
    assert float(rows["dropout"]["rank correlation"]) == 0.444


def test_an_exponent_crosses_zero_between_two_ranges():
    from c_ranges import crossing

    assert crossing([1.0, 4.0], [-1.0, 1.0]) == pytest.approx(2.0)
    assert math.isnan(crossing([1.0, 4.0], [-2.0, -1.0]))


# Conventions


@pytest.fixture
def matrices():
    from lightning_lyapunov import jacobians

    torch.manual_seed(0)
    lstm, inputs = torch.nn.LSTM(3, 4, bias=False), torch.randn(30, 2, 3)
    with torch.no_grad():
        lstm.weight_hh_l0 *= 3
    return lstm, inputs, jacobians(lstm, inputs)


def test_the_full_convention_is_the_spectrum_of_the_package(matrices, study):
    import conventions

    from lightning_lyapunov import lyapunov_spectrum

    lstm, inputs, all_of_them = matrices
    expected = lyapunov_spectrum(lstm, inputs, warmup=conventions.WARMUP, dtype=torch.float64).mean(0)
    assert conventions.product_spectrum(all_of_them) == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_other_conventions_are_what_they_are_called(matrices):
    import conventions

    lstm, inputs, all_of_them = matrices
    parts = {name: part(all_of_them, 4) for name, part in conventions.CONVENTIONS.items()}
    cell = torch.nn.LSTMCell(3, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(lstm.weight_ih_l0)
        cell.weight_hh.copy_(lstm.weight_hh_l0)
    state = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    state = cell(inputs[0, 0].double(), (torch.zeros(4).double(), torch.zeros(4).double()))
    held = torch.func.jacrev(lambda h: cell(inputs[1, 0].double(), (h, state[1]))[0])(state[0].detach())
    torch.testing.assert_close(parts["h only"][1, 0], held, rtol=1e-5, atol=1e-6)
    spectra = {name: conventions.product_spectrum(part) for name, part in parts.items()}
    for name in ("(h, c)", "h only"):
        log_det = torch.linalg.slogdet(parts[name][conventions.WARMUP :]).logabsdet.mean()
        assert spectra[name].sum() == pytest.approx(log_det.item(), abs=1e-4)
        assert spectra[f"{name}, transposed"].sum() == pytest.approx(log_det.item(), abs=1e-4)
        assert spectra[f"{name}, transposed"] != pytest.approx(spectra[name], abs=1e-3)


# The scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_FIGURE)
def test_a_script_runs_and_reads_what_is_done(name, monkeypatch, tmp_path, capsys):
    for done in ("0", r"(\d+)"):
        run_script(name, monkeypatch, tmp_path, "--fast")
        counts = re.search(rf"^{done} of (\d+) runs are in", capsys.readouterr().out)
        assert counts
    assert counts.group(1) == counts.group(2)
    assert (tmp_path / "fast" / FIRST_FIGURE[name]).stat().st_size > 10_000


@pytest.mark.slow
def test_the_conventions_are_compared_on_a_grid_that_was_cut_short(monkeypatch, tmp_path, capsys):
    import b_grid
    import study

    run_script("b_grid", monkeypatch, tmp_path, "--fast")
    path = tmp_path / "fast" / "grid.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")  # the last run did not come to its end
    assert len(study.recorded(path)) == len(b_grid.settings("fast")) - 1
    capsys.readouterr()
    run_script("conventions", monkeypatch, tmp_path, "--fast")
    assert "5 of 6 runs are in" in capsys.readouterr().out
    assert len(study.recorded(path)) == 6
    rows = table(tmp_path / "fast" / "conventions_summary.csv")
    for name in ("(h, c)", "h only"):  # the determinants are the same
        assert rows[name]["mean"] == rows[f"{name}, transposed"]["mean"]
    assert float(rows["(h, c)"]["in bits"]) == pytest.approx(float(rows["(h, c)"]["largest"]) / math.log(2), abs=2e-3)


@pytest.mark.slow
def test_the_same_table_is_made_of_another_grid(monkeypatch, tmp_path, capsys):
    generator = np.random.default_rng(0)
    rate, dropout = (part.ravel() for part in np.meshgrid(np.arange(1.0, 6.0), np.arange(0.0, 0.5, 0.1)))
    loss = np.stack((generator.normal(size=25), rate), 1)
    spectra = np.sort(generator.normal(size=(25, 12)), 1)[:, ::-1]
    spectra[:, 0] = 10 - rate
    grid = {"learning_rate": rate, "dropout": dropout, "val_loss": loss, "e1_mean": spectra, "e2_mean": spectra}
    np.savez(tmp_path / "made.npz", **grid)
    run_script("b_grid", monkeypatch, tmp_path, "--fast", "--grid", str(tmp_path / "made.npz"))
    rows = table(tmp_path / "fast" / "grid_made_correlations.csv")
    assert float(rows["largest exponent, epoch 2"]["rank correlation"]) == -1
    assert float(rows["learning rate"]["rank correlation"]) == 1
    assert float(rows["dropout"]["rank correlation"]) == 0
    assert (tmp_path / "fast" / "grid_made.png").exists()


# The page


def test_the_figures_and_tables_of_the_page_are_there_and_small():
    links = set(re.findall(r"\]\((results/.*?)\)", PAGE))
    files = {path.relative_to(FOLDER).as_posix() for path in (FOLDER / "results").iterdir()}
    assert {link for link in links if link.endswith(".png")} == {path for path in files if path.endswith(".png")}
    assert links <= files
    assert sum((FOLDER / path).stat().st_size for path in files) < 600_000
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"study"}
    assert all(f"{name}.py" in PAGE for name in scripts)
