"""What lrpfunc serves and what it costs, measured."""
