"""Content credentials (C2PA), and the invisible watermark: how a file says to other programs that a machine made it."""
