"""Properties that anyone can test: hypothesis strategies and assertions for people who write rules.

A rule is right when its properties hold on models nobody thought of. One line proves a new one:

    check_rule(MyRule())

draws small networks at random and asserts of each that derivatives of relevance are exact, that every layer's relevance
is accounted for, that `vmap` equals a loop, that samples keep to themselves, that a call changes nothing, that
relevance is linear in what it starts from, that the gradient and the value are the model's own, and that all of it
compiles. Whatever fails is reported with the smallest network that shows it, as code to paste. CONTRIBUTING.md walks
through writing a rule, breaking it in four ways and reading what this says.

The assertions take any `model_fn`, `params`, `x` and rules in float64, not only what is drawn here; the strategies are
ordinary ones, to be used in tests of one's own:

    >>> import lrpfunc as lrp
    >>> from hypothesis import given, settings
    >>> from lrpfunc.testing import assert_conservation, models
    >>> @settings(max_examples=5, deadline=None, database=None)
    ... @given(models(["dense", "activation", "residual"]))
    ... def test_epsilon_accounts_for_all_relevance(net):
    ...     assert_conservation(*net.case(), lrp.epsilon(0.1))
    >>> test_epsilon_accounts_for_all_relevance()

A net is described by a few numbers, `Net(blocks=(Linear(out=2), Pointwise()), shape=(1, 3))`; it prints as code that
makes it again, and `net.case()` gives the function, its parameters and its input.

It needs hypothesis: `pip install 'lrpfunc[testing]'`.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lrpfunc.testing needs hypothesis, which is not installed:\n\n    pip install 'lrpfunc[testing]'",
        name="hypothesis",
    ) from error

from lrpfunc.testing._assertions import assert_compiles as assert_compiles
from lrpfunc.testing._assertions import assert_conservation as assert_conservation
from lrpfunc.testing._assertions import assert_gradient_equivalence as assert_gradient_equivalence
from lrpfunc.testing._assertions import assert_linear_in_relevance as assert_linear_in_relevance
from lrpfunc.testing._assertions import assert_lowered_equals_walk as assert_lowered_equals_walk
from lrpfunc.testing._assertions import assert_pure as assert_pure
from lrpfunc.testing._assertions import assert_samples_apart as assert_samples_apart
from lrpfunc.testing._assertions import assert_vmap_equals_loop as assert_vmap_equals_loop
from lrpfunc.testing._blocks import Conv as Conv
from lrpfunc.testing._blocks import InPlace as InPlace
from lrpfunc.testing._blocks import Linear as Linear
from lrpfunc.testing._blocks import Normalize as Normalize
from lrpfunc.testing._blocks import Pointwise as Pointwise
from lrpfunc.testing._blocks import Pool as Pool
from lrpfunc.testing._blocks import Rearrange as Rearrange
from lrpfunc.testing._case import PROPERTIES as PROPERTIES
from lrpfunc.testing._case import Case as Case
from lrpfunc.testing._check import check_rule as check_rule
from lrpfunc.testing._derivatives import assert_exact_derivatives as assert_exact_derivatives
from lrpfunc.testing._hyperparameters import with_tensors as with_tensors
from lrpfunc.testing._net import Input as Input
from lrpfunc.testing._net import Net as Net
from lrpfunc.testing._paths import Branch as Branch
from lrpfunc.testing._paths import Gated as Gated
from lrpfunc.testing._paths import Loop as Loop
from lrpfunc.testing._paths import Residual as Residual
from lrpfunc.testing._paths import Reuse as Reuse
from lrpfunc.testing._paths import SelfAttention as SelfAttention
from lrpfunc.testing._paths import Tied as Tied
from lrpfunc.testing._strategies import FAMILIES as FAMILIES
from lrpfunc.testing._strategies import Start as Start
from lrpfunc.testing._strategies import composites as composites
from lrpfunc.testing._strategies import inputs as inputs
from lrpfunc.testing._strategies import models as models
from lrpfunc.testing._strategies import rules as rules
from lrpfunc.testing._strategies import targets as targets
