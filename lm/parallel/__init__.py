"""One mesh, logical axis names, one table of rules: where every array of a training lives.

`layout.Layout` is the configuration (``train.mesh``): how many devices each mesh axis has, and which logical axis goes
over which mesh axis. `layout.constrain` states where an activation lives, and does nothing outside a layout.
"""

from lm.parallel.layout import AXES, RULES, Layout, constrain, current, parts

__all__ = ["AXES", "RULES", "Layout", "constrain", "current", "parts"]
