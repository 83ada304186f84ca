"""The routed experts' FFN: each token through its top-k experts, mixed by their gates.

In come tokens, the ids of their experts, their gates and the experts' weights; out comes the
mixture. `table.pick` chooses the implementation; all have one signature, and `reference` is the one
that the others are tested against. Dropless: no token is ever left out. Routing itself is
model/layers/moe.py.

It imports kernels and errors only. Start in table.py, then read reference.py.
"""
