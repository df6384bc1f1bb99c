"""`python -m optc`."""

import os
import sys

# The current folder comes first: a file of a model or an artifact there would be taken for a module of Python's.
if os.path.realpath(sys.path[0]) == os.getcwd() and not os.path.samefile(
    os.path.dirname(os.path.dirname(__file__)), "."
):
    del sys.path[0]

from optc.cli.main import script

script()
