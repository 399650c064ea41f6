"""One mesh, logical axis names, one table of rules: where every array of a training lives.

`layout.Layout` is the configuration (``train.mesh``): how many devices each mesh axis has, and which logical axis goes
over which mesh axis. `layout.constrain` states where an activation lives, and does nothing outside a layout;
`pipeline.through` runs a stack of layers, in stages where the layout has them; `table.lookup` reads embeddings.
"""

from lm.parallel.layout import AXES, RULES, Layout, between, constrain, current, paced, parts
from lm.parallel.pipeline import through
from lm.parallel.table import lookup

__all__ = ["AXES", "RULES", "Layout", "between", "constrain", "current", "lookup", "paced", "parts", "through"]
