"""The certificate: compositions of features in which each two and three meet, held against one device.

    axes.py          the features, and the values that each can take
    compositions.py  a row of values -> a small recipe, and why it does not compose if it does not
    covering.py      few rows in which all pairs and triples meet that compose
    array.py         the rows, as `compositions.json` beside it holds them
    run.py           a row on its ranks and the reference: do they agree?
    results.py       what came of it, a line each; table.py: the page

May import `parity`, `planner` and the packages below them.
"""
