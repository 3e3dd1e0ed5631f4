"""`python -m openline`, where the `openline` command is not on the path."""

from openline.cli import main

if __name__ == "__main__":
    main()
