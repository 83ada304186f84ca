"""Reinforcement learning: what a row of rl/algorithms.py is made of, rollouts, rewards and
evaluation.
"""
