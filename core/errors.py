"""The exceptions of darht. Every message gives the rule that was broken, the numbers, and the fix.

::

    DarhtError                exit 2   anything a user can mend
    ├── ConfigError           exit 2   a spec, recipe or option breaks a rule
    ├── DataError             exit 2   a source file is missing, cut or wrong
    ├── ModelError            exit 2   weights or an architecture do not fit
    ├── UnreachableError      exit 75  a server did not answer for as long as it was waited for: try again
    └── CacheError            exit 2   a cache or run folder cannot be used as asked
        ├── SpecMismatchError exit 2   the folder holds something built from another spec
        ├── IncompleteError   exit 3   units are missing, or the cache is not sealed
        └── CorruptError      exit 4   bytes differ from what was recorded
"""


class DarhtError(Exception):
    """Anything a user can mend; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(DarhtError):
    """A spec, recipe or option breaks a rule."""


class DataError(DarhtError):
    """A source file is missing, cut or wrong."""


class ModelError(DarhtError):
    """Weights or an architecture do not fit."""


class UnreachableError(DarhtError):
    """A server did not answer for as long as it was waited for; what was kept before is whole, as after a kill.

    Attributes:
        waited: whether waiting longer may help; commands that can be told to then say how.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: schedulers take it for "try again"

    def __init__(self, message: str, *, waited: bool = False) -> None:
        super().__init__(message)
        self.waited = waited


class CacheError(DarhtError):
    """A cache or run folder cannot be used as asked."""


class SpecMismatchError(CacheError):
    """The folder holds something built from another spec."""


class IncompleteError(CacheError):
    """Units are missing, or the cache is not sealed."""

    exit_code = 3


class CorruptError(CacheError):
    """Bytes differ from what was recorded."""

    exit_code = 4
