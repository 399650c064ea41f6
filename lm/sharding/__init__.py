"""One mesh, logical axis names, one table of rules: where every array lives (`layout`), how a stack of layers runs in
stages (`pipeline`), and how several processes find each other, speak, and end together (`processes`).

`layout.Layout` is the configuration (``train.mesh``): how many devices each mesh axis has, and which logical axis goes
over which mesh axis. `layout.constrain` states where an activation lives, and does nothing outside a layout.
"""

from lm.sharding.layout import AXES, RULES, Layout, constrain, current, gather_after, parts, shard_stream
from lm.sharding.pipeline import run_stack

__all__ = ["AXES", "RULES", "Layout", "constrain", "current", "gather_after", "parts", "run_stack", "shard_stream"]
