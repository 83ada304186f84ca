"""Hot operations, a file each: a reference and fast implementations of one signature, and the table
that picks.
"""
