"""Distances between generated and real images, in the features of a named network.

    features of real [n, d], of generated [m, d] --frechet_distance--> distance of two Gaussians
                                                 --memberships--> precision, recall, coverage
                                                 --matches--> whether each image fits its own caption

Precision: share of generated images among the real ones. Recall: share of real images among the generated ones. Coverage:
share of real images with a generated one near. "Among": within the distance of some image's k-th nearest neighbour.

Sources: Heusel et al. 2017 (Frechet distance); Kynkaanniemi et al. 2019 (precision, recall); Naeem et al. 2020 (coverage).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NEIGHBOURS = 5


class Memberships(NamedTuple):
    """precise [m]: of each generated image. recalled, covered [n]: of each real image. nearest [m]: index of the nearest
    real image; distance [m]: to it; radius [n]: of each real image's k nearest real neighbours."""

    precise: np.ndarray
    recalled: np.ndarray
    covered: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    radius: np.ndarray


def memberships(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS) -> Memberships:
    """
    Args:
        real, generated: [n, d] and [m, d].
        k: neighbours; fewer if a set is smaller.

    Raises:
        ValueError: fewer than two images in a set, or features of different width.
    """
    real, generated = _checked(real, generated)
    between = _distances(generated, real)  # [m, n]
    real_radius, generated_radius = _radius(real, k), _radius(generated, k)
    nearest = between.argmin(axis=1)
    return Memberships(
        precise=(between <= real_radius[None]).any(axis=1),
        recalled=(between <= generated_radius[:, None]).any(axis=0),
        covered=(between <= real_radius[None]).any(axis=0),
        nearest=nearest,
        distance=between[np.arange(len(generated)), nearest],
        radius=real_radius,
    )


def matches(real: np.ndarray, generated: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each generated image the share of the other real images that are farther from it than its own: 0.5 by chance,
    1 where its own is the nearest. Equal distances count half.

    Args:
        own: [m], the row in `real` of each generated image's caption.

    Raises:
        ValueError: see `memberships`.
    """
    real, generated = _checked(real, generated)
    between = _distances(generated, real)
    to_own = between[np.arange(len(generated)), own][:, None]
    farther, equal = (between > to_own).sum(axis=1), (between == to_own).sum(axis=1) - 1
    return (farther + equal / 2) / (len(real) - 1)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean difference|^2 + trace(A + B - 2 sqrt(A B)) of the two sets' covariances.

    Biased upwards in small sets: compare only distances of equal numbers of images (`halves` gives a floor).

    Raises:
        ValueError: see `memberships`.
    """
    a, b = _checked(a, b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    left = (a - mean_a) / np.sqrt(len(a) - 1)
    right = (b - mean_b) / np.sqrt(len(b) - 1)
    # The trace of sqrt(A B) is the nuclear norm of left right^T; exact also with fewer images than features.
    cross = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * cross
    return max(0.0, float(distance))


def halves(real: np.ndarray) -> float | None:
    """The Frechet distance of every second real image to the others: a lower limit for models with so few images. None
    for fewer than four."""
    return frechet_distance(real[::2], real[1::2]) if len(real) >= 4 else None


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {a.shape} and {b.shape} must be [images, width] of one width")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} images are too few: distributions need at least two each")
    return a, b


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def _radius(points: np.ndarray, k: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other one."""
    distances = _distances(points, points)
    np.fill_diagonal(distances, np.inf)
    k = min(k, len(points) - 1)
    return np.partition(distances, k - 1, axis=1)[:, k - 1]
