"""The site builds without a warning: every page is in it, every link leads somewhere, every name has its entry."""

import re
import subprocess
import sys

from blocks import ROOT


def test_the_site_builds(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CacheDataset" in (tmp_path / "site" / "api.html").read_text()


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
