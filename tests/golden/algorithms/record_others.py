"""The libraries beside verl and TRL, one function each."""

from record_areal import areal
from record_authors import gmpo, gtpo, r1_zero
from record_nemo_rl import nemo_rl
from record_openrlhf import openrlhf
from record_prime_rl import prime_rl
from record_skyrl import skyrl
from record_slime import slime

__all__ = ["areal", "gmpo", "gtpo", "nemo_rl", "openrlhf", "prime_rl", "r1_zero", "skyrl", "slime"]
