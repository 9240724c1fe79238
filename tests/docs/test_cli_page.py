"""`docs/cli.md` is what the commands say."""

import importlib.util

from blocks import ROOT


def test_the_page_of_commands_is_what_the_commands_say():
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / ".ci" / "cli_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`, which writes docs/cli.md anew"
