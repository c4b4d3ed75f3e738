"""A process that measures one job: pickled on stdin, rows on stdout as lines of JSON, by case."""

from __future__ import annotations

import json
import os
import pickle
import sys

from .job import Job


def main() -> None:
    # What libraries print is not a row: it goes to stderr, from C code too.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job: Job = pickle.load(sys.stdin.buffer)
    for rows in job.rows():
        print(json.dumps(rows), file=answers, flush=True)


if __name__ == "__main__":
    main()
