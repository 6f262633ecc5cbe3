"""The subcommands of `passion`, one module each."""
