"""The simulation gives the figures of the specification, noise and all."""

import pytest

from mmroute.bench.simulation import simulate

ACCURACY = {
    # ranking: budget: at noise 0, .15, .30
    "random": {"0.2": (0.619, 0.619, 0.619), "0.4": (0.649, 0.648, 0.648)},
    "hardest": {"0.2": (0.600, 0.644, 0.650), "0.4": (0.730, 0.727, 0.705)},
    "target": {"0.2": (0.600, 0.617, 0.624), "0.4": (0.610, 0.655, 0.660)},
    "advantage": {"0.2": (0.720, 0.709, 0.679), "0.4": (0.730, 0.727, 0.710)},
}
SPEED_UP = {
    "hardest": {"0.2": (3.24, 1.36), "0.4": (1.90, 1.25)},
    "advantage": {"0.2": (4.81, 0.86), "0.4": (2.43, 0.96)},
}


@pytest.mark.parametrize(("column", "noise"), list(enumerate((0.0, 0.15, 0.30))))
def test_accuracy_is_the_specifications(column: int, noise: float) -> None:
    found = simulate(noise)
    for name, rows in ACCURACY.items():
        for budget, values in rows.items():
            # two draws of 200 000 queries differ by three standard errors of .0011 at most
            assert found[name][budget]["accuracy"] == pytest.approx(values[column], abs=0.0035), (name, budget)


def test_speed_up_and_dearness_are_the_specifications() -> None:
    found = simulate(0.15)
    for name, rows in SPEED_UP.items():
        for budget, (speed, dear) in rows.items():
            assert found[name][budget]["speed_up"] == pytest.approx(speed, rel=0.01)
            assert found[name][budget]["kappa"] == pytest.approx(dear, abs=0.01)
