"""`python -m noetherperf`: the command line without its script."""

from noetherperf.cli import main

if __name__ == "__main__":
    main()
