"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("darht")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    VERSION = "0+unknown"
