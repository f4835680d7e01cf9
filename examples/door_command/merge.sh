#!/bin/sh
# The merger runs with its own Python and its own packages; ACME_PYTHON says where that is.
exec "${ACME_PYTHON:-.venv/bin/python}" "$(dirname "$0")/merge.py" "$@"
