"""The verbs of the command line, one file each; `shared/` holds what several of them use."""
