"""`python -m pipeline` and the console script `twotower`."""

from pipeline.cli import app


def main() -> None:
    """Run the command line; leaves with its exit code."""
    app(prog_name="twotower")


if __name__ == "__main__":
    main()
