"""The verbs of the command line, one file each; `shared/` holds their common parts and never imports a verb."""
