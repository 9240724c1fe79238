"""Images that a small generative model made: for each digit a Gaussian in the space of a few principal components."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

COMPONENTS = 16


def generated_digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """So many 8x8 digits that are none of scikit-learn's, uint8 `[n, 8, 8, 3]`, and the class each was drawn from.

    No mirror image or noisy copy: the model is fitted to the digits of a class, and its samples lie between them.
    """
    digits, random = load_digits(), np.random.default_rng(seed)
    space = PCA(COMPONENTS, random_state=0).fit(digits.data)
    points, labels = space.transform(digits.data), random.integers(0, 10, count)
    images = np.empty((count, 64))
    for label in range(10):
        own, drawn = points[digits.target == label], labels == label
        samples = random.multivariate_normal(own.mean(0), np.cov(own.T), int(drawn.sum()))
        images[drawn] = space.inverse_transform(samples)
    grey = (images.clip(0, 16) * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return np.repeat(grey[..., None], 3, axis=-1), labels


def save_generated(path: Path, count: int, *, compressed: bool = False, seed: int = 0) -> Path:
    """The same as a file with the keys that public generated sets have."""
    images, labels = generated_digits(count, seed)
    (np.savez_compressed if compressed else np.savez)(path, image=images, label=labels)
    return path
