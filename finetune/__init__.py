"""The nouns that several commands need; scripts import from here, and this package imports from `formats`."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  before any module that an older Python cannot read
    sys.exit("error: Python 3.11 or 3.12 is needed, this is %d.%d; use the environment in .venv "  # noqa: UP031
             "(make install, then: source .venv/bin/activate)" % sys.version_info[:2])  # fmt: skip
