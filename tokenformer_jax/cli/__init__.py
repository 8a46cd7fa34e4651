"""The CLI: thin absl mains over library functions, `python -m tokenformer_jax.cli.NAME --help`."""
