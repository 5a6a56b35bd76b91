"""Adapters (LoRA and its kin): their files in every public naming, their formulas, and those that are installed.

`names.py` has the tables of names; `checks.py` and `reading.py` turn a file into the parts of `parts.py`; `formulas.py`
turns parts and weights into the branches that run beside a network's layers. `installed.py` knows those in the home
folder, `loaded.py` those of a pipeline.
"""
