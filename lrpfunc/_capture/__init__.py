"""From a model function to a program: a graph of whole operations without side effects."""
