"""Measures speed, memory and quality: of the model, of its kernels, and of rivals side by side.

Each script prints one JSON line, and its docstring, which is its `--help`, says what it measures
and how it is called; the results worth keeping are in bench/results/, with a README. Scripts that
time something take their config and clock from `workload.py`, the file to read first; those named
*_tiny.py run the same workload in another project and are run by that project's own Python. The
package may import every other one, and only the tests import it.
"""
