"""What a build works from."""

from dataclasses import dataclass

from torch import Tensor

from darht.cache.format.layout import ArrayLayout
from darht.cache.format.spec import CacheSpec
from darht.cache.sources.load import FileSource, Source
from darht.core.nets.classifier import Classifier


@dataclass(frozen=True)
class Plan:
    """Everything a build needs, loaded and checked before the first unit is computed.

    `teachers` lacks those of the spec whose folders are gone: what they said may all be stored already.
    """

    spec: CacheSpec
    source: Source | FileSource
    offsets: Tensor
    teachers: dict[str, Classifier]
    arrays: dict[str, ArrayLayout]
    origin: dict[str, object]

    @property
    def shards(self) -> int:
        """How many row blocks there are."""
        return max(array.shards for array in self.arrays.values())

    def block(self, shard: int) -> list[ArrayLayout]:
        """The arrays of one row block in the order of work: inputs before what is made from them."""
        return [array for array in self.arrays.values() if shard < array.shards]

    @property
    def units(self) -> list[tuple[ArrayLayout, int]]:
        """All units in the order of work."""
        return [(array, shard) for shard in range(self.shards) for array in self.block(shard)]
