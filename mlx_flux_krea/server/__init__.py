"""The page on this machine, and its HTTP interface: `flux-krea ui`. docs/http.md describes every route."""
