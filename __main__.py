"""Entry point of ``python -m sparsary``, the same as the console script."""

from . import main

if __name__ == "__main__":
    main()
