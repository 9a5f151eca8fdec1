"""Graph-to-graph passes between the capture and the walk."""

from lrpfunc._simplify.functional import Program as Program
from lrpfunc._simplify.functional import functional as functional
from lrpfunc._simplify.functional import is_float as is_float
from lrpfunc._simplify.merge import Affine as Affine
from lrpfunc._simplify.merge import merge as merge
