"""Leave rows of a cache out of training: the list that `darht-inspect rows` writes."""

from pathlib import Path

from darht.cache.read.reader import Cache
from darht.core.bounded import read_json
from darht.core.errors import ConfigError


def exclude_rows(cache: Cache, path: Path) -> int:
    """Leave out the rows under `rows` of a JSON file; rows held out for selection stay what they are.

    Returns:
        How many rows will be missing from training.

    Raises:
        ConfigError: the file is no such list, was made for another cache, names rows that are not there, or leaves
            nothing to train on.
    """
    try:
        content = read_json(path.read_bytes(), str(path))
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path} does not read as JSON: {error}; darht-inspect rows writes such a list") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, int) and 0 <= row < cache.rows for row in rows):
        raise ConfigError(f"{path} must hold under 'rows' a list of whole numbers in 0..{cache.rows - 1}")
    if content.get("cache_root_hash") != cache.root_hash:
        raise ConfigError(
            f"{path} lists rows of another cache (root hash {str(content.get('cache_root_hash'))[:12]}, that of "
            f"{cache.folder} is {cache.root_hash[:12]}): run darht-inspect rows {cache.folder} again"
        )
    left_out = set(rows) - set(cache.manifest.holdout)
    if len(left_out) + len(cache.manifest.holdout) >= cache.rows:
        raise ConfigError(f"{path} leaves no row of {cache.folder} to train on: use a smaller --filter")
    cache.excluded = tuple(sorted(left_out))
    return len(left_out)
