"""One file per experiment: ``python -m experiments.run --config=configs/NAME.py[:scale]``."""
