"""Rules of propagation, one family a file; `_rule` says what a rule is."""

from lrpfunc.rules._rule import Rule as Rule
from lrpfunc.rules.alpha_beta import AlphaBeta as AlphaBeta
from lrpfunc.rules.elementwise import Pass as Pass
from lrpfunc.rules.elementwise import ReLUBetaSmooth as ReLUBetaSmooth
from lrpfunc.rules.elementwise import ReLUDeconvNet as ReLUDeconvNet
from lrpfunc.rules.elementwise import ReLUGuidedBackprop as ReLUGuidedBackprop
from lrpfunc.rules.epsilon import Epsilon as Epsilon
from lrpfunc.rules.epsilon import Norm as Norm
from lrpfunc.rules.flat import Flat as Flat
from lrpfunc.rules.flat import WSquare as WSquare
from lrpfunc.rules.gamma import Gamma as Gamma
from lrpfunc.rules.generic import Gradient as Gradient
from lrpfunc.rules.generic import Stop as Stop
from lrpfunc.rules.generic import Uniform as Uniform
from lrpfunc.rules.signal import SignalTakesAll as SignalTakesAll
from lrpfunc.rules.softmax import TaylorSoftmax as TaylorSoftmax
from lrpfunc.rules.zbox import ZBox as ZBox
from lrpfunc.rules.zplus import ZPlus as ZPlus
