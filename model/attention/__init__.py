"""Attention as pure functions: from queries, keys and values to the mixed values.

It may import kernels/ and, of model/, config, segments and sharding; it knows no parameters. Start
reading at table.py, which chooses the function. reference.py has the equation over whole sequences,
tiled.py the same by kernels, decode.py the forms over a cache, caches.py what a cache holds,
delta_rule.py the linear attention of Gated DeltaNet, int4.py keys in four bits.
"""
