"""The benchmark harness: `python -m benchmarks`, or `./dev bench`. README.md beside this file is its manual."""
