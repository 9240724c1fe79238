"""darht: robust image classifiers, distilled from heterogeneous teachers whose answers were cached once, offline.

The layers, each of which imports only those before it: ``darht.core``, ``darht.attacks``, ``darht.cache``,
``darht.trainer``, ``darht.tools``. This module is light on purpose: it imports neither torch nor zarr.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("darht")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
