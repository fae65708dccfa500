"""``python -m kompakt`` is ``kompakt``."""

from kompakt.cli import main

if __name__ == "__main__":
    main()
