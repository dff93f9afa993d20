"""`python -m dql`: the command line, as `dql`; `torchrun ... -m dql train` starts it in several processes."""

import os
import sys

from dql.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All is written and said. A thread of torch's process group may still be there (Gloo's, of torch 2.13, in 2 of
        # 60 runs), on which a C++ destructor would abort the process, and torchrun then end the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
