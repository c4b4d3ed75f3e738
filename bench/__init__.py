"""Benchmarks: our kernels against what people run today, in one run, checked before timed.

`python -m fastconv bench` starts here; see `options` for the commands. A case (`cases`) becomes a
problem with arrays and the exact answer (`problems`); ours (`ours`) and the peers (`baselines`)
prepare it, are checked, and are timed by turns (`rows`). Each library is timed against ours in a
process of its own (`run` starts `processes`, a `child` does a `job`); rows are merged and written
as they come (`results`) and shown as tables and plots (`report`, `readme`, `plots`).
"""
