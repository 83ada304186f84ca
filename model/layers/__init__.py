"""The layers' modules: they declare parameters and call the functions that compute.

An attention takes hidden states, a `TokenInfo` and maybe its cache, and returns its output, what
its indexer did, and cache entries; moe.py has the experts. It may import model/attention/,
model/experts/ and kernels/. Start reading at table.py, then mla.py. parameter.py is where a
parameter says its axes and what the optimizer must know of it.
"""
