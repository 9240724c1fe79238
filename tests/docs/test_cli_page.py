"""`docs/cli.md` is what the commands say."""

from pathlib import Path

from scripts import ROOT, load_script


def test_the_page_of_commands_is_what_the_commands_say():
    page = load_script(Path(".ci/cli_page.py")).page()
    assert page == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`, which writes docs/cli.md anew"
