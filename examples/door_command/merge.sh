#!/bin/sh
# The merger runs with its own Python and its own packages (-I: nothing of the caller's); ACME_PYTHON says where it is.
exec "${ACME_PYTHON:-.venv/bin/python}" -I "$(dirname "$0")/merge.py" "$@"
