"""`python -m dql`: the command line, as `dql`; `torchrun ... -m dql train` starts it in several processes."""

import sys

from dql.cli import main

if __name__ == "__main__":
    sys.exit(main())
