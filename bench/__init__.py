"""What is measured, and how. Each script prints one JSON line; results worth keeping stand in
bench/results/.
"""
