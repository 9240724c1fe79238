"""Which names of classes agree."""

import pytest

from darht.core.class_names import check_class_names, differing_names
from darht.core.errors import ConfigError


def test_names_that_agree():
    for first, second in (
        (("cat", "dog"), ("Cat", "dog")),
        (("a cat", "dog"), ("a_cat", "DOG")),
        ((), ("cat", "dog")),  # nothing is known
        (("0", "1"), ("cat", "dog")),  # numbers are no names
        (("cat", "dog"), ("cat", "dog", "cow")),  # compared by count
    ):
        assert differing_names(first, second) is differing_names(second, first) is None


def test_names_that_differ():
    assert differing_names(("cat", "dog", "cow"), ("cat", "cow", "dog")) == (1, "dog", "cow")
    assert differing_names(("1", "0"), ("0", "1")) == (0, "1", "0")
    with pytest.raises(ConfigError, match="x and y name the same classes in another order: class 0 is 'cat' in"):
        check_class_names(("cat", "dog"), ("dog", "cat"), "x", "y")
    with pytest.raises(ConfigError, match="other classes: class 1 is 'dog' in the first, 'cow' in the second"):
        check_class_names(("cat", "dog"), ("cat", "cow"), "x", "y")
