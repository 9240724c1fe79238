"""What a step of an attack launches and waits for on a GPU does not creep up."""

from pathlib import Path

from scripts import load_script

LAUNCHES = load_script(Path("bench/launches_engine.py"))
LIMITS = {"PGD, `full`": (27, 0.0), "PGD, `first_hit`": (39, 0.125),
          "Auto-PGD, `full`": (65, 0.0), "Auto-PGD, `first_hit`": (77, 0.125)}  # fmt: skip


def test_a_step_launches_and_waits_seldom():
    found = LAUNCHES.count({"width": 2, "blocks": [1, 1, 1, 1]})
    assert list(found) == list(LIMITS)
    for name, (launches, waits) in LIMITS.items():
        assert found[name]["around"] <= launches and found[name]["waits"] <= waits, (name, found[name])
        assert found[name]["network"] > 50
