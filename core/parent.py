"""End this process when the one that started it has ended, however that ended."""

import os
import threading
import time

_LOOK = 0.5  # seconds between two looks


def end_with_parent() -> None:
    """From now on a thread looks whether the parent is still there, and kills this process when it is not.

    What is written is whole or absent, so that a kill at any moment leaves what can be gone on with.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(137)  # as after SIGKILL
