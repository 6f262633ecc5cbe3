"""`passion`, and `python -m training`."""

import sys


def main() -> None:
    """Run the command line; without the libraries of the `training` extra, say which is missing."""
    try:
        from training.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"error: passion needs {error.name}, which is not installed: pip install 'passion-seg[training]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
