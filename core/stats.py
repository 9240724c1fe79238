"""Intervals and bounds for measured shares."""

import math


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), 95 % by default; (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # All or none right puts an end of the interval on the share itself, which rounding must not pass.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def beyond_chance(count: int, share: float, alpha: float = 1e-3) -> int:
    """The least k that `count` independent guesses, each right with probability `share` in (0, 1), seldom reach.

    P(X >= k) < `alpha` for a binomial X; `count` + 1 where even all right is not that rare.
    """
    tail, k = 0.0, count + 1
    while k > 0:
        ways = math.lgamma(count + 1) - math.lgamma(k) - math.lgamma(count - k + 2)
        tail += math.exp(ways + (k - 1) * math.log(share) + (count - k + 1) * math.log1p(-share))
        if tail >= alpha:
            break
        k -= 1
    return k
