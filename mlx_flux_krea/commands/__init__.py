"""The verbs of the command line, one file each; `generate` is in cli.py, what they share in terminal.py."""
