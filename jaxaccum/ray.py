"""Accumulators and parameter servers across processes and machines, on Ray.

Needs ``pip install 'jaxaccum[ray]'``, and ``import jaxaccum.ray``: the package itself does not
import it. Ray is imported when the first of these is made.
"""

from jaxaccum._ray.errors import UnavailableError, VersionMismatchError
from jaxaccum._ray.layout import TableInit
from jaxaccum._ray.parameter_server import ParameterServer, Pulled
from jaxaccum._ray.tree_accumulator import TreeAccumulator

__all__ = [
    "ParameterServer",
    "Pulled",
    "TableInit",
    "TreeAccumulator",
    "UnavailableError",
    "VersionMismatchError",
]
