"""The command that serves caches: one library call."""

from pathlib import Path

import click

from darht.core.cli import StateCommand
from darht.core.errors import ConfigError


@click.command(cls=StateCommand)
@click.argument("folders", metavar="CACHE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for every network.")
@click.option("--port", default=8780, show_default=True, type=click.IntRange(1, 65535))
@click.option("--token-file", type=click.Path(path_type=Path), help="A file with the token that readers must bring.")
def serve(folders: tuple[Path, ...], host: str, port: int, token_file: Path | None) -> None:
    """Serve caches and exports over HTTP, read-only; trainers take the URL as --shards, and DARHT_TOKEN."""
    try:
        from darht.cache.serve.app import read_token
        from darht.cache.serve.app import serve as serve_catalogue
        from darht.cache.serve.catalogue import Catalogue
    except ImportError as error:
        raise ConfigError(
            f"serving needs a package that is not installed ({error}): pip install 'darht[serve]'"
        ) from error

    catalogue, token = Catalogue(folders), None if token_file is None else read_token(token_file)
    for name in catalogue.names():
        click.echo(f"http://{host}:{port}/{name}")
    serve_catalogue(catalogue, host=host, port=port, token=token)
