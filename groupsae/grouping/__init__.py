"""Layer distances in, groups of layers out. Free of torch; the metrics are in `angles`, `moments`.

Distances are mean angles between residual streams in fractions of pi (arXiv 2410.21508, 3.1).
"""

from groupsae.grouping.partition import Partition, amad
from groupsae.grouping.rules import choose, partition

__all__ = ["Partition", "amad", "choose", "partition"]
