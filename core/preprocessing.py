"""What happens to pixels before a network, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens between pixels in [0, 1] at source size and the network, inside the teacher."""

    resize: int | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
