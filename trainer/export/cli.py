"""The command that writes a student for use elsewhere: `darht-train export RUN --out DIR`."""

from pathlib import Path
from typing import Any

import click

from darht.core.cli import FOLDER, Command, trust_option


@click.command(cls=Command, kept="nothing is half written")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="A new or empty folder.")
@click.option(
    "--format",
    "kind",
    default="hub",
    show_default=True,
    type=click.Choice(["hub", "plain", "onnx"]),
    help="hub: the student with its map; plain: the folded network's state_dict; onnx: that network, pixels to logits.",
)
@click.option(
    "--which", default="student", show_default=True, type=click.Choice(["student", "last"]), help="Best or last."
)
@trust_option
def export(run: Path, out: Path, kind: Any, which: str) -> None:
    """Write a run's student for use elsewhere."""
    from darht.trainer.export.export import export_run

    exported = export_run(run, out, kind=kind, which=which)
    click.echo(f"{out}: {', '.join(exported.files)}; {exported.checked}")
