"""The model: pure functions and Linen modules over explicit parameters. Imports nothing of ours but
errors.py.
"""
