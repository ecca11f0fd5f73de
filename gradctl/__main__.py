"""``python -m gradctl``."""

from gradctl.cli.main import main

if __name__ == "__main__":
    main()
