"""One profile for hypothesis: the same examples on every machine, however slow."""

from hypothesis import settings

settings.register_profile("lrpfunc", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lrpfunc")
