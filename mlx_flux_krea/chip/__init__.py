"""Checks by which a machine shows that it computes correctly, and how fast: `flux-krea doctor --chip`."""
