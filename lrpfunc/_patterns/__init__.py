"""Operations that are one layer together, told by how they are connected."""

from lrpfunc._patterns.activation import activation as activation
from lrpfunc._patterns.normalization import normalization as normalization
from lrpfunc._patterns.softmax import softmax as softmax
from lrpfunc._patterns.tile import Reached as Reached
from lrpfunc._patterns.tile import Tile as Tile
