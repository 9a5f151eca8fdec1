"""An LRP of its own, written apart from the library, that the library is compared with.

It imports nothing of lrpfunc and shares no formula with it. A plain forward pass is recorded number by number: each
element of each tensor has an id, an operation maps ids to ids (`tape`). So views and writes in place need no rule: two
views of one memory read the same ids. Operations are gathered into layers (`layers`), each with its dense Jacobian, and
rules distribute relevance over a table of contributions, output by input (`rules`). Composites are written as text,
which is read twice, by the library's names and by the oracle's (`composites`).

    python -m tests.oracle --cases 10000

draws models and rules at random and compares value, relevance, the balance and a derivative (`compare`).
"""
