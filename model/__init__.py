"""The model: pure functions and Linen modules over explicit parameters.

Tokens, positions and segments of packed rows go in; hidden states, log-probabilities and what the
layers did come out. It may import kernels/ and errors.py, nothing else of ours.

Start reading at transformer.py: `Block` is a layer. config.py has the legend of shape letters;
layers/table.py says which attention a layer may have, attention/table.py which function computes
it, sharding.py how everything is divided over devices. decode.py reads and writes token by token.
"""
