"""What a step of an attack launches and waits for on a GPU does not creep up."""

from pathlib import Path

import pytest
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


@pytest.mark.parametrize("after", ["", "## More\n\nText.\n"])
def test_a_section_takes_the_place_of_its_older_self(after):
    page = LAUNCHES.put_into(f"# Page\n\nText.\n{after}", f"{LAUNCHES.HEAD}\n\nfirst\n")
    again = LAUNCHES.put_into(page, f"{LAUNCHES.HEAD}\n\nsecond\n")
    assert again == page.replace("first", "second") and "# Page\n\nText.\n" in again and after.strip() in again
