"""Let a cache grow: the folder of a spec becomes the folder of a larger one, and a build does the rest."""

from darht.cache.builder.history import growth_problems, remember
from darht.cache.format.manifest import MANIFEST, SPEC, read_spec
from darht.cache.format.spec import CacheSpec
from darht.core.config import canonical_json
from darht.core.errors import SpecMismatchError
from darht.core.storage import Location, open_storage


def grow(location: Location, spec: CacheSpec) -> None:
    """Make a cache one of `spec`, which may add teachers, attacks and views; then `build` computes what is new.

    Nothing that is done is lost: units of arrays that stay as they are stay done, and clean logits of former views
    are taken from their old shards. Calling it again, or `build` with the new spec, goes on after a kill.

    Raises:
        CacheError: there is no cache.
        SpecMismatchError: something else than an addition differs; the message lists the fields.
    """
    folder = open_storage(location)
    old = read_spec(folder)
    text = canonical_json(spec).encode()
    if canonical_json(old).encode() == text:
        return
    problems = growth_problems(old, spec)
    if problems:
        raise SpecMismatchError(
            f"{folder} cannot be extended: {'; '.join(problems)}; only teachers, attacks and views can be added: "
            "choose a new --out folder for another cache"
        )
    # The order is what makes a kill harmless: the old spec is kept before it is replaced, and the seal is broken
    # before, so that nobody takes the half-extended cache for the whole of either.
    remember(folder, old)
    folder.remove(MANIFEST)
    folder.write(SPEC, text)
