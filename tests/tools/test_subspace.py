"""Planted geometry is measured as it was planted."""

import numpy as np
import pytest

from darht.cache.read.reader import Cache
from darht.core.errors import ConfigError
from darht.tools.index import Indexes
from darht.tools.subspace import Geometry, effective_rank, inside, mixing, principal_angles, subspaces, top_directions


@pytest.fixture(scope="module")
def geometry(planted: Cache, planted_indexes: Indexes) -> Geometry:
    return subspaces(planted, planted_indexes, k=4, neighbours=10)


@pytest.mark.parametrize(("pair", "degrees"), [((0, 2), 0), ((0, 3), 30), ((0, 1), 90), ((1, 3), 60)])
def test_angles_are_within_half_a_degree(geometry: Geometry, pair: tuple[int, int], degrees: float) -> None:
    assert geometry.attacks == ("pgd-a", "pgd-other", "pgd-same", "pgd-tilted")
    assert geometry.angles[pair] == pytest.approx([degrees] * 4, abs=0.5)
    assert geometry.class_angles[pair] == pytest.approx([degrees] * 3, abs=0.5)


def test_halves_of_one_attack_share_their_subspace(geometry: Geometry) -> None:
    for a in range(4):
        assert geometry.angles[a, a] == pytest.approx([0] * 4, abs=0.5)


def test_energy_inside_the_other_is_the_squared_cosine(geometry: Geometry) -> None:
    assert geometry.energy[0] == pytest.approx([1, 0, 1, 0.75], abs=0.01)
    assert geometry.energy[1, 3] == pytest.approx(0.25, abs=0.01)


def test_the_effective_rank_is_the_planted_one(geometry: Geometry) -> None:
    assert geometry.effective_rank == pytest.approx([4] * 4, abs=0.1)
    assert effective_rank(np.eye(7, 20, dtype=np.float32)) == pytest.approx(7)
    assert effective_rank(np.eye(20, 7, dtype=np.float32)) == pytest.approx(7)


def test_mixing_separates_what_lies_apart_and_not_what_lies_together(geometry: Geometry) -> None:
    assert geometry.mixing[0, 2].p_value > 0.05 and geometry.mixing[0, 2].share == pytest.approx(0.5, abs=0.03)
    assert geometry.mixing[0, 1].p_value < 0.01 and geometry.mixing[0, 1].share < 0.01
    assert geometry.mixing[0, 1].expected == pytest.approx(0.5, abs=0.05)


def test_the_p_value_is_uniform_when_nothing_differs() -> None:
    """Twenty draws without a difference: their p-values must not crowd at either end."""
    generator, values = np.random.default_rng(0), []
    for seed in range(20):
        queries = np.concatenate([np.arange(60)] * 2)
        neighbours, owners = generator.integers(0, 60, (120, 5)), generator.integers(0, 2, (120, 5))
        values.append(mixing(queries, neighbours, owners, rows=60, seed=seed).p_value)
    assert sum(value < 0.05 for value in values) <= 3 and sum(value > 0.5 for value in values) >= 4


def test_mixing_counts_by_hand() -> None:
    found = mixing(np.array([0, 1, 0, 1]), np.array([[1], [0], [1], [0]]), np.array([[0], [1], [1], [1]]), rows=2)
    assert found.share == 0.25


def test_both_ways_to_the_top_directions_agree() -> None:
    generator = np.random.default_rng(1)
    scales = np.array([9, 7, 5, *[0.1] * 17])
    vectors = (generator.standard_normal((1500, 20)) * scales).astype(np.float32)
    large, small = top_directions(vectors, 3), top_directions(vectors[:900], 3)
    assert large.T @ large == pytest.approx(np.eye(3), abs=1e-4)
    assert principal_angles(large, np.eye(20, 3)) == pytest.approx([0] * 3, abs=0.5)
    assert principal_angles(large, small) == pytest.approx([0] * 3, abs=0.5)
    assert inside(vectors, [np.eye(20, dtype=np.float32)]) == pytest.approx([1])


def test_a_class_of_few_rows_has_no_angle(planted: Cache, planted_indexes: Indexes) -> None:
    found = subspaces(planted, planted_indexes, k=120, neighbours=3)  # 200 rows of each class are less than 2k
    assert np.isnan(found.class_angles).all()
    assert found.angles.shape == (4, 4, 120)


@pytest.mark.parametrize(
    ("k", "near", "said"), [(0, 3, r"--k must lie in 1\.\.191"), (192, 3, "got 192"), (4, 600, r"1\.\.599")]
)
def test_more_than_there_is_is_refused(planted: Cache, planted_indexes: Indexes, k: int, near: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        subspaces(planted, planted_indexes, k=k, neighbours=near)


def test_steps_are_told_up_to_the_last(planted: Cache, planted_indexes: Indexes) -> None:
    told: list[tuple[int, int]] = []
    subspaces(planted, planted_indexes, k=2, on_step=lambda what, done, total: told.append((done, total)))
    assert told == [(n, 10) for n in range(1, 11)]
