"""Class names of two sides that meet: a model and data, or two splits. Equal counts say nothing about the order."""

from collections.abc import Sequence

from darht.core.errors import ConfigError


def differing_names(first: Sequence[str], second: Sequence[str]) -> tuple[int, str, str] | None:
    """The first class that two lists of names call differently, as (number, name, name); None where they agree.

    Upper case, spaces, '_' and '-' do not count. A list that is empty, or that numbers its classes in order, does not
    name them and agrees with all others but the same numbers in another order; so do lists of different lengths, which
    are compared by count.
    """
    ours, theirs = ([_plain(name) for name in names] for names in (first, second))
    if len(ours) != len(theirs) or (sorted(ours) != sorted(theirs) and (_numbers(ours) or _numbers(theirs))):
        return None
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return number, first[number], second[number]
    return None


def check_class_names(first: Sequence[str], second: Sequence[str], one: str, other: str) -> None:
    """Refuse two sides that name their classes differently; `one` and `other` say whose names they are.

    Raises:
        ConfigError: with the first names that differ.
    """
    found = differing_names(first, second)
    if found is not None:
        number, ours, theirs = found
        order = sorted(map(_plain, first)) == sorted(map(_plain, second))
        what = "the same classes in another order" if order else "other classes"
        raise ConfigError(
            f"{one} and {other} name {what}: class {number} is '{ours}' in the first, '{theirs}' in the second; "
            "bring the classes of the data into one order"
        )


def _plain(name: str) -> str:
    return name.casefold().translate(str.maketrans("", "", " _-"))


def _numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]


def name_of_class(classes: tuple[str, ...], label: int) -> str:
    """The name of a label's class, for people; a row without a label has -1."""
    return classes[label] if label >= 0 else "no label"
