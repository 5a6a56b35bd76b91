"""The command from a checkout: `python cli.py` is `flux-krea`."""

from mlx_flux_krea.cli import main

if __name__ == "__main__":
    main()
